"""From shards to batches: Ray Data's workers gather, crop, mix and pad what the epoch plans say.

Each training process streams its own dataset, whose source is a list of (epoch, split, batches): small rows that Ray
Data turns into padded batches, in order, ahead of the training step, and through the end of one epoch into the next.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from sermll import config
from sermll.audio import to_float
from sermll.cluster import here
from sermll.labels import Labelled
from sermll.mixup import eam, lam, mix_labels
from sermll.plan import Plan, eval_plan, train_plan
from sermll.shards import Prepared, ShardFile, Waveforms

BLOCK_BYTES = 96 * 2**20
"""How much audio one data task makes: enough that its overhead vanishes, less than Ray Data would cut in two."""
AHEAD_BYTES = 512 * 2**20
"""How much audio Ray Data may hold ready for one training process."""
ATTEMPT = "attempt"
"""Column of Ray Data's tables: how often their batches had to be made before."""
DATA_TASKS = 2
"""How many data tasks work for one training process at once.

They ask for no CPU: on a cluster that has lost nodes, training processes may hold all that are left, and would wait for
their data for ever. Mixing is light beside training, and runs on the same machine.
"""
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, eq=False)
class FoldData:
    """The utterances of a fold and where they lie: the same for every variant and seed, and shared by their runs."""

    key: str
    """Names protocol and fold."""
    files: tuple[ShardFile, ...]
    """The shards."""
    names: pa.Table
    """Columns id, speaker, corpus, audio_sha256; one row per utterance of the prepared data."""
    shard: np.ndarray
    row: np.ndarray
    num_samples: np.ndarray
    classes: tuple[str, ...]
    labels: np.ndarray
    """int64 (utterances,): what metrics count; -1 for utterances of no split."""
    targets: np.ndarray
    """float32 (utterances, classes): label distributions, what losses are told."""
    rows: Mapping[str, np.ndarray]
    """Row numbers of each split."""

    @classmethod
    def of(cls, key: str, prepared: Prepared, labelled: Labelled, rows: Mapping[str, np.ndarray]) -> "FoldData":
        """The data of a fold whose splits are `rows`."""
        return cls(
            key=key,
            files=prepared.files,
            # In one piece: pieces are parts of shared buffers, and each would be sent with all of its buffer.
            names=prepared.table.select(["id", "speaker", "corpus", "audio_sha256"]).combine_chunks(),
            shard=prepared.table["shard"].to_numpy(),
            row=prepared.table["row"].to_numpy(),
            num_samples=prepared.num_samples,
            classes=labelled.space.classes,
            labels=labelled.labels,
            targets=labelled.targets,
            rows=rows,
        )

    def __eq__(self, other: object) -> bool:
        """Same fold, same place: what a process has opened for one run serves the next."""
        return isinstance(other, FoldData) and (other.key, other.files) == (self.key, self.files)

    def __hash__(self) -> int:
        """By fold and place."""
        return hash((self.key, self.files))


@dataclass(frozen=True, eq=False)
class Feed:
    """All that a data worker needs to make any batch of a fold in a run."""

    key: str
    """Names run and fold; two feeds of one key and place are equal, which lets workers keep plans and open files."""
    of: FoldData
    data: config.Data
    mixup: config.EAM | config.LAM | config.NoMixup
    batch_size: int
    seed: int

    @classmethod
    def for_run(cls, key: str, experiment: config.Experiment, fold: FoldData) -> "Feed":
        """The feed of a fold in a run with the settings `experiment`."""
        return cls(key, fold, experiment.data, experiment.mixup, experiment.optim.batch_size, experiment.seed)

    def __eq__(self, other: object) -> bool:
        """Same run and fold, same place."""
        return isinstance(other, Feed) and (other.key, other.of) == (self.key, self.of)

    def __hash__(self) -> int:
        """By run, fold and place."""
        return hash((self.key, self.of))

    def plan(self, split: str, epoch: int) -> Plan:
        """The plan of a split in an epoch; scoring is the same in every epoch."""
        return _plan(self, split, epoch if split == "train" else 0)


@dataclass(frozen=True)
class Batch:
    """A batch, or a worker's share of one, in numpy."""

    epoch: int
    split: str
    index: int
    rows: np.ndarray
    """int64 (batch,): row numbers in the prepared table."""
    waveform: np.ndarray
    """float32 (batch, samples), zero-padded to the longest."""
    lengths: np.ndarray
    """int64 (batch,): valid samples."""
    labels: np.ndarray
    """int64 (batch,): class before mixing, what metrics count."""
    targets: np.ndarray
    """float32 (batch, classes): label distributions."""


