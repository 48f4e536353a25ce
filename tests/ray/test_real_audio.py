"""The whole chain on real recordings: those in SERMLL_CORPORA, by default ../shared/corpora beside the checkout."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from prepared import recordings

from sermll.audio import read_recording, to_float
from sermll.audit import audit
from sermll.config import load_experiment, parse_overrides
from sermll.corpora import CORPORA
from sermll.prepare import prepare
from sermll.shards import Prepared
from sermll.train import train

pytestmark = [pytest.mark.ray, pytest.mark.audio]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ravdess(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(CORPORA["ravdess"], recordings("ravdess"), tmp_path_factory.mktemp("data") / "ravdess").prepared


@pytest.fixture(scope="module")
def emodb(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(CORPORA["emodb"], recordings("emodb"), tmp_path_factory.mktemp("data") / "emodb").prepared


@pytest.mark.parametrize("name", ["ravdess", "emodb"])
def test_counts_and_lengths_are_the_published_ones(name: str, request: pytest.FixtureRequest) -> None:
    prepared: Prepared = request.getfixturevalue(name)
    assert prepared.manifest["counts"] == dict(CORPORA[name].counts)
    assert prepared.manifest["problems"] == {}
    with (recordings(name) / "manifest.csv").open(newline="") as file:
        listed = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    for row in prepared.table.to_pylist():
        assert row["label"] == listed[row["id"]]["emotion"]
        assert row["speaker"] == listed[row["id"]]["speaker"]
        assert row["duration_s"] == pytest.approx(float(listed[row["id"]]["duration_s"]), abs=0.001)


def test_the_identical_pair_of_ravdess_is_reported(ravdess: Prepared) -> None:
    assert ravdess.manifest["identical_audio"] == [["03-01-03-01-02-01-07", "03-01-03-01-02-02-07"]]


def test_the_audit_finds_that_pair_and_no_other(ravdess: Prepared, emodb: Prepared) -> None:
    found = audit(Path(ravdess.path))
    assert found.leaks == []
    pairs = [(found.ids[copy.first], found.ids[copy.second], copy.identical) for copy in found.copies]
    assert pairs == [("03-01-03-01-02-01-07", "03-01-03-01-02-02-07", True)]
    assert audit(Path(emodb.path)).copies == ()


def test_48_khz_stereo_originals_become_what_an_independent_conversion_made_of_them() -> None:
    originals = sorted(recordings("originals").glob("ravdess/*/*.wav"))
    assert len(originals) == 6
    for path in originals:
        ours = read_recording(path)
        theirs = read_recording(recordings("ravdess") / path.parent.name / f"{path.stem}.flac")
        assert ours.source_rate_hz == 48_000
        a, b = to_float(ours.samples), to_float(theirs.samples)
        assert abs(len(a) - len(b)) <= 1
        shared = min(len(a), len(b))
        error = a[:shared] - b[:shared]
        assert 10 * np.log10(np.sum(b**2) / np.sum(error**2)) > 40  # dB: the filters differ at the band's edge alone


@pytest.mark.parametrize("name", ["ravdess", "emodb"])
def test_one_epoch_of_one_fold_by_the_committed_experiment(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    prepared: Prepared = request.getfixturevalue(name)
    words = [
        f"data.path={prepared.path}",
        "fold=0",
        "optim.epochs=1",
        f"tracking.runs={tmp_path}",
        "tracking.mlflow=off",
    ]
    outcome = train(load_experiment(ROOT / "experiments" / f"{name}.yaml", parse_overrides(words)))
    run = json.loads((outcome.run_dir / "run.json").read_text())
    tested = set(run["protocol"]["folds"][0]["test"])
    expected = sum(speaker in tested for speaker in prepared.table["speaker"].to_pylist())
    assert np.sum(outcome.metrics["folds"][0]["confusion"]) == expected
    assert outcome.report.stat().st_size > 10_000
