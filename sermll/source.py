"""Which code is running: the commit of the checkout, where there is one, or of the one that a job was sent from."""

import json
import subprocess
from functools import cache
from pathlib import Path

STAMP = "submitted.json"
"""Beside this file in the copy of a job: what `code_version` said where it was submitted."""


@cache
def code_version() -> dict[str, str | bool | None]:
    """Commit and whether the checkout differs from it; both None when sermll was installed without its repository."""
    folder = Path(__file__).resolve().parent
    if (folder / STAMP).is_file():
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # a repository around us need not be ours
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
