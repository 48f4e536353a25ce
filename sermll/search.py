"""`sermll search`: settings found by trials on training speakers alone, then scored once on speakers they never saw.

    runs/search-<name>/
      search.json            the space, every trial, the best, the final scores
      best.yaml              an experiment file; with nested=true best-fold-<n>.yaml, one for each outer fold
      study.db               Optuna's storage, unless another was given
      fold-0/trials/         what each trial trained; of the test folds in the name, no utterance is in it
      report/                one page, pictures, trials.csv

Ray Tune schedules the trials, Optuna proposes them. A trial is a set of overrides; it trains one model for each inner
fold and seed, one after the other in one process, and each inner fold's dev speakers are another group of the
protocol's speakers. When the trials are done, the best settings and the experiment as it stands are trained as
ordinary runs, and their test folds are compared.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from optuna.trial import FrozenTrial
from pydantic import Field, model_validator

from sermll import __version__, calibration, compare, metrics, results, search_page
from sermll.bank import Bank
from sermll.bank_plan import Recipe
from sermll.campaign import CampaignBase
from sermll.cluster import connected, lanes_of
from sermll.config import EAM, Experiment, read_yaml, resolve, run_id, validate, with_overrides
from sermll.design import Design
from sermll.errors import ConfigError, DataError, ProtocolError, SermllError, TrainingError
from sermll.feed import FoldData, stream
from sermll.files import locked, naming, read_json, write_json
from sermll.loop import FoldJob, selection_scores, train_fold
from sermll.progress import Progress
from sermll.protocol import Fold, Folds, find_leaks
from sermll.schedule import gpus_per_worker, train_jobs
from sermll.source import code_version
from sermll.space import Choice, Chooser, check, params_of, settings_of, suggest
from sermll.study import Pruner, Rules, Sampler, Study, Taken
from sermll.track import SearchTracker
from sermll.train import Designs, Run

Objective = Literal["dev_ua", "worst_speaker_ua", "ece", "seconds"]
DIRECTIONS: dict[Objective, Literal["maximize", "minimize"]] = {
    "dev_ua": "maximize",
    "worst_speaker_ua": "maximize",
    "ece": "minimize",
    "seconds": "minimize",
}
POLL_S = 2.0
SEARCHED, DEFAULTS = "searched", "defaults"


class SearchFile(CampaignBase):
    """What a search file holds."""

    space: dict[str, Choice] = Field(description="what trials choose, see `sermll.space`")
    first: tuple[dict[str, Any], ...] = Field(
        default=(), description="overrides of the trials after the first, which is the experiment as it stands"
    )
    objectives: tuple[Objective, ...] = Field(
        default=("dev_ua",),
        min_length=1,
        description="means over inner folds and seeds: dev UA, UA of the worst dev speaker, ECE on dev, seconds",
    )
    trials: int = Field(default=30, ge=1, description="how many, those that fail or are ended early among them")
    sampler: Sampler = Field(default="tpe", description="what proposes: tpe, gp, cmaes, nsga2, nsga3 or random")
    sampler_seed: int = Field(default=0, ge=0)
    pruner: Pruner | Literal["auto"] = Field(
        default="auto",
        description="what ends poor trials early, by inner fold and by epoch: median, asha or none; auto: median, with "
        "other objectives than dev UA alone none, since only dev UA is known after every epoch",
    )
    inner_folds: int = Field(default=2, ge=1, description="of each trial; other folds' test speakers are their dev")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="of each trial, and of the final runs")
    test_folds: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="scored at the end, seen by no trial; null: fold 0, nested: all"
    )
    nested: bool = Field(default=False, description="a search of its own for each test fold: the number to publish")
    test: bool = Field(default=True, description="score the test folds when the trials are done")
    bank_mixes: int | None = Field(
        default=None,
        ge=1,
        description="with a frozen encoder: trials train on a feature bank with so many mixes of each utterance",
    )
    storage: str | None = Field(
        default=None, description="URL of a database, or a file *.journal; null: SQLite in the search's folder"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SearchFile":
        for name in ("objectives", "seeds", "test_folds"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: a value stands there twice")
        if self.pruner not in ("auto", "none") and self.objectives != ("dev_ua",):
            raise ValueError(
                f"pruner={self.pruner} ends trials by their dev UA after each epoch; with the objectives "
                f"{', '.join(self.objectives)} give none"
            )
        return self


@dataclass(frozen=True)
class Inner:
    """What the trials of one study may see."""

    test_folds: tuple[int, ...]
    """Of the protocol; their test speakers, and theirs alone, are held out."""
    design: Design
    """Folds of the other speakers, with nobody in test."""
    folder: Path

    @property
    def title(self) -> str:
        """Names the test folds."""
        return f"fold{'s' if len(self.test_folds) > 1 else ''} {', '.join(map(str, self.test_folds))}"


@dataclass(frozen=True)
class Search:
    """A search, its data and folds opened; nothing is written."""

    file: SearchFile
    source: Path
    tree: Mapping[str, Any]
    """The experiment's settings, as its file and the search's overrides have them."""
    experiment: Experiment
    folder: Path
    designs: Designs
    studies: tuple[Inner, ...]

    @property
    def pruner(self) -> Pruner:
        """The rule that ends trials early."""
        if self.file.pruner != "auto":
            return self.file.pruner
        return "median" if self.file.objectives == ("dev_ua",) else "none"

    def fingerprint(self, inner: Inner) -> str:
        """Of everything that makes trials comparable."""
        told = [
            {name: choice.model_dump(mode="json") for name, choice in self.file.space.items()},
            self.file.model_dump(
                mode="json", include={"first", "objectives", "sampler", "sampler_seed", "seeds", "bank_mixes"}
            ),
            [self.pruner, self.experiment.science(), inner.design.hash],
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def recipe(self) -> Recipe | None:
        """What a feature bank holds for the trials; None: they hear waveforms."""
        if self.file.bank_mixes is None:
            return None
        mixup, chosen = self.experiment.mixup, self.file.space.get("mixup.snr_db")
        pairs = [mixup.snr_db] if isinstance(mixup, EAM) else []
        if chosen is not None:
            pairs += [chosen.range] if chosen.range else list(chosen.choice or ())
        if not pairs:
            raise ConfigError(f"bank_mixes={self.file.bank_mixes} has no effect: no trial mixes with mixup.kind=eam")
        widest = (min(pair[0] for pair in pairs), max(pair[1] for pair in pairs))
        return Recipe.of(self.experiment, self.file.bank_mixes, widest)

    def jobs(self, inner: Inner, taken: Taken) -> list[FoldJob]:
        """What a trial trains: for each seed every inner fold."""
        found = []
        for seed in self.file.seeds:
            experiment = resolve(self.tree, {**taken.overrides, "seed": seed}, str(self.source))
            name = run_id(experiment, inner.design.hash)
            settings = experiment.model_dump(mode="json")
            for fold in inner.design.folds.folds:
                folder = inner.folder / "trials" / f"{taken.number:04d}-{name}" / f"fold-{fold.index}"
                title = f"trial {taken.number}, inner fold {fold.index}"
                found.append(FoldJob(f"{name}/fold-{fold.index}", title, settings, fold.index, str(folder)))
        return found


def load_search(path: Path, overrides: Mapping[str, Any]) -> Search:
    """Read a search file and open its data.

    Args:
        path: the file.
        overrides: keys of the file, such as `trials`, or settings of every trial.

    Raises:
        ConfigError: the file, the space or a setting is not valid.
        DataError, ProtocolError: the data and folds do not go together, or nobody is left to search with.
    """
    tree = read_yaml(path, "search")
    own = {key: value for key, value in overrides.items() if key in SearchFile.model_fields}
    file = validate(SearchFile, {**tree, **own}, f"{path}: not a valid search")
    settings = {key: value for key, value in overrides.items() if key not in own}
    for key in ("seed", "fold"):
        if key in settings or key in file.overrides:
            raise ConfigError(f"{key}: a search says its {'seeds' if key == 'seed' else 'test_folds'}; give those")
    everywhere = {"name": file.name, **file.overrides, **settings}
    base = with_overrides(read_yaml(path.parent / file.experiment, "experiment"), everywhere)
    check(file.space, base, everywhere, str(path))
    experiment = resolve(base, {}, str(path))
    for number, guess in enumerate(file.first):
        resolve(base, guess, f"{path}: first[{number}]")
    if experiment.resources.workers > 1:
        raise ConfigError(
            f"resources.workers={experiment.resources.workers}: a trial trains in one process, and as many trials as "
            "fit are trained at once; give resources.workers=1"
        )
    fixed = [key for name, choice in file.space.items() for key in choice.keys(name)]
    fixed = [key for key in fixed if key.split(".")[0] == "data" or key.startswith("model.encoder")]
    if file.bank_mixes is not None and fixed:
        raise ConfigError(
            f"{path}: a trial that chooses {fixed[0]} needs other features than a bank holds; search it apart"
        )
    designs = Designs()
    design = designs.of(experiment)
    folder = Path(experiment.tracking.runs).expanduser().absolute() / f"search-{file.name}"
    last = len(design.folds.folds) - 1
    tested = file.test_folds or (tuple(range(last + 1)) if file.nested else (0,))
    if max(tested) > last or min(tested) < 0:
        raise ConfigError(f"test_folds={list(tested)}: protocol {design.folds.name!r} has the folds 0 to {last}")
    held = [(fold,) for fold in tested] if file.nested else [tested]
    studies = tuple(
        Inner(folds, inner_design(design, folds, file.inner_folds), folder / f"fold-{'-'.join(map(str, folds))}")
        for folds in held
    )
    search = Search(file, path, base, experiment, folder, designs, studies)
    _ = search.recipe  # what no bank can hold is refused before anything starts
    return search


def inner_design(design: Design, held_out: Sequence[int], count: int) -> Design:
    """The design of trials that never see the test speakers of some folds.

    The dev speakers of an inner fold are the test speakers of another fold of the protocol, the next ones first; all
    other speakers that are not held out train. A protocol with a single fold has one inner fold: its own train and dev.

    Raises:
        ConfigError: fewer other folds than `count`.
        ProtocolError: somebody or something is both held out and trained on.
    """
    folds = {fold.index: fold for fold in design.folds.folds}
    table = design.prepared.table
    speakers = np.asarray(table["speaker"].to_pylist())
    hidden = sorted({speaker for index in held_out for speaker in folds[index].speakers["test"]})
    seen = np.unique(np.concatenate([rows for fold in folds.values() for rows in fold.rows.values()]))
    pool = seen[~np.isin(speakers[seen], hidden)]
    order = sorted(index for index in folds if index not in held_out)
    order = [index for index in order if index > max(held_out)] + [index for index in order if index < max(held_out)]
    groups = [[speaker for speaker in folds[index].speakers["test"] if speaker not in hidden] for index in order]
    if not order:
        groups = [list(folds[held_out[0]].speakers["dev"])]
    groups = [group for group in groups if group]
    if count > len(groups):
        raise ConfigError(
            f"inner_folds={count}: with the test folds {', '.join(map(str, held_out))} held out, protocol "
            f"{design.folds.name!r} has {len(groups)} other{'' if order else ' (its own dev speakers)'}; give fewer"
        )
    nobody = np.zeros(0, np.int64)
    inner = []
    for index, dev in enumerate(groups[:count]):
        is_dev = np.isin(speakers[pool], dev)
        train = tuple(sorted(set(speakers[pool[~is_dev]].tolist())))
        rows = {"train": pool[~is_dev], "dev": pool[is_dev], "test": nobody}
        inner.append(Fold(index, rows, {"train": train, "dev": tuple(dev), "test": ()}))
        if not (len(rows["train"]) and len(rows["dev"])):
            raise ProtocolError(f"inner fold {index}: nobody is left to train or to choose by; hold out fewer folds")
    outside = np.unique(np.concatenate([folds[index].rows["test"] for index in held_out]))
    apart = Fold(0, {"train": pool, "dev": nobody, "test": outside}, {"train": (), "dev": (), "test": ()})
    leaks = [leak for fold in (*inner, apart) for leak in find_leaks(fold, table)]
    if leaks and not design.leaks:  # where the protocol leaks, its user has allowed it, and every result says so
        raise ProtocolError(f"trials would see what is tested: {leaks[0]}")
    return replace(design, folds=Folds(f"inside {design.folds.name}", tuple(inner)))


def plan_text(search: Search) -> str:
    """What would be done, for the terminal."""
    file = search.file
    lines = [f"search {file.name}: {file.trials} trials{' for each test fold' if file.nested else ''}", ""]
    width = max(map(len, file.space))
    lines += [f"{name:<{width}}  {choice.words()}" for name, choice in file.space.items()]
    aims = ", ".join(f"{name} ({DIRECTIONS[name]})" for name in file.objectives)
    lines += ["", f"objective: {aims}; proposed by {file.sampler}, ended early by {search.pruner}"]
    lines.append(f"first: the experiment as it stands{f', then {len(file.first)} more given' if file.first else ''}")
    each = len(file.seeds) * len(search.studies[0].design.folds.folds) * search.experiment.optim.epochs
    lines.append(f"a trial: {len(file.seeds)} seed(s) x {file.inner_folds} inner fold(s), {each} epochs in all")
    for inner in search.studies:
        lines.append(f"test {inner.title}, seen by no trial")
        for fold in inner.design.folds.folds:
            told = f"trains on {len(fold.speakers['train'])} speakers, dev {' '.join(fold.speakers['dev'])}"
            lines.append(f"  inner fold {fold.index} {told}")
    done = read_json(search.folder / "search.json") if (search.folder / "search.json").is_file() else None
    if done:
        finished = sum(trial["state"] != "RUNNING" for study in done["studies"] for trial in study["trials"])
        lines.append(f"{finished} trials are done already")
    return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """What a search leaves behind."""

    folder: Path
    found: dict[str, Any]
    """Content of search.json."""
    page: Path
    best: tuple[Path, ...]
    """Experiment files with the best settings."""
    not_tracked: str | None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        studies = self.found["studies"]

        def shown(study: Mapping[str, Any], number: int) -> dict[str, Any]:
            trial = study["trials"][number]
            value = trial["values"][0] if len(trial["values"]) == 1 else trial["values"]
            return {"overrides": trial["overrides"], "value": value}

        bests = [None if study["best"] is None else shown(study, study["best"]) for study in studies]
        final = self.found["final"]
        ua = final and final[SEARCHED]
        return {
            "study": str(self.folder),
            "trials": sum(trial["state"] != "RUNNING" for study in studies for trial in study["trials"]),
            "best": bests if self.found["nested"] else bests[0],
            "pareto": [shown(study, number) for study in studies for number in study["pareto"]],
            "nested_test": {"ua": ua["value"], "ua_low": ua["low"], "ua_high": ua["high"]}
            if ua and self.found["nested"]
            else None,
        }


def run_search(search: Search) -> Outcome:
    """Run the trials that are not done, then the final runs, the page and the record in MLflow.

    Raises:
        SermllError: the folder holds another search, its storage cannot be opened, or the cluster is too small. What
            was finished is kept.
    """
    try:
        search.folder.mkdir(parents=True, exist_ok=True)
        _claim(search)
    except OSError as error:
        raise DataError(f"{search.folder}: cannot be written ({error}); give another tracking.runs") from None
    tracker = SearchTracker.of(search.experiment, search.folder)
    told = []
    for inner in search.studies:
        with _open(search, inner) as study:
            study.begin(_guesses(search))
            _run_trials(search, inner, study)
            told.append(_describe_study(search, inner, study))
    with locked(search.folder / "final.lock"):  # of several drivers the first trains, the others find it done
        best = tuple(_write_best(search, inner, study) for inner, study in zip(search.studies, told, strict=True))
        final = None
        if search.file.test and all(study["best"] is not None for study in told):
            final = _final(search, told)
        found = _describe(search, told, final)
        write_json(search.folder / "search.json", found)
        page = search_page.build(search.folder)
        return Outcome(search.folder, found, page, tuple(path for path in best if path), tracker.finish())


def _claim(search: Search) -> None:
    """Refuse a folder that holds another search."""
    mark = search.folder / "fingerprint.json"
    with locked(search.folder / "final.lock"):
        now = {inner.folder.name: search.fingerprint(inner) for inner in search.studies}
        held = read_json(mark) if mark.exists() else {}
        for name, fingerprint in now.items():
            if held.get(name, fingerprint) != fingerprint:
                raise ConfigError(
                    f"{search.folder} holds another search: the space, the settings, the objectives, the inner folds "
                    "or the data differ, and its trials would not compare with new ones; give another name=..."
                )
        if held | now != held:
            write_json(mark, held | now)


def _open(search: Search, inner: Inner) -> Study:
    file = search.file
    rules = Rules(
        sampler=file.sampler,
        pruner=search.pruner,
        directions=tuple(DIRECTIONS[name] for name in file.objectives),
        seed=file.sampler_seed,
        warm_up_steps=max(1, search.experiment.optim.epochs // 3),
    )
    inner.folder.mkdir(parents=True, exist_ok=True)
    storage = file.storage or f"sqlite:///{search.folder / 'study.db'}"
    return Study(inner.folder, f"{file.name}-{inner.folder.name}-{search.fingerprint(inner)}", storage, rules)


def _guesses(search: Search) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The experiment as it stands, and what the file gives beside it."""
    found = []
    for guess in ({}, *search.file.first):
        settings = resolve(search.tree, guess, str(search.source)).model_dump(mode="json")
        found.append((guess, params_of(search.file.space, settings, guess)))
    return found


