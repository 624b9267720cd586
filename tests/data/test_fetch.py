"""Downloads from files and from a server on this machine: checksums, safe unpacking, and nothing half-written."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from s2sam.data import fetch
from s2sam.data.fetch import ARCHIVES, Archive, get, unpack

CONTENT = {"toy/train.bin": b"training", "toy/test.bin": b"testing" * 1000, "toy/deep/readme": b""}


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def tar(*extra: tarfile.TarInfo, content: dict[str, bytes] = CONTENT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in content.items():
            info = member(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return buffer.getvalue()


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts bytes where the archive `toy` is looked for; returns the address."""

    def put(data: bytes, **change: object) -> str:
        monkeypatch.setenv("no_proxy", "*")
        file = tmp_path / "source" / "toy.tar.gz"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        row = Archive("toy", file.as_uri(), len(data), hashlib.sha256(data).hexdigest(), "toy")
        monkeypatch.setattr(fetch, "ARCHIVES", (dataclasses.replace(row, **change),))
        return file.as_uri()

    return put


def left(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


def test_an_archive_is_unpacked_to_the_folder(publish: Callable[..., str], tmp_path: Path) -> None:
    data = tar()
    publish(data)
    seen: list[tuple[int, int]] = []
    folder = get("toy", tmp_path / "out" / "mine", progress=lambda done, total: seen.append((done, total)))
    assert folder == tmp_path / "out" / "mine"
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        name.removeprefix("toy/"): content for name, content in CONTENT.items()
    }
    assert seen[-1] == (len(data), len(data))
    assert left(tmp_path / "out") == ["mine", "mine/deep", "mine/deep/readme", "mine/test.bin", "mine/train.bin"]


