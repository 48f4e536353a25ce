"""Where data and runs lie: folders of this machine, of a shared file system, or of object storage.

A folder of object storage, `s3://bucket/name` or `gs://bucket/name`, is used through a copy in this machine's cache.
Its path is a `Path` like any other; `fetch` brings the copy up to date, `send` takes what was written back, and both
do nothing with paths that are no copies. What is stored is the truth, and of two writers of a file the last wins.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO, Any

from sermll.errors import ConfigError, StorageError

ROOT = "SERMLL_ROOT"
"""Environment variable: the folder that relative paths of data and runs mean, where it is not the working directory."""
CACHE = "SERMLL_CACHE"
"""Environment variable: folder of the copies, by the same path on every machine of a cluster."""
SCHEMES = ("s3", "gs")
IN_NO_URI = re.compile(r"[^A-Za-z0-9._~/!$&'()*+,;=:@-]")
"""What is no part of a URI's path (RFC 3986), or would be decoded on the way."""
PATIENCE_S = 180.0
"""How long storage that does not answer is asked again."""
GOOGLE_RETRIES_S = 20.0
"""How long Google's client asks again by itself, each time."""
SHARED_S, LOOK_S = 10.0, 0.5
"""How long, and how often, a machine looks for what another has made on storage that they share."""
PASSING = ("network_connection", "slow_down", "service_unavailable", "internal_failure", "timeout", "timed out", "curl")
"""What the messages of faults have in them that may pass; others, such as a denied access, are told at once."""
QUIET_S = 15.0
"""How long a lock is waited for without a word."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems say that know no locks."""
PACKAGE = "_ray_pkg_"
"""How the folders begin into which Ray unpacks the code of jobs, and which it deletes after them."""
AT_ONCE = 8


def place(path: str | Path) -> Path:
    """Where data or runs lie, by a path or a URI.

    Returns:
        A relative path in the folder of SERMLL_ROOT, if that is set; of a URI, its copy; else `path` itself.

    Raises:
        StorageError: a URI of something else than object storage, with a secret in it, or with what no URI has.
        ConfigError: a relative path in a folder that Ray deletes.
    """
    scheme, given, rest = str(path).partition("://")
    if not given:
        root = os.environ.get(ROOT, "")
        relative = not root and not Path(path).expanduser().is_absolute()
        if relative and any(part.startswith(PACKAGE) for part in Path.cwd().parts):  # which may be gone already
            raise ConfigError(
                f"{path}: would be in the working directory that Ray deletes with this job; set {ROOT} to a folder or "
                "URI that the cluster's machines share, with `ray job submit --runtime-env-json "
                f'\'{{"env_vars": {{"{ROOT}": "/shared"}}}}\'`, or give absolute paths of data and runs'
            )
        if "://" in root and not Path(path).expanduser().is_absolute():
            return place(f"{root.rstrip('/')}/{path}")
        return Path(root, Path(path).expanduser())
    if scheme not in SCHEMES or not rest.strip("/"):
        known = " or ".join(f"{name}://bucket/name" for name in SCHEMES)
        raise StorageError(f"{path}: not a place for data or runs; give a folder, or {known}")
    if {"@", ":"} & set(rest.partition("/")[0]):  # a key and its secret, which is not repeated
        raise StorageError(
            f"{scheme}://***: credentials do not belong into a URI; set AWS_ACCESS_KEY_ID and its kin, or a role, on "
            f"the machines, and give {scheme}://bucket/name"
        )
    if odd := "".join(dict.fromkeys(IN_NO_URI.findall(rest))):
        raise StorageError(
            f"{path}: {odd!r} cannot stand in a URI as it is, and Ray trains in none such; give a name of letters "
            "without accents, digits, - _ and ."
        )
    root = _copies()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StorageError(f"{root}: belongs to another user; set {CACHE} to a folder of yours")
    return root / scheme / rest.strip("/")


