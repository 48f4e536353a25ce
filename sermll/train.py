"""`sermll train`: every fold of a protocol under Ray Train, then the numbers, the pictures and the MLflow record.

    runs/<name>-<run id>/
      config.yaml            the resolved settings
      run.json               data, protocol, code and package versions
      metrics.json           per fold, mean over folds, pooled, with intervals; dev-selected and last epoch
      predictions.parquet    one row per test utterance, by the epoch chosen on dev
      predictions_last.parquet
      fold-0/                history.json, result.json, predictions, checkpoints/
      report/                pictures and index.html

A fold with a result.json is finished and is not trained again; one without goes on from its newest checkpoint.
"""

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sermll import __version__, metrics, report
from sermll.checkpoint import Checkpoint
from sermll.cluster import DATA_CPUS, connected
from sermll.config import Experiment, Resources, run_id, to_yaml
from sermll.design import Design
from sermll.errors import CheckpointError, ConfigError, SermllError, TrainingError
from sermll.feed import Feed
from sermll.loop import PREDICTIONS, FoldJob, selection_scores, train_worker, write_json
from sermll.progress import Progress
from sermll.protocol import Folds
from sermll.source import code_version
from sermll.track import Tracker

LAST_PREDICTIONS = "predictions_last.parquet"
BOOTSTRAP_SEED = 0
POLL_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """What `train` leaves behind."""

    run_dir: Path
    metrics: dict[str, Any]
    """Content of metrics.json, for the folds that are finished."""
    report: Path
    not_tracked: str | None
    """Why MLflow does not have everything, None if it has."""


def train(experiment: Experiment) -> Outcome:
    """Train the folds that are not finished, then gather the results.

    Raises:
        SermllError: a subclass naming what is wrong with the settings, the data, the protocol, the cluster or the
            training itself. Finished epochs and folds are kept.
    """
    design = Design.of(experiment.data, experiment.protocol)
    chosen = _chosen(experiment, design.folds)
    design.check(experiment.protocol)
    design.prepared.verify()
    run = run_id(experiment, design.hash)
    jobs = [_job(experiment, design, index, run) for index in chosen]
    run_dir = _open_run(experiment, design, run)
    tracker = Tracker.of(experiment, run_dir)
    unfinished = [job for job in jobs if not (Path(job.folder) / "result.json").exists()]
    if unfinished:
        with connected():
            _train_folds(experiment, unfinished, tracker)
    gathered = gather(run_dir)
    page = report.build([run_dir], run_dir / "report")
    return Outcome(run_dir, gathered, page, tracker.finish())


def _chosen(experiment: Experiment, folds: Folds) -> list[int]:
    if experiment.fold is None:
        return [fold.index for fold in folds.folds]
    if experiment.fold >= len(folds.folds):
        last = len(folds.folds) - 1
        raise ConfigError(f"fold={experiment.fold}: protocol {folds.name!r} has the folds 0 to {last}")
    return [experiment.fold]


def _job(experiment: Experiment, design: Design, index: int, run: str) -> FoldJob:
    """A fold's job, after it was found large enough."""
    table, rows = design.prepared.table, design.folds.folds[index].rows
    if experiment.optim.batch_size > len(rows["train"]):
        raise ConfigError(
            f"optim.batch_size={experiment.optim.batch_size}: fold {index} has only {len(rows['train'])} training "
            "utterances; give a smaller batch"
        )
    key = f"{run}/fold-{index}"
    return FoldJob(
        run=key,
        settings=experiment.model_dump(mode="json"),
        fold=index,
        classes=design.classes,
        ids=table["id"].to_pylist(),
        speakers=table["speaker"].to_pylist(),
        feed=Feed.of(key, experiment, design.prepared, design.labelled, rows),
        folder=str(_run_dir(experiment, run) / f"fold-{index}"),
    )


def _run_dir(experiment: Experiment, run: str) -> Path:
    return Path(experiment.tracking.runs).expanduser().absolute() / f"{experiment.name}-{run}"


def _open_run(experiment: Experiment, design: Design, run: str) -> Path:
    """Make the run's folder and say in it what the run is, once."""
    run_dir = _run_dir(experiment, run)
    description = {
        "run_id": run,
        "name": experiment.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": {"version": __version__, **code_version()},
        "versions": {
            name: version(name) for name in ("torch", "ray", "transformers", "torchaudio", "pyarrow", "numpy")
        },
        **design.describe(),
    }
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "run.json").exists():
            everything = experiment.model_copy(update={"fold": None})
            (run_dir / "config.yaml").write_text(to_yaml(everything), encoding="utf-8")
            write_json(run_dir / "run.json", description)
    except OSError as error:
        raise SermllError(f"{run_dir}: cannot be written ({error}); give another tracking.runs") from None
    return run_dir


