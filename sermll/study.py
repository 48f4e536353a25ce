"""A search's memory: the trials of a study in an Optuna storage that several drivers may share.

Every driver holds a lock for as long as it lives. A trial whose driver has died is taken over by the next that asks
for one, with its number and its settings, so that no trial is lost and none is there twice.
"""

import hashlib
import logging
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import optuna
from optuna.samplers import BaseSampler
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from sermll.config import without_password
from sermll.errors import DataError
from sermll.space import Chooser
from sermll.storage import locked

Sampler = Literal["tpe", "gp", "cmaes", "nsga2", "nsga3", "random"]
Pruner = Literal["none", "median", "asha"]
SQLITE_WAIT_S = 120
"""How long a driver waits for others to let go of a SQLite file."""
WARM_UP = 5
"""Finished trials before the median rule ends any."""


@dataclass(frozen=True)
class Rules:
    """How a study proposes and ends trials."""

    sampler: Sampler
    pruner: Pruner
    directions: tuple[Literal["maximize", "minimize"], ...]
    """One for each objective."""
    seed: int
    """Of the sampler."""
    warm_up_steps: int
    """Steps of a trial that the median rule lets pass."""


@dataclass(frozen=True)
class Taken:
    """A trial that this driver is to see to."""

    number: int
    overrides: Mapping[str, Any]


