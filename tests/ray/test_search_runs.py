"""`sermll search` on a real Ray cluster: complete, nested, killed again and again, shared by many processes."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from prepared import kill_when, tiny_settings
from sklearn.metrics import balanced_accuracy_score

from sermll.config import load_experiment, resolve
from sermll.design import Design
from sermll.errors import ConfigError, TrainingError
from sermll.files import read_json
from sermll.search import Outcome, run_search
from sermll.search_plan import load_search, plan_text
from sermll.study import Taken
from sermll.train import Run

pytestmark = pytest.mark.ray
SPACE = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "losses.focal.weight": {"uniform": [0.1, 2]}}


def write_search(folder: Path, data: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.yaml").write_text(yaml.safe_dump(tiny_settings(data, folder / "runs")))
    path = folder / "x.search.yaml"
    content = {"name": "x", "experiment": "x.yaml", "space": SPACE, "pruner": "none", **keys}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def found(ray_cluster: None, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A search of five trials, one that does not converge and one too large; tracked in MLflow. Read-only."""
    folder = tmp_path_factory.mktemp("search")
    uri = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    overrides = {"tracking.mlflow": uri}
    first = [{"optim.lr": 1e30}, {"model.embedding_dim": 10**12}]
    path = write_search(folder, tiny_data, trials=5, first=first, overrides=overrides)
    return run_search(load_search(path, {})), path


def test_trials_are_measured_on_dev_speakers_that_are_not_tested(found: tuple[Outcome, Path]) -> None:
    outcome, path = found
    (study,) = outcome.found["studies"]
    assert [trial["state"] for trial in study["trials"]] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert "not finite" in study["trials"][1]["note"] or "nan" in study["trials"][1]["note"]
    assert "inner fold 0: out of memory: " in study["trials"][2]["note"]
    experiment = load_search(path, {}).experiment
    tested = set(Design.of(experiment.data, experiment.protocol).folds.folds[0].speakers["test"])
    for trial in (study["trials"][number] for number in (0, 3, 4)):
        heard = [
            pq.read_table(file)
            for file in outcome.folder.glob(f"fold-0/trials/{trial['number']:04d}-*/fold-*/p*.parquet")
        ]
        assert len(heard) == 6 and not tested & {name for table in heard for name in table["speaker"].to_pylist()}
        devs = [
            pq.read_table(file).to_pandas()
            for file in outcome.folder.glob(f"fold-0/trials/{trial['number']:04d}-*/fold-*/predictions_dev.parquet")
        ]
        expected = np.mean([balanced_accuracy_score(dev["label"], dev["predicted"]) for dev in devs])
        assert trial["values"] == [pytest.approx(expected)] and trial["all"]["dev_ua"] == pytest.approx(expected)
        worst = min(
            balanced_accuracy_score(part["label"], part["predicted"])
            for dev in devs
            for _, part in dev.groupby("speaker")
        )
        assert trial["all"]["worst_speaker_ua"] == pytest.approx(worst)
    values = {number: study["trials"][number]["values"][0] for number in (0, 3, 4)}
    assert study["best"] == max(values, key=lambda number: (values[number], -number))
    assert not list(outcome.folder.glob("fold-0/trials/*/fold-*/checkpoints"))


def test_the_test_fold_is_scored_once_by_ordinary_runs(found: tuple[Outcome, Path]) -> None:
    outcome, _ = found
    final, study = outcome.found["final"], outcome.found["studies"][0]
    for row in ("searched", "defaults"):
        (run,) = final["runs"][row]
        frame = pq.read_table(Path(run) / "fold-0" / "predictions.parquet").to_pandas()
        assert final[row]["value"] == pytest.approx(balanced_accuracy_score(frame["label"], frame["predicted"]))
        assert final["utterances"] == len(frame) and final["speakers"] == 1
    assert final["test_reads"] == len({run for runs in final["runs"].values() for run in runs})
    (best,) = outcome.best
    written = load_experiment(best)
    assert written.fold == 0  # all other speakers were seen by trials
    for key, value in study["trials"][study["best"]]["overrides"].items():
        section, name = key.rsplit(".", 1)
        held = written.optim if section == "optim" else written.losses.focal
        assert getattr(held, name) == value
    assert outcome.as_json()["trials"] == 5 and outcome.as_json()["nested_test"] is None


def test_the_same_command_again_trains_nothing_and_another_space_is_refused(found: tuple[Outcome, Path]) -> None:
    outcome, path = found
    again = run_search(load_search(path, {}))
    assert {**again.found, "created": 0} == {**outcome.found, "created": 0}
    with pytest.raises(ConfigError, match="holds another search"):
        run_search(load_search(path, {"optim.epochs": 3}))


