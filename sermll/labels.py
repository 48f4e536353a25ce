"""Label spaces: which of a corpus's labels a run tells apart, under what names, in what order; and soft labels.

Every map between labels stands here. Words that mean the same in different corpora stand in `SAME`; `FOUR` is the
field's four-class task. A label that no class takes is dropped, counted and shown.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sermll.errors import ConfigError

SAME: dict[str, tuple[str, ...]] = {
    "angry": ("angry", "anger", "ang"),
    "happy": ("happy", "happiness", "hap", "joy"),
    "neutral": ("neutral", "neutrality", "neu"),
    "sad": ("sad", "sadness"),
    "fearful": ("fearful", "fear", "fea"),
    "disgusted": ("disgusted", "disgust", "dis"),
    "surprised": ("surprised", "surprise", "sur"),
    "excited": ("excited", "excitement", "exc"),
    "calm": ("calm",),
    "bored": ("bored", "boredom"),
    "frustrated": ("frustrated", "frustration", "fru"),
}
"""For each emotion the words that corpora use for it; its order is the class order of shared label spaces."""
FOUR: dict[str, tuple[str, ...]] = {
    "angry": ("angry",),
    "happy": ("happy", "excited"),
    "neutral": ("neutral",),
    "sad": ("sad",),
}
"""The four classes of most published results; excited counts as happy, as on IEMOCAP (Tripathi et al., 2018)."""


@dataclass(frozen=True)
class LabelSpace:
    """Named classes in a fixed order, and the corpus labels that each of them takes."""

    name: str
    members: Mapping[str, tuple[str, ...]]
    """Labels of the corpus by class."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class order of model, tables and pictures."""
        return tuple(self.members)

    @property
    def class_of(self) -> dict[str, int]:
        """Class index of each label that has one."""
        return {label: index for index, labels in enumerate(self.members.values()) for label in labels}


def label_space(
    setting: str | Mapping[str, Sequence[str]],
    native: Sequence[str],
    other: Sequence[str] = (),
    known: Mapping[str, Sequence[str]] | None = None,
    corpora: Sequence[str] = (),
) -> LabelSpace:
    """The label space a setting means for a corpus, or for several that are joined.

    Args:
        setting: "native"; "4class"; "shared:A+B", what the corpora A and B both have; "shared", what all joined corpora
            have; or classes with their labels.
        native: the corpus's own classes, in order; of joined corpora those of all.
        other: the corpus's labels that are no class; only an explicit setting may take them.
        known: classes of every corpus by name, for "shared:A+B" and "shared".
        corpora: names of the corpora in the data, in order, all of them `known`; more than one are joined.

    Raises:
        ConfigError: no such space; an unknown label; a label in two classes; a class without labels; under two classes;
            a space of one corpus for several, or the other way round.
    """
    if not isinstance(setting, str):
        return _explicit(setting, [*native, *other])
    if len(corpora) > 1 and setting in ("native", "default"):
        raise ConfigError(
            f"data.labels={setting}: {', '.join(corpora)} have no label space of their own together; give "
            "data.labels=shared, what all of them have, or 4class, or classes with their labels"
        )
    if setting == "shared":
        if len(corpora) < 2:
            raise ConfigError(
                "data.labels=shared: has no effect on one corpus; give data.path two folders, or name the corpora: "
                "shared:CORPUS+CORPUS"
            )
        return _shared(corpora, native, known or {})
    if setting == "native":
        return LabelSpace(setting, {name: (name,) for name in native})
    if setting == "4class":
        space = LabelSpace(setting, {name: _labels(native, words) for name, words in FOUR.items()})
        missing = [name for name, labels in space.members.items() if not labels]
        if missing:
            raise ConfigError(f"data.labels=4class: nothing in {', '.join(native)} is {' or '.join(missing)}")
        return space
    if setting.startswith("shared:"):
        return _shared(setting.removeprefix("shared:").split("+"), native, known or {})
    raise ConfigError(
        f"data.labels={setting}: no such label space; there are native, 4class, shared, shared:CORPUS+CORPUS, and a "
        "mapping of classes to labels such as {positive: [happy, calm], negative: [angry, sad]}"
    )


def _labels(native: Sequence[str], emotions: Sequence[str]) -> tuple[str, ...]:
    """Those of a corpus's labels that mean one of some emotions, in its order."""
    words = {word for emotion in emotions for word in SAME[emotion]}
    return tuple(label for label in native if label.lower() in words)


