"""`sermll download`: a corpus that may be fetched freely, over HTTP, in pieces if need be, into a folder.

What arrives lies in `.downloads` until all of it is there and proved whole, is unpacked into `.unpacking`, and only
then moved to its place. The marker file is written last: a folder without it is not taken for a whole download, and
the same command goes on from where the last one stopped.

An archive is not trusted more than its server: it can write nowhere but into the folder, and no more than it should.
"""

import errno
import filecmp
import hashlib
import json
import os
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

import requests

from sermll import __version__
from sermll.errors import ConfigError, DataError
from sermll.files import write_json
from sermll.progress import Progress
from sermll.rows import Archive, Corpus

MARKER = ".sermll-download.json"
TIMEOUT_S = 30.0
"""Longest silence of a server, when connecting and between two pieces."""
TRIES = 6
"""Requests in a row that bring nothing new before giving up."""
FIRST_WAIT_S = 1.0
"""Pause after the first such request; each further one doubles it, up to 16 s before the last."""
CHUNK_BYTES = 1 << 14
"""At most so much of what was received is lost when a connection is cut."""
LARGEST_BYTES = 64 << 30
"""Most that one archive may hold, packed or unpacked: several times the largest speech emotion corpora."""
LARGEST_RATIO = 100
"""Most that unpacking may multiply an archive's size: recordings shrink two to tenfold, text up to twentyfold."""


def download(corpus: Corpus, out: Path, accept_licence: bool) -> Path:
    """Fetch a corpus's archives, check and unpack them.

    Args:
        corpus: what to fetch; its `archives` say from where.
        out: folder for the corpus. Files in it that are the same as the archive's are kept.
        accept_licence: the user has read the licence and agrees to it.

    Returns:
        The folder, absolute. If it holds this download already, nothing is done but saying so.

    Raises:
        ConfigError: the corpus cannot be downloaded, or its licence is not accepted.
        DataError: the server does not answer or has other bytes than expected, an archive is damaged or unsafe, or
            `out` cannot be written or holds something else.
    """
    _check_may_download(corpus, accept_licence)
    out = out.expanduser().absolute()
    downloads, staging = out / ".downloads", out / ".unpacking"
    parts = [downloads / f"{_file_name(archive)}.part" for archive in corpus.archives]
    try:
        total = sum(archive.bytes or 0 for archive in corpus.archives)
        with Progress(f"download {corpus.name}", total, unit="B") as progress:
            if _is_done(corpus, out):
                progress.say(f"{out} holds {corpus.title} already, nothing done; delete {MARKER} in it to start anew")
            else:
                downloads.mkdir(parents=True, exist_ok=True)
                checksums: list[str] = []
                for archive, part in zip(corpus.archives, parts, strict=True):
                    _fetch(archive, part, progress)
                    checksums.append(_verify(archive, part))
                shutil.rmtree(staging, ignore_errors=True)
                for archive, part in zip(corpus.archives, parts, strict=True):
                    progress.say(f"unpacking {_file_name(archive)}")
                    _unpack(_file_name(archive), part, staging)
                _move_into_place(staging, out)
                _write_marker(corpus, checksums, out)
        shutil.rmtree(downloads, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error}); check its permissions and the free space, then run the same command "
            "again: what has arrived is kept"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _check_may_download(corpus: Corpus, accept_licence: bool) -> None:
    if not corpus.archives:
        raise ConfigError(
            f"{corpus.title} cannot be downloaded by sermll; where to get it: {corpus.source} (licence: "
            f"{corpus.licence})"
        )
    if not accept_licence:
        raise ConfigError(
            f"{corpus.title} comes with conditions; if you agree to them, add --accept-licence\n"
            f"  licence   {corpus.licence}\n"
            f"  citation  {corpus.citation}\n"
            f"  source    {corpus.source}"
        )
    for archive in corpus.archives:
        if urlsplit(archive.url).scheme not in ("http", "https"):
            raise ConfigError(f"{archive.url}: only http and https addresses are downloaded")


def _file_name(archive: Archive) -> str:
    return PurePosixPath(unquote(urlsplit(archive.url).path)).name


