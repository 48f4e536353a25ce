"""A worker of a lane: it trains the folds that the board hands out, see `sermll.schedule`."""

import os
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from sermll.errors import SermllError
from sermll.feed import Batch, stream
from sermll.loop import Batches, agreed, train_fold
from sermll.storage import reach


def work_lane(board: Any, lane: int) -> None:
    """Train folds until none is left, as one of the lane's workers.

    Errors that a restart cannot mend are told to the board; any other ends the worker, and Ray Train starts the lane's
    workers again.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread, which is the one that trains

    def lost() -> None:
        board.tell.remote(lane, "a process or node that made batches was lost; they were made again")

    def told_to_go() -> bool:
        return ray.train.get_preemption_info() is not None  # the same to every worker

    def end(why: str) -> None:
        ray.get(board.end.remote(lane, why, []))

    batches: Batches = partial(stream, lost=lost)
    if workers > 1:
        batches = or_end(batches, end)
    while True:
        number = broadcast_from_rank_zero(ray.get(board.take.remote(lane, workers)) if rank == 0 else None)
        if number is None:
            return
        job, data = ray.get(list(ray.get(board.job.remote(number))))
        error, faults = None, []
        try:
            with agreed(device):
                reach(Path(job.folder), job.lock.name)
            faults = train_fold(job, data, batches, device, rank, workers, leave=told_to_go)
        except SermllError as failure:
            error = str(failure)
        left = broadcast_from_rank_zero(error is None and not job.finished)
        if rank == 0:
            ray.get(board.leave.remote(lane) if left else board.end.remote(lane, error, faults))
        if left:
            return  # this lane ends; another is opened, on machines that stay


def or_end(batches: Batches, end: Callable[[str], None]) -> Batches:
    """The same batches, for one of several workers; told to `end` is why there are no more.

    The others wait for this worker's gradients and cannot be asked to stop; but if it ends by an error that is not for
    the board, Ray Train ends them too, and the lane goes on with the next fold.
    """

    def made(*arguments: Any) -> Generator[Batch, None, None]:
        try:
            yield from batches(*arguments)
        except SermllError as error:
            end(str(error))
            raise RuntimeError(str(error)) from error

    return made
