"""The training loop of one fold, as each worker runs it: epoch by epoch, scored, checkpointed, resumable.

Nothing here knows of Ray: where batches come from is the caller's choice, and so is the number of processes.
"""

import copy
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sermll import checkpoint, config, metrics
from sermll.errors import SermllError, StorageError, TrainingError
from sermll.feed import Batch, Feed, FoldData
from sermll.files import read_json, whole, write_json
from sermll.job import FoldJob
from sermll.model import System
from sermll.optimizer import Adam, Step, make_optimizer, set_rates
from sermll.results import DEV_PREDICTIONS, LAST_PREDICTIONS, PREDICTIONS
from sermll.storage import address, fetch, names

RANDOM = "random"
"""In a checkpoint within an epoch: the states of the workers' generators."""
LOOK_EVERY = 16
"""Batches between two looks whether to leave: workers ask each other, which takes milliseconds."""


Batches = Callable[[Feed, int, int, int, int], Generator[Batch, None, None]]
"""(feed, first epoch, epochs, rank, workers) to the batches of every epoch, as `feed.stream` makes them."""


def train_fold(
    job: FoldJob,
    data: FoldData,
    batches: Batches,
    device: torch.device,
    rank: int = 0,
    workers: int = 1,
    stop: Callable[[list[dict[str, Any]]], bool] = lambda history: False,
    leave: Callable[[], bool] = lambda: False,
    encoder: nn.Module | None = None,
) -> list[str]:
    """Train a fold from its newest checkpoint to the end, as one of `workers` processes.

    `stop` is given the history after every epoch, by every worker; where it says so, the fold is left unfinished.
    `leave` is asked within epochs too, `LOOK_EVERY` batches apart; where it says so, to every worker, the fold is left
    at once, with a checkpoint from which as many workers go on as if nothing had been.
    `encoder` takes the place of the configured one, and reads what `batches` gives as waveforms.

    Returns:
        What was wrong with checkpoints that were passed over.

    Raises:
        TrainingError: a loss or gradient is not finite.
        CheckpointError: a checkpoint belongs to another run, or the chosen one is damaged.
        StorageError: what was trained cannot be written.
    """
    started = time.monotonic()
    settings = config.Experiment.model_validate(job.settings)
    feed = Feed.for_run(job.run, settings, data)
    num_classes = len(data.classes)
    _seed(settings.seed, job.fold)
    with agreed(device):  # a machine may lack the encoder's files, and nobody is to wait for it
        system = System(settings, num_classes, encoder).to(device)
        optimizer = make_optimizer(system, settings.optim)

    averaged = copy.deepcopy(system) if settings.optim.average else None
    for module in () if averaged is None else averaged.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # a copy's weights lie apart, and a GPU would join them at every call

    resumed, faults = _chosen(job, rank, device)
    with agreed(device):
        if rank == 0:
            _refuse_other_weights(job, system, resumed)
    history: list[dict[str, Any]] = []
    before_s = 0.0
    begun, random = Sums(), {}
    with agreed(device):
        if resumed is not None:
            resumed.load_into(system, "model" if averaged is None else "trained")
            if averaged is not None:
                resumed.load_into(averaged)
            optimizer.load_state_dict(resumed.optimizer())
            history = resumed.notes["history"]
            before_s = resumed.notes.get("wall_s", 0.0)  # an earlier version did not tell
            if "begun" in resumed.notes:  # it was left within the epoch after these
                begun, random = Sums.of(resumed.notes["begun"], device), resumed.tensors(RANDOM)
            if rank == 0:  # a kill may have come between the checkpoint and this file
                write_json(Path(job.folder) / "history.json", history)
    parallel = _parallel(system, device)
    ids = data.names["id"].to_pylist()
    modules = {"model": system} if averaged is None else {"model": averaged, "trained": system}

    def wall_s() -> float:
        return before_s + time.monotonic() - started

    average = None if averaged is None else Average(averaged, system, settings.optim.average)

    def step() -> Step:
        taken = Step(optimizer, settings.optim.clip_norm)
        if average is not None:
            average.move()
        return taken

    with closing(batches(feed, len(history), settings.optim.epochs, rank, workers)) as stream_of_batches:
        for epoch, phases in groupby(stream_of_batches, key=lambda batch: batch.epoch):
            # What is drawn inside the model (dropout, masks) depends on seed, fold, epoch and worker alone, so that a
            # resumed run continues as if it had not stopped.
            _seed(settings.seed, job.fold, epoch, rank)
            num_batches = feed.plan("train", epoch).num_batches
            rates = set_rates(optimizer.param_groups, settings.optim, epoch)
            row: dict[str, Any] = {
                "epoch": epoch,
                "workers": workers,
                **held_by_worker(settings.resources, device),
                **rates,
                "padding_share": feed.plan("train", epoch).padding_share(),
            }
            scored: dict[str, Scores] = {}
            for split, members in groupby(phases, key=lambda batch: batch.split):
                if split == "train":
                    if begun.batches:
                        _go_on(random, (settings.seed, job.fold, epoch, rank, begun.batches), rank, workers, device)
                    rest = islice(_timed(members), begun.batches, None)
                    sums = train_epoch(parallel, step, rest, device, ids, begun, leave)
                    if sums.batches < num_batches:
                        notes, states = sums.notes(), _random_states(device)
                        with agreed(device):
                            if rank == 0:
                                _keep_begun(job, modules, optimizer, history, notes, states, wall_s())
                        return faults
                    row |= sums.means()
                    begun = Sums()
                    continue
                began = time.perf_counter()
                scores = score(averaged or system, members, num_classes, device).gathered()
                scored[split] = scores
                row[f"{split}_confusion"] = metrics.confusion(scores.labels, scores.predicted, num_classes).tolist()
                row["eval_s"] = row.get("eval_s", 0.0) + time.perf_counter() - began
                if split == "dev":
                    counts = np.array(row["dev_confusion"])
                    row |= {"dev_loss": scores.loss(), "dev_ua": metrics.ua(counts), "dev_wa": metrics.wa(counts)}
                    row |= {name: float(row[name]) for name in ("dev_ua", "dev_wa")}
            history.append(row)
            with agreed(device):
                if rank == 0:
                    tables = {
                        name: predictions_table(job.fold, data, scored[split])
                        for name, split in ((PREDICTIONS, "test"), (DEV_PREDICTIONS, "dev"))
                    }
                    _keep(job, modules, optimizer, history, tables, wall_s())
            if stop(history) or leave():
                return faults
    with agreed(device):
        if rank == 0:
            _finish(job, wall_s())
    return faults


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """What some worker may be unable to do, with files mostly: all of them stop then, as no restart would mend that."""
    fault: SermllError | None = None
    try:
        yield
    except SermllError as error:
        fault = error
    except OSError as error:
        fault = StorageError(f"{error}; make room or mend the storage, and the same command goes on from here")
    told = [fault]
    if dist.is_initialized() and dist.get_world_size() > 1:
        first = torch.tensor(dist.get_rank() if fault is not None else dist.get_world_size(), device=device)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if int(first) < dist.get_world_size():
            dist.broadcast_object_list(told, int(first), device=device)
    if told[0] is not None:
        raise told[0]


