"""Calibration of whole runs: fitted on dev, by fold, and kept in metrics.json."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from answers import gathered
from prepared import finish
from scipy.special import softmax

from sermll import calibration, report, results, train
from sermll.calibration import expected_calibration_error, fit_temperature
from sermll.config import Experiment
from sermll.errors import DataError, TrainingError
from sermll.feed import FoldData
from sermll.files import read_json, write_json
from sermll.job import FoldJob
from sermll.metrics import speaker_bootstrap


def columns(path: Path, classes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, labels and folds, read in another way."""
    frame = pq.read_table(path).to_pandas()
    return np.stack(frame.probabilities.tolist()), frame.label.map(classes.index).to_numpy(), frame.fold.to_numpy()


def test_each_fold_is_scaled_by_the_temperature_of_its_dev_utterances(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab", sharpness=6.0)
    classes = read_json(run / "run.json")["data"]["classes"]
    kept = read_json(run / "metrics.json")["calibration"]
    said, labels, folds = columns(run / "predictions.parquet", classes)
    dev_said, dev_labels, dev_folds = columns(run / "predictions_dev.parquet", classes)
    scaled = said.copy()
    for fold, temperature in enumerate(kept["temperatures"]):
        assert temperature == pytest.approx(
            fit_temperature(dev_said[dev_folds == fold], dev_labels[dev_folds == fold]), rel=1e-4
        )
        scaled[folds == fold] = softmax(np.log(said[folds == fold]) / temperature, axis=1)
    assert len(set(kept["temperatures"])) == 3
    assert kept["ece"]["value"] == pytest.approx(expected_calibration_error(said, labels))
    assert kept["ece_scaled"]["value"] == pytest.approx(expected_calibration_error(scaled, labels))
    assert kept["nll_scaled"] == pytest.approx(-np.log(scaled[np.arange(len(labels)), labels]).mean())
    assert kept["ece"]["low"] > 0 and kept["ece_scaled"]["low"] == 0  # far too sharp, and mended
    assert kept["nll_scaled"] < kept["nll"]
    assert sum(kept["reliability"]["count"]) == len(labels)
    assert {type(value) for value in kept["reliability"]["accuracy"]} == {float, type(None)}


def test_test_labels_have_no_say_in_the_temperatures(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab")
    test, dev = (pq.read_table(run / name) for name in (results.PREDICTIONS, results.DEV_PREDICTIONS))
    classes = read_json(run / "run.json")["data"]["classes"]
    wrong = test.set_column(test.column_names.index("label"), "label", [test["label"].to_pylist()[::-1]])
    one, other = (results.calibrate(table, dev, classes) for table in (test, wrong))
    assert one["temperatures"] == other["temperatures"]
    assert one["nll"] != other["nll"]
    with pytest.raises(DataError, match=r"\(0, 3\) probabilities"):
        results.calibrate(test, dev.filter([fold != 1 for fold in dev["fold"].to_pylist()]), classes)


def test_dev_utterances_of_one_class_fit_no_temperature(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab", sharpness=6.0)
    test, dev = (pq.read_table(run / name) for name in (results.PREDICTIONS, results.DEV_PREDICTIONS))
    classes = read_json(run / "run.json")["data"]["classes"]
    kept = [row["fold"] != 1 or row["label"] == classes[0] for row in dev.to_pylist()]
    whole, few = (results.calibrate(test, table, classes)["temperatures"] for table in (dev, dev.filter(kept)))
    assert few == [whole[0], 1.0, whole[2]] and whole[1] > 2


def test_intervals_are_over_speakers_whatever_the_number_of_folds(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab", groups=(("a", "b", "c"), ("a", "b", "c"), ("c", "b", "a")))
    classes = read_json(run / "run.json")["data"]["classes"]
    kept = read_json(run / "metrics.json")
    table = pq.read_table(run / "predictions.parquet")
    counts, folds, speakers = results.by_speaker(table, classes)
    assert (folds.tolist(), speakers.tolist()) == ([0, 0, 0, 1, 1, 1, 2, 2, 2], list("abc" * 3))
    assert kept["selected"]["ua"] == vars(speaker_bootstrap(counts, folds, speakers, 0)["ua"])
    said, labels, _ = columns(run / "predictions.parquet", classes)
    ece = calibration.speaker_bootstrap(said, labels, table["speaker"].to_pylist(), 0)
    assert kept["calibration"]["ece"] == vars(ece)


def test_a_gathered_run_can_be_reported_and_its_scores_are_those_of_its_counts(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab")
    table = pq.read_table(run / "predictions.parquet")
    assert len(table) == sum(len(pq.read_table(run / f"fold-{fold}" / "predictions.parquet")) for fold in range(3))
    loaded = report.load(run)
    assert loaded.scores is not None
    counts, folds, speakers = results.by_speaker(table, loaded.classes)
    again = speaker_bootstrap(counts, folds, speakers, results.BOOTSTRAP_SEED)["ua"]
    assert loaded.scores["selected"]["ua"] == vars(again)
    confusion = loaded.confusion()
    assert confusion is not None
    np.testing.assert_array_equal(confusion, counts.sum(axis=0))
    for row in loaded.scores["folds"]:
        of_fold = counts[folds == row["fold"]].sum(axis=0)
        np.testing.assert_array_equal(row["confusion"], of_fold)
        assert row["recalls"] == pytest.approx((np.diag(of_fold) / of_fold.sum(axis=1)).tolist())


def test_a_class_without_utterances_has_no_recall() -> None:
    assert results.scores(np.array([[3.0, 1.0], [0.0, 0.0]]))["recalls"] == [0.75, None]


def test_numbers_are_those_of_the_folds_until_one_is_finished_after_them(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab")
    (run / "fold-3").mkdir()  # begun
    assert results.gathered(run) and len(results.finished_folds(run)) == 3
    written_ns = (run / "metrics.json").stat().st_mtime_ns
    os.utime(run / "fold-1" / "result.json", ns=(0, written_ns + 1))
    assert not results.gathered(run)
    os.utime(run / "fold-1" / "result.json", ns=(0, 0))
    assert results.gathered(run)
    (run / "fold-1" / "result.json").unlink()
    assert not results.gathered(run)


def test_folds_of_another_version_are_named(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab")
    (run / "fold-1" / results.DEV_PREDICTIONS).unlink()
    with pytest.raises(DataError, match=r"fold-1/predictions_dev\.parquet: not there; .* another version"):
        results.gather(run)


def test_folds_that_began_with_different_weights_are_no_run(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab")
    for fold, encoder in enumerate("aab"):
        path = run / f"fold-{fold}" / "result.json"
        write_json(path, {**read_json(path), "encoder": encoder})
    with pytest.raises(DataError, match="folds 1 and 2 began with different weights of the encoder"):
        results.gather(run)


def test_a_copy_of_a_fold_beside_it_is_none(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab")
    before = read_json(run / "metrics.json")
    for name in ("fold-0-old", "fold-1.bak", "fold-01"):
        shutil.copytree(run / "fold-0", run / name)
    assert [result["fold"] for result in results.finished_folds(run)] == [0, 1, 2]
    assert results.gather(run) == before and results.gathered(run)


def test_folds_that_are_finished_are_counted_where_others_failed(
    settings: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    def one_fails(work: Sequence[tuple[FoldJob, FoldData]], *_: Any) -> dict[FoldJob, str]:
        failed, others = work[0][0], work[1:]
        for job, data in others:
            finish(job, data)
        return {failed: "there was no room for it"}

    monkeypatch.setattr(train, "train_jobs", one_fails)
    monkeypatch.setattr(train, "connected", nullcontext)
    with pytest.raises(TrainingError, match=r"^fold 0: there was no room for it\nThe other folds are kept"):
        train.train(settings())
    (run,) = (tmp_path / "runs").glob("tiny-*")
    summary = read_json(run / "metrics.json")
    assert [row["fold"] for row in summary["folds"]] == list(range(1, 10)) and not summary["complete"]
    assert (run / "report" / "index.html").exists()
