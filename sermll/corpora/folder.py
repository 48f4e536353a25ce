"""The part of reading that all corpora share: every audio file in a fixed order, named once, none lost."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance


def read_folder(
    root: Path, layout: str, parse: Callable[[PurePosixPath], Utterance | Problem | None]
) -> Iterator[Utterance | Problem]:
    """Rows of the WAV and FLAC files at any depth below `root`, sorted by path; nothing is decoded.

    Hidden files and folders (AppleDouble `._*` among them) are skipped. A file whose name was taken before is
    skipped as a second copy if it has the same size, else it is a `duplicate-name` problem.

    Args:
        root: folder of the corpus, or one above it.
        layout: what was expected, for the error message.
        parse: row of a path relative to `root`; None for a file that is not part of the corpus as sermll uses
            it.

    Raises:
        CorpusError: `root` is missing, not a folder or unreadable, or no audio file in it is an utterance.
            Raised by the call itself, before the first row.
    """
    try:
        paths = _audio_files(root)
    except FileNotFoundError as error:
        raise CorpusError(f"{error.filename}: no such folder; expected {layout}") from None
    except NotADirectoryError as error:
        raise CorpusError(f"{error.filename}: not a folder; expected {layout}") from None
    except OSError as error:
        raise CorpusError(f"{root}: cannot be read ({error}); check its permissions") from None
    if not paths:
        raise CorpusError(f"{root}: no WAV or FLAC file in this folder or below it; expected {layout}")

    rows: list[Utterance | Problem] = []
    taken: dict[str, str] = {}
    for path in paths:
        row = parse(path)
        if isinstance(row, Utterance) and taken.setdefault(row.id, row.path) != row.path:
            row = _second(root, row.path, first=taken[row.id])
        if row is not None:
            rows.append(row)
    if not taken:
        problem = next((row for row in rows if isinstance(row, Problem)), None)
        why = f"{problem.path}: {problem.detail}" if problem else f"{paths[0]} is of a part not used"
        raise CorpusError(f"{root}: none of the {len(paths)} audio files fits ({why}); expected {layout}")
    return iter(rows)


def _audio_files(root: Path) -> list[PurePosixPath]:
    """Paths of the audio files relative to `root`, sorted; symbolic links are followed, each folder once."""

    def stop(error: OSError) -> None:
        raise error

    found: list[PurePosixPath] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that points to a folder above or beside it
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        audible = (name for name in names if name.lower().endswith((".wav", ".flac")))
        found.extend(relative / name for name in audible if not name.startswith("."))
    return sorted(found, key=str)


def _second(root: Path, path: str, first: str) -> Problem | None:
    """What to do with `path`, whose name was taken by `first`: None for a copy, else a problem."""
    try:
        if (root / path).stat().st_size == (root / first).stat().st_size:
            return None
    except OSError as error:
        return Problem(path, "duplicate-name", f"same name as {first}; they cannot be compared ({error})")
    return Problem(path, "duplicate-name", f"same name as {first}, which has another size")
