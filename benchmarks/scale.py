"""How time, memory and bytes grow with utterances, cells and trials; and what lost machines cost a large campaign.

    python benchmarks/scale.py [data] [cells] [mlflow] [study] [simulate] [--most N] [--out FILE]

Without a word all parts, half an hour of one core. `data`: tables of 1e3 to 1e6 utterances without audio, opened,
divided, checked for leaks, made into a fold. `cells`: campaigns of 10 to 10 000 cells, planned; their results are links
to those of one cell that was trained. `mlflow`: what a finished run costs a SQLite store. `study`: trials without
training. `simulate`: 10 000 folds on 64 GPUs that are lost and come back; nothing is run. Seconds are those of the
processor, which other work on the machine changes little; waiting for disks is not in them. Every number is printed as
it is found, and all are written as JSON. `--most` leaves out what is larger.
"""

import argparse
import hashlib
import heapq
import json
import logging
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from campaign import EXPERIMENT, in_process

from sermll import campaign_page, config, results, schedule, store, tally
from sermll.campaign import Plan, load_campaign
from sermll.corpora import CORPORA
from sermll.design import Design
from sermll.feed import FoldData
from sermll.files import write_json
from sermll.job import FoldJob
from sermll.loop import train_fold
from sermll.plan import train_plan
from sermll.shards import FORMAT, TABLE_SCHEMA, Prepared, content_hash

UTTERANCES = (1_000, 10_000, 100_000, 1_000_000)
CELLS = (10, 100, 1_000, 10_000)
TRIALS = (100, 300, 1_000, 3_000)
CLASSES = ("angry", "happy", "neutral", "sad")
PER_SHARD = 500


class Notes:
    """What was measured, by part and size."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, dict[str, float]]] = {}

    def say(self, part: str, size: object, **numbers: float) -> None:
        """Keep and print numbers."""
        self.found.setdefault(part, {}).setdefault(str(size), {}).update(numbers)
        told = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        sys.stdout.write(f"{part} {size}: {told}\n")
        sys.stdout.flush()

    def timed(self, part: str, size: object, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, after its seconds were noted."""
        began = time.process_time()
        given = work()
        self.say(part, size, **{f"{name}_s": time.process_time() - began})
        return given


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for a while."""
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        yield Path(name)


def write_table(path: Path, count: int) -> None:
    """Prepared data of `count` utterances of 5 s in five folds, but for their audio."""
    (path / "shards").mkdir(parents=True)
    speakers = max(20, count // 500)
    numbers = np.arange(count)
    names = [f"{number % speakers:05d}" for number in range(count)]
    values: dict[str, Any] = {
        "id": [f"{speaker}_{number:07d}" for number, speaker in enumerate(names)],
        "path": [f"{speaker}/{number:07d}.wav" for number, speaker in enumerate(names)],
        "label": [CLASSES[number // speakers % 4] for number in range(count)],
        "speaker": names,
        "fold": [str(number % speakers % 5) for number in range(count)],
        "num_samples": np.full(count, 80_000),
        "duration_s": np.full(count, 5.0),
        "source_rate_hz": np.full(count, 16_000, np.int32),
        "source_channels": np.ones(count, np.int32),
        "source_encoding": ["PCM_16"] * count,
        "source_sha256": [hashlib.sha256(b"source %d" % number).hexdigest() for number in range(count)],
        "audio_sha256": [hashlib.sha256(b"audio %d" % number).hexdigest() for number in range(count)],
        "shard": (numbers // PER_SHARD).astype(np.int32),
        "row": (numbers % PER_SHARD).astype(np.int32),
    }
    columns = [pa.array(values[f.name], f.type) if f.name in values else pa.nulls(count, f.type) for f in TABLE_SCHEMA]
    table = pa.table(columns, schema=TABLE_SCHEMA)
    pq.write_table(table, path / "utterances.parquet")
    shards = [{"file": f"{index:05d}.arrow", "bytes": 0, "sha256": ""} for index in range(-(-count // PER_SHARD))]
    for shard in shards:
        (path / "shards" / shard["file"]).touch()
    rows = (row for batch in table.to_batches(max_chunksize=4096) for row in batch.to_pylist())
    manifest = {
        "format": FORMAT,
        "corpus": "big",
        "title": "Big",
        "classes": CLASSES,
        "other_labels": [],
        "default_labels": "native",
        "default_folds": "fold",
        "folds": {},
        "licence": "none",
        "trim_db": None,
        "shards": shards,
        "data_hash": content_hash("big", CLASSES, rows),
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def data(notes: Notes, most: float) -> None:
    """Tables of utterances, from opening them to an epoch's plan; and what of a fold goes to every node and lane."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    for count in (count for count in UTTERANCES if count <= most):
        with folder() as path:
            write_table(path / "data", count)
            one_table(notes, path / "data", count)
    ray.shutdown()