class Study:
    """A study as one driver sees it."""

    def __init__(self, folder: Path, name: str, storage: str | None, rules: Rules) -> None:
        """Open or begin the study.

        Args:
            folder: for the locks, and for the SQLite file of a study whose `storage` is None.
            name: of the study in its storage.
            storage: a database's URL, or a journal file, whose name ends in .journal.
            rules: how trials are proposed.

        Raises:
            DataError: the storage cannot be opened.
        """
        self._folder, self._rules = folder, rules
        self._held = ExitStack()
        self._mine: dict[int, Trial] = {}
        (folder / "drivers").mkdir(parents=True, exist_ok=True)
        self.driver = uuid.uuid4().hex
        self._held.enter_context(locked(self._lock_of(self.driver)))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        url = storage or f"sqlite:///{folder / 'study.db'}"
        told = without_password(url)
        with self._alone(), quietly():
            try:
                self._study = optuna.create_study(
                    study_name=name,
                    storage=_storage(url),
                    sampler=_sampler(rules, 0),
                    pruner=_pruner(rules),
                    directions=list(rules.directions),
                    load_if_exists=True,
                )
            except Exception as error:  # whatever the database's driver raises
                why = str(error).strip().splitlines()[0].replace(url, told)
                raise DataError(f"storage {told}: cannot be opened ({why})") from None
        self.url = told

    def __enter__(self) -> Self:
        """Nothing to open; see `__exit__`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the study: trials that this driver has not told of are for others."""
        self._held.close()
        self._lock_of(self.driver).unlink(missing_ok=True)

    def begin(self, guesses: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Put the first trials into an empty study: of each, its overrides and what it chooses of the space."""
        with self._alone(), quietly():
            if not self.trials():
                for overrides, params in guesses:
                    kept = {"overrides": dict(overrides), "params": dict(params)}
                    self._study.enqueue_trial(dict(params), user_attrs=kept)

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; those that wait to be begun among them."""
        return self._study.get_trials(deepcopy=False)

    def take(self, total: int, choose: Callable[[Chooser], dict[str, Any]]) -> Taken | None:
        """The next trial: one whose driver has died, or a new one; None if `total` have been begun.

        Args:
            total: how many trials the study is to have.
            choose: makes overrides of what it asks a trial to choose.
        """
        with self._alone(), quietly():
            trials = self.trials()
            for frozen in trials:
                if frozen.state is TrialState.RUNNING and not self._alive(frozen.user_attrs.get("driver")):
                    return self._see_to(Trial(self._study, frozen._trial_id), choose)
            begun = sum(frozen.state is not TrialState.WAITING for frozen in trials)
            if begun >= total:
                return None
            # A sampler for each trial: what it draws depends on the trial's number, not on when a driver was started.
            self._study.sampler = _sampler(self._rules, begun)
            return self._see_to(self._study.ask(), choose)

    def _see_to(self, trial: Trial, choose: Callable[[Chooser], dict[str, Any]]) -> Taken:
        trial.set_user_attr("driver", self.driver)
        overrides, params = (trial.user_attrs.get(name) for name in ("overrides", "params"))
        if params is not None:
            choose(_Guess(trial, params))  # the sampler learns what the guess would have had to choose
        if overrides is None:
            overrides = choose(trial)
            trial.set_user_attr("overrides", overrides)
        self._mine[trial.number] = trial
        return Taken(trial.number, overrides)

    def waiting_for_others(self) -> bool:
        """Whether drivers that live have trials that are not finished."""
        return any(
            frozen.state is TrialState.RUNNING
            and frozen.user_attrs.get("driver") != self.driver
            and self._alive(frozen.user_attrs.get("driver"))
            for frozen in self.trials()
        )

    def report(self, number: int, step: int, value: float) -> bool:
        """Note how a trial of this study goes; returns whether it is to be ended. Trial 0, the reference, never is."""
        with quietly():
            trial = self._mine.get(number) or Trial(self._study, self.trials()[number]._trial_id)
            self._mine[number] = trial
            trial.report(value, step)
            return number > 0 and bool(trial.should_prune())

    def tell(self, number: int, values: Sequence[float] | None, note: str, facts: Mapping[str, Any]) -> None:
        """End a trial of this driver.

        Args:
            number: which.
            values: of the objectives; None: it failed or was ended early.
            note: why it failed; empty: it did not.
            facts: kept with it.
        """
        trial = self._mine[number]
        for key, value in {**facts, "note": note}.items():
            trial.set_user_attr(key, value)
        state = TrialState.COMPLETE if values is not None else TrialState.FAIL if note else TrialState.PRUNED
        with quietly():
            self._study.tell(number, values, state=state, skip_if_finished=True)

    def best(self) -> int | None:
        """The trial to go on with: the best one; with several objectives, the best by the first of the Pareto front."""
        front = self.front()
        if not front:
            return None
        up = self._rules.directions[0] == "maximize"
        trials = self.trials()
        return max(front, key=lambda number: ((trials[number].values or [])[0] * (1 if up else -1), -number))

    def front(self) -> list[int]:
        """Numbers of the trials that none betters in one objective without being worse in another."""
        trials = [trial for trial in self.trials() if trial.state is TrialState.COMPLETE]
        signs = [1.0 if direction == "maximize" else -1.0 for direction in self._rules.directions]
        points = {
            trial.number: [sign * value for sign, value in zip(signs, trial.values, strict=True)] for trial in trials
        }
        return [
            number
            for number, point in points.items()
            if not any(
                other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in points.values()
            )
        ]

    def importance(self) -> dict[str, float]:
        """How much of the first objective's variance each choice explains (fANOVA), of 1 in all.

        Of choices that most trials made, over the trials that made all of them; empty with fewer than four.
        """
        done = [trial for trial in self.trials() if trial.state is TrialState.COMPLETE]
        made = Counter(name for trial in done for name in trial.params)
        usual = {name for name, count in made.items() if 2 * count >= len(done)}
        alike = [trial for trial in done if usual <= trial.params.keys()]
        if not usual or len(alike) < 4 or len({trial.values[0] for trial in alike}) < 2:
            return {}
        with quietly():
            study = optuna.create_study()
            for trial in alike:
                held = {name: trial.distributions[name] for name in usual}
                params = {name: trial.params[name] for name in usual}
                study.add_trial(optuna.trial.create_trial(params=params, distributions=held, value=trial.values[0]))
            found = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
        return {name: float(value) for name, value in found.items()}

    def _alive(self, driver: str | None) -> bool:
        """Whether another process holds the driver's lock."""
        path = self._lock_of(driver or "")
        if not driver or not path.exists():
            return False
        with locked(path, wait=False) as free:
            return not free

    def _lock_of(self, driver: str) -> Path:
        return self._folder / "drivers" / f"{driver}.lock"

    def _alone(self) -> Any:  # a context manager
        return locked(self._folder / "drivers" / "all.lock")


class _Guess:
    """Chooses for a trial what a guess has, and leaves open what the space has no name for, such as "auto"."""

    def __init__(self, trial: Trial, params: Mapping[str, Any]) -> None:
        self._trial, self._params = trial, params

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """The guess's number; any, untold, if it has none."""
        return self._trial.suggest_float(name, low, high, log=log) if name in self._params else low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """The guess's number; any, untold, if it has none."""
        return self._trial.suggest_int(name, low, high) if name in self._params else low

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """The guess's choice; any, untold, if it has none."""
        return self._trial.suggest_categorical(name, choices) if name in self._params else choices[0]


@contextmanager
def quietly() -> Iterator[None]:
    """Without Optuna's warnings that parts of it are experimental, or that a step was reported before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _storage(url: str) -> optuna.storages.BaseStorage:
    if url.endswith(".journal"):
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(os.path.abspath(url)))
    wait = {"connect_args": {"timeout": SQLITE_WAIT_S}} if url.startswith("sqlite:") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=wait)


def _sampler(rules: Rules, number: int) -> BaseSampler:
    """What proposes the trial with this number."""
    seed = int.from_bytes(hashlib.sha256(f"{rules.seed} {number}".encode()).digest()[:4], "big")
    with quietly():
        match rules.sampler:
            case "tpe":
                return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)
            case "gp":
                return optuna.samplers.GPSampler(seed=seed)
            case "cmaes":
                return optuna.samplers.CmaEsSampler(seed=seed)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(seed=seed)
            case "nsga3":
                return optuna.samplers.NSGAIIISampler(seed=seed)
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)


def _pruner(rules: Rules) -> optuna.pruners.BasePruner:
    match rules.pruner:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=WARM_UP, n_warmup_steps=rules.warm_up_steps + 1)
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=rules.warm_up_steps + 1, reduction_factor=3)
