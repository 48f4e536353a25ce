"""The training loop of one fold, as each worker runs it: epoch by epoch, scored, checkpointed, resumable.

Nothing here knows of Ray: where batches come from is the caller's choice, and so is the number of processes.
"""

import copy
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
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
from sermll.errors import TrainingError
from sermll.feed import Batch, Feed, FoldData
from sermll.files import read_json, write_json
from sermll.model import System
from sermll.results import DEV_PREDICTIONS, LAST_PREDICTIONS, PREDICTIONS


@dataclass(frozen=True, eq=False)
class FoldJob:
    """Everything that training a fold of a run needs, but for the utterances."""

    run: str
    """Run id and fold: what a checkpoint must say to be resumed."""
    title: str
    """What the fold is called where its progress is told."""
    settings: dict[str, Any]
    """The resolved experiment as JSON."""
    fold: int
    folder: str
    """The fold's folder, absolute, on storage that all workers share."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the fold's checkpoints."""
        return Path(self.folder) / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (Path(self.folder) / "result.json").exists()

    @property
    def history_bytes(self) -> int:
        """Size of the history's file; 0: there is none."""
        path = Path(self.folder) / "history.json"
        return path.stat().st_size if path.exists() else 0

    def history(self) -> list[dict[str, Any]]:
        """What each finished epoch gave."""
        path = Path(self.folder) / "history.json"
        return read_json(path) if path.exists() else []


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
    encoder: nn.Module | None = None,
) -> list[str]:
    """Train a fold from its newest checkpoint to the end, as one of `workers` processes.

    `stop` is given the history after every epoch, by every worker; where it says so, the fold is left unfinished.
    `encoder` takes the place of the configured one, and reads what `batches` gives as waveforms.

    Returns:
        What was wrong with checkpoints that were passed over.

    Raises:
        TrainingError: a loss or gradient is not finite.
        CheckpointError: a checkpoint belongs to another run, or the chosen one is damaged.
    """
    started = time.monotonic()
    settings = config.Experiment.model_validate(job.settings)
    feed = Feed.for_run(job.run, settings, data)
    num_classes = len(data.classes)
    _seed(settings.seed, job.fold)
    system = System(settings, num_classes, encoder).to(device)
    optimizer = make_optimizer(system, settings.optim)

    averaged = copy.deepcopy(system) if settings.optim.average else None

    resumed, faults = checkpoint.newest(job.checkpoints, job.run)
    history: list[dict[str, Any]] = []
    if resumed is not None:
        resumed.load_into(system, "model" if averaged is None else "trained")
        if averaged is not None:
            resumed.load_into(averaged)
        optimizer.load_state_dict(resumed.optimizer())
        history = resumed.notes["history"]
        if rank == 0:  # a kill may have come between the checkpoint and this file
            write_json(Path(job.folder) / "history.json", history)
    parallel = _parallel(system, device)
    ids = data.names["id"].to_pylist()

    def step() -> None:
        optimizer.step()
        if averaged is not None:
            average(averaged, system, settings.optim.average)

    with closing(batches(feed, len(history), settings.optim.epochs, rank, workers)) as stream_of_batches:
        for epoch, phases in groupby(stream_of_batches, key=lambda batch: batch.epoch):
            # What is drawn inside the model (dropout, masks) depends on seed, fold, epoch and worker alone, so that a
            # resumed run continues as if it had not stopped.
            _seed(settings.seed, job.fold, epoch, rank)
            rates = set_rates(optimizer, settings.optim, epoch)
            row: dict[str, Any] = {"epoch": epoch, **rates, "padding_share": feed.plan("train", epoch).padding_share()}
            scored: dict[str, Scores] = {}
            for split, members in groupby(phases, key=lambda batch: batch.split):
                if split == "train":
                    row |= train_epoch(parallel, step, _timed(members), settings.optim.clip_norm, device, ids)
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
            if rank == 0:
                modules = {"model": system} if averaged is None else {"model": averaged, "trained": system}
                tables = {
                    name: predictions_table(job.fold, data, scored[split])
                    for name, split in ((PREDICTIONS, "test"), (DEV_PREDICTIONS, "dev"))
                }
                _keep(job, modules, optimizer, history, tables)
            if stop(history):
                return faults
    if rank == 0:
        _finish(job, time.monotonic() - started)
    return faults


def _keep(
    job: FoldJob,
    modules: Mapping[str, System],
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    tables: Mapping[str, pa.Table],
) -> None:
    """Write the epoch's checkpoint and the history; keep the chosen epoch's checkpoint and the two latest.

    Should the latest be damaged, the one before it serves.
    """
    scores = selection_scores(job.settings["protocol"]["select"], history)
    latest = len(history) - 1
    with checkpoint.writing(job.checkpoints, latest) as folder:
        for name, table in tables.items():
            pq.write_table(table, folder / name)
        checkpoint.save(folder, modules, optimizer, {"run": job.run, "epoch": latest, "history": history})
    checkpoint.keep_only(job.checkpoints, {latest, latest - 1, int(np.argmax(scores))})
    write_json(Path(job.folder) / "history.json", history)


