"""The cross-corpus matrix: its cells against numbers counted by hand, and what each of its files says."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from prepared import tiny_settings, write_prepared
from runs import Page, change
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from sermll import campaign, matrix
from sermll.campaign import count, run_campaign
from sermll.files import read_json, write_json

CORPORA = {"a+b": ("cross", "calm"), "c": ("furious", "calm"), "d": ("cross", "calm")}
"""Names and labels of three corpora; one name has in it what joins others."""
LABELS = {"loud": ["cross", "furious"], "quiet": ["calm"]}


@pytest.fixture
def matrix_file(tmp_path: Path) -> Path:
    """Three corpora of five speakers each, who say everything four times."""
    paths = []
    for name, labels in CORPORA.items():
        rows = [
            (f"{speaker}-{label}-{take}", label, f"s{speaker}")
            for speaker in range(5)
            for label in labels
            for take in range(4)
        ]
        paths.append(str(write_prepared(tmp_path / name, name, rows)))
    settings = tiny_settings(tmp_path, tmp_path / "runs") | {"optim": {"epochs": 2, "batch_size": 4}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
    content = {"name": "m", "experiment": "x.yaml", "corpora": paths, "labels": LABELS}
    content["overrides"] = {"protocol.dev_speakers": 1}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "m.yaml"


def answers(folder: Path, part: str) -> pd.DataFrame:
    (run,) = [
        cell["run_dir"] for cell in read_json(folder / "campaign.json")["cells"] if cell["labels"]["part"] == part
    ]
    return pq.read_table(Path(run) / "predictions.parquet").to_pandas()


def ua_of_speakers(table: Any) -> Any:
    """UA of the answers of some speakers, each as often as given, [draws]."""
    names = sorted(set(table.speaker))
    right = np.array([[(t.label == t.predicted)[t.label == word].sum() for word in ("loud", "quiet")]
                      for t in (table[table.speaker == name] for name in names)])  # fmt: skip
    return lambda rows, axis=-1: (right[rows].sum(axis=axis if axis >= 0 else axis - 1) / (4 * len(names))).mean(
        axis=-1
    )


def test_cells_are_those_of_the_predictions(matrix_file: Path, untrained: list[str], undrawn: None) -> None:
    outcome = run_campaign(matrix.load_matrix(matrix_file, {}), matrix.build)
    found, names = outcome.found, list(CORPORA)
    assert found.corpora == tuple(names) and found.rows == (*names, matrix.OTHERS)
    assert len(found.cells) == 12 and outcome.finished == outcome.cells == 5
    others, one = (answers(outcome.folder, part) for part in (matrix.FROM_OTHERS, matrix.FROM_ONE))
    for cell in found.cells:
        if cell.train == cell.test:
            table = answers(outcome.folder, f"{matrix.WITHIN} {cell.test}")
        elif cell.train == matrix.OTHERS:
            table = others[others.fold == names.index(cell.test)]
        else:
            table = one[(one.fold == names.index(cell.train)) & (one.corpus == cell.test)]
        assert (cell.utterances, cell.speakers) == (len(table), 5) == (40, 5)
        folds = [part for _, part in table.groupby("fold")]
        for score, of in (
            ("ua", balanced_accuracy_score),
            ("wa", accuracy_score),
            ("macro_f1", lambda label, predicted: f1_score(label, predicted, average="macro")),
        ):
            expected = np.mean([of(part.label, part.predicted) for part in folds])
            assert cell.scores[score]["value"] == pytest.approx(expected)
            assert cell.scores[score]["low"] <= expected <= cell.scores[score]["high"]
        if cell.way != matrix.WITHIN:  # one fold: scipy can say its interval
            interval = stats.bootstrap(
                (np.arange(5),), ua_of_speakers(table), n_resamples=10_000, method="percentile", rng=1
            ).confidence_interval
            ends = (cell.scores["ua"]["low"], cell.scores["ua"]["high"])
            assert ends == pytest.approx(interval, abs=0.02)


def test_every_file_has_all_scores_and_the_label_space_of_each_cell(
    matrix_file: Path, untrained: list[str], undrawn: None
) -> None:
    outcome = run_campaign(matrix.load_matrix(matrix_file, {}), matrix.build)
    out, found = outcome.page.parent, outcome.found
    rows = list(csv.DictReader((out / "matrix.csv").open(newline="")))
    assert json.loads((out / "matrix.json").read_text()) == found.as_json()
    told = [cell.as_json() for cell in found.cells]
    assert [(row["train"], row["test"], row["how"]) for row in rows] == [
        (cell["train"], cell["test"], cell["how"]) for cell in told
    ]
    for row, cell in zip(rows, told, strict=True):
        for score in ("ua", "wa", "macro_f1"):
            ends = (float(row[f"{score}{end}"]) for end in ("", "_low", "_high"))
            assert tuple(ends) == tuple(cell[f"{score}{end}"] for end in ("", "_low", "_high"))
    spaces = {row["labels"] for row in rows if row["how"] != matrix.WITHIN}
    assert spaces == {"loud (cross, furious), quiet (calm)"}
    assert [row["labels"] for row in rows if row["how"] == matrix.WITHIN] == [
        *("loud (cross), quiet (calm)", "loud (furious), quiet (calm)", "loud (cross), quiet (calm)")
    ]
    page = Page(outcome.page)
    pages = [(out / f"matrix.{ending}").read_text() for ending in ("md", "tex")] + [page.text, matrix.text(found)]
    shown = found.cell("c", "d")
    assert shown is not None
    for said in pages:
        assert "classes of every cell: loud (cross, furious), quiet (calm)" in said
        assert "of these in c on c: loud (furious), quiet (calm)" in said
        for score in shown.scores.values():
            assert f"{100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" in said
        assert all(name in said for name in ("UA", "WA", "macro F1", "c 40 of 5 speakers", "chance UA 50.0"))
    assert page.headings == ["Across corpora", "UA", "WA", "macro F1", "Cost in hours"]
    assert f"{21 * 25 / 3600:.2f}" in page.text  # three times five folds within, three from one and three from others


def test_a_matrix_that_is_not_finished_is_shown_as_far_as_it_is(
    matrix_file: Path, untrained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_jobs: Any = campaign.train_jobs

    def half(work: Any, *words: Any) -> dict[Any, str]:
        members = [pair for pair in work if not pair[0].title.startswith(matrix.WITHIN)]
        train_jobs(members, *words)
        work[0][0].failed.parent.mkdir()
        write_json(work[0][0].failed, {"why": "loss is not finite\nand more"})
        return {work[0][0]: "loss is not finite\nand more"}

    monkeypatch.setattr(campaign, "train_jobs", half)
    outcome = run_campaign(matrix.load_matrix(matrix_file, {}), matrix.build)
    assert "not finished" in matrix.text(outcome.found)
    page = Page(outcome.page)
    assert "Failures" in page.headings and "fold 0: loss is not finite" in page.text
    again, _ = count(outcome.folder, matrix.build)
    assert again.as_json() == outcome.found.as_json()
    for cell in read_json(outcome.folder / "campaign.json")["cells"]:
        for result in Path(cell["run_dir"]).glob("fold-*/result.json"):
            result.unlink()
        (Path(cell["run_dir"]) / "metrics.json").unlink(missing_ok=True)
    assert count(outcome.folder, matrix.build)[0].cells == ()  # and the heat map of nothing can be drawn


def test_cells_that_leak_are_marked_in_every_file(matrix_file: Path, untrained: list[str], undrawn: None) -> None:
    folder = run_campaign(matrix.load_matrix(matrix_file, {}), matrix.build).folder
    leaks = [f"fold {fold}: 1 recordings stand in train and, under another name, in test (x)" for fold in (1, 10)]
    for cell in read_json(folder / "campaign.json")["cells"]:
        if cell["labels"]["part"] == matrix.FROM_ONE:  # its fold 1 is trained on c
            run = Path(cell["run_dir"]) / "run.json"
            change(run, protocol=read_json(run)["protocol"] | {"leaks": leaks})
    found, path = count(folder, matrix.build)
    notice = f"LEAK, scores are too high: {leaks[0]}. This is of c on a+b; c on d."
    for said in (Page(path).text, matrix.text(found), path.with_suffix(".md").read_text()):
        assert said.count("LEAK") == 1 and notice in said
    assert rf"\par {notice}" in path.with_suffix(".tex").read_text().splitlines()
    marked = {("c", "a+b"): leaks[:1], ("c", "d"): leaks[:1]}
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["leaks"] == leaks[:1]
    for cell in told["cells"]:
        assert cell["leaks"] == marked.get((cell["train"], cell["test"]), [])
    for row in csv.DictReader(path.with_suffix(".csv").open(newline="")):
        assert row["leaks"] == "; ".join(marked.get((row["train"], row["test"]), []))