def _is_done(corpus: Corpus, out: Path) -> bool:
    """Whether the marker says that this folder holds just these archives."""
    marker = out / MARKER
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
        name, found = record["corpus"], {entry["url"]: entry["checksum"] for entry in record["archives"]}
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{marker} is damaged; delete it and run the same command again") from None
    if name != corpus.name:
        raise DataError(f"{out} holds the corpus {name}; give another --out")
    return all(archive.url in found and archive.checksum in (None, found[archive.url]) for archive in corpus.archives)


def _write_marker(corpus: Corpus, checksums: Sequence[str], out: Path) -> None:
    record = {
        "corpus": corpus.name,
        "archives": [
            {"url": archive.url, "checksum": checksum}
            for archive, checksum in zip(corpus.archives, checksums, strict=True)
        ],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(out / MARKER, record)


class _Version(NamedTuple):
    """What tells one version of a file on a server from another; kept beside the part that it describes."""

    url: str
    bytes: int | None
    etag: str | None
    modified: str | None

    @classmethod
    def load(cls, part: Path, url: str) -> "_Version | None":
        """The version that `part` is the beginning of; None if that cannot be told, so that it cannot be continued."""
        try:
            version = cls(**json.loads(_version_file(part).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return version if version.url == url and version[1:] != (None, None, None) else None

    def save(self, part: Path) -> None:
        _version_file(part).write_text(json.dumps(self._asdict()), encoding="utf-8")


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch(archive: Archive, part: Path, progress: Progress) -> None:
    """Complete `part`, asking again when a connection is lost."""
    farthest, failures = _size(part), 0
    progress.advance(farthest)
    while True:
        try:
            _receive(archive, part, progress)
            return
        except requests.RequestException as error:
            # Only bytes never reached before count: a server that always starts again would be asked for ever.
            failures = 1 if _size(part) > farthest else failures + 1
            farthest = max(farthest, _size(part))
            if failures == TRIES:
                raise DataError(
                    f"{archive.url}: given up after {TRIES} tries at byte {_size(part)} ({_reason(error)}); what has "
                    "arrived is kept, the same command goes on from there"
                ) from None
            wait_s = FIRST_WAIT_S * 2 ** (failures - 1)
            progress.say(
                f"{_file_name(archive)}: interrupted at byte {_size(part)} ({_reason(error)}); again in {wait_s:g} s"
            )
        time.sleep(wait_s)


def _reason(error: BaseException) -> str:
    """What the network said, without the layers around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__


def _receive(archive: Archive, part: Path, progress: Progress) -> None:
    """Ask once for what `part` lacks and append it; returns when it is complete.

    Raises:
        requests.RequestException: it is not complete, and asking again may help.
        DataError: asking again would not help.
    """
    known = _Version.load(part, archive.url)
    start = _size(part) if known else 0
    if known and known.bytes == start:
        return
    headers = {"User-Agent": f"sermll/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(archive.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        status = response.status_code
        if status in (requests.codes.request_timeout, requests.codes.too_many_requests) or status >= 500:
            response.raise_for_status()
        if status not in (200, 206, 416):
            raise DataError(
                f"{archive.url}: the server answers {status} {response.reason}; the file has moved or is not public"
            )
        version, first = _described(response, archive.url)
        if status == 416 or (status == 206 and (version, first) != (known, start)):
            _discard(part, progress)
            raise requests.ConnectionError("the server's file has changed, starting anew")
        if None not in (archive.bytes, version.bytes) and archive.bytes != version.bytes:
            _discard(part, progress)
            raise DataError(f"{archive.url}: expected {archive.bytes} bytes, the server has {version.bytes}")
        if status == 200:  # the whole file, asked for or not; the old part goes before the new version is noted
            _discard(part, progress)
            version.save(part)
        size, expected = _size(part), archive.bytes or version.bytes
        with part.open("ab") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                size += len(chunk)
                if size > (expected or LARGEST_BYTES):
                    break
                file.write(chunk)
                progress.advance(len(chunk), _file_name(archive))
    if size > (expected or LARGEST_BYTES):
        _discard(part, progress)
        raise DataError(
            f"{archive.url}: expected {expected or f'at most {LARGEST_BYTES}'} bytes, the server sends more"
        )
    if expected is not None and size < expected:
        raise requests.ConnectionError("the server stopped early")


def _described(response: requests.Response, url: str) -> tuple[_Version, int | None]:
    """The version of the file that a response is of, and where in the file it starts."""
    headers = response.headers
    first, total = 0, headers.get("Content-Length", "")
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        first, total = (int(match[1]), match[2]) if match else (None, "")
    version = _Version(
        url, int(total) if total.isdecimal() else None, headers.get("ETag"), headers.get("Last-Modified")
    )
    return version, first


def _discard(part: Path, progress: Progress | None = None) -> None:
    if progress:
        progress.advance(-_size(part))
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _verify(archive: Archive, part: Path) -> str:
    """The checksum of a complete part: by the published method, else SHA-256. Wrong bytes are deleted."""
    method = archive.checksum.partition(":")[0] if archive.checksum else "sha256"
    with part.open("rb") as file:
        found = f"{method}:{hashlib.file_digest(file, method).hexdigest()}"
    for published, actual, unit in ((archive.bytes, _size(part), " bytes"), (archive.checksum, found, "")):
        if published not in (None, actual):
            _discard(part)
            raise DataError(
                f"{archive.url}: expected {published}{unit}, found {actual}{unit}; they were deleted, run the same "
                "command again"
            )
    return found


def _unpack(name: str, part: Path, staging: Path) -> None:
    """Write the files of a zip archive, or the file itself if it is none, below `staging`.

    Raises:
        DataError: the archive is damaged or unsafe; it is deleted.
    """
    staging.mkdir(exist_ok=True)
    if not name.lower().endswith(".zip"):
        with part.open("rb") as source:
            _write(source, staging / name)
        return
    try:
        with zipfile.ZipFile(part) as archive:
            entries = archive.infolist()
            for entry in entries:
                _check_entry(entry)
            size, limit = sum(entry.file_size for entry in entries), min(LARGEST_BYTES, LARGEST_RATIO * _size(part))
            if size > limit:
                raise zipfile.BadZipFile(f"it would unpack to {size} bytes, more than the {limit} that are allowed")
            for entry in entries:
                if not entry.is_dir():
                    with archive.open(entry) as source:  # gives no more than the size that was just allowed
                        _write(source, staging / entry.filename)
    except (FileExistsError, NotADirectoryError) as error:
        _discard(part)
        raise DataError(f"{name}: two entries have the same name, {error.filename}; the archive was deleted") from None
    # Damage shows in many ways, depending on where it is.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # invalid: a place before the file's start
            raise
        _discard(part)
        raise DataError(f"{name}: damaged or unsafe ({error}); the archive was deleted") from None


def _check_entry(entry: zipfile.ZipInfo) -> None:
    for name in (entry.orig_filename, entry.filename):  # which need not be the same: NUL, Unicode extra field
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise zipfile.BadZipFile(f"the entry {name!r} leads out of the folder")
        if re.search(r"[\x00-\x1f\\:]", name):
            raise zipfile.BadZipFile(f"the entry {name!r} has a character that no name of a file should have")
    name = entry.filename
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise zipfile.BadZipFile(f"the entry {name!r} is a link or a device")
    if entry.flag_bits & 1:
        raise zipfile.BadZipFile(f"the entry {name!r} is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"the entry {name!r} is packed by a method other than deflate")


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:  # x: refuses a second entry of this name, whatever the file system thinks equal
        shutil.copyfileobj(source, file)


def _move_into_place(staging: Path, out: Path) -> None:
    """Move every file of `staging` to `out`, none if one of them would replace another file."""
    moves: list[tuple[Path, Path]] = []
    for source in sorted(path for path in staging.rglob("*") if path.is_file()):
        path = source.relative_to(staging)
        if (out / path).resolve() != out.resolve() / path:
            raise DataError(f"{out / path} is a link, or below one; give another --out")
        if not (out / path).exists():
            moves.append((source, out / path))
        elif not filecmp.cmp(source, out / path, shallow=False):
            raise DataError(f"{out / path} is not what the archive holds; move it away, or give another --out")
    for source, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
