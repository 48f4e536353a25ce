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

from sermll import prepare
from sermll.corpora import CORPORA
from sermll.feed import SPLITS, Batch, Feed, make_batch
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
        "problems": {},
        "noted": {},
        "shards": shards,
        **(facts or {}),
    }
    manifest["data_hash"] = content_hash(corpus, manifest["classes"], table)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


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


def in_process(feed: Feed, first_epoch: int, epochs: int, rank: int, workers: int) -> Generator[Batch, None, None]:
    """Batches made when they are asked for, in the process that trains, as `feed.stream` makes them with Ray."""
    for epoch in range(first_epoch, epochs):
        for split in SPLITS:
            for index in range(feed.plan(split, epoch).num_batches):
                yield make_batch(feed, split, epoch, index, rank, workers)


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
