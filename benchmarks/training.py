"""What Ray costs a run: an epoch beside a bare loop, two workers beside one, and the way to the first step.

    python benchmarks/training.py

About seven minutes on two cores. The model is that of `logmel` with all four losses, batches of 16 noise utterances of
up to 3 s; without dropout and masks, which every worker draws for itself, since losses are compared. The bare loop is
given the same batches, in memory, and takes the same steps: forward, losses, backward, clipping, Adam, then scores of
dev and test. It ends with the same loss, as two workers do within rounding. Under Ray Train epochs after the first are
counted, as their own history tells them.

To the first step: a script that imports torch and the model and takes one step on data in memory; `sermll train` with
a cluster of its own; and the same on a cluster that is up; beside both, how long Ray Train takes to begin a function
that does nothing. Both trainings have one batch in an epoch, and the first
step counts as done when the first epoch's history is there, less the scoring in it.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from noise import recordings, write_fold
from side_by_side import Row, Target, alone, compared, in_turns
from torch import nn

from sermll import loop
from sermll.cluster import QUIET, connected
from sermll.config import Experiment
from sermll.feed import SPLITS, Feed, FoldData, make_batch
from sermll.job import FoldJob
from sermll.model import System
from sermll.optimizer import make_optimizer, set_rates
from sermll.schedule import train_jobs

UTTERANCES, SCORED, EPOCHS, ROUNDS, STARTS = 192, 32, 3, 6, 3
CPU = torch.device("cpu")
NAMES = {"cold": "with a cluster of its own", "warm": "on a cluster that is up"}
ALONE = QUIET | {"RAY_worker_niceness": "0"}
"""Ray's processes run as what they are compared with."""


def experiment(folder: Path, workers: int = 1) -> Experiment:
    """The settings of a run of noise."""
    return Experiment.model_validate(
        {
            "name": "bench",
            "data": {"path": str(folder), "crop_s": 3.0},
            "model": {"encoder": {"kind": "logmel", "dropout": 0, "spec_augment": False}},
            "optim": {"epochs": EPOCHS, "lr": 1e-3},
            "resources": {"workers": workers, "parallel_folds": 1},
            "tracking": {"runs": str(folder), "mlflow": False},
        }
    )


def under_ray(folder: Path, fold: FoldData, workers: int) -> list[dict[str, Any]]:
    """History of a run whose workers Ray Train starts."""
    shutil.rmtree(folder / "fold", ignore_errors=True)
    settings = experiment(folder, workers)
    job = FoldJob("bench", "bench", settings.model_dump(mode="json"), 0, str(folder / "fold"))
    failures = train_jobs([(job, fold)], "bench", folder, lambda *_: None)
    assert not failures, failures
    return job.history()


