"""An MLflow server on PostgreSQL: many who send at once, a server that goes away, passwords; studies beside it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import until
from runs import with_models, write_campaign, write_run
from servers import PASSWORD, Mariadb, Mlflow, Postgres, database, mariadb, postgres
from sqlalchemy import create_engine, text

from sermll.config import Experiment, to_yaml, without_password
from sermll.files import read_json

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parents[2]
EPOCHS = 5


@pytest.fixture(scope="module")
def base() -> Iterator[Postgres]:
    """A PostgreSQL of our own."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="module")
def maria() -> Iterator[Mariadb]:
    """A MariaDB of our own."""
    with mariadb() as server:
        yield server


@pytest.fixture(scope="module", params=["postgresql", "mariadb"])
def new_database(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Makes an empty database; returns its URL."""
    if request.param == "postgresql":
        server = request.getfixturevalue("base")
        return lambda name: database(server, name)
    other = request.getfixturevalue("maria")

    def make(name: str) -> str:
        other.ask(f"CREATE DATABASE {name}")
        return other.url(name)

    return make


@pytest.fixture(scope="module")
def mlflow(base: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    """An MLflow server on it."""
    folder = tmp_path_factory.mktemp("mlflow")
    server = Mlflow(database(base, "mlflow"), folder / "artifacts", folder / "log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def finished(folder: Path, **settings: Any) -> Path:
    """A finished run with the files that are sent."""
    return with_models(write_run(folder, epochs=EPOCHS, **settings))


def everything(server: Mlflow, name: str) -> dict[tuple[str, str], Any]:
    """The runs of an experiment by their names and those of the runs above."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    names = {run.info.run_id: str(run.info.run_name) for run in runs}
    above = {run.info.run_id: names.get(run.data.tags.get("mlflow.parentRunId") or "", "") for run in runs}
    found = {(above[run.info.run_id], names[run.info.run_id]): run for run in runs}
    assert len(found) == len(runs)
    return found


def epochs_of(server: Mlflow, run: Any) -> list[int]:
    """At which steps MLflow has a dev UA; one that is there twice is told twice."""
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=server.uri).get_metric_history(run.info.run_id, "dev_ua")
    return sorted(metric.step for metric in history)


