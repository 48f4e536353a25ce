"""Folds on a cluster: lanes of Ray Train workers, each training one fold after the other.

A lane is one Ray Train run. Starting one takes seconds, most of them for imports, and a small fold takes no longer; so
a lane lives until no fold is left. A board, one light actor, hands the folds out. A fold whose workers were lost goes
back to it, and whichever lane takes it next goes on from the newest checkpoint; a fold that cannot be trained is told
and left, and the others go on. Lanes of several workers are placed as a whole or not at all, so that they cannot wait
for each other. A lane whose number of workers may change is begun anew when nodes come or go, with the fold it has: the
batches are the plans' whatever that number is, so only who makes them changes, and what dropout and masks draw.
"""

import resource
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from sermll.board import Board
from sermll.cluster import here, room, share, spilled_bytes, summoned
from sermll.config import Resources
from sermll.errors import ConfigError, StorageError, TrainingError
from sermll.feed import FoldData
from sermll.files import write_json
from sermll.job import FoldJob
from sermll.progress import Progress
from sermll.storage import address, locked, machine, names, origin, remove

POLL_S = 0.5
LOOK_AGAIN_S = 10.0
"""How often the cluster is asked whether it has grown, and whether its memory is full."""
RESIZE_S = 30.0
"""How long a lane works at least before it takes more workers: the epoch in hand is begun again."""
SPARE_FILES = 1000
"""Open files beside the locks: Ray's connections, libraries, results."""
SCRATCH = ".lanes-"
"""How the folders begin in which Ray Train keeps its notes, one for each command."""
SLOW, SLOW_S = 2.0, 3.0
"""An epoch is told as slow that took so many times as long as is usual, and so many seconds more."""
FAREWELL_S = 15.0
"""How long lanes may take to end once nothing is left to do."""


Watch = Callable[[list[FoldJob], list[FoldJob]], None]
"""Called twice a second with the folds in training and those that have ended well since the last call."""


@dataclass
class _Lane:
    """A thread that waits for a Ray Train run to end."""

    thread: threading.Thread
    fault: list[str] = field(default_factory=list)


def train_jobs(
    work: Sequence[tuple[FoldJob, FoldData]],
    title: str,
    folder: Path,
    watch: Watch,
) -> dict[FoldJob, str]:
    """Train folds, as many at once as the cluster holds; connected to one already.

    Args:
        work: unfinished folds with their utterances, in the order they are to be begun.
        title: for the progress bar.
        folder: of the run, campaign or search, which all nodes reach; Ray Train keeps its notes in it meanwhile.
        watch: told how it goes.

    Returns:
        Why a fold was not trained, for those that were not.

    Raises:
        ConfigError: a fold needs more than the cluster has.
        TrainingError: workers cannot even be started, or another command is training one of the folds.
    """
    if not work:
        return {}
    with ExitStack() as held:
        _allow_open_files(len(work))
        for job, _ in work:
            _hold(job, held)
        return _train_held(work, title, held.enter_context(_scratch(folder)), watch)