def _finish(job: FoldJob, seconds: float) -> None:
    """Take the predictions of the chosen and of the last epoch out of their checkpoints; write result.json last."""
    folder, history = Path(job.folder), job.history()
    best = int(np.argmax(selection_scores(job.settings["protocol"]["select"], history)))
    chosen, last = (checkpoint.of_epoch(job.checkpoints, epoch) for epoch in (best, len(history) - 1))
    shutil.copyfile(chosen.path / PREDICTIONS, folder / PREDICTIONS)
    shutil.copyfile(chosen.path / DEV_PREDICTIONS, folder / DEV_PREDICTIONS)
    shutil.copyfile(last.path / PREDICTIONS, folder / LAST_PREDICTIONS)
    result = {
        "fold": job.fold,
        "epochs": len(history),
        "best_epoch": best,
        "best_checkpoint": f"checkpoints/{chosen.path.name}",
        "last_checkpoint": f"checkpoints/{last.path.name}",
        "seconds": round(sum(row["train_s"] + row["eval_s"] for row in history), 1),
        "wall_s": round(seconds, 1),
    }
    write_json(folder / "result.json", result)


def selection_scores(rule: str, history: list[dict[str, Any]]) -> list[float]:
    """What each epoch is chosen by, the highest wins: dev UA, minus the dev loss, or the number of the epoch."""
    return [
        float({"dev_ua": row["dev_ua"], "dev_loss": -row["dev_loss"], "last": row["epoch"]}[rule]) for row in history
    ]


def make_optimizer(system: System, optim: config.Optim) -> torch.optim.Optimizer:
    """Adam with the paper's two groups: the model, and the class centers at their own rate."""
    model = [parameter for parameter in system.recognizer.parameters() if parameter.requires_grad]
    centers = list(system.objective.parameters())
    groups: list[dict[str, Any]] = [{"params": model, "lr": optim.lr, "weight_decay": optim.weight_decay}]
    if centers:
        groups.append({"params": centers, "lr": optim.center_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, optim: config.Optim, epoch: int) -> dict[str, float]:
    """Set the learning rates of an epoch: each epoch multiplies them by `decay`, until `decay_epochs`."""
    factor = optim.decay ** min(epoch, optim.decay_epochs)
    rates = {"lr": optim.lr * factor, "center_lr": optim.center_lr * factor}
    for group, rate in zip(optimizer.param_groups, rates.values(), strict=False):  # no center group: one rate less
        group["lr"] = rate
    return dict(list(rates.items())[: len(optimizer.param_groups)])


def train_epoch(
    system: nn.Module,
    step: Callable[[], None],
    batches: Iterator[tuple[Batch, float]],
    clip_norm: float,
    device: torch.device,
    ids: list[str],
) -> dict[str, float]:
    """One pass over the training set.

    Args:
        system: the system, possibly wrapped for data-parallel training.
        step: called after every batch, when the gradients are there.
        batches: this worker's shares, each with the seconds it was waited for.
        clip_norm: largest norm of the gradient.
        device: where the system lies.
        ids: utterance id by row, for the error message.

    Returns:
        Means over batches of the loss terms, their weights and the gradient norm; speed.

    Raises:
        TrainingError: a loss or gradient is not finite; names the batch's utterances.
    """
    system.train()
    sums: dict[str, torch.Tensor] = {}
    num_batches, num_rows, waited_s, started = 0, 0, 0.0, time.perf_counter()
    for batch, wait_s in batches:
        waveform, lengths, target = to_device(batch, device)
        terms = system(waveform, lengths, target)
        system.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(system.parameters(), clip_norm)
        if not torch.isfinite(norm):  # the same on every worker, and never finite when the loss is not
            _refuse(batch, {**terms, "grad_norm": norm}, ids)
        step()
        for name, value in {**terms, "grad_norm": norm}.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
        num_batches, num_rows, waited_s = num_batches + 1, num_rows + len(target), waited_s + wait_s
    train_s = time.perf_counter() - started
    means = {name: _mean_over_workers(total) / num_batches for name, total in sums.items()}
    named = {name if name == "grad_norm" else _column(name): value for name, value in means.items()}
    return named | {
        "train_s": train_s,
        "utterances_per_s": num_rows / train_s,
        "data_wait_share": waited_s / train_s,
    }


@torch.no_grad()
def average(averaged: nn.Module, trained: nn.Module, keep: float) -> None:
    """Move the averaged weights towards the trained ones: keep * averaged + (1 - keep) * trained.

    Averaging over steps steadies the scores from epoch to epoch, and with them the choice on a small dev set (Polyak
    averaging; Izmailov et al., UAI 2018). Every worker does the same to the same weights.
    """
    for held, new in zip(averaged.state_dict().values(), trained.state_dict().values(), strict=True):
        if held.is_floating_point():
            held.lerp_(new, 1 - keep)
        else:
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


def _refuse(batch: Batch, terms: dict[str, torch.Tensor], ids: list[str]) -> None:
    values = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
    raise TrainingError(
        f"epoch {batch.epoch + 1}, batch {batch.index + 1}: {values}. The batch holds "
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
    scored = [Scores.empty(num_classes, system.recognizer.project.out_features)]
    for batch in batches:
        if len(batch.rows) == 0:  # fewer utterances than workers in the last batch
            continue
        waveform, lengths, _ = to_device(batch, device)
        output = system.recognize(waveform, lengths)
        scored.append(
            Scores(
                rows=batch.rows,
                labels=batch.labels,
                logits=output.logits.cpu().numpy(),
                embeddings=output.embedding.cpu().numpy(),
            )
        )
    fields = ("rows", "labels", "logits", "embeddings")
    return Scores(*(np.concatenate([getattr(part, name) for part in scored]) for name in fields))


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Waveform, lengths and targets as tensors on the device; the waveform's memory belongs to Ray and is copied."""
    return (
        torch.tensor(batch.waveform).to(device, non_blocking=True),
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
    return DistributedDataParallel(system, device_ids=[device] if device.type == "cuda" else None)


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
