"""A user's own data, told by one table: `manifest.csv` or `manifest.parquet`, one row for each utterance.

| column | |
|---|---|
| path | audio file, relative to the manifest's folder and inside it, with forward slashes |
| label | the emotion |
| speaker | who speaks |
| id | unique; without it the path without suffix, and `#start-end` for a part of a file |
| session, fold, text | which session, which fold tests it, which sentence |
| sex | female or male |
| start_s, end_s | the part of the file, in seconds; blank: from its start, to its end |
| valence, arousal, dominance | means over annotators, on the scale of the data |
| votes:LABEL | how many annotators chose LABEL; blank: none |

The first three columns are needed, the others are not. A blank value is one that is not told.

CSV: UTF-8, columns separated by commas, the first row names them. Every value is read as text, so speaker 03 stays 03.
Parquet: columns of text; integers are taken as text too (speaker 3 becomes "3"), other types for numbers only.

The order of the rows is that of the table. A row whose file is missing becomes a problem; any other fault of a row is
an error, because a table can be corrected.
"""

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sermll.corpora.folder import Votes, votes_of
from sermll.errors import ConfigError, CorpusError
from sermll.rows import Corpus, Problem, Utterance

_OPTIONAL = (
    *("id", "session", "fold", "text", "sex", "start_s", "end_s"),
    *("valence", "arousal", "dominance"),
)
_VOTES = "votes:"
_OWNER = "the owner's"
_FAULTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table before it is checked."""

    place: str
    """Where it stands, for messages: 'row 3'."""
    values: Mapping[str, Any]
    """By column: text, a number, or blank, which is None or ''."""
    fault: str | None = None
    """What is wrong with the row as a whole."""


Table = tuple[list[str], Iterator[Row]]
"""The names of the columns, and the rows."""


def open_corpus(root: Path, name: str, classes: tuple[str, ...] | None) -> tuple[Corpus, Path]:
    """Read and check a manifest.

    Args:
        root: the manifest, or a folder that holds one manifest.csv or manifest.parquet.
        name: what the corpus is called.
        classes: its classes in order; None: the labels found, in alphabetical order.

    Returns:
        The corpus, and the manifest's folder, which is what `read` of the corpus is called with.

    Raises:
        CorpusError: there is no manifest, it cannot be read, lacks or repeats a column, has an unknown one or no rows;
            or rows are faulty: the first ten faults are told by row (the header is row 1), column and value.
        ConfigError: a class is given twice.
    """
    file = _manifest(root)
    columns, rows = read_parquet(file) if file.suffix == ".parquet" else read_csv(file)
    check_columns(file, columns)
    return make_corpus(rows, file.parent, str(file), name, classes), file.parent


def read_csv(file: Path) -> Table:
    """A CSV file as text.

    Raises:
        CorpusError: it cannot be read, is not UTF-8, is empty or not CSV.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            records = csv.reader(io.StringIO(lines.read(), newline=""), strict=True)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file}: cannot be read as UTF-8 text ({error}); save it as 'CSV UTF-8'") from None
    numbered = _numbered(file, records)
    _, columns = next(numbered, (1, []))
    if not columns:
        raise CorpusError(f"{file}: row 1 is empty; it must name the columns")
    return columns, (_row(number, columns, values) for number, values in numbered if any(values))


def read_parquet(file: Path) -> Table:
    """A Parquet file, a batch of rows at a time.

    Raises:
        CorpusError: it cannot be read as Parquet.
    """
    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{file}: cannot be read as Parquet ({error})") from None
    return table.schema_arrow.names, _parquet_rows(file, table)


def check_columns(file: Path, columns: Sequence[str], path_column: str = "path") -> None:
    """Refuse a table whose columns are not those of a manifest.

    Raises:
        CorpusError: a column is missing, stands twice or is unknown.
    """
    needed = (path_column, "label", "speaker")
    found = ", ".join(columns)
    missing = [column for column in needed if column not in columns]
    if missing:
        why = "; without speakers no fold keeps them apart, and such results cannot be trusted"
        raise CorpusError(
            f"{file}: no column {', '.join(missing)}; needed are {', '.join(needed)} (in CSV separated by commas), "
            f"found are {found}{why if 'speaker' in missing else ''}"
        )
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise CorpusError(f"{file}: the column {', '.join(twice)} stands twice")
    known = (*needed, *_OPTIONAL)
    for column in columns:
        label = column.removeprefix(_VOTES)
        if column in known or (label != column and label and label == label.strip()):
            continue
        near = get_close_matches(column, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)} and {_VOTES}LABEL; remove it"
        raise CorpusError(f"{file}: unknown column {column!r}; {hint}")


