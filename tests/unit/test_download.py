"""Downloading: what arrives is what the server has, whatever happens on the way; archives stay in their folder."""

import hashlib
import io
import json
import re
import shutil
import socket
import stat
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from sermll import download as module
from sermll.corpora import CORPORA
from sermll.download import MARKER, download
from sermll.errors import ConfigError, DataError
from sermll.rows import Archive, Corpus


@dataclass
class Server:
    """A web server on this machine that can fail in the ways that real ones do, one failure a request."""

    files: dict[str, bytes]
    failures: list[Callable[["Handler", bytes], None]] = field(default_factory=list)
    """What to do instead of answering well, for the next requests."""
    ranges: bool = True
    etag: str | None = '"1"'
    length: bool = True
    asked: list[int] = field(default_factory=list)
    """First byte asked for, by request."""
    sent: int = 0
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """Answers the requests that come to `state`."""

    state: Server

    def do_GET(self) -> None:
        """Serve a file, or fail as told."""
        state = self.state
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        state.asked.append(int(match[1]) if match else 0)
        content = state.files.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(404)
        elif state.failures:
            state.failures.pop(0)(self, content)
        else:
            self.answer(content)

    def answer(self, content: bytes, stop: int | None = None, total: int | None = None) -> None:
        """Send the file from where it is asked for; `stop`: hang up before this byte."""
        state = self.state
        first = state.asked[-1] if state.ranges else 0
        if first and first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if state.length:
            self.send_header("Content-Length", str(total or len(content) - first))
        if state.etag:
            self.send_header("ETag", state.etag)
        self.end_headers()
        self.wfile.write(content[first:stop])
        self.wfile.flush()
        state.sent += len(content[first:stop])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


class QuietServer(ThreadingHTTPServer):
    """Threads end with the tests."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a client has hung up: that is what is tested."""


