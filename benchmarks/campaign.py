"""What a campaign costs beyond training: 24 cells on a cluster beside the same cells one by one in one process.

    python benchmarks/campaign.py [LANES ...]

Takes some minutes. The cells are 3 variants x 2 seeds x 4 folds of a small model on a synthetic corpus. "one process"
trains them with the same loop and the same files written, without Ray; its time begins when everything is imported.
"campaign" is all of `sermll run`: Ray's start, the lanes', the table, the page, the record in MLflow. `overhead` is the
campaign's time over the process's, less one. Both are measured in one run, one after the other.
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
from sermll.cluster import QUIET, connected
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
}
AXES = {
    "variant": {"eam": {}, "lam": {"mixup.kind": "lam"}, "mean": {"model.pool.kind": "mean"}},
    "seed": [0, 1],
    "fold": [0, 1, 2, 3],
}


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
        for lanes in [int(word) for word in sys.argv[1:]] or [1, 2]:
            words = {"tracking.runs": str(folder / f"lanes-{lanes}"), "resources.parallel_folds": lanes}
            campaign = load_campaign(path, words)
            began = time.perf_counter()
            outcome = run_campaign(campaign, campaign_page.build)
            took_s = time.perf_counter() - began
            assert outcome.finished == outcome.cells == 24
            ratio = f"overhead {took_s / alone_s - 1:+.1%}"
            sys.stdout.write(f"campaign, {lanes} at once: {took_s:.1f} s, {ratio}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