def _train_folds(experiment: Experiment, jobs: Sequence[FoldJob], tracker: Tracker) -> None:
    """Train folds side by side, as many as the cluster holds, watching their histories as they grow."""
    gpus, at_once = _fit_cluster(experiment.resources)
    epochs = experiment.optim.epochs
    done = {job.fold: _epochs_done(job) for job in jobs}
    failures: list[str] = []
    pool = ThreadPoolExecutor(at_once)
    running: dict[Future[list[str]], FoldJob] = {pool.submit(_train_fold, experiment, job, gpus): job for job in jobs}
    try:
        with Progress(f"training {experiment.name}", epochs * len(jobs), sum(done.values())) as progress:
            while running:
                finished, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for job in jobs:
                    history = _history(job)
                    if len(history) > done[job.fold]:
                        progress.advance(len(history) - done[job.fold], _news(job.fold, history))
                        done[job.fold] = len(history)
                for future in finished:
                    job = running.pop(future)
                    try:
                        for fault in future.result():
                            progress.say(f"fold {job.fold} went on from an earlier checkpoint: {fault}")
                    except SermllError as error:
                        failures.append(f"fold {job.fold}: {error}")
                tracker.sync()
    finally:
        # Not waited for: when a user interrupts, the folds end with the connection to the cluster.
        pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise TrainingError("\n".join([*failures, "The other folds are kept; the same command goes on from here"]))


def _news(fold: int, history: list[dict[str, Any]]) -> str:
    row = history[-1]
    return f"fold {fold}, epoch {len(history)}: loss {row['loss']:.3f}, dev UA {row['dev_ua']:.3f}"


