"""The Ray cluster a command runs on: the one it was given, or one of its own on this machine; quiet either way."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sermll.config import Resources
from sermll.errors import SermllError

DATA_CPUS = 0.5
"""Share of a core that one data task asks for: mixing is light beside training."""

QUIET = {
    "RAY_AUTH_MODE": "token",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s is waited out at the end of every fold
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_worker_maximum_startup_concurrency": "4",  # folds side by side start many workers: no reason to warn
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Data workers are idle for seconds when batches are made faster than they are taken. By default they would be ended
    # after one, and others started, with seconds of imports each, again and again.
    "RAY_idle_worker_killing_time_threshold_ms": "120000",
}


def lanes_here(resources: Resources) -> int | None:
    """How many folds this machine trains at once; None if another cluster is to be used."""
    if os.environ.get("RAY_ADDRESS"):
        return None
    fit = lanes_of(_local_cpus(), resources)
    return fit if resources.parallel_folds == "auto" else min(fit, resources.parallel_folds)


def lanes_of(cpus: float, resources: Resources) -> int:
    """How many folds so many CPUs train at once.

    Data tasks must find room beside the training workers, or both would wait for each other for ever.
    """
    return int((cpus - DATA_CPUS) // (resources.workers * resources.cpus_per_worker))


def _local_cpus() -> int:
    # One more than there are cores: data tasks then always find room beside training, which would otherwise hold
    # every core and wait for data for ever.
    return (os.cpu_count() or 1) + 1


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
            ray.init(
                address="local",
                num_cpus=_local_cpus(),
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


def _hush() -> None:
    import ray.data

    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().print_on_execution_start = False
