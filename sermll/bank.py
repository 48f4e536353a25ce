"""A feature bank: what a frozen encoder makes of utterances, clean and mixed, encoded once and trained on many times.

    <root>/<16 hex digits>/
      bank.json            what the bank was made of; written last
      entries.parquet      one row per entry: utterance, crop, partner, SNR, and where its frames lie
      shards/00000.arrow   Arrow IPC files of frames, memory-mapped by whoever trains

A bank is keyed by utterances, not by splits: one that was built for a pool of speakers serves every division of the
pool. It holds no labels. Of a mix it keeps the partner and the partner's share, and each trial mixes its own targets.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from sermll import bank_plan, config
from sermll.audio import to_float
from sermll.bank_plan import SCORED, UNMIXED, Entries, Recipe, check_crops, check_mixup, plan_entries, size_bytes
from sermll.errors import ConfigError, DataError, StorageError
from sermll.feed import SPLITS, Batch, Feed, FoldData
from sermll.files import naming, read_json, whole, write_json
from sermll.mixup import eam, mix_labels
from sermll.pretrained import PretrainedEncoder
from sermll.progress import Progress
from sermll.shards import Waveforms, shard_name
from sermll.storage import fetch, locked

FORMAT = 1
"""Version of the draws and the layout below; raised whenever the same settings would give another bank."""
FACTS, ENTRIES = "bank.json", "entries.parquet"

_SHARD_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("mix", pa.int32(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),
        pa.field("frames", pa.large_list(pa.float32()), nullable=False),
    ]
)


class PrecomputedFrames(nn.Module):
    """Stands where the encoder would: what it is given are frames already.

    Args:
        dim: width of a frame.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames float32 (batch, frames, dim) as they are, and the mask bool (batch, frames) of the valid ones.

        Args:
            features: float32 (batch, frames, dim), zero-padded.
            lengths: int64 (batch,) valid frames.
        """
        return features, torch.arange(features.shape[1], device=lengths.device) < lengths[:, None]


@dataclass(frozen=True, eq=False)
class Bank:
    """A finished bank, opened for reading. Pickled it is its folder."""

    folder: Path
    facts: dict[str, Any]
    """What bank.json says."""
    entries: Entries
    _opened: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    """By shard and record batch: offsets and values of the frames, and the partners' shares."""

    @classmethod
    def build(cls, root: Path, data: FoldData, recipe: Recipe, device: torch.device) -> "Bank":
        """Encode what is missing of a bank, and open it.

        Mixes are made of the training utterances of `data`, among themselves; all of its utterances are kept clean.

        Args:
            root: folder of banks.
            data: the pool: `rows["train"]` is everything that any trial may train on.
            recipe: what to keep of each utterance.
            device: where to encode.

        Raises:
            ConfigError, CheckpointError: the encoder cannot be loaded.
            DataError: the audio is damaged.
            StorageError: the disk has less room than the bank will take, or cannot be written.
        """
        encoder = PretrainedEncoder(recipe.encoder).eval().to(device)
        facts = _facts(data, recipe, encoder.fingerprint, encoder.dim)
        folder = Path(root).expanduser().absolute() / facts["key"][:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".building", what=f"feature bank {folder}"):  # one encodes, others find it done
                fetch(folder)
                if not (folder / FACTS).exists():
                    sizes = _fill(folder, data, recipe, encoder, device)
                    write_json(folder / FACTS, {**facts, "shards": sizes})
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error}); the same command goes on from here") from None
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Bank":
        """Open a bank that was built; reads the entries, no frames.

        Raises:
            DataError: it is not there, not finished, of another version, or damaged.
        """
        fetch(folder)
        facts = read_json(folder / FACTS)
        with naming(folder / FACTS):
            if facts["format"] != FORMAT:
                raise DataError(f"{folder}: a feature bank of format {facts['format']}, this version reads {FORMAT}")
            sizes = {folder / "shards" / shard_name(index): size for index, size in enumerate(facts["shards"])}
        for path, size in sizes.items():
            if not path.is_file() or path.stat().st_size != size:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
                raise DataError(f"{path}: {found}, {FACTS} says {size} bytes; delete {folder} and build it again")
        with naming(folder / ENTRIES):
            table = pq.read_table(folder / ENTRIES)
        return cls(folder, facts, {name: table[name].to_numpy() for name in table.column_names})

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        """Whoever gets it opens the files anew."""
        return Bank.open, (self.folder,)

    @property
    def dim(self) -> int:
        """Width of a frame."""
        return self.facts["dim"]

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 (utterances,): row numbers of all utterances, ascending."""
        return np.unique(self.entries["row"])

    @cached_property
    def clean(self) -> Mapping[str, np.ndarray]:
        """By split and row number the entry of the utterance unmixed, -1: none."""
        scored, unmixed = (self._by_row(mix) for mix in (SCORED, UNMIXED))
        # An utterance that no crop shortens has one clean entry, which serves for both.
        return {"train": np.where(unmixed >= 0, unmixed, scored), "dev": scored, "test": scored}

    @cached_property
    def mixes(self) -> np.ndarray:
        """int64 (row numbers, mixes): the entries of an utterance's mixes, -1: none."""
        return np.stack([self._by_row(mix) for mix in range(self.facts["mixes"])], axis=1)

    def _by_row(self, mix: int) -> np.ndarray:
        found = np.full(self.rows[-1] + 1, -1)
        chosen = np.flatnonzero(self.entries["mix"] == mix)
        found[self.entries["row"][chosen]] = chosen
        return found

    def read(self, entry: int) -> tuple[np.ndarray, float]:
        """Frames float32 (frames, dim) of an entry, a read-only view of the file; and the share of its partner's label.

        Raises:
            DataError: the shard is damaged.
        """
        shard, batch, place = (int(self.entries[name][entry]) for name in ("shard", "batch", "place"))
        if (shard, batch) not in self._opened:
            self._open_shard(shard)
        offsets, values, shares = self._opened[shard, batch]
        frames = values[offsets[place] : offsets[place + 1]].reshape(-1, self.dim)
        return frames, float(shares[place])

    def _open_shard(self, shard: int) -> None:
        batches = np.unique(self.entries["batch"][self.entries["shard"] == shard]).tolist()
        path = self.folder / "shards" / shard_name(shard)
        with naming(path):
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            for index, batch in enumerate(batches):
                columns = reader.get_batch(index)
                frames = columns.column("frames")
                shares = columns.column("share").to_numpy()
                self._opened[shard, batch] = (frames.offsets.to_numpy(), frames.values.to_numpy(), shares)

    def nearest(self, fold: FoldData, row: int, snr_db: float, within: tuple[float, float]) -> int:
        """The entry of the mix whose SNR is nearest to `snr_db`, among those within a range if there are any.

        Only mixes with partners that the fold trains on are looked at: others would put dev utterances, and their
        labels, into the training. Among its own partners each stays as likely as any other.

        Returns:
            -1: there is none.
        """
        found = self.mixes[row]
        found = found[found >= 0]
        found = found[_trained_on(fold)[self.entries["partner"][found]]]
        if len(found) == 0:
            return -1
        snrs = self.entries["snr_db"][found]
        inside = (within[0] <= snrs) & (snrs <= within[1])
        distance = np.abs(snrs - snr_db) + np.where(inside, 0, np.inf if inside.any() else 0)
        return int(found[distance.argmin()])

    def batch(self, feed: Feed, split: str, epoch: int, index: int, rank: int = 0, workers: int = 1) -> Batch:
        """The share of one worker of a batch, as `feed.make_batch` makes it, but of features.

        The plan says who stands in it, who is mixed, and at which SNR; the bank has the mix that comes nearest. An
        utterance none of whose mixes may be used is left unmixed.

        Returns:
            `waveform` is float32 (batch, frames, dim), zero-padded, and `lengths` are the valid frames.
        """
        plan, fold = feed.plan(split, epoch), feed.of
        positions = plan.batch(index, rank, workers)
        rows = plan.rows[positions]
        chosen = self.clean[split][rows]
        if plan.mix is not None and isinstance(feed.mixup, config.EAM):
            for place in np.flatnonzero(plan.mix.partner[positions] >= 0).tolist():
                snr_db = float(plan.mix.snr_db[positions[place]])
                mixed = self.nearest(fold, int(rows[place]), snr_db, feed.mixup.snr_db)
                chosen[place] = mixed if mixed >= 0 else chosen[place]
        read = [self.read(entry) for entry in chosen.tolist()]
        lengths = np.array([len(frames) for frames, _ in read], np.int64)
        features = np.zeros((len(read), int(lengths.max(initial=0)), self.dim), np.float32)
        for place, (frames, _) in enumerate(read):
            features[place, : len(frames)] = frames
        # Unmixed the share is 0, and the partner -1, which reads a row that counts for nothing.
        partners = fold.targets[self.entries["partner"][chosen]]
        targets = mix_labels(fold.targets[rows], partners, [share for _, share in read]).astype(np.float32)
        return Batch(epoch, split, index, rows, features, lengths, fold.labels[rows], targets)

    def batches(
        self, feed: Feed, first_epoch: int, epochs: int, rank: int = 0, workers: int = 1
    ) -> Generator[Batch, None, None]:
        """Batches of every epoch from `first_epoch` on, in the order of `feed.stream`: what `train_fold` takes.

        Raises:
            ConfigError: the trial mixes in another way, within another range, or crops otherwise than the bank.
            DataError: the utterances are others than the bank's.
        """
        check_mixup(feed.mixup, self.facts["snr_db"])
        check_crops(feed.data, self.facts)
        self._check_rows(feed.of)
        return (
            self.batch(feed, split, epoch, index, rank, workers)
            for epoch in range(first_epoch, epochs)
            for split in SPLITS
            for index in range(feed.plan(split, epoch).num_batches)
        )

    def stand_in(self, experiment: config.Experiment) -> PrecomputedFrames:
        """What takes the encoder's place in a trial with these settings.

        Raises:
            ConfigError: the trial's encoder, mixup or crops are not the bank's.
        """
        found, own = experiment.model.encoder.model_dump(mode="json"), self.facts["encoder"]
        # By name it is the first builder's; others may have found the same weights elsewhere.
        differs = [key for key in {**own, **found} if key != "name" and found.get(key) != own.get(key)]
        if differs:
            told = ", ".join(f"model.encoder.{key}={found.get(key)} (bank: {own.get(key)})" for key in differs)
            raise ConfigError(f"{self.folder}: the feature bank is of another encoder than the trial's: {told}")
        check_mixup(experiment.mixup, self.facts["snr_db"])
        check_crops(experiment.data, self.facts)
        return PrecomputedFrames(self.dim)

    def _check_rows(self, fold: FoldData) -> None:
        if self.rows[-1] >= len(fold.names) or _audio_hash(fold, self.rows) != self.facts["audio"]:
            raise DataError(f"{self.folder}: the feature bank is of other recordings than the fold's")
        for split in SPLITS:
            trained = self.facts["trained"] if split == "train" else self.rows
            absent = np.setdiff1d(fold.rows[split], trained)
            if len(absent):
                raise DataError(
                    f"{self.folder}: {len(absent)} {split} utterances are not in the feature bank, or not for "
                    f"training, as {fold.names['id'][int(absent[0])]}; build it for all that a trial may use"
                )


