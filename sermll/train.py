"""`sermll train`: every fold of a protocol under Ray Train, then the numbers, the pictures and the MLflow record.

    runs/<name>-<run id>/
      config.yaml            the resolved settings
      run.json               data, protocol, code and package versions
      metrics.json           per fold, mean over folds, pooled, with intervals; the chosen epoch and the last
      predictions.parquet    one row per test utterance, by the chosen epoch
      predictions_last.parquet
      predictions_dev.parquet
      fold-0/                history.json, result.json, predictions, checkpoints/
      report/                pictures and index.html

A fold with a result.json is finished and is not trained again; one without goes on from its newest checkpoint. Why a
fold could not be trained is in its failed.json until it is tried again.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sermll import __version__, report
from sermll.cluster import connected
from sermll.config import Experiment, run_id, to_yaml
from sermll.design import Design
from sermll.errors import ConfigError, SermllError, TrainingError
from sermll.feed import FoldData
from sermll.files import fetch_run, whole, write_json
from sermll.job import FoldJob
from sermll.protocol import Fold, Folds
from sermll.results import finished_folds, gather
from sermll.schedule import train_jobs
from sermll.source import code_version
from sermll.storage import names, place
from sermll.track import Tracker


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
    run = Run.of(experiment, Designs())
    run.open()
    tracker = Tracker.of(experiment, run.folder)
    if run.unfinished:
        with connected():
            title = f"training {experiment.name}"
            failures = train_jobs(run.unfinished, title, run.folder, lambda *_: tracker.sync())
        if failures:
            with suppress(SermllError, OSError):  # what is told is why folds are missing
                if finished_folds(run.folder):
                    _count(run.folder, tracker)
                else:
                    report.build([run.folder], run.folder / "report")
            told = [f"{job.title}: {why}" for job, why in failures.items()]
            raise TrainingError("\n".join([*told, "The other folds are kept; the same command goes on from here"]))
    return _count(run.folder, tracker)


def _count(folder: Path, tracker: Tracker) -> Outcome:
    """Gather the folds that are finished, report and send them."""
    gathered = gather(folder)
    page = report.build([folder], folder / "report")
    return Outcome(folder, gathered, page, tracker.finish())


@dataclass
class Designs:
    """Designs that were opened, and the utterances of their folds: runs on the same data and folds share them."""

    _opened: dict[str, Design] = field(default_factory=dict)
    _folds: dict[tuple[str, int], FoldData] = field(default_factory=dict)
    _verified: set[str] = field(default_factory=set)
    _begun: dict[Path, dict[str, list[Path]]] = field(default_factory=dict)

    def of(self, experiment: Experiment) -> Design:
        """The design of an experiment, checked."""
        parts = experiment.data.model_dump_json(include={"path", "labels", "targets"})
        key = parts + experiment.protocol.model_dump_json()
        if key not in self._opened:
            design = Design.of(experiment.data, experiment.protocol)
            _chosen(experiment, design.folds)
            design.check(experiment.protocol)
            if design.prepared.path not in self._verified:  # reads every shard
                design.prepared.verify()
                self._verified.add(design.prepared.path)
            self._opened[key] = design
        return self._opened[key]

    def fold(self, design: Design, index: int) -> FoldData:
        """The utterances of a fold."""
        key = (design.hash, index)
        if key not in self._folds:
            rows = design.folds.folds[index].rows
            self._folds[key] = FoldData.of(f"{design.hash}/fold-{index}", design.prepared, design.labelled, rows)
        return self._folds[key]

    def folder(self, experiment: Experiment, name: str) -> Path:
        """Where a run lies: a run is its id, so one that was begun under another name goes on there."""
        runs = place(experiment.tracking.runs).absolute()
        if runs not in self._begun:  # once: a campaign asks for thousands
            self._begun[runs] = {}
            for begun in names(runs):
                self._begun[runs].setdefault(begun.rpartition("-")[2], []).append(runs / begun)
        own = runs / f"{experiment.name}-{name}"
        candidates = dict.fromkeys([own, *self._begun[runs].get(name, [])])
        for folder in candidates:
            fetch_run(folder)
        return next((folder for folder in candidates if (folder / "run.json").exists()), own)


@dataclass(frozen=True)
class Run:
    """An experiment on its data: where its results go, and what is to be trained."""

    id: str
    experiment: Experiment
    design: Design
    folder: Path
    jobs: tuple[tuple[FoldJob, FoldData], ...]
    """The folds asked for."""

    @classmethod
    def of(cls, experiment: Experiment, designs: Designs, title: str = "") -> "Run":
        """The run of an experiment; nothing is written yet.

        Raises:
            SermllError: settings, data and folds do not go together.
        """
        design = designs.of(experiment)
        name = run_id(experiment, design.hash)
        folder = designs.folder(experiment, name)
        settings = experiment.model_dump(mode="json")
        jobs = []
        for index in _chosen(experiment, design.folds):
            check_batch(experiment.optim.batch_size, design.folds.folds[index], f"fold {index}")
            job = FoldJob(
                run=f"{name}/fold-{index}",
                title=f"{title}fold {index}",
                settings=settings,
                fold=index,
                folder=str(folder / f"fold-{index}"),
            )
            jobs.append((job, designs.fold(design, index)))
        return cls(name, experiment, design, folder, tuple(jobs))

    @property
    def unfinished(self) -> list[tuple[FoldJob, FoldData]]:
        """The folds asked for that have no result."""
        return [(job, data) for job, data in self.jobs if not job.finished]

    def open(self) -> None:
        """Make the run's folder and say in it what the run is, once.

        Raises:
            SermllError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / "run.json").exists():
                return
            everything = self.experiment.model_copy(update={"fold": None})
            with whole(self.folder / "config.yaml") as partial:
                partial.write_text(to_yaml(everything), encoding="utf-8")
            description = {
                "run_id": self.id,
                "name": self.experiment.name,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "code": {"version": __version__, **code_version()},
                "versions": {
                    name: version(name) for name in ("torch", "ray", "transformers", "torchaudio", "pyarrow", "numpy")
                },
                **self.design.describe(),
            }
            write_json(self.folder / "run.json", description)
        except OSError as error:
            raise SermllError(f"{self.folder}: cannot be written ({error}); give another tracking.runs") from None


def check_batch(size: int, fold: Fold, title: str) -> None:
    """Refuse batches of more utterances than a fold trains on: all such sizes would make the same one batch.

    Raises:
        ConfigError: naming size and fold.
    """
    count = len(fold.rows["train"])
    if size > count:
        raise ConfigError(
            f"optim.batch_size={size}: {title} has only {count} training utterances; give a smaller batch"
        )


def _chosen(experiment: Experiment, folds: Folds) -> list[int]:
    if experiment.fold is None:
        return [fold.index for fold in folds.folds]
    if experiment.fold >= len(folds.folds):
        last = len(folds.folds) - 1
        raise ConfigError(f"fold={experiment.fold}: protocol {folds.name!r} has the folds 0 to {last}")
    return [experiment.fold]