def test_mlflow_shows_the_trials_below_the_search(found: tuple[Outcome, Path]) -> None:
    from mlflow import MlflowClient

    outcome, path = found
    assert outcome.not_tracked is None
    client = MlflowClient(tracking_uri=f"sqlite:///{path.parent / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("x")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (top,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert top.info.run_name == "search-x" and len(runs) == 6
    trials = {run.data.tags["sermll.trial"]: run for run in runs if run is not top}
    assert trials["1"].info.status == "FAILED"
    for told in outcome.found["studies"][0]["trials"]:
        run = trials[str(told["number"])]
        assert run.data.params["optim.lr"] == str(told["settings"]["optim.lr"])
        if told["values"]:
            assert run.data.metrics["dev_ua"] == pytest.approx(told["values"][0])


def test_killed_again_and_again_no_trial_is_lost_or_done_twice(
    ray_cluster: None,
    tiny_data: Path,
    tmp_path: Path,
    killable: Callable[[list[str]], subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)  # a cluster that outlives the driver
    path = write_search(tmp_path, tiny_data, trials=3, nested=True, test_folds=[0, 5], inner_folds=1)
    generator = random.Random(0)
    results = tmp_path / "runs" / "search-x"

    def finished() -> int:
        return len(list(results.glob("fold-*/trials/*/fold-*/result.json")))

    for _ in range(5):
        known, wait_s = finished(), generator.uniform(0, 3)
        kill_when(
            killable(["search", str(path)]),
            lambda known=known, wait_s=wait_s: finished() > known and not time.sleep(wait_s),
        )
    last = killable(["search", str(path), "--json"])
    assert last.wait(timeout=300) == 0
    studies = json.loads((results / "search.json").read_text())["studies"]
    for study in studies:
        assert [trial["number"] for trial in study["trials"]] == [0, 1, 2]
        assert {trial["state"] for trial in study["trials"]} == {"COMPLETE"}
        assert len({json.dumps(trial["overrides"]) for trial in study["trials"]}) == 3
    trained = Counter(place.parent.name for place in results.glob("fold-*/trials/*/fold-*"))
    assert sum(trained.values()) == 2 * 3  # a folder for each: none was begun under two names
    final = read_json(results / "search.json")["final"]
    frames = []
    for study in studies:
        (fold,) = study["test_folds"]
        overrides = study["trials"][study["best"]]["overrides"]
        settings = [Path(run) for run in final["runs"]["searched"]]
        (run,) = [
            run
            for run in settings
            if (run / f"fold-{fold}").is_dir() and all(_setting(run, key) == value for key, value in overrides.items())
        ]
        frames.append(pq.read_table(run / f"fold-{fold}" / "predictions.parquet").to_pandas())
    each = [balanced_accuracy_score(frame["label"], frame["predicted"]) for frame in frames]
    assert final["searched"]["value"] == pytest.approx(np.mean(each)) and final["speakers"] == 2


def _setting(run: Path, key: str) -> Any:
    value = yaml.safe_load((run / "config.yaml").read_text())
    for part in key.split("."):
        value = value[part]
    return value


def test_faults_of_the_storage_end_a_search_which_goes_on_and_a_failing_final_run_hides_nothing(
    ray_cluster: None, tiny_data: Path, tmp_path: Path
) -> None:
    first = [{"optim.lr": 0.005}, {"optim.lr": 0.006}, {"optim.lr": 1e-9}]
    overrides = {"resources.parallel_folds": 1, "optim.lr": 0.01}
    space = {"losses.focal.weight": SPACE["losses.focal.weight"]}
    path = write_search(tmp_path, tiny_data, trials=4, first=first, overrides=overrides, space=space, pruner="asha")
    search = load_search(path, {})
    folders = [
        Path(search.jobs(search.studies[0], Taken(number, one))[0].folder) for number, one in enumerate([{}, *first])
    ]
    defaults = Run.of(resolve(search.tree, {"seed": 0, "fold": 0}), search.designs, "").folder / "fold-0"
    for blocked in (folders[1] / "checkpoints", folders[2], defaults / "checkpoints"):
        blocked.parent.mkdir(parents=True)
        blocked.touch()
    with pytest.raises(TrainingError, match=r"trial 1, inner fold 0: .*make room(.|\n)*goes on from here"):
        run_search(search)
    (folders[1] / "checkpoints").unlink()

    with pytest.raises(TrainingError, match=r"defaults fold 0: (.|\n)*page: "):
        run_search(search)
    kept = read_json(search.folder / "search.json")
    (study,) = kept["studies"]
    assert kept["final"] is None and (search.folder / "report" / "index.html").is_file()
    states = {trial["number"]: trial["state"] for trial in study["trials"]}
    assert states[0] == "COMPLETE" and states[2] == "FAIL" and states[1] in ("COMPLETE", "PRUNED")
    assert "File exists" in study["trials"][2]["note"]
    assert states[3] == "PRUNED" and len(study["trials"][3]["intermediate"]) < 4
    assert not list(search.folder.glob("fold-0/trials/*/fold-*/checkpoints"))

    (defaults / "checkpoints").unlink()
    outcome = run_search(search)
    assert [look["trials"] for look in outcome.found["final"]["looks"]] == [4]
    assert not list(search.folder.glob("fold-0/.tune-*"))


def test_two_drivers_search_at_once_for_several_objectives(
    ray_cluster: None,
    tiny_data: Path,
    tmp_path: Path,
    killable: Callable[[list[str]], subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    objectives = ["dev_ua", "worst_speaker_ua", "ece", "seconds"]
    path = write_search(tmp_path, tiny_data, trials=4, objectives=objectives, inner_folds=1)
    drivers = [killable(["search", str(path)]) for _ in range(2)]
    assert [driver.wait(timeout=300) for driver in drivers] == [0, 0]
    found = read_json(tmp_path / "runs" / "search-x" / "search.json")
    (study,) = found["studies"]
    assert [(trial["number"], trial["state"]) for trial in study["trials"]] == [
        (number, "COMPLETE") for number in range(4)
    ]
    for trial in study["trials"]:
        assert trial["values"] == [trial["all"][name] for name in objectives]
        (result,) = (tmp_path / "runs" / "search-x").glob(f"fold-0/trials/{trial['number']:04d}-*/fold-*/result.json")
        assert trial["values"][3] == read_json(result)["seconds"] > 0
    assert study["best"] in study["pareto"] and len(found["final"]["looks"]) == 1


SHARE = """
import os, sys
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from mlflow import MlflowClient
from sermll.study import Rules, Study

def work():
    client = MlflowClient(tracking_uri=sys.argv[2])
    here = client.get_experiment_by_name("x").experiment_id
    with Study(Path(sys.argv[1]), "x", None, Rules("tpe", "median", ("maximize",), 0, 1)) as study:
        while taken := study.take(64, lambda trial: {"x": trial.suggest_float("x", 0, 1)}):
            study.report(taken.number, 1, taken.overrides["x"])
            study.tell(taken.number, [taken.overrides["x"]], "", {})
            run = client.create_run(here, tags={"trial": str(taken.number)})
            client.log_metric(run.info.run_id, "x", taken.overrides["x"])

children = []
for _ in range(16):  # forked, so that the imports are paid for once
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_sixteen_processes_share_one_study_and_one_mlflow_store(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from sermll.study import Rules, Study

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("x", artifact_location=str(tmp_path))
    told = subprocess.run(
        [sys.executable, "-c", SHARE, str(tmp_path), uri], capture_output=True, text=True, timeout=300, check=False
    )
    assert told.returncode == 0, told.stderr
    with Study(tmp_path, "x", None, Rules("tpe", "median", ("maximize",), 0, 1)) as study:
        values = {trial.number: trial.values for trial in study.trials() if trial.state.name == "COMPLETE"}
        drivers = {trial.user_attrs["driver"] for trial in study.trials()}
    logged = {int(run.data.tags["trial"]): [run.data.metrics["x"]] for run in client.search_runs([experiment])}
    assert sorted(values) == list(range(64)) and logged == values and len(drivers) > 8


def test_trials_train_on_a_feature_bank_of_a_frozen_encoder(ray_cluster: None, tiny_data: Path, tmp_path: Path) -> None:
    from transformers import WavLMConfig, WavLMModel

    tiny = WavLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    WavLMModel(tiny).save_pretrained(tmp_path / "encoder")
    encoder = {"kind": "pretrained", "name": str(tmp_path / "encoder"), "tune": "none"}
    frozen = {f"model.encoder.{key}": value for key, value in encoder.items()}
    space = {**SPACE, "mixup.snr_db": {"range": [-10, 10]}}
    path = write_search(tmp_path, tiny_data, space=space, overrides=frozen, bank_mixes=2, trials=2, test=False)
    search = load_search(path, {})
    told = re.search(r"feature bank: ([\d.]+) MB, 2 mix", plan_text(search))
    outcome = run_search(search)
    (study,) = outcome.found["studies"]
    assert {trial["state"] for trial in study["trials"]} == {"COMPLETE"} and outcome.found["final"] is None
    (facts,) = (tmp_path / "runs" / "feature-banks").glob("*/bank.json")
    assert read_json(facts)["snr_db"] == [-10, 10] and read_json(facts)["mixes"] == 2
    size = sum(file.stat().st_size for file in facts.parent.rglob("*") if file.is_file())
    assert told and float(told[1]) == pytest.approx(size / 1e6, abs=0.1 + 0.05 * size / 1e6)
    heard = set(read_json(facts)["trained"])
    design = Design.of(load_search(path, {}).experiment.data, load_search(path, {}).experiment.protocol)
    assert heard == set(range(140)) - set(design.folds.folds[0].rows["test"].tolist())
