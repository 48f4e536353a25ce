"""A Ray cluster of several nodes on this machine: a head without CPUs, and nodes that come and go."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RAY = Path(sys.executable).with_name("ray")
START_S = 90


def free_port() -> int:
    """A port of the loopback interface that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Machines:
    """The nodes of a cluster, each a raylet of its own that `ray start` has begun."""

    folder: Path
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    nodes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start(self, *words: str) -> subprocess.Popen:
        """Begin a node."""
        log = (self.folder / f"node-{len(self.nodes)}.log").open("wb")
        common = [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", "--block"]
        memory = f"--object-store-memory={150 * 2**20}"
        # The nodes run jobs with the interpreter of the tests.
        environment = {**os.environ, "PATH": f"{RAY.parent}:{os.environ['PATH']}"}
        node = subprocess.Popen(
            [str(RAY), "start", *words, memory, *common],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self.nodes.append(node)
        return node

    def add(self, cpus: int) -> subprocess.Popen:
        """Begin a node that works."""
        return self.start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={cpus}")

    def lose(self, node: subprocess.Popen) -> None:
        """A machine vanishes: all its processes at once."""
        os.killpg(node.pid, 9)
        node.wait()


@contextmanager
def machines(*cpus: int) -> Iterator[Machines]:
    """A head, and a node for each number of CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="rc"))  # short: sockets lie in it, whose paths may have 107 letters
    cluster = Machines(folder)
    try:
        cluster.start(
            "--head",
            f"--port={cluster.port}",
            "--num-cpus=0",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={cluster.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={folder}",
        )
        until(lambda: (folder / "node-0.log").read_text().count("Ray runtime started"), START_S)
        for count in cpus:
            cluster.add(count)
        for index in range(len(cpus)):
            log = folder / f"node-{index + 1}.log"
            until(lambda log=log: log.read_text().count("Ray runtime started"), START_S)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            if node.poll() is None:
                os.killpg(node.pid, 9)
                node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def until(happened: Callable[[], Any], timeout_s: float) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "what should have happened did not"
        time.sleep(0.05)
