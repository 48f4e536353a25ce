"""The board of a command's folds: an actor that hands them out to lanes, see `sermll.schedule`.

It is a module of its own, and knows jobs as references only, because its process would load all that a job is made of
before the first fold could begin.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple


class State(NamedTuple):
    """What a board answers."""

    waiting: int
    """How many folds nobody has."""
    held: list[int]
    """Those that are being trained."""
    ended: list[tuple[int, str | None, list[str]]]
    """Fold, why it failed, and faults of its checkpoints."""
    told: list[tuple[int, str]]
    """Fold, and what happened to it."""


class Board:
    """Which fold is waiting, which lane has which, and what became of the others. Lives in an actor of its own."""

    def __init__(self, jobs: Sequence[Any], retries: int) -> None:
        """Args: each fold's job, only passed on; how often a fold whose workers were lost is tried again."""
        self._jobs = list(jobs)
        self._retries = retries
        self._waiting = deque(range(len(jobs)))
        self._held: dict[int, int] = {}
        self._began: set[int] = set()
        self._losses: Counter[int] = Counter()
        self._workers: dict[int, int] = {}
        self._ended: list[tuple[int, str | None, list[str]]] = []
        self._told: list[tuple[int, str]] = []

    def take(self, lane: int, workers: int) -> int | None:
        """The next fold's number, None when nothing is left.

        A lane that has one is given it again: its workers were begun anew, in another number or on other nodes. When
        they were lost, `lose` has been called before.
        """
        self._began.add(lane)
        if lane not in self._held:
            if not self._waiting:
                return None
            self._held[lane] = self._waiting.popleft()
        number = self._held[lane]
        before = self._workers.get(number, workers)
        if before != workers:
            self._told.append((number, f"goes on with {workers} workers, {before} before"))
        self._workers[number] = workers
        return number

    def job(self, number: int) -> Any:
        """A fold's job."""
        return self._jobs[number]

    def end(self, lane: int, error: str | None, faults: list[str]) -> None:
        """A lane's fold is trained, or cannot be; nothing to a lane that was taken for lost meanwhile."""
        if lane in self._held:
            self._ended.append((self._held.pop(lane), error, faults))

    def tell(self, lane: int, line: str) -> None:
        """Something has happened to the fold of a lane that goes on."""
        if lane in self._held:
            self._told.append((self._held[lane], line))

    def leave(self, lane: int) -> None:
        """A lane has left its machines, which are about to go; whoever takes its fold goes on from there."""
        number = self._held.pop(lane, None)
        if number is None:
            return
        self._waiting.appendleft(number)
        self._told.append((number, "has left a machine that is about to go; goes on from there"))

    def lose(self, lane: int, why: str, *, counts: bool = True) -> bool:
        """A lane's workers were lost; its fold waits again, unless that has happened too often.

        Args:
            lane: that had them.
            why: what is known.
            counts: no if machines went that had said so.

        Returns:
            Whether the lane ever began; one that did not is no fold's fault.
        """
        number = self._held.pop(lane, None)
        if number is None:
            return lane in self._began
        self._losses[number] += counts
        if self._losses[number] > self._retries:
            self._ended.append((number, why, []))
        else:
            self._waiting.appendleft(number)
            self._told.append((number, f"{why}; goes on from its last epoch"))
        return True

    def state(self, known: int, heard: int) -> State:
        """What became of the folds, of which the driver knows the first `known` ends and `heard` words."""
        return State(len(self._waiting), list(self._held.values()), self._ended[known:], self._told[heard:])
