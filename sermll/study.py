"""A search's memory: the trials of a study in an Optuna storage that several drivers may share.

Every driver holds a lock for as long as it lives, beside the storage's file. Drivers that share a server need not share
a folder: there each says in the storage, again and again, that it lives. A trial whose driver has died is taken over
by the next that asks for one, with its number and its settings, so that no trial is lost and none is there twice.
"""

import hashlib
import logging
import math
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import optuna
import sqlalchemy
from optuna.samplers import BaseSampler
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sermll.config import without_password
from sermll.errors import ConfigError, DataError, StorageError
from sermll.space import Chooser
from sermll.storage import locked, origin, place, sqlite, telling, this_process

Sampler = Literal["tpe", "gp", "cmaes", "nsga2", "nsga3", "random"]
Pruner = Literal["none", "median", "asha"]
JOURNAL = ".journal"
ALL = "all.lock"
"""Held by whoever takes a trial."""
OPEN = "open"
"""Attribute of a trial that chose nothing for a setting of the space, since what it has there lies outside."""
LOOK_S = 0.1
"""How often a driver looks whether others have let go of a server's lock."""
JUDGED = "judged"
"""Attribute of a trial: the last step that was reported, and whether the trial was to be ended there."""
SQLITE_WAIT_S = 120
"""How long a driver waits for others to let go of a SQLite file."""
WARM_UP = 5
"""Earlier trials before the median rule ends any."""
AT_RANDOM: Mapping[Sampler, int] = {"tpe": 10, "gp": 10, "cmaes": 1, "nsga2": 10, "nsga3": 10}
"""Finished trials before a sampler learns from any; of nsga2 and nsga3, trials of a generation."""
BEAT_S, SILENT_S = 20.0, 120.0
"""How often a driver says to a server that it lives, and after which silence one of another machine counts as dead: so
many beats that neither a slow server nor clocks that differ a little make a living driver a dead one."""


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
    """A study as one driver sees it.

    Every method raises a StorageError when the storage has gone away.
    """

    def __init__(self, folder: Path, name: str, storage: str | None, rules: Rules) -> None:
        """Open or begin the study.

        Args:
            folder: for the locks of a study on a server, and for the SQLite file of one whose `storage` is None.
            name: of the study in its storage.
            storage: a database's URL, or a journal file, whose name ends in .journal; see `located`.
            rules: how trials are proposed.

        Raises:
            DataError: the storage cannot be opened.
        """
        self._name, self._rules = name, rules
        self._held = ExitStack()
        self._mine: dict[int, Trial] = {}
        self.driver = uuid.uuid4().hex
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        url = storage or sqlite(folder / "study.db")
        self.url = without_password(url)
        file = _file_of(url)
        self._locks = folder / "drivers" if file is None else file.with_name(f"{file.name}.drivers")
        with _opening(url), quietly():
            self._locks.mkdir(parents=True, exist_ok=True)
            self._server = _server(url) if file is None else None
            with self._alone():  # two at once would make the same tables, or study
                self._study = optuna.create_study(
                    study_name=name,
                    storage=_storage(url),
                    sampler=optuna.samplers.RandomSampler(),  # see `_Placed` for those that propose
                    pruner=_pruner(rules),
                    directions=list(rules.directions),
                    load_if_exists=True,
                )
                self._placed = _Placed(name, self._study._storage)
                self._sweep()
                self._held.enter_context(locked(self._lock_of(self.driver)))
        if self._server is not None:
            with self._asking():
                self._held.enter_context(self._beating())

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
        with self._asking(), self._alone(), quietly():
            if not self.trials():
                for overrides, params in guesses:
                    kept = {"overrides": dict(overrides), "params": dict(params)}
                    self._study.enqueue_trial(dict(params), user_attrs=kept)

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; those that wait to be begun among them."""
        with self._asking():
            return self._study.get_trials(deepcopy=False)

    def take(self, total: int, choose: Callable[[Chooser], dict[str, Any]]) -> Taken | None:
        """The next trial: one whose driver has died, or a new one; None if `total` have been begun.

        Args:
            total: how many trials the study is to have.
            choose: makes overrides of what it asks a trial to choose.
        """
        with self._asking(), self._alone(), quietly():
            trials = self.trials()
            for frozen in trials:
                if frozen.state is TrialState.RUNNING and not self.alive(frozen.user_attrs.get("driver")):
                    return self._see_to(Trial(self._placed, frozen._trial_id), choose)
            begun = sum(frozen.state is not TrialState.WAITING for frozen in trials)
            if begun >= total:
                return None
            return self._see_to(self._placed.ask(), choose)

    def _see_to(self, trial: Trial, choose: Callable[[Chooser], dict[str, Any]]) -> Taken:
        # A sampler for each trial: what it draws depends on the trial's number, not on when a driver was started.
        self._placed.sampler = _sampler(self._rules, trial.number)
        trial.set_user_attr("process", this_process())
        trial.set_user_attr("driver", self.driver)
        overrides, params = (trial.user_attrs.get(name) for name in ("overrides", "params"))
        if params is not None:
            guess = _Guess(trial, params)
            choose(guess)  # the sampler learns what the guess would have had to choose
            if guess.left_open:
                trial.set_user_attr(OPEN, True)
        if overrides is None:
            overrides = choose(trial)
            trial.set_user_attr("overrides", overrides)
        self._mine[trial.number] = Trial(self._study, trial._trial_id)
        return Taken(trial.number, overrides)

    def of_others(self) -> dict[int, str]:
        """The trials that drivers that live have not finished: of each, which process sees to it."""
        return {
            frozen.number: frozen.user_attrs.get("process", "another process")
            for frozen in self.trials()
            if frozen.state is TrialState.RUNNING
            and frozen.user_attrs.get("driver") != self.driver
            and self.alive(frozen.user_attrs.get("driver"))
        }

    def report(self, number: int, step: int, value: float) -> bool:
        """Note how a trial of this study goes; returns whether it is to be ended. Trial 0, the reference, never is.

        Of a step that was judged before, the verdict stands. A trial that another driver has taken over and ended, for
        this one was silent too long, is to be ended here, too.
        """
        with self._asking(), quietly():
            frozen = self.trials()[number]
            if frozen.state.is_finished():
                return True
            if len(self._rules.directions) > 1:  # no trial is ended then, and Optuna takes no steps
                return False
            judged, ended = frozen.user_attrs.get(JUDGED, (0, False))
            if step <= judged:
                return ended and step == judged
            trial = Trial(self._study, frozen._trial_id)
            trial.report(value, step)
            ended = trial.should_prune() and number > 0  # asked for trial 0 too: asha compares others with it
            trial.set_user_attr(JUDGED, (step, ended))
            return ended

    def note_fault(self, number: int, why: str) -> None:
        """Keep why a trial is about to fail; "": it begins again."""
        with self._asking():
            frozen = self.trials()[number]
            if not frozen.state.is_finished() and frozen.user_attrs.get("fault", "") != why:
                Trial(self._study, frozen._trial_id).set_user_attr("fault", why)

    def tell(self, number: int, values: Sequence[float] | None, note: str, facts: Mapping[str, Any]) -> None:
        """End a trial of this driver, unless another has taken it over and ended it.

        Args:
            number: which.
            values: of the objectives; None: it failed or was ended early.
            note: why it failed; empty: it did not.
            facts: kept with it.
        """
        trial = self._mine[number]
        state = TrialState.COMPLETE if values is not None else TrialState.FAIL if note else TrialState.PRUNED
        with self._asking(), self._alone(), quietly():
            if self.trials()[number].state.is_finished():
                return
            for key, value in {**facts, "note": note}.items():
                trial.set_user_attr(key, value)
            self._study.tell(number, values, state=state)

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

    def alive(self, driver: str | None) -> bool:
        """Whether another process holds a driver's lock, or one on another machine has lately said that it lives."""
        path = self._lock_of(driver or "")
        if driver and path.exists():
            with locked(path, wait=False) as free:
                return not free
        with self._asking():
            seen_at = self._study.user_attrs.get(_beat_of(driver or "")) if self._server is not None else None
        return seen_at is not None and time.time() - seen_at < SILENT_S

    def _lock_of(self, driver: str) -> Path:
        return self._locks / f"{driver}.lock"

    def _sweep(self) -> None:
        """Remove the locks of drivers that have died; what has none is known to be dead."""
        for path in self._locks.glob("*.lock"):
            if path.name != ALL:
                with locked(path, wait=False) as free:
                    if free:
                        self._say(path.stem, None)
                        path.unlink(missing_ok=True)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Say to the server that this driver lives, and at the end that it does not."""
        left = threading.Event()

        def beat() -> None:
            while not left.wait(BEAT_S):
                with suppress(Exception):  # a server that is away is told of by who has a trial to take or to tell
                    self._say(self.driver, time.time())

        self._say(self.driver, time.time())
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()
            with suppress(Exception):  # the server may be what has failed; then silence tells
                self._say(self.driver, None)

    def _say(self, driver: str, seen_at: float | None) -> None:
        if self._server is not None:
            self._study.set_user_attr(_beat_of(driver), seen_at)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Name a storage that has gone away since it was opened."""
        try:
            yield
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError) as error:
            said = str(error.__cause__ or error)  # Optuna's own words tell of invalid data, whatever it was
            why = without_password((said.strip() or type(error).__name__).splitlines()[0])
            raise StorageError(
                f"storage {self.url}: does not answer ({why}); the trials in it are kept: when it answers again, the "
                "same command goes on"
            ) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One driver at a time: of those that share the storage's file, or the server."""
        with ExitStack() as held:
            what = f"study {self._name} in {self.url}"
            held.enter_context(locked(self._locks / ALL, what=what))
            if self._server is not None:
                held.enter_context(_locked_there(self._server, self._name, what))
            yield


