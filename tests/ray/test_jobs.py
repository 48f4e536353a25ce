"""Jobs on a cluster of several nodes: sent, followed, stopped, sent twice, and outliving a node."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from machines import RAY, Machines, machines, until
from prepared import recordings, tiny_settings
from ray.util import get_node_ip_address

from sermll import storage

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parents[2]
Sermll = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    """A head and two nodes."""
    with machines(2, 2) as found:
        yield found


@pytest.fixture
def project(tiny_data: Path, tmp_path: Path) -> Path:
    """A folder with an experiment whose data and runs are relative; the cluster has the data in tmp_path / "shared"."""
    shared = tmp_path / "shared"
    (shared / "data").mkdir(parents=True)
    (shared / "data" / "tiny").symlink_to(tiny_data)
    (tmp_path / "project").mkdir()
    tree = tiny_settings(Path("data/tiny"), Path("runs")) | {"fold": 0, "resources": {"max_failures": 3}}
    (tmp_path / "project" / "x.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "project"


def sermll(project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sermll", *words]
    environment = {**os.environ, "PYTHONPATH": str(HERE), **variables}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=500)


def submit(cluster: Machines, project: Path, *words: str) -> list[str]:
    return ["submit", "--address", cluster.address, "--root", str(project.parent / "shared"), *words]


def test_a_job_trains_what_a_laptop_trains(cluster: Machines, project: Path, tmp_path: Path) -> None:
    done = sermll(project, *submit(cluster, project, "--follow", "--json", "--", "train", "x.yaml", "--json"))
    assert done.returncode == 0, done.stdout + done.stderr
    *_, told, last = done.stdout.strip().splitlines()
    job, run = json.loads(last), Path(json.loads(told)["run_dir"])
    assert job["status"] == "SUCCEEDED" and job["exit_code"] == 0
    assert run.parent == tmp_path / "shared" / "runs" and not (project / "runs").exists()
    assert json.loads((run / "run.json").read_text())["code"]["commit"] == _head()
    local = sermll(project, "train", "x.yaml", f"data.path={tmp_path}/shared/data/tiny", RAY_ADDRESS="")
    assert local.returncode == 0, local.stderr
    (other,) = (project / "runs").glob("tiny-*")
    assert other.name == run.name
    assert pq.read_table(other / "predictions.parquet").equals(pq.read_table(run / "predictions.parquet"))
    listed = sermll(project, "jobs", "list", "--address", cluster.address)
    assert f"{job['job']} " in listed.stdout and "sermll train x.yaml --json" in listed.stdout
    logs = sermll(project, "jobs", "logs", job["job"], "--address", cluster.address)
    assert told in logs.stdout


def test_a_job_that_fails_says_so_with_its_exit_status(cluster: Machines, project: Path) -> None:
    done = sermll(project, *submit(cluster, project, "--follow", "--", "train", "x.yaml", "data.path=data/none"))
    assert done.returncode == 1
    assert f"{project.parent}/shared/data/none: no such folder" in done.stdout and "failed" in done.stderr
    missing = sermll(project, "jobs", "logs", "none-such", "--address", cluster.address)
    assert missing.returncode == 1 and "has no job none-such" in missing.stderr
    nobody = {"RAY_AUTH_TOKEN": "", "HOME": str(project)}
    for token in ({"RAY_AUTH_TOKEN": "0" * 64}, nobody):
        stranger = sermll(project, "jobs", "--address", cluster.address, **token)
        assert stranger.returncode == 1 and "does not accept this machine's token" in stranger.stderr, stranger.stderr
        assert stranger.stderr.count("\n") == 1


def test_rays_own_submission_needs_to_know_where_runs_lie(cluster: Machines, project: Path) -> None:
    def plain(*words: str) -> subprocess.CompletedProcess:
        command = [str(RAY), "job", "submit", "--address", cluster.address, "--working-dir", ".", *words]
        command += ["--", "python", "-m", "sermll", "train", "x.yaml", "optim.epochs=1"]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=500)

    refused = plain()
    assert refused.returncode == 1 and "Ray deletes with this job; set SERMLL_ROOT" in refused.stdout, refused.stdout
    shared = project.parent / "shared"
    done = plain("--runtime-env-json", json.dumps({"env_vars": {storage.ROOT: str(shared)}}))
    assert done.returncode == 0, done.stdout
    assert list(shared.glob("runs/tiny-*/metrics.json"))


def test_sent_twice_the_second_is_refused_and_a_stopped_one_goes_on(cluster: Machines, project: Path) -> None:
    long = ("--json", "--", "train", "x.yaml", "optim.epochs=2000")
    runs = project.parent / "shared" / "runs"

    def begun() -> str:
        return json.loads(sermll(project, *submit(cluster, project, *long)).stdout.splitlines()[-1])["job"]

    def epochs() -> int:
        return sum(len(json.loads(path.read_text())) for path in runs.glob("tiny-*/fold-0/history.json"))

    def stop(job: str) -> str:
        done = sermll(project, "jobs", "stop", job, "--json", "--address", cluster.address)
        return json.loads(done.stdout)["status"]

    first = begun()
    until(epochs, 90)
    second = sermll(project, *submit(cluster, project, "--follow", *long))
    assert second.returncode == 1 and "another command is training this fold (process " in second.stdout
    assert stop(first) == "STOPPED"
    known = epochs()
    assert 0 < known < 2000
    third = begun()
    until(lambda: epochs() > known, 90)
    assert stop(third) == "STOPPED"
    (history,) = runs.glob("tiny-*/fold-0/history.json")
    assert [row["epoch"] for row in json.loads(history.read_text())] == list(range(epochs()))


def test_a_node_vanishes_in_the_middle_and_nothing_changes(cluster: Machines, project: Path) -> None:
    lose_a_node(cluster, project, "train", "x.yaml", "optim.epochs=5", "fold=null", "resources.parallel_folds=2")


def test_ravdess_survives_the_end_of_a_node(project: Path) -> None:
    (project / "x.yaml").write_text((HERE / "experiments" / "ravdess.yaml").read_text())
    smaller = ("model.encoder.channels=8", "model.encoder.dim=64", "optim.epochs=3", "name=tiny")
    with machines(2, 2) as found:
        prepare = ("prepare", "ravdess", "--root", str(recordings("ravdess")), "--out", "data/ravdess")
        prepared = sermll(project, *submit(found, project, "--follow", "--", *prepare))
        assert prepared.returncode == 0, prepared.stdout
        lose_a_node(found, project, "train", "x.yaml", "resources.parallel_folds=2", *smaller)


def lose_a_node(cluster: Machines, project: Path, *words: str) -> None:
    """Submit a command twice, the second time with a node ended in epoch 2: the results must be the same."""
    words = ("--follow", "--", *words)
    shared = project.parent / "shared"
    undisturbed = sermll(project, *submit(cluster, project, *words, f"tracking.runs={shared}/calm"))
    assert undisturbed.returncode == 0, undisturbed.stdout
    (calm,) = (shared / "calm").glob("tiny-*")
    command = [sys.executable, "-m", "sermll", *submit(cluster, project, *words)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    disturbed = subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)

    def second_epoch() -> bool:
        found = shared.glob("runs/tiny-*/fold-*/history.json")
        epochs = [len(json.loads(path.read_text())) for path in found if not path.with_name("result.json").exists()]
        return len(epochs) > 1 and 1 in epochs  # two lanes train, so any node with a trainer has a fold

    until(second_epoch, 120)
    (trainer, *_) = cluster.processes("RayTrainWorker")
    cluster.lose(cluster.node_of(trainer))
    out, _ = disturbed.communicate(timeout=500)
    assert disturbed.returncode == 0 and "goes on from its last epoch" in out, out
    (run,) = (shared / "runs").glob("tiny-*")
    scores = [json.loads((folder / "metrics.json").read_text())["selected"] for folder in (run, calm)]
    assert scores[0] == scores[1]
    assert pq.read_table(run / "predictions.parquet").equals(pq.read_table(calm / "predictions.parquet"))


def test_a_cluster_without_machines_is_asked_for_some(project: Path) -> None:
    with machines(may_grow=1) as empty:
        refused = sermll(project, *submit(empty, project, "--follow", "--", "train", "x.yaml"))
        assert refused.returncode == 1 and "the cluster has 0, 0 and " in refused.stdout
        assert "resources.wait_s=900" in refused.stdout
        words = ("--follow", "--", "train", "x.yaml", "resources.wait_s=90")
        done = sermll(project, *submit(empty, project, *words))
        assert done.returncode == 0, done.stdout
        assert "waiting for machines, up to 90 s" in done.stdout
    assert list((project.parent / "shared" / "runs").glob("tiny-*/metrics.json"))


def test_traffic_between_nodes_may_be_encrypted(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = get_node_ip_address()
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=ray"]
    words += ["-addext", f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{address}"]
    subprocess.run([*words, "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    for name, file in {"SERVER_CERT": "cert", "SERVER_KEY": "key", "CA_CERT": "cert"}.items():
        monkeypatch.setenv(f"RAY_TLS_{name}", str(tmp_path / file))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with machines(1) as encrypted:
        done = sermll(project, *submit(encrypted, project, "--follow", "--", "train", "x.yaml", "optim.epochs=1"))
        assert done.returncode == 0, done.stdout + done.stderr


def _head() -> str:
    return subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