def _chosen(job: FoldJob, rank: int, device: torch.device) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint that all workers go on from; the first chooses, since others may see a shared folder later."""
    told: list[Any] = [None, []]
    with agreed(device):
        if rank == 0:
            told = list(checkpoint.newest(job.checkpoints, job.run))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(told, device=device)
    resumed, faults = told
    with agreed(device):
        if rank > 0 and resumed is not None:
            resumed = checkpoint.seen(resumed)
    return resumed, faults


def _encoder_of(system: System) -> dict[str, str]:
    """The fingerprint of pre-trained weights, by its name in notes and results; the settings do not tell them."""
    fingerprint = getattr(system.recognizer.encoder, "fingerprint", None)
    return {"encoder": fingerprint} if fingerprint else {}


def _refuse_other_weights(job: FoldJob, system: System, resumed: checkpoint.Checkpoint | None) -> None:
    """Folds of a run share the weights they begin with: under a name there may be others by now."""
    mine, run = _encoder_of(system).get("encoder"), Path(job.folder).parent
    told = {} if resumed is None else {resumed.path: resumed.notes}
    for name in names(run) if mine else []:
        path = run / name / "result.json"
        if name.startswith("fold-"):
            fetch(path)
            told |= {path: read_json(path)} if path.exists() else {}
    for path, notes in told.items():
        if mine and notes.get("encoder", mine) != mine:
            raise TrainingError(
                f"{address(path)}: began with other weights of {job.settings['model']['encoder']['name']} "
                f"({notes['encoder'][:12]}) than there are now ({mine[:12]}); folds of a run share them: bring those "
                "back, or give the new ones a folder of another name"
            )


def _keep(
    job: FoldJob,
    modules: Mapping[str, System],
    optimizer: Adam,
    history: list[dict[str, Any]],
    tables: Mapping[str, pa.Table],
    wall_s: float,
) -> None:
    """Write the epoch's checkpoint and the history; keep the chosen epoch's checkpoint and the two latest.

    Should the latest be damaged, the one before it serves.
    """
    scores = selection_scores(job.settings["protocol"]["select"], history)
    latest = len(history) - 1
    with checkpoint.writing(job.checkpoints, latest) as folder:
        for name, table in tables.items():
            pq.write_table(table, folder / name)
        notes = {"run": job.run, "epoch": latest, "history": history, "wall_s": wall_s}
        notes |= _encoder_of(modules["model"])
        checkpoint.save(folder, modules, optimizer, notes)
    checkpoint.keep_only(job.checkpoints, {latest, latest - 1, int(np.argmax(scores))})
    write_json(Path(job.folder) / "history.json", history)


def _keep_begun(
    job: FoldJob,
    modules: Mapping[str, System],
    optimizer: Adam,
    history: list[dict[str, Any]],
    begun: dict[str, Any],
    states: dict[str, torch.Tensor],
    wall_s: float,
) -> None:
    """Write a checkpoint within the epoch after those of the history; the epoch's own takes its place later."""
    with checkpoint.writing(job.checkpoints, len(history)) as folder:
        notes = {"run": job.run, "epoch": len(history), "history": history, "wall_s": wall_s, "begun": begun}
        notes |= _encoder_of(modules["model"])
        checkpoint.save(folder, modules, optimizer, notes, {RANDOM: states})


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of all workers' generators, by kind and rank."""
    mine = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    parts = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        received: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(received, mine)
        parts = received
    return {f"{kind}.{rank}": state for rank, part in enumerate(parts) for kind, state in part.items()}


