"""Machines that share nothing but object storage: what they train together is what a laptop trains."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from bucket import object_storage
from machines import machines, until
from prepared import tiny_settings

from sermll import storage
from sermll.storage import fetch, place

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parents[2]


@pytest.fixture
def project(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an experiment whose relative folders lie in a bucket, and the way there in the environment."""
    (tmp_path / "project").mkdir()
    tree = tiny_settings(Path("data/tiny"), Path("runs")) | {"resources": {"max_failures": 3}}
    (tmp_path / "project" / "x.yaml").write_text(yaml.safe_dump(tree))
    search = {"name": "x", "experiment": "x.yaml", "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}, "trials": 1}
    (tmp_path / "project" / "x.search.yaml").write_text(yaml.safe_dump(search))
    with object_storage() as variables:
        for name, value in (variables | {storage.CACHE: str(tmp_path / "cache")}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "cache").mkdir(mode=0o700)
        storage._system.cache_clear()
        yield tmp_path / "project"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sermll", *words]


def sermll(project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(HERE), **variables}
    return subprocess.run(command(*words), cwd=project, env=environment, capture_output=True, text=True, timeout=500)


def scores(run: Path) -> Any:
    return json.loads((run / "metrics.json").read_text())["selected"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give each node a file system of its own")
def test_nodes_that_share_nothing_train_through_a_bucket_and_one_may_vanish(
    project: Path, tiny_corpus: Path, tiny_data: Path, tmp_path: Path
) -> None:
    ours = {storage.ROOT: "s3://lab/mine"}
    prepared = sermll(project, "prepare", "emodb", "--root", str(tiny_corpus), "--out", "data/tiny", **ours)
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert "in s3://lab/mine/data/tiny" in prepared.stdout
    again = sermll(project, "prepare", "emodb", "--root", str(tiny_corpus), "--out", "data/tiny", **ours)
    assert "already prepared" in again.stdout

    train = ("train", "x.yaml", "optim.epochs=5", "resources.parallel_folds=2")
    calm = sermll(project, *train, f"data.path={tiny_data}", f"tracking.runs={tmp_path}/calm")
    assert calm.returncode == 0, calm.stdout + calm.stderr
    (expected,) = (tmp_path / "calm").glob("tiny-*")

    with machines(2, 2, private=tmp_path / "cache") as cluster:
        submitted = ("submit", "--address", cluster.address, "--root", "s3://lab/mine", "--follow", "--")
        runs_apart = (f"tracking.runs={tmp_path}/cache/runs",)
        lost = sermll(project, *submitted, *train, *runs_apart)
        assert lost.returncode == 1, lost.stdout
        assert "does not see it, or only a folder of its own; runs belong on storage" in lost.stdout, lost.stdout
        # Not as a job: nodes on one machine unpack a job's code anew into the same folder, and Tune asks for its own.
        inside = ("nsenter", "--mount", f"--target={cluster.nodes[0].pid}", f"--wd={project}")
        refused = subprocess.run(
            [*inside, *command("search", "x.search.yaml", *runs_apart)],
            env={**os.environ, **ours, "PYTHONPATH": str(HERE), "RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert refused.returncode == 1, refused.stderr
        assert "runs/search-x: " in refused.stderr and " does not see it, or only a folder" in refused.stderr
        submit = (*submitted, *train)
        job = subprocess.Popen(
            command(*submit), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        runs = place("s3://lab/mine/runs")

        def second_epoch() -> bool:
            fetch(runs, without="checkpoints")
            return any(len(json.loads(path.read_text())) == 1 for path in runs.glob("tiny-*/fold-*/history.json"))

        until(second_epoch, 180)
        cluster.lose(cluster.nodes[1])
        told, _ = job.communicate(timeout=500)
        assert job.returncode == 0, told
    fetch(runs, without="checkpoints")
    (run,) = runs.glob("tiny-*")
    assert f"s3://lab/mine/runs/{run.name}" in told and run.name == expected.name
    assert scores(run) == scores(expected)
    assert pq.read_table(run / "predictions.parquet").equals(pq.read_table(expected / "predictions.parquet"))
    assert (run / "report" / "confusion.png").stat().st_size > 1000
    # What was left on the way is gone, and a third machine can use the models.
    assert not [name for name in storage.names(run) if name.startswith(".lanes")]
    sound = next((tiny_corpus / "wav").glob("*.wav"))
    other = {**ours, storage.CACHE: str(tmp_path / "third")}
    heard = sermll(project, "predict", f"runs/{run.name}", str(sound), "--json", **other)
    assert heard.returncode == 0, heard.stderr
    assert 0 < max(json.loads(heard.stdout.splitlines()[-1])[0]["probabilities"].values()) <= 1