def sound(entries: Entries, entry: int, waveforms: Waveforms) -> tuple[np.ndarray, float]:
    """What the encoder hears of an entry, float32 (samples,), and the share of the partner's label."""
    of = {name: values[entry] for name, values in entries.items()}
    signal = to_float(waveforms[of["row"]][of["crop_start"] : of["crop_start"] + of["length"]])
    if of["partner"] < 0:
        return signal, 0.0
    end = of["partner_crop_start"] + of["partner_length"]
    partner = to_float(waveforms[of["partner"]][of["partner_crop_start"] : end])
    mix_length, start, partner_start = (int(of[name]) for name in ("mix_length", "start", "partner_start"))
    return eam(signal, partner, mix_length, start, partner_start, float(of["snr_db"]))


def estimate_bytes(data: FoldData, recipe: Recipe, dim: int) -> int:
    """Bytes that a bank will take, told before anything is encoded.

    Args:
        data: the pool, as `Bank.build` is given it.
        recipe: what to keep of each utterance.
        dim: width of the encoder's frames: 768 of base models, 1024 of large ones.
    """
    return size_bytes(plan_entries(*_pool(data), data.num_samples, recipe, dim), dim)


def _facts(data: FoldData, recipe: Recipe, fingerprint: str, dim: int) -> dict[str, Any]:
    """Content of bank.json but for the sizes of the shards; `key` names everything that decides the frames."""
    rows, trained = _pool(data)
    facts = {
        "format": FORMAT,
        "layout": [bank_plan.BATCH_SAMPLES, bank_plan.SHARD_BYTES],
        "audio": _audio_hash(data, rows),
        "trained": trained.tolist(),
        "fingerprint": fingerprint,
        "layer": recipe.encoder.layer,
        "mixes": recipe.mixes,
        "snr_db": list(recipe.snr_db),
        "crop_s": recipe.crop_s,
        "eval_crop_s": recipe.eval_crop_s,
        "seed": recipe.seed,
    }
    key = hashlib.sha256(json.dumps([*facts.values()]).encode()).hexdigest()
    # A model may be moved or renamed and its features stay: its name is told, and is no part of the key.
    return {"key": key, **facts, "dim": dim, "encoder": recipe.encoder.model_dump(mode="json")}


