"""`sermll matrix`: train on one corpus, test on another, for every pair; a campaign of three kinds of cells.

- within a corpus: its own cross-validation, the diagonal;
- from one corpus: one model for each training corpus, scored on all speakers of all others, a row each;
- from all others: one model for each test corpus, trained on the union of the others, the last row.

All of them tell the same classes apart, and every interval is over the test speakers of its cell.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from sermll import page, pictures, tally
from sermll.campaign import Campaign, CampaignBase, campaign_of
from sermll.campaign_page import hours
from sermll.config import Data, Protocol, read_yaml, validate
from sermll.design import Design
from sermll.files import read_json, write_json
from sermll.results import PREDICTIONS, estimate
from sermll.storage import place, send
from sermll.tables import latex, leak_notices, markdown, with_interval

WITHIN, FROM_ONE, FROM_OTHERS = "within", "from one corpus", "from all others"
SCORES = {"ua": "UA", "wa": "WA", "macro_f1": "macro F1"}
OTHERS = "all others"
"""Title of the last row."""
CORNER = "trained on"


class MatrixFile(CampaignBase):
    """What a matrix file holds."""

    corpora: tuple[str, ...] = Field(min_length=2, description="folders of prepared data, one for each corpus")
    labels: str | dict[str, tuple[str, ...]] = Field(
        default="shared", description="label space of every cell, as data.labels; shared: what all corpora have"
    )


@dataclass(frozen=True)
class Cell:
    """Trained on one corpus or several, tested on one."""

    train: str
    test: str
    utterances: int
    speakers: int
    scores: dict[str, Any]
    """`value`, `low` and `high` of ua, wa and macro_f1."""
    labels: Mapping[str, Sequence[str]]
    """Its label space: each class and the labels that it takes, of the corpora trained on and tested."""
    way: Literal["within", "from one corpus", "from all others"]
    leaks: Sequence[str]
    """What stands on two sides of its folds, each in words."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        ends = {"": "value", "_low": "low", "_high": "high"}
        scores = {f"{name}{end}": self.scores[name][key] for name in SCORES for end, key in ends.items()}
        told = {"train": self.train, "test": self.test, "how": self.way}
        told |= {"utterances": self.utterances, "speakers": self.speakers, "labels": self.labels}
        return told | scores | {"leaks": self.leaks}


@dataclass(frozen=True)
class Part:
    """A run of the matrix: of one or several cells."""

    title: str
    failures: tuple[str, ...]
    """Fold and the first line of why."""
    cost: tally.Cost


@dataclass(frozen=True)
class Matrix:
    """The cells that are finished."""

    corpora: tuple[str, ...]
    rows: tuple[str, ...]
    """What is trained on: each corpus and, of three or more, all others."""
    classes: dict[str, list[str]]
    """The label space: each class and the labels that it takes in all corpora together."""
    cells: tuple[Cell, ...]
    parts: tuple[Part, ...]

    def cell(self, train: str, test: str) -> Cell | None:
        """A cell, None if it is not finished."""
        return next((cell for cell in self.cells if (cell.train, cell.test) == (train, test)), None)

    def grid(self, part: Literal["value", "low", "high"]) -> list[list[float | None]]:
        """UA by row and column, None where there is none."""
        cells = [[self.cell(train, test) for test in self.corpora] for train in self.rows]
        return [[None if cell is None else cell.scores["ua"][part] for cell in row] for row in cells]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "train": list(self.rows),
            "test": list(self.corpora),
            "ua": self.grid("value"),
            "ua_low": self.grid("low"),
            "ua_high": self.grid("high"),
            "cells": [cell.as_json() for cell in self.cells],
            "leaks": list(dict.fromkeys(leak for cell in self.cells for leak in cell.leaks)),
        }


