"""The restricted unpickler: every protocol of plain arrays is read, and nothing else is even looked up."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2sam.data.pickles import load_pickle

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 12)


def write(path: Path, value: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def program(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument), as an attacker would write it."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        np.asfortranarray(ARRAY),
        ARRAY.astype(">i4"),
        np.arange(3),
        np.linspace(0, 1, 5, dtype=np.float32),
        np.array(7, dtype=np.int16),
        np.zeros((0, 3), np.uint8),
        np.array([True, False]),
    ],
    ids=lambda a: f"{a.dtype.str}{a.shape}{'F' if not a.flags.c_contiguous else ''}",
)
def test_arrays_of_every_protocol_are_exact(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    found = load_pickle(write(tmp_path / "a", {"data": array}, protocol))["data"]
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_kept(tmp_path: Path, protocol: int) -> None:
    value = {
        "labels": [1, 2, 300, -4, 2**70],
        "share": 0.5,
        "flag": True,
        "none": None,
        "text": "name",
        "raw": b"\x00\xff",
        "nested": {"a": [1, [2]]},
        "count": np.int64(5),
    }
    assert load_pickle(write(tmp_path / "a", value, protocol)) == value | {"count": 5}


def test_python_2_files_have_text_for_bytes(tmp_path: Path) -> None:
    """Byte strings of Python 2 (opcode U), as in the files of CIFAR: keys become str, values bytes."""
    (tmp_path / "a").write_bytes(b"\x80\x02}(U\x06labels]K\x03aU\x0bbatch_labelU\x03onexu.".replace(b"xu.", b"u."))
    assert load_pickle(tmp_path / "a") == {"labels": [3], "batch_label": b"one"}


def test_the_array_of_a_python_2_file(tmp_path: Path) -> None:
    text = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06abcdeftbs."
    )
    (tmp_path / "a").write_bytes(text)
    assert load_pickle(tmp_path / "a")["data"].tolist() == [[97, 98, 99], [100, 101, 102]]


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Harmful(mark), protocol))
    assert mark.exists()  # it would
    mark.unlink()
    file = write(tmp_path / "data_batch_1", {"data": ARRAY, "labels": [Harmful(mark)]}, protocol)
    with pytest.raises(
        ValueError, match=r"data_batch_1 is refused: it asks for \w+\.system, where only arrays"
    ) as error:
        load_pickle(file)
    assert "nothing in it was run" in str(error.value)
    assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "getattr"), ("os", "system"), ("posix", "system"),
        ("numpy", "load"), ("numpy", "fromfile"), ("numpy.core.multiarray", "fromstring"), ("_codecs", "decode"),
        ("numpy", "dtype.type"), ("numpy", "ndarray.tofile"), ("numpy", "ndarray.__class__"), ("torch", "load"),
        ("numpy.testing._private.utils", "runstring"), ("s2sam.data.pickles", "load_pickle"),
        ("copyreg", "_reconstructor"),
    ],
)  # fmt: skip
def test_names_outside_of_the_list_are_refused(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / "a").write_bytes(program(module, name, "1"))
    with pytest.raises(ValueError, match="is refused: it asks for"):
        load_pickle(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        b"cnumpy.core.multiarray\n_reconstruct\n}Vx\nVy\nsb.",  # changes a function's attributes
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tVb\ntR.",  # an array of another class
        b"cnumpy\nndarray\n(K\x02tR.",  # calls the array type itself
        b"cnumpy\ndtype\n(VO\ntR.",
        b"Pelsewhere\n.",  # a persistent id
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
    ],
)
def test_tricks_with_allowed_names(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(ValueError, match=r"is refused|is not a readable pickle|must hold a dict") as error:
        load_pickle(tmp_path / "a")
    assert "\n" not in str(error.value)
    good = load_pickle(write(tmp_path / "b", {"data": ARRAY}))  # one file cannot spoil the next
    assert np.array_equal(good["data"], ARRAY)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": np.array([{}], dtype=object)}, "holds an array that is not plain numbers"),
        ({"data": np.array(["a"])}, "array of type '<U1', where only numbers may be"),
        ({"data": np.zeros(2, dtype=[("a", "u1")])}, "where only numbers may be"),
        ({"data": np.array(["2020-01-01"], dtype="M8[D]")}, "where only numbers may be"),
        ({"when": pickle.PickleBuffer}, "asks for"),
        ({"set": {1, 2}}, r"asks for \w+\.set,"),
        ([1, 2], "must hold a dict of arrays and lists, not list"),
        (ARRAY, "must hold a dict of arrays and lists"),
        ({"c": 1j}, r"asks for \w+\.complex,"),
        ({"p": Path("x")}, "asks for pathlib"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pickle(write(tmp_path / "a", value))


def test_an_array_that_does_not_fit_its_bytes(tmp_path: Path) -> None:
    whole = pickle.dumps({"data": ARRAY}, 2)
    assert whole.count(b"K\x02K\x0c\x86") == 1
    (tmp_path / "a").write_bytes(whole.replace(b"K\x02K\x0c\x86", b"K\x02K\x0d\x86"))
    with pytest.raises(ValueError, match=r"shape \(2, 13\) and type uint8 does not fit its 24 bytes"):
        load_pickle(tmp_path / "a")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_every_truncation_is_one_sentence(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps({"data": ARRAY, "labels": [1, 2]}, protocol)
    for cut in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a is not a readable pickle, perhaps truncated|a is refused") as error:
            load_pickle(tmp_path / "a")
        assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_files_are_a_value_error_or_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(pickle.dumps({"data": ARRAY, "labels": [1, 2]}, data.draw(st.sampled_from([0, 2, 4, 5]))))
    codes = [
        op.code.encode("latin1")[0] for op in pickletools.opcodes if op.code not in "pqrjgh\x94"
    ]  # no memo indices
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.sampled_from(codes))
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(bytes(whole))
    try:
        outcome = load_pickle(file)
    except ValueError as error:
        outcome = str(error)
    assert isinstance(outcome, dict) or "\n" not in outcome


def test_a_list_that_contains_itself(tmp_path: Path) -> None:
    loop: list[Any] = [ARRAY]
    loop.append(loop)
    found = load_pickle(write(tmp_path / "a", {"loop": loop}))["loop"]
    assert np.array_equal(found[0], ARRAY)
    assert len(found) == 2


def test_text_is_no_pickle(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="a is not a readable pickle"):
        load_pickle(tmp_path / "a")
    with pytest.raises(OSError, match="No such file"):
        load_pickle(tmp_path / "b")