def sqlite(file: Path) -> str:
    """The URI of a SQLite file.

    Raises:
        ConfigError: its path would not be taken as it is.
    """
    if odd := "".join(dict.fromkeys(re.findall(r"[%?]", str(file)))):
        raise ConfigError(
            f"{file}: with {odd!r} in its path, the database would be looked for elsewhere; give another folder"
        )
    return f"sqlite:///{file}"


def address(path: Path) -> str:
    """How users call a path: a copy by its URI."""
    return origin(path) or str(path)


def origin(path: Path) -> str:
    """The URI that a path is a copy of, "" if it is none."""
    absolute = Path(os.path.abspath(path))
    if not absolute.is_relative_to(_copies()) or absolute == _copies():
        return ""
    scheme, *rest = absolute.relative_to(_copies()).parts
    return f"{scheme}://{'/'.join(rest)}" if scheme in SCHEMES else ""


def unsent(folder: Path) -> Path:
    """A folder on the same file system as `folder`, for files that are not to be stored: mostly `folder` itself."""
    scheme, _, rest = origin(folder).partition("://")
    return _copies() / "unsent" / scheme / rest if rest else folder


def machine() -> str:
    """What this machine is called where a fault of its own is told."""
    return os.uname().nodename


def this_process() -> str:
    """What this process is called by those who wait for it."""
    return f"process {os.getpid()} on {machine()}"


def reach(folder: Path, mark: str) -> None:
    """Look whether this machine has the folder that another has made, and not one of its own.

    Args:
        folder: of storage that machines share. A copy of what is stored elsewhere needs no look.
        mark: a file that the other has put there.

    Raises:
        StorageError: it has not, `SHARED_S` after the first look.
    """
    deadline = time.monotonic() + SHARED_S
    while not origin(folder) and mark not in names(folder):
        if time.monotonic() > deadline:
            raise StorageError(
                f"{folder}: {machine()} does not see it, or only a folder of its own; runs belong on storage that all "
                "machines share: set tracking.runs, or `sermll submit --root`, to a shared folder or to s3://bucket/name"
            )
        time.sleep(LOOK_S)


def _copies() -> Path:
    # Not in the home folder, which machines of a cluster may share, and then would write the same copy.
    return Path(os.path.realpath(os.environ.get(CACHE) or f"/tmp/sermll-{os.getuid()}"))


_looked: dict[Path, float] = {}


