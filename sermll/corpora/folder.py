"""The part of reading that all corpora share: every file in a fixed order, named once, none lost."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

Votes = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Label:
    """What a label file says of an utterance; the fields are those of `Utterance`."""

    path: str = field(compare=False)
    """Label file, relative to the corpus folder."""
    line: int = field(compare=False)
    id: str
    label: str
    votes: Votes | None
    valence: float | None
    arousal: float | None
    dominance: float | None


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
    return iter(read_audio(root, list_files(root, layout), layout, parse))


def list_files(root: Path, layout: str) -> list[PurePosixPath]:
    """Paths relative to `root` of all files below it that are not hidden, sorted.

    Symbolic links are followed, each folder once.

    Raises:
        CorpusError: `root` is missing, not a folder or unreadable.
    """
    try:
        return sorted(_walk(root), key=str)
    except FileNotFoundError as error:
        raise CorpusError(f"{error.filename}: no such folder; expected {layout}") from None
    except NotADirectoryError as error:
        raise CorpusError(f"{error.filename}: not a folder; expected {layout}") from None
    except OSError as error:
        raise CorpusError(f"{root}: cannot be read ({error}); check its permissions") from None


def read_audio(
    root: Path,
    files: Iterable[PurePosixPath],
    layout: str,
    parse: Callable[[PurePosixPath], Utterance | Problem | None],
) -> list[Utterance | Problem]:
    """Rows of the WAV and FLAC files among `files`, in their order, as `read_folder` gives them.

    Raises:
        CorpusError: no audio file is an utterance.
    """
    paths = [path for path in files if path.name.lower().endswith((".wav", ".flac"))]
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
    return rows


def read_labelled(
    root: Path,
    files: Sequence[PurePosixPath],
    layout: str,
    entries: Iterable[Label | Problem],
    parse: Callable[[PurePosixPath, Mapping[str, Label]], Utterance | Problem | None],
) -> Iterator[Utterance | Problem]:
    """Rows of a corpus whose labels stand in files of their own: as `read_audio`, then what is wrong with labels.

    A label without recording is a `no-audio` problem; of two labels of an utterance that differ, the second is a
    `repeated-label` problem.

    Args:
        root: folder of the corpus, or one above it.
        files: what `list_files` found there.
        layout: what was expected, for the error message.
        entries: what the label files say.
        parse: row of an audio file, given the labels by utterance.

    Raises:
        CorpusError: no audio file is an utterance. Raised by the call itself, before the first row.
    """
    labels: dict[str, Label] = {}
    problems: list[Problem] = []
    for entry in entries:
        if isinstance(entry, Problem):
            problems.append(entry)
        elif (first := labels.setdefault(entry.id, entry)) != entry:
            detail = (
                f"line {entry.line}: {entry.id} has another label in {first.path}, line {first.line}, which is used"
            )
            problems.append(Problem(entry.path, "repeated-label", detail, used=True))
    rows = read_audio(root, files, layout, lambda path: parse(path, labels))
    heard = {row.id for row in rows if isinstance(row, Utterance)}
    unheard = (
        Problem(label.path, "no-audio", f"line {label.line}: there is no recording of {label.id}")
        for label in labels.values()
        if label.id not in heard
    )
    return iter([*rows, *problems, *unheard])


def read_blocks(root: Path, path: PurePosixPath, *starts: str) -> Iterator[list[tuple[int, str]]]:
    """The lines of a label file with their numbers, in blocks.

    A new block begins after an empty line, and with a line that starts as one of `starts`.

    Raises:
        CorpusError: the file cannot be read.
    """
    block: list[tuple[int, str]] = []
    for number, line in enumerate(read_text(root, path).split("\n"), 1):
        line = line.strip()
        if block and (not line or line.startswith(starts)):
            yield block
            block = []
        if line:
            block.append((number, line))
    if block:
        yield block


def read_text(root: Path, path: PurePosixPath) -> str:
    """Contents of a text file; bytes that are not UTF-8 become U+FFFD.

    Raises:
        CorpusError: the file cannot be read.
    """
    try:
        return (root / path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise CorpusError(f"{root / path}: cannot be read ({error}); check its permissions") from None


def votes_of(counts: Mapping[str, float]) -> Votes | None:
    """Annotators by label as `Utterance.votes` wants them, labels without one left out; None: nobody voted."""
    return tuple(sorted((label, float(count)) for label, count in counts.items() if count > 0)) or None


def _walk(root: Path) -> Iterator[PurePosixPath]:
    def stop(error: OSError) -> None:
        raise error

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that points to a folder above or beside it
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in names:
            if not name.startswith("."):
                yield relative / name


def _second(root: Path, path: str, first: str) -> Problem | None:
    """What to do with `path`, whose name was taken by `first`: None for a copy, else a problem."""
    try:
        if (root / path).stat().st_size == (root / first).stat().st_size:
            return None
    except OSError as error:
        return Problem(path, "duplicate-name", f"same name as {first}; they cannot be compared ({error})")
    return Problem(path, "duplicate-name", f"same name as {first}, which has another size")
