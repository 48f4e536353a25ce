"""What a trial's failure is put down to."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from prepared import in_process
from ray import tune
from ray.exceptions import RayTaskError

from sermll import trials
from sermll.config import Experiment
from sermll.design import Design
from sermll.errors import CheckpointError, ConfigError, DataError, StorageError, TrainingError
from sermll.feed import FoldData
from sermll.job import FoldJob
from sermll.search_plan import inner_design
from sermll.study import Rules, Study
from sermll.trials import ENDS_SEARCH, _work, of_the_trial, out_of_memory


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert out_of_memory(refused.value)
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as other:
        _ = torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value)


def test_a_fault_of_the_desk_ends_the_search_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, told = FoldJob("x/fold-0", "trial 3, inner fold 0", {}, 0, str(tmp_path / "fold-0")), []

    def away(*words: Any, **named: Any) -> None:
        gone = StorageError("storage postgresql://h/x: does not answer (refused)")
        raise RayTaskError("Desk.report", "Traceback: ...", gone).as_instanceof_cause()

    monkeypatch.setattr(trials, "train_fold", away)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(tune, "report", told.append)
    (tmp_path / "mark").touch()
    desk = SimpleNamespace(begin=SimpleNamespace(remote=lambda number: [job]))
    folds: Any = {0: None}
    trials._work({"number": 3}, desk, tmp_path / "mark", folds, None)
    why = "trial 3, inner fold 0: storage postgresql://h/x: does not answer (refused)"
    assert told == [{"note": why, trials.ENDS_SEARCH: True}]


def test_what_a_trial_chose_is_told_from_what_no_other_is_spared() -> None:
    for error in (TrainingError("loss is nan"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert of_the_trial(error, 0) and of_the_trial(error, 5)
    heads = ConfigError("model.pool.heads: 7 heads do not divide the encoder's width")
    assert of_the_trial(heads, 5) and not of_the_trial(heads, 0)  # the experiment as it stands: of all of them
    for error in (StorageError("the disk is full"), DataError("a shard"), CheckpointError("cannot be read")):
        assert not of_the_trial(error, 5)
    assert not of_the_trial(RuntimeError("CUDA error: device-side assert triggered"), 5)
    assert not of_the_trial(OSError("no space left on device"), 5)


def test_a_feature_bank_that_a_worker_cannot_open_is_named_and_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray import tune

    told: list[Any] = []
    monkeypatch.setattr(ray, "get", lambda given: given)
    monkeypatch.setattr(tune, "report", told.append)
    job = FoldJob("x/trial-5", "trial 5, fold 0", {}, 0, str(tmp_path / "trial-5"))
    desk = SimpleNamespace(begin=SimpleNamespace(remote=lambda number: [job]))
    (tmp_path / "search.json").touch()
    bank = tmp_path / "feature-banks" / "1234"
    _work({"number": 5}, desk, tmp_path / "search.json", [], bank)
    (said,) = told
    assert said[ENDS_SEARCH] and said["note"].startswith(f"trial 5, fold 0: {bank / 'bank.json'}")


def test_a_driver_that_waits_for_the_trials_of_others_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trials_with(done: int) -> list[Any]:
        return [SimpleNamespace(state=SimpleNamespace(is_finished=lambda n=n: n < done)) for n in range(2)]

    class Others:
        """A study whose last trial another driver ends, after a while."""

        looks = 0

        def trials(self) -> list[Any]:
            return trials_with(1 if self.looks < 3 else 2)

        def of_others(self) -> dict[int, str]:
            self.looks += 1
            return {1: "process 12 on node3"}

    monkeypatch.setattr(trials, "POLL_S", 0.0)
    monkeypatch.setattr(trials, "connected", nullcontext)
    monkeypatch.setattr(trials, "summoned", lambda resources, say: nullcontext())
    monkeypatch.setattr(trials, "_tune", lambda *words: None)
    search: Any = SimpleNamespace(
        file=SimpleNamespace(name="x", trials=2), experiment=SimpleNamespace(resources=None), mark=None
    )
    study: Any = Others()
    trials.run_trials(search, search, study)
    assert study.looks == 3
    assert [line for line in capsys.readouterr().err.splitlines() if line] == [
        "waiting for trial 1 of process 12 on node3"
    ]


@pytest.fixture
def two_folds(
    settings: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[str], list[FoldJob]], list[FoldData]]:
    """Makes the jobs of a trial of two inner folds and two epochs each, trained without Ray; and the folds."""
    experiment = settings()
    design = Design.of(experiment.data, experiment.protocol)
    folds = [
        FoldData.of(f"x/fold-{fold.index}", design.prepared, design.labelled, fold.rows)
        for fold in inner_design(design, [0], 2).folds.folds
    ]
    tree = experiment.model_dump(mode="json")
    runs = Path(experiment.tracking.runs)
    runs.mkdir()
    (runs / "mark").touch()
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(trials, "stream", in_process)

    def jobs(name: str) -> list[FoldJob]:
        return [FoldJob(f"x/fold-{fold}", f"fold {fold}", tree, fold, str(runs / name / f"{fold}")) for fold in (0, 1)]

    return jobs, folds


class Killed(BaseException):
    """What no trial can catch."""


def begin(study: Study, jobs: list[FoldJob], folds: list[FoldData], die: Callable[[str, int], bool]) -> Any:
    """Take trial 1 of a study and work on it until it ends or dies: asked before and after each report."""
    taken = study.take(2, lambda trial: {})
    assert taken

    def report(number: int, step: int, value: float) -> bool:
        if die("before", step):
            raise Killed
        ended = study.report(number, step, value)
        if die("after", step):
            raise Killed
        return ended

    desk = SimpleNamespace(
        begin=SimpleNamespace(remote=lambda number: jobs), report=SimpleNamespace(remote=report), failed=None
    )
    told: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tune, "report", told.append)
        with suppress(Killed):
            trials._work({"number": taken.number}, desk, Path(jobs[0].folder).parents[1] / "mark", folds, None)
    return told[0] if told else None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_trial_that_is_killed_at_a_report_is_judged_as_if_it_had_not_been(
    when: str, two_folds: tuple[Callable[[str], list[FoldJob]], list[FoldData]], tmp_path: Path
) -> None:
    jobs, folds = two_folds
    rules = Rules("random", "asha", ("maximize",), seed=0, warm_up_steps=1)

    def run(name: str, *died: int) -> tuple[Any, dict[int, float], list[int]]:
        """What a trial told that is ended at step 2, and what the study knows of it."""
        left = list(died)
        with Study(tmp_path, name, str(tmp_path / "x.journal"), rules) as study:
            study.begin([({}, {}), ({}, {})])
            reference = study.take(1, lambda trial: {})
            assert reference
            for step in range(1, 5):
                study.report(reference.number, step, 2.0)
            study.tell(reference.number, [2.0], "", {})
        while True:
            with Study(tmp_path, name, str(tmp_path / "x.journal"), rules) as study:
                told = begin(study, jobs(name), folds, lambda at, step: at == when and step in left[:1])
                if told:
                    return told, study.trials()[1].intermediate_values, [len(job.history()) for job in jobs(name)]
                left.pop(0)

    calm, values, epochs = run("calm")
    assert "dev_ua" not in calm and epochs == [2, 0] and list(values) == [1, 2]
    told, again, trained = run("killed", 1, 2)
    assert told.keys() == calm.keys() and again == values and trained == epochs