def _run_trials(search: Search, inner: Inner, study: Study) -> None:
    """Run trials until the study has all of them, seen to by this driver or by others."""

    def left() -> int:
        states = [trial.state for trial in study.trials()]
        return search.file.trials - sum(state.is_finished() for state in states)

    if left() <= 0:
        return
    with connected(), Progress(f"searching {search.file.name}", search.file.trials, search.file.trials - left()) as bar:
        while (unfinished := left()) > 0:
            _tune(search, inner, study, bar)
            while left() > 0 and study.waiting_for_others():
                time.sleep(POLL_S)
            if left() == unfinished:
                raise TrainingError("Ray Tune has ended with trials unfinished; the same command goes on from here")


def _tune(search: Search, inner: Inner, study: Study, progress: Progress) -> None:
    """Let Ray Tune schedule trials until there is none left to begin."""
    import os

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables would tear the progress bar
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # who interrupts means the search, not Tune's part of it
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    import ray
    from ray import tune

    resources = search.experiment.resources
    cluster = ray.cluster_resources()
    gpus = gpus_per_worker(resources, cluster)
    at_once = lanes_of(cluster.get("CPU", 0.0), resources)
    if gpus:
        at_once = min(at_once, int(cluster.get("GPU", 0.0) // gpus))
    if resources.parallel_folds != "auto":
        at_once = min(at_once, resources.parallel_folds)
    if at_once < 1:
        raise ConfigError(
            f"a trial needs {resources.cpus_per_worker:g} CPUs, {gpus:g} GPUs and some for its data, the cluster has "
            f"{cluster.get('CPU', 0):g} and {cluster.get('GPU', 0):g}; lower resources.cpus_per_worker, gpus_per_worker"
        )
    folds = [
        FoldData.of(f"{inner.design.hash}/fold-{fold.index}", inner.design.prepared, inner.design.labelled, fold.rows)
        for fold in inner.design.folds.folds
    ]
    bank = _bank(search, inner, gpus)
    desk: Any = ray.remote(num_cpus=0)(Desk).options(scheduling_strategy=_here()).remote(search, inner)
    scratch = inner.folder / f".tune-{study.driver}"
    try:
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_work, desk=desk, folds=folds, bank=bank),
                {"cpu": resources.cpus_per_worker, "gpu": gpus},
            ),
            tune_config=tune.TuneConfig(
                search_alg=_proposer(search, study, progress),
                max_concurrent_trials=at_once,
                num_samples=search.file.trials,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            ),
        ).fit()
    finally:
        ray.kill(desk)
        shutil.rmtree(scratch, ignore_errors=True)