def _pool(data: FoldData) -> tuple[np.ndarray, np.ndarray]:
    """int64 row numbers, ascending: all utterances, and those that are trained on.

    Raises:
        DataError: there are none.
    """
    rows = np.unique(np.concatenate([data.rows[split] for split in SPLITS])).astype(np.int64)
    if len(rows) == 0:
        raise DataError("a feature bank of no utterances: all splits are empty")
    return rows, np.unique(data.rows["train"]).astype(np.int64)


def _audio_hash(data: FoldData, rows: np.ndarray) -> str:
    """Names utterances by row number and content."""
    content = data.names["audio_sha256"].take(rows).to_pylist()
    return hashlib.sha256(json.dumps([rows.tolist(), content]).encode()).hexdigest()


@lru_cache(maxsize=8)
def _trained_on(fold: FoldData) -> np.ndarray:
    """Bool (row numbers,): whether the fold trains on an utterance."""
    trained = np.zeros(len(fold.names), bool)
    trained[fold.rows["train"]] = True
    return trained


def _fill(folder: Path, data: FoldData, recipe: Recipe, encoder: PretrainedEncoder, device: torch.device) -> list[int]:
    """Write the entries and every shard that is not there.

    Returns:
        Bytes of each shard.
    """
    entries = plan_entries(*_pool(data), data.num_samples, recipe, encoder.dim)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for left in folder.rglob(".*.tmp"):  # by builders that were killed
        left.unlink()
    with whole(folder / ENTRIES) as partial:
        pq.write_table(pa.table(dict(entries)), partial)
    paths = [folder / "shards" / shard_name(index) for index in range(int(entries["shard"][-1]) + 1)]
    absent = np.isin(entries["shard"], [index for index, path in enumerate(paths) if not path.exists()])
    remaining = {name: values[absent] for name, values in entries.items()}
    needed, free = size_bytes(remaining, encoder.dim), shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: the feature bank needs {needed / 1e9:.3g} GB more, and the disk has {free / 1e9:.3g} GB free; "
            "make fewer mixes, or give another folder"
        )
    waveforms = Waveforms(data.files, data.shard, data.row)
    done = len(absent) - int(absent.sum())
    with Progress(f"features of {recipe.encoder.name}", len(absent), done, unit="utterances") as progress:
        for index, path in enumerate(paths):
            if path.exists():
                continue
            with (
                whole(path) as partial,
                pa.OSFile(str(partial), "wb") as sink,
                pa.ipc.new_file(sink, _SHARD_SCHEMA) as writer,
            ):
                for members in _batches(np.flatnonzero(entries["shard"] == index), entries["batch"]):
                    writer.write_batch(_encode(encoder, device, entries, members, waveforms))
                    progress.advance(len(members))
    return [path.stat().st_size for path in paths]


