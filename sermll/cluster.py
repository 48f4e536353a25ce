"""The Ray cluster a command runs on: the one it was given, or one of its own on this machine; quiet either way."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sermll.config import Resources
from sermll.errors import ConfigError, SermllError

POLL_S = 1.0

QUIET = {
    "RAY_AUTH_MODE": "token",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s is waited out at the end of every fold
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # After a node is lost, workers are wanted in their former number for this long before as many as fit are taken.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_worker_maximum_startup_concurrency": "4",  # folds side by side start many workers: no reason to warn
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Data workers are idle for seconds when batches are made faster than they are taken. By default they would be ended
    # after one, and others started, with seconds of imports each, again and again.
    "RAY_idle_worker_killing_time_threshold_ms": "120000",
}
"""For every process of Ray that a command starts or speaks to."""
OWN = {
    # Nobody announces the end of a machine to a cluster that lives as long as a command. To listen for it takes a
    # process more for each lane, which begins when the first fold could.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""For the processes of a cluster that a command starts for itself."""


def lanes_here(resources: Resources) -> int | None:
    """How many folds this machine trains at once; None if another cluster is to be used, or memory decides."""
    if os.environ.get("RAY_ADDRESS") or resources.memory_gb:  # how much of it is Ray's, only Ray knows
        return None
    import torch

    have = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    fit = _lanes(have, share(resources, _gpus_per_worker(resources, have)), resources)
    return fit if resources.parallel_folds == "auto" else min(fit, resources.parallel_folds)


def _lanes(have: Mapping[str, float], each: Mapping[str, float], resources: Resources) -> int:
    """How many folds fit, each with the most workers; one where only fewer workers fit, but enough."""

    def fit(workers: int) -> int:
        # Divided by 0.2, 1 is a little less than 5.
        return min(int(have.get(name, 0.0) / (workers * amount) + 1e-6) for name, amount in each.items())

    return fit(resources.most) or min(1, fit(resources.fewest))


def room(resources: Resources, unit: str = "fold") -> tuple[float, int]:
    """GPUs of each training process, and how many units the connected cluster trains at once, no more than asked for.

    Args:
        resources: what a unit needs.
        unit: for the message, a fold or a trial.

    Raises:
        ConfigError: not even one; or fewer than were asked for, unless the cluster is given time to grow, or the
            number of workers adapts itself to the cluster.
    """
    import ray

    have = ray.cluster_resources()
    gpus = _gpus_per_worker(resources, have)
    fit = _lanes(have, share(resources, gpus), resources)
    wanted = 1 if resources.parallel_folds == "auto" else resources.parallel_folds
    if fit < (1 if resources.wait_s or resources.fewest < resources.most else wanted):
        grow = "" if resources.wait_s else "; or let it grow, with resources.wait_s=900"
        workers, gb = wanted * resources.fewest, have.get("memory", 0.0) / 1e9
        raise ConfigError(
            f"{wanted} {unit}(s) at once need {workers * resources.cpus_per_worker:g} CPUs, {workers * gpus:g} GPUs "
            f"and {workers * resources.memory_gb:g} GB, the cluster has {have.get('CPU', 0.0):g}, "
            f"{have.get('GPU', 0.0):g} and {gb:.0f}; lower resources.workers, "
            f"cpus_per_worker, gpus_per_worker, memory_gb or parallel_folds{grow}"
        )
    return gpus, fit if resources.parallel_folds == "auto" else min(fit, wanted)


def _gpus_per_worker(resources: Resources, have: Mapping[str, float]) -> float:
    if resources.gpus_per_worker == "auto":
        return 1.0 if have.get("GPU") else 0.0
    return resources.gpus_per_worker


def share(resources: Resources, gpus: float) -> dict[str, float]:
    """What Ray sets apart for one training process."""
    needs = {"CPU": resources.cpus_per_worker, "GPU": gpus, "memory": resources.memory_gb * 1e9}
    return {name: amount for name, amount in needs.items() if amount}


@contextmanager
def summoned(resources: Resources, say: Callable[[str], None]) -> Iterator[None]:
    """Keep asking the cluster's autoscaler for what is needed; begins once there is room for one unit.

    As many are asked for as `resources.parallel_folds` says, one if that is auto. Does nothing unless
    `resources.wait_s` says that the cluster grows.

    Raises:
        ConfigError: there was no room in time.
    """
    if not resources.wait_s:
        yield
        return
    import ray
    from ray.autoscaler.sdk import request_resources

    wanted = 1 if resources.parallel_folds == "auto" else resources.parallel_folds
    each = share(resources, _gpus_per_worker(resources, ray.cluster_resources()))
    request_resources(bundles=[each] * (wanted * resources.most))
    try:
        deadline, told = time.monotonic() + resources.wait_s, False
        while True:
            try:
                room(resources)
                break
            except ConfigError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(f"after {resources.wait_s:g} s, {error}") from None
            if not told:
                say(f"waiting for machines, up to {resources.wait_s:g} s")
                told = True
            time.sleep(POLL_S)
        yield
    finally:
        request_resources(bundles=[])  # machines that nobody needs may go


def spilled_bytes() -> int:
    """Bytes of objects that the nodes of the connected cluster have written to disk, ever, since memory was full."""
    from ray._private.internal_api import get_memory_info_reply  # what `ray memory` asks; there is no public call
    from ray._private.state import state

    return get_memory_info_reply(state, timeout_seconds=POLL_S).store_stats.spilled_bytes_total


def here() -> dict[str, str]:
    """A Ray label selector: the node of whoever asks, whose end is the end of what it has begun."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


@contextmanager
def connected() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, else start one on this machine and stop it afterwards.

    An existing connection of this process is used and left as it is.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        _hush()
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            with unless_set(OWN):
                ray.init(
                    address="local",
                    num_cpus=os.cpu_count() or 1,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local cluster"
        raise SermllError(f"cannot reach {where}: {error}") from None
    _hush()
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def unless_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what is done and started within; those that the user has set stay."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _hush() -> None:
    import ray.data

    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().print_on_execution_start = False
