"""What a cluster does to a run: processes killed, nodes that come, go and hang, memory and disks that are full.

After each fault the run ends by itself, or with a named error and then, once that is mended, by the same command; and
its numbers are those of a run that nobody disturbed, trained in one process without Ray. Drivers that are killed on one
node are tested in test_train.py and test_campaigns.py, a node lost with the lane on it in test_jobs.py.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from machines import Machines, machines, until
from prepared import in_process, tiny_settings

from sermll.config import Experiment, with_overrides
from sermll.loop import train_fold
from sermll.train import Designs, Run

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parents[2]
LONG = {"optim.batch_size": 4, "optim.epochs": 12, "resources.max_failures": 3}
"""Epochs of a second or two, so that a fault can hit the middle of one, and restarts after it."""
QUIET = {"model.encoder.dropout": 0, "model.encoder.spec_augment": False}
"""Dropout is drawn by each worker; without it their number changes nothing but rounding."""
TIMED = ("train_s", "eval_s", "utterances_per_s", "data_wait_share", "workers")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    """A head and a node of one CPU, to which tests add others."""
    with machines(1) as found:
        yield found


def nodes(cluster: Machines, count: int) -> None:
    """So many nodes that work, of one CPU each."""
    for node in cluster.workers[count:]:
        cluster.lose(node)
    while len(cluster.workers) < count:
        cluster.add(1)


def experiment(data: Path, runs: Path, overrides: dict[str, Any]) -> Experiment:
    return Experiment.model_validate(with_overrides(tiny_settings(data, runs), {"fold": 0, **LONG, **overrides}))


def calm(data: Path, runs: Path, overrides: dict[str, Any]) -> Path:
    """The folder of fold 0, trained in this process; dropout is the only thing that heeds the number of workers."""
    run = Run.of(experiment(data, runs, overrides), Designs())
    run.open()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for job, utterances in run.unfinished:
        train_fold(job, utterances, in_process, torch.device("cpu"))
    torch.set_num_threads(threads)
    return run.folder / "fold-0"


class Command:
    """`sermll train` in a process of its own, watched: the epochs there were, and what it says."""

    def __init__(self, cluster: Machines, data: Path, folder: Path, **overrides: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.runs = folder / "runs"
        tree = experiment(data, self.runs, overrides).model_dump(mode="json")
        (folder / "x.yaml").write_text(yaml.safe_dump(tree))
        self._said = folder.with_suffix(".txt")
        # A lane may grow after 3 seconds instead of 30.
        program = "import sys, sermll.schedule as s; s.RESIZE_S = 3.0; from sermll.cli import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "train", str(folder / "x.yaml")],
            stdout=subprocess.DEVNULL,
            stderr=self._said.open("wb"),
            env={**os.environ, "PYTHONPATH": str(HERE), "RAY_ADDRESS": f"127.0.0.1:{cluster.port}"},
        )
        self._histories: list[list[Any]] = [self.history()]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            history = self.history()
            if history != self._histories[-1]:
                self._histories.append(history)
            time.sleep(0.02)

    def history(self) -> list[dict[str, Any]]:
        found = list(self.runs.glob("tiny-*/fold-0/history.json"))
        return json.loads(found[0].read_text()) if found else []

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait(self, happened: Callable[[], Any], timeout_s: float = 240) -> None:
        """Wait for something to happen while the command runs."""
        until(lambda: happened() or self.process.poll() is not None, timeout_s)
        assert self.process.poll() is None, self.said

    def mid_epoch(self, epoch: int) -> None:
        """Wait until an epoch, counted from 0, is well under way."""
        self.wait(lambda: len(self.history()) >= epoch)
        time.sleep(0.3)

    def end(self, status: int = 0) -> str:
        """Wait for the end; what was said. No epoch that was kept has been trained again."""
        assert self.process.wait(300) == status, self.said
        for before, after in zip(self._histories, self._histories[1:], strict=False):
            assert after[: len(before)] == before
        return self.said

    def equals(self, other: Path, rel: float = 0) -> None:
        """Its fold has the numbers of another; up to rounding if `rel` is given."""
        (fold,) = self.runs.glob("tiny-*/fold-0")
        found, expected = (
            [
                {key: value for key, value in row.items() if key not in TIMED}
                for row in json.loads((folder / "history.json").read_text())
            ]
            for folder in (fold, other)
        )
        assert len(found) == len(expected)
        for mine, its in zip(found, expected, strict=True):
            assert mine.keys() == its.keys()
            for key, value in its.items():
                assert mine[key] == (pytest.approx(value, rel=rel) if rel and isinstance(value, float) else value), key
        tables = [pq.read_table(folder / "predictions.parquet") for folder in (fold, other)]
        columns = ["utterance", "label", "predicted"] if rel else tables[0].column_names
        assert tables[0].select(columns).equals(tables[1].select(columns))


Start = Callable[..., Command]


@pytest.fixture
def start(tiny_data: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a command on a cluster, in the folder tmp_path / "it"; it is killed if it still runs at the end."""
    started: list[Command] = []

    def begin(cluster: Machines, **overrides: Any) -> Command:
        started.append(Command(cluster, tiny_data, tmp_path / "it", **overrides))
        return started[-1]

    yield begin
    for command in started:
        command.process.kill()
        command.process.wait()


