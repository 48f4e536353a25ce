"""Who is tested, who chooses, who is trained on: folds of speakers, and the proof that they do not overlap."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from sermll.config import Protocol
from sermll.errors import ProtocolError

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Fold:
    """One fold: disjoint speakers for test, dev and train."""

    index: int
    test: tuple[str, ...]
    dev: tuple[str, ...]
    train: tuple[str, ...]

    def rows(self, speakers: Sequence[str]) -> dict[str, np.ndarray]:
        """Row numbers of each split, int64 ascending, for the speaker of each utterance."""
        column = np.asarray(speakers)
        return {split: np.flatnonzero(np.isin(column, getattr(self, split))) for split in ("train", "dev", "test")}


@dataclass(frozen=True)
class Folds:
    """A protocol applied to a corpus."""

    name: str
    folds: tuple[Fold, ...]

    @property
    def hash(self) -> str:
        """Names the exact division of speakers."""
        return hashlib.sha256(json.dumps([asdict(fold) for fold in self.folds]).encode()).hexdigest()[:12]


def make_folds(
    protocol: Protocol, named: Mapping[str, Groups], speakers: Sequence[str], sessions: Sequence[str | None]
) -> Folds:
    """Divide the speakers of a corpus.

    The dev speakers of a fold are the next ones after its test group, in the protocol's order and around its end:
    the same for every seed and variant, and every speaker chooses about equally often.

    Args:
        protocol: which folds, how many dev speakers.
        named: the corpus's own fold lists, the default one first.
        speakers: the speaker of each utterance.
        sessions: the session of each utterance, None where the corpus has none.

    Raises:
        ProtocolError: no such fold list; speakers missing from it, tested twice or without data; nobody left to train.
    """
    name = next(iter(named), "speaker") if protocol.folds == "default" else protocol.folds
    groups = _groups(name, named, speakers, sessions)
    order = [speaker for group in groups for speaker in group]
    _check_groups(name, order, speakers)
    folds = []
    for index, test in enumerate(groups):
        after = order.index(test[-1]) + 1
        rest = [speaker for speaker in order[after:] + order[:after] if speaker not in test]
        if protocol.dev_speakers == "auto":
            count = len(groups[(index + 1) % len(groups)]) if name == "session" else max(1, round(0.1 * len(rest)))
        else:
            count = protocol.dev_speakers
        if count >= len(rest):
            raise ProtocolError(
                f"protocol {name!r}: fold {index} tests {len(test)} of {len(order)} speakers; "
                f"{count} dev speakers leave nobody to train on"
            )
        folds.append(Fold(index, tuple(test), tuple(rest[:count]), tuple(sorted(rest[count:]))))
    return Folds(name, tuple(folds))


def check_overlap(fold: Fold, speakers: Sequence[str], ids: Sequence[str], audio_sha256: Sequence[str]) -> None:
    """Refuse a fold in which a speaker or a recording stands on two sides.

    Raises:
        ProtocolError: naming the speakers or the utterances.
    """
    sides = (("train", "dev"), ("train", "test"), ("dev", "test"))
    for one, other in sides:
        shared = set(getattr(fold, one)) & set(getattr(fold, other))
        if shared:
            raise ProtocolError(f"fold {fold.index}: {one} and {other} share the speakers {', '.join(sorted(shared))}")
    rows = fold.rows(speakers)
    for one, other in sides:
        first = {audio_sha256[row]: ids[row] for row in rows[one]}
        same = [(first[audio_sha256[row]], ids[row]) for row in rows[other] if audio_sha256[row] in first]
        if same:
            pairs = ", ".join(f"{a} = {b}" for a, b in same[:5])
            raise ProtocolError(
                f"fold {fold.index}: {len(same)} recordings stand in {one} and in {other} ({pairs}); "
                "remove the copies from the corpus and prepare again"
            )


def check_classes(fold: Fold, labels: np.ndarray, classes: Sequence[str], rows: Mapping[str, np.ndarray]) -> None:
    """Refuse a fold that cannot be learned or scored.

    Raises:
        ProtocolError: a split is empty, or a class of the corpus has no training utterance.
    """
    for split, members in rows.items():
        if len(members) == 0:
            raise ProtocolError(f"fold {fold.index}: no utterance for {split} (speakers {getattr(fold, split)})")
    counts = np.bincount(labels[rows["train"]], minlength=len(classes))
    if np.count_nonzero(counts) < 2:
        only = classes[int(counts.argmax())]
        raise ProtocolError(f"fold {fold.index}: every training utterance is {only!r}; two classes at least are needed")
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if absent:
        raise ProtocolError(f"fold {fold.index}: no training utterance of {', '.join(absent)}; it could not be learned")


def _groups(
    name: str, named: Mapping[str, Groups], speakers: Sequence[str], sessions: Sequence[str | None]
) -> list[list[str]]:
    if name in named:
        return [list(group) for group in named[name]]
    if name == "speaker":
        return [[speaker] for speaker in sorted(set(speakers))]
    if name == "session":
        members: dict[str, set[str]] = {}
        for speaker, session in zip(speakers, sessions, strict=True):
            if session is None:
                raise ProtocolError("protocol 'session': this corpus tells no sessions; use 'speaker'")
            members.setdefault(session, set()).add(speaker)
        return [sorted(members[session]) for session in sorted(members)]
    choices = ", ".join([*named, "speaker", "session"])
    raise ProtocolError(f"protocol.folds={name}: no such fold list; this corpus has: {choices}")


def _check_groups(name: str, order: Sequence[str], speakers: Sequence[str]) -> None:
    present = set(speakers)
    twice = sorted({speaker for speaker in order if order.count(speaker) > 1})
    if twice:
        raise ProtocolError(f"protocol {name!r}: the speakers {', '.join(twice)} are tested in two folds")
    unlisted, absent = sorted(present - set(order)), sorted(set(order) - present)
    if unlisted:
        raise ProtocolError(f"protocol {name!r} does not place the speakers {', '.join(unlisted)}")
    if absent:
        raise ProtocolError(
            f"protocol {name!r} expects the speakers {', '.join(absent)}, of whom the data hold nothing; "
            "complete the corpus, or use protocol.folds=speaker"
        )
    if len(present) < 3:
        raise ProtocolError(f"{len(present)} speakers are too few: test, dev and train need one each at least")
