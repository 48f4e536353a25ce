"""What tests of both kinds build on: prepared data without Ray, a small experiment, a timely kill."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sermll import prepare
from sermll.corpora import CORPORA
from sermll.rows import Corpus


def prepare_without_ray(root: Path, out: Path, facts: Corpus = CORPORA["emodb"]) -> Path:
    """Prepare a corpus folder shard by shard; returns `out`."""
    rows, problems = prepare._read_rows(facts, root)
    (out / "shards").mkdir(parents=True)
    size = prepare.UTTERANCES_PER_SHARD
    for index, start in enumerate(range(0, len(rows), size)):
        prepare._write_one_shard(root, out / "shards", index, rows[start : start + size], None)
    source = prepare._fingerprint(facts, root, rows, problems, None)
    prepare._write_manifest(facts, root, out, rows, problems, None, source)
    return out


def tiny_settings(data: Path, runs: Path) -> dict[str, Any]:
    """Settings of an experiment that trains in seconds; MLflow is off."""
    return {
        "name": "tiny",
        "data": {"path": str(data)},
        "model": {
            "encoder": {"kind": "logmel", "dim": 16, "mels": 16},
            "pool": {"heads": 2},
            "embedding_dim": 8,
        },
        "optim": {"epochs": 2, "batch_size": 8, "lr": 1e-3},
        "tracking": {"runs": str(runs), "mlflow": False},
    }


def kill_when(process: subprocess.Popen, happened: Callable[[], Any], timeout_s: float = 180) -> None:
    """Kill a process, without a chance to clean up, as soon as something has happened or it has ended."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline, "what should have happened did not"
        time.sleep(0.01)
    process.kill()
    process.wait()