OTHERS = """
import sys, time, numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False)
(node,) = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
@ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node})
class Holder:
    def __init__(self):
        self.held = [ray.put(numpy.zeros(2**23, "uint8")) for _ in range(8)]
    def holds(self):
        return len(self.held)
holder = Holder.remote()
print(ray.get(holder.holds.remote()), flush=True)
time.sleep(600)
"""
"""Holds 64 of the 76 MB of a node's object store."""


SPILLED = """
from sermll.cluster import connected, spilled_bytes
with connected():
    print(spilled_bytes())
"""


def test_an_object_store_that_is_full_spills(start: Start, tiny_data: Path, tmp_path: Path) -> None:
    with machines(1, memory_mb=76) as small:  # Ray wants 75 at least
        words = [sys.executable, "-c", OTHERS, f"127.0.0.1:{small.port}"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as others:
            assert others.stdout is not None
            assert others.stdout.readline() == "8\n"
            command = start(small)
            command.end()
            environment = {**os.environ, "PYTHONPATH": str(HERE), "RAY_ADDRESS": f"127.0.0.1:{small.port}"}
            told = subprocess.run([sys.executable, "-c", SPILLED], env=environment, capture_output=True, text=True)
            spilled = [path for path in small.folder.glob("session_*/ray_spilled_objects*/*") if path.is_file()]
            others.kill()
    assert spilled
    assert int(told.stdout) > 0, told.stderr  # by which a command that trains tells of it
    command.equals(calm(tiny_data, tmp_path / "calm", {}))


def test_processes_that_are_killed_and_one_that_hangs_for_a_while(
    cluster: Machines, start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    nodes(cluster, 1)
    command = start(cluster)
    command.wait(lambda: _kill_data_task(cluster))
    command.mid_epoch(4)
    (trainer,) = cluster.processes("RayTrainWorker")
    trainer.suspend()
    time.sleep(5)
    trainer.resume()
    command.mid_epoch(6)
    trainer.kill()
    known = len(command.history())
    command.mid_epoch(known + 2)
    said = command.said
    command.process.kill()  # the driver's
    command.process.wait()
    command = start(cluster)
    command.end()
    assert not list(command.runs.glob("tiny-*/.lanes*"))
    assert [line for line in said.splitlines() if line.startswith("fold 0: worker 0 failed: ")], said
    assert "fold 0: a process or node that made batches was lost; they were made again" in said
    assert said.count("goes on from") == 1 and known >= 6, said  # the data's loss and the pause cost nothing
    assert re.search(r"^fold 0: epoch \d+ took \d+\.\d s where \d\.\d are usual", said, re.MULTILINE), said
    command.equals(calm(tiny_data, tmp_path / "calm", {}))


def _kill_data_task(cluster: Machines) -> bool:
    """Kill a process that is making batches at this moment; whether there was one."""
    for process in cluster.processes("ray::IDLE") + cluster.processes("ray::MapBatches"):
        with suppress(psutil.Error):
            process.suspend()  # what it was doing it is doing still
            if "ray::MapBatches" in " ".join(process.cmdline()):
                process.kill()
                return True
            process.resume()
    return False


def test_nodes_come_and_go_under_a_lane_that_adapts(
    cluster: Machines, start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    nodes(cluster, 1)
    adapting = QUIET | {"resources.workers": [1, 2], "resources.max_failures": 1}
    adapting |= {"optim.epochs": 100, "optim.lr": 1e-5}  # rounding grows where much is learned
    command = start(cluster, **adapting)
    command.mid_epoch(1)
    nodes(cluster, 2)
    command.wait(lambda: "goes on with 2 workers, 1 before" in command.said)
    known = len(command.history())
    command.mid_epoch(known + 2)
    waiting = len(command.history())
    cluster.stall(cluster.node_of(cluster.processes("RayTrainWorker")[-1]), 5)  # Ray waits for a node for longer
    assert len(command.history()) <= waiting + 1  # the other one waits for it
    command.mid_epoch(waiting + 2)
    nodes(cluster, 1)
    said = command.end()
    assert [row["workers"] for row in command.history()][known : known + 2] == [2, 2]
    assert "fold 0: goes on with 1 workers, 2 before" in said, said
    assert said.count("failed: ") == 1  # growing is no failure
    command.equals(calm(tiny_data, tmp_path / "calm", adapting), rel=2e-3)


def test_a_node_that_comes_later_opens_a_second_lane(
    cluster: Machines, start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    nodes(cluster, 1)
    command = start(cluster, **{"fold": None, "optim.epochs": 24})

    def in_training() -> int:
        begun = {path.parent for path in command.runs.glob("tiny-*/fold-*/history.json")}
        return len(begun - {path.parent for path in command.runs.glob("tiny-*/fold-*/result.json")})

    command.wait(in_training)
    assert in_training() == 1
    nodes(cluster, 2)
    command.wait(lambda: in_training() == 2)
    command.end()
    command.equals(calm(tiny_data, tmp_path / "calm", {"optim.epochs": 24}))


def test_a_node_that_is_about_to_go_is_left(cluster: Machines, start: Start, tiny_data: Path, tmp_path: Path) -> None:
    nodes(cluster, 2)
    command = start(cluster, **{"resources.max_failures": 0, "optim.epochs": 60})
    command.mid_epoch(2)
    (trainer,) = cluster.processes("RayTrainWorker")
    gone = cluster.node_of(trainer)
    gone.terminate()  # as Kubernetes does; `ray start --block` then says that its node will go, within half a minute
    command.wait(lambda: "has left a machine that is about to go" in command.said)
    gone.wait(60)
    said = command.end()
    assert said.count("goes on from") == 1 and "failed" not in said, said
    command.equals(calm(tiny_data, tmp_path / "calm", {"optim.epochs": 60}))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 16 MB; needs root."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_or_read_only(cluster: Machines, start: Start, tiny_data: Path, tmp_path: Path) -> None:
    nodes(cluster, 1)
    with small_disk(tmp_path / "it") as disk:
        command = start(cluster)
        command.mid_epoch(2)
        filler = disk / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4096"], capture_output=True)  # until nothing fits
        said = command.end(1)
        assert "fold 0: " in said and "No space left on device" in said and "make room" in said, said
        assert "Traceback" not in said and "worker 0 failed" not in said, said
        filler.unlink()
        command = start(cluster)
        command.mid_epoch(5)
        (checkpoints,) = disk.glob("runs/tiny-*/fold-0/checkpoints")
        subprocess.run(["mount", "--bind", str(checkpoints), str(checkpoints)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(checkpoints)], check=True)
        said = command.end(1)
        assert "Read-only file system" in said and "mend the storage" in said, said
        subprocess.run(["umount", str(checkpoints)], check=True)
        command = start(cluster)
        command.end()
        command.equals(calm(tiny_data, tmp_path / "calm", {}))
