"""`sermll run`: a campaign, every cell of some axes as an ordinary run, trained side by side on one cluster.

A campaign file names an experiment and axes; a cell is one value of each axis, a set of overrides. Cells whose run is
finished are skipped, interrupted ones go on, whoever began them: a run is named by its settings and data alone.
A campaign's name stands for its cells: it may grow by more of them, and is refused others.

    runs/campaign-<name>/
      campaign.json          the cells: labels, overrides, run folder
      report/                one page, pictures, the table as CSV, Markdown and LaTeX
      predictions/           all cells' predictions on test speakers, one Parquet data set
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sermll import __version__, tally
from sermll.cluster import connected, lanes_here
from sermll.config import Experiment, Resources, Section, read_yaml, resolve, validate, with_overrides
from sermll.errors import ConfigError, SermllError, TrainingError
from sermll.files import LOCK, write_json
from sermll.loop import FoldJob
from sermll.results import finished_folds, gather, gathered
from sermll.schedule import train_jobs
from sermll.source import code_version
from sermll.storage import address, fetch, locked, place
from sermll.store import store
from sermll.track import CampaignTracker
from sermll.train import Designs, Run

SHOWN_FAULTS = 10
Kind = Literal["campaign", "matrix"]


class CampaignBase(Section):
    """What every file that describes a campaign holds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="short name, part of the campaign's folder")
    experiment: str = Field(description="experiment file that every cell starts from, beside the campaign file")
    overrides: dict[str, Any] = Field(default={}, description="settings of every cell that differ from it")


class CampaignFile(CampaignBase):
    """What a campaign file holds."""

    axes: dict[str, dict[str, dict[str, Any]] | list[Any]] = Field(
        min_length=1,
        description="for each axis named values with their overrides; or, for one called like a setting, its values",
    )


@dataclass(frozen=True)
class Cell:
    """One value of every axis."""

    labels: Mapping[str, str]
    """Value by axis."""
    overrides: Mapping[str, Any]
    experiment: Experiment

    @property
    def title(self) -> str:
        """For people."""
        return _title(self.labels)

    @property
    def run_labels(self) -> dict[str, str]:
        """The labels of its run: all but the fold's."""
        return {axis: value for axis, value in self.labels.items() if axis != "fold"}


def _title(labels: Mapping[str, str]) -> str:
    return " ".join(f"{axis} {value}" if axis in ("seed", "fold") else value for axis, value in labels.items())


@dataclass(frozen=True)
class Campaign:
    """Cells, before anything is opened."""

    kind: Kind
    """How it is counted and shown."""
    name: str
    runs: Path
    axes: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]

    @property
    def folder(self) -> Path:
        """Where the campaign's own results go."""
        return self.runs / f"campaign-{self.name}"


def load_campaign(path: Path, overrides: Mapping[str, Any]) -> Campaign:
    """Read a campaign file and expand its axes; `overrides` hold for every cell.

    Raises:
        ConfigError: the file, or a cell of it, is not valid; every faulty cell is named.
    """
    file = validate(CampaignFile, read_yaml(path, "campaign"), f"{path}: not a valid campaign")
    return campaign_of("campaign", file, file.axes, path, overrides)


