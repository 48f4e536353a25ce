"""Who is tested, who chooses, who is trained on: folds as data, and what leaks between their sides."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from sermll.config import Protocol
from sermll.errors import ProtocolError

Groups = Sequence[Sequence[str]]
SPLITS = ("train", "dev", "test")
SIDES = (("train", "dev"), ("train", "test"), ("dev", "test"))
BY_CORPUS = ("corpus", "one_corpus")
"""Protocols that divide joined data by corpus: leave one out; train on one."""


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold: the utterances of each split."""

    index: int
    rows: Mapping[str, np.ndarray]
    """Row numbers of 'train', 'dev' and 'test' in the prepared table, int64 ascending."""
    speakers: Mapping[str, tuple[str, ...]]
    """Speakers of each split, those whose utterances were all dropped among them."""

    def keep(self, kept: np.ndarray) -> "Fold":
        """The fold without the utterances that a label space drops; `kept` is bool by row."""
        return Fold(self.index, {split: rows[kept[rows]] for split, rows in self.rows.items()}, self.speakers)


@dataclass(frozen=True)
class Folds:
    """A protocol applied to a corpus."""

    name: str
    folds: tuple[Fold, ...]

    def hash(self, facts: Mapping[str, Any]) -> str:
        """Names the protocol: who is where, row by row, and the `facts` that decide the rest of it."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for fold in self.folds:
            for split in SPLITS:
                digest.update(f"{fold.index} {split}".encode() + fold.rows[split].astype("<i8").tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Leak:
    """Something that stands on two sides of a fold."""

    fold: int
    kind: str
    """'same split', 'utterance', 'speaker', 'audio', or 'copy' (a recording that is the same to the ear)."""
    sides: tuple[str, str]
    members: tuple[str, ...]
    """Speakers, utterances, or pairs of utterances."""

    def __str__(self) -> str:
        """In words, with the first members."""
        one, other = self.sides
        named = ", ".join(self.members[:5]) + (", ..." if len(self.members) > 5 else "")
        what = {
            "same split": f"{one} and {other} are the same {len(self.members)} utterances",
            "utterance": f"{len(self.members)} utterances stand in {one} and in {other} ({named})",
            "speaker": f"{one} and {other} share {len(self.members)} speakers ({named})",
            "copy": f"{len(self.members)} near copies stand in {one} and in {other} ({named})",
            "audio": f"{len(self.members)} recordings stand in {one} and, under another name, in {other} ({named})",
        }
        return f"fold {self.fold}: {what[self.kind]}"


def make_folds(protocol: Protocol, table: pa.Table, named: Mapping[str, Groups], default: str) -> Folds:
    """Divide the utterances of a corpus.

    Unless a file says otherwise, the dev speakers of a fold are the next ones after its test group, in the protocol's
    order and around its end: the same for every seed and variant, and every speaker chooses about equally often.
    Folds of whole corpora take dev speakers out of each training corpus instead, evenly spread over its speakers.

    Args:
        protocol: which folds, how many dev speakers.
        table: the prepared utterances; `id`, `corpus`, `speaker`, `session` and `fold` are used.
        named: the corpus's own fold lists.
        default: the fold list that "default" means.

    Raises:
        ProtocolError: no such fold list; folds of whole corpora for a single one; speakers missing from a list, tested
            twice or without data; nobody left to train; a file that is not a fold list of these data, or dev speakers
            asked for where the file gives them.
    """
    name = default if protocol.folds == "default" else protocol.folds
    if name.endswith((".yaml", ".yml", ".json")):
        return _from_file(Path(name), protocol, table)
    try:
        return _by_name(name, protocol, table, named)
    except ProtocolError as error:
        raise ProtocolError(f"{error}; {_instead(protocol, table, named)}") from None


def workable(protocol: Protocol, table: pa.Table, named: Mapping[str, Groups]) -> list[str]:
    """Names of the fold lists that fit these utterances, the corpus's own first; see `make_folds`."""

    def works(name: str) -> bool:
        try:
            _by_name(name, protocol, table, named)
        except ProtocolError:
            return False
        return True

    return [name for name in (*named, *BY_CORPUS, "speaker", "session", "fold") if works(name)]