def _batches(members: np.ndarray, batch: np.ndarray) -> Iterator[np.ndarray]:
    """The entries of a shard, batch by batch."""
    return iter(np.split(members, np.flatnonzero(np.diff(batch[members])) + 1))


@torch.no_grad()
def _encode(
    encoder: PretrainedEncoder, device: torch.device, entries: Entries, members: np.ndarray, waveforms: Waveforms
) -> pa.RecordBatch:
    """The valid frames of some entries."""
    sounds = [sound(entries, entry, waveforms) for entry in members.tolist()]
    lengths = torch.tensor([len(signal) for signal, _ in sounds])
    padded = np.zeros((len(sounds), int(lengths.max())), np.float32)
    for place, (signal, _) in enumerate(sounds):
        padded[place, : len(signal)] = signal
    frames, mask = encoder(torch.from_numpy(padded).to(device), lengths.to(device))
    values = frames[mask].float().cpu().numpy()
    offsets = np.zeros(len(sounds) + 1, np.int64)
    np.cumsum(mask.sum(dim=1).cpu().numpy() * encoder.dim, out=offsets[1:])
    assert math.prod(values.shape) == offsets[-1], "every valid frame of the batch, and no other"
    columns = [
        pa.array(entries["row"][members]),
        pa.array(entries["mix"][members], pa.int32()),
        pa.array([share for _, share in sounds], pa.float64()),
        pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1))),
    ]
    return pa.record_batch(columns, schema=_SHARD_SCHEMA)
