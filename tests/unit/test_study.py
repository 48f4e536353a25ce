"""A search's memory: proposals, dead drivers, early ends, fronts. No training, no Ray."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from optuna.trial import TrialState

from sermll import study as study_module
from sermll.errors import ConfigError, DataError, StorageError
from sermll.space import Chooser
from sermll.study import Rules, Study, finished, located

MEDIAN = Rules("tpe", "median", ("maximize",), seed=0, warm_up_steps=1)


def choose(trial: Chooser) -> dict[str, float]:
    return {"x": trial.suggest_float("x", 0, 1)}


def open_study(folder: Path, rules: Rules = MEDIAN, storage: str = "x.journal") -> Study:
    """A journal by default: it is quicker than SQLite, of which `storage` is "" here."""
    folder.mkdir(exist_ok=True)
    return Study(folder, "x", str(folder / storage) if storage.endswith(".journal") else storage or None, rules)


def test_guesses_come_first_with_their_overrides_and_what_has_no_number_is_left_open(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        study.begin([({}, {}), ({"x": 0.25}, {"x": 0.25})])
        study.begin([({}, {})])  # a second driver adds none
        taken = [study.take(4, choose) for _ in range(4)]
        assert [one.number for one in taken if one] == [0, 1, 2, 3]
        assert taken[0] and taken[0].overrides == {} and study.trials()[0].params == {}
        assert taken[1] and taken[1].overrides == {"x": 0.25} and study.trials()[1].params == {"x": 0.25}
        assert taken[2] and taken[2].overrides == study.trials()[2].params
        assert study.take(4, choose) is None


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2", "nsga3", "random"])
def test_a_study_proposes_the_same_however_often_it_is_opened_again(tmp_path: Path, sampler: str) -> None:
    proposed = []
    for name, opened in (("one", [5]), ("two", [2, 1, 2])):
        rules = Rules(sampler, "none", ("maximize",), seed=3, warm_up_steps=1)  # type: ignore[arg-type]
        told = []
        for count in opened:
            with open_study(tmp_path / name, rules) as study:
                for _ in range(count):
                    taken = study.take(5, choose)
                    assert taken
                    told.append(taken.overrides["x"])
                    study.tell(taken.number, [taken.overrides["x"]], "", {})
        proposed.append(told)
    assert proposed[0] == pytest.approx(proposed[1])
    assert len(set(proposed[0])) == 5


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2", "nsga3"])
def test_a_sampler_models_every_setting_whatever_the_first_guess_leaves_open(tmp_path: Path, sampler: str) -> None:
    def both(trial: Chooser) -> dict[str, float]:
        return {name: trial.suggest_float(name, 0, 1) for name in ("x", "y")}

    rules = Rules(sampler, "none", ("maximize",), seed=0, warm_up_steps=1)  # type: ignore[arg-type]
    with open_study(tmp_path, rules) as study:
        study.begin([({}, {"x": 0.5})])  # of y it is said that it is "auto"
        for _ in range(14):
            taken = study.take(15, both)
            assert taken
            study.tell(taken.number, [-(taken.overrides.get("x", 0.5) ** 2)], "", {})
        seen = study._placed
        last = seen.ask()
        inferred = seen.sampler.infer_relative_search_space(seen, study.trials()[last.number])
        assert set(inferred) == {"x", "y"}
        proposed = set(seen.sampler.sample_relative(seen, study.trials()[last.number], inferred))
        assert proposed == {"x", "y"} or (sampler.startswith("nsga") and proposed)  # these let some mutate
        assert [trial.number for trial in study.trials()] == list(range(15)) and study.best() is not None


def test_locks_of_the_dead_are_swept_away(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        left = study._locks / "0123.lock"
        left.touch()
        with open_study(tmp_path) as other:
            assert not left.exists() and other.alive(study.driver) and not other.alive("0123")


def test_finished_trials_are_counted_without_beginning_a_study(tmp_path: Path) -> None:
    storage = str(tmp_path / "x.journal")
    assert finished("x", storage) == 0 and not any(tmp_path.iterdir())
    with open_study(tmp_path) as study:
        study.take(2, choose)
        study.take(2, choose)
        study.tell(0, None, "out of memory", {})
    assert finished("x", storage) == 1 and finished("y", storage) == 0


def test_files_of_storages_are_the_same_for_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERMLL_ROOT", str(tmp_path))
    assert located("a/x.journal") == f"{tmp_path}/a/x.journal"
    assert located("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"
    assert located("sqlite:////y/x.db") == "sqlite:////y/x.db"
    assert located("postgresql://h/x") == "postgresql://h/x"
    monkeypatch.setenv("SERMLL_ROOT", "s3://bucket")
    with pytest.raises(ConfigError, match="no place for a database"):
        located("x.journal")


@pytest.mark.parametrize("storage", ["oracle://me:s3cret@h/x", "postgres", "sqlite://", "x.db"])
def test_storages_of_other_kinds_are_refused(storage: str) -> None:
    with pytest.raises(ConfigError, match=r"not known to a search; give postgresql://") as refused:
        located(storage)
    assert "s3cret" not in str(refused.value)


class FakeServer:
    """A database server that answers what it is told to, and remembers what it was asked."""

    def __init__(self, url: str, *answers: int | None) -> None:
        self.url = sqlalchemy.make_url(url)
        self.dialect = SimpleNamespace(name=self.url.get_backend_name())
        self.answers, self.asked = list(answers), []

    def connect(self) -> "FakeServer":
        return self

    def execution_options(self, **options: str) -> "FakeServer":
        assert options == {"isolation_level": "AUTOCOMMIT"}
        return self

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.asked.append("closed")

    def scalar(self, statement: sqlalchemy.TextClause, values: dict[str, int]) -> int | None:
        self.asked.append(f"{statement} {values['key']}")
        return self.answers.pop(0)


@pytest.mark.parametrize("url", ["postgresql://h/x", "mysql+pymysql://h/x", "mariadb+pymysql://h/x"])
def test_a_lock_of_a_server_is_held_when_the_server_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "LOOK_S", 0.0)
    server: Any = FakeServer(url, 0, 0, 1, 1)
    with study_module._locked_there(server, "x", "study x"):
        assert len(server.asked) == 3 and len(set(server.asked)) == 1
    assert len(server.asked) == 5 and server.asked[3:] != server.asked[:2] and server.asked[4] == "closed"


def test_a_server_that_refuses_a_lock_is_named() -> None:
    server: Any = FakeServer("mysql+pymysql://h/x", None)  # as MariaDB says that something is wrong
    with (
        pytest.raises(StorageError, match="study x: the database refuses a lock"),
        study_module._locked_there(server, "x", "study x"),
    ):
        raise AssertionError("the lock is not held")
    assert server.asked[-1] == "closed"


def test_locks_differ_between_databases_of_a_server() -> None:
    asked = []
    for database in "xyx":
        server: Any = FakeServer(f"mysql+pymysql://h/{database}", 1, 1)
        with study_module._locked_there(server, "name", "study"):
            asked.append(server.asked[0])
    assert asked[0] == asked[2] != asked[1]


@pytest.mark.parametrize("storage", ["", "x.journal"])
def test_a_trial_of_a_dead_driver_is_taken_over_and_one_of_a_living_driver_is_not(tmp_path: Path, storage: str) -> None:
    script = (
        "import sys, os; from pathlib import Path; from test_study import *\n"
        "study = open_study(Path(sys.argv[1]), storage=sys.argv[2]); print(study.take(9, choose).overrides)\n"
        "sys.stdout.flush(); sys.stdin.readline(); os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), storage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert process.stdin and process.stdout
    held = process.stdout.readline()
    with open_study(tmp_path, storage=storage) as study:
        mine = study.take(9, choose)
        assert mine and mine.number == 1 and study.of_others()
        assert study.of_others() == {0: f"process {process.pid} on {os.uname().nodename}"}
        process.communicate("die\n")
        assert not study.of_others()
        taken = study.take(9, choose)
        assert taken and taken.number == 0 and str(taken.overrides) == held.strip()
        study.tell(0, [0.5], "", {"seconds": 1.0})
        assert study.trials()[0].state is TrialState.COMPLETE and study.trials()[0].user_attrs["seconds"] == 1.0
        left = study.take(9, choose)
        assert left and left.number == 2 and len(study.trials()) == 3


def test_a_driver_that_was_silent_too_long_leaves_its_trial_to_who_has_ended_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_study(tmp_path) as stalled, open_study(tmp_path) as other:
        assert stalled.take(2, choose)
        monkeypatch.setattr(other, "alive", lambda driver: False)
        taken = other.take(2, choose)
        assert taken and taken.number == 0
        other.tell(0, [0.5], "", {"seconds": 1.0})
        assert stalled.report(0, 1, 0.1)  # it need not go on
        stalled.note_fault(0, "lost")
        stalled.tell(0, None, "lost", {"seconds": 9.0})
        (trial,) = other.trials()
        assert trial.values == [0.5] and not trial.intermediate_values
        assert trial.user_attrs["note"] == "" and trial.user_attrs["seconds"] == 1.0 and "fault" not in trial.user_attrs


def test_trials_for_several_objectives_are_never_ended(tmp_path: Path) -> None:
    with open_study(tmp_path, Rules("tpe", "none", ("maximize", "minimize"), seed=0, warm_up_steps=1)) as study:
        for number in range(2):
            assert study.take(2, choose)
            assert not study.report(number, 1, 0.1)
            study.tell(number, [0.1, 3.0], "", {})
        assert study.front() == [0, 1]


def test_ends_are_told_apart(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        for _ in range(3):
            study.take(3, choose)
        study.tell(0, [0.5], "", {})
        study.tell(1, None, "out of memory", {})
        study.tell(2, None, "", {})
        assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "FAIL", "PRUNED"]
        assert study.trials()[1].user_attrs["note"] == "out of memory"
        assert study.best() == 0


def test_poor_trials_are_ended_and_the_reference_never_is(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        for number in range(8):
            study.take(9, choose)
            for step in (1, 2, 3):
                ended = study.report(number, step, 0.0 if number in (0, 7) else 0.5 + number / 100)
                assert ended == (number == 7 and step > 1)  # the first step is let pass, five trials are waited for
            study.tell(number, None if number == 7 else [0.5], "", {})
        assert study.trials()[7].state is TrialState.PRUNED


def test_the_better_half_comes_to_its_end_however_many_steps_there_are(tmp_path: Path) -> None:
    worth = np.random.default_rng(0).random(40).tolist()
    with open_study(tmp_path) as study:
        for number, value in enumerate(worth):
            study.take(len(worth), choose)
            ended = any(study.report(number, step, value) for step in range(1, 9))
            assert ended == (number >= 5 and value < np.median(worth[:number])), number
            study.tell(number, None if ended else [value], "", {})
        finished = [trial for trial in study.trials() if trial.state is TrialState.COMPLETE]
        assert len(worth) / 3 < len(finished) < len(worth) * 2 / 3


def test_a_trial_is_compared_with_others_at_the_same_step_though_values_fall_where_a_fold_begins(
    tmp_path: Path,
) -> None:
    saw = (0.2, 0.5, 0.8, 0.4, 0.5, 0.6)  # the mean over inner folds: the second begins at the fourth step
    with open_study(tmp_path) as study:
        for number in range(7):
            study.take(9, choose)
            poor = 0.1 if number == 6 else number / 100
            ended = []
            for step, value in enumerate(saw, 1):
                value += poor if step <= 3 else -poor if number == 6 else poor
                ended.append(study.report(number, step, value))
            # It led in the first fold, which does not spare it when it falls behind in the second.
            assert ended == [number == 6 and step > 3 for step in range(1, 7)]
            study.tell(number, [0.5], "", {})


def test_the_front_is_that_of_a_slow_loop_and_its_first_objective_decides(tmp_path: Path) -> None:
    rules = Rules("random", "none", ("maximize", "minimize"), seed=0, warm_up_steps=1)
    generator = np.random.default_rng(0)
    points = generator.integers(0, 6, (20, 2)).astype(float)
    with open_study(tmp_path, rules) as study:
        assert study.best() is None and study.front() == []
        for point in points:
            taken = study.take(20, choose)
            assert taken
            study.tell(taken.number, point.tolist(), "", {})
        bettered = {
            one
            for one in range(20)
            for other in range(20)
            if points[other, 0] >= points[one, 0]
            and points[other, 1] <= points[one, 1]
            and (points[other] != points[one]).any()
        }
        assert study.front() == sorted(set(range(20)) - bettered)
        assert points[study.best(), 0] == points[study.front(), 0].max()


def test_importance_finds_what_matters_and_leaves_out_who_chose_nothing(tmp_path: Path) -> None:
    def both(trial: Chooser) -> dict[str, float]:
        return {name: trial.suggest_float(name, 0, 1) for name in ("matters", "idle")}

    rules = Rules("random", "none", ("maximize",), seed=0, warm_up_steps=1)
    with open_study(tmp_path, rules) as study:
        study.begin([({}, {})])
        assert study.importance() == {}
        for _ in range(30):
            taken = study.take(30, both)
            assert taken
            study.tell(taken.number, [taken.overrides.get("matters", 0.1) ** 2], "", {})
        found = study.importance()
    assert found.keys() == {"matters", "idle"}
    assert found["matters"] > 0.8 and sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda study: study.begin([]),
        lambda study: study.trials(),
        lambda study: study.take(2, choose),
        lambda study: study.of_others(),
        lambda study: study.report(0, 1, 0.5),
        lambda study: study.note_fault(0, "out of memory"),
        lambda study: study.tell(0, [0.5], "", {}),
        lambda study: study.best(),
    ],
    ids=["begin", "trials", "take", "waiting", "report", "fault", "tell", "best"],
)
def test_a_storage_that_goes_away_is_named(ask: Callable[[Study], Any], tmp_path: Path) -> None:
    with Study(tmp_path, "x", None, MEDIAN) as study:
        study.take(2, choose)
        kept = (tmp_path / "study.db").read_bytes()
        (tmp_path / "study.db").write_bytes(b"nothing" * 3000)
        with pytest.raises(
            StorageError, match=r"study\.db: does not answer \(.*not a database\); .*same command goes on"
        ):
            ask(study)
        (tmp_path / "study.db").write_bytes(kept)
    with Study(tmp_path, "x", None, MEDIAN) as study:
        taken = study.take(2, choose)
        assert taken and taken.number == 0


def test_a_storage_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"storage nodb://\*\*\*@x/y: cannot be opened") as caught:
        open_study(tmp_path, storage="nodb://me:secret@x/y")
    assert "secret" not in str(caught.value)