def one_table(notes: Notes, path: Path, count: int) -> None:
    """What is done with one table."""
    import ray

    settings = config.Data(path=str(path))
    notes.timed("data", count, "open", lambda: Prepared.open(path))
    design = notes.timed("data", count, "design", lambda: Design.of(settings, config.Protocol()))
    notes.timed("data", count, "leaks", lambda: design.leaks)
    rows = design.folds.folds[0].rows
    fold = FoldData.of("bench", design.prepared, design.labelled, rows)
    size = len(pickle.dumps(fold, protocol=5))
    bare = replace(fold, names=fold.names.schema.empty_table())
    notes.say("data", count, fold_mb=size / 1e6, without_names_mb=len(pickle.dumps(bare, protocol=5)) / 1e6)
    reference = notes.timed("data", count, "put", lambda: ray.put(fold))
    notes.timed("data", count, "get", lambda: ray.get(reference))
    train = rows["train"]
    samples = fold.num_samples[train]
    notes.timed("data", count, "plan", lambda: train_plan(train, samples, settings, config.EAM(), 16, 0, 0))
    notes.say("data", count, rss_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def synthetic(path: Path) -> None:
    """The built-in corpus, prepared."""
    from sermll.cluster import connected
    from sermll.prepare import prepare

    corpus = CORPORA["synthetic"]
    assert corpus.generate is not None
    corpus.generate(path / "audio")
    with connected():
        prepare(corpus, path / "audio", path / "data")


def write_campaign(path: Path, data: Path, cells: int) -> Path:
    """A campaign of so many cells of one fold, ten seeds for each row."""
    settings = {"data": {"path": str(data)}, "tracking": {"runs": str(path / "runs"), "mlflow": False}}
    (path / "x.yaml").write_text(yaml.safe_dump(EXPERIMENT | settings))
    rows = {f"v{row}": {"optim.lr": 1e-3 * (1 + row / 1e6)} for row in range(cells // 10 or 1)}
    axes = {"variant": rows, "seed": list(range(10)), "fold": [0]}
    (path / "c.yaml").write_text(yaml.safe_dump({"name": "c", "experiment": "x.yaml", "axes": axes}))
    return path / "c.yaml"


def one_fold(path: Path, data: Path) -> Path:
    """The folder of a trained fold, with its run's files beside it."""
    run = Plan.of(load_campaign(write_campaign(path, data, 10), {})).runs[0]
    run.open()
    train_fold(*run.unfinished[0], in_process, torch.device("cpu"))
    results.gather(run.folder)
    return run.folder


def cells(notes: Notes, most: float) -> None:
    """Campaigns: expanded, planned, begun, counted, shown."""
    with folder() as path:
        synthetic(path)
        (path / "model").mkdir()
        trained = one_fold(path / "model", path / "data")
        for count in (count for count in CELLS if count <= most):
            place = path / f"cells-{count}"
            place.mkdir()
            one_campaign(notes, write_campaign(place, path / "data", count), trained, count)
            shutil.rmtree(place)
        poll(notes, trained)


def one_campaign(notes: Notes, file: Path, trained: Path, count: int) -> None:
    """What is done with one campaign, beside training it."""
    campaign = notes.timed("cells", count, "load", lambda: load_campaign(file, {}))
    plan = notes.timed("cells", count, "plan", lambda: Plan.of(campaign))
    notes.timed("cells", count, "open", lambda: [run.open() for run in plan.runs])
    plan = notes.timed("cells", count, "plan_again", lambda: Plan.of(campaign))
    work = [job for run in plan.runs for job, _ in run.jobs]

    def hold() -> int:
        with ExitStack() as held:
            schedule._allow_open_files(len(work))
            for job in work:
                schedule._hold(job, held)
            return len(os.listdir("/proc/self/fd"))

    notes.say("cells", count, open_files=notes.timed("cells", count, "lock", hold))
    for run in plan.runs:
        for part in ("history.json", "result.json", *(file.name for file in trained.glob("fold-0/*.parquet"))):
            os.link(trained / "fold-0" / part, run.folder / "fold-0" / part)
    some = plan.runs[: min(count, 30)]
    began = time.process_time()
    for run in some:
        results.gather(run.folder)
    notes.say("cells", count, gather_each_s=(time.process_time() - began) / len(some))
    for run in plan.runs[len(some) :]:
        for part in trained.glob("*.*"):
            if not (run.folder / part.name).exists():
                os.link(part, run.folder / part.name)
    notes.timed("cells", count, "gathered", lambda: [results.gathered(run.folder) for run in plan.runs])
    campaign.folder.mkdir(exist_ok=True)
    write_json(campaign.folder / "campaign.json", plan.describe())
    notes.timed("cells", count, "store", lambda: store.store(campaign.folder))
    found = notes.timed("cells", count, "tally", lambda: tally.tally(campaign.folder))
    notes.timed("cells", count, "page", lambda: campaign_page.write(found))
    report = sum(file.stat().st_size for file in (campaign.folder / "report").rglob("*") if file.is_file())
    notes.say("cells", count, report_mb=report / 1e6, rss_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def poll(notes: Notes, trained: Path) -> None:
    """A look at a fold in training, as the driver has two in a second at each."""
    job = FoldJob("bench", "bench", {}, 0, str(trained / "fold-0"))
    row = job.history()[0]
    for epochs in (10, 100):
        write_json(trained / "fold-0" / "history.json", [row] * epochs)
        for name, look in (("read", job.history), ("stat", lambda: job.history_bytes)):
            began = time.process_time()
            for _ in range(300):
                look()
            notes.say("poll", f"{epochs} epochs", **{f"{name}_ms": (time.process_time() - began) / 300 * 1000})


def mlflow(notes: Notes, most: float) -> None:
    """Finished runs of one fold, sent to a SQLite store or to the server of MLFLOW_TRACKING_URI."""
    from sermll.track import upload

    with folder() as path:
        synthetic(path)
        trained = one_fold(path, path / "data")
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{path / 'mlflow.db'}")
        runs = []
        for number in range(21):
            runs.append(path / "runs" / f"bench-{number}")
            shutil.copytree(trained, runs[-1])
        assert upload(runs[0], uri) is None  # imports, tables
        began = time.process_time()
        for run in runs[1:]:
            fault = upload(run, uri)
            assert fault is None, fault
        again = time.process_time()
        for run in runs[1:]:
            upload(run, uri)
        kind = uri.partition(":")[0]
        notes.say("mlflow", kind, run_s=(again - began) / 20, again_s=(time.process_time() - again) / 20)


def study(notes: Notes, most: float) -> None:
    """Trials that take no time, in a SQLite file."""
    from sermll.space import Chooser
    from sermll.study import Rules, Sampler, Study

    def choose(chooser: Chooser) -> dict[str, Any]:
        return {f"x{number}": chooser.suggest_float(f"x{number}", 0, 1) for number in range(5)}

    samplers: tuple[Sampler, ...] = ("random", "tpe")
    for sampler in samplers:
        rules = Rules(sampler, "median", ("maximize",), seed=0, warm_up_steps=1)
        with folder() as path, Study(path, "bench", None, rules) as opened:
            began, before = time.process_time(), 0
            for number in range(int(min(most, TRIALS[-1]))):
                taken = opened.take(TRIALS[-1], choose)
                assert taken
                opened.report(taken.number, 1, taken.overrides["x0"])
                opened.tell(taken.number, [taken.overrides["x0"]], "", {})
                if number + 1 in TRIALS:
                    each_s = (time.process_time() - began) / (number + 1 - before)
                    notes.say("study", f"{sampler} {number + 1}", trial_s=each_s)
                    began, before = time.process_time(), number + 1


def campaign_on(
    lanes: int,
    folds: int,
    fold_h: float,
    epochs: int,
    lost_per_h: float,
    away_h: float,
    start_h: float,
    seed: int,
    retries: int = config.Resources().max_failures,
) -> dict[str, float]:
    """Folds on lanes of one GPU each; a lane is lost at a rate, for a while, and a fold goes on from its last epoch.

    As `sermll.schedule` has it: a lane takes the next fold when it has ended one; a fold whose lane was lost waits at
    the front, and fails if it was lost oftener than `retries`; a lane that comes back pays its start again. `fold_h`
    varies by a tenth between folds.
    """
    rng = np.random.default_rng(seed)
    waiting = [(left, 0) for left in rng.normal(fold_h, fold_h / 10, folds).clip(fold_h / 2)]
    returned: list[tuple[float, float, int]] = []
    """When a fold was lost, what is left of it, how often it was."""
    free = [(start_h, lane) for lane in range(lanes)]
    dies = rng.exponential(1 / lost_per_h, lanes) if lost_per_h else np.full(lanes, np.inf)
    held_h = lanes * start_h
    lost_h = ended = 0.0
    failed = 0
    epoch_h = fold_h / epochs
    while waiting or returned:
        now, lane = heapq.heappop(free)
        while returned and returned[0][0] <= now:
            _, left, losses = heapq.heappop(returned)
            waiting.append((left, losses))
        if not waiting:  # it would end; another is started when a fold is lost
            heapq.heappush(free, (returned[0][0], lane))
            continue
        left, losses = waiting.pop()
        if now + left <= dies[lane]:
            held_h += left
            ended = max(ended, now + left)
            heapq.heappush(free, (now + left, lane))
            continue
        done = max(0.0, dies[lane] - now)
        kept = done // epoch_h * epoch_h
        held_h += done + start_h
        lost_h += done - kept + start_h
        if losses < retries:
            heapq.heappush(returned, (now + done, left - kept, losses + 1))
        else:
            failed += 1
        back = now + done + away_h
        dies[lane] = back + rng.exponential(1 / lost_per_h)
        heapq.heappush(free, (back + start_h, lane))
    return {"wall_h": ended, "gpu_h": held_h, "lost_share": lost_h / held_h, "failed": failed}


def simulate(notes: Notes, most: float) -> None:
    """10 000 folds on 64 GPUs: losses by rate, and by the length of an epoch."""
    for fold_min, epochs in ((5, 50), (30, 50), (30, 5)):
        for lost_per_h in (0, 0.01, 0.05, 0.2, 1):
            runs = [
                campaign_on(64, 10_000, fold_min / 60, epochs, lost_per_h, away_h=0.25, start_h=1 / 60, seed=seed)
                for seed in range(5)
            ]
            means = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
            notes.say("simulate", f"{fold_min} min, {epochs} epochs, {lost_per_h} losses per GPU hour", **means)


PARTS = {"data": data, "cells": cells, "mlflow": mlflow, "study": study, "simulate": simulate}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--most", type=float, default=np.inf)
    parser.add_argument("--out", type=Path, default=Path("scale.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    notes = Notes()
    for part in options.parts:
        PARTS[part](notes, options.most)
        write_json(options.out, notes.found)


if __name__ == "__main__":
    main()