@lru_cache(maxsize=8)
def _plan(feed: Feed, split: str, epoch: int) -> Plan:
    rows = feed.of.rows[split]
    num_samples = feed.of.num_samples[rows]
    if split == "train":
        return train_plan(rows, num_samples, feed.data, feed.mixup, feed.batch_size, feed.seed, epoch)
    return eval_plan(rows, num_samples, feed.data, feed.batch_size)


@lru_cache(maxsize=8)
def _waveforms(fold: FoldData) -> Waveforms:
    return Waveforms(fold.files, fold.shard, fold.row)


def make_batch(feed: Feed, split: str, epoch: int, index: int, rank: int = 0, workers: int = 1) -> Batch:
    """Make the share of one worker of one batch: read, crop, mix, pad."""
    plan, waveforms, fold = feed.plan(split, epoch), _waveforms(feed.of), feed.of
    positions = plan.batch(index, rank, workers)
    lengths = plan.length[positions]
    waveform = np.empty((len(positions), int(lengths.max(initial=0))), np.float32)
    targets = np.zeros((len(positions), len(fold.classes)), np.float32)

    def cropped(position: int, out: np.ndarray | None = None) -> np.ndarray:
        start, length = plan.crop_start[position], plan.crop_length[position]
        return to_float(waveforms[plan.rows[position]][start : start + length], out)

    def label(position: int) -> np.ndarray:
        return fold.targets[plan.rows[position]]

    for place, position in enumerate(positions.tolist()):
        row = waveform[place, : lengths[place]]
        waveform[place, lengths[place] :] = 0
        partner = -1 if plan.mix is None else int(plan.mix.partner[position])
        if plan.mix is None or partner < 0:
            cropped(position, row)
            targets[place] = label(position)
            continue
        if isinstance(feed.mixup, config.EAM):
            _, share = eam(
                cropped(position, row),
                cropped(partner),
                int(plan.mix.mix_length[position]),
                int(plan.mix.start[position]),
                int(plan.mix.partner_start[position]),
                float(plan.mix.snr_db[position]),
                out=row,
            )
        else:
            row[:], share = lam(cropped(position), cropped(partner))
        targets[place] = mix_labels(label(position), label(partner), share)
    rows = plan.rows[positions]
    return Batch(epoch, split, index, rows, waveform, lengths, fold.labels[rows], targets)


def stream(
    feed: Feed,
    first_epoch: int,
    epochs: int,
    rank: int = 0,
    workers: int = 1,
    lost: Callable[[], Any] = lambda: None,
) -> Generator[Batch, None, None]:
    """Batches of every epoch from `first_epoch` on: train, then dev, then test, in the plans' order.

    Runs as one Ray Data execution in the calling process's cluster. The first batches are made here, until Ray Data is
    ahead: it takes seconds to start, and a batch takes milliseconds, whoever makes it. Nobody waits for it to catch up
    with one who takes batches faster than it makes them. `lost` is called where Ray Data had to make batches again,
    because the process that was at it, or had them, was lost.
    """
    blocks = {split: _blocks(feed.plan(split, first_epoch), workers) for split in SPLITS}
    jobs = [
        {"epoch": epoch, "split": split, "first": first, "last": last}
        for epoch in range(first_epoch, epochs)
        for split in SPLITS
        for first, last in blocks[split]
    ]

    def make(job: dict[str, Any]) -> Iterator[Batch]:
        return (
            make_batch(feed, job["split"], job["epoch"], index, rank, workers)
            for index in range(job["first"], job["last"])
        )

    if len(jobs) < 2:
        for job in jobs:
            yield from make(job)
        return
    # Names are most of a fold's bytes, and batches have none: every stream would put them into the object store again.
    feed = replace(feed, of=replace(feed.of, names=feed.of.names.schema.empty_table()))
    tables = _Rest.while_waiting(_tables(jobs[1:], make, lost))
    made, over = 0, threading.Event()

    def catch_up() -> None:
        """Let go of tables whose batches are made by now; tell of the next one, and the job it is of."""
        try:
            caught_up.set_result(next(it for it in enumerate(tables, 1) if it[0] >= made or over.is_set()))
        except BaseException as error:  # told to whoever asks for it
            caught_up.set_exception(error)

    caught_up: Future[tuple[int, pa.Table]] = Future()
    threading.Thread(target=catch_up, daemon=True).start()  # nobody who ends waits for it
    try:
        while made == 0 or (made < len(jobs) and not caught_up.done()):
            yield from make(jobs[made])
            made += 1
    finally:
        over.set()
    if made == len(jobs):
        return
    job, first = caught_up.result()
    for table in islice(chain([first], tables), made - job, None):  # one job may have been made meanwhile
        for row in range(len(table)):
            yield _from_table(table, row, len(feed.of.classes))


