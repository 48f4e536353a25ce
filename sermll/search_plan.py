"""What a search asks: its file, the speakers its trials may hear, what each trial trains. Nothing is started here."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from sermll import compare
from sermll.bank import estimate_bytes
from sermll.bank_plan import Recipe
from sermll.campaign import CampaignBase
from sermll.config import EAM, Experiment, read_yaml, resolve, run_id, validate, with_overrides
from sermll.design import Design
from sermll.errors import ConfigError, ProtocolError
from sermll.feed import FoldData
from sermll.loop import FoldJob
from sermll.pretrained import frame_width
from sermll.protocol import Fold, Folds, check_classes, check_dev, find_leaks
from sermll.space import Choice, as_meant, check, conditional, points
from sermll.storage import place, sqlite
from sermll.study import AT_RANDOM, Pruner, Sampler, Taken, finished, located
from sermll.train import Designs, check_batch

Objective = Literal["dev_ua", "worst_speaker_ua", "ece", "seconds"]
DIRECTIONS: dict[Objective, Literal["maximize", "minimize"]] = {
    "dev_ua": "maximize",
    "worst_speaker_ua": "maximize",
    "ece": "minimize",
    "seconds": "minimize",
}


class SearchFile(CampaignBase):
    """What a search file holds."""

    space: dict[str, Choice] = Field(description="what trials choose, see `sermll.space`")
    first: tuple[dict[str, Any], ...] = Field(
        default=(), description="overrides of the trials after the first, which is the experiment as it stands"
    )
    objectives: tuple[Objective, ...] = Field(
        default=("dev_ua",),
        min_length=1,
        description="over inner folds and seeds: mean dev UA, UA of the worst dev speaker of all, mean ECE on dev, "
        "seconds in all",
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
        lengths = [name for name, choice in self.space.items() if "optim.epochs" in choice.keys(name)]
        if self.rule != "none" and (lengths or any("optim.epochs" in guess for guess in self.first)):
            raise ValueError(
                f"pruner={self.rule} compares trials step by step, and those of other optim.epochs are elsewhere "
                "at the same step; give pruner=none"
            )
        if self.sampler == "cmaes" and len(self.objectives) > 1:
            raise ValueError("sampler=cmaes knows one objective; for several give tpe, gp, nsga2, nsga3 or random")
        worded = [name for name, choice in self.space.items() if choice.choice is not None]
        if self.sampler == "cmaes" and worded:
            raise ValueError(f"sampler=cmaes knows numbers alone, and space.{worded[0]} is a choice; give tpe or gp")
        return self

    @property
    def rule(self) -> Pruner:
        """What ends trials early."""
        if self.pruner != "auto":
            return self.pruner
        return "median" if self.objectives == ("dev_ua",) else "none"


@dataclass(frozen=True)
class Inner:
    """What the trials of one study may see."""

    test_folds: tuple[int, ...]
    """Of the protocol; their test speakers, and theirs alone, are held out."""
    tested: tuple[str, ...]
    """These speakers."""
    design: Design
    """Folds of the other speakers, with nobody in test."""
    folder: Path

    @property
    def title(self) -> str:
        """Names the test folds."""
        return f"fold{'s' if len(self.test_folds) > 1 else ''} {', '.join(map(str, self.test_folds))}"

    def pool(self) -> FoldData:
        """All utterances that trials hear, as what is trained on: what a feature bank is built for."""
        design, nobody = self.design, np.zeros(0, np.int64)
        pool = np.unique(np.concatenate([rows for fold in design.folds.folds for rows in fold.rows.values()]))
        rows = {"train": pool, "dev": nobody, "test": nobody}
        return FoldData.of(f"{design.hash}/pool", design.prepared, design.labelled, rows)


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
    recipe: Recipe | None
    """What a feature bank holds for the trials; None: they hear waveforms."""

    def fingerprint(self, inner: Inner) -> str:
        """Of everything that makes trials comparable."""
        told = [
            {name: choice.model_dump(mode="json") for name, choice in self.file.space.items()},
            self.file.model_dump(
                mode="json", include={"first", "objectives", "sampler", "sampler_seed", "seeds", "bank_mixes"}
            ),
            [self.file.rule, self.experiment.science(), inner.design.hash],
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    def study_name(self, inner: Inner) -> str:
        """How the study of some test folds is called in its storage."""
        return f"{self.file.name}-{inner.folder.name}-{self.fingerprint(inner)}"

    @property
    def mark(self) -> Path:
        """The file by which the folder is known as this search's."""
        return self.folder / "fingerprint.json"

    @property
    def storage(self) -> str:
        """URL or journal file of the studies."""
        return self.file.storage or sqlite(self.folder / "study.db")

    def finished(self) -> int:
        """How many trials have ended, of all studies.

        Raises:
            DataError: the storage cannot be opened.
        """
        return sum(finished(self.study_name(inner), self.storage) for inner in self.studies)

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


