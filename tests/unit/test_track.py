"""What MLflow is sent again because an answer was lost; who is not asked again; passwords. SQLite is the server."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import change, with_models, write_campaign, write_run

from sermll import track
from sermll.config import without_password
from sermll.errors import DataError
from sermll.files import read_json, write_json
from sermll.storage import locked
from sermll.track import Tracker, upload


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One file for all: its tables take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "LAST_TRIES_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("lost", ["create_experiment", "create_run", "log_batch", "log_inputs", "log_artifact"])
def test_an_answer_that_was_lost_makes_nothing_twice(
    lost: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    settings = {"tracking.experiment": f"lost {lost}"}
    run = with_models(write_run(tmp_path / "demo-x", groups=(("a", "b"),), epochs=3, overrides=settings))
    asked = 0

    def unheard(self: MlflowClient, *words: Any, **named: Any) -> Any:
        nonlocal asked
        asked += 1
        answer = does(self, *words, **named)
        if asked in (1, 3):
            raise ConnectionError("the line was cut")
        return answer

    does = getattr(MlflowClient, lost)
    monkeypatch.setattr(MlflowClient, lost, unheard)
    for _ in range(2):  # again: nothing is new
        assert upload(run, uri) is None
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(f"lost {lost}")
    assert experiment is not None and asked
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"demo-x", "fold-0"} and len(client.search_runs([experiment.experiment_id])) == 2
    history = client.get_metric_history(runs["fold-0"].info.run_id, "dev_ua")
    assert sorted(metric.step for metric in history) == [1, 2, 3]
    for name, metric in (("demo-x", "test_ua"), ("fold-0", "test_ua")):
        assert len(client.get_metric_history(runs[name].info.run_id, metric)) == 1
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_fold_that_was_trained_anew_is_a_new_run_and_the_scores_follow(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings = {"groups": (("a", "b"), ("c", "d")), "epochs": 4, "overrides": {"tracking.experiment": "anew"}}
    run = with_models(write_run(tmp_path / "demo-x", skill=0.9, **settings))
    assert upload(run, uri) is None
    other = with_models(write_run(tmp_path / "other" / "demo-x", skill=0.4, seed=1, **settings))
    shutil.rmtree(run / "fold-1")
    shutil.copytree(other / "fold-1", run / "fold-1")
    change(run / "fold-1" / "result.json", seconds=91.0)
    told = read_json(other / "metrics.json")
    told["folds"][0] = read_json(run / "metrics.json")["folds"][0]
    write_json(run / "metrics.json", told)
    for _ in range(2):  # again: nothing is new
        assert upload(run, uri) is None
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("anew")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in found) == ["demo-x", "fold-0", "fold-1", "fold-1"]
    old, new = sorted(
        (run for run in found if run.info.run_name == "fold-1"),
        key=lambda run: "sermll.trained_anew" not in run.data.tags,
    )
    assert "sermll.trained_anew" not in new.data.tags
    assert old.data.metrics["test_ua"] != new.data.metrics["test_ua"] == told["folds"][1]["ua"]
    parent = next(run for run in found if run.info.run_name == "demo-x")
    assert parent.data.metrics["test_ua"] == told["selected"]["ua"]["value"]
    assert {run.data.tags["mlflow.parentRunId"] for run in (old, new)} == {parent.info.run_id}
    assert len(client.get_metric_history(parent.info.run_id, "test_ua")) == 2


def test_each_server_is_remembered_by_itself(uri: str, tmp_path: Path) -> None:
    run = with_models(write_run(tmp_path / "demo-x", groups=(("a", "b"),), epochs=2))
    assert upload(run, uri) is None
    held = read_json(run / "mlflow.json")
    assert upload(run, "http://127.0.0.1:9") is not None
    assert upload(run, uri) is None
    assert held.keys() == {uri} and read_json(run / "mlflow.json")[uri] == held[uri]


def test_a_server_that_is_gone_is_not_asked_for_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {"seed": [str(seed) for seed in range(6)]}
    campaign = write_campaign(tmp_path / "runs", axes, lambda _: {"groups": (("a", "b"),), "epochs": 2})
    for run in (tmp_path / "runs").glob("demo-*"):
        with_models(run)
    asked = 0

    def ask(server: Any) -> None:
        nonlocal asked
        asked += 1
        raise ConnectionError("nobody there")

    monkeypatch.setattr(track._Server, "client", ask)
    assert upload(campaign, "http://127.0.0.1:9") == "ConnectionError: nobody there"
    assert asked == 3


def test_a_run_shows_under_the_last_campaign_with_its_axes_beside_the_facts(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    deletes, deleted = MlflowClient.delete_tag, []

    def unheard(self: MlflowClient, run: str, key: str) -> None:
        deletes(self, run, key)
        deleted.append(key)
        if len(deleted) == 1:
            raise ConnectionError("the line was cut")

    monkeypatch.setattr(MlflowClient, "delete_tag", unheard)

    def found() -> dict[str, Any]:
        experiment = client.get_experiment_by_name("shared")
        assert experiment is not None
        return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}

    client = MlflowClient(tracking_uri=uri)
    settings = {"groups": (("a", "b"),), "epochs": 2, "overrides": {"tracking.experiment": "shared"}}
    first = write_campaign(tmp_path / "runs", {"corpus": ("mine",), "speed": ("slow",)}, lambda _: settings)
    run = with_models(tmp_path / "runs" / "demo-000000000000")
    assert upload(run, uri) is None  # by itself: it has no axes
    assert not [key for key in found()[run.name].data.tags if key.startswith("sermll.axis.")]
    other = first.rename(tmp_path / "runs" / "campaign-first")
    for campaign, axes in ((other, {"corpus": "mine", "speed": "slow"}), (first, {"corpus": "yours", "protocol": "p"})):
        campaign.mkdir(exist_ok=True)
        told = read_json(other / "campaign.json")
        told["cells"][0]["labels"] = axes
        write_json(campaign / "campaign.json", told)
        (campaign / "report").mkdir(exist_ok=True)
        assert upload(campaign, uri) is None
        runs = found()
        for name in (run.name, "fold-0"):
            tags = runs[name].data.tags
            assert {key[12:]: tags[key] for key in tags if key.startswith("sermll.axis.")} == axes
            assert (tags["sermll.corpus"], tags["sermll.protocol"]) == ("synthetic", "pairs")
        assert runs[run.name].data.tags["mlflow.parentRunId"] == runs[campaign.name].info.run_id
        assert runs["fold-0"].data.tags["mlflow.parentRunId"] == runs[run.name].info.run_id
    assert deleted == ["sermll.axis.speed"] * 2  # of the run, whose second was no longer there, and of its fold
    assert upload(run, uri) is None  # and it stays there
    assert found()[run.name].data.tags["sermll.axis.corpus"] == "yours"


def test_while_training_a_folder_that_another_sends_is_left_and_a_fault_rests(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sermll.results import read_model_settings

    monkeypatch.setattr(track, "SYNC_S", 0.0)
    monkeypatch.setattr(track, "RETRY_S", 0.3)
    run = write_run(tmp_path / "demo-x", groups=(("a", "b"),), epochs=2, overrides={"tracking.mlflow": uri})
    tracker = Tracker.of(read_model_settings(run), run)
    with locked(run / ".mlflow.lock"):
        tracker.sync()
    tracker.sync()  # too soon
    assert not (run / "mlflow.json").exists()
    time.sleep(0.4)
    tracker.sync()
    assert read_json(run / "mlflow.json")[uri]["runs"]["fold-0"]["epochs"] == 2
    away, back = capsys.readouterr().err.splitlines()
    assert "does not take what is new" in away and back.endswith("answers again")


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.json; give the folder of a finished"):
        upload(tmp_path, None)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:s3cret@h:5000/x", "http://***@h:5000/x"),
        ("postgresql://me:s3@cret@h/x", "postgresql://***@h/x"),
        ("postgresql://me:s3/cret@h/x", "postgresql://***@h/x"),
        ("postgresql:///x?host=/tmp&password=s3cret&user=me", "postgresql:///x?host=/tmp&password=***&user=me"),
        ("postgresql+psycopg2://me@h/x", "postgresql+psycopg2://me@h/x"),
        ("at http://h:5000/x and http://me:s3cret@h", "at http://h:5000/x and http://***@h"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_server_leaves_no_process_behind(tmp_path: Path, told: signal.Signals) -> None:
    server = tmp_path / "server"
    server.write_text(f"#!/bin/sh\ncd {tmp_path}\nsleep 1000 &\necho $! > partial\nmv partial pid\nwait\n")
    server.chmod(0o755)
    script = (  # what is started in the background has SIGINT ignored
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from sermll.track import serve\nsys.executable = {str(server)!r}\n"
        "sys.exit(serve('sqlite:///x', 1))"
    )
    shown = subprocess.Popen([sys.executable, "-c", script])
    pid = tmp_path / "pid"
    while not pid.exists():
        assert shown.poll() is None
        time.sleep(0.05)
    shown.send_signal(told)
    assert shown.wait(20) == (0 if told == signal.SIGINT else 128 + signal.SIGTERM)
    child = int(pid.read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
