"""A user's own data as an audformat database (https://audeering.github.io/audformat/): a folder with `db.yaml`.

Needs the package of that name: `pip install "sermll[audformat]"`.

What is read, as `Database.get` finds it:

- `emotion`, the label: every column of that scheme or of that name, in all tables together, because databases often
  cut one annotation into a table for each split. Where two of them give a recording different emotions (the intended
  and the perceived one, or one for each rater), sermll does not choose: leave one of them in the database.
- `speaker`: likewise, in any table. A speaker told for a whole file holds for every part of it.
- `gender`, the sex: likewise, most often told by the labels of the speakers. Other than female and male: not known.

A row of a segmented table is the part of a file from its start to its end. The labels of the emotion scheme, in their
order, are the classes; without such labels those found are, in alphabetical order. A recording without an emotion
becomes a problem. Splits are not protocols and are not read: folds decide who is tested.

Traps:
- audformat reads pickled tables first, and its header with a YAML reader that makes any Python object: both can run
  code. sermll reads the header safely, and of the tables the CSV and Parquet files only.
- A column without a scheme in a CSV table is guessed by audformat: speaker 03 becomes 3. With a scheme it stays.
- Given a segmented and a filewise scheme at once, `Database.get` of audformat 1.4.3 gives parts the speakers of other
  files if the parts of a file do not stand together, so they are read one by one and joined here.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import yaml

from sermll.corpora.manifest import Row, make_corpus
from sermll.errors import ConfigError, CorpusError
from sermll.rows import Corpus, Problem

if TYPE_CHECKING:
    import audformat
    import pandas as pd

_Part = tuple[str, float | None, float | None]
"""A file, its start and its end in seconds; None and None: the whole file."""


def open_corpus(root: Path, name: str, classes: tuple[str, ...] | None) -> tuple[Corpus, Path]:
    """Read and check an audformat database.

    Args:
        root: the folder that holds db.yaml.
        name: what the corpus is called.
        classes: its classes in order; None: the labels of the emotion scheme.

    Returns:
        The corpus, and `root`, which is what `read` of the corpus is called with.

    Raises:
        CorpusError: there is no database, it cannot be read, tells no emotion or no speaker, or more than one; or rows
            are faulty: the first ten faults are told by file, column and value.
        ConfigError: audformat is not installed, or a class is given twice.
    """
    database = _load(root)
    emotion, speaker, gender = (_column(root, database, scheme) for scheme in ("emotion", "speaker", "gender"))
    labels = tuple(str(label) for label in emotion.cat.categories) if emotion.dtype == "category" else None
    emotions = _by_part(emotion)
    problems = [Problem(part[0], "label", "no emotion is told") for part, label in emotions.items() if label is None]
    rows = _rows(emotions, _by_part(speaker), _by_part(gender))
    corpus = make_corpus(rows, root, str(root), name, labels if classes is None else classes, "file", problems)
    citation = f"{database.author}: {database.name}" if database.author else corpus.citation
    licence, source = database.license or corpus.licence, database.source or corpus.source
    return replace(corpus, licence=licence, citation=citation, source=source), root


def _load(root: Path) -> "audformat.Database":
    """The database with all its tables, read without running code that it may hold."""
    try:
        import audformat
    except ModuleNotFoundError as error:
        raise ConfigError(f'to read an audformat database: pip install "sermll[audformat]" ({error})') from None
    header = root / "db.yaml"
    if not header.is_file():
        raise CorpusError(f"{root}: no db.yaml; expected the folder of an audformat database")
    try:
        database = audformat.Database.load_header_from_yaml(yaml.safe_load(header.read_text(encoding="utf-8")))
        with TemporaryDirectory() as folder:
            # The labels of schemes may stand in misc tables, which must be there when the others are read.
            for number, table in enumerate([*database.misc_tables, *database.tables]):
                file = _table_file(root, table)
                shutil.copy(file, f"{folder}/{number}{file.suffix}")  # away from its pickle
                database[table].load(f"{folder}/{number}")
    except Exception as error:  # audformat stumbles over a damaged database in any way
        raise CorpusError(f"{root}: not a readable audformat database ({type(error).__name__}: {error})") from None
    return database


def _table_file(root: Path, table: str) -> Path:
    for name in (f"db.{table}.parquet", f"db.{table}.csv"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"neither db.{table}.parquet nor db.{table}.csv is there; pickled tables are not read")


def _column(root: Path, database: "audformat.Database", scheme: str) -> "pd.Series":
    """What the database tells by some scheme, of files or of parts of files.

    Raises:
        CorpusError: it tells nothing, though it must, or two things of one part.
    """
    import pandas as pd

    try:
        column = pd.Series(database.get(scheme, map=False)[scheme])
    except (TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise CorpusError(
            f"{root}: columns disagree about {scheme!r} ({why}); leave one kind of them in the database, with its "
            f"drop_tables and save; there are {_columns(database)}"
        ) from None
    if column.empty and scheme != "gender":
        raise CorpusError(f"{root}: no column of the scheme or name {scheme!r}; there are {_columns(database)}")
    return column


def _by_part(column: "pd.Series") -> dict[_Part, str | None]:
    """A column by file, start and end; None where it leaves a part open."""
    import audformat

    index = audformat.utils.to_segmented_index(column.index)
    files = index.get_level_values("file").tolist()
    second = np.timedelta64(1, "s")
    starts_s, ends_s = ((index.get_level_values(level).to_numpy() / second).tolist() for level in ("start", "end"))
    told: dict[_Part, str | None] = {}
    for file, start_s, end_s, value, blank in zip(files, starts_s, ends_s, column, column.isna(), strict=True):
        to_end = math.isnan(end_s)
        part = file, None if to_end and start_s == 0.0 else start_s, None if to_end else end_s
        told[part] = None if blank else str(value)
    return told


def _rows(
    emotions: Mapping[_Part, str | None], speakers: Mapping[_Part, str | None], sexes: Mapping[_Part, str | None]
) -> Iterator[Row]:
    for part, label in emotions.items():
        if label is None:
            continue
        file, start_s, end_s = part
        speaker, sex = (told.get(part) or told.get((file, None, None)) for told in (speakers, sexes))
        values = {
            "file": file,
            "label": label,
            "speaker": speaker,
            "sex": sex if sex in ("female", "male") else None,
            "start_s": start_s,
            "end_s": end_s,
        }
        yield Row(file if start_s is None else f"{file} from {start_s} s", values)


def _columns(database: "audformat.Database") -> str:
    """Every table with its columns, for messages."""
    tables = [*database.tables, *database.misc_tables]
    return "; ".join(f"{table} ({', '.join(database[table].columns)})" for table in tables) or "no tables"