def read_search(path: Path, overrides: Mapping[str, Any]) -> tuple[SearchFile, dict[str, Any]]:
    """Read a search file, and the settings of its trials before they choose; opens no data.

    Args:
        path: the file.
        overrides: keys of the file, such as `trials`, or settings of every trial.

    Raises:
        ConfigError: the file, the space or a setting is not valid, or the sampler does not learn from such a space.
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
    if experiment.resources.workers != 1:
        raise ConfigError(
            f"resources.workers={experiment.resources.workers}: a trial trains in one process, and as many trials as "
            "fit are trained at once; give resources.workers=1"
        )
    sometimes = conditional(file.space, experiment.model_dump(mode="json"))
    if file.sampler not in ("tpe", "random") and sometimes:
        raise ConfigError(
            f"{path}: sampler={file.sampler} learns of settings that every trial chooses, and would draw "
            f"{', '.join(sometimes)} at random; give sampler=tpe, or a space without what is off or waits"
        )
    return file, base


def load_search(path: Path, overrides: Mapping[str, Any]) -> Search:
    """Read a search file and open its data; see `read_search`.

    Raises:
        ConfigError: the file, the space or a setting is not valid, or a trial may have batches of more utterances than
            it, or the final run, would train on.
        DataError, ProtocolError: the data and folds do not go together, or nobody is left to search with.
    """
    file, base = read_search(path, overrides)
    if file.storage:
        file = file.model_copy(update={"storage": located(file.storage)})
    experiment = resolve(base, {}, str(path))
    designs = Designs()
    design = designs.of(experiment)
    folder = place(experiment.tracking.runs).absolute() / f"search-{file.name}"
    last = len(design.folds.folds) - 1
    tested = file.test_folds or (tuple(range(last + 1)) if file.nested else (0,))
    if max(tested) > last or min(tested) < 0:
        raise ConfigError(f"test_folds={list(tested)}: protocol {design.folds.name!r} has the folds 0 to {last}")
    held = [(fold,) for fold in tested] if file.nested else [tested]
    studies = tuple(
        Inner(
            folds,
            tuple(sorted({name for fold in folds for name in design.folds.folds[fold].speakers["test"]})),
            inner_design(design, folds, file.inner_folds),
            folder / f"fold-{'-'.join(map(str, folds))}",
        )
        for folds in held
    )
    largest = max(trial.optim.batch_size for _, trial in _asked(file, base, str(path)))
    for inner in studies:
        for fold in inner.design.folds.folds:
            check_batch(largest, fold, f"inner fold {fold.index} of test {inner.title}")
        for index in inner.test_folds:
            check_batch(largest, design.folds.folds[index], f"fold {index}")
    return Search(file, path, base, experiment, folder, designs, studies, _recipe(file, base, str(path)))


def _asked(file: SearchFile, base: Mapping[str, Any], source: str) -> list[tuple[Mapping[str, Any], Experiment]]:
    """Trials that may be asked for: the experiment as it stands, the guesses, and points of the space."""
    experiment = resolve(base, {}, source)
    tree = experiment.model_dump(mode="json")
    chosen = [*(as_meant(tree, guess) for guess in file.first), *points(file.space, tree)]
    return [({}, experiment), *((overrides, resolve(base, overrides, source)) for overrides in chosen)]


def _recipe(file: SearchFile, base: Mapping[str, Any], source: str) -> Recipe | None:
    """What the bank has to hold for every trial that may be asked for.

    Raises:
        ConfigError: no bank serves the experiment, a guess or a point of the space.
    """
    if file.bank_mixes is None:
        return None
    asked = _asked(file, base, source)
    heard = [trial.mixup.snr_db for _, trial in asked if isinstance(trial.mixup, EAM)]
    if not heard:
        raise ConfigError(f"bank_mixes={file.bank_mixes} has no effect: no trial mixes with mixup.kind=eam")
    chosen = file.space.get("mixup.snr_db")
    if chosen is not None and chosen.range:
        heard.append(chosen.range)
    widest = (min(pair[0] for pair in heard), max(pair[1] for pair in heard))
    recipe = Recipe.of(asked[0][1], file.bank_mixes, widest)
    for overrides, trial in asked:
        try:
            recipe.check(trial)
        except ConfigError as error:
            said = ", ".join(f"{key}={value}" for key, value in overrides.items()) or "the experiment as it stands"
            raise ConfigError(
                f"{source}: bank_mixes does not go with a trial that may be asked for\n{error}\n{said}"
            ) from None
    return recipe


def inner_design(design: Design, held_out: Sequence[int], count: int) -> Design:
    """The design of trials that never see the test speakers of some folds.

    The dev speakers of an inner fold are the test speakers of another fold of the protocol, the next ones first; all
    other speakers that are not held out train. A protocol with a single fold has one inner fold: its own train and dev.

    Raises:
        ConfigError: fewer other folds than `count`.
        ProtocolError: somebody or something is both held out and trained on, or an inner fold cannot be learned or
            chosen by.
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
        try:
            heard = Fold(index, {"train": rows["train"], "dev": rows["dev"]}, inner[-1].speakers)
            check_classes(heard, design.labelled.labels, design.classes)
            check_dev(heard, design.labelled.labels, design.classes, "give other protocol.folds or test_folds")
        except ProtocolError as error:
            raise ProtocolError(f"inner {error}") from None
    outside = np.unique(np.concatenate([folds[index].rows["test"] for index in held_out]))
    apart = Fold(0, {"train": pool, "dev": nobody, "test": outside}, {"train": (), "dev": (), "test": ()})
    leaks = [leak for fold in (*inner, apart) for leak in find_leaks(fold, table)]
    if leaks and not design.leaks:  # where the protocol leaks, its user has allowed it, and every result says so
        raise ProtocolError(f"trials would see what is tested: {leaks[0]}")
    return replace(design, folds=Folds(f"inside {design.folds.name}", tuple(inner)))