def test_the_default_folder_is_data_name(
    publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tar())
    monkeypatch.chdir(tmp_path)
    assert get("toy") == Path("data/toy")
    with pytest.raises(ValueError, match="data/toy exists; look at it with `s2sam data check data/toy`"):
        get("toy")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sha256": "0" * 64}, ValueError, "is not the archive toy: its SHA-256 is .*, not 0000"),
        ({"size": 10}, ValueError, "gave more than the 10 bytes of toy"),
        ({"size": 10**6}, ValueError, r"gave \d+ of the 1000000 bytes of toy"),
        ({"folder": "toys"}, ValueError, "holds no folder toys"),
        ({"url": "ftp://localhost/toy.tar.gz"}, ValueError, "is no address to download from; it begins with https://"),
        ({"url": "toy.tar.gz"}, ValueError, "is no address to download from"),
        ({"url": "file:///no/such/file"}, RuntimeError, "could not be read after 0 bytes"),
        ({"url": "http://localhost:1/toy"}, RuntimeError, "could not be read after 0 bytes .*refused"),
    ],
)
def test_what_goes_wrong_leaves_nothing(
    publish: Callable[..., str], tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    publish(tar(), **change)
    with pytest.raises(error, match=message) as caught:
        get("toy", tmp_path / "out" / "mine")
    assert "\n" not in str(caught.value)
    assert left(tmp_path / "out") == []


def test_plain_tar_and_md5(publish: Callable[..., str], tmp_path: Path) -> None:
    data = gzip.decompress(tar())
    publish(data, sha256="", md5=hashlib.md5(data).hexdigest())
    assert (get("toy", tmp_path / "mine") / "train.bin").read_bytes() == b"training"
    publish(data, sha256="", md5="0" * 32)
    with pytest.raises(ValueError, match="is not the archive toy: its MD5 is .*, not 0000"):
        get("toy", tmp_path / "other")
    assert left(tmp_path / "other") == []


def test_never_more_than_the_size_is_read(publish: Callable[..., str], tmp_path: Path) -> None:
    publish(tar(content={"toy/zeros": b"\x00" * 10**6}) + b"\x00" * 10**7, size=2000)
    seen: list[int] = []
    with pytest.raises(ValueError, match="more than the 2000 bytes"):
        get("toy", tmp_path / "mine", progress=lambda done, total: seen.append(done))
    assert seen[-1] == 2001


def test_a_full_disk_leaves_nothing(
    publish: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tar())

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(OSError, match="No space left"):
        get("toy", tmp_path / "out" / "mine")
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../evil"), r"member '\.\./evil' leaves the folder"),
        (member("toy/../../evil"), "leaves the folder"),
        (member("toy\\..\\..\\evil"), "leaves the folder"),
        (member("/evil/x"), "'/evil/x' has an absolute name"),
        (member("C:\\evil"), "has an absolute name"),
        (member("\\\\server\\evil"), "has an absolute name"),
        (member("toy/link", tarfile.SYMTYPE, "/etc/passwd"), "'toy/link' is a link or device, no file"),
        (member("toy/link", tarfile.SYMTYPE, "train.bin"), "is a link or device"),
        (member("toy/hard", tarfile.LNKTYPE, "toy/train.bin"), "is a link or device"),
        (member("toy/pipe", tarfile.FIFOTYPE), "is a link or device"),
        (member("toy/null", tarfile.CHRTYPE), "is a link or device"),
    ],
    ids=lambda v: v.name if isinstance(v, tarfile.TarInfo) else "",
)
def test_unsafe_members_refuse_the_whole_archive(
    publish: Callable[..., str], tmp_path: Path, info: tarfile.TarInfo, message: str
) -> None:
    publish(tar(info))
    with pytest.raises(ValueError, match=f"the archive is refused: its member {message}|{message}") as error:
        get("toy", tmp_path / "out" / "mine")
    assert str(error.value).endswith("; nothing was unpacked")
    assert left(tmp_path / "out") == []
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("cut", [0, 5, 30, -40])
def test_damaged_archives(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "toy.tar.gz"
    file.write_bytes(tar()[:cut])
    with pytest.raises(ValueError, match=r"is no readable archive, perhaps damaged") as error:
        unpack(file, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_archive_inside_gzip_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "toy.tar.gz"
    file.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(ValueError, match="is no readable archive"):
        unpack(file, tmp_path / "out")


class Handler(http.server.BaseHTTPRequestHandler):
    """/toy gives the archive, /cut half of it, /moved redirects, anything else is not there."""

    data = b""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/toy")
            self.end_headers()
            return
        if self.path not in ("/toy", "/cut"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data if self.path == "/toy" else self.data[: len(self.data) // 2])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of this process."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Handler, "data", tar())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/toy", "/moved"])
def test_a_server_gives_the_same(publish: Callable[..., str], tmp_path: Path, server: str, path: str) -> None:
    publish(tar())
    Handler.data = (tmp_path / "source" / "toy.tar.gz").read_bytes()
    folder = get("toy", tmp_path / "mine", url=server + path)
    assert (folder / "test.bin").read_bytes() == CONTENT["toy/test.bin"]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/cut", ValueError, r"gave \d+ of the \d+ bytes of toy; try again"),
        ("/none", RuntimeError, "/none answers 404 Not Found; give another address with --url"),
    ],
)
def test_a_server_that_fails_leaves_nothing(
    publish: Callable[..., str], tmp_path: Path, server: str, path: str, error: type[Exception], message: str
) -> None:
    publish(Handler.data)
    with pytest.raises(error, match=message):
        get("toy", tmp_path / "out" / "mine", url=server + path)
    assert left(tmp_path / "out") == []


def test_the_archives_are_the_authors() -> None:
    assert [row.name for row in ARCHIVES] == ["cifar10", "cifar100", "cifar10-c", "cifar100-c"]
    for row in ARCHIVES[:2]:
        assert row.url.startswith("https://www.cs.toronto.edu/~kriz/cifar-10")
        assert len(row.sha256) == 64
        assert row.url.endswith("-python.tar.gz")
    for row in ARCHIVES[2:]:
        assert row.url.startswith("https://zenodo.org/records/") and row.url.endswith(f"/{row.folder}.tar")
        kind, value = row.checksum
        assert len(value) == {"SHA-256": 64, "MD5": 32}[kind] and len(row.md5) == 32
    with pytest.raises(ValueError, match="unknown archive 'cifar'; did you mean 'cifar10"):
        get("cifar")