def _history(job: FoldJob) -> list[dict[str, Any]]:
    try:
        return json.loads((Path(job.folder) / "history.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []


def _epochs_done(job: FoldJob) -> int:
    return len(_history(job))


def _fit_cluster(resources: Resources) -> tuple[float, int]:
    """GPUs per worker, and how many folds the cluster trains at once.

    Raises:
        ConfigError: not even one fold fits.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    gpus_per_worker = (1.0 if gpus else 0.0) if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
    need_cpus = resources.workers * resources.cpus_per_worker
    need_gpus = resources.workers * gpus_per_worker
    # Data tasks must find room beside the training workers, or both would wait for each other for ever.
    fit = int((cpus - DATA_CPUS) // need_cpus)
    if need_gpus:
        fit = min(fit, int(gpus // need_gpus))
    wanted = 1 if resources.parallel_folds == "auto" else resources.parallel_folds
    if fit < wanted:
        raise ConfigError(
            f"{wanted} fold(s) at once need {wanted * need_cpus + DATA_CPUS:g} CPUs and {wanted * need_gpus:g} GPUs, "
            f"the cluster has {cpus:g} and {gpus:g}; lower resources.workers, cpus_per_worker or parallel_folds"
        )
    return gpus_per_worker, fit if resources.parallel_folds == "auto" else resources.parallel_folds


def _train_fold(experiment: Experiment, job: FoldJob, gpus_per_worker: float) -> list[str]:
    """Train one fold to the end and write its result; returns what was wrong with checkpoints passed over."""
    import ray.train
    from ray.train.torch import TorchTrainer

    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    trainer = TorchTrainer(
        lambda: train_worker(job),
        scaling_config=ray.train.ScalingConfig(
            num_workers=experiment.resources.workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"CPU": experiment.resources.cpus_per_worker}
            | ({"GPU": gpus_per_worker} if gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=experiment.resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                # the best beside the two latest: should the latest be damaged, the one before it serves
                num_to_keep=2,
                checkpoint_score_attribute="score",
                checkpoint_score_order="max",
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        answer: Any = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise TrainingError(_first_cause(error)) from error
    if "error" in answer:
        raise TrainingError(answer["message"])
    _finish_fold(job, time.monotonic() - started)
    return answer["faults"]


def _first_cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = next(iter(failures.items()))
    return f"worker {rank} failed: {str(cause).strip().splitlines()[-1]}"


def _finish_fold(job: FoldJob, seconds: float) -> None:
    """Take the predictions of the chosen and of the last epoch out of their checkpoints; write result.json last."""
    folder = Path(job.folder)
    history = _history(job)
    best = int(np.argmax(selection_scores(job.settings["protocol"]["select"], history)))
    kept = {best: "", len(history) - 1: ""}
    for path in sorted(path for path in job.checkpoints.glob("checkpoint_*") if path.is_dir()):
        try:
            found = Checkpoint.open(path)
        except CheckpointError:  # an older one that was passed over when the fold was resumed
            continue
        if found.notes["epoch"] in kept:
            kept[found.notes["epoch"]] = path.name
    for epoch, name in kept.items():
        if not name:
            raise CheckpointError(
                f"{job.checkpoints}: the checkpoint of epoch {epoch + 1} is missing or damaged; "
                f"delete {folder} to train the fold again"
            )
    shutil.copyfile(job.checkpoints / kept[best] / PREDICTIONS, folder / PREDICTIONS)
    shutil.copyfile(job.checkpoints / kept[len(history) - 1] / PREDICTIONS, folder / LAST_PREDICTIONS)
    result = {
        "fold": job.fold,
        "epochs": len(history),
        "best_epoch": best,
        "best_checkpoint": f"checkpoints/{kept[best]}",
        "last_checkpoint": f"checkpoints/{kept[len(history) - 1]}",
        "seconds": round(sum(row["train_s"] + row["eval_s"] for row in history), 1),
        "wall_s": round(seconds, 1),
    }
    write_json(folder / "result.json", result)


def gather(run_dir: Path) -> dict[str, Any]:
    """Join the finished folds: predictions of all, and metrics.json from their counts."""
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    classes = run["data"]["classes"]
    results = [
        json.loads((folder / "result.json").read_text(encoding="utf-8"))
        for folder in sorted(run_dir.glob("fold-*"), key=lambda path: int(path.name[5:]))
        if (folder / "result.json").exists()
    ]
    joined: dict[str, Any] = {}
    per_fold: dict[str, dict[int, np.ndarray]] = {}
    for choice, name in (("selected", PREDICTIONS), ("last", LAST_PREDICTIONS)):
        table = pa.concat_tables(pq.read_table(run_dir / f"fold-{result['fold']}" / name) for result in results)
        pq.write_table(table, run_dir / name)
        joined[choice], per_fold[choice] = _estimate(table, classes)
    rows, highest = [], []
    for result in results:
        history = json.loads((run_dir / f"fold-{result['fold']}" / "history.json").read_text(encoding="utf-8"))
        highest.append(max(float(metrics.ua(np.array(row["test_confusion"]))) for row in history))
        counts, last = (per_fold[choice][result["fold"]] for choice in ("selected", "last"))
        rows.append(
            {
                **{name: result[name] for name in ("fold", "epochs", "best_epoch", "seconds")},
                **_rates(counts),
                "recalls": [None if np.isnan(value) else float(value) for value in metrics.recalls(counts)],
                "confusion": counts.tolist(),
                "last": _rates(last),
            }
        )
    complete = len(results) == len(run["protocol"]["folds"])
    summary = {
        "folds": rows,
        "selected": joined["selected"],
        "last": joined["last"],
        # No result, but what publications that choose the epoch on the test fold would have called one.
        "chosen_on_test_ua": float(np.mean(highest)),
        "complete": complete,
        "leaks": run["protocol"]["leaks"],
    }
    write_json(run_dir / "metrics.json", summary)
    return summary


def _rates(counts: np.ndarray) -> dict[str, float]:
    return {name: float(getattr(metrics, name)(counts)) for name in ("ua", "wa", "macro_f1")}


def _estimate(table: pa.Table, classes: Sequence[str]) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """Intervals by bootstrap over speakers, and the confusion counts of each fold."""
    order = {name: index for index, name in enumerate(classes)}
    labels, predicted = (
        np.array([order[name] for name in table[column].to_pylist()]) for column in ("label", "predicted")
    )
    folds = table["fold"].to_numpy()
    names = np.array(table["speaker"].to_pylist())
    # A speaker is one draw of the bootstrap; where folds leak, a speaker of two folds is one in each.
    tested = sorted(set(zip(folds.tolist(), names.tolist(), strict=True)))
    members = [(folds == fold) & (names == name) for fold, name in tested]
    counts = np.stack([metrics.confusion(labels[rows], predicted[rows], len(classes)) for rows in members])
    fold_of = np.array([fold for fold, _ in tested])
    estimates = metrics.speaker_bootstrap(counts, fold_of, BOOTSTRAP_SEED)
    values = {
        name: {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        for name, estimate in estimates.items()
    }
    return values, {int(fold): counts[fold_of == fold].sum(axis=0) for fold in np.unique(fold_of)}