def campaign_of(
    kind: Kind, file: CampaignBase, axes: Mapping[str, Any], path: Path, overrides: Mapping[str, Any]
) -> Campaign:
    """The campaign with these axes; see `load_campaign`."""
    for key in overrides:
        if key != "name" and key.partition(".")[0] in type(file).model_fields:
            raise ConfigError(
                f"{key}: {path} says what the cells are; change it there, a campaign may grow. Overrides are settings "
                "of every cell, such as optim.epochs=10"
            )
    base = read_yaml(path.parent / file.experiment, "experiment")
    valued = {axis: _values(axis, values) for axis, values in axes.items()}
    _check_axes(valued, file.overrides, overrides)
    common = {**file.overrides, **overrides}
    everywhere = {"name": file.name, **common}
    tree = with_overrides(base, everywhere)
    cells, faults = [], []
    idle = set(common)  # what holds in no cell: one may turn off a section, or choose a kind that has no such setting
    for labels in product(*valued.values()):
        named = dict(zip(valued, labels, strict=True))
        settings = {key: value for axis, label in named.items() for key, value in valued[axis][label].items()}
        try:
            here = with_overrides(tree, settings)
            standing = {key: value for key, value in common.items() if with_overrides(here, {key: value}) == here}
            cells.append(Cell(named, {**standing, **settings}, resolve(here, {})))
            idle -= set(standing)
        except ConfigError as error:
            faults.append(f"cell {_title(named)}: {error}")
    if faults:
        raise ConfigError("\n".join([f"{path}: {len(faults)} cells are not valid", *faults[:SHOWN_FAULTS]]))
    if idle:
        raise ConfigError(f"{path}: {', '.join(sorted(idle))}: has no effect in any cell; take it out")
    runs = {place(cell.experiment.tracking.runs).absolute() for cell in cells}
    if len(runs) > 1:
        raise ConfigError(f"{path}: tracking.runs must be the same in every cell, found {', '.join(map(str, runs))}")
    named_values = {axis: tuple(values) for axis, values in valued.items()}
    return Campaign(kind, everywhere["name"], runs.pop(), named_values, tuple(cells))


