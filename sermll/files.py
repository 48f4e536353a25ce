"""Files that appear whole or not at all, and that are named when something is wrong with them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sermll.errors import DataError
from sermll.storage import fetch, partial, send

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as quick, where PyYAML has it
LOCK = ".driver"
"""In the folder of a fold or campaign: held by the command that works on it."""
CHECKPOINTS = "checkpoints"
"""Folder in a fold's folder."""
FAILED = "failed.json"
"""In the folder of a fold that could not be trained: why. A command that begins it again removes it."""
FRESH_S = 10.0
"""What was read from object storage this long ago need not be read again by whoever only shows it."""


def fetch_run(folder: Path, *, max_age_s: float = 0.0) -> None:
    """Bring a run's folder up to date, where it is a copy of object storage; but for its checkpoints."""
    fetch(folder, without=CHECKPOINTS, max_age_s=max_age_s)


def fold_folders(run: Path) -> list[tuple[int, Path]]:
    """Number and folder of each fold of a run, in order; a copy of a fold that somebody has put beside it is none."""
    found = ((re.fullmatch(r"fold-(0|[1-9]\d*)", path.name), path) for path in run.glob("fold-*"))
    return sorted((int(name[1]), path) for name, path in found if name)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file takes its place, and is stored, when that has ended well.

    See `storage.partial` for several writers at once.
    """
    with partial(path) as written:
        yield written
    send(path)


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


def failure(fold_dir: Path) -> str | None:
    """The first line of why a fold could not be trained; None if it could, or was not tried.

    Raises:
        DataError: the file that tells is damaged.
    """
    path = fold_dir / FAILED
    if (fold_dir / "result.json").exists() or not path.exists():
        return None
    with naming(path):
        return read_json(path)["why"].splitlines()[0]