def _instead(protocol: Protocol, table: pa.Table, named: Mapping[str, Groups]) -> str:
    """What to do where a fold list cannot divide the utterances."""
    names = workable(protocol, table, named)
    if names:
        return f"fold lists that fit these data: {', '.join(names)}; or give a file whose name ends in .yaml"
    fewer = "" if protocol.dev_speakers == "auto" else ", or set fewer protocol.dev_speakers"
    return f"no other fold list fits these data: prepare more of them{fewer}"


def _by_name(name: str, protocol: Protocol, table: pa.Table, named: Mapping[str, Groups]) -> Folds:
    if name in BY_CORPUS:
        return _by_corpus(name, protocol, table)
    groups = _groups(name, named, table)
    speakers = table["speaker"].to_pylist()
    order = [speaker for group in groups for speaker in group]
    _check_groups(name, order, speakers)
    folds = []
    for index, test in enumerate(groups):
        neighbours = len(groups[(index + 1) % len(groups)]) if name == "session" else None
        dev, train = _held_back(protocol, name, index, test, order, neighbours)
        folds.append(_fold(index, speakers, {"train": train, "dev": dev, "test": test}))
    return Folds(name, tuple(folds))


def find_leaks(fold: Fold, table: pa.Table) -> list[Leak]:
    """Everything that stands on two sides of a fold: utterances, speakers, recordings under two names."""
    ids = table["id"]
    audio = table["audio_sha256"].combine_chunks().dictionary_encode().indices.to_numpy()
    leaks = []
    for one, other in SIDES:
        first, second = fold.rows[one], fold.rows[other]
        shared = second[_among(second, first, len(table))]
        if len(shared) and len(shared) == len(first) == len(second):
            leaks.append(Leak(fold.index, "same split", (one, other), tuple(ids.take(shared).to_pylist())))
        elif len(shared):
            leaks.append(Leak(fold.index, "utterance", (one, other), tuple(ids.take(shared).to_pylist())))
        speakers = sorted(set(fold.speakers[one]) & set(fold.speakers[other]))
        if speakers:
            leaks.append(Leak(fold.index, "speaker", (one, other), tuple(speakers)))
        heard = second[_among(audio[second], audio[first], len(table))]
        by_audio = {audio[row]: row for row in first.tolist()} if len(heard) else {}
        pairs = [(by_audio[audio[row]], row) for row in heard.tolist()]
        copies = tuple(f"{ids[a]} = {ids[b]}" for a, b in pairs if a != b and a not in shared)
        if copies:
            leaks.append(Leak(fold.index, "audio", (one, other), copies))
    return leaks


def _among(numbers: np.ndarray, others: np.ndarray, count: int) -> np.ndarray:
    """Bool by place: which of some numbers below `count` are among others; much quicker than sorting them."""
    marked = np.zeros(count, bool)
    marked[others] = True
    return marked[numbers]