def make_corpus(
    rows: Iterable[Row],
    folder: Path,
    source: str,
    name: str,
    classes: tuple[str, ...] | None,
    path_column: str = "path",
    problems: Sequence[Problem] = (),
) -> Corpus:
    """Check rows and make a corpus of them.

    Args:
        rows: the rows, in the order of the corpus.
        folder: what their paths are relative to, and must stay inside.
        source: where the rows come from, for messages.
        name: what the corpus is called.
        classes: its classes in order; None: the labels found, in alphabetical order.
        path_column: the column of the paths.
        problems: what the reader could not make a row of.

    Raises:
        CorpusError: there are no rows, or some are faulty.
        ConfigError: a class is given twice.
    """
    if classes is not None and len(set(classes)) < len(classes):
        raise ConfigError(f"classes {', '.join(classes)}: one stands twice")
    utterances, faults = _check(rows, folder, classes, path_column)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        count += f", the first {_FAULTS_SHOWN}" if len(faults) > _FAULTS_SHOWN else ""
        raise CorpusError("\n".join([f"{source}: {count}:", *faults[:_FAULTS_SHOWN]]))
    if not utterances:
        raise CorpusError(f"{source}: no rows; one is needed for each utterance")

    def read(root: Path) -> Iterator[Utterance | Problem]:
        """Rows of the table; a missing file is a problem."""
        return _existing(utterances, problems, root, source)

    return Corpus(
        name=name,
        title=name,
        classes=classes or tuple(sorted({utterance.label for utterance in utterances})),
        counts={},
        folds={},
        licence=_OWNER,
        citation=_OWNER,
        source=_OWNER,
        read=read,
        default_folds="speaker" if utterances[0].fold is None else "fold",
    )


def _manifest(root: Path) -> Path:
    if not root.is_dir():
        if not root.is_file():
            raise CorpusError(f"{root}: no such file or folder; expected a manifest or the folder that holds it")
        if root.suffix not in (".csv", ".parquet"):
            raise CorpusError(f"{root}: not a manifest; its name must end in .csv or .parquet")
        return root
    found = [file for file in (root / "manifest.csv", root / "manifest.parquet") if file.is_file()]
    if len(found) != 1:
        what = "both manifest.csv and manifest.parquet" if found else "neither manifest.csv nor manifest.parquet"
        raise CorpusError(f"{root}: {what} in this folder; one is needed, or name the file itself")
    return found[0]