def _shared(names: Sequence[str], native: Sequence[str], known: Mapping[str, Sequence[str]]) -> LabelSpace:
    setting = f"shared:{'+'.join(names)}"
    unknown = [name for name in names if name not in known]
    if unknown or len(names) < 2:
        raise ConfigError(
            f"data.labels={setting}: names two corpora or more, joined by +; known are {', '.join(known)}"
        )
    # Where one corpus tells excited from happy and another does not, the two are one class.
    groups = {emotion: FOUR.get(emotion, (emotion,)) for emotion in SAME if emotion != "excited"}
    both = [emotion for emotion, words in groups.items() if all(_labels(known[name], words) for name in names)]
    members = {emotion: _labels(native, groups[emotion]) for emotion in both}
    if len(both) < 2 or not all(members.values()):
        raise ConfigError(
            f"data.labels={setting}: {', '.join(both) or 'no emotion'} is all these corpora share, and these data have "
            f"{', '.join(native)}; two classes at least must be in all"
        )
    return LabelSpace(setting, members)


def _explicit(setting: Mapping[str, Sequence[str]], labels: Sequence[str]) -> LabelSpace:
    taken = Counter(label for members in setting.values() for label in members)
    unknown = [label for label in taken if label not in labels]
    if unknown:
        raise ConfigError(f"data.labels: these data have no {', '.join(unknown)}; their labels are {', '.join(labels)}")
    twice = [label for label, count in taken.items() if count > 1]
    if twice:
        raise ConfigError(f"data.labels: {', '.join(twice)} stands in two classes")
    if len(setting) < 2 or not all(setting.values()):
        raise ConfigError("data.labels: needs two classes or more, each with a label at least")
    return LabelSpace("custom", {name: tuple(members) for name, members in setting.items()})


@dataclass(frozen=True)
class Labelled:
    """A label space applied to utterances."""

    space: LabelSpace
    labels: np.ndarray
    """int64 (utterances,): class index, what metrics count; -1 for a dropped utterance."""
    targets: np.ndarray
    """float32 (utterances, classes): what losses are told in training; zeros for a dropped utterance."""
    dropped: dict[str, int]
    """Utterances without a class, by label."""
    ties: int
    """Utterances whose most frequent vote is shared by several classes; 0 with hard labels."""

    @property
    def kept(self) -> np.ndarray:
        """Bool (utterances,): those that have a class."""
        return self.labels >= 0


Votes = Sequence[tuple[str, float]]


def apply_labels(
    space: LabelSpace, labels: Sequence[str], votes: Sequence[Votes | None], kind: Literal["hard", "soft"]
) -> Labelled:
    """Give every utterance its class and its target.

    Hard targets are one-hot. Soft targets are the shares of the annotators' votes among the classes, and the label that
    metrics count is the class of most votes; of equal ones the corpus's own label, if it is among them, else the first.
    An utterance whose label has no class is dropped either way. One without votes for any class has a hard target.

    Args:
        space: the classes.
        labels: the corpus's label of each utterance.
        votes: how many annotators chose which label, None where it is not told.
        kind: "hard" or "soft".

    Raises:
        ConfigError: soft targets of data in which no utterance has votes.
    """
    class_of = space.class_of
    index = np.array([class_of.get(label, -1) for label in labels], np.int64)
    targets = np.zeros((len(labels), len(space.classes)), np.float32)
    kept = np.flatnonzero(index >= 0)
    targets[kept, index[kept]] = 1.0
    dropped = Counter(label for label in labels if label not in class_of)
    ties = 0
    if kind == "soft":
        if not any(votes):
            raise ConfigError("data.targets=soft: these data tell no annotators' votes; use data.targets=hard")
        for row in kept.tolist():
            shares = np.zeros(len(space.classes))
            for label, count in votes[row] or ():
                if label in class_of:
                    shares[class_of[label]] += count
            if shares.any():
                winners = np.flatnonzero(shares == shares.max())
                ties += len(winners) > 1
                if index[row] not in winners:
                    index[row] = winners[0]
                targets[row] = shares / shares.sum()
    return Labelled(space, index, targets, dict(dropped), ties)


def describe(labelled: Labelled, corpus: Sequence[str]) -> dict[str, Any]:
    """A label space and what became of the utterances, as JSON: part of every result.

    Args:
        labelled: the utterances' classes.
        corpus: the corpus of each utterance; if there are several, each is counted by itself too.
    """

    def counts(chosen: np.ndarray) -> dict[str, int]:
        counted = np.bincount(labelled.labels[chosen], minlength=len(labelled.space.classes))
        return dict(zip(labelled.space.classes, counted.tolist(), strict=True))

    names, column = list(dict.fromkeys(corpus)), np.array(corpus)
    by_corpus = {name: counts(labelled.kept & (column == name)) for name in names}
    return {
        "space": labelled.space.name,
        "members": {name: list(members) for name, members in labelled.space.members.items()},
        "counts": counts(labelled.kept),
        **({"counts_by_corpus": by_corpus} if len(names) > 1 else {}),
        "dropped": labelled.dropped,
        "ties": labelled.ties,
    }