def _blocks(plan: Plan, workers: int) -> list[tuple[int, int]]:
    """First batch and the one after the last of each block; other epochs' batches differ little in size."""
    longest = np.maximum.reduceat(plan.length[plan.order], plan.bounds[:-1]) if len(plan.order) else np.zeros(1)
    ends = np.cumsum(4 * longest * np.diff(plan.bounds) / workers)
    firsts = np.flatnonzero(np.diff(ends // BLOCK_BYTES, prepend=-1)).tolist()
    return list(pairwise([*firsts, plan.num_batches]))


def _tables(
    jobs: list[dict[str, Any]], make: Callable[[dict[str, Any]], Iterator[Batch]], lost: Callable[[], Any]
) -> Generator[pa.Table, None, None]:
    """A table for each job, in their order, made by Ray Data's workers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=AHEAD_BYTES)
    context.enable_progress_bars = False
    callbacks: list[Any] = context.custom_execution_callback_classes
    if _Rest not in callbacks:
        callbacks.append(_Rest)

    def make_table(block: pa.Table) -> pa.Table:
        from ray._private import worker  # there is no public way to ask

        process: Any = worker.global_worker
        attempt = process.core_worker.get_current_task_attempt_number()
        table = _to_table(batch for job in block.to_pylist() for batch in make(job))
        return table.append_column(ATTEMPT, pa.array([attempt] * len(table), pa.int64()))

    dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        make_table,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        concurrency=DATA_TASKS,
        label_selector=here(),
        fallback_strategy=[{"label_selector": {}}],  # a node with notice to go takes no new tasks
    )
    tables: Iterator[Any] = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    for table in tables:
        if any(table[ATTEMPT].to_pylist()):
            lost()
        yield table


class _Rest:
    """Lets Ray Data's scheduling loop rest between its steps.

    It polls without pause while finished batches wait to be taken, and takes most of a core from the training step that
    they wait for. A rest is nothing beside a block of batches, and shorter while the training process waits for one.
    """

    SECONDS, WAITING_SECONDS = 0.05, 0.005
    waiting = False

    @classmethod
    def while_waiting(cls, tables: Generator[pa.Table, None, None]) -> Generator[pa.Table, None, None]:
        """The same tables; the loop is told while the next one is waited for."""
        with closing(tables):
            while True:
                cls.waiting = True
                table = next(tables, None)
                cls.waiting = False
                if table is None:
                    return
                yield table

    def before_execution_starts(self, executor: Any) -> None:  # Ray's private type
        """Nothing to prepare."""

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for a moment."""
        time.sleep(self.WAITING_SECONDS if self.waiting else self.SECONDS)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to clean up."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to clean up."""


def _to_table(batches: Iterable[Batch]) -> pa.Table:
    """Batches as rows of plain Arrow types; waveforms are not copied."""
    batches = list(batches)
    rows: list[dict[str, Any]] = [
        {
            "epoch": batch.epoch,
            "split": batch.split,
            "index": batch.index,
            "rows": batch.rows,
            "lengths": batch.lengths,
            "labels": batch.labels,
            "targets": batch.targets.ravel(),
        }
        for batch in batches
    ]
    waveforms = [_binary(batch.waveform) for batch in batches]
    return pa.Table.from_pylist(rows, _BATCH_SCHEMA).append_column("waveform", pa.chunked_array(waveforms))


def _binary(values: np.ndarray) -> pa.LargeBinaryArray:
    """The bytes of an array as the only cell of a column."""
    ends = np.array([0, values.nbytes], np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(values))]
    )


_BATCH_SCHEMA = pa.schema(
    [
        ("epoch", pa.int64()),
        ("split", pa.string()),
        ("index", pa.int64()),
        ("rows", pa.list_(pa.int64())),
        ("lengths", pa.list_(pa.int64())),
        ("labels", pa.list_(pa.int64())),
        ("targets", pa.list_(pa.float32())),
    ]
)


def _from_table(table: pa.Table, row: int, num_classes: int) -> Batch:
    cells = {name: table[name][row] for name in _BATCH_SCHEMA.names}
    rows = np.array(cells["rows"].as_py(), np.int64)
    (of_row,) = (chunk for chunk in table["waveform"].slice(row, 1).chunks if len(chunk))  # an element would be a copy
    _, ends, values = of_row.buffers()
    start, end = np.frombuffer(ends, np.int64)[of_row.offset :][:2].tolist()
    waveform = np.frombuffer(values.slice(start, end - start), np.float32)
    return Batch(
        epoch=cells["epoch"].as_py(),
        split=cells["split"].as_py(),
        index=cells["index"].as_py(),
        rows=rows,
        waveform=waveform.reshape(len(rows), -1) if len(rows) else waveform.reshape(0, 0),
        lengths=np.array(cells["lengths"].as_py(), np.int64),
        labels=np.array(cells["labels"].as_py(), np.int64),
        targets=np.array(cells["targets"].as_py(), np.float32).reshape(len(rows), num_classes),
    )