def _go_on(
    states: Mapping[str, torch.Tensor], key: tuple[int, ...], rank: int, workers: int, device: torch.device
) -> None:
    """Take up this worker's generators where they were left; seed them by `key` where workers were others."""
    _seed(*key)
    if sum(name.startswith("cpu.") for name in states) == workers:
        torch.set_rng_state(states[f"cpu.{rank}"])
        if device.type == "cuda" and f"cuda.{rank}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{rank}"], device)


def _finish(job: FoldJob, wall_s: float) -> None:
    """Take the predictions of the chosen and of the last epoch out of their checkpoints; write result.json last.

    `wall_s` is that of all attempts, each as far as its checkpoints got.
    """
    folder, history = Path(job.folder), job.history()
    best = int(np.argmax(selection_scores(job.settings["protocol"]["select"], history)))
    chosen, last = (checkpoint.of_epoch(job.checkpoints, epoch) for epoch in (best, len(history) - 1))
    parts = ((chosen, PREDICTIONS, PREDICTIONS), (chosen, DEV_PREDICTIONS, DEV_PREDICTIONS))
    for taken, name, target in (*parts, (last, PREDICTIONS, LAST_PREDICTIONS)):
        with whole(folder / target) as partial:
            shutil.copyfile(taken.path / name, partial)
    result = {
        "fold": job.fold,
        "epochs": len(history),
        "best_epoch": best,
        "best_checkpoint": f"checkpoints/{chosen.path.name}",
        "last_checkpoint": f"checkpoints/{last.path.name}",
        "seconds": round(sum(row["train_s"] + row["eval_s"] for row in history), 1),
        "wall_s": round(wall_s, 1),
        **{name: chosen.notes[name] for name in ("encoder",) if name in chosen.notes},
    }
    write_json(folder / "result.json", result)


def held_by_worker(resources: config.Resources, device: torch.device) -> dict[str, Any]:
    """What each worker holds, by history column: what an epoch costs is told by it."""
    gpus = float(device.type == "cuda") if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
    return {"device": device.type, "cpus_per_worker": resources.cpus_per_worker, "gpus_per_worker": gpus}


def selection_scores(rule: str, history: list[dict[str, Any]]) -> list[float]:
    """What each epoch is chosen by, the highest wins: dev UA, minus the dev loss, or the number of the epoch."""
    return [
        float({"dev_ua": row["dev_ua"], "dev_loss": -row["dev_loss"], "last": row["epoch"]}[rule]) for row in history
    ]