def _values(axis: str, values: Mapping[str, Mapping[str, Any]] | Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """The values of an axis, by name, with their overrides."""
    if isinstance(values, Mapping):
        named: dict[str, Mapping[str, Any]] = dict(values)
    else:
        named = {str(value): {axis: value} for value in values}
        if len(named) < len(values):
            raise ConfigError(f"axes.{axis}: a value stands there twice")
    if not named:
        raise ConfigError(f"axes.{axis}: an axis needs a value at least")
    return named


def _check_axes(
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]], everywhere: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Every setting is one axis's business: what two of them set, or the command line too, would silently be lost.

    So would what the file sets `everywhere`, where every value of an axis sets it too, and what is set for all cells of
    a section that a value sets as a whole. That a value turns the section off is no loss.
    """
    for axis, values in axes.items():
        for key in everywhere:
            if all(key in settings for settings in values.values()):
                raise ConfigError(f"overrides sets {key}, and so does every value of axes.{axis}; take it out of one")
        for section, value in (item for settings in values.values() for item in settings.items()):
            lost = [key for key in (*everywhere, *overrides) if key.startswith(f"{section}.") and value is not None]
            if lost:
                raise ConfigError(
                    f"axes.{axis} sets {section} as a whole, without {lost[0]}, which is set for every cell; set the "
                    "settings within it"
                )
    owner = dict.fromkeys(overrides, "the command line")
    for axis, values in axes.items():
        for key in dict.fromkeys(key for settings in values.values() for key in settings):
            if key in owner:
                raise ConfigError(f"axes.{axis} sets {key}, and so does {owner[key]}; one of them would have no effect")
            for other, name in owner.items():
                if name.startswith("axes.") and (other.startswith(f"{key}.") or key.startswith(f"{other}.")):
                    raise ConfigError(f"axes.{axis} sets {key}, and {name} {other}; one of them would have no effect")
        owner |= {key: f"axes.{axis}" for settings in values.values() for key in settings}


@dataclass(frozen=True)
class Plan:
    """Cells with their runs: what is done and what is not."""

    campaign: Campaign
    runs: tuple[Run, ...]
    """One for each cell; cells that differ in the fold alone have runs of one id and folder."""

    @classmethod
    def of(cls, campaign: Campaign) -> "Plan":
        """Open data and folds of every cell; nothing is written.

        Raises:
            ConfigError: cells that cannot be run, every one named.
        """
        designs, runs, faults = Designs(), [], []
        for cell in campaign.cells:
            try:
                name = _title(cell.run_labels)
                runs.append(Run.of(cell.experiment, designs, f"{name}, " if name else ""))
            except SermllError as error:
                faults.append(f"cell {cell.title}: {error}")
        if faults:
            raise ConfigError("\n".join([f"{len(faults)} cells cannot be run", *faults[:SHOWN_FAULTS]]))
        plan = cls(campaign, tuple(runs))
        plan._check_cells()
        plan.check_table()
        return plan

    def _check_cells(self) -> None:
        """Refuse cells that are one run, or one fold of it."""
        owners: dict[Path, Mapping[str, str]] = {}
        for cell, run in zip(self.campaign.cells, self.runs, strict=True):
            folds = ((Path(job.folder), cell.labels) for job, _ in run.jobs)
            for folder, labels in ((run.folder, cell.run_labels), *folds):
                owner = owners.setdefault(folder, labels)
                if owner != labels:
                    raise ConfigError(
                        f"cells {_title(owner)} and {_title(labels)} are one run, {folder.name}: what differs between "
                        "them has no effect; take one of them out of the axes"
                    )

    def check_table(self) -> None:
        """Refuse a name whose table would lose folds that are finished.

        Raises:
            ConfigError: the folder is that of a campaign with finished folds that this one has not.
        """
        path = self.campaign.folder / "campaign.json"
        fetch(path)
        if not path.is_file():
            return
        asked = {(run.id, job.fold) for run in self.runs for job, _ in run.jobs}
        lost = [
            f"{_title(cell['labels'] | {'fold': fold})}, run {cell['run_id']}"
            for cell in tally.read(self.campaign.folder)["cells"]
            if any((cell["run_id"], fold) not in asked for fold in cell["folds"])
            for fold in tally.finished(cell)
            if (cell["run_id"], fold) not in asked
        ]
        if lost:
            raise ConfigError(
                f"{address(self.campaign.folder)}: its table holds {len(lost)} finished folds that this campaign has "
                f"not ({lost[0]} is the first) and would lose them. Other settings are another campaign: give it a "
                "name of its own, name=...; or delete that folder, the runs are kept"
            )

    @property
    def done(self) -> list[bool]:
        """For each cell whether all its folds are finished."""
        return [not run.unfinished for run in self.runs]

    def describe(self) -> dict[str, Any]:
        """The campaign as JSON, for whoever reads its results."""
        return {
            "kind": self.campaign.kind,
            "name": self.campaign.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code": {"version": __version__, **code_version()},
            "axes": {axis: list(values) for axis, values in self.campaign.axes.items()},
            "cells": [
                {
                    "labels": dict(cell.labels),
                    "overrides": dict(cell.overrides),
                    "run_dir": address(run.folder),
                    "run_id": run.id,
                    "folds": [job.fold for job, _ in run.jobs],
                }
                for cell, run in zip(self.campaign.cells, self.runs, strict=True)
            ],
        }

    def text(self) -> str:
        """What would be done, for the terminal."""
        folds = sum(len(run.jobs) for run in self.runs)
        left = sum(len(run.unfinished) for run in self.runs)
        lines = [f"campaign {self.campaign.name}: {len(self.runs)} cells, {folds} folds, {folds - left} finished", ""]
        width = max(len(cell.title) for cell in self.campaign.cells)
        for cell, run in zip(self.campaign.cells, self.runs, strict=True):
            begun = sum(bool(job.history()) for job, _ in run.unfinished)
            state = f"{len(run.jobs) - len(run.unfinished)} of {len(run.jobs)}" + (f", {begun} begun" if begun else "")
            lines.append(f"{cell.title:<{width}}  run {run.id}  {state}")
        needs = dict.fromkeys(_need(run) for run in self.runs)
        lines += ["", *(f"each fold needs {need}" for need in needs), self._time()]
        return "\n".join(lines)

    def _time(self) -> str:
        """How long what is left may take, from the folds that are finished."""
        left = {job.folder: (run, job) for run in self.runs for job, _ in run.unfinished}
        if not left:
            return "nothing is left to train"
        epoch_s = {  # of each finished fold
            run.id: [fold["wall_s"] / fold["epochs"] for fold in finished_folds(run.folder)] for run in self.runs
        }
        known = [seconds for of_run in epoch_s.values() for seconds in of_run]
        if not known:
            return "time: not known before a fold is finished"
        groups: dict[Resources, list[float]] = {}  # trained one after the other
        for run, job in left.values():
            typical_s = epoch_s[run.id] or known
            epochs = run.experiment.optim.epochs - len(job.history())
            left_s = epochs * sum(typical_s) / len(typical_s)
            groups.setdefault(run.experiment.resources, []).append(left_s)
        hours = sum(map(sum, groups.values())) / 3600
        told = f"time: {hours:.1f} h of training left, going by {len(known)} finished folds"
        at_once = [min(lanes_here(resources) or 0, len(folds)) for resources, folds in groups.items()]
        if not all(at_once):
            return told
        # No more at once than there are folds, and not less than the longest of them.
        wall_s = sum(max(sum(folds) / lanes, max(folds)) for lanes, folds in zip(at_once, groups.values(), strict=True))
        return f"{told}; {wall_s / 3600:.1f} h on this machine, {max(at_once)} at once"


def _need(run: Run) -> str:
    resources = run.experiment.resources
    gpus = {"auto": "a GPU each where there is one", 0: "no GPU"}.get(
        resources.gpus_per_worker, f"{resources.gpus_per_worker} GPUs each"
    )
    number = f"{resources.most}" if resources.fewest == resources.most else f"{resources.fewest} to {resources.most}"
    workers = f"{number} worker{'s' if resources.most > 1 else ''}"
    each = f"{resources.cpus_per_worker:g} CPU{'' if resources.cpus_per_worker == 1 else 's'}"
    return f"{workers} with {each} and {gpus}"


@dataclass(frozen=True)
class Outcome:
    """What a campaign leaves behind."""

    folder: Path
    found: Any
    """What was counted: a `Tally`, or a `Matrix`."""
    page: Path
    cells: int
    finished: int
    failures: tuple[str, ...]
    """Cell, fold and the first line of why, for folds that could not be trained."""
    not_tracked: str | None


def run_campaign(campaign: Campaign, build: Callable[[Path], tuple[Any, Path]]) -> Outcome:
    """Train every cell that is not finished, then the table, the page and the record in MLflow.

    Args:
        campaign: what to train.
        build: counts what the campaign's folder holds and writes the page.

    Raises:
        SermllError: settings, data, folds or the cluster do not go together. What was finished is kept, and counted.
    """
    plan = Plan.of(campaign)
    with _alone(campaign.folder):
        plan.check_table()  # again: another command may have ended since
        for run in plan.runs:
            run.open()
        write_json(campaign.folder / "campaign.json", plan.describe())
        cells = zip(campaign.cells, plan.runs, strict=True)
        tracker = CampaignTracker.of(
            campaign.folder, ((cell.experiment, run.folder, cell.run_labels) for cell, run in cells)
        )
        failures: dict[FoldJob, str] = {}
        # The first fold of every cell comes before the second of any, so that one that is cut short compares all.
        work = {(str(run.folder), job.fold): (job, data) for run in plan.runs for job, data in run.unfinished}
        ordered = sorted(work.values(), key=lambda pair: (pair[0].fold, pair[0].settings["seed"]))
        if ordered:
            try:
                with connected():
                    failures = train_jobs(ordered, campaign.name, campaign.folder, tracker.watch)
            except SermllError:
                with suppress(SermllError, OSError):  # what is told is why training came to an end
                    count(campaign.folder, build)
                raise
        found, page = count(campaign.folder, build)
        told = tuple(f"{job.title}: {why.splitlines()[0]}" for job, why in failures.items())
        return Outcome(campaign.folder, found, page, len(plan.runs), sum(plan.done), told, tracker.finish())


def count(folder: Path, build: Callable[[Path], tuple[Any, Path]]) -> tuple[Any, Path]:
    """Gather what a campaign's runs have finished so far, and count it; it may be in training.

    Args:
        folder: `runs/campaign-<name>`.
        build: counts what it holds and writes the page.

    Returns:
        What `build` gave.

    Raises:
        DataError: no campaign, or a file in it or in a run is damaged.
    """
    runs = dict.fromkeys(place(cell["run_dir"]) for cell in tally.read(folder)["cells"])
    with locked(folder / ".counting"):
        for run in runs:
            if finished_folds(run) and not gathered(run):
                gather(run)
        store(folder)
        return build(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the campaign's folder, and keep other commands from writing into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SermllError(f"{folder}: cannot be written ({error}); give another tracking.runs") from None
    with locked(folder / LOCK, wait=False) as held:
        if not held:
            who = (folder / LOCK).read_text(encoding="utf-8").strip()
            raise TrainingError(
                f"{address(folder)}: another command is running this campaign ({who}); wait for it, or stop it; "
                "another campaign needs a name of its own, name=..."
            )
        yield
