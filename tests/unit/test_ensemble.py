"""Ensembles against hand values, a grid and the members' own files; and what may not be joined."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from answers import gathered
from runs import change
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, log_loss

from sermll import report
from sermll.calibration import TEMPERATURES, fit_temperature
from sermll.compare import compare
from sermll.ensemble import ensemble, fit_stack, text
from sermll.errors import DataError
from sermll.files import read_json

CLASSES = ["angry", "neutral", "sad"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of one protocol, of different skill and sharpness. Read-only."""
    folder = tmp_path_factory.mktemp("runs")
    told = ((0, 1.0, 1.0), (1, 1.6, 3.0), (2, 0.4, 0.5))
    return [
        gathered(folder / f"demo-{seed:012d}", seed=seed, skill=skill, sharpness=sharpness)
        for seed, skill, sharpness in told
    ]


@pytest.fixture
def pair(made: list[Path], tmp_path: Path) -> list[Path]:
    """Two of them, to be changed."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in made[:2]]


def said(run: Path, name: str = "predictions") -> dict[tuple[int, str], np.ndarray]:
    """Probabilities by fold and utterance."""
    rows = pq.read_table(run / f"{name}.parquet").to_pylist()
    return {(row["fold"], row["utterance"]): np.array(row["probabilities"]) for row in rows}


def test_the_mean_is_that_of_the_members(made: list[Path], tmp_path: Path) -> None:
    found = ensemble(made, tmp_path / "all", "mean")
    members = [said(run) for run in made]
    rows = pq.read_table(tmp_path / "all" / "predictions.parquet").to_pylist()
    assert len(rows) == len(members[0])
    for row in rows:
        expected = sum(member[row["fold"], row["utterance"]] for member in members) / 3
        np.testing.assert_allclose(row["probabilities"], expected)
        assert row["predicted"] == CLASSES[int(np.argmax(expected))]
    by_fold = [[row for row in rows if row["fold"] == fold] for fold in range(3)]
    ua = [balanced_accuracy_score([r["label"] for r in fold], [r["predicted"] for r in fold]) for fold in by_fold]
    assert found.metrics["selected"]["ua"]["value"] == pytest.approx(np.mean(ua))
    assert [fold["ua"] for fold in found.metrics["folds"]] == pytest.approx(ua)
    assert found.metrics["complete"] and not found.metrics["ensemble"]["stack"]

    told = found.as_json()
    assert told["metrics"]["ua"] == pytest.approx(np.mean(ua))
    theirs = [read_json(run / "metrics.json")["selected"]["ua"]["value"] for run in made]
    assert [member["ua"] for member in told["members"]] == pytest.approx(theirs)
    best = made[int(np.argmax(theirs))]
    compared = compare([best, tmp_path / "all"]).differences[0]
    assert told["difference"] == vars(compared)
    assert f"{best.name}    {100 * max(theirs):.1f}  best" in text(found)
    assert f"p {compared.p:.4f}" in text(found)


def test_an_ensemble_is_a_run_folder(made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ensemble(made, tmp_path / "joined", "mean")
    run = report.load(found.run_dir)
    assert run.complete and run.facts["members"] == [f"{seed:012d}" for seed in range(3)]
    told = report.text_table(run)
    assert "demo-mean-of-3" in told and "chosen on dev" in told and "last epoch" not in told and "ECE" in told
    monkeypatch.setattr(report.pictures, "save", lambda stem, draw: draw() and b"<svg/>")
    page = report.build([found.run_dir, made[0]], tmp_path / "page").read_text(encoding="utf-8")
    assert "mean of the runs 000000000000" in page
    # Any order of the same members is the same ensemble, another method is another.
    again = ensemble(made[::-1], tmp_path / "again", "mean")
    other = ensemble(made, tmp_path / "other", "stack")
    ids = [read_json(one.run_dir / "run.json")["run_id"] for one in (found, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert again.metrics["selected"] == found.metrics["selected"]
    # An ensemble may be a member, and may be written again.
    ensemble([found.run_dir, made[0]], tmp_path / "nested", "stack")
    ensemble(made, found.run_dir, "mean")


def grid_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Least loss over a grid of weights and temperatures of two members."""
    told = np.log(probabilities)
    rows = np.arange(len(labels))
    return min(
        -np.log(softmax((weight * told[0] + (1 - weight) * told[1]) / temperature, axis=1)[rows, labels]).mean()
        for weight, temperature in product(np.linspace(0, 1, 41), np.geomspace(*TEMPERATURES, 81))
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_stack_is_as_good_as_the_best_of_a_grid(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = [1, 6, 40, 200][seed % 4]
    labels = generator.integers(4, size=count)
    skill, sharpness = generator.uniform(-0.5, 3, (2, 1, 1)), generator.uniform(0.3, 4, (2, 1, 1))
    logits = sharpness * (generator.normal(size=(2, count, 4)) + skill * np.eye(4)[labels])
    probabilities = softmax(logits, axis=2)
    weights, temperature = fit_stack(probabilities, labels)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
    assert TEMPERATURES[0] * 0.999 <= temperature <= TEMPERATURES[1] * 1.001
    joined = softmax(np.tensordot(weights, np.log(probabilities), axes=1) / temperature, axis=1)
    found, best = log_loss(labels, joined, labels=np.arange(4)), grid_loss(probabilities, labels)
    assert best - 0.01 < found < best + 1e-5


def test_the_stack_of_little() -> None:
    sure = np.array([[0.9, 0.1], [0.2, 0.8]])
    labels = np.array([0, 1])
    weights, temperature = fit_stack(np.stack([sure, sure]), labels)  # all right, and members that agree
    assert weights == pytest.approx([0.5, 0.5]) and temperature == pytest.approx(TEMPERATURES[0])
    weights, temperature = fit_stack(np.stack([sure, sure[::-1]]), labels)  # one right, one wrong
    assert weights == pytest.approx([1, 0]) and temperature == pytest.approx(TEMPERATURES[0])
    weights, temperature = fit_stack(np.ones((3, 4, 1)), np.zeros(4, int))  # one class
    assert weights == pytest.approx([1 / 3] * 3) and temperature == pytest.approx(1)
    weights, temperature = fit_stack(np.stack([np.eye(2), sure]), np.array([0, 0]))  # certain, and wrong
    assert weights == pytest.approx([0, 1], abs=1e-3) and np.isfinite(temperature)
    with pytest.raises(DataError, match="no probabilities"):
        fit_stack(np.full((2, 2, 2), np.nan), labels)
    with pytest.raises(DataError, match="at least one utterance"):
        fit_stack(np.zeros((2, 0, 3)), np.zeros(0, int))


def test_the_stack_is_fitted_on_dev_and_used_on_test(made: list[Path], tmp_path: Path) -> None:
    found = ensemble(made[:2], tmp_path / "out", "stack")
    labels = {
        (row["fold"], row["utterance"]): CLASSES.index(row["label"])
        for row in pq.read_table(made[0] / "predictions_dev.parquet").to_pylist()
    }
    dev, test, joined = (
        [said(run, "predictions_dev") for run in made[:2]],
        [said(run) for run in made[:2]],
        said(tmp_path / "out"),
    )
    for row in found.metrics["ensemble"]["stack"]:
        keys = [key for key in labels if key[0] == row["fold"]]
        weights, temperature = fit_stack(
            np.array([[member[key] for key in keys] for member in dev]), np.array([labels[key] for key in keys])
        )
        assert row["weights"] == pytest.approx(weights, abs=1e-3)
        assert row["temperature"] == pytest.approx(temperature, rel=1e-3)
        for key in (key for key in joined if key[0] == row["fold"]):
            mixed = sum(weight * np.log(member[key]) for weight, member in zip(weights, test, strict=True))
            np.testing.assert_allclose(joined[key], softmax(mixed / temperature), atol=1e-3)
    assert found.metrics["calibration"]["temperatures"] == pytest.approx([1, 1, 1], abs=0.01)  # it has its own
    assert "fold 2: weights " in text(found)


def test_a_member_by_itself_is_scaled_as_in_calibration() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=50)
    told = softmax(3 * (generator.normal(size=(1, 50, 3)) + np.eye(3)[labels]), axis=2)
    weights, temperature = fit_stack(told, labels)
    assert weights == pytest.approx([1]) and temperature == pytest.approx(fit_temperature(told[0], labels), rel=1e-3)


def test_runs_without_dev_predictions_have_a_mean_and_no_stack(pair: list[Path], tmp_path: Path) -> None:
    (pair[1] / "predictions_dev.parquet").unlink()
    found = ensemble(pair, tmp_path / "mean", "mean")
    assert "calibration" not in found.metrics
    assert "ECE" not in report.text_table(report.load(found.run_dir))
    with pytest.raises(DataError, match=r"no predictions_dev\.parquet"):
        ensemble(pair, tmp_path / "stack", "stack")
    assert not (tmp_path / "stack").exists()


def test_dev_utterances_of_one_class_weigh_no_members(pair: list[Path], tmp_path: Path) -> None:
    for run in pair:
        dev = pq.read_table(run / "predictions_dev.parquet")
        kept = [row["fold"] != 1 or row["label"] == "angry" for row in dev.to_pylist()]
        pq.write_table(dev.filter(kept), run / "predictions_dev.parquet")
    with pytest.raises(DataError, match="every dev utterance of fold 1 is 'angry'"):
        ensemble(pair, tmp_path / "stack", "stack")
    assert not (tmp_path / "stack").exists()
    ensemble(pair, tmp_path / "mean", "mean")


def test_what_cannot_be_joined_is_refused(made: list[Path], pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="two runs at least, 1 given"):
        ensemble(pair[:1], out, "mean")
    with pytest.raises(DataError, match="are one run, 000000000000"):
        ensemble([pair[0], pair[1], made[0]], out, "mean")
    with pytest.raises(DataError, match=r"nowhere: no run"):
        ensemble([pair[0], tmp_path / "nowhere"], out, "mean")
    (tmp_path / "unfinished").mkdir()
    shutil.copy(pair[0] / "run.json", tmp_path / "unfinished")
    with pytest.raises(DataError, match=r"unfinished: no results yet"):
        ensemble([pair[0], tmp_path / "unfinished"], out, "mean")

    table = pq.read_table(pair[1] / "predictions.parquet")
    labels = table["label"].to_pylist()
    wrong = table.set_column(
        table.column_names.index("label"), "label", [["sad" if n == 0 else x for n, x in enumerate(labels)]]
    )
    for changed, count in ((table.slice(5), 5), (wrong, 2)):
        pq.write_table(changed, pair[1] / "predictions.parquet")
        with pytest.raises(DataError, match=rf"not tested on the same utterances .* \({count} differ\)"):
            ensemble(pair, out, "mean")
    pq.write_table(table, pair[1] / "predictions.parquet")
    dev = pq.read_table(pair[1] / "predictions_dev.parquet")
    pq.write_table(dev.slice(3), pair[1] / "predictions_dev.parquet")
    with pytest.raises(DataError, match=r"not validated on dev .* \(3 differ\)"):
        ensemble(pair, out, "stack")
    pq.write_table(dev, pair[1] / "predictions_dev.parquet")

    facts = json.loads((pair[1] / "run.json").read_text())
    change(pair[1] / "run.json", protocol=facts["protocol"] | {"hash": "fedcba"})
    with pytest.raises(DataError, match="are of protocols fedcba and abcdef"):
        ensemble(pair, out, "mean")
    change(pair[1] / "run.json", data=facts["data"] | {"classes": ["angry", "happy", "sad"]})
    with pytest.raises(DataError, match="differ in 2 classes"):
        ensemble(pair, out, "mean")
    (pair[1] / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: damaged"):
        ensemble(pair, out, "mean")
    assert not out.exists()


def test_no_other_folder_is_overwritten(made: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "file").touch()
    for out, message in (
        (made[0], "holds another run"),
        (tmp_path / "mine", "holds other files"),
        (tmp_path / "file", "cannot be written"),
    ):
        with pytest.raises(DataError, match=message):
            ensemble(made, out, "mean")
