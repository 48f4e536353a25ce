"""What a corpus is made of: typed rows of utterances, the files that could not become one, and the corpus's facts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Utterance:
    """One labelled recording, or a part of one, before its audio is read. What the corpus does not tell is None."""

    id: str
    """Unique within the corpus; stable across machines."""
    path: str
    """Audio file, relative to the corpus folder, with forward slashes."""
    label: str
    """One of the corpus's classes, or of its labels that are none."""
    speaker: str
    session: str | None = None
    text: str | None = None
    """Identity of the sentence spoken."""
    sex: str | None = None
    """'female' or 'male'."""
    fold: str | None = None
    """The fold that tests it, where the corpus comes with folds."""
    start_s: float | None = None
    """Where the utterance starts in its file; None: at the file's start."""
    end_s: float | None = None
    """Where it ends; None: at the file's end."""
    votes: tuple[tuple[str, float], ...] | None = None
    """How many annotators chose each label, at least one of them, by label in alphabetical order."""
    valence: float | None = None
    """Mean over annotators on the corpus's own scale, as are arousal and dominance."""
    arousal: float | None = None
    dominance: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that did not become a usable utterance, and why; or one that is used, but is not as it should be."""

    path: str
    reason: str
    """A short word that problems are counted by, such as 'corrupt' or 'silent'."""
    detail: str
    used: bool = False


@dataclass(frozen=True, slots=True)
class Archive:
    """A file to download: where, how long, and what proves it whole."""

    url: str
    bytes: int | None
    """Length, None where it is not published."""
    checksum: str | None
    """'sha256:...' or 'md5:...', None where it is not published."""


@dataclass(frozen=True)
class Corpus:
    """The datasheet of a corpus and the function that reads its folder."""

    name: str
    title: str
    classes: tuple[str, ...]
    """The corpus's own classes, in the order of every model, table and picture; never derived from data."""
    counts: Mapping[str, int]
    """Published number of utterances of each label; `prepare` says where a folder differs. May be empty."""
    folds: Mapping[str, tuple[tuple[str, ...], ...]]
    """Named fold lists: for each fold, the speakers tested. May be empty."""
    licence: str
    citation: str
    source: str
    """Where to get the corpus, or whom to ask for it."""
    read: Callable[[Path], Iterator[Utterance | Problem]]
    """Rows of a corpus folder in a fixed order. Raises CorpusError if it is not this corpus."""
    other_labels: tuple[str, ...] = ()
    """Labels that are no class, such as 'no agreement': prepared and counted, never trained on."""
    default_labels: str = "native"
    """The label space used unless a run says otherwise."""
    default_folds: str = "speaker"
    """The fold list used unless a run says otherwise: a name in `folds`, 'speaker', 'session' or 'fold'."""
    archives: tuple[Archive, ...] = field(default=())
    """What `sermll download` fetches; empty where the licence asks for a signature or a form."""
    generate: Callable[[Path], None] | None = None
    """For built-in corpora: write the recordings into a folder."""