def train_epoch(
    system: nn.Module,
    step: Callable[[], Step],
    batches: Iterator[tuple[Batch, float]],
    device: torch.device,
    ids: list[str],
    begun: "Sums | None" = None,
    leave: Callable[[], bool] = lambda: False,
) -> "Sums":
    """One pass over the training set, or the rest of one.

    Args:
        system: the system, possibly wrapped for data-parallel training.
        step: called after every batch, when the gradients are there.
        batches: this worker's shares, each with the seconds it was waited for.
        device: where the system lies.
        ids: utterance id by row, for the error message.
        begun: what batches before these have added up.
        leave: asked between batches, `LOOK_EVERY` apart; the pass ends where it says so.

    Returns:
        What all batches so far have added up.

    Raises:
        TrainingError: a loss or gradient is not finite; names the batch's utterances. Weights are those before it.
    """
    system.train()
    sums, started = copy.deepcopy(begun or Sums()), time.perf_counter()
    first = sums.batches
    unread: tuple[Batch, dict[str, torch.Tensor], Step] | None = None
    for batch, wait_s in batches:
        if batch.index > first and batch.index % LOOK_EVERY == 0 and leave():
            break
        waveform, lengths, target = to_device(batch, device)
        terms = system(waveform, lengths, target)
        terms["loss"].backward()
        if unread is not None:  # here, where the device has this batch to work on meanwhile
            _refuse_unless_taken(*unread, ids)
        taken = step()
        values = {name: value.detach() for name, value in {**terms, "grad_norm": taken.norm}.items()}
        for name, value in values.items():
            sums.terms[name] = sums.terms[name] + value if name in sums.terms else value
        sums.batches, sums.rows, sums.waited_s = sums.batches + 1, sums.rows + len(target), sums.waited_s + wait_s
        unread = (batch, values, taken)
    if unread is not None:
        _refuse_unless_taken(*unread, ids)
    sums.train_s += time.perf_counter() - started
    return sums


@dataclass
class Sums:
    """What the batches of an epoch have added up, on one worker."""

    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    """Loss terms, their weights and the gradient norm."""
    batches: int = 0
    rows: int = 0
    waited_s: float = 0.0
    train_s: float = 0.0

    def means(self) -> dict[str, float]:
        """Means over batches and workers, by history column; speed."""
        means = {name: _mean_over_workers(total) / self.batches for name, total in self.terms.items()}
        named = {name if name == "grad_norm" else _column(name): value for name, value in means.items()}
        return named | {
            "train_s": self.train_s,
            "utterances_per_s": self.rows / self.train_s,
            "data_wait_share": self.waited_s / self.train_s,
        }

    def notes(self) -> dict[str, Any]:
        """As JSON; the terms are means over workers, of which there may be another number later."""
        return vars(self) | {"terms": {name: _mean_over_workers(total) for name, total in self.terms.items()}}

    @classmethod
    def of(cls, notes: dict[str, Any], device: torch.device) -> "Sums":
        """Take up what `notes` gave."""
        terms = {name: torch.tensor(total, device=device) for name, total in notes["terms"].items()}
        return cls(**{**notes, "terms": terms})


class Average:
    """Weights averaged over steps: each step moves them to keep * averaged + (1 - keep) * trained.

    That steadies the scores from epoch to epoch, and with them the choice on a small dev set (Polyak averaging;
    Izmailov et al., UAI 2018). Every worker does the same to the same weights.
    """

    def __init__(self, averaged: nn.Module, trained: nn.Module, keep: float) -> None:
        """Both modules keep their tensors from here on."""
        pairs = list(zip(averaged.state_dict().values(), trained.state_dict().values(), strict=True))
        self._held, self._new = ([pair[at] for pair in pairs if pair[0].is_floating_point()] for at in (0, 1))
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._share = 1 - keep

    @torch.no_grad()
    def move(self) -> None:
        """Take in the weights after a step."""
        torch._foreach_lerp_(self._held, self._new, self._share)  # pyright: ignore[reportPrivateImportUsage]
        for held, new in self._copied:
            held.copy_(new)


def _mean_over_workers(value: torch.Tensor) -> float:
    """Workers have equal values, unless `losses.gather` is off."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return float(value)


def _column(term: str) -> str:
    """History column of an objective's term."""
    return term if term == "loss" or term.startswith("weight_") else f"loss_{term}"


