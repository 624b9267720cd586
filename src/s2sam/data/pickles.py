"""Pickled arrays without the danger of pickle: nothing but stand-ins of this file can be called while a file is read.

A pickle is a program. Its only way to foreign code is to ask for it by name, so :class:`_Reader` answers a short list
of names with stand-ins that build arrays from checked bytes, and refuses all others. Numpy's own unpickling never runs.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

_TYPE = re.compile(r"[|<>=]?[biuf][1248]")
_NDARRAY = "the type numpy.ndarray"  # what the name numpy.ndarray gives: a text, which cannot be called


def load_pickle(path: str | Path) -> dict[str, Any]:
    """The dictionary that `path` holds, whose values are arrays, numbers, bytes, str, None, lists or dicts.

    Reads what Python 2 and 3 wrote, protocols 0 to 5; keys become str, tuples lists. Nothing in the file is run. Arrays
    may stand at the top or in a list there. A file made to harm can still ask for more memory than there is.

    Raises:
        ValueError: the file is truncated or no pickle, holds anything else, or asks for code; the sentence names it.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(pickle.dumps({"labels": [6, 9], "data": np.zeros((2, 3), np.uint8)})), file.flush()
    ...     load_pickle(file.name)["data"].shape
    (2, 3)
    """
    try:
        with open(path, "rb") as file:
            found = _Reader(file, encoding="bytes").load()
    except _RefusedError as error:
        raise ValueError(f"{path} is refused: {error}; nothing in it was run") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged pickle makes its reader stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{path} is not a readable pickle, perhaps truncated; fetch it again ({reason})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dict of arrays and lists, not {type(found).__name__}")
    return {_text(key): _value(value, path) for key, value in found.items()}


class _RefusedError(Exception):
    """The file asks for something that images and labels do not need."""


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names in `_NAMES` only."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for `module.name`, a new one each time, so that no file can change the next one's."""
        make = _NAMES.get((module, name))
        if make is None:
            raise _RefusedError(
                f"it asks for {module}.{name}, where only arrays, numbers, text, lists and dicts may be"
            )
        return make if isinstance(make, str) else _Call(make)

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse references to objects outside of the file."""
        raise _RefusedError("it refers to objects outside of the file")


class _Call:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise _RefusedError("it changes the functions that build its arrays")


class _Type:
    """Stands for numpy.dtype until its byte order is known."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = _text(code)

    def __setstate__(self, state: Any) -> None:
        self.code = f"{_text(state[1])}{self.code.lstrip('|<>=')}"

    def numpy(self) -> np.dtype[Any]:
        """The type, if it is one of booleans or numbers."""
        if not _TYPE.fullmatch(self.code):
            raise _RefusedError(f"it holds an array of type {self.code!r}, where only numbers may be")
        return np.dtype(self.code)


class _Array:
    """Stands for a numpy array until its contents come."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array(data, kind, shape, "F" if fortran else "C")


def _reconstruct(kind: Any, *_: Any) -> _Array:
    """As numpy's: an empty array, to be filled by what follows."""
    if kind is not _NDARRAY:
        raise _RefusedError("it builds an array that is no numpy.ndarray")
    return _Array()


def _frombuffer(data: Any, kind: Any, shape: Any, order: Any, *_: Any) -> _Array:
    """As numpy's for protocol 5: an array at once."""
    out = _Array()
    out.array = _array(data, kind, shape, _text(order))
    return out


def _scalar(kind: Any, data: Any) -> Any:
    """As numpy's: one number."""
    return _array(data, kind, (), "C").item()


def _array(data: Any, kind: Any, shape: Any, order: str) -> np.ndarray:
    """The array in `data`, if its length is what type and shape say."""
    if not isinstance(kind, _Type) or not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
        raise _RefusedError("it holds an array that is not plain numbers")
    dtype = kind.numpy()
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(type(n) is int and n >= 0 for n in sizes) or math.prod(sizes) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {sizes} and type {dtype} does not fit its {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(sizes, order="F" if order == "F" else "C")


def _encode(text: Any, encoding: Any) -> bytes:
    """As _codecs.encode, which is how Python 3 writes bytes for Python 2."""
    if not isinstance(text, (str, bytes)) or _text(encoding) != "latin1":
        raise _RefusedError("it encodes what is no text")
    return text if isinstance(text, bytes) else text.encode("latin1")


def _no_bytes() -> bytes:
    """As bytes(), which is how Python 3 writes no bytes for Python 2."""
    return b""


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _value(value: Any, path: str | Path) -> Any:
    """`value` with arrays for stand-ins."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, (list, tuple)):
        return [v.array if isinstance(v, _Array) else v for v in value]
    if isinstance(value, (str, bytes, bytearray, bool, int, float, dict, type(None))):
        return value
    raise ValueError(f"{path} holds a {type(value).__name__.lstrip('_').lower()} where arrays, numbers or text belong")


_NUMPY = ("numpy.core", "numpy._core")
_NAMES: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
    **{(f"{package}.multiarray", "_reconstruct"): _reconstruct for package in _NUMPY},
    **{(f"{package}.multiarray", "scalar"): _scalar for package in _NUMPY},
    **{(f"{package}.numeric", "_frombuffer"): _frombuffer for package in _NUMPY},
}
