"""A user's own data in the layout of Hugging Face's `audiofolder`: recordings, and `metadata` that tell about them.

Layout: `metadata.csv`, `metadata.jsonl` or `metadata.parquet` in the folder or in some below it, such as
`train/metadata.csv`. The column `file_name` is relative to the folder of its metadata; the others are those of a
manifest (see `sermll.corpora.manifest`), of which label and speaker are needed. In JSON Lines a value is text or a
number, and integers are taken as text as in Parquet.

Folders named by label, such as `train/angry/x.wav`, tell no speaker. sermll does not guess one: without speakers no
fold can keep them apart, and such results cannot be trusted. A folder of that kind needs metadata too.

Splits, such as the folders `train` and `test`, are not protocols: all rows are read, and folds decide who is tested.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sermll.corpora.manifest import Row, Table, check_columns, make_corpus, read_csv, read_parquet
from sermll.errors import CorpusError
from sermll.rows import Corpus

_FILE_NAME = "file_name"


def open_corpus(root: Path, name: str, classes: tuple[str, ...] | None) -> tuple[Corpus, Path]:
    """Read and check the metadata below a folder.

    Args:
        root: the folder.
        name: what the corpus is called.
        classes: its classes in order; None: the labels found, in alphabetical order.

    Returns:
        The corpus, and `root`, which is what `read` of the corpus is called with.

    Raises:
        CorpusError: there are no metadata, or two in one folder; they cannot be read, lack or repeat a column, have an
            unknown one or no rows; or rows are faulty: the first ten faults are told by row, column and value.
        ConfigError: a class is given twice.
    """
    tables = [(file, *_READERS[file.name](file)) for file in _metadata(root)]
    for file, columns, _ in tables:
        check_columns(file, columns, _FILE_NAME)
    rows = (row for file, _, found in tables for row in _relative(root, file, found))
    return make_corpus(rows, root, str(root), name, classes, _FILE_NAME), root


def _read_jsonl(file: Path) -> Table:
    """A JSON Lines file; its columns are the keys of all lines."""
    rows: list[Row] = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise CorpusError(f"{file}: line {number} is not JSON ({error})") from None
                if not isinstance(values, dict):
                    raise CorpusError(f"{file}: line {number} is not an object of columns and values")
                rows.append(Row(f"line {number}", values))
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    if not rows:
        raise CorpusError(f"{file}: no rows; one is needed for each utterance")
    return list(dict.fromkeys(column for row in rows for column in row.values)), iter(rows)


_READERS = {"metadata.csv": read_csv, "metadata.jsonl": _read_jsonl, "metadata.parquet": read_parquet}


def _metadata(root: Path) -> list[Path]:
    """Metadata files in a folder and below it, in a fixed order."""
    if not root.is_dir():
        raise CorpusError(f"{root}: no such folder; expected recordings and metadata.csv")
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found = [name for name in _READERS if name in names]
        if len(found) > 1:
            raise CorpusError(f"{folder}: holds {' and '.join(found)}; keep one of them")
        files.extend(Path(folder) / name for name in found)
    if not files:
        raise CorpusError(
            f"{root}: no {', '.join(_READERS)} in this folder or below it. Folders named by label tell no speaker, and "
            "results without speaker-disjoint folds cannot be trusted: add a metadata.csv with the columns "
            f"{_FILE_NAME}, label, speaker"
        )
    return files


def _relative(root: Path, file: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows of one metadata file with paths relative to the root, and places that name the file."""
    folder = PurePosixPath(file.parent.relative_to(root).as_posix())
    for row in rows:
        path = row.values.get(_FILE_NAME)
        values = {**row.values, _FILE_NAME: str(folder / path)} if path and isinstance(path, str) else row.values
        yield Row(f"{folder / file.name} {row.place}", values, row.fault)
