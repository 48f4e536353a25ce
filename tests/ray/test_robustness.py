"""`sermll robustness` on a real Ray cluster: clean is the run's own, scores add up, work is kept, faults are named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import write_corpus
from prepared import prepare_without_ray, tiny_settings
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from sermll.audio import to_float
from sermll.config import Experiment, with_overrides
from sermll.errors import CheckpointError, ConfigError, DataError, SermllError
from sermll.noise import active_level_db, add_noise, draws, read_noises
from sermll.robustness import Robustness, robustness
from sermll.shards import Prepared, Waveforms
from sermll.train import train

pytestmark = pytest.mark.ray
LEVELS = [10.0, -5.0]
CLICK = "03a01Wa"


@pytest.fixture(scope="module")
def noises(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hiss of two seconds, and a hum that is shorter than most utterances. Read-only."""
    folder = tmp_path_factory.mktemp("noises")
    hum = 0.2 * np.sin(2 * np.pi * 120 * np.arange(6_400) / 16_000)
    (folder / "machines").mkdir()
    soundfile.write(folder / "machines" / "hum.wav", hum, 16_000)
    soundfile.write(folder / "hiss.flac", 0.05 * np.random.default_rng(0).standard_normal(32_000), 16_000)
    return folder


@pytest.fixture(scope="module")
def run_dir(ray_cluster: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folds 0 and 1 of the tiny corpus, in which one recording is a mere click. Read-only."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = Path(shutil.copytree(tiny_corpus, folder / "emodb"))
    sound = np.zeros(9_600, np.int16)
    sound[4_000] = 900  # heard, so it is prepared; but no speech
    soundfile.write(corpus / "wav" / f"{CLICK}.wav", sound, 16_000)
    data = prepare_without_ray(corpus, folder / "data")
    tree = with_overrides(tiny_settings(data, folder / "runs"), {"optim.epochs": 1, "optim.lr": 3e-3})
    for fold in (0, 1):
        outcome = train(Experiment.model_validate(tree | {"fold": fold}))
    return outcome.run_dir


@pytest.fixture(scope="module")
def found(run_dir: Path, noises: Path, tmp_path_factory: pytest.TempPathFactory) -> Robustness:
    """Both folds under both noises. Read-only."""
    return robustness(run_dir, noises, [-5, 10], tmp_path_factory.mktemp("found") / "out")


def test_clean_predictions_are_those_of_the_run(run_dir: Path, found: Robustness) -> None:
    table = pq.read_table(found.folder / "predictions.parquet").to_pandas()
    clean = table[table["noise"].isna()]
    assert clean["snr_db"].isna().all()
    stored = pq.read_table(run_dir / "predictions.parquet").to_pandas()
    for name in ("utterance", "speaker", "corpus", "fold", "label", "predicted"):
        assert clean[name].tolist() == stored[name].tolist()
    np.testing.assert_allclose(np.stack(clean["probabilities"]), np.stack(stored["probabilities"]), atol=1e-5)
    selected = json.loads((run_dir / "metrics.json").read_text())["selected"]
    assert found.found["clean"] == {name: selected[name] for name in ("ua", "wa", "macro_f1")}


def test_scores_are_those_of_the_predictions(found: Robustness) -> None:
    table = pq.read_table(found.folder / "predictions.parquet").to_pandas()
    stored = json.loads((found.folder / "robustness.json").read_text())
    assert stored == found.found
    assert [(row["noise"], row["snr_db"]) for row in stored["conditions"]] == [
        (noise, level) for noise in ("hiss", "hum") for level in LEVELS
    ]
    assert len(table) == 28 * 5
    for row in stored["conditions"]:
        rows = table[(table["noise"] == row["noise"]) & (table["snr_db"] == row["snr_db"])]
        folds = [rows[rows["fold"] == fold] for fold in (0, 1)]
        for name, score in (("ua", balanced_accuracy_score), ("wa", accuracy_score)):
            expected = np.mean([score(fold["label"], fold["predicted"]) for fold in folds])
            assert row[name]["value"] == pytest.approx(expected)
        macro = [f1_score(fold["label"], fold["predicted"], average="macro") for fold in folds]
        assert row["macro_f1"]["value"] == pytest.approx(np.mean(macro))
        assert row["ua"]["low"] <= row["ua"]["value"] <= row["ua"]["high"]
    for mean in stored["mean"]:
        parts = [row for row in stored["conditions"] if row["snr_db"] == mean["snr_db"]]
        for name in ("ua", "wa"):
            assert mean[name]["value"] == pytest.approx(np.mean([part[name]["value"] for part in parts]))
    assert found.as_json() == {
        "path": str(found.folder),
        "clean_ua": stored["clean"]["ua"]["value"],
        "conditions": [
            {
                "noise": row["noise"],
                "snr_db": row["snr_db"],
                **{f"ua{end}": row["ua"][key] for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))},
            }
            for row in stored["conditions"]
        ],
        "leaks": [],
    }
    assert {"index.html", "table.csv", "curves.png", "curves.svg"} <= {path.name for path in found.folder.iterdir()}


