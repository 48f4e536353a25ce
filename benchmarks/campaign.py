"""What a campaign costs beyond training: 24 cells on a cluster beside the same cells one by one in one process.

    python benchmarks/campaign.py [LANES ...]

Takes some minutes. The cells are 3 variants x 2 seeds x 4 folds of a small model on a synthetic corpus. "one process"
trains them with the same loop and the same files written, without Ray; its time begins when everything is imported.
"campaign" is all of `sermll run`: Ray's start, the lanes', the table, the page, the record in MLflow. `overhead` is the
campaign's time over the process's, less one. Both are measured in one run, one after the other.

The process computes with one thread, and so does every lane: one lane has what the process has, more lanes have more
cores. What is judged is what users get unless they say otherwise, all lanes that fit; one lane tells what Ray, the
table and the record cost where no second core makes up for it.
"""

import os
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import torch
import yaml

from sermll import campaign_page
from sermll.campaign import Campaign, Plan, load_campaign, run_campaign
from sermll.cluster import QUIET, connected, lanes_here
from sermll.config import Resources
from sermll.corpora import CORPORA
from sermll.feed import SPLITS, Batch, Feed, make_batch
from sermll.loop import train_fold
from sermll.prepare import prepare

EXPERIMENT = {
    "name": "bench",
    "model": {
        "encoder": {"kind": "logmel", "dim": 32, "mels": 40, "channels": 8},
        "pool": {"heads": 4},
        "embedding_dim": 16,
    },
    "optim": {"epochs": 10, "lr": 1e-3},
    "resources": {"gpus_per_worker": 0},
}
AXES = {
    "variant": {"eam": {}, "lam": {"mixup.kind": "lam"}, "mean": {"model.pool.kind": "mean"}},
    "seed": [0, 1],
    "fold": [0, 1, 2, 3],
}


MOST = 1.20
"""A campaign's wall clock over that of its cells one after another: no more than this with all lanes that fit."""


def in_process(feed: Feed, first_epoch: int, epochs: int, rank: int, workers: int) -> Generator[Batch, None, None]:
    """Batches made when they are asked for, by the process that trains."""
    for epoch in range(first_epoch, epochs):
        for split in SPLITS:
            for index in range(feed.plan(split, epoch).num_batches):
                yield make_batch(feed, split, epoch, index, rank, workers)


def one_process(campaign: Campaign) -> float:
    """Seconds of the cells one after another."""
    plan = Plan.of(campaign)
    began = time.perf_counter()
    for run in plan.runs:
        run.open()
        for job, data in run.unfinished:
            train_fold(job, data, in_process, torch.device("cpu"))
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each number of lanes."""
    os.environ.update(QUIET | {"RAY_worker_niceness": "0"})  # as the process that they are compared with
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic = CORPORA["synthetic"]
        assert synthetic.generate is not None
        synthetic.generate(folder / "audio")
        with connected():
            prepare(synthetic, folder / "audio", folder / "data")
        (folder / "x.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"data": {"path": str(folder / "data")}}))
        path = folder / "x.campaign.yaml"
        path.write_text(yaml.safe_dump({"name": "bench", "experiment": "x.yaml", "axes": AXES}, sort_keys=False))

        alone_s = one_process(load_campaign(path, {"tracking.runs": str(folder / "alone")}))
        sys.stdout.write(f"24 cells one after another in one process: {alone_s:.1f} s\n")
        all_that_fit = lanes_here(Resources(gpus_per_worker=0))
        sys.stdout.write(f"{os.cpu_count()} cores, one thread for the process and for each lane\n")
        for lanes in [int(word) for word in sys.argv[1:]] or sorted({1, all_that_fit or 1}):
            words = {"tracking.runs": str(folder / f"lanes-{lanes}"), "resources.parallel_folds": lanes}
            campaign = load_campaign(path, words)
            began = time.perf_counter()
            outcome = run_campaign(campaign, campaign_page.build)
            took_s = time.perf_counter() - began
            assert outcome.finished == outcome.cells == 24
            ratio = took_s / alone_s
            told = f"campaign, {lanes} at once: {took_s:.1f} s, overhead {ratio - 1:+.1%}"
            if lanes == all_that_fit:
                told += f" (the default here; at most {MOST - 1:+.0%}: {'met' if ratio <= MOST else 'not met'})"
            sys.stdout.write(f"{told}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