def cut(stop: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, content: handler.answer(content, stop=stop)


def refuse(status: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, content: handler.send_error(status)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server({})
    http = QuietServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


FILES = {f"Actor_{n:02d}/03-01-0{n}-01-01-01-01.wav": np.random.default_rng(n).bytes(10_000 * n) for n in (1, 2, 3)} | {
    "empty.txt": b""
}
ZIP = zipped(FILES)


def checksum(content: bytes, method: str = "md5") -> str:
    return f"{method}:{hashlib.new(method, content).hexdigest()}"


def a_corpus(*archives: Archive, name: str = "toy") -> Corpus:
    return Corpus(
        name=name,
        title="Toy corpus",
        classes=("happy",),
        counts={},
        folds={},
        licence="CC BY 4.0",
        citation="A. Author, 2026",
        source="https://example.org/toy",
        read=lambda root: iter(()),
        archives=archives,
    )


def one(server: Server, content: bytes = ZIP, name: str = "toy.zip", check: bool = True) -> Corpus:
    """A corpus of one archive that the server has."""
    server.files[f"/{name}"] = content
    known = (len(content), checksum(content)) if check else (None, None)
    return a_corpus(Archive(f"{server.url}/{name}?download=1", *known))


def tree(root: Path) -> dict[str, bytes]:
    """What lies in a folder, but for the marker."""
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    files.pop(MARKER, None)
    return files


def test_a_whole_download_and_a_second_that_does_nothing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = one(server)
    out = tmp_path / "new" / "toy"
    assert download(corpus, out, accept_licence=True) == out
    assert tree(out) == FILES
    assert not (out / ".downloads").exists() and not (out / ".unpacking").exists()
    marker = json.loads((out / MARKER).read_text())
    assert marker["corpus"] == "toy" and re.match(r"20\d\d-\d\d-\d\dT", marker["date"])
    assert marker["archives"] == [{"url": corpus.archives[0].url, "checksum": checksum(ZIP)}]
    capsys.readouterr()
    assert download(corpus, out, accept_licence=True) == out
    assert "nothing done" in capsys.readouterr().err
    assert len(server.asked) == 1


def test_the_licence_comes_first(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--accept-licence.*CC BY 4\.0.*A\. Author, 2026.*example\.org"):
        download(one(server), tmp_path / "out", accept_licence=False)
    assert not server.asked and not (tmp_path / "out").exists()


def test_corpora_that_cannot_be_downloaded_say_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Toy corpus cannot be downloaded.*example\.org/toy.*CC BY"):
        download(a_corpus(), tmp_path / "out", accept_licence=True)
    for url in ("file:///etc/passwd", "ftp://example.org/a.zip"):
        with pytest.raises(ConfigError, match="only http and https"):
            download(a_corpus(Archive(url, None, None)), tmp_path / "out", accept_licence=True)


def test_archives_of_the_corpora_are_well_formed() -> None:
    for corpus in CORPORA.values():
        names = [module._file_name(archive) for archive in corpus.archives]
        assert len(set(names)) == len(names) and all(names)
        for archive in corpus.archives:
            assert re.match("https?://", archive.url)
            assert archive.checksum is None or re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", archive.checksum)


def test_a_connection_cut_again_and_again_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    stops = [7_500, 20_000, 20_100, 45_000]
    server.failures = [cut(stop) for stop in stops]
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == FILES
    assert server.asked[0] == 0 and server.asked == sorted(server.asked) and len(server.asked) == len(stops) + 1
    for stop, again in zip(stops, server.asked[1:], strict=True):
        assert stop - module.CHUNK_BYTES <= again <= stop
    assert len(ZIP) <= server.sent <= len(ZIP) + len(stops) * module.CHUNK_BYTES


def test_the_next_run_goes_on_where_the_last_gave_up(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    server.failures = [cut(30_000), *[refuse(503)] * module.TRIES]
    with pytest.raises(DataError, match=rf"given up after {module.TRIES} tries at byte (29|30)\d\d\d .*503.*goes on"):
        download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path)[".downloads/toy.zip.part"] == ZIP[: server.asked[-1]]
    assert not (tmp_path / MARKER).exists()
    download(corpus, tmp_path, accept_licence=True)
    assert 29_000 <= server.asked[-1] <= 30_000
    assert tree(tmp_path) == FILES


def test_a_server_that_always_starts_again_and_never_ends_is_given_up(server: Server, tmp_path: Path) -> None:
    corpus, server.ranges = one(server), False
    server.failures = [cut(stop) for stop in (40_000, 30_000, 20_000, 30_000, 40_000, 40_000, 30_000, 20_000)]
    with pytest.raises(DataError, match="given up"):
        download(corpus, tmp_path, accept_licence=True)
    assert len(server.asked) == module.TRIES


def test_a_server_that_ignores_ranges_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    corpus, server.ranges = one(server), False
    server.failures = [cut(30_000)]
    download(corpus, tmp_path, accept_licence=True)
    assert server.asked[1] > 0 and server.sent == 30_000 + len(ZIP)
    assert tree(tmp_path) == FILES


@pytest.mark.parametrize("same_length", [True, False])
def test_a_file_that_changed_between_two_requests_is_read_from_the_start(
    server: Server, tmp_path: Path, same_length: bool
) -> None:
    other = np.random.default_rng(9).bytes(50_000 if same_length else 60_000)
    corpus = one(server, other[::-1][:50_000], name="a.bin", check=False)

    def change(handler: Handler, content: bytes) -> None:
        handler.answer(content, stop=30_000)
        server.files["/a.bin"] = other
        server.etag = '"2"' if same_length else server.etag

    server.failures = [change]
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == {"a.bin": other}
    assert server.asked[1] > 0 and server.asked[2] == 0


def test_a_range_that_was_not_asked_for_is_not_appended(server: Server, tmp_path: Path) -> None:
    def elsewhere(handler: Handler, content: bytes) -> None:
        server.asked[-1] -= 500
        handler.answer(content)

    corpus, server.failures = one(server, name="a.bin", check=False), [cut(30_000), elsewhere]
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == {"a.bin": ZIP}


def test_a_part_of_another_address_or_unknown_origin_is_not_continued(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    for note in (None, "{", "[]", '{"url": "other", "bytes": 1, "etag": null, "modified": null}'):
        folder = tmp_path / str(note)[:9] / ".downloads"
        folder.mkdir(parents=True)
        (folder / "toy.zip.part").write_bytes(b"something else")
        if note is not None:
            (folder / "toy.zip.part.json").write_text(note)
        download(corpus, folder.parent, accept_licence=True)
        assert server.asked[-1] == 0 and tree(folder.parent) == FILES


def test_a_server_without_length_or_version_will_do(server: Server, tmp_path: Path) -> None:
    corpus, server.length, server.etag = one(server, check=False), False, None
    download(corpus, tmp_path / "unchecked", accept_licence=True)
    assert tree(tmp_path / "unchecked") == FILES
    marker = json.loads((tmp_path / "unchecked" / MARKER).read_text())
    assert marker["archives"][0]["checksum"] == checksum(ZIP, "sha256")
    server.failures = [cut(30_000)]
    download(one(server), tmp_path / "checked", accept_licence=True)
    assert tree(tmp_path / "checked") == FILES


def test_an_empty_file_is_whole(server: Server, tmp_path: Path) -> None:
    download(one(server, b"", name="empty.csv"), tmp_path, accept_licence=True)
    assert tree(tmp_path) == {"empty.csv": b""}


def test_wrong_bytes_are_deleted_and_named(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    wrong = ZIP[:-1] + b"!"
    server.files["/toy.zip"] = wrong
    with pytest.raises(DataError, match=rf"expected {checksum(ZIP)}, found {checksum(wrong)}; they were deleted"):
        download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == {}
    server.files["/toy.zip"] = ZIP
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == FILES


@pytest.mark.parametrize("length", [True, False])
def test_too_long_a_file_is_not_read_to_its_end(server: Server, tmp_path: Path, length: bool) -> None:
    corpus = one(server)
    server.files["/toy.zip"], server.length = ZIP + b"!" * 3_000_000, length
    with pytest.raises(
        DataError, match=rf"expected {len(ZIP)} bytes, the server (has {len(ZIP) + 3_000_000}|sends more)"
    ):
        download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == {}


def test_an_endless_answer_ends_at_the_limit(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_BYTES", 20_000)
    corpus, server.length = one(server, check=False), False
    with pytest.raises(DataError, match="at most 20000 bytes, the server sends more"):
        download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == {}


def test_a_missing_file_is_final_and_a_tired_server_is_not(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    server.failures = [refuse(404)]
    with pytest.raises(DataError, match=r"toy\.zip.*answers 404 Not Found"):
        download(corpus, tmp_path, accept_licence=True)
    assert len(server.asked) == 1
    server.failures = [refuse(500), refuse(429), refuse(503)]
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == FILES


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/toy.zip"
        with pytest.raises(DataError, match=r"toy\.zip: given up after .* at byte 0 .*refused"):
            download(a_corpus(Archive(url, None, None)), tmp_path, accept_licence=True)


def test_a_redirect_to_another_scheme_is_not_followed(server: Server, tmp_path: Path) -> None:
    def redirect(handler: Handler, content: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", "file:///etc/hostname")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    corpus, server.failures = one(server), [redirect] * module.TRIES
    with pytest.raises(DataError, match="given up"):
        download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == {}


def test_a_silent_server_is_left_and_asked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)

    over = threading.Event()

    def before_the_answer(handler: Handler, content: bytes) -> None:
        over.wait(10)

    def amid_the_answer(handler: Handler, content: bytes) -> None:
        handler.answer(content, stop=25_000)
        over.wait(10)

    corpus, server.failures = one(server), [before_the_answer, amid_the_answer]
    started = time.monotonic()
    download(corpus, tmp_path, accept_licence=True)
    assert time.monotonic() - started < 8
    over.set()
    assert server.asked[:2] == [0, 0] and 24_000 <= server.asked[2] <= 25_000
    assert tree(tmp_path) == FILES


def test_a_full_disk_is_named(server: Server, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    real_open = Path.open

    def open_full(path: Path, *arguments: Any, **options: Any) -> IO[Any]:
        return real_open(Path("/dev/full") if path.name == "toy.zip.part" else path, *arguments, **options)

    corpus = one(server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(DataError, match=r"cannot be written .*No space left.*free space"):
            download(corpus, tmp_path, accept_licence=True)
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == FILES


def test_a_folder_that_cannot_be_written_or_holds_something_else(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="cannot be written"):
            download(corpus, out, accept_licence=True)
    out = tmp_path / "toy"
    download(corpus, out, accept_licence=True)
    with pytest.raises(DataError, match="holds the corpus toy; give another --out"):
        download(a_corpus(*corpus.archives, name="other"), out, accept_licence=True)
    for damage in ("{", "[]", '{"corpus": "toy"}'):
        (out / MARKER).write_text(damage)
        with pytest.raises(DataError, match=rf"{MARKER} is damaged"):
            download(corpus, out, accept_licence=True)


def test_files_that_are_there_are_kept_and_never_replaced(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    name, content = next(iter(FILES.items()))
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_bytes(b"mine")
    before = (tmp_path / name).stat().st_mtime_ns
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == FILES | {"notes.txt": b"mine"}
    assert (tmp_path / name).stat().st_mtime_ns == before

    (tmp_path / MARKER).unlink()
    (tmp_path / name).write_bytes(content[::-1])
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(DataError, match=rf"{name} is not what the archive holds"):
        download(corpus, tmp_path, accept_licence=True)
    assert (tmp_path / name).read_bytes() == content[::-1]
    assert not (tmp_path / "empty.txt").exists() and not (tmp_path / ".unpacking").exists()


def test_links_in_the_folder_are_not_followed(server: Server, tmp_path: Path) -> None:
    corpus = one(server)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "Actor_01").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"Actor_01/.* is a link, or below one"):
        download(corpus, tmp_path / "toy", accept_licence=True)
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # the folder itself may be one: the user chose it
    download(corpus, tmp_path / "link", accept_licence=True)
    assert tree(tmp_path / "elsewhere") == FILES


@pytest.mark.parametrize("killed_at", ["_unpack", "_move_into_place", "_write_marker"])
def test_a_run_killed_after_the_download_is_finished_by_the_next(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    corpus = one(server)
    with monkeypatch.context() as patch:
        whole = getattr(module, killed_at)
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # nothing is tidied up after a kill

        def kill(*arguments: object) -> None:
            whole(*arguments)
            if killed_at == "_move_into_place":  # half of the files are still to be moved
                (tmp_path / ".unpacking" / "empty.txt").touch()
                (tmp_path / "empty.txt").unlink()
            raise KeyboardInterrupt

        patch.setattr(module, killed_at, kill)
        with pytest.raises(KeyboardInterrupt):
            download(corpus, tmp_path, accept_licence=True)
    if killed_at == "_unpack":
        (tmp_path / ".unpacking" / "Actor_01" / "half.wav").touch()
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == FILES and (tmp_path / MARKER).exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["Actor_01", "Actor_02", "Actor_03"]
    assert len(server.asked) == 1


def test_several_archives_and_single_files_make_one_folder(server: Server, tmp_path: Path) -> None:
    votes = b"clip,anger\n"
    corpus = a_corpus(
        *one(server).archives,
        *one(server, zipped({"Actor_01/more.wav": b"RIFF"}), name="more.ZIP").archives,
        *one(server, votes, name="the%20votes.csv", check=False).archives,
    )
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == FILES | {"Actor_01/more.wav": b"RIFF", "the votes.csv": votes}


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def of_entries(*entries: zipfile.ZipInfo, content: bytes = b"/etc/passwd") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for info in entries:
            archive.writestr(info, content)
    return buffer.getvalue()


def patched(archive: bytes, old: bytes, new: bytes) -> bytes:
    assert old in archive and len(old) == len(new)
    return archive.replace(old, new)


def flagged() -> bytes:
    archive = bytearray(of_entries(entry("secret.wav")))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        struct.pack_into("<H", archive, archive.index(signature) + offset, 1)
    return bytes(archive)


def lying() -> bytes:
    """A bomb whose entry claims to be 100 bytes long."""
    archive = bytearray(zipped({"bomb.wav": bytes(5_000_000)}))
    struct.pack_into("<I", archive, archive.index(b"PK\x01\x02") + 24, 100)
    return bytes(archive)


def before_the_file() -> bytes:
    """An archive whose directory says that it starts before its first byte."""
    archive = bytearray(ZIP)
    struct.pack_into("<I", archive, archive.index(b"PK\x05\x06") + 16, len(archive))
    return bytes(archive)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped({"../evil": b"x"}), "leads out"),
        (zipped({"a/../../evil": b"x"}), "leads out"),
        (patched(zipped({"name": b"x"}), b"name", b"C:ev"), "character"),
        (patched(zipped({"..!evil": b"x"}), b"..!evil", b"..\\evil"), "character"),
        (patched(zipped({"a.wav!../evil": b"x"}), b"a.wav!../evil", b"a.wav\0../evil"), "leads out|character"),
        (of_entries(entry("link", stat.S_IFLNK | 0o777), entry("link/evil")), "link or a device"),
        (of_entries(entry("null", stat.S_IFCHR | 0o666)), "link or a device"),
        (of_entries(entry("pipe", stat.S_IFIFO | 0o666)), "link or a device"),
        (flagged(), "encrypted"),
        (zipped({"bomb.wav": bytes(5_000_000)}), "unpack to 5000000 bytes, more than"),
        (lying(), "damaged"),
        (of_entries(entry("a.wav"), entry("./a.wav")), r"same name, .*a\.wav"),
        (of_entries(entry("a.wav"), entry("a.wav/b.wav")), "same name"),
        (zipped({"a.wav": b"x" * 99}, zipfile.ZIP_LZMA), "other than deflate"),
        (before_the_file(), "damaged"),
        (ZIP[:-30], "damaged"),
        (ZIP[:5000] + bytes(100) + ZIP[5100:], "damaged"),
        (b"<html>log in first</html>", "damaged"),
        (b"", "damaged"),
    ],
)
def test_hostile_and_damaged_archives_leave_nothing(
    server: Server, tmp_path: Path, content: bytes, message: str
) -> None:
    out = tmp_path / "a" / "b" / "toy"
    with pytest.raises(DataError, match=rf"toy\.zip: .*({message}).*deleted"):
        download(one(server, content), out, accept_licence=True)
    assert tree(tmp_path) == {}
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "toy", ".downloads"]


def test_an_absolute_name_is_refused(server: Server, tmp_path: Path) -> None:
    corpus = one(server, zipped({f"{tmp_path}/evil": b"x"}))
    with pytest.raises(DataError, match="leads out of the folder"):
        download(corpus, tmp_path / "toy", accept_licence=True)
    assert tree(tmp_path) == {}


def test_folders_and_modes_of_an_archive_do_no_harm(server: Server, tmp_path: Path) -> None:
    content = of_entries(entry("Actor_01/", stat.S_IFDIR | 0o755), content=b"")
    run = of_entries(entry("run.sh", stat.S_IFREG | stat.S_ISUID | 0o777), content=b"#!/bin/sh\n")
    corpus = a_corpus(*one(server, content, "a.zip").archives, *one(server, run, "b.zip").archives)
    download(corpus, tmp_path, accept_licence=True)
    assert tree(tmp_path) == {"run.sh": b"#!/bin/sh\n"}
    assert not (tmp_path / "run.sh").stat().st_mode & (stat.S_ISUID | 0o111)
