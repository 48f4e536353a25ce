"""Checkpoints: exact, and refused by name when anything about them changed."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sermll import checkpoint
from sermll.checkpoint import Checkpoint, keep_only, newest, of_epoch, save, seen, writing
from sermll.errors import CheckpointError, StorageError


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    return module, optimizer


def written(folder: Path, epoch: int, run: str = "r") -> Path:
    path = folder / f"checkpoint_{epoch:03d}"
    path.mkdir(parents=True)
    (path / "predictions.parquet").write_bytes(b"guarded too")
    module, optimizer = trained(epoch)
    save(path, {"model": module}, optimizer, {"run": run, "epoch": epoch, "history": [{"epoch": epoch}]})
    return path


def test_model_and_optimiser_come_back_exactly(tmp_path: Path) -> None:
    module, optimizer = trained(3)
    opened = Checkpoint.open(written(tmp_path, 3))
    other, other_optimizer = trained(4)
    opened.load_into(other)
    other_optimizer.load_state_dict(opened.optimizer())
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(
        optimizer.state_dict()["state"].values(), other_optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert opened.notes["history"] == [{"epoch": 3}]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "predictions.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = written(tmp_path, 0)
    content = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    else:
        content[len(content) // 2] ^= 255
        (path / name).write_bytes(content if damage == "changed" else content[:-3])
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_damaged_notes_are_named(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, 0)
    (path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="checkpoint"):
        Checkpoint.open(path)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "it ran",))

    path = written(tmp_path, 0)
    (path / "optimizer.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError):
        Checkpoint(path, {}).optimizer()  # even where the hash was forged to fit
    assert not (tmp_path / "it ran").exists()


def test_the_newest_whole_checkpoint_is_taken_and_the_fault_told(tmp_path: Path) -> None:
    for epoch in (0, 1, 2):
        written(tmp_path, epoch)
    (tmp_path / "checkpoint_002" / "model.safetensors").write_bytes(b"cut")
    found, faults = newest(tmp_path, "r")
    assert found is not None and found.notes["epoch"] == 1
    assert len(faults) == 1 and "checkpoint_002" in faults[0]


def test_two_who_write_the_same_epoch_do_not_mix_their_files_and_failures_leave_nothing(tmp_path: Path) -> None:
    with writing(tmp_path, 3) as lost, writing(tmp_path, 3) as other:
        (lost / "a").write_text("by workers that were taken for lost")
        (other / "b").write_text("by those after them")
    assert [file.name for file in (tmp_path / "checkpoint_00003").iterdir()] == ["a"]  # the last to end
    with pytest.raises(FileNotFoundError), writing(tmp_path, 4) as cut:
        (cut / "missing" / "a").write_text("cut off")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_00003"]


def test_only_the_epochs_that_are_kept_stay(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        with writing(tmp_path, epoch) as path:
            (path / "a").write_text("whole")
    (tmp_path / "partial_00004_0123abcd").mkdir()  # left by a worker that was killed
    keep_only(tmp_path, [1, 3, 7])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00001", "checkpoint_00003"]


def test_an_epoch_without_its_checkpoint_says_what_to_delete(tmp_path: Path) -> None:
    with writing(tmp_path / "checkpoints", 2) as path:
        module, optimizer = trained()
        save(path, {"model": module}, optimizer, {"epoch": 2})
    assert of_epoch(tmp_path / "checkpoints", 2).notes["epoch"] == 2
    with pytest.raises(CheckpointError, match=rf"checkpoint_00003: not a whole .*; delete {tmp_path} to train"):
        of_epoch(tmp_path / "checkpoints", 3)


def test_what_another_machine_has_opened_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = written(tmp_path / "here", 1), written(tmp_path / "there", 2)
    chosen = Checkpoint.open(path)
    path.rename(tmp_path / "not yet here")
    shutil.copytree(other, path)  # as it was before

    def wait(_: float) -> None:
        shutil.rmtree(path)
        (tmp_path / "not yet here").rename(path)

    monkeypatch.setattr(checkpoint.time, "sleep", wait)
    assert seen(chosen) == chosen and chosen.notes["epoch"] == 1
    monkeypatch.setattr(checkpoint, "SETTLE_S", -1.0)
    assert seen(chosen) == chosen
    shutil.rmtree(path)
    with pytest.raises(StorageError, match=r"does not see the checkpoint .*checkpoint\.json is missing"):
        seen(chosen)
    shutil.copytree(other, path)
    with pytest.raises(StorageError, match=f"{path.name} is another one there"):
        seen(chosen)


def test_nothing_yet_is_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing", "r") == (None, [])


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 0, run="other")
    with pytest.raises(CheckpointError, match="belongs to run other, not to r"):
        newest(tmp_path, "r")


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    opened = Checkpoint.open(written(tmp_path, 0))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        opened.load_into(nn.Linear(9, 9))