def _numbered(file: Path, records: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Records of a CSV file with their numbers as a spreadsheet shows them, blank rows counted."""
    number = 0
    try:
        for number, values in enumerate(records, start=1):
            yield number, values
    except csv.Error as error:
        raise CorpusError(f"{file}: row {number + 1} is not CSV ({error}); check its quotes") from None


def _row(number: int, columns: list[str], values: list[str]) -> Row:
    fits = len(values) == len(columns)
    fault = None if fits else f"has {len(values)} values for {len(columns)} columns; put quotes around commas"
    return Row(f"row {number}", dict(zip(columns, values, strict=False)), fault)


def _parquet_rows(file: Path, table: pq.ParquetFile) -> Iterator[Row]:
    number = 2  # a spreadsheet would show the names in row 1
    try:
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                yield Row(f"row {number}", values)
                number += 1
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{file}: cannot be read as Parquet after row {number - 1} ({error})") from None


def _check(
    rows: Iterable[Row], folder: Path, classes: tuple[str, ...] | None, path_column: str
) -> tuple[list[Utterance], list[str]]:
    """The utterances that rows without a fault tell of, and the faults."""
    real_folder = Path(os.path.realpath(folder))
    utterances: list[Utterance] = []
    faults: list[str] = []
    place_of_id: dict[str, str] = {}
    without_fold: _Cells | None = None
    for row in rows:
        cells = _Cells(row)
        utterance = cells.utterance(real_folder, classes, path_column)
        if utterance is not None:
            if utterance.fold is None:
                without_fold = without_fold or cells
            first = place_of_id.setdefault(utterance.id, row.place)
            if first != row.place:
                cells.refuse("id", f"stands in {first} too; give every row its own id", utterance.id)
            utterances.append(utterance)
        faults.extend(cells.faults)
    if without_fold and any(utterance.fold for utterance in utterances):
        without_fold.refuse("fold", "other rows have a fold; give every row one, or none")
        faults.append(without_fold.faults[-1])
    return utterances, faults


class _Cells:
    """The values of one row, asked for by column, and what is wrong with them."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self.faults: list[str] = []
        if row.fault is not None:
            self.faults.append(f"{row.place}: {row.fault}")

    def refuse(self, column: str, why: str, value: object = None) -> None:
        """Note a fault: `value`, or what stands in a column, cannot be used."""
        value = self._row.values.get(column) if value is None else value
        shown = "" if value is None else value
        self.faults.append(f"{self._row.place}, column {column}, value {shown!r:.200}: {why}")

    def utterance(self, real_folder: Path, classes: tuple[str, ...] | None, path_column: str) -> Utterance | None:
        """The utterance the row tells of, None if a value is at fault."""
        if self.faults:
            return None
        path = self._path(path_column, real_folder)
        label = self._text("label", needed=True)
        if classes is not None and label and label not in classes:
            near = get_close_matches(label, classes, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.refuse("label", f"is none of the classes {', '.join(classes)}{hint}")
        speaker = self._text("speaker", needed=True)
        sex = self._text("sex")
        if sex not in (None, "female", "male"):
            self.refuse("sex", "is neither female nor male; leave it blank where it is not known")
        start_s, end_s = self._number("start_s", least=0.0), self._number("end_s", least=0.0)
        if end_s is not None and end_s <= (start_s or 0.0):
            self.refuse("end_s", f"is not after the start, {start_s or 0.0} s")
        # Every value is asked for before the first fault ends it, so that all faults of a row are told at once.
        utterance = partial(
            Utterance,
            session=self._text("session"),
            text=self._text("text"),
            sex=sex,
            fold=self._text("fold"),
            start_s=start_s,
            end_s=end_s,
            votes=self._votes(),
            valence=self._number("valence"),
            arousal=self._number("arousal"),
            dominance=self._number("dominance"),
        )
        identity = self._text("id")
        if self.faults or path is None or label is None or speaker is None:
            return None
        return utterance(id=identity or _identity(path, start_s, end_s), path=path, label=label, speaker=speaker)

    def _text(self, column: str, needed: bool = False) -> str | None:
        value = self._row.values.get(column)
        if value is None or value == "":
            if needed:
                self.refuse(column, "is blank; every row needs one")
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            self.refuse(column, f"is of type {type(value).__name__}; give text")
            return None
        if value != value.strip():
            self.refuse(column, "starts or ends with a space; remove it")
        return value

    def _number(self, column: str, least: float = -math.inf) -> float | None:
        value = self._row.values.get(column)
        if value is None or value == "":
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.refuse(column, "is not a number such as 0.5")
        elif number < least:
            self.refuse(column, f"is less than {least:g}")
        return number

    def _votes(self) -> Votes | None:
        columns = (column for column in self._row.values if column.startswith(_VOTES))
        return votes_of({column.removeprefix(_VOTES): self._number(column, least=0.0) or 0.0 for column in columns})

    def _path(self, column: str, real_folder: Path) -> str | None:
        """The path in its plainest form, None if it is no file inside the folder."""
        value = self._text(column, needed=True)
        if value is None:
            return None
        path = PurePosixPath(value)
        why = None
        if "\\" in value:
            why = "has a backslash; write / between folders"
        elif path.is_absolute() or PureWindowsPath(value).drive:
            why = f"is absolute; give it relative to {real_folder}"
        elif ".." in path.parts:
            why = "leads upwards; the file must be inside the folder of the table"
        elif not path.name:
            why = "names no file"
        else:
            try:
                real = Path(os.path.realpath(real_folder / path))
            except ValueError as error:
                why = f"cannot be the name of a file ({error})"
            else:
                if not real.is_relative_to(real_folder):
                    why = f"is a link that leads outside, to {real}; copy the file into the folder of the table"
        if why is not None:
            self.refuse(column, why)
            return None
        return str(path)


def _identity(path: str, start_s: float | None, end_s: float | None) -> str:
    part = "-".join("" if time_s is None else str(time_s) for time_s in (start_s, end_s))
    return str(PurePosixPath(path).with_suffix("")) + ("" if part == "-" else f"#{part}")


def _existing(
    utterances: Sequence[Utterance], problems: Sequence[Problem], root: Path, source: str
) -> Iterator[Utterance | Problem]:
    """The utterances, those without a file as problems, and the other problems.

    Raises:
        CorpusError: no file exists. Raised by the call itself.
    """
    rows = [
        utterance if (root / utterance.path).is_file() else Problem(utterance.path, "missing", "no such file")
        for utterance in utterances
    ]
    if all(isinstance(row, Problem) for row in rows):
        raise CorpusError(
            f"{source}: none of the files of its {len(rows)} rows exists, such as {root / utterances[0].path}; "
            f"paths are relative to {root}"
        )
    return iter([*rows, *problems])