def load_matrix(path: Path, overrides: dict[str, Any]) -> Campaign:
    """Read a matrix file as the campaign of its cells; opens the corpora to see what they share.

    Raises:
        ConfigError: the file, the label space or a cell is not valid.
        DataError: a corpus is not prepared.
    """
    file = validate(MatrixFile, read_yaml(path, "matrix"), f"{path}: not a valid matrix")
    joined = Design.of(Data(path=file.corpora, labels=file.labels), Protocol(folds="one_corpus"))
    members = joined.labelled.space.members
    together = {"data.path": list(file.corpora), "data.labels": {name: list(words) for name, words in members.items()}}
    parts: dict[str, dict[str, Any]] = {
        f"{WITHIN} {corpus}": {
            "data.path": folder,
            "data.labels": {name: [word for word in words if word in own] for name, words in members.items()},
        }
        for folder, (corpus, own) in zip(file.corpora, joined.prepared.corpora.items(), strict=True)
    }
    parts[FROM_ONE] = {**together, "protocol.folds": "one_corpus"}
    if len(file.corpora) > 2:  # of two, all others are one corpus
        parts[FROM_OTHERS] = {**together, "protocol.folds": "corpus"}
    return campaign_of("matrix", file, {"part": parts}, path, overrides)


def read_matrix(campaign_dir: Path) -> Matrix:
    """The matrix of a campaign's finished cells."""
    told = tally.read(campaign_dir)
    runs = {cell["labels"]["part"]: place(cell["run_dir"]) for cell in told["cells"]}
    facts = read_json(runs[FROM_ONE] / "run.json")
    corpora = tuple(fold["train_corpora"][0] for fold in facts["protocol"]["folds"])
    classes = facts["data"]["classes"]
    cells = [_cell(runs[f"{WITHIN} {corpus}"], None, corpus, corpus, classes) for corpus in corpora]
    for fold, train in enumerate(corpora):
        cells += [_cell(runs[FROM_ONE], fold, train, test, classes) for test in corpora if test != train]
    if FROM_OTHERS in runs:
        cells += [_cell(runs[FROM_OTHERS], fold, OTHERS, test, classes) for fold, test in enumerate(corpora)]
    rows = (*corpora, OTHERS) if FROM_OTHERS in runs else corpora
    parts = tuple(Part(cell["labels"]["part"], tuple(tally.failures(cell)), tally.cost(cell)) for cell in told["cells"])
    return Matrix(corpora, rows, facts["data"]["members"], tuple(cell for cell in cells if cell is not None), parts)


@cache
def _answers(path: Path, changed_ns: int) -> pa.Table:
    """The predictions of a run, which several cells share; read again when the file has changed."""
    return pq.read_table(path, columns=["speaker", "corpus", "fold", "label", "predicted"])


def _cell(run: Path, fold: int | None, train: str, test: str, classes: Sequence[str]) -> Cell | None:
    """A cell from the predictions of a run: of all its folds or of one, on one corpus."""
    if not (run / "metrics.json").exists():
        return None
    if fold is None and not read_json(run / "metrics.json")["complete"]:
        return None
    table = _answers(run / PREDICTIONS, (run / PREDICTIONS).stat().st_mtime_ns)
    chosen = pc.field("corpus") == test
    if fold is not None:
        chosen = chosen & (pc.field("fold") == fold)
    table = table.filter(chosen)
    if len(table) == 0:
        return None
    scores, _ = estimate(table, classes)
    way = WITHIN if train == test else FROM_OTHERS if train == OTHERS else FROM_ONE
    facts = read_json(run / "run.json")
    leaks = [leak for leak in facts["protocol"]["leaks"] if fold is None or leak.startswith(f"fold {fold}: ")]
    speakers = len(set(table["speaker"].to_pylist()))
    return Cell(train, test, len(table), speakers, scores, facts["data"]["members"], way, leaks)


def text(matrix: Matrix) -> str:
    """The matrix for the terminal: scores in percent with their intervals."""
    first = max(len(name) for name in (*matrix.rows, CORNER))
    lines = [*_leaks(matrix), *_spaces(matrix)]
    for score, rows in _tables(matrix).items():
        lines += ["", score]
        for row in ([CORNER, *matrix.corpora], *rows):
            lines.append(f"{row[0]:<{first}}  " + "".join(f"{cell:<20}" for cell in row[1:]).rstrip())
    return "\n".join([*lines, "", _legend(matrix)])


def _tables(matrix: Matrix) -> dict[str, list[list[str]]]:
    """For each score a row for each of what is trained on: its title, and the score on each corpus."""

    def told(train: str, test: str, score: str) -> str:
        cell = matrix.cell(train, test)
        return "not finished" if cell is None else with_interval(cell.scores[score])

    return {
        title: [[train, *(told(train, test, score) for test in matrix.corpora)] for train in matrix.rows]
        for score, title in SCORES.items()
    }


