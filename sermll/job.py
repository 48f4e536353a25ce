"""The job of training one fold: what a command writes down for the workers that do it.

It is a module of its own, since commands that only hand jobs out need not load torch for that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sermll.files import CHECKPOINTS, FAILED, LOCK, read_json
from sermll.storage import fetch

LOOK_AGAIN_S = 5.0
"""How often object storage is asked for news of a fold."""


@dataclass(frozen=True, eq=False)
class FoldJob:
    """Everything that training a fold of a run needs, but for the utterances."""

    run: str
    """Run id and fold: what a checkpoint must say to be resumed."""
    title: str
    """What the fold is called where its progress is told."""
    settings: dict[str, Any]
    """The resolved experiment as JSON."""
    fold: int
    folder: str
    """The fold's folder, absolute, on storage that all workers share."""

    @property
    def lock(self) -> Path:
        """Held by the command that trains it."""
        return Path(self.folder) / LOCK

    @property
    def checkpoints(self) -> Path:
        """Folder of the fold's checkpoints."""
        return Path(self.folder) / CHECKPOINTS

    @property
    def failed(self) -> Path:
        """Says why it could not be trained, if it could not; see `files.failure`."""
        return Path(self.folder) / FAILED

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (Path(self.folder) / "result.json").exists()

    @property
    def history_bytes(self) -> int:
        """Size of the history's file; 0: there is none."""
        path = Path(self.folder) / "history.json"
        fetch(path, max_age_s=LOOK_AGAIN_S)
        return path.stat().st_size if path.exists() else 0

    def history(self) -> list[dict[str, Any]]:
        """What each finished epoch gave."""
        path = Path(self.folder) / "history.json"
        fetch(path, max_age_s=LOOK_AGAIN_S)
        return read_json(path) if path.exists() else []