def _here() -> Any:
    """The driver's node: what is on it alone, such as a SQLite file, is there too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Desk:
    """Hands trials their jobs and judges how they go, so that workers need no way to the storage. An actor."""

    def __init__(self, search: Search, inner: Inner) -> None:
        self._search, self._inner = search, inner
        self._study = _open(search, inner)

    def jobs(self, number: int) -> list[FoldJob]:
        """What a trial trains."""
        frozen = self._study.trials()[number]
        return self._search.jobs(self._inner, Taken(number, frozen.user_attrs["overrides"]))

    def report(self, number: int, step: int, value: float) -> bool:
        """Whether a trial that has come so far is to be ended."""
        return self._study.report(number, step, value)


def _bank(search: Search, inner: Inner, gpus: float) -> Bank | None:
    """The feature bank of all speakers that trials hear, made if need be."""
    import ray
    import torch

    recipe = search.recipe
    if recipe is None:
        return None
    design, nobody = inner.design, np.zeros(0, np.int64)
    pool = np.unique(np.concatenate([rows for fold in design.folds.folds for rows in fold.rows.values()]))
    data = FoldData.of(
        f"{design.hash}/pool", design.prepared, design.labelled, {"train": pool, "dev": nobody, "test": nobody}
    )
    root = search.folder.parent / "feature-banks"
    if gpus and not torch.cuda.is_available():  # the driver is on a machine without one
        build = ray.remote(num_gpus=1)(Bank.build)
        return ray.get(build.remote(root, data, recipe, torch.device("cuda")))
    return Bank.build(root, data, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _work(config: dict[str, Any], desk: Any, folds: Sequence[FoldData], bank: Bank | None) -> None:
    """A trial, as Ray Tune runs it: train a model for each seed and inner fold, or end early."""
    import os

    import ray
    import torch
    from ray import tune

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number = config["number"]
    done: list[dict[str, float]] = []
    seconds = 0.0
    for place, job in enumerate(ray.get(desk.jobs.remote(number))):

        def stop(history: list[dict[str, Any]], job: FoldJob = job, place: int = place) -> bool:
            scores = selection_scores(job.settings["protocol"]["select"], history)
            reached = [*(unit["dev_ua"] for unit in done), history[int(np.argmax(scores))]["dev_ua"]]
            step = place * job.settings["optim"]["epochs"] + len(history)
            return ray.get(desk.report.remote(number, step, float(np.mean(reached))))

        try:
            if not job.finished:
                Path(job.folder).mkdir(parents=True, exist_ok=True)
                batches, encoder = stream, None
                if bank is not None:
                    batches, encoder = bank.batches, bank.stand_in(Experiment.model_validate(job.settings))
                train_fold(job, folds[job.fold], batches, device, stop=stop, encoder=encoder)
        except (SermllError, torch.OutOfMemoryError, MemoryError) as error:
            short = "out of memory: " if isinstance(error, torch.OutOfMemoryError | MemoryError) else ""
            tune.report({"note": f"{job.title}: {short}{(str(error) or 'no more said').splitlines()[0]}"})
            return
        if not job.finished:
            told = sum(row["train_s"] + row["eval_s"] for row in job.history())
            tune.report({"note": "", "seconds": seconds + told})
            return
        done.append(_measure(job, folds[job.fold].classes))
        seconds += done[-1]["seconds"]
    values = {name: float(np.mean([unit[name] for unit in done])) for name in ("dev_ua", "ece")}
    values |= {"worst_speaker_ua": min(unit["worst_speaker_ua"] for unit in done)}
    tune.report({"note": "", "seconds": seconds, **values})


def _measure(job: FoldJob, classes: Sequence[str]) -> dict[str, float]:
    """What a finished inner fold is worth, on its dev speakers, by the epoch chosen on them."""
    folder = Path(job.folder)
    result = read_json(folder / "result.json")
    with naming(folder / results.DEV_PREDICTIONS):
        dev = pq.read_table(folder / results.DEV_PREDICTIONS)
    counts, _ = results.by_speaker(dev, classes)
    said, labels = results.probabilities(dev, classes)
    shutil.rmtree(job.checkpoints, ignore_errors=True)  # the model itself is of no use any more
    return {
        "dev_ua": float(metrics.ua(counts.sum(axis=0))),
        "worst_speaker_ua": float(np.nanmin(metrics.ua(counts))),
        "ece": calibration.expected_calibration_error(said, labels),
        "seconds": float(result["seconds"]),
    }


def _proposer(search: Search, study: Study, progress: Progress) -> Any:
    """Ray Tune's view of the study: it asks for trials and tells how they ended."""
    from ray.tune.search import Searcher

    tree = search.experiment.model_dump(mode="json")

    def choose(chooser: Chooser) -> dict[str, Any]:
        return suggest(search.file.space, tree, chooser)

    class Proposer(Searcher):
        """A trial for Tune is the number of one of the study's."""

        def __init__(self) -> None:
            super().__init__()
            self._numbers: dict[str, int] = {}

        def __reduce__(self) -> Any:
            """Tune keeps a copy for a restart of its own; ours begins from the study."""
            return Searcher, ()

        def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:  # FINISHED is a string
            taken = study.take(search.file.trials, choose)
            if taken is None:
                return Searcher.FINISHED
            self._numbers[trial_id] = taken.number
            return {"number": taken.number}

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            number = self._numbers.pop(trial_id)
            lost = "the workers were lost, more often than resources.max_failures allows"
            told: dict[str, Any] = {"note": lost} if error or not result else result
            measured = {name: told[name] for name in DIRECTIONS if name in told}
            values = [measured[name] for name in search.file.objectives] if "dev_ua" in measured else None
            facts = {"seconds": told.get("seconds"), "all": measured if values else None}
            study.tell(number, values, told["note"], facts)
            words = told["note"] or (f"dev UA {measured['dev_ua']:.3f}" if values else "ended early")
            progress.advance(1, f"trial {number}: {words}")

        def save(self, checkpoint_path: str) -> None:
            """Nothing: what matters is in the study."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing: what matters is in the study."""

    return Proposer()


