"""What a corpus is made of: typed rows of utterances, the files that could not become one, and the corpus's facts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Utterance:
    """One labelled recording, before its audio is read."""

    id: str
    """Unique within the corpus; stable across machines."""
    path: str
    """Audio file, relative to the corpus folder, with forward slashes."""
    label: str
    """One of the corpus's classes."""
    speaker: str
    session: str | None = None
    text: str | None = None
    """Identity of the sentence spoken, where the corpus tells it."""
    sex: str | None = None
    """'female' or 'male', where the corpus tells it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that did not become a usable utterance, and why."""

    path: str
    reason: str
    """A short word that problems are counted by, such as 'corrupt' or 'silent'."""
    detail: str


@dataclass(frozen=True)
class Corpus:
    """The datasheet of a corpus and the function that reads its folder."""

    name: str
    title: str
    classes: tuple[str, ...]
    """Class order of every model, table and picture; never derived from data."""
    counts: Mapping[str, int]
    """Published number of utterances of each class; `prepare` says where a folder differs."""
    folds: Mapping[str, tuple[tuple[str, ...], ...]]
    """Named fold lists: for each fold, the speakers tested. The first is the default; may be empty."""
    licence: str
    citation: str
    read: Callable[[Path], Iterator[Utterance | Problem]]
    """Rows of a corpus folder in a fixed order. Raises CorpusError if it is not this corpus."""
    generate: Callable[[Path], None] | None = None
    """For built-in corpora: write the recordings into a folder."""
