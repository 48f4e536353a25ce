"""Prepared data on disk: Arrow shards of 16-bit waveforms, one table of utterances, one readable manifest.

data/ravdess/
  manifest.json       what was prepared from what; its `data_hash` names the content
  utterances.parquet  one row per utterance, without the audio
  problems.csv        every file that did not become an utterance, and why
  shards/00000.arrow  Arrow IPC files, memory-mapped by whoever reads them

Several folders, each of another corpus, are opened as one.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sermll.errors import DataError
from sermll.files import whole
from sermll.storage import address, fetch, origin, place, sizes

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
HASHED = ("id", "label", "speaker", "session", "text", "fold", "votes", "num_samples", "audio_sha256")
"""Columns that the data hash is made of, in its order."""


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
    with whole(path) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SHARD_SCHEMA) as writer:
        writer.write_batch(batch)


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
        digest.update(json.dumps([row[name] for name in HASHED]).encode())
    return digest.hexdigest()


class ShardFile(NamedTuple):
    """A shard of prepared data, and the SHA-256 that its file must have, in hex."""

    path: Path
    sha256: str

    def verify(self) -> None:
        """Compare the file with its hash.

        Raises:
            DataError: its bytes changed.
        """
        found = file_sha256(self.path)
        if found != self.sha256:
            told = address(self.path)
            raise DataError(
                f"{told}: the shard is damaged (SHA-256 {found[:12]}..., the manifest says {self.sha256[:12]}...); "
                f"delete {address(self.path.parents[1])} and prepare again"
            )

    def read(self) -> pa.RecordBatch:
        """The shard, mapped into memory; one on object storage is fetched first, once for all who need it here.

        Raises:
            DataError: the file is missing or damaged.
            StorageError: the storage does not answer or refuses.
        """
        if fetch(self.path):
            try:
                self.verify()
            except DataError:
                self.path.unlink()  # nobody is to take it for whole
                raise
        return read_shard(self.path)


@dataclass(frozen=True)
class Prepared:
    """Prepared data, opened: one folder, or several joined into one."""

    paths: tuple[str, ...]
    """Folder of each corpus."""
    manifest: dict[str, Any]
    """What manifest.json says; of joined data what holds for them as a whole, see `_join`."""
    table: pa.Table
    """TABLE_SCHEMA and a column `corpus`, one row per utterance; ordered by corpus as given, then by id."""
    files: tuple[ShardFile, ...]
    """The shards; column `shard` counts along them."""
    corpora: Mapping[str, tuple[str, ...]]
    """Name and own classes of each corpus, in the order given."""
    trim_db: Mapping[str, float | None]
    """For each corpus how far below the loudest part its recordings' ends were cut; None: they were kept."""

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> "Prepared":
        """Open a folder written by `sermll prepare`, or join several; reads manifests and tables, no audio.

        In joined data `id`, `speaker`, `session` and `fold` are prefixed by '<corpus>/', so that they stay unique.

        Raises:
            DataError: there are no prepared data, they are from another version, or a file is missing or changed; or
                two folders hold the same corpus.
        """
        if not isinstance(path, str | Path):
            parts = [cls.open(part) for part in path]
            return parts[0] if len(parts) == 1 else _join(parts)
        path = place(path).resolve()
        told = address(path)
        for name in ("manifest.json", "utterances.parquet"):
            fetch(path / name)
        if not path.is_dir():
            raise DataError(f"{told}: no such folder; make it with `sermll prepare CORPUS --root DIR --out {told}`")
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{told}: holds no manifest.json, so no prepared data; "
                f"make them with `sermll prepare CORPUS --root DIR --out {told}`"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}/manifest.json: cannot be read ({error}); prepare again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else manifest
            raise DataError(
                f"{path}: data of format {found}, this version of sermll reads format {FORMAT}; prepare again"
            )
        files = tuple(ShardFile(path / "shards" / shard["file"], shard["sha256"]) for shard in manifest["shards"])
        found = sizes(path / "shards")
        for (file, _), shard in zip(files, manifest["shards"], strict=True):
            if found.get(file.name) != shard["bytes"]:
                said = f"{found[file.name]} bytes" if file.name in found else "missing"
                raise DataError(f"{address(file)}: {said}, the manifest says {shard['bytes']} bytes; prepare again")
        try:
            table = pq.read_table(path / "utterances.parquet", schema=TABLE_SCHEMA)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}/utterances.parquet: cannot be read ({error}); prepare again") from None
        hashed = table.select(HASHED).to_batches(max_chunksize=4096)
        rows = (row for batch in hashed for row in batch.to_pylist())
        if content_hash(manifest["corpus"], manifest["classes"], rows) != manifest["data_hash"]:
            raise DataError(f"{path}: utterances.parquet does not give the manifest's data_hash; prepare again")
        named = table.append_column("corpus", pa.array([manifest["corpus"]] * len(table), pa.string()))
        corpora = {manifest["corpus"]: tuple(manifest["classes"])}
        return cls((told,), manifest, named, files, corpora, {manifest["corpus"]: manifest["trim_db"]})

    @property
    def path(self) -> str:
        """The folders, for people."""
        return " + ".join(self.paths)

    @property
    def corpus(self) -> str:
        """Name of the corpus; of joined data the names with '+' between them."""
        return self.manifest["corpus"]

    @property
    def classes(self) -> tuple[str, ...]:
        """The corpus's own classes, in order; of joined data those of all corpora, each once."""
        return tuple(self.manifest["classes"])

    @property
    def data_hash(self) -> str:
        """Hash of the content, see `content_hash`; of joined data a hash of the corpora's hashes, in order."""
        return self.manifest["data_hash"]

    @cached_property
    def num_samples(self) -> np.ndarray:
        """Length of each utterance in samples, int64 (utterances,)."""
        return self.table["num_samples"].to_numpy()

    def verify(self) -> None:
        """Compare every shard with the SHA-256 of the manifest, several files at a time.

        Those on object storage are compared when they are fetched; see `ShardFile.read`.

        Raises:
            DataError: naming the first shard whose bytes changed.
        """
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(ShardFile.verify, (file for file in self.files if not origin(file.path))):
                pass