def _allow_open_files(locks: int) -> None:
    """Let this process hold so many locks, each an open file; many systems allow 1024 unless asked.

    Raises:
        TrainingError: the system allows fewer.
    """
    needed = locks + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise TrainingError(
            f"{locks} folds need {needed} open files, and this system allows {hard} (`ulimit -Hn`); have that raised, "
            "or run the campaign in parts, with fewer values of an axis at a time"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _hold(job: FoldJob, held: ExitStack) -> None:
    """Keep other commands from training a fold: two that write into one folder would spoil both."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    if not held.enter_context(locked(job.lock, wait=False)):
        raise TrainingError(
            f"{job.folder}: another command is training this fold ({job.lock.read_text(encoding='utf-8').strip()}); "
            "wait for it, or stop it, and give the same command again"
        )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder of this command's own in `folder`, while it runs; those of commands that were killed are removed."""
    for lock in folder.glob(f"{SCRATCH}*.lock"):
        with ExitStack() as held:
            try:
                left = held.enter_context(locked(lock, wait=False))
            except StorageError:  # somebody else's, who removes it
                continue
            if left:
                remove(lock.with_suffix(""))
                lock.unlink(missing_ok=True)
    own = folder / f"{SCRATCH}{uuid.uuid4().hex[:8]}"
    lock = own.with_suffix(".lock")
    with locked(lock):
        try:
            yield own
        finally:
            remove(own)
            lock.unlink(missing_ok=True)


def _train_held(
    work: Sequence[tuple[FoldJob, FoldData]], title: str, scratch: Path, watch: Watch
) -> dict[FoldJob, str]:
    # Lanes are alike within a group; a group is trained before the next begins, so that none holds what another needs.
    shaped = sorted(work, key=lambda pair: _shape(pair[0]).model_dump_json())
    groups = [(shape, list(members)) for shape, members in groupby(shaped, key=lambda pair: _shape(pair[0]))]
    for shape, _ in groups:
        if not shape.wait_s:
            room(shape)  # what does not fit is told before anything is trained
    total = sum(job.settings["optim"]["epochs"] for job, _ in work)
    failures: dict[FoldJob, str] = {}
    with Progress(title, total, sum(len(job.history()) for job, _ in work)) as progress:
        for shape, members in groups:
            with summoned(shape, progress.say):
                failures |= _train_group(members, shape, scratch, progress, watch)
    return failures


def _shape(job: FoldJob) -> Resources:
    return Resources.model_validate(job.settings["resources"])


def _train_group(
    work: Sequence[tuple[FoldJob, FoldData]],
    resources: Resources,
    scratch: Path,
    progress: Progress,
    watch: Watch,
) -> dict[FoldJob, str]:
    """Train folds that need the same resources."""
    import ray

    spilling = _Spilling()
    shared: dict[int, Any] = {}
    for _, data in work:
        if id(data) not in shared:  # variants and seeds of a fold have the same utterances
            shared[id(data)] = ray.put(data)
    jobs = [job for job, _ in work]
    board: Any = (
        ray.remote(num_cpus=0)(Board)
        .options(label_selector=here())
        .remote([(ray.put(job), shared[id(data)]) for job, data in work], resources.max_failures)
    )
    gpus, at_once = room(resources)
    epochs = [len(job.history()) for job in jobs]
    sizes: dict[int, int] = {}
    failures: dict[FoldJob, str] = {}
    lanes: dict[int, _Lane] = {}
    opened, ended, heard, looked_at = 0, 0, 0, time.monotonic()

    def advance(number: int) -> None:
        if number not in sizes and jobs[number].failed.exists():  # an earlier time
            remove(jobs[number].failed)
        size = jobs[number].history_bytes
        if sizes.get(number) == size:  # it grows with every epoch, and reading it takes a hundred times as long
            return
        sizes[number] = size
        history = jobs[number].history()
        if len(history) > epochs[number]:
            progress.advance(len(history) - epochs[number], _news(jobs[number], history))
            for line in filter(None, (_slow(history[:end]) for end in range(epochs[number] + 1, len(history) + 1))):
                progress.say(f"{jobs[number].title}: {line}")
            epochs[number] = len(history)

    def open_lanes(wanted: int) -> None:
        nonlocal opened
        while len(lanes) < min(at_once, wanted):
            lanes[opened] = _open_lane(board, opened, resources, gpus, scratch)
            opened += 1

    try:
        open_lanes(len(jobs))  # they start while the board does
        while ended < len(jobs):
            waiting, held, news, told = ray.get(board.state.remote(ended, heard))
            for number in held:
                advance(number)
            for number, line in told:
                progress.say(f"{jobs[number].title}: {line}")
            heard += len(told)
            for number, error, faults in news:
                advance(number)
                for fault in faults:
                    progress.say(f"{jobs[number].title} went on from an earlier checkpoint: {fault}")
                error = error or _missing(jobs[number])
                if error is not None:
                    failures[jobs[number]] = error
                    with suppress(OSError, StorageError):  # which may be why it failed
                        write_json(jobs[number].failed, {"why": error})
                    progress.say(f"{jobs[number].title} failed: {error.splitlines()[0]}")
            ended += len(news)
            done = [jobs[number] for number, *_ in news if jobs[number] not in failures]
            watch([jobs[number] for number in held], done)
            for lane in [number for number, lane in lanes.items() if not lane.thread.is_alive()]:
                fault = lanes.pop(lane).fault
                if fault and not ray.get(board.lose.remote(lane, fault[0])):
                    raise TrainingError(f"workers cannot be started: {fault[0]}")
            if time.monotonic() - looked_at > LOOK_AGAIN_S:
                looked_at, at_once = time.monotonic(), _grown(resources, at_once)
                for line in spilling.news():
                    progress.say(line)
            open_lanes(waiting + len(held))
            if ended < len(jobs):
                time.sleep(POLL_S)
        for line in spilling.news():
            progress.say(line)
        deadline = time.monotonic() + FAREWELL_S
        for lane in lanes.values():
            lane.thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        ray.kill(board)
    return failures


def _missing(job: FoldJob) -> str | None:
    """Why a fold that is trained is not finished here, if it is not."""
    if "result.json" in names(Path(job.folder)):  # by name: of a file that was not there a system may remember that
        return None
    return (
        f"{address(Path(job.folder))}: trained, but {machine()} does not see the result; runs belong on storage that "
        "all machines share"
    )


def _grown(resources: Resources, at_once: int) -> int:
    """How many lanes the cluster holds by now; nodes that vanished may come back, so never fewer than before."""
    try:
        return max(at_once, room(resources)[1])
    except ConfigError:
        return at_once


class _Spilling:
    """Tells what the cluster's nodes have written to disk because their object stores were full."""

    def __init__(self) -> None:
        self._known = self._look()

    def _look(self) -> int | None:
        try:
            return spilled_bytes()
        except Exception:  # a node that has just vanished was asked, or Ray has changed: no reason to stop
            return None

    def news(self) -> list[str]:
        """A line if it is more than at the last look, or when this was made."""
        known, now = self._known, self._look()
        if now is None:
            return []
        self._known = now
        if known is None or now <= known:
            return []
        return [
            f"the cluster's object stores were full: {(now - known) / 1e6:.0f} MB were written to disk, to be read "
            "again when needed; nothing is lost, but it takes time (`ray start --object-store-memory`)"
        ]


def _news(job: FoldJob, history: list[dict[str, Any]]) -> str:
    row = history[-1]
    return f"{job.title}, epoch {len(history)}: loss {row['loss']:.3f}, dev UA {row['dev_ua']:.3f}"


def _slow(history: list[dict[str, Any]]) -> str | None:
    """What to say of the last epoch if it took much longer than those before that as many workers trained."""
    *before, last = [(row["train_s"] + row["eval_s"], row) for row in history]
    usual = [seconds for seconds, row in before if row["workers"] == last[1]["workers"]]
    if len(usual) < 2 or last[0] < SLOW * statistics.median(usual) or last[0] < statistics.median(usual) + SLOW_S:
        return None
    return (
        f"epoch {len(history)} took {last[0]:.1f} s where {statistics.median(usual):.1f} are usual, "
        f"{100 * last[1]['data_wait_share']:.0f} % of its training waiting for data; a machine or its storage was slow"
    )


def _open_lane(board: Any, lane: int, resources: Resources, gpus: float, scratch: Path) -> _Lane:
    """Start a Ray Train run that takes folds from the board."""
    import ray
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from sermll.group import Together
    from sermll.lane_start import Losses, cause, worker_of

    trainer = DataParallelTrainer(
        worker_of(board, lane),
        backend_config=Together("nccl" if gpus >= 1 else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=gpus > 0,
            resources_per_worker=share(resources, gpus),
        ),
        run_config=ray.train.RunConfig(
            name=f"lane-{lane}",
            storage_path=origin(scratch) or str(scratch),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            callbacks=[Losses(board, lane)],
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    fault: list[str] = []

    def wait() -> None:
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            fault.append(cause(getattr(error, "worker_failures", None) or {0: error}))
        except (Exception, SystemExit) as error:  # the controller or, with a SystemExit, the connection was lost
            fault.append((str(error).strip() or "the connection to the cluster was lost").splitlines()[-1])

    thread = threading.Thread(target=wait, daemon=True)  # not waited for when a user interrupts
    thread.start()
    return _Lane(thread, fault)
