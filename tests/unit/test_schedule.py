"""The board that hands folds to lanes: each is ended once, lost ones wait again, a bounded number of times."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sermll import schedule, storage
from sermll.board import Board
from sermll.errors import DataError, StorageError, TrainingError
from sermll.job import FoldJob
from sermll.schedule import _hold, _missing, _scratch, _slow
from sermll.storage import reach


def board(folds: int, retries: int = 1) -> Board:
    jobs = [FoldJob(f"run/fold-{fold}", f"fold {fold}", {}, fold, f"/nowhere/{fold}") for fold in range(folds)]
    return Board(jobs, retries)


def test_folds_are_handed_out_in_order_and_ended_once() -> None:
    work = board(3)
    assert [work.take(0, 1), work.take(1, 1)] == [0, 1]
    work.end(1, None, ["a checkpoint was damaged"])
    assert work.take(1, 1) == 2
    work.end(0, "epoch 1: nan", [])
    assert work.take(0, 1) is None
    assert work.state(0, 0)[:3] == (0, [2], [(1, None, ["a checkpoint was damaged"]), (0, "epoch 1: nan", [])])
    assert work.state(2, 0)[:3] == (0, [2], [])
    assert work.job(2).title == "fold 2"


def test_a_lost_fold_goes_before_the_others_to_whoever_asks() -> None:
    work = board(3)
    assert work.take(0, 1) == 0
    assert work.lose(0, "worker 0 failed: killed")
    assert [work.take(1, 1), work.take(0, 1)] == [0, 1]


def test_a_lane_that_begins_anew_without_a_loss_goes_on_with_its_fold() -> None:
    work = board(2, retries=0)
    assert [work.take(0, 2), work.take(0, 3), work.take(0, 3)] == [0, 0, 0]  # a node came; then one said that it goes
    assert work.state(0, 0) == (1, [0], [], [(0, "goes on with 3 workers, 2 before")])
    assert work.state(0, 1).told == []


def test_a_loss_is_told_and_a_smaller_lane_goes_on() -> None:
    work = board(1)
    assert work.take(0, 2) == 0
    assert work.lose(0, "worker 1 failed: killed")
    assert work.take(0, 1) == 0
    lines = ["worker 1 failed: killed; goes on from its last epoch", "goes on with 1 workers, 2 before"]
    assert work.state(0, 0).told == [(0, line) for line in lines]


def test_what_a_lane_tells_is_its_folds_and_nobodys_once_it_has_none() -> None:
    work = board(2)
    assert work.take(0, 1) == 0
    work.tell(0, "batches were made again")
    work.end(0, None, [])
    work.tell(0, "too late")
    assert work.state(0, 0).told == [(0, "batches were made again")]
    assert work.state(0, 1).told == []


def test_machines_that_said_they_would_go_cost_no_retry() -> None:
    work = board(2, retries=0)
    assert work.take(0, 1) == 0
    work.leave(0)
    assert work.take(1, 1) == 0
    assert work.lose(1, "worker 0 failed: its node was reclaimed", counts=False)
    assert work.take(2, 1) == 0 and work.state(0, 0).ended == []


def test_a_fold_whose_workers_die_too_often_is_given_up_and_the_lane_is_not_blamed() -> None:
    work = board(2, retries=1)
    for _ in range(2):
        assert work.take(0, 1) == 0
        assert work.lose(0, "worker 0 failed: out of memory")
    assert work.state(0, 0).ended == [(0, "worker 0 failed: out of memory", [])]
    assert work.lose(0, "Ray Train gave up")  # told again when the lane itself ends
    assert work.take(1, 1) == 1


def test_a_lane_that_never_began_is_told_apart() -> None:
    assert not board(1).lose(0, "no module named sermll")


def test_late_words_of_workers_whose_lane_has_no_fold_any_more_change_nothing() -> None:
    work = board(2, retries=0)
    assert work.take(0, 1) == 0
    work.lose(0, "worker 0 failed: killed")
    before = work.state(0, 0)
    work.end(0, None, [])
    work.leave(0)
    work.leave(7)
    assert work.state(0, 0) == before and before.ended == [(0, "worker 0 failed: killed", [])]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (AssertionError(""), "AssertionError"),
        (KeyError("x"), "KeyError: 'x'"),
        (OSError("a page\nconnection closed. Some common causes are these"), "connection closed."),
        (Exception("Traceback (most recent call last):\n  line\nMemoryError\n"), "MemoryError"),
    ],
)
def test_why_workers_were_lost_is_told_by_the_class_of_the_error_and_its_last_line(error: Exception, said: str) -> None:
    from sermll.lane_start import cause  # loads Ray Train, which other tests here do without

    assert cause({1: error}) == f"worker 1 failed: {said}"


def test_a_worker_that_alone_cannot_have_its_batches_ends_the_fold_and_then_the_lanes_workers() -> None:
    from sermll.lane import or_end

    work, given = board(2), iter([1, 2])

    def batches(*arguments: Any) -> Any:
        yield from given
        raise DataError(f"shards/00000.arrow: cannot be read by worker {arguments[3]}")

    assert work.take(0, 2) == 0
    feed: Any = None
    taken: Iterator[Any] = or_end(batches, lambda why: work.end(0, why, []))(feed, 0, 9, 1, 2)
    assert [next(taken), next(taken)] == [1, 2]
    with pytest.raises(RuntimeError, match=r"00000\.arrow"):  # no SermllError: those are told by all workers together
        next(taken)
    assert work.lose(0, "worker 1 failed: RuntimeError") and work.take(0, 2) == 1
    assert work.state(0, 0).ended == [(0, "shards/00000.arrow: cannot be read by worker 1", [])]


def test_a_fold_is_trained_by_one_command_at_a_time(tmp_path: Path) -> None:
    job = FoldJob("x/fold-0", "fold 0", {}, 0, str(tmp_path / "fold-0"))
    with ExitStack() as first:
        _hold(job, first)
        with (
            pytest.raises(TrainingError, match=rf"fold-0: another command .* \(process {os.getpid()} on "),
            ExitStack() as second,
        ):
            _hold(job, second)
    with ExitStack() as later:
        _hold(job, later)


def test_a_machine_with_a_folder_of_its_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SHARED_S", 0.0)
    job = FoldJob("x/fold-0", "fold 0", {}, 0, str(tmp_path / "fold-0"))
    name = os.uname().nodename
    for there in (False, True):
        if there:
            job.checkpoints.mkdir(parents=True)  # of an earlier fold that was trained into the void
        with pytest.raises(StorageError, match=rf"fold-0: {name} does not see it, or only a folder of its own"):
            reach(Path(job.folder), job.lock.name)
    assert f"{name} does not see the result" in str(_missing(job))
    with ExitStack() as held:
        _hold(job, held)
        reach(Path(job.folder), job.lock.name)
    (tmp_path / "fold-0" / "result.json").touch()
    assert _missing(job) is None


def test_commands_have_folders_of_their_own_for_ray_and_those_of_killed_ones_go(tmp_path: Path) -> None:
    left = tmp_path / ".lanes-0"
    left.mkdir()
    left.with_suffix(".lock").touch()
    with _scratch(tmp_path) as first:
        assert not left.exists()
        first.mkdir()
        with _scratch(tmp_path) as second:
            assert second != first and first.exists()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_commands_whose_locks_cannot_be_opened_are_passed_over(tmp_path: Path) -> None:
    theirs = tmp_path / ".lanes-0"
    theirs.mkdir()
    theirs.with_suffix(".lock").mkdir()  # as a colleague's is to anybody but root
    with _scratch(tmp_path) as own:
        assert own != theirs
    assert theirs.exists()


def test_locks_beyond_the_soft_limit_of_open_files_are_allowed_and_beyond_the_hard_one_are_named() -> None:
    script = (
        "import resource; from sermll.schedule import _allow_open_files, SPARE_FILES\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, SPARE_FILES + 500))\n"
        "_allow_open_files(400); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES)\n"
        "_allow_open_files(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "400"
    assert "600 folds need" in done.stderr and "`ulimit -Hn`" in done.stderr


def test_neither_commands_nor_controllers_load_torch() -> None:
    # It would take each of them a second, before the first fold can begin, and some hundred MB.
    script = (
        "import sys, sermll.train, sermll.schedule, sermll.group, sermll.board, ray.train\n"
        "from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer\n"
        "print([name for name in ('torch', 'torchaudio', 'mlflow', 'librosa', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_epoch_that_took_much_longer_than_usual_is_told() -> None:
    def epochs(*seconds: float, workers: int = 1, waited: float = 0.0) -> list[dict[str, Any]]:
        return [
            {"train_s": 0.75 * one, "eval_s": 0.25 * one, "workers": workers, "data_wait_share": waited}
            for one in seconds
        ]

    usual = epochs(9.0, 4.0, 4.2)  # the first takes longer
    assert _slow(usual) is None and _slow(usual[:1]) is None
    told = _slow(usual + epochs(12.6, waited=0.8))
    assert told is not None
    assert told.startswith("epoch 4 took 12.6 s where 4.2 are usual, 80 % of its training waiting for data")
    assert _slow(usual + epochs(8.3)) is None  # not twice as long
    assert _slow(epochs(0.1, 0.1, 2.0)) is None  # many times as long, but nobody waits
    assert _slow(usual + epochs(60.0, workers=2)) is None  # others before it had another number of workers


def test_what_is_written_to_disk_while_folds_train_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([5_000_000, 5_000_000, None, 72_000_000, 72_000_000])

    def spilled() -> int:
        answer = next(answers)
        if answer is None:
            raise OSError("the node that was asked has vanished")
        return answer

    monkeypatch.setattr(schedule, "spilled_bytes", spilled)
    spilling = schedule._Spilling()
    said = [spilling.news() for _ in range(4)]
    assert said[0] == said[1] == said[3] == []
    assert said[2][0].startswith("the cluster's object stores were full: 67 MB were written to disk")