def _legend(matrix: Matrix) -> str:
    sizes = [cell for cell in matrix.cells if cell.way == WITHIN]
    tested = ", ".join(f"{cell.test} {cell.utterances} of {cell.speakers} speakers" for cell in sizes)
    return (
        f"Percent with 95 % interval over test speakers, chance UA {100 / len(matrix.classes):.1f}; tested: {tested}; "
        "the diagonal is cross-validation within the corpus"
    )


def _spaces(matrix: Matrix) -> Iterator[str]:
    """The label space, and that of cells which have fewer labels of it."""
    yield f"classes of every cell: {_words(matrix.classes)}"
    for cell in matrix.cells:
        if cell.labels != matrix.classes:
            yield f"of these in {cell.train} on {cell.test}: {_words(cell.labels)}"


def _leaks(matrix: Matrix) -> list[str]:
    return leak_notices({f"{cell.train} on {cell.test}": cell.leaks for cell in matrix.cells})


def _words(labels: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(
        name if list(words) == [name] else f"{name} ({', '.join(words)})" for name, words in labels.items()
    )


def build(campaign_dir: Path) -> tuple[Matrix, Path]:
    """Write report/matrix.html, .csv, .md, .tex, .json and the heat map as PNG and SVG; returns the page too."""
    matrix = read_matrix(campaign_dir)
    out = campaign_dir / "report"
    out.mkdir(exist_ok=True)
    tables, spaces, legend, leaks = _tables(matrix), list(_spaces(matrix)), _legend(matrix), _leaks(matrix)
    header = ["score", CORNER, *matrix.corpora]
    groups = [[[score, *row] for row in rows] for score, rows in tables.items()]
    write_json(out / "matrix.json", matrix.as_json())
    _write_csv(out / "matrix.csv", matrix)
    lines = markdown(header, [row for rows in groups for row in rows], leaks)
    (out / "matrix.md").write_text("\n\n".join([*spaces, lines, legend]) + "\n", encoding="utf-8")
    columns = "ll" + "r" * len(matrix.corpora)
    note = "; ".join([*spaces, legend])
    (out / "matrix.tex").write_text(latex(header, groups, columns, note, leaks), encoding="utf-8")
    drawn = pictures.save(out / "matrix", _picture(matrix))
    path = out / "matrix.html"
    content = [page.tag("h1", "Across corpora"), *(page.tag("p", leak, class_="notice") for leak in leaks)]
    content += [page.tag("p", f"{space}.") for space in spaces]
    for score, rows in tables.items():
        content += [page.tag("h3", score), page.table((CORNER, *matrix.corpora), rows, words=(0,))]
    content += [
        page.tag("p", f"{legend}."),
        page.figure(
            drawn, "UA by training and test corpus", "UA in percent with 95 % intervals over the test speakers."
        ),
    ]
    path.write_text(page.page("Across corpora", [*content, *_parts(matrix)]), encoding="utf-8")
    send(out)
    return matrix, path


def _parts(matrix: Matrix) -> Iterator[page.Html]:
    """Failures and cost."""
    failed = [(part.title, why) for part in matrix.parts for why in part.failures]
    if failed:
        yield page.tag("h3", "Failures")
        yield page.table(("part", "which and why"), failed, words=(0, 1))
    yield page.tag("h3", "Cost in hours")
    total = sum((part.cost for part in matrix.parts), tally.Cost())
    rows = [*((part.title, *hours(part.cost)) for part in matrix.parts), ("all", *hours(total))]
    yield page.table(("part", "wall clock", "training", "CPU", "GPU"), rows)


def _picture(matrix: Matrix) -> Callable[[], Any]:
    def grid(part: Literal["value", "low", "high"]) -> np.ndarray:
        return np.array(matrix.grid(part), dtype=np.float64)  # None becomes NaN

    chance = 1 / len(matrix.classes)
    return partial(pictures.heat_map, grid("value"), grid("low"), grid("high"), matrix.rows, matrix.corpora, chance)


def _write_csv(path: Path, matrix: Matrix) -> None:
    """One line for each cell, with every score."""
    with path.open("w", newline="", encoding="utf-8") as file:
        names = [f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")]
        header = ["train", "test", "how", "utterances", "speakers", "labels", *names, "leaks"]
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        for cell in matrix.cells:
            writer.writerow(cell.as_json() | {"labels": _words(cell.labels), "leaks": "; ".join(cell.leaks)})