class _Placed(optuna.study.Study):
    """A study without the trials that lie outside the space.

    Most samplers model the settings alone that all trials have: one that left a weight at "auto" would hide it.
    """

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, states, use_cache)
        return [trial for trial in trials if not trial.user_attrs.get(OPEN)]


class _Guess:
    """Chooses for a trial what a guess has, and leaves open what the space has no name for, such as "auto"."""

    def __init__(self, trial: Trial, params: Mapping[str, Any]) -> None:
        self._trial, self._params = trial, params
        self.left_open = False

    def _has(self, name: str) -> bool:
        self.left_open |= name not in self._params
        return name in self._params

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """The guess's number; any, untold, if it has none."""
        return self._trial.suggest_float(name, low, high, log=log) if self._has(name) else low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """The guess's number; any, untold, if it has none."""
        return self._trial.suggest_int(name, low, high) if self._has(name) else low

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """The guess's choice; any, untold, if it has none."""
        return self._trial.suggest_categorical(name, choices) if self._has(name) else choices[0]


class _Median(optuna.pruners.BasePruner):
    """Ends a trial below the median of all earlier ones at the same step, where those ended before count as worst.

    About half of the trials come to their end. Optuna's own compares with trials that ran to the end alone: each that
    does raises the bar, until the few that drew well first end all others. It also compares the best that a trial had
    at any step, and the mean over inner folds falls when one begins.
    """

    def __init__(self, warm_up_steps: int) -> None:
        self._warm_up_steps = warm_up_steps

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Whether to end `trial`."""
        step = trial.last_step
        if step is None or step <= self._warm_up_steps:
            return False
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        others = [one.intermediate_values.get(step, -math.inf) for one in done]
        return len(others) >= WARM_UP and trial.intermediate_values[step] < float(np.median(others))


def located(storage: str) -> str:
    """A storage as every process can open it: the file of a journal or of SQLite by its absolute path.

    Raises:
        ConfigError: its file would lie on object storage, or it is a database of a kind that cannot be shared.
    """
    file = _file_of(storage)
    if file is None:
        if storage.partition(":")[0].partition("+")[0] not in _SERVERS:
            raise ConfigError(
                f"storage={without_password(storage)}: not known to a search; give postgresql://..., "
                "mysql+pymysql://..., sqlite:///FILE or FILE.journal"
            )
        return storage
    file = place(file).absolute()
    if origin(file):
        raise ConfigError(
            f"storage={storage}: {origin(file)} is no place for a database; give storage=postgresql://..."
        )
    return str(file) if storage.endswith(JOURNAL) else f"sqlite:///{file}"


def finished(name: str, storage: str) -> int:
    """How many trials of a study have ended; begins none.

    Raises:
        DataError: the storage cannot be opened.
    """
    file = _file_of(storage)
    if file is not None and not file.exists():
        return 0
    with _opening(storage), quietly():
        kept = _storage(storage)
        if name not in optuna.get_all_study_names(kept):
            return 0
        trials = optuna.load_study(study_name=name, storage=kept).get_trials(deepcopy=False)
    return sum(trial.state.is_finished() for trial in trials)


@contextmanager
def _opening(url: str) -> Iterator[None]:
    told = without_password(url)
    try:
        yield
    except Exception as error:  # whatever the database's driver raises
        why = (str(error).strip() or type(error).__name__).splitlines()[0].replace(url, told)
        raise DataError(f"storage {told}: cannot be opened ({why})") from None


def _file_of(url: str) -> Path | None:
    """The file of a journal or of SQLite; None: a server."""
    if url.endswith(JOURNAL):
        return Path(url)
    path = url.partition(":///")[2]
    return Path(path) if url.startswith("sqlite") and path else None


def _beat_of(driver: str) -> str:
    """The study's attribute that says when a driver was last seen."""
    return f"driver {driver}"


