"""What tests of both kinds build on: prepared data without Ray or recordings, a small experiment, a timely kill."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sermll import prepare
from sermll.config import Resources
from sermll.corpora import CORPORA
from sermll.feed import SPLITS, Batch, Feed, FoldData, make_batch
from sermll.files import write_json
from sermll.job import FoldJob
from sermll.loop import Scores, held_by_worker, predictions_table
from sermll.metrics import confusion, ua
from sermll.results import DEV_PREDICTIONS, LAST_PREDICTIONS, PREDICTIONS
from sermll.rows import Corpus
from sermll.shards import FORMAT, TABLE_SCHEMA, UTTERANCE_FIELDS, content_hash, file_sha256, shard_name, write_shard

Row = tuple[str, str, str]
"""Utterance, label, speaker."""


def write_prepared(
    path: Path, corpus: str, rows: Sequence[Row], facts: dict[str, Any] | None = None, **columns: Sequence[Any]
) -> Path:
    """Write prepared data by hand, three utterances a shard; returns `path`.

    Each utterance has a few samples of its own, the same on every machine. `columns` are more of the table's, by row;
    of `audio` only what is not None counts. `facts` are more of the manifest's.
    """
    (path / "shards").mkdir(parents=True)
    table: list[dict[str, Any]] = []
    for index, (name, label, speaker) in enumerate(rows):
        given = {column: values[index] for column, values in columns.items() if values[index] is not None}
        audio = np.frombuffer(hashlib.sha256(f"{corpus} {name}".encode()).digest() * (1 + index % 4), "<i2")
        row: dict[str, Any] = {field.name: None for field in UTTERANCE_FIELDS} | {
            "id": name,
            "path": f"{name}.wav",
            "label": label,
            "speaker": speaker,
            "source_rate_hz": 16_000,
            "source_channels": 1,
            "source_encoding": "PCM_16",
            "source_sha256": "",
            "audio": audio,
            **given,
        }
        row["num_samples"], row["duration_s"] = len(row["audio"]), len(row["audio"]) / 16_000
        row["audio_sha256"] = hashlib.sha256(row["audio"].tobytes()).hexdigest()
        table.append(row)
    shards = []
    for index, start in enumerate(range(0, len(table), 3)):
        file = path / "shards" / shard_name(index)
        write_shard(file, table[start : start + 3])
        shards.append({"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)})
        for place, row in enumerate(table[start : start + 3]):
            row["shard"], row["row"] = index, place
    pq.write_table(pa.Table.from_pylist(table, schema=TABLE_SCHEMA), path / "utterances.parquet")
    manifest = {
        "format": FORMAT,
        "corpus": corpus,
        "title": corpus.upper(),
        "classes": sorted({label for _, label, _ in rows}),
        "other_labels": [],
        "default_labels": "native",
        "default_folds": "speaker",
        "folds": {},
        "licence": "none",
        "trim_db": None,
        "problems": {},
        "noted": {},
        "shards": shards,
        **(facts or {}),
    }
    manifest["data_hash"] = content_hash(corpus, manifest["classes"], table)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def prepare_without_ray(root: Path, out: Path, facts: Corpus = CORPORA["emodb"], trim_db: float | None = None) -> Path:
    """Prepare a corpus folder shard by shard; returns `out`."""
    rows, problems = prepare._read_rows(facts, root)
    (out / "shards").mkdir(parents=True)
    size = prepare.UTTERANCES_PER_SHARD
    for index, start in enumerate(range(0, len(rows), size)):
        prepare._write_one_shard(root, out / "shards", index, rows[start : start + size], trim_db)
    source = prepare._fingerprint(facts, root, rows, problems, trim_db)
    prepare._write_manifest(facts, root, out, rows, problems, trim_db, source)
    return out


def tiny_settings(data: Path, runs: Path) -> dict[str, Any]:
    """Settings of an experiment that trains in seconds; MLflow is off.

    No worker that was lost is started again: what fails after each epoch would come to its end all the same.
    """
    return {
        "name": "tiny",
        "data": {"path": str(data)},
        "model": {
            "encoder": {"kind": "logmel", "dim": 16, "mels": 16},
            "pool": {"heads": 2},
            "embedding_dim": 8,
        },
        "optim": {"epochs": 2, "batch_size": 8, "lr": 1e-3},
        "resources": {"max_failures": 0},
        "tracking": {"runs": str(runs), "mlflow": False},
    }


def in_process(feed: Feed, first_epoch: int, epochs: int, rank: int, workers: int) -> Generator[Batch, None, None]:
    """Batches made when they are asked for, in the process that trains, as `feed.stream` makes them with Ray."""
    for epoch in range(first_epoch, epochs):
        for split in SPLITS:
            for index in range(feed.plan(split, epoch).num_batches):
                yield make_batch(feed, split, epoch, index, rank, workers)


def finish(job: FoldJob, data: FoldData) -> None:
    """Leave what training a fold leaves, in milliseconds: a model that is mostly right, in two epochs of 10 s."""
    folder, size = Path(job.folder), len(data.classes)
    generator = np.random.default_rng([job.fold, job.settings["seed"], *job.run.encode()])
    counts = {}
    for split, names in (("test", (PREDICTIONS, LAST_PREDICTIONS)), ("dev", (DEV_PREDICTIONS,))):
        rows = data.rows[split]
        logits = generator.normal(size=(len(rows), size)) + 2 * np.eye(size)[data.labels[rows]]
        said = Scores(rows, data.labels[rows], logits.astype(np.float32), np.zeros((len(rows), 2), np.float32))
        counts[split] = confusion(said.labels, said.predicted, size)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            pq.write_table(predictions_table(job.fold, data, said), folder / name)
    held = {"workers": 1, **held_by_worker(Resources.model_validate(job.settings["resources"]), torch.device("cpu"))}
    scores = {"dev_ua": float(ua(counts["dev"])), "test_confusion": counts["test"].tolist()}
    history = [{"epoch": epoch, "train_s": 9.0, "eval_s": 1.0, **held, **scores} for epoch in (0, 1)]
    write_json(folder / "history.json", history)
    told = {"fold": job.fold, "epochs": 2, "best_epoch": 0, "seconds": 20.0, "wall_s": 25.0}
    write_json(folder / "result.json", told)


def recordings(name: str) -> Path:
    """The folder of a corpus; the test is skipped where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "corpora"
    folder = Path(os.environ.get("SERMLL_CORPORA", beside)) / name
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}; set SERMLL_CORPORA to a folder with {name}/ in it")
    return folder


def kill_when(process: subprocess.Popen, happened: Callable[[], Any], timeout_s: float = 180) -> None:
    """Kill a process, without a chance to clean up, as soon as something has happened or it has ended."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline, "what should have happened did not"
        time.sleep(0.01)
    process.kill()
    process.wait()
