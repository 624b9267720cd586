"""Archives of public data: downloaded when asked, checked, unpacked so that nothing can leave the folder.

The order is: all bytes into a temporary file beside the target, checksum, safe unpacking into a temporary folder, one
rename. What goes wrong in between leaves nothing behind and an older folder as it was.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from s2sam import registry

BLOCK = 1 << 20
TIMEOUT = 60.0  #: seconds without a byte
SCHEMES = ("https", "http", "file")


@dataclass(frozen=True)
class Archive:
    """A .tar or .tar.gz with one folder of data: where it lies, its exact size and checksum, and the folder in it."""

    name: str
    url: str
    size: int
    sha256: str  #: "" if its authors give an MD5 only
    folder: str
    md5: str = ""

    @property
    def checksum(self) -> tuple[str, str]:
        """The name of the strongest checksum that is known, and its value."""
        return ("SHA-256", self.sha256) if self.sha256 else ("MD5", self.md5)


#: Sizes and checksums of the authors' archives; their MD5 is c58f30108f718f92721af3b95e74349a (CIFAR-10) and
#: eb9058c3a382ffc7106e4002c42a8d85 (CIFAR-100). The same SHA-256 stand in keras-team/keras:keras/src/datasets.
ARCHIVES = (
    Archive(
        "cifar10",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        170_498_071,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-batches-py",
    ),
    Archive(
        "cifar100",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        169_001_437,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        "cifar-100-python",
    ),
    Archive(  # checksum: tensorflow/datasets:tensorflow_datasets/url_checksums/cifar10_corrupted.txt, MD5: Zenodo
        "cifar10-c",
        "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar",
        2_918_471_680,
        "c72763e101c723b7c507b96205f7e938912a5d587376173b825850cf3cb876a7",
        "CIFAR-10-C",
        "56bf5dcef84df0e2308c6dcbcbbd8499",
    ),
    Archive(
        "cifar100-c",
        "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar",
        2_918_473_216,
        "",
        "CIFAR-100-C",
        "11f0ed0f1191edbf9fa23466ae6021d3",
    ),
)


def get(
    name: str,
    out: str | Path | None = None,
    *,
    url: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Download the archive `name`, check and unpack it; returns the folder, ready for `load_data`.

    Args:
        name: a row of :data:`ARCHIVES`.
        out: the folder to make; None = data/NAME here.
        url: where to take the archive from instead, as file:///PATH of one that was fetched by other means. It must be
            the same archive, byte by byte.
        progress: called with (bytes so far, bytes in all) after each block.

    Raises:
        ValueError: an unknown name, a target that exists, a URL that is none of https, http and file, or an archive
            that is not the one expected or holds what it must not.
        RuntimeError: the server cannot be reached, refuses, or stops in the middle.
        OSError: a file cannot be written.
    """
    archive = registry.find(ARCHIVES, name, "archive")
    target = Path(out) if out is not None else Path("data") / archive.name
    if target.exists():
        raise ValueError(f"{target} exists; look at it with `s2sam data check {target}`, or give another --out")
    address = url or archive.url
    if urllib.parse.urlsplit(address).scheme not in SCHEMES:
        raise ValueError(f"{address!r} is no address to download from; it begins with https://, http:// or file:///")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{archive.name}-", dir=target.parent) as temporary:
        file = Path(temporary) / "archive.tar"
        download(address, file, archive, progress)
        unpack(file, Path(temporary) / "unpacked")
        inner = Path(temporary) / "unpacked" / archive.folder
        if not inner.is_dir():
            raise ValueError(f"the archive {archive.name} holds no folder {archive.folder}")
        inner.rename(target)
    return target


def download(url: str, file: Path, archive: Archive, progress: Callable[[int, int], None]) -> None:
    """Write what `url` gives to `file`; never more than the archive's size, and nothing but that archive.

    Raises:
        ValueError: another size or checksum.
        RuntimeError: no connection, or it breaks.
    """
    kind, expected = archive.checksum
    sha, done = hashlib.new(kind.replace("-", "").lower(), usedforsecurity=kind != "MD5"), 0
    with file.open("wb") as sink:
        for block in _blocks(url, archive.size + 1):
            sink.write(block)
            sha.update(block)
            done += len(block)
            progress(done, archive.size)
    if done != archive.size:
        kind = "more than" if done > archive.size else f"{done} of"
        raise ValueError(f"{url} gave {kind} the {archive.size} bytes of {archive.name}; try again, or another --url")
    if sha.hexdigest() != expected:
        raise ValueError(f"{url} is not the archive {archive.name}: its {kind} is {sha.hexdigest()}, not {expected}")


def unpack(file: Path, folder: Path) -> None:
    """Unpack files and folders of a .tar or .tar.gz into the new `folder`; anything else refuses the whole archive.

    Names are checked first (no absolute ones, no "..", no drive letters, no links, devices or pipes), all of them
    before the first file is written; then Python's own filter "data" does the rest.

    Raises:
        ValueError: the file is damaged, or holds such a member, which is named.
        RuntimeError: this Python is too old to have that filter.
    """
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("this Python cannot unpack archives safely; use 3.10.12, 3.11.4 or later")
    try:
        with tarfile.open(file, "r:*") as tar:
            for member in tar:
                _check_member(member)
            folder.mkdir()
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file} is no readable archive, perhaps damaged ({reason})") from error


def _check_member(member: tarfile.TarInfo) -> None:
    name = member.name
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or PureWindowsPath(name).root:
        raise ValueError(f"the archive is refused: its member {name!r} has an absolute name; nothing was unpacked")
    if ".." in parts:
        raise ValueError(f"the archive is refused: its member {name!r} leaves the folder; nothing was unpacked")
    if not (member.isfile() or member.isdir()):
        raise ValueError(
            f"the archive is refused: its member {name!r} is a link or device, no file; nothing was unpacked"
        )


def _blocks(url: str, most: int) -> Iterator[bytes]:
    """What `url` gives, at most `most` bytes; trouble with the connection is a RuntimeError."""
    done = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as source:
            while block := source.read(min(BLOCK, most - done)):
                done += len(block)
                yield block
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url} answers {error.code} {error.reason}; give another address with --url") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise RuntimeError(f"{url} could not be read after {done} bytes ({reason}); try again") from error