@dataclass(frozen=True)
class _Locks:
    """How a kind of database server is asked for locks that end with the connection. Statements."""

    take: str
    """1 or true: it is held; 0 or false: it is not free."""
    release: str
    holder: str
    """Who holds it."""


_POSTGRESQL = _Locks(
    "SELECT pg_try_advisory_lock(:key)",
    "SELECT pg_advisory_unlock(:key)",
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted "
    "AND datname = current_database() AND (classid::bigint << 32 | objid::bigint) = :key",
)
# MariaDB knows no endless wait: to it, -1 is no number of seconds, and the lock is not held.
_MYSQL = _Locks(
    "SELECT GET_LOCK(CONCAT('sermll ', :key), 0)",
    "SELECT RELEASE_LOCK(CONCAT('sermll ', :key))",
    "SELECT CONCAT('a process at ', host) FROM information_schema.processlist "
    "WHERE id = IS_USED_LOCK(CONCAT('sermll ', :key))",
)
_SERVERS: Mapping[str, _Locks] = {"postgresql": _POSTGRESQL, "mysql": _MYSQL, "mariadb": _MYSQL}


def _server(url: str) -> sqlalchemy.Engine:
    """A server as the locks see it: each connection is new, and ends where it is closed."""
    of = sqlalchemy.make_url(url)
    if of.get_backend_name() == "postgresql":  # where connections have names; elsewhere they are known by their ports
        of = of.update_query_dict({"application_name": this_process()})
    return sqlalchemy.create_engine(of, poolclass=sqlalchemy.NullPool)


