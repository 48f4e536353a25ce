"""Files that appear whole or not at all, and that are named when something is wrong with them."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from sermll.errors import DataError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as quick, where PyYAML has it
ROOT = "SERMLL_ROOT"
"""Environment variable: the folder that relative paths of data and runs mean, where it is not the working directory."""


def place(path: str | Path) -> Path:
    """Where data or runs lie: `path` itself, a relative one in the folder of SERMLL_ROOT if that is set."""
    return Path(os.environ.get(ROOT, ""), Path(path).expanduser())


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file takes its place when that has ended well.

    Of several writers at once the last one's file is kept, as long as they are on different machines or in different
    processes: each writes to a name of its own. The name has a dot in front, which readers of a folder pass over.
    """
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what goes wrong with reading a file into a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: not there; was it moved, or written by another version?") from None
    except KeyError as error:
        raise DataError(f"{path}: no {error.args[0]!r} in it; was it written by another version?") from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:  # pyarrow's are among them
        raise DataError(f"{path}: damaged ({error})") from None


def write_json(path: Path, value: Any) -> None:  # anything JSON holds
    """Write a JSON file."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> Any:  # anything JSON holds
    """Read a JSON file.

    Raises:
        DataError: it is missing or damaged.
    """
    with naming(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_yaml(path: Path) -> Any:  # anything YAML holds
    """Read a YAML file.

    Raises:
        DataError: it is missing or damaged.
    """
    with naming(path):
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that other processes respect, and that ends with this process whatever happens to it.

    Args:
        path: the lock's file, made if need be, on storage that all of them share.
        wait: until the lock is free.

    Yields:
        Whether it is held; always true when it was waited for. The file then says by whom.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n")
        file.flush()
        yield True
