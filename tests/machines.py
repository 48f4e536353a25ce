"""A Ray cluster of several nodes on this machine: a head without CPUs, and nodes that come and go."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

RAY = Path(sys.executable).with_name("ray")
START_S = 180


def free_port() -> int:
    """A port of the loopback interface that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Machines:
    """The nodes of a cluster, each a raylet of its own that `ray start` has begun."""

    folder: Path
    memory_mb: int = 150
    """Of each node's object store."""
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    private: Path | None = None
    """A folder that each node is to have for itself, as machines without a shared file system do."""
    nodes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        """Begin a node with these words and environment variables, and wait until it is there."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        common = [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", "--block"]
        memory = f"--object-store-memory={self.memory_mb * 2**20}"
        # The nodes run jobs with the interpreter of the tests.
        environment = {
            **os.environ,
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            **variables,
        }
        command = [str(RAY), "start", *words, memory, *common]
        if self.private is not None:  # a file system of the node's own takes its place there
            mounted = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mounted, str(self.private), *command]
        node = subprocess.Popen(
            command,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self.nodes.append(node)
        # Two that start at once on one machine take each other for themselves.
        until(lambda: "Ray runtime started" in log.read_text(), START_S)
        return node

    def add(self, cpus: int) -> subprocess.Popen:
        """Begin a node that works."""
        return self.start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={cpus}")

    @property
    def workers(self) -> list[subprocess.Popen]:
        """The nodes that work and are there."""
        return [node for node in self.nodes[1:] if node.poll() is None]

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes on these nodes whose title has `name` in it."""
        sessions = {node.pid for node in self.nodes if node.poll() is None}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) in sessions and name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def node_of(self, process: psutil.Process) -> subprocess.Popen:
        """The node that a process belongs to."""
        (found,) = [node for node in self.nodes if node.pid == os.getsid(process.pid)]
        return found

    def stall(self, node: subprocess.Popen, seconds: float) -> None:
        """A machine hangs for a while: all its processes at once."""
        os.killpg(node.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.killpg(node.pid, signal.SIGCONT)

    def lose(self, node: subprocess.Popen) -> None:
        """A machine vanishes: all its processes at once."""
        os.killpg(node.pid, 9)
        node.wait()


@contextmanager
def machines(*cpus: int, may_grow: int = 0, memory_mb: int = 150, private: Path | None = None) -> Iterator[Machines]:
    """A head, a node for each number of CPUs, and an autoscaler that adds up to `may_grow` nodes of two CPUs.

    `private` is a folder that each of them has for itself; that takes the rights of root. `memory_mb` is what the
    object store of each has.
    """
    folder = Path(tempfile.mkdtemp(prefix="rc"))  # short: sockets lie in it, whose paths may have 107 letters
    cluster = Machines(folder, memory_mb, private=private)
    scaling: list[str] = []
    named: dict[str, str] = {}
    if may_grow:
        # By this the autoscaler knows the node that is the head.
        named = dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID)
        (folder / "scaling.json").write_text(json.dumps(_scaling(may_grow, cluster.port)))
        scaling = [f"--autoscaling-config={folder / 'scaling.json'}"]
    try:
        cluster.start(
            *scaling,
            "--head",
            f"--port={cluster.port}",
            "--num-cpus=0",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={cluster.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={folder}",
            **named,
        )
        until(lambda: answers(cluster.dashboard_port), START_S)
        for count in cpus:
            cluster.add(count)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            if node.poll() is None:
                os.killpg(node.pid, 9)
                node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _scaling(may_grow: int, port: int) -> dict[str, Any]:
    """Settings of Ray's autoscaler, with nodes that are processes of this machine."""
    head = "ray.head.default"  # by any other name the head is no node of its own, and heads are begun again and again
    nodes = {head: (0, 0), "worker": (2, may_grow)}
    return {
        "cluster_name": "test",
        "max_workers": may_grow,
        "idle_timeout_minutes": 1,
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "disable_node_updaters": True},
        "available_node_types": {
            name: {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most}
            for name, (cpus, most) in nodes.items()
        },
        "head_node_type": head,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(happened: Callable[[], Any], timeout_s: float) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "what should have happened did not"
        time.sleep(0.05)