def sermll(*words: object, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sermll", *map(str, words)]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=500)


SEND = """
import sys, time
from pathlib import Path
from sermll.track import upload
from mlflow import MlflowClient  # what takes long comes before all begin at once
time.sleep(max(0, float(sys.argv[2]) - time.time()))
faults = [upload(Path(folder), sys.argv[1]) for folder in sys.argv[3:]]
sys.exit("\\n".join(fault for fault in faults if fault) or None)
"""


def test_eight_commands_send_at_once_into_a_new_experiment(mlflow: Mlflow, tmp_path: Path) -> None:
    own = [[finished(tmp_path / f"demo-{sender}-{run}", seed=run) for run in range(2)] for sender in range(8)]
    shared = finished(tmp_path / "demo-shared")
    at = time.time() + 15
    senders = [
        subprocess.Popen(
            [sys.executable, "-c", SEND, mlflow.uri, str(at), *map(str, [shared, *runs])],
            stderr=subprocess.PIPE,
            text=True,
        )
        for runs in own
    ]
    told = [sender.communicate(timeout=400)[1] for sender in senders]
    assert [sender.returncode for sender in senders] == [0] * 8, told
    found = everything(mlflow, "demo")
    every = [shared, *(run for runs in own for run in runs)]
    assert found.keys() == {("", run.name) for run in every} | {
        (run.name, f"fold-{fold}") for run in every for fold in range(3)
    }
    for run in every:
        parent = found["", run.name]
        assert parent.info.status == "FINISHED"
        assert parent.data.metrics["test_ua"] == pytest.approx(
            read_json(run / "metrics.json")["selected"]["ua"]["value"]
        )
        for fold in range(3):
            child = found[run.name, f"fold-{fold}"]
            assert child.info.status == "FINISHED" and epochs_of(mlflow, child) == list(range(1, EPOCHS + 1))
            (kept,) = mlflow.artifacts.glob(f"*/{child.info.run_id}/artifacts/model/model.safetensors")
            assert kept.read_bytes() == (run / f"fold-{fold}" / "checkpoints/epoch-3/model.safetensors").read_bytes()


def test_a_campaign_is_sent_again_as_a_whole(mlflow: Mlflow, tmp_path: Path) -> None:
    settings = {"name": "whole", "tracking.experiment": "whole"}
    axes = {"variant": ("one", "two"), "seed": ("0", "1")}
    campaign = write_campaign(tmp_path / "runs", axes, lambda _: {"epochs": EPOCHS, "overrides": settings})
    for run in (tmp_path / "runs").glob("demo-*"):
        with_models(run)
    (campaign / "report").mkdir()
    (campaign / "report" / "index.html").write_text("a page")
    for _ in range(2):  # again: nothing twice
        done = sermll("track", campaign, "--uri", mlflow.uri)
        assert done.returncode == 0, done.stderr
    found = everything(mlflow, "whole")
    cells = [f"demo-{number:012d}" for number in range(4)]
    assert found.keys() == {("", campaign.name)} | {(campaign.name, cell) for cell in cells} | {
        (cell, f"fold-{fold}") for cell in cells for fold in range(3)
    }
    assert found[campaign.name, cells[1]].data.tags["sermll.axis.variant"] == "one"
    top = found["", campaign.name]
    assert top.data.metrics == {"cells": 4, "folds": 12, "folds_finished": 12}
    assert list(mlflow.artifacts.glob(f"*/{top.info.run_id}/artifacts/report/index.html"))


def test_the_server_dies_in_the_middle_of_a_run_and_comes_back(
    ray_cluster: None, mlflow: Mlflow, settings: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sermll import track
    from sermll.train import train

    monkeypatch.setattr(track, "RETRY_S", 5.0)
    monkeypatch.setattr(track, "SYNC_S", 1.0)
    epochs = 300  # the server takes many of them to come back
    experiment = settings(
        "fold=0", f"optim.epochs={epochs}", f"tracking.mlflow={mlflow.uri}", "tracking.experiment=dies"
    )
    outcome: list[Any] = []
    training = threading.Thread(target=lambda: outcome.append(train(experiment)))
    training.start()
    runs = Path(experiment.tracking.runs)

    def trained() -> int:
        return max([len(read_json(path)) for path in runs.glob("*/fold-0/history.json")], default=0)

    def known() -> int:
        kept = [read_json(path) for path in runs.glob("*/mlflow.json")]
        return max([run["epochs"] for one in kept for run in next(iter(one.values()))["runs"].values()], default=0)

    until(lambda: known() >= 3, 120)
    mlflow.kill()
    at_death = trained()
    until(lambda: trained() >= at_death + 10, 120)  # it goes on
    had = known()
    assert had <= at_death + 1 and training.is_alive()
    mlflow.start()
    until(lambda: known() > had or not training.is_alive(), 120)
    training.join(300)
    assert outcome and outcome[0].not_tracked is None
    found = everything(mlflow, "dies")
    assert len(found) == 2
    (child,) = [run for (_, name), run in found.items() if name == "fold-0"]
    assert epochs_of(mlflow, child) == list(range(1, epochs + 1))
    assert child.info.status == "FINISHED" and "test_ua" in child.data.metrics


def test_the_server_stays_away_and_track_sends_the_run_later(
    mlflow: Mlflow, settings: Callable[..., Experiment], tmp_path: Path
) -> None:
    experiment = settings("fold=0", "optim.epochs=12", "tracking.mlflow=null", "tracking.experiment=away")
    (tmp_path / "x.yaml").write_text(to_yaml(experiment))
    uri = mlflow.uri.replace("://", f"://me:{PASSWORD}@")
    command = [sys.executable, "-m", "sermll", "train", str(tmp_path / "x.yaml")]
    run = subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until(lambda: list(tmp_path.glob("runs/*/mlflow.json")), 120)
    mlflow.kill()
    printed = run.communicate(timeout=400)[0]
    assert run.returncode == 0, printed
    (folder,) = tmp_path.glob("runs/tiny-*")
    assert "MLflow does not have everything" in printed and f"next: sermll track {folder}" in printed
    failed = sermll("track", folder, MLFLOW_TRACKING_URI=uri)
    assert failed.returncode == 1 and "MLflow did not take the results" in failed.stderr
    mlflow.start()
    sent = sermll("track", folder, MLFLOW_TRACKING_URI=uri)
    assert sent.returncode == 0, sent.stderr
    found = everything(mlflow, "away")
    assert len(found) == 2
    assert epochs_of(mlflow, found[folder.name, "fold-0"]) == list(range(1, 13))
    told = printed + failed.stdout + failed.stderr + sent.stdout + sent.stderr
    assert PASSWORD not in told + mlflow.log.read_text()
    assert not holding(PASSWORD, tmp_path / "runs", mlflow.artifacts)
    assert not any(PASSWORD in str(run.to_dictionary()) for run in found.values())


def holding(secret: str, *folders: Path) -> list[Path]:
    """The files in which a secret stands."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if secret.encode() in path.read_bytes()]


STUDY = """
import os, sys, time
from pathlib import Path
import optuna.storages
from sermll import study
from sermll.study import Rules, Study

study.BEAT_S, study.SILENT_S = 0.5, 5.0

def work(machine):
    folder = Path(sys.argv[1], str(machine))  # drivers that share a server and no folder
    with Study(folder, "x", sys.argv[2], Rules("tpe", "median", ("maximize",), 0, 1)) as study:
        study.begin([({}, {})])
        choose = lambda trial: {"x": trial.suggest_float("x", 0, 1)}
        while (taken := study.take(64, choose)) or study.of_others():
            if taken is None:
                time.sleep(0.5)
                continue
            study.report(taken.number, 1, taken.overrides.get("x", 0.5))
            if taken.number % 16 == 7 and not Path(sys.argv[1], f"died-{taken.number}").exists():
                Path(sys.argv[1], f"died-{taken.number}").touch()
                os._exit(0)  # a driver that dies, and leaves a trial to the others
            study.tell(taken.number, [taken.overrides.get("x", 0.5)], "", {})

children = []
for machine in range(8):
    child = os.fork()
    if child == 0:
        try:
            work(machine)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_eight_processes_share_one_study_on_a_server(new_database: Callable[[str], str], tmp_path: Path) -> None:
    from sermll.study import Rules, Study

    url = new_database("study")
    told = subprocess.run(
        [sys.executable, "-c", STUDY, str(tmp_path), url], capture_output=True, text=True, timeout=400, check=False
    )
    assert told.returncode == 0, told.stderr
    with Study(tmp_path, "x", url, Rules("tpe", "median", ("maximize",), 0, 1)) as study:
        trials = study.trials()
        assert study.url == without_password(url) and PASSWORD not in study.url
    assert [trial.number for trial in trials] == list(range(64))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert [trial.values for trial in trials[1:]] == [[trial.params["x"]] for trial in trials[1:]]
    assert len(list(tmp_path.glob("died-*"))) == 4 and len({trial.user_attrs["driver"] for trial in trials}) > 4
    assert not holding(PASSWORD, tmp_path)


OPENING = """
import sys
from pathlib import Path
from sermll.study import Rules, Study

Study(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Rules("tpe", "median", ("maximize",), 0, 1)).begin([({}, {})])
"""


def test_studies_that_open_a_new_database_at_once_make_its_tables_once(
    new_database: Callable[[str], str], tmp_path: Path
) -> None:
    url = new_database("tables")
    command = [sys.executable, "-c", OPENING]
    others = [
        subprocess.Popen([*command, str(tmp_path / name), name, url], stderr=subprocess.PIPE, text=True)
        for name in "abcd"
    ]
    told = [other.communicate(timeout=100)[1] for other in others]
    assert [other.returncode for other in others] == [0] * 4, told


def test_who_waits_for_a_study_is_told_by_whom_it_is_held(
    new_database: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from sermll import storage
    from sermll.study import Rules, Study

    monkeypatch.setattr(storage, "QUIET_S", 0.2)
    url = new_database("waiting")
    rules = Rules("tpe", "median", ("maximize",), 0, 1)
    with Study(tmp_path / "a", "x", url, rules) as one, Study(tmp_path / "b", "x", url, rules) as other:
        with one._alone():
            waiting = threading.Thread(target=other.take, args=(1, lambda trial: {}))
            waiting.start()
            time.sleep(2)
            assert waiting.is_alive() and not other.trials()
        waiting.join(20)
        assert [trial.number for trial in other.trials()] == [0]
    (told,) = capfd.readouterr().err.splitlines()
    who = f"process {os.getpid()} on {os.uname().nodename}" if url.startswith("postgresql") else "a process at "
    assert told.startswith(f"waiting for study x in {without_password(url)}: held by {who}"), told


def test_a_server_that_was_started_again_between_two_questions_is_not_noticed(base: Postgres, tmp_path: Path) -> None:
    from sermll.study import Rules, Study

    url = database(base, "again")
    with Study(tmp_path, "x", url, Rules("tpe", "median", ("maximize",), 0, 1)) as study:
        assert not study.trials()
        with create_engine(base.url()).connect() as connection:
            ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = 'again'"
            assert connection.scalar(text(ended))
        taken = study.take(1, lambda trial: {})
        assert taken and taken.number == 0


def test_a_search_on_postgresql_keeps_its_password_to_itself(base: Postgres, tiny_data: Path, tmp_path: Path) -> None:
    from prepared import tiny_settings

    tree = tiny_settings(tiny_data, tmp_path / "runs")
    tree["optim"]["epochs"] = 1
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    file = {"name": "s", "experiment": "x.yaml", "trials": 2, "space": {"mixup.snr_db": {"range": [-10, 10]}}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(file | {"inner_folds": 1}))
    url = database(base, "search")
    planned = sermll("search", tmp_path / "s.yaml", f"storage={url}", "--dry-run")
    assert planned.returncode == 0 and "next: sermll search" in planned.stdout, planned.stderr
    done = sermll("search", tmp_path / "s.yaml", f"storage={url}")
    assert done.returncode == 0, done.stderr
    refused = sermll("search", tmp_path / "s.yaml", f"storage={url.replace(PASSWORD, 'wr0ng')}")
    assert refused.returncode == 1 and "cannot be opened" in refused.stderr
    told = "".join(one.stdout + one.stderr for one in (planned, done, refused))
    assert PASSWORD not in told and "wr0ng" not in told
    assert read_json(tmp_path / "runs" / "search-s" / "search.json")["studies"][0]["storage"].endswith("/search")
    assert not holding(PASSWORD, tmp_path / "runs")
