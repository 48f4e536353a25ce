"""Checkpoints that are whole or refused, and never run code when they are read.

A checkpoint is a folder: `model.safetensors`, `trained.safetensors` if training goes on from other weights than those
that are scored, `optimizer.pt` (read with weights_only), further files of the caller, and `checkpoint.json`, written
last, which holds the caller's notes and the SHA-256 of every other file.
"""

import json
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sermll.errors import CheckpointError, StorageError
from sermll.shards import file_sha256
from sermll.storage import fetch, machine, remove, send

FORMAT = 1
NOTES = "checkpoint.json"
SETTLE_S = 60.0
"""How long a machine may see a shared folder as it was; NFS remembers what it has read for so long."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found to be those that were written."""

    path: Path
    notes: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Verify a checkpoint.

        Raises:
            CheckpointError: missing, from another version, truncated or changed; the file at fault is named.
        """
        fetch(path)
        try:
            notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not a whole checkpoint ({NOTES} is missing)") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / NOTES}: cannot be read ({error})") from None
        if not isinstance(notes, dict) or notes.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT}, which this version of sermll reads")
        for name, sha256 in notes["files"].items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing from the checkpoint")
            if file_sha256(file) != sha256:
                raise CheckpointError(f"{file}: truncated or changed since it was written")
        return cls(path, notes)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a module or of another file of `save`, on the CPU."""
        fetch(self.path / f"{name}.safetensors")  # it may have been opened on another machine
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}/{name}.safetensors: cannot be read ({error})") from None

    def optimizer(self) -> dict[str, Any]:
        """The optimiser's state, on the CPU."""
        try:
            return torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what the unpickler met
            raise CheckpointError(f"{self.path}/optimizer.pt: cannot be read ({error})") from None

    def load_into(self, module: nn.Module, name: str = "model") -> None:
        """Set a module's parameters: those that are scored, or those "trained".

        Raises:
            CheckpointError: the checkpoint's tensors are not the module's.
        """
        try:
            module.load_state_dict(self.tensors(name))
        except RuntimeError as error:
            raise CheckpointError(f"{self.path}: does not fit the model ({str(error).splitlines()[0]})") from None


class Stateful(Protocol):
    """An optimizer, whichever."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names, nested."""
        ...


def save(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: Stateful,
    notes: Mapping[str, Any],
    others: Mapping[str, dict[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint into the folder `path`, which may already hold further files to be guarded.

    Args:
        path: an existing folder.
        modules: "model", what is scored, and "trained" if it is another.
        optimizer: its state is kept.
        notes: what to remember, as JSON.
        others: further tensors, by the name of their file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        states = {name: module.state_dict() for name, module in modules.items()} | dict(others or {})
        for name, state in states.items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            save_file(tensors, path / f"{name}.safetensors")
        torch.save(optimizer.state_dict(), path / "optimizer.pt")
    except (SafetensorError, RuntimeError) as error:  # what the two make of a full disk
        raise OSError(f"{path}: {error}") from error
    files = {file.name: file_sha256(file) for file in sorted(path.iterdir()) if file.is_file()}
    text = json.dumps({"format": FORMAT, "files": files, **notes})
    (path / NOTES).write_text(text, encoding="utf-8")


@contextmanager
def writing(folder: Path, epoch: int) -> Iterator[Path]:
    """A folder to write the checkpoint of an epoch into; it takes its place in `folder` whole or not at all."""
    # A name of its own: workers that were taken for lost may write still. What killed ones leave, `keep_only` removes.
    partial = folder / f"partial_{epoch:05d}_{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    try:
        yield partial
        place = folder / _name(epoch)
        remove(place)  # one that was found damaged, and its epoch trained again
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    send(place)


def keep_only(folder: Path, epochs: Collection[int]) -> None:
    """Remove the checkpoints of all other epochs."""
    kept = {_name(epoch) for epoch in epochs}
    for path in folder.iterdir():
        if path.name not in kept:
            remove(path)


def of_epoch(folder: Path, epoch: int) -> Checkpoint:
    """The checkpoint of an epoch.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return Checkpoint.open(folder / _name(epoch))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {folder.parent} to train the fold again") from None


def _name(epoch: int) -> str:
    return f"checkpoint_{epoch:05d}"


def newest(folder: Path, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The whole checkpoint of the highest epoch among a folder's, and what is wrong with those passed over.

    Raises:
        CheckpointError: a checkpoint belongs to another run than `run`.
    """
    fetch(folder, exact=True)
    faults: list[str] = []
    candidates: list[Checkpoint] = []
    for path in sorted(path for path in folder.glob("checkpoint_*") if path.is_dir()):
        try:
            candidates.append(Checkpoint.open(path))
        except CheckpointError as error:
            faults.append(str(error))
    foreign = [checkpoint for checkpoint in candidates if checkpoint.notes["run"] != run]
    if foreign:
        raise CheckpointError(f"{foreign[0].path}: belongs to run {foreign[0].notes['run']}, not to {run}")
    return max(candidates, key=lambda checkpoint: checkpoint.notes["epoch"], default=None), faults


def seen(chosen: Checkpoint) -> Checkpoint:
    """A checkpoint that another machine has opened, as soon as this one sees it in the same place.

    Raises:
        StorageError: it sees none there, or another.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            found = Checkpoint.open(chosen.path)
            if found == chosen:
                return found
            what = f"{chosen.path} is another one there"
        except CheckpointError as error:
            what = str(error)
        if time.monotonic() > deadline:
            raise StorageError(
                f"{machine()} does not see the checkpoint that the first worker goes on from, after {SETTLE_S:g} s "
                f"({what}); look whether all machines have the same folder there, and give the same command again"
            )
        time.sleep(1.0)
