"""The two ends of a lane, as Ray Train's processes are given them; see `sermll.schedule`.

Its controller loads this module before it starts the workers, and they wait for it: it needs Ray Train and no more.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
import ray.train


def worker_of(board: Any, lane: int) -> partial[None]:
    """What every worker of a lane is to do."""
    return partial(_work, board, lane)


def _work(board: Any, lane: int) -> None:
    from sermll.lane import work_lane  # in the worker: what training needs takes seconds to load

    work_lane(board, lane)


class Losses(ray.train.UserCallback):
    """Tells the board at once that a lane's workers were lost, so that another lane may take the fold."""

    def __init__(self, board: Any, lane: int) -> None:
        self._board, self._lane = board, lane

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train in the controller."""
        foretold = any(_foretold(error) for error in worker_exceptions.values())
        ray.get(self._board.lose.remote(self._lane, cause(worker_exceptions), counts=not foretold))


def _foretold(error: Exception) -> bool:
    """Whether a worker was lost with a node whose end had been announced, which Ray Train does not count either."""
    return bool(getattr(getattr(error, "health_check_failure", error), "preempted", False))


def cause(failures: Mapping[int, Exception]) -> str:
    """Why workers were lost, in a line: the first of them and its error, of several lines the last.

    Ray Train gives an error of ours as its traceback, which ends with the error's class and message.
    """
    rank, error = next(iter(failures.items()))
    why = f"{type(error).__name__}: {error}".strip(": \n").splitlines()[-1]
    return f"worker {rank} failed: {why.partition(' Some common causes')[0]}"  # Ray goes on for a page