def _write_best(search: Search, inner: Inner, study: Mapping[str, Any]) -> Path | None:
    """The best settings as an experiment file; None if no trial was finished."""
    if study["best"] is None:
        return None
    name = f"best-{inner.folder.name}" if search.file.nested else "best"
    overrides = study["trials"][study["best"]]["overrides"]
    tree = with_overrides(search.tree, {**overrides, "name": f"{search.file.name}_best"})
    if search.file.nested:
        tree |= {"fold": inner.test_folds[0]}
    tests = f"test {inner.title}" + ("" if search.file.nested else "; its other folds' speakers were seen by trials")
    path = search.folder / f"{name}.yaml"
    header = f"# Found by {len(study['trials'])} trials of the search {search.file.name}; no trial saw {tests}.\n"
    path.write_text(header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _final(search: Search, studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Train the best settings and the experiment as it stands, and score the test folds of both."""
    runs: dict[str, dict[tuple[int, int], Run]] = {SEARCHED: {}, DEFAULTS: {}}
    for inner, study in zip(search.studies, studies, strict=True):
        for name, overrides in ((SEARCHED, study["trials"][study["best"]]["overrides"]), (DEFAULTS, {})):
            for fold in inner.test_folds:
                for seed in search.file.seeds:
                    experiment = resolve(search.tree, {**overrides, "seed": seed, "fold": fold}, str(search.source))
                    runs[name][fold, seed] = Run.of(experiment, search.designs, f"{name} ")
    folders = {name: {key: run.folder / f"fold-{key[0]}" for key, run in found.items()} for name, found in runs.items()}
    work: dict[Path, tuple[FoldJob, FoldData]] = {}
    for run in (run for found in runs.values() for run in found.values()):
        run.open()
        work |= {Path(job.folder): (job, data) for job, data in run.unfinished}
    if work:
        with connected():
            failures = train_jobs(
                list(work.values()), f"testing {search.file.name}", search.folder / ".lanes", _unheard
            )
        if failures:
            told = [f"{job.title}: {why}" for job, why in failures.items()]
            raise TrainingError("\n".join([*told, "The trials are kept; the same command goes on from here"]))
    for folder in dict.fromkeys(run.folder for found in runs.values() for run in found.values()):
        results.gather(folder)
    classes = search.studies[0].design.classes
    tables = {
        (name, kind): pa.concat_tables(_answers(folder / kind) for folder in folders[name].values())
        for name in runs
        for kind in (results.PREDICTIONS, results.LAST_PREDICTIONS)
    }
    scores = {key: results.estimate(table, classes)[0]["ua"] for key, table in tables.items()}
    counts = {name: results.by_speaker(tables[name, results.PREDICTIONS], classes) for name in runs}
    same = folders[SEARCHED] == folders[DEFAULTS]
    difference = None
    if not same and len(counts[SEARCHED][1]) > 1:
        difference = compare.paired_difference(
            counts[DEFAULTS][0], counts[SEARCHED][0], counts[DEFAULTS][1], compare.SEED
        )
    return {
        "folds": sorted({fold for fold, _ in runs[SEARCHED]}),
        "seeds": list(search.file.seeds),
        "speakers": len(counts[SEARCHED][1]),
        "utterances": len(tables[SEARCHED, results.PREDICTIONS]) // len(search.file.seeds),
        "test_reads": len({folder for found in folders.values() for folder in found.values()}),
        SEARCHED: scores[SEARCHED, results.PREDICTIONS],
        DEFAULTS: scores[DEFAULTS, results.PREDICTIONS],
        f"{SEARCHED}_last": scores[SEARCHED, results.LAST_PREDICTIONS],
        f"{DEFAULTS}_last": scores[DEFAULTS, results.LAST_PREDICTIONS],
        "difference": difference and asdict(difference),
        "verdict": "no difference shown" if difference is None else compare.verdict(difference, difference.p),
        "runs": {name: sorted({str(run.folder) for run in found.values()}) for name, found in runs.items()},
    }


def _unheard(running: list[FoldJob], ended: list[FoldJob]) -> None:
    """Nobody watches the final runs; their progress bar tells enough."""


def _answers(path: Path) -> pa.Table:
    with naming(path):
        return pq.read_table(path, columns=["utterance", "speaker", "fold", "label", "predicted"])


def _describe_study(search: Search, inner: Inner, study: Study) -> dict[str, Any]:
    """A study as JSON."""
    best = study.best()
    return {
        "test_folds": list(inner.test_folds),
        "storage": study.url,
        "pool_speakers": len({name for fold in inner.design.folds.folds for name in fold.speakers["train"]}),
        "inner": [
            {split: list(fold.speakers[split]) for split in ("train", "dev")} for fold in inner.design.folds.folds
        ],
        "trials": [_describe_trial(search, trial) for trial in study.trials() if "driver" in trial.user_attrs],
        "best": best,
        "pareto": study.front() if len(search.file.objectives) > 1 else [],
        "importance": study.importance(),
    }


def _describe_trial(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    overrides = trial.user_attrs.get("overrides", {})
    experiment = resolve(search.tree, overrides, str(search.source))
    return {
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values if trial.state.name == "COMPLETE" else None,
        "all": trial.user_attrs.get("all"),
        "intermediate": [[step, value] for step, value in sorted(trial.intermediate_values.items())],
        "overrides": overrides,
        "settings": settings_of(search.file.space, experiment),
        "seconds": trial.user_attrs.get("seconds"),
        "note": trial.user_attrs.get("note", ""),
    }


def _describe(search: Search, studies: list[dict[str, Any]], final: dict[str, Any] | None) -> dict[str, Any]:
    """Everything as JSON, for the page and whoever reads the results."""
    design = search.designs.of(search.experiment)
    file = search.file
    return {
        "name": file.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": {"version": __version__, **code_version()},
        "experiment": file.experiment,
        "title": design.prepared.manifest["title"],
        "classes": list(design.classes),
        "protocol": design.folds.name,
        "leaks": [str(leak) for leak in design.leaks],
        "objectives": [{"name": name, "direction": DIRECTIONS[name]} for name in file.objectives],
        "sampler": file.sampler,
        "pruner": search.pruner,
        "trials": file.trials,
        "inner_folds": file.inner_folds,
        "seeds": list(file.seeds),
        "nested": file.nested,
        "space": {name: choice.words() for name, choice in file.space.items()},
        "studies": studies,
        "final": final,
    }