def fetch(path: Path, *, without: str = "", exact: bool = False, max_age_s: float = 0.0) -> int:
    """Bring a file or folder up to date with what is stored.

    Args:
        path: may be missing, here and there.
        without: name of folders to leave out.
        exact: also remove what is not stored.
        max_age_s: an answer of this age is good enough.

    Returns:
        How many files were fetched.

    Raises:
        StorageError: the storage does not answer or refuses.
    """
    uri = origin(path)
    if not uri or time.monotonic() - _looked.get(path, -1e9) < max_age_s:
        return 0
    import pyarrow.fs as fs

    def look() -> list[Any]:
        system, key = _open(uri)
        found = system.get_file_info(key)
        if found.type == fs.FileType.File:
            return [found]
        listed = system.get_file_info(fs.FileSelector(key, recursive=True, allow_not_found=True))
        return [info for info in listed if info.type == fs.FileType.File]

    stored: dict[Path, Any] = {}
    for info in _patiently(uri, look):
        relative = Path(info.path).relative_to(_open(uri)[1])
        if without not in relative.parts and not relative.name.startswith("."):
            stored[path / relative] = info
    if exact and path.is_dir():
        for file in path.rglob("*"):
            if file.is_file() and file not in stored:
                file.unlink(missing_ok=True)
        for folder in sorted((file for file in path.rglob("*") if file.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        fetched = sum(pool.map(lambda file: _fetch_file(file, stored[file]), stored))
    _looked[path] = time.monotonic()
    return fetched


def _fetch_file(file: Path, stored: Any) -> bool:
    """Fetch a file unless it is the stored one, or written here and not sent yet."""
    if _is_current(file, stored):
        return False
    with _one_at_a_time(file):
        if _is_current(file, stored):
            return False
        uri = origin(file)

        def copy() -> None:
            system, key = _open(uri)
            with partial(file) as target, system.open_input_stream(key) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**20)
            os.utime(file, ns=(stored.mtime_ns, stored.mtime_ns))

        _patiently(uri, copy)
    return True


def _is_current(file: Path, stored: Any) -> bool:
    try:
        found = file.stat()
    except FileNotFoundError:
        return False
    newer = found.st_mtime_ns > stored.mtime_ns
    return newer or (found.st_mtime_ns == stored.mtime_ns and found.st_size == stored.size)


def send(path: Path) -> None:
    """Store a file, or all files of a folder in the order in which they were written.

    Hidden files stay here.

    Raises:
        StorageError: the storage does not answer or refuses.
    """
    if not origin(path):
        return
    written = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in sorted(written, key=lambda file: file.stat().st_mtime_ns):
        if file == path or not any(part.startswith(".") for part in file.relative_to(path).parts):
            _send_file(file)


def _send_file(file: Path) -> None:
    uri = origin(file)

    def copy() -> None:
        system, key = _open(uri)
        if uri.startswith("gs:"):  # where folders are no folders unless they are made
            system.create_dir(str(Path(key).parent))
        # Arrow stores what it has when writing breaks off: that must not be read, nor take an older object's place.
        older = system.get_file_info(key).is_file
        written = str(Path(key).with_name(f".{file.name}.{machine()}-{os.getpid()}.tmp")) if older else key
        try:
            with file.open("rb") as source, system.open_output_stream(written) as sink:
                shutil.copyfileobj(source, sink, 2**20)
            if older:
                system.move(written, key)
        except BaseException:
            with suppress(OSError):  # it was not begun, or the storage is away
                system.delete_file(written)
            raise
        stored = system.get_file_info(key)
        os.utime(file, ns=(stored.mtime_ns, stored.mtime_ns))

    _patiently(uri, copy)


def remove(path: Path) -> None:
    """Remove a file or folder, here and where it is stored.

    Raises:
        StorageError: the storage does not answer or refuses.
    """
    if path.is_file():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    uri = origin(path)
    if uri:
        import pyarrow.fs as fs

        def delete() -> None:
            system, key = _open(uri)
            with suppress(FileNotFoundError):
                if system.get_file_info(key).is_file:
                    system.delete_file(key)
                if system.get_file_info(key).type == fs.FileType.Directory:  # to Google's storage, none is an error
                    system.delete_dir(key)

        _patiently(uri, delete)


def names(folder: Path) -> list[str]:
    """Names of what a folder holds, here or where it is stored; empty if it is missing.

    Raises:
        StorageError: the storage does not answer or refuses.
    """
    uri = origin(folder)
    if not uri:
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    import pyarrow.fs as fs

    def look() -> list[str]:
        system, key = _open(uri)
        return [info.base_name for info in system.get_file_info(fs.FileSelector(key, allow_not_found=True))]

    return sorted(_patiently(uri, look))


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file that lies in a folder, or of which the folder is a copy; see `names`."""
    uri = origin(folder)
    if not uri:
        files = folder.iterdir() if folder.is_dir() else ()
        return {file.name: file.stat().st_size for file in files if file.is_file()}
    import pyarrow.fs as fs

    def look() -> dict[str, int]:
        system, key = _open(uri)
        listed = system.get_file_info(fs.FileSelector(key, allow_not_found=True))
        return {info.base_name: info.size for info in listed if info.type == fs.FileType.File}

    return _patiently(uri, look)


def _open(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it."""
    scheme, _, key = uri.partition("://")
    return _system(scheme, key.partition("/")[0]), key


@cache
def _system(scheme: str, bucket: str) -> Any:
    import pyarrow.fs as fs

    # Google's client asks again for a quarter of an hour before it says a word.
    limit = f"?retry_limit_seconds={GOOGLE_RETRIES_S:g}" if scheme == "gs" else ""
    return fs.FileSystem.from_uri(f"{scheme}://{bucket}{limit}")[0]


def _patiently(uri: str, do: Any) -> Any:  # whatever `do` gives
    """Do something with object storage, again and again where it fails for reasons that may pass."""
    deadline, wait_s = time.monotonic() + PATIENCE_S, 1.0
    while True:
        try:
            return do()
        except (OSError, ValueError) as error:  # pyarrow's are among them
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            passing = any(word in said.lower() for word in PASSING)
            if not passing or time.monotonic() + wait_s > deadline:
                again = f", asked for {PATIENCE_S:g} s" if passing else ""
                raise StorageError(
                    f"{uri}: the storage refuses or does not answer{again} ({said}); look at the address, the "
                    "credentials and the room. Nothing is lost here: the same command goes on"
                ) from None
            if wait_s == 1.0:
                sys.stderr.write(f"{uri} does not answer ({said}); asking again for {PATIENCE_S:g} s\n")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 30.0)


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Of the processes of this machine that want a file, let one fetch it and the others find it there."""
    lock = _copies() / "locks" / hashlib.sha256(str(file).encode()).hexdigest()[:2]  # few, and seldom shared
    lock.parent.mkdir(exist_ok=True)
    with locked(lock, what=address(file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def partial(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file takes its place on this machine when that has ended well.

    Of several writers at once the last one's file is kept, as long as they are on different machines or in different
    processes: each writes to a name of its own. The name has a dot in front, which readers of a folder pass over.
    """
    written = path.with_name(f".{path.name}.{machine()}-{os.getpid()}.tmp")
    try:
        yield written
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = True, what: str = "") -> Iterator[bool]:
    """Hold a lock that other processes respect, and that ends with this process whatever happens to it.

    Args:
        path: the lock's file, made if need be; it binds the machines that share its file system.
        wait: until the lock is free.
        what: is waited for, told where that takes long; by default the path.

    Yields:
        Whether it is held; always true when it was waited for. The file then says by whom.

    Raises:
        StorageError: the file cannot be opened, or the file system has no locks.
    """
    try:
        opened = path.open("a")
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be opened ({error.strerror}), and without this lock two commands could write the same "
            "files; let everybody who shares the folder write in it, or give a folder of your own"
        ) from None
    with opened as file:
        if not _flock(file, path, fcntl.LOCK_NB):
            if not wait:
                yield False
                return
            with telling(what or str(path), lambda: path.read_text(encoding="utf-8").strip()):
                _flock(file, path)
        file.truncate(0)
        file.write(f"{this_process()}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n")
        file.flush()
        yield True


def _flock(file: IO[str], path: Path, at_once: int = 0) -> bool:
    """Whether the lock is held now; false if it was to be had at once and was not free."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | at_once)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise StorageError(
            f"{path}: the file system has no locks ({error.strerror}), so two commands could write the same files; "
            "mount it with locks (NFS 4, or Lustre with -o flock), or use s3://bucket/name"
        ) from None
    return True


@contextmanager
def telling(what: str, holder: Callable[[], str]) -> Iterator[None]:
    """Say once, if the block takes longer than `QUIET_S`, what is waited for.

    Args:
        what: is waited for.
        holder: asked then, by another thread; says who has it, "" if that is not known.
    """

    def tell() -> None:
        said = ""
        with suppress(Exception):  # whatever it asks; that somebody waits is to be told all the same
            said = holder()
        sys.stderr.write(f"waiting for {what}: held by {said or 'another process'}\n")
        sys.stderr.flush()

    timer = threading.Timer(QUIET_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