def bare(settings: Experiment, fold: FoldData) -> list[tuple[float, float]]:
    """Mean loss and seconds of each epoch; batches are made before the clock runs."""
    feed = Feed.for_run("bare", settings, fold)
    loop._seed(settings.seed, 0)
    system = System(settings, len(fold.classes))
    groups = make_optimizer(system, settings.optim).param_groups  # the centers have a rate of their own
    optimizer = torch.optim.AdamW(groups, fused=True)
    told = []
    for epoch in range(settings.optim.epochs):
        batches = {
            split: [make_batch(feed, split, epoch, index) for index in range(feed.plan(split, epoch).num_batches)]
            for split in SPLITS
        }
        loop._seed(settings.seed, 0, epoch, 0)
        set_rates(optimizer.param_groups, settings.optim, epoch)
        began, losses = time.perf_counter(), []
        system.train()
        for batch in batches["train"]:
            waveform, lengths, target = (
                torch.from_numpy(values) for values in (batch.waveform, batch.lengths, batch.targets)
            )
            loss = system(waveform, lengths, target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(system.parameters(), settings.optim.clip_norm)
            optimizer.step()
            losses.append(loss.detach())
        system.eval()
        with torch.no_grad():
            for batch in (*batches["dev"], *batches["test"]):
                system.recognize(torch.from_numpy(batch.waveform), torch.from_numpy(batch.lengths))
        told.append((float(torch.stack(losses).mean()), time.perf_counter() - began))
    return told


def epochs(folder: Path, fold: FoldData) -> Iterator[Row]:
    """Steady epochs: bare, one worker, two workers."""
    settings = experiment(folder)
    losses: dict[str, float] = {}
    waits: list[float] = []

    def bare_s() -> float:
        told = bare(settings, fold)
        losses["bare"] = told[-1][0]
        return statistics.median(seconds for _, seconds in told[1:])

    def ray_s(workers: int) -> float:
        history = under_ray(folder, fold, workers)
        losses[f"{workers}"] = history[-1]["loss"]
        if workers == 1:
            waits.append(history[-1]["data_wait_share"])
        return statistics.median(row["train_s"] + row["eval_s"] for row in history[1:])

    with connected():
        ways = {"bare": bare_s, "one": lambda: ray_s(1), "two": lambda: ray_s(2)}
        found = in_turns(ways, ROUNDS, warm_up=0)
    apart = {name: abs(loss / losses["bare"] - 1) for name, loss in losses.items()}
    assert apart["1"] < 1e-5, f"one worker did not do the same: {losses}"
    yield replace(
        compared(
            found,
            "one",
            "bare",
            "ours / peer",
            name="one epoch under Ray Train, 1 worker",
            unit="s",
            against="a bare PyTorch loop, batches in memory",
            target=Target("<=", 1.05),
        ),
        note=f"Loss after {EPOCHS} epochs is the same to {apart['1']:.0e}; data were waited for during "
        f"{100 * statistics.median(waits):.1f} % of the time.",
    )
    assert apart["2"] < 1e-3, f"two workers did not do the same: {losses}"
    feed = Feed.for_run("bare", settings, fold)
    yield replace(
        compared(
            found,
            "two",
            "one",
            "peer / ours",
            name="an epoch, 2 workers beside 1",
            unit="s",
            against="1 worker, the same global batch",
        ),
        limit="2 on two cores that do nothing else; making batches and Ray's own work need a part of them.",
        note=f"Loss is the same to {apart['2']:.0e}. Every step is taken by both ranks, and at an epoch's end the "
        f"lighter one has had {100 * imbalance(feed):.1f} % less audio to go through.",
    )


def imbalance(feed: Feed) -> float:
    """Mean over an epoch's steps of what the lighter of two ranks lacks of the other's padded audio."""
    lacks = []
    plan = feed.plan("train", 0)
    for index in range(plan.num_batches):
        sizes = []
        for rank in range(2):
            lengths = plan.length[plan.batch(index, rank, 2)]
            sizes.append(len(lengths) * lengths.max())
        lacks.append(1 - min(sizes) / max(sizes))
    return float(np.mean(lacks))


BARE_SCRIPT = """
import time
import torch
from sermll.config import Experiment
from sermll.model import System
settings = Experiment.model_validate({"name": "x", "data": {"path": "x"}, "model": {"encoder": {"kind": "logmel"}}})
system = System(settings, 4)
optimizer = torch.optim.AdamW(system.parameters(), fused=True)
target = torch.eye(4)[torch.arange(16) % 4]
system(torch.randn(16, 24_000), torch.full((16,), 24_000), target)["loss"].backward()
optimizer.step()
print(time.time())
"""


EMPTY_SCRIPT = """
import sys
import time
import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
path = sys.argv[1]
ray.init(log_to_driver=False, logging_level="ERROR")
def begun():
    with open(path + "/begun", "w") as file:
        file.write(str(time.time()))
scaling = ray.train.ScalingConfig(num_workers=1)
kept = ray.train.RunConfig(storage_path=path, logging_config=ray.train.LoggingConfig(log_level="ERROR"))
DataParallelTrainer(begun, scaling_config=scaling, run_config=kept).fit()
"""
"""Ray Train with nothing to train: no torch, no data, no model."""


def small_run(folder: Path) -> Path:
    """An experiment with a batch an epoch: three speakers, of whom each side of the split has one."""
    audio = folder / "audio"
    audio.mkdir()
    rng = np.random.default_rng(0)
    lines = ["path,label,speaker"]
    for speaker in "abc":
        for number in range(16):
            name = f"{speaker}{number}.wav"
            soundfile.write(audio / name, rng.normal(0, 0.1, 24_000), 16_000)
            lines.append(f"{name},{'xy'[number % 2]},{speaker}")
    (audio / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["prepare", "manifest", "--root", str(audio / "manifest.csv"), "--out", str(folder / "small")]
    subprocess.run([sys.executable, "-m", "sermll", *command], check=True, capture_output=True)
    settings = {
        "name": "start",
        "fold": 0,
        "data": {"path": str(folder / "small")},
        "model": {"encoder": {"kind": "logmel"}},
        "optim": {"epochs": 1},
        "resources": {"gpus_per_worker": 0},  # as the script, also where there is one
    }
    path = folder / "start.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def to_first_step(path: Path, runs: Path) -> float:
    """Seconds from the command to its first step."""
    shutil.rmtree(runs, ignore_errors=True)
    began = time.time()
    command = [sys.executable, "-m", "sermll", "train", str(path), f"tracking.runs={runs}", "tracking.mlflow=off"]
    subprocess.run(command, check=True, capture_output=True)
    (history,) = runs.glob("*/fold-0/history.json")
    return history.stat().st_mtime - json.loads(history.read_text(encoding="utf-8"))[0]["eval_s"] - began


def start_up(folder: Path, bars_s: Mapping[str, float]) -> Iterator[Row]:
    """The way to the first step: bare, with a cluster to start (cold), on one that is up (warm).

    Args:
        folder: to work in.
        bars_s: cold, warm or both, and how long each may take.
    """
    os.environ.update(ALONE)
    path = small_run(folder)

    def script() -> float:
        began = time.time()
        done = subprocess.run([sys.executable, "-c", BARE_SCRIPT], check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1]) - began

    def empty(name: str) -> float:
        there = folder / name
        there.mkdir(exist_ok=True)
        began = time.time()
        subprocess.run([sys.executable, "-c", EMPTY_SCRIPT, str(there)], check=True, capture_output=True)
        return float((there / "begun").read_text(encoding="utf-8")) - began

    def ways(name: str) -> dict[str, Callable[[], float]]:
        return {name: lambda: to_first_step(path, folder / name), f"empty {name}": lambda: empty(f"empty-{name}")}

    found = in_turns({"bare": script, **(ways("cold") if "cold" in bars_s else {})}, STARTS, warm_up=1)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"  # as on a cluster that others have started
    with connected():
        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        try:
            found |= in_turns(ways("warm"), STARTS, warm_up=1)
        finally:
            del os.environ["RAY_ADDRESS"], os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
    for way, most_s in bars_s.items():
        row = compared(
            found,
            way,
            "bare",
            "ours / peer",
            name=f"start-up to first step, {NAMES[way]}",
            unit="s",
            against="a script that imports torch and the model",
            target=Target("<=", most_s, of="ours"),
        )
        floor_s = statistics.median(found[f"empty {way}"])
        limit = f"Ray Train begins a function that does nothing, with no torch, after {floor_s:.1f} s"
        limit += f", on {os.cpu_count()} CPUs."
        yield replace(row, limit=limit)


def rows() -> Iterator[Row]:
    """Epochs, then start-up."""
    os.environ.update(ALONE)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from start_up(folder, {"cold": 12, "warm": 5})
        yield from epochs(folder, write_fold(folder, recordings(UTTERANCES + SCORED), SCORED))


if __name__ == "__main__":
    alone(rows)