def check_classes(fold: Fold, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Refuse a fold that cannot be learned or scored.

    Args:
        fold: without dropped utterances.
        labels: class index by row of the prepared table.
        classes: their names.

    Raises:
        ProtocolError: a split is empty, or a class of the label space has no training utterance.
    """
    for split, members in fold.rows.items():
        if len(members) == 0:
            raise ProtocolError(f"fold {fold.index}: no utterance for {split} (speakers {fold.speakers[split]})")
    counts = np.bincount(labels[fold.rows["train"]], minlength=len(classes))
    if np.count_nonzero(counts) < 2:
        only = classes[int(counts.argmax())]
        raise ProtocolError(f"fold {fold.index}: every training utterance is {only!r}; two classes at least are needed")
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if absent:
        raise ProtocolError(f"fold {fold.index}: no training utterance of {', '.join(absent)}; it could not be learned")


def check_dev(fold: Fold, labels: np.ndarray, classes: Sequence[str], instead: str) -> None:
    """Refuse a fold to choose by whose dev utterances are all of one class: who always says it would be the best.

    Args:
        fold: without dropped utterances.
        labels: class index by row of the prepared table.
        classes: their names.
        instead: what to do about it.

    Raises:
        ProtocolError: naming the class.
    """
    held = np.unique(labels[fold.rows["dev"]])
    if len(held) == 1:
        raise ProtocolError(
            f"fold {fold.index}: every dev utterance is {classes[held[0]]!r} (speakers "
            f"{', '.join(fold.speakers['dev'])}), and an epoch that always says so would be the best; {instead}"
        )


def _fold(index: int, speakers: Sequence[str], members: Mapping[str, Sequence[str]]) -> Fold:
    """A fold of whole speakers."""
    column = np.asarray(speakers)
    rows = {split: np.flatnonzero(np.isin(column, list(members[split]))) for split in SPLITS}
    return Fold(index, rows, {split: tuple(members[split]) for split in SPLITS})


def _held_back(
    protocol: Protocol, name: str, index: int, test: Sequence[str], order: Sequence[str], neighbours: int | None
) -> tuple[list[str], list[str]]:
    """Dev and train speakers of a fold that tests `test`: the next ones after it, and the rest."""
    after = order.index(test[-1]) + 1
    rest = [speaker for speaker in [*order[after:], *order[:after]] if speaker not in test]
    count = protocol.dev_speakers
    if count == "auto":
        count = neighbours or max(1, round(0.1 * len(rest)))
    if count >= len(rest):
        raise ProtocolError(
            f"protocol {name!r}: fold {index} tests {len(test)} of {len(order)} speakers; "
            f"{count} dev speakers leave nobody to train on"
        )
    return rest[:count], sorted(rest[count:])


def _by_corpus(name: str, protocol: Protocol, table: pa.Table) -> Folds:
    """A fold for each corpus, in their order: 'corpus' tests it, 'one_corpus' trains on it, the others do the rest."""
    speakers = table["speaker"].to_pylist()
    members: dict[str, list[str]] = {}
    for corpus, speaker in sorted(set(zip(table["corpus"].to_pylist(), speakers, strict=True))):
        members.setdefault(corpus, []).append(speaker)
    corpora = list(dict.fromkeys(table["corpus"].to_pylist()))
    if len(corpora) < 2:
        raise ProtocolError(
            f"protocol.folds={name}: divides joined corpora, and these data are {corpora[0]} alone; give data.path two "
            "folders or more"
        )
    folds = []
    for index, corpus in enumerate(corpora):
        others = [other for other in corpora if other != corpus]
        tested, trained = ([corpus], others) if name == "corpus" else (others, [corpus])
        dev = [speaker for one in trained for speaker in _spread(protocol, name, index, one, members[one])]
        train = [speaker for one in trained for speaker in members[one] if speaker not in dev]
        test = [speaker for one in tested for speaker in members[one]]
        folds.append(_fold(index, speakers, {"train": train, "dev": dev, "test": test}))
    return Folds(name, tuple(folds))


def _spread(protocol: Protocol, name: str, index: int, corpus: str, speakers: Sequence[str]) -> list[str]:
    """Dev speakers of a training corpus: the first, the last, and evenly spaced ones between.

    With both ends taken they are of both sexes where a corpus numbers women and men in turn.
    """
    count = max(1, round(0.1 * len(speakers))) if protocol.dev_speakers == "auto" else protocol.dev_speakers
    if count >= len(speakers):
        raise ProtocolError(
            f"protocol {name!r}: fold {index} trains on {corpus}, which has {len(speakers)} speakers; "
            f"{count} dev speakers leave nobody of it to train on"
        )
    return [speakers[place * (len(speakers) - 1) // max(count - 1, 1)] for place in range(count)]


def _groups(name: str, named: Mapping[str, Groups], table: pa.Table) -> list[list[str]]:
    if name in named:
        return [list(group) for group in named[name]]
    speakers = table["speaker"].to_pylist()
    if name == "speaker":
        return [[speaker] for speaker in sorted(set(speakers))]
    if name in ("session", "fold"):
        members: dict[str, set[str]] = {}
        for speaker, group in zip(speakers, table[name].to_pylist(), strict=True):
            if group is None:
                raise ProtocolError(f"protocol {name!r}: not every utterance of these data tells one")
            members.setdefault(group, set()).add(speaker)
        return [sorted(members[group]) for group in sorted(members)]
    raise ProtocolError(f"protocol.folds={name}: no such fold list")


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
            f"protocol {name!r} expects the speakers {', '.join(absent)}, of whom the data hold nothing: "
            "complete the corpus"
        )
    if len(present) < 3:
        raise ProtocolError(f"{len(present)} speakers are too few: test, dev and train need one each at least")


def _from_file(path: Path, protocol: Protocol, table: pa.Table) -> Folds:
    """Folds as a file tells them: a list, for each fold the `test` members and, if it likes, `dev` and `train`.

    Members are speakers, or all of them are utterances. What the file leaves out follows the rules of other protocols:
    dev speakers come after the test speakers in the file's order, the rest is trained on.
    """
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProtocolError(f"protocol.folds={path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProtocolError(f"{path}: cannot be read as YAML ({error})") from None
    if isinstance(listed, Mapping) and set(listed) == {"folds"}:
        listed = listed["folds"]
    if not isinstance(listed, list) or not listed or not all(_is_fold(fold) for fold in listed):
        raise ProtocolError(
            f"{path}: not a fold list; expected a list with, for each fold, test: [...] and, if you like, dev: [...] "
            "and train: [...], of speakers or of utterances"
        )
    given = [{split: [str(name) for name in fold[split]] for split in SPLITS if split in fold} for fold in listed]
    ids, speakers = table["id"].to_pylist(), table["speaker"].to_pylist()
    names = {name for fold in given for members in fold.values() for name in members}
    by_speaker = names <= set(speakers)
    by_utterance = names <= set(ids)
    if not by_speaker and not by_utterance:
        odd = sorted(names - set(speakers) - set(ids)) or sorted(names - set(ids))
        raise ProtocolError(
            f"{path}: its {len(names)} names must be all speakers or all utterances of these data, and not all are: "
            f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}"
        )
    if protocol.dev_speakers != "auto" and all("dev" in fold for fold in given):
        raise ProtocolError(f"protocol.dev_speakers has no effect: {path} says who is dev in every fold")
    row_of = {utterance: row for row, utterance in enumerate(ids)}
    order = list(dict.fromkeys(name for fold in given for name in fold["test"]))
    folds = []
    for index, fold in enumerate(given):
        if "dev" not in fold:
            if not by_speaker:
                raise ProtocolError(f"{path}: fold {index} lists utterances and so must say which are dev")
            everyone = [*order, *sorted(set(speakers) - set(order))]
            if "train" in fold:  # dev speakers are taken out of it
                everyone = [name for name in everyone if name in {*fold["train"], *fold["test"]}]
            dev, rest = _held_back(protocol, str(path), index, fold["test"], everyone, None)
            fold = {**fold, "train": rest, "dev": dev}
        if "train" not in fold:
            taken = {*fold["test"], *fold["dev"]}
            fold["train"] = [name for name in (sorted(set(speakers)) if by_speaker else ids) if name not in taken]
        if by_speaker:
            folds.append(_fold(index, speakers, fold))
            continue
        rows = {split: np.array(sorted({row_of[name] for name in fold[split]}), np.int64) for split in SPLITS}
        told = {split: tuple(sorted({speakers[row] for row in rows[split]})) for split in SPLITS}
        folds.append(Fold(index, rows, told))
    return Folds(path.stem, tuple(folds))


def _is_fold(value: Any) -> bool:  # whatever a file holds
    """Whether a value of a YAML file is one fold."""
    return (
        isinstance(value, Mapping)
        and {"test"} <= set(value) <= set(SPLITS)
        and all(isinstance(members, list) and members for members in value.values())
    )
