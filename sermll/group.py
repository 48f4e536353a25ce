"""The group in which a lane's workers exchange gradients, set up by Ray Train.

Ray Train's own setup for torch does the same, but whoever reads its settings loads torch for them: also the lane's
controller, which has no use for it, would begin a second later and hold some hundred MB more.
"""

import gc
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import WorkerGroupError
from ray.train.backend import Backend, BackendConfig

SILENCE = timedelta(minutes=30)
"""How long workers wait for each other before they give up."""
FAREWELL_S = 30.0


@dataclass
class Together(BackendConfig):
    """The workers of a run form a group of torch.distributed; one alone needs none."""

    transport: str
    """nccl between GPUs; gloo between CPUs, and between workers that share a GPU, which nccl refuses."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls."""
        return _Group


class _Group(Backend):
    share_cuda_visible_devices = True
    """GPUs of one node reach each other only where each worker sees them all."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # Ray's private type
        """Join the workers, before they begin.

        Raises:
            WorkerGroupError: one has died, which Ray Train counts as it does later; else it would begin anew for ever.
        """
        size = len(worker_group)
        if size == 1:
            return
        assert isinstance(backend_config, Together)
        meeting = worker_group.execute_single(0, _free_address)
        transport = backend_config.transport
        joining: dict[ObjectRef, int] = {
            worker_group.execute_single_async(rank, _join, transport, meeting, rank, size): rank for rank in range(size)
        }
        while joining:
            (done,), _ = ray.wait(list(joining), num_returns=1)
            rank = joining.pop(done)
            try:
                ray.get(done)
            except RayActorError as error:
                worker_group.abort()  # else the others keep their room, and those begun anew wait for it
                raise WorkerGroupError(f"worker {rank}: {error}", {rank: error}) from error

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Part, when all have come to their end; those that hang are ended by Ray Train."""
        if len(worker_group) == 1:
            return
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave), timeout=FAREWELL_S)


def _free_address() -> str:
    """Where the others reach this worker."""
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        port = taken.getsockname()[1]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _join(transport: str, meeting: str, rank: int, size: int) -> None:
    import torch.distributed as dist

    dist.init_process_group(transport, init_method=meeting, rank=rank, world_size=size, timeout=SILENCE)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        # The parallel module is in a cycle of references. A group that it still holds when the process ends has been
        # seen to abort it, every other time.
        gc.collect()
        dist.destroy_process_group()
