"""Prepared data on disk: Arrow shards of 16-bit waveforms, one table of utterances, one readable manifest.

data/ravdess/
  manifest.json       what was prepared from what; its `data_hash` names the content
  utterances.parquet  one row per utterance, without the audio
  problems.csv        every file that did not become an utterance, and why
  shards/00000.arrow  Arrow IPC files, memory-mapped by whoever reads them
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sermll.errors import DataError

FORMAT = 2
"""Version of the layout below; raised whenever older readers would misread it."""

UTTERANCE_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("label", pa.string(), nullable=False),
    pa.field("speaker", pa.string(), nullable=False),
    pa.field("session", pa.string()),
    pa.field("text", pa.string()),
    pa.field("sex", pa.string()),
    pa.field("fold", pa.string()),
    pa.field("start_s", pa.float64()),
    pa.field("end_s", pa.float64()),
    pa.field("votes", pa.map_(pa.string(), pa.float64())),
    pa.field("valence", pa.float64()),
    pa.field("arousal", pa.float64()),
    pa.field("dominance", pa.float64()),
    pa.field("num_samples", pa.int64(), nullable=False),
    pa.field("duration_s", pa.float64(), nullable=False),
    pa.field("source_rate_hz", pa.int32(), nullable=False),
    pa.field("source_channels", pa.int32(), nullable=False),
    pa.field("source_encoding", pa.string(), nullable=False),
    pa.field("source_sha256", pa.string(), nullable=False),
    pa.field("audio_sha256", pa.string(), nullable=False),
]
SHARD_SCHEMA = pa.schema([*UTTERANCE_FIELDS, pa.field("audio", pa.large_list(pa.int16()), nullable=False)])
TABLE_SCHEMA = pa.schema([*UTTERANCE_FIELDS, pa.field("shard", pa.int32()), pa.field("row", pa.int32())])


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"{index:05d}.arrow"


def write_shard(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows (fields of SHARD_SCHEMA) as one Arrow record batch; the file appears whole or not at all."""
    columns = {name: [row[name] for row in rows] for name in SHARD_SCHEMA.names if name != "audio"}
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row["audio"]) for row in rows], out=offsets[1:])
    values = np.concatenate([row["audio"] for row in rows]) if rows else np.zeros(0, np.int16)
    audio = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int16()))
    arrays = [pa.array(columns[field.name], field.type) for field in SHARD_SCHEMA if field.name != "audio"]
    batch = pa.record_batch([*arrays, audio], schema=SHARD_SCHEMA)
    partial = path.with_suffix(".tmp")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SHARD_SCHEMA) as writer:
        writer.write_batch(batch)
    os.replace(partial, path)


def read_shard(path: Path) -> pa.RecordBatch:
    """Map a shard into memory: its single record batch, audio not copied.

    Raises:
        DataError: the file is missing or is not a whole shard.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema.names != SHARD_SCHEMA.names:
            raise DataError(f"{path}: columns {reader.schema.names} are not those of a sermll shard")
        return reader.get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a readable shard ({error}); delete the folder and prepare again") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(corpus: str, classes: Sequence[str], utterances: Iterable[dict[str, Any]]) -> str:
    """The data hash: what a model can learn from, whatever files or machine it came from.

    Hashes corpus, class order and, for each utterance in order, id, label, speaker, session, text, fold, votes, length
    and the SHA-256 of its 16 kHz samples.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, corpus, list(classes)]).encode())
    for row in utterances:
        names = ("id", "label", "speaker", "session", "text", "fold", "votes", "num_samples", "audio_sha256")
        digest.update(json.dumps([row[name] for name in names]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data, opened."""

    path: Path
    manifest: dict[str, Any]
    table: pa.Table
    """TABLE_SCHEMA, one row per utterance, ordered by id."""

    @classmethod
    def open(cls, path: str | Path) -> "Prepared":
        """Open a folder written by `sermll prepare`; reads the manifest and the table, no audio.

        Raises:
            DataError: there are no prepared data, they are from another version, or a file is missing or changed.
        """
        path = Path(path).expanduser().resolve()
        if not path.is_dir():
            raise DataError(f"{path}: no such folder; make it with `sermll prepare CORPUS --root DIR --out {path}`")
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path}: holds no manifest.json, so no prepared data; "
                f"make them with `sermll prepare CORPUS --root DIR --out {path}`"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}/manifest.json: cannot be read ({error}); prepare again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else manifest
            raise DataError(
                f"{path}: data of format {found}, this version of sermll reads format {FORMAT}; prepare again"
            )
        for shard in manifest["shards"]:
            file = path / "shards" / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
                raise DataError(f"{file}: {found}, the manifest says {shard['bytes']} bytes; prepare again")
        try:
            table = pq.read_table(path / "utterances.parquet", schema=TABLE_SCHEMA)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}/utterances.parquet: cannot be read ({error}); prepare again") from None
        prepared = cls(path, manifest, table)
        rows = (row for batch in table.to_batches(max_chunksize=4096) for row in batch.to_pylist())
        if content_hash(prepared.corpus, prepared.classes, rows) != manifest["data_hash"]:
            raise DataError(f"{path}: utterances.parquet does not give the manifest's data_hash; prepare again")
        return prepared

    @property
    def corpus(self) -> str:
        """Name of the corpus."""
        return self.manifest["corpus"]

    @property
    def classes(self) -> tuple[str, ...]:
        """The corpus's own classes, in order."""
        return tuple(self.manifest["classes"])

    @property
    def data_hash(self) -> str:
        """Hash of the content, see `content_hash`."""
        return self.manifest["data_hash"]

    @cached_property
    def num_samples(self) -> np.ndarray:
        """Length of each utterance in samples, int64 (utterances,)."""
        return self.table["num_samples"].to_numpy()

    def verify(self) -> None:
        """Compare every shard with the SHA-256 of the manifest, several files at a time.

        Raises:
            DataError: naming the first shard whose bytes changed.
        """
        folder = self.path / "shards"
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda shard: file_sha256(folder / shard["file"]), self.manifest["shards"])
            for shard, sha256 in zip(self.manifest["shards"], found, strict=True):
                if sha256 != shard["sha256"]:
                    raise DataError(
                        f"{folder / shard['file']}: the shard is damaged (SHA-256 {sha256[:12]}..., the manifest says "
                        f"{shard['sha256'][:12]}...); delete {self.path} and prepare again"
                    )


class Waveforms:
    """Random access to the samples of prepared data, memory-mapped; shards are opened when first needed."""

    def __init__(self, path: str, shard: np.ndarray, row: np.ndarray) -> None:
        """`shard` and `row` (utterances,): where each utterance lies."""
        self._folder = Path(path) / "shards"
        self._shard, self._row = shard, row
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, utterance: int) -> np.ndarray:
        """int16 (samples,) of an utterance, a read-only view of the file."""
        index = int(self._shard[utterance])
        if index not in self._open:
            audio = read_shard(self._folder / shard_name(index)).column("audio")
            self._open[index] = (audio.offsets.to_numpy(), audio.values.to_numpy())
        offsets, values = self._open[index]
        row = int(self._row[utterance])
        return values[offsets[row] : offsets[row + 1]]