@contextmanager
def _locked_there(server: sqlalchemy.Engine, name: str, what: str) -> Iterator[None]:
    """Hold a lock of a database server, which ends with the connection, whatever happens to this process.

    Args:
        server: see `_server`.
        name: of the lock, among those of this database.
        what: is waited for, told where that takes long.
    """
    locks = _SERVERS[server.dialect.name]
    named = f"{server.url.database} {name}".encode()  # to MySQL, locks of all databases are one set
    key = int.from_bytes(hashlib.sha256(named).digest()[:8], "big", signed=True)

    def ask(connection: sqlalchemy.Connection, statement: str) -> Any:  # whatever the statement gives
        return connection.scalar(sqlalchemy.text(statement), {"key": key})

    def take(connection: sqlalchemy.Connection) -> bool:
        answer = ask(connection, locks.take)
        if answer is None:
            raise StorageError(f"{what}: the database refuses a lock; look at its log")
        return bool(answer)

    def holder() -> str:
        with server.connect() as connection:
            return ask(connection, locks.holder) or ""

    with server.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not take(connection):
            with telling(what, holder):
                while not take(connection):
                    time.sleep(LOOK_S)
        yield
        ask(connection, locks.release)  # after a fault the connection's end does it


@contextmanager
def quietly() -> Iterator[None]:
    """Without Optuna's warnings that parts of it are experimental, or that a step was reported before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _storage(url: str) -> optuna.storages.BaseStorage:
    if url.endswith(JOURNAL):
        return optuna.storages.JournalStorage(JournalFileBackend(url))
    if _file_of(url) is not None:
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": SQLITE_WAIT_S}})
    with _locked_there(_server(url), "tables", f"the tables of {without_password(url)}"):  # two would make the same
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # it may have begun anew


def _sampler(rules: Rules, number: int) -> BaseSampler:
    """What proposes the trial with this number."""
    seed = int.from_bytes(hashlib.sha256(f"{rules.seed} {number}".encode()).digest()[:4], "big")
    first = AT_RANDOM.get(rules.sampler, 0)
    with quietly():
        match rules.sampler:
            case "tpe":
                return optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=first, seed=seed)
            case "gp":
                return optuna.samplers.GPSampler(n_startup_trials=first, seed=seed)
            case "cmaes":
                return optuna.samplers.CmaEsSampler(n_startup_trials=first, seed=seed)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(population_size=first, seed=seed)
            case "nsga3":
                return optuna.samplers.NSGAIIISampler(population_size=first, seed=seed)
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)


def _pruner(rules: Rules) -> optuna.pruners.BasePruner:
    match rules.pruner:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return _Median(rules.warm_up_steps)
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=rules.warm_up_steps + 1, reduction_factor=3)
