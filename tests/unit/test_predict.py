"""`sermll predict` hears recordings as training did: tested files get the probabilities that the test gave them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import write_corpus
from prepared import in_process, prepare_without_ray, tiny_settings
from runs import change

from sermll.cli import main
from sermll.config import resolve
from sermll.errors import ConfigError
from sermll.files import read_json
from sermll.loop import train_fold
from sermll.predict import Answers, predict
from sermll.train import Designs, Run

TRIM_DB = 30.0


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of tones between faint noise, its data without the noise, and a run of them. Read-only."""
    folder = tmp_path_factory.mktemp("trimmed")
    generator = np.random.default_rng(0)
    for path in sorted((write_corpus(folder / "emodb") / "wav").iterdir()):
        ends = 1e-3 * generator.standard_normal((2, 8_000))
        soundfile.write(path, np.concatenate([ends[0], soundfile.read(path)[0], ends[1]]), 16_000)
    data = prepare_without_ray(folder / "emodb", folder / "data", trim_db=TRIM_DB)
    run = Run.of(resolve(tiny_settings(data, folder / "runs"), {"fold": 0, "optim.lr": 3e-3}), Designs())
    run.open()
    ((job, of_fold),) = run.unfinished
    assert train_fold(job, of_fold, in_process, torch.device("cpu")) == []
    return folder


@pytest.fixture
def run(trimmed: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(next((trimmed / "runs").iterdir()), tmp_path / "run"))


def tell(run: Path, part: str, **facts: Any) -> None:
    """Change a part of run.json; None takes a fact out of it."""
    told = read_json(run / "run.json")[part] | facts
    change(run / "run.json", **{part: {name: fact for name, fact in told.items() if fact is not None}})


def heard_in_test(trimmed: Path, run: Path) -> tuple[list[Path], np.ndarray]:
    """Some of the files that the run was tested on, and what it then said of them."""
    rows = pq.read_table(run / "fold-0" / "predictions.parquet").to_pylist()[::3]
    files = [trimmed / "emodb" / "wav" / f"{row['utterance']}.wav" for row in rows]
    return files, np.array([row["probabilities"] for row in rows])


def gap(found: Answers, stored: np.ndarray) -> float:
    """The most by which probabilities differ from those of the test."""
    return float(np.abs([[*one.probabilities.values()] for one in found.predictions] - stored).max())


def test_tested_files_of_trimmed_data_get_the_probabilities_of_the_test(trimmed: Path, run: Path) -> None:
    files, stored = heard_in_test(trimmed, run)
    assert read_json(run / "run.json")["data"]["trim_db"] == {"emodb": TRIM_DB}
    found = predict(run, files, 0, None)
    assert gap(found, stored) < 1e-5 and found.faults == found.notices == []
    tell(run, "data", trim_db={"emodb": None})
    assert gap(predict(run, files, 0, None), stored) > 1e-3  # the ends are heard


def test_of_a_run_that_does_not_tell_the_data_do_while_they_are_there(trimmed: Path, run: Path) -> None:
    files, stored = heard_in_test(trimmed, run)
    tell(run, "data", trim_db=None)
    assert gap(predict(run, files, 0, None), stored) < 1e-5
    untrimmed = prepare_without_ray(trimmed / "emodb", run / "others by now")
    for paths in (["/nowhere"], [str(untrimmed)], None):
        tell(run, "data", paths=paths)
        found = predict(run, files, 0, None)
        assert gap(found, stored) > 1e-3
        (notice,) = found.notices
        assert "heard whole" in notice and "--trim-db" in notice


def test_of_corpora_that_were_trimmed_differently_one_must_be_named(trimmed: Path, run: Path) -> None:
    files, stored = heard_in_test(trimmed, run)
    tell(run, "data", trim_db={"emodb": TRIM_DB, "mine": None})
    assert gap(predict(run, files, 0, "emodb"), stored) < 1e-5 < gap(predict(run, files, 0, "mine"), stored)
    differently = r"trimmed differently \(emodb: 30 dB, mine: no\)"
    with pytest.raises(ConfigError, match=rf"{differently}; say which .* with --like CORPUS"):
        predict(run, files, 0, None)
    with pytest.raises(ConfigError, match=rf"{differently}; savee is none of them"):
        predict(run, files, 0, "savee")
    tell(run, "data", trim_db={"emodb": TRIM_DB, "mine": TRIM_DB})
    assert gap(predict(run, files, 0, None), stored) < 1e-5
    with pytest.raises(ConfigError, match="--like emodb: has no effect"):
        predict(run, files, 0, "emodb")


def test_predictions_of_models_whose_folds_leak_are_marked(
    trimmed: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file, *_), _ = heard_in_test(trimmed, run)
    leak = "fold 0: train and test share 1 speakers (03)"
    for leaks in ([], [leak]):
        tell(run, "protocol", leaks=leaks)
        assert main(["predict", str(run), str(file), "--json"]) == 0
        *shown, last = capsys.readouterr().out.splitlines()
        assert [line for line in shown if "LEAK" in line] == [f"LEAK, scores are too high: {leak}." for leak in leaks]
        (told,) = json.loads(last)
        assert told.keys() == {"file", "label", "probabilities", "leaks"} and told["leaks"] == leaks