def test_noisy_predictions_are_those_of_noisy_sound(run_dir: Path, found: Robustness, noises: Path) -> None:
    from sermll.predict import Predictor

    (system,) = Predictor.load(run_dir, 1).systems
    prepared = Prepared.open(json.loads((run_dir / "run.json").read_text())["data"]["paths"])
    waveforms = Waveforms(prepared.files, prepared.table["shard"].to_numpy(), prepared.table["row"].to_numpy())
    ids = prepared.table["id"].to_pylist()
    table = pq.read_table(found.folder / "predictions.parquet").to_pandas()
    hum = read_noises(noises)[1]
    rows = table[(table["fold"] == 1) & (table["noise"] == "hum") & (table["snr_db"] == -5)]
    for _, row in rows.head(4).iterrows():
        speech = to_float(waveforms[ids.index(row["utterance"])])
        noisy, _ = add_noise(speech, hum.samples, -5.0, draws(0, row["utterance"], "hum"))
        with torch.no_grad():
            logits = system.recognize(torch.from_numpy(noisy)[None], torch.tensor([len(noisy)])).logits
        np.testing.assert_allclose(row["probabilities"], logits.softmax(dim=1)[0].numpy(), atol=1e-5)
        assert row["active_level_db"] == active_level_db(speech)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "pieces").iterdir()}


def test_pieces_that_are_there_are_not_scored_again(
    run_dir: Path, found: Robustness, noises: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(found.folder, tmp_path / "out"))
    first = times(out)
    assert len(first) == 6
    robustness(run_dir, noises, LEVELS, out)
    assert times(out) == first

    lost = next((out / "pieces").glob("fold-1-hum-*"))
    lost.unlink()
    (out / "robustness.json").unlink()
    again = robustness(run_dir, noises, LEVELS, out)
    assert {name for name, time in times(out).items() if first[name] != time} == {lost.name}
    assert pq.read_table(lost).equals(pq.read_table(next((found.folder / "pieces").glob("fold-1-hum-*"))))
    assert again.found == found.found


def test_other_settings_are_never_mixed(run_dir: Path, found: Robustness, noises: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(found.folder, tmp_path / "out"))
    first = times(out)
    other = robustness(run_dir, noises, LEVELS, out, seed=1)
    added = times(out).keys() - first.keys()
    assert len(added) == 4 and not any("clean" in name for name in added)  # clean has no seed
    assert other.found["clean"] == found.found["clean"]

    more = Path(shutil.copytree(noises, tmp_path / "noises"))
    soundfile.write(more / "hiss.flac", 0.3 * np.sin(np.arange(9_000)), 16_000)  # another sound of the same name
    robustness(run_dir, more, LEVELS, out)
    fresh = times(out).keys() - first.keys() - added
    assert sorted(name[:11] for name in fresh) == ["fold-0-hiss", "fold-1-hiss"]