def _refuse_unless_taken(batch: Batch, values: dict[str, torch.Tensor], step: Step, ids: list[str]) -> None:
    """The gradient is the same on every worker, and never finite when the loss is not."""
    if step.taken():
        return
    told = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
    raise TrainingError(
        f"epoch {batch.epoch + 1}, batch {batch.index + 1}: {told}. The batch holds "
        f"{', '.join(ids[row] for row in batch.rows)}. Lower optim.lr, or look at these recordings"
    )


@dataclass(frozen=True)
class Scores:
    """Outputs for some utterances, each exactly once."""

    rows: np.ndarray
    """int64 (utterances,)"""
    labels: np.ndarray
    """int64 (utterances,)"""
    logits: np.ndarray
    """float32 (utterances, classes)"""
    embeddings: np.ndarray
    """float32 (utterances, embedding_dim)"""

    @classmethod
    def empty(cls, num_classes: int, embedding_dim: int) -> "Scores":
        """Scores of nobody."""
        nobody = np.zeros(0, np.int64)
        return cls(nobody, nobody, np.zeros((0, num_classes), np.float32), np.zeros((0, embedding_dim), np.float32))

    @property
    def predicted(self) -> np.ndarray:
        """int64 (utterances,): most probable class."""
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (utterances, classes), rows sum to 1."""
        exponents = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    def loss(self) -> float:
        """Mean cross-entropy of the labels, in nats."""
        chosen = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(chosen, 1e-30)).mean())

    def gathered(self) -> "Scores":
        """The scores of all workers, ordered by row."""
        parts = [self]
        if dist.is_initialized() and dist.get_world_size() > 1:
            received: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(received, self)
            parts = received
        fields = ("rows", "labels", "logits", "embeddings")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
        order = np.argsort(joined["rows"], kind="stable")
        assert len(np.unique(joined["rows"])) == len(order), "an utterance was scored twice"
        return Scores(**{name: values[order] for name, values in joined.items()})


@torch.no_grad()
def score(system: System, batches: Iterator[Batch], num_classes: int, device: torch.device) -> Scores:
    """Run the recogniser over this worker's share of a split."""
    system.eval()
    given: list[tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        if len(batch.rows) == 0:  # fewer utterances than workers in the last batch
            continue
        waveform, lengths, _ = to_device(batch, device)
        output = system.recognize(waveform, lengths)
        given.append((batch.rows, batch.labels, output.logits, output.embedding))
    scored = [Scores.empty(num_classes, system.recognizer.project.out_features)]
    for rows, labels, *outputs in given:  # only now, since a GPU is waited for, which had the next batch to go on to
        scored.append(Scores(rows, labels, *(output.cpu().numpy() for output in outputs)))
    fields = ("rows", "labels", "logits", "embeddings")
    return Scores(*(np.concatenate([getattr(part, name) for part in scored]) for name in fields))


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Waveform, lengths and targets as tensors on the device.

    The waveform's memory belongs to Ray and is copied, for a GPU into pinned memory: other memory is not sent beside
    the computation.
    """
    waveform = torch.empty(batch.waveform.shape, pin_memory=device.type == "cuda")
    np.copyto(waveform.numpy(), batch.waveform)
    return (
        waveform.to(device, non_blocking=True),
        torch.from_numpy(batch.lengths).to(device, non_blocking=True),
        torch.from_numpy(batch.targets).to(device, non_blocking=True),
    )


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds it was waited for."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def _parallel(system: System, device: torch.device) -> nn.Module:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return system
    # Buffers are all workers' already: running averages are made of all workers' utterances.
    return DistributedDataParallel(
        system, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )


def _seed(*key: int) -> None:
    """Seed torch's generators, which initial weights and layers such as dropout draw from, by a key."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def predictions_table(fold: int, data: FoldData, scores: Scores) -> pa.Table:
    """One row per utterance: utterance, speaker, corpus, fold, label, predicted, probabilities, embedding."""
    names = data.names.take(scores.rows)
    return pa.table(
        {
            "utterance": names["id"],
            "speaker": names["speaker"],
            "corpus": names["corpus"],
            "fold": pa.array([fold] * len(scores.rows), pa.int32()),
            "label": [data.classes[label] for label in scores.labels],
            "predicted": [data.classes[label] for label in scores.predicted],
            "probabilities": pa.array(list(scores.probabilities), pa.list_(pa.float64())),
            "embedding": pa.array(list(scores.embeddings), pa.list_(pa.float32())),
        }
    )
