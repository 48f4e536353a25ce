"""What benchmarks promise before they are run: where they run, what they compare, that nothing measured is lost."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sermll.config import Experiment

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

class Rest(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = {"pydantic", "torchaudio", "ray", "mlflow", "pyarrow", "soundfile", "librosa", "speechbrain"}
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Rest
sys.argv = ["gpu.py", "--tiny"]
sys.path[:0] = [".", "benchmarks"]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_the_gpu_benchmark_needs_torch_and_transformers_alone() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| fine-tuning WavLM-Large" in done.stdout
    assert "ray is not installed" in done.stdout
    lines = [
        line for line in done.stdout.splitlines() if line.startswith(("| frames", "| gradients", "| SupCon, error"))
    ]
    assert len(lines) == 6
    assert all(line.endswith("| yes |") for line in lines if "bf16" not in line), lines


@pytest.mark.parametrize("tiny", [True, False])
def test_the_gpu_benchmark_trains_the_defaults(benchmark: Any, tiny: bool) -> None:
    plain = benchmark("gpu").settings(Path("weights"), tiny)
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "data": {"path": "x"},
            "model": {"encoder": {"name": "weights"}, "pool": {"heads": 2 if tiny else 16}},
            "optim": {"lr": 1e-5, "precision": "bf16"},
        }
    ).model_dump()

    def tree(node: Any) -> Any:
        return {name: tree(it) for name, it in vars(node).items()} if isinstance(node, SimpleNamespace) else node

    found = tree(plain)
    assert found["model"] == experiment["model"] and found["losses"] == experiment["losses"]
    assert found["optim"].items() <= experiment["optim"].items()
    assert set(found) == {"model", "losses", "optim"}


def test_what_was_measured_before_a_failure_is_written(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = benchmark("side_by_side")

    def measured() -> Iterator[Any]:
        yield frame.Row(name="one", unit="s", against="two", ours=1.0, target=frame.Target("<=", 2, of="ours"))
        raise ValueError("no more\nthan this")

    monkeypatch.setattr(sys, "argv", ["group.py", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit, match="True"):
        frame.alone(measured)
    rows = frame.read_rows(tmp_path / "rows.json")
    assert [(row.name, row.failed, row.met) for row in rows] == [("one", False, True), ("group", True, None)]
    assert rows[1].note == "failed: ValueError: no more"
    told = capsys.readouterr()
    assert "| group |" in told.out and "**failed**" in told.out and "Traceback" in told.err


def test_a_peer_that_cannot_be_imported_is_not_called_absent(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = benchmark("side_by_side")
    (tmp_path / "broken_peer.py").write_text("raise AttributeError('of another version')")
    monkeypatch.syspath_prepend(tmp_path)
    assert frame.optional("broken_peer") is None and frame.optional("no_such_peer.part") is None
    assert "cannot be imported (AttributeError: of another version)" in frame.missing("broken-peer")
    assert "is not installed" in frame.missing("no-such-peer")


def test_a_failed_group_leaves_the_others_written(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, frame = benchmark("cpu"), benchmark("side_by_side")

    def group(command: list[str], **_: Any) -> SimpleNamespace:
        fields = {"name": "padding", "unit": "%", "against": "random", "target": None, "spread": None}
        if "padding" in command[1]:
            Path(command[-1]).write_text(json.dumps([fields]))
        return SimpleNamespace(returncode=0 if "padding" in command[1] else 9)

    monkeypatch.setattr(cpu, "GROUPS", ("padding", "mixing"))
    monkeypatch.setattr(cpu, "subprocess", SimpleNamespace(run=group, DEVNULL=None))
    monkeypatch.setattr(cpu, "other_load", lambda: 0.0)
    monkeypatch.setattr(sys, "argv", ["cpu.py"])
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    assert cpu.main() == 1
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["name"], row["failed"]) for row in rows] == [("padding", False), ("mixing", True)]
    assert "ended with status 9" in rows[1]["note"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
    ],
)
def test_the_data_sheet_is_that_of_the_gpu(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, name: str, found: str | None
) -> None:
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: name)
    peak = gpu.peak_flops()
    assert (peak and peak[1]) == found