def _join(parts: Sequence[Prepared]) -> Prepared:
    """Several corpora as one.

    The manifest has the facts that make sense for the whole: names, the union of the labels, no folds of its own and
    no default choices, the problems counted over all, and every shard.
    """
    opened: dict[str, Prepared] = {}
    for part in parts:
        if part.corpus in opened:
            other = opened[part.corpus].path
            what = "is given twice" if other == part.path else f"and {part.path} are both called {part.corpus}"
            raise DataError(
                f"data.path: {other} {what}; give each corpus once (recordings of your own are called as the folder "
                "that `sermll prepare --out` made)"
            )
        opened[part.corpus] = part
    manifests = [part.manifest for part in parts]

    def union(key: str) -> list[str]:
        return list(dict.fromkeys(value for manifest in manifests for value in manifest[key]))

    def total(key: str) -> dict[str, int]:
        return dict(sum((Counter(manifest[key]) for manifest in manifests), Counter()))

    manifest = {
        "corpus": "+".join(opened),
        "title": " + ".join(manifest["title"] for manifest in manifests),
        "classes": union("classes"),
        "other_labels": union("other_labels"),
        "default_labels": "default",  # no choice of theirs: refused by `label_space` and `make_folds`
        "default_folds": "default",
        "folds": {},
        "licence": " + ".join(dict.fromkeys(manifest["licence"] for manifest in manifests)),
        "data_hash": hashlib.sha256(json.dumps([part.data_hash for part in parts]).encode()).hexdigest(),
        "problems": total("problems"),
        "noted": total("noted"),
        "shards": [shard for manifest in manifests for shard in manifest["shards"]],
    }
    tables, files = [], []
    for part in parts:
        tables.append(_prefixed(part.table, part.corpus, len(files)))
        files.extend(part.files)
    corpora = {part.corpus: part.classes for part in parts}
    trim_db = {part.corpus: part.trim_db[part.corpus] for part in parts}
    paths = tuple(part.path for part in parts)
    return Prepared(paths, manifest, pa.concat_tables(tables), tuple(files), corpora, trim_db)


def _prefixed(table: pa.Table, corpus: str, first_shard: int) -> pa.Table:
    """A corpus's table as a part of a joined one, whose shards before it are `first_shard` in number."""
    changed = {"shard": [first_shard + shard for shard in table["shard"].to_pylist()]}
    for name in ("id", "speaker", "session", "fold"):
        changed[name] = [None if value is None else f"{corpus}/{value}" for value in table[name].to_pylist()]
    columns = [
        pa.array(changed[field.name], field.type) if field.name in changed else table[field.name]
        for field in table.schema
    ]
    return pa.table(columns, schema=table.schema)


class Waveforms:
    """Random access to the samples of prepared data, memory-mapped; shards are opened when first needed."""

    def __init__(self, files: Sequence["ShardFile"], shard: np.ndarray, row: np.ndarray) -> None:
        """`files`: the shards; `shard` and `row` (utterances,): where each utterance lies in them."""
        self._files = files
        self._shard, self._row = shard, row
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, utterance: int) -> np.ndarray:
        """int16 (samples,) of an utterance, a read-only view of the file."""
        index = int(self._shard[utterance])
        if index not in self._open:
            audio = self._files[index].read().column("audio")
            self._open[index] = (audio.offsets.to_numpy(), audio.values.to_numpy())
        offsets, values = self._open[index]
        row = int(self._row[utterance])
        return values[offsets[row] : offsets[row + 1]]