def test_data_that_are_not_those_of_the_run_are_refused(run_dir: Path, noises: Path, tmp_path: Path) -> None:
    other = prepare_without_ray(write_corpus(tmp_path / "emodb", takes=1), tmp_path / "other")
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    run = json.loads((copy / "run.json").read_text())
    run["data"]["paths"] = [str(other)]
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match=r"not the data and folds .* differ in data\.data_hash, data\.utterances"):
        robustness(copy, noises, LEVELS)
    run["data"]["paths"] = [str(tmp_path / "absent")]
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match="no such folder"):
        robustness(copy, noises, LEVELS)


def test_other_folds_are_refused(run_dir: Path, noises: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("dev_speakers: auto", "dev_speakers: 2"))
    with pytest.raises(DataError, match=r"differ in protocol\.hash, protocol\.folds"):
        robustness(copy, noises, LEVELS)


def test_a_model_that_did_not_give_the_runs_results_is_refused(run_dir: Path, noises: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    result = json.loads((copy / "fold-1" / "result.json").read_text())
    result["best_checkpoint"] = (
        f"../fold-0/{json.loads((copy / 'fold-0' / 'result.json').read_text())['best_checkpoint']}"
    )
    (copy / "fold-1" / "result.json").write_text(json.dumps(result))
    with pytest.raises(
        DataError, match=r"fold 1 has a clean UA of .* the run says .*are not those that gave its results"
    ):
        robustness(copy, noises, LEVELS)
    model = copy / "fold-1" / result["best_checkpoint"] / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or changed"):
        robustness(copy, noises, LEVELS)


def test_bad_input_is_named(run_dir: Path, noises: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run"):
        robustness(tmp_path, noises, LEVELS)
    with pytest.raises(DataError, match="no such folder"):
        robustness(run_dir, tmp_path / "absent", LEVELS)
    with pytest.raises(DataError, match="holds no WAV or FLAC file"):
        robustness(run_dir, tmp_path, LEVELS)
    with pytest.raises(ConfigError, match="--snr nan"):
        robustness(run_dir, noises, [10, float("nan")])
    with pytest.raises(ConfigError, match="from -100 to 100 dB"):
        robustness(run_dir, noises, [1e9])
    with pytest.raises(ConfigError, match="at least one level"):
        robustness(run_dir, noises, [])
    with pytest.raises(ConfigError, match="--seed -1"):
        robustness(run_dir, noises, LEVELS, seed=-1)
    with pytest.raises(DataError, match="cannot be written"):
        robustness(run_dir, noises, LEVELS, Path("/dev/null/out"))
    unfinished = Path(shutil.copytree(run_dir, tmp_path / "unfinished"))
    for result in unfinished.glob("fold-*/result.json"):
        result.unlink()
    with pytest.raises(DataError, match="no finished fold"):
        robustness(unfinished, noises, LEVELS)


def test_a_silent_utterance_gets_no_noise_and_is_counted(found: Robustness) -> None:
    assert found.found["without_level"] == [CLICK]
    table = pq.read_table(found.folder / "predictions.parquet").to_pylist()
    rows = [row for row in table if row["utterance"] == CLICK]
    assert [row["active_level_db"] for row in rows] == [None] * 5
    for row in rows[1:]:
        np.testing.assert_allclose(row["probabilities"], rows[0]["probabilities"], atol=1e-5)
    assert all(row["active_level_db"] is not None for row in table if row["utterance"] != CLICK)


def test_what_goes_wrong_in_a_task_is_told_as_it_is(
    run_dir: Path, noises: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise DataError("shard 3 is damaged")

    def faulty(*_: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr("sermll.robustness.score", damaged)
    with pytest.raises(DataError, match=r"^shard 3 is damaged$"):
        robustness(run_dir, noises, LEVELS, tmp_path)
    monkeypatch.setattr("sermll.robustness.score", faulty)
    with pytest.raises(SermllError, match=r"(?s)^fold \d, clean: .*a fault of ours.*\nWhat was scored is kept"):
        robustness(run_dir, noises, LEVELS, tmp_path)