def plan_text(search: Search) -> str:
    """What would be done, for the terminal.

    Raises:
        ConfigError: the encoder of a feature bank cannot be had.
        DataError: the storage of the trials cannot be opened.
    """
    file = search.file
    lines = [f"search {file.name}: {file.trials} trials{' for each test fold' if file.nested else ''}", ""]
    width = max(map(len, file.space))
    lines += [f"{name:<{width}}  {choice.words()}" for name, choice in file.space.items()]
    aims = ", ".join(f"{name} ({DIRECTIONS[name]})" for name in file.objectives)
    drawn = AT_RANDOM.get(file.sampler, 0)
    lines += ["", f"objective: {aims}; proposed by {file.sampler}, ended early by {file.rule}"]
    lines += [f"{file.sampler} draws at random until {drawn} trials are finished"] if drawn > 1 else []
    lines.append(f"first: the experiment as it stands{f', then {len(file.first)} more given' if file.first else ''}")
    each = len(file.seeds) * len(search.studies[0].design.folds.folds) * search.experiment.optim.epochs
    lines.append(f"a trial: {len(file.seeds)} seed(s) x {file.inner_folds} inner fold(s), {each} epochs in all")
    recipe = search.recipe
    for inner in search.studies:
        lines.append(f"test {inner.title}, seen by no trial")
        for fold in inner.design.folds.folds:
            told = f"trains on {len(fold.speakers['train'])} speakers, dev {' '.join(fold.speakers['dev'])}"
            lines.append(f"  inner fold {fold.index} {told}")
        if recipe is not None:
            size = estimate_bytes(inner.pool(), recipe, frame_width(recipe.encoder.name))
            lines.append(f"  feature bank: {size / 1e6:,.1f} MB, {recipe.mixes} mix(es) of each utterance")
    few = compare.too_few(len({name for inner in search.studies for name in inner.tested}))
    lines += [f"{few}; nested=true or more test_folds test more"] if few and file.test else []
    done = search.finished()
    lines += [f"{done} trials are done already"] if done else []
    return "\n".join(lines)
