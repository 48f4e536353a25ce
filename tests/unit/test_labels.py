"""Label spaces and soft labels: by hand, and against a slow count."""

from collections import Counter

import numpy as np
import pytest

from sermll.corpora import CORPORA
from sermll.errors import ConfigError
from sermll.labels import FOUR, SAME, apply_labels, describe, label_space

RAVDESS = CORPORA["ravdess"].classes
EMODB = CORPORA["emodb"].classes
IEMOCAP = ("ang", "hap", "exc", "neu", "sad", "fru", "fea", "sur", "dis")
KNOWN = {"ravdess": RAVDESS, "emodb": EMODB, "iemocap": IEMOCAP}


def test_native_is_the_corpus_itself() -> None:
    space = label_space("native", EMODB)
    assert space.classes == EMODB
    assert space.class_of == {name: index for index, name in enumerate(EMODB)}


def test_four_classes_count_excited_as_happy() -> None:
    space = label_space("4class", IEMOCAP, ("oth", "xxx"))
    assert space.members == {"angry": ("ang",), "happy": ("hap", "exc"), "neutral": ("neu",), "sad": ("sad",)}
    assert label_space("4class", EMODB).members["happy"] == ("happiness",)


def test_shared_spaces_have_one_order_whichever_corpus_they_are_for() -> None:
    setting = "shared:ravdess+emodb"
    one, two = label_space(setting, RAVDESS, known=KNOWN), label_space(setting, EMODB, known=KNOWN)
    assert one.classes == two.classes == ("angry", "happy", "neutral", "sad", "fearful", "disgusted")
    assert one.members["disgusted"] == ("disgust",) and two.members["angry"] == ("anger",)
    assert label_space("shared:iemocap+emodb", IEMOCAP, known=KNOWN).members["happy"] == ("hap", "exc")


def test_no_word_means_two_emotions_and_every_corpus_is_understood() -> None:
    words = Counter(word for words in SAME.values() for word in words)
    assert set(words.values()) == {1}
    assert {emotion for emotions in FOUR.values() for emotion in emotions} <= set(SAME)
    for corpus in CORPORA.values():
        assert {label.lower() for label in corpus.classes} <= set(words), corpus.name
        assert len(label_space("4class", corpus.classes, corpus.other_labels).classes) == 4


def test_your_own_classes_may_take_any_label() -> None:
    space = label_space({"good": ["hap", "exc"], "bad": ["ang", "oth"]}, IEMOCAP, ("oth", "xxx"))
    assert space.classes == ("good", "bad") and space.class_of["oth"] == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("5class", "no such label space"),
        ("shared:ravdess", "two corpora or more"),
        ("shared:ravdess+emovo", "known are ravdess, emodb, iemocap"),
        ({"good": ["hap"], "bad": ["anger"]}, "no anger"),
        ({"good": ["hap"], "bad": ["hap", "ang"]}, "hap stands in two classes"),
        ({"good": ["hap"]}, "two classes or more"),
        ({"good": ["hap"], "bad": []}, "each with a label"),
    ],
)
def test_impossible_spaces_are_refused(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        label_space(setting, IEMOCAP, ("oth", "xxx"), KNOWN)


def test_a_corpus_without_one_of_the_four_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing in joy, anger is neutral"):
        label_space("4class", ("joy", "anger"))
    with pytest.raises(ConfigError, match="these data have joy, anger"):
        label_space("shared:ravdess+emodb", ("joy", "anger"), known=KNOWN)


def test_hard_labels_are_one_hot_and_what_is_dropped_is_counted() -> None:
    space = label_space("4class", IEMOCAP)
    done = apply_labels(space, ["exc", "xxx", "sad", "fru", "fru"], [None] * 5, "hard")
    assert done.labels.tolist() == [1, -1, 3, -1, -1]
    np.testing.assert_array_equal(done.targets, [[0, 1, 0, 0], [0] * 4, [0, 0, 0, 1], [0] * 4, [0] * 4])
    assert done.dropped == {"xxx": 1, "fru": 2} and done.ties == 0
    assert done.kept.tolist() == [True, False, True, False, False]


def test_soft_labels_by_hand() -> None:
    space = label_space("4class", IEMOCAP)
    votes = [
        (("exc", 1.0), ("fru", 1.0), ("hap", 1.0), ("neu", 1.0)),  # excited and happy are one class; frustrated none
        (("ang", 1.0), ("neu", 1.0)),  # a tie, which the corpus's label breaks
        (("ang", 1.0), ("neu", 1.0)),  # a tie without the corpus's label: the first class
        (("fru", 2.0),),  # no vote for any class: hard
        None,
        (("ang", 3.0),),  # dropped whatever was voted
        (("neu", 2.0), ("sad", 1.0)),  # listeners against the corpus's label
    ]
    done = apply_labels(space, ["hap", "neu", "sad", "sad", "ang", "xxx", "sad"], votes, "soft")
    third = 1 / 3
    expected = [
        [0, 2 * third, third, 0],
        [0.5, 0, 0.5, 0],
        [0.5, 0, 0.5, 0],
        [0, 0, 0, 1],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 2 * third, third],
    ]
    np.testing.assert_allclose(done.targets, expected, rtol=1e-6)
    assert done.labels.tolist() == [1, 2, 0, 3, 0, -1, 2]
    assert done.ties == 2 and done.dropped == {"xxx": 1}


def test_soft_labels_against_a_slow_count() -> None:
    rng = np.random.default_rng(0)
    space = label_space("4class", IEMOCAP)
    labels = rng.choice(IEMOCAP, 200).tolist()
    votes = [
        tuple(sorted((str(name), float(rng.integers(1, 4))) for name in rng.choice(IEMOCAP, 3, replace=False)))
        for _ in labels
    ]
    done = apply_labels(space, labels, votes, "soft")
    for row, label in enumerate(labels):
        counted = {name: sum(n for word, n in votes[row] if word in members) for name, members in space.members.items()}
        total = sum(counted.values())
        if label not in space.class_of:
            assert not done.targets[row].any()
        elif total:
            np.testing.assert_allclose(done.targets[row], [n / total for n in counted.values()], rtol=1e-6)
            assert counted[space.classes[done.labels[row]]] == max(counted.values())


def test_soft_targets_without_votes_are_refused() -> None:
    with pytest.raises(ConfigError, match="tell no annotators' votes"):
        apply_labels(label_space("native", EMODB), ["anger"], [None], "soft")


def union(*names: str) -> list[str]:
    return list(dict.fromkeys(label for name in names for label in KNOWN[name]))


@pytest.mark.parametrize(
    "names", [("ravdess", "emodb"), ("emodb", "ravdess"), ("iemocap", "emodb"), ("ravdess", "emodb", "iemocap")]
)
def test_what_joined_corpora_share(names: tuple[str, ...]) -> None:
    space = label_space("shared", union(*names), known=KNOWN, corpora=names)
    meaning = {word: emotion for emotion, words in SAME.items() for word in words} | {"exc": "happy"}
    emotions = [{meaning[label] for label in KNOWN[name]} for name in names]
    assert set(space.classes) == set.intersection(*emotions)
    for emotion, labels in space.members.items():
        assert set(labels) == {label for name in names for label in KNOWN[name] if meaning[label] == emotion}
    assert space == label_space(f"shared:{'+'.join(names)}", union(*names), known=KNOWN)


def test_one_emotion_under_two_names_is_one_class() -> None:
    labels, corpus = (
        ["angry", "anger", "calm", "happiness", "happy"],
        ["ravdess", "emodb", "ravdess", "emodb", "ravdess"],
    )
    for setting in (
        "shared",
        "shared:ravdess+emodb",
        "4class",
        {"hot": ["anger", "angry"], "glad": ["happiness", "happy"]},
    ):
        space = label_space(setting, union("ravdess", "emodb"), known=KNOWN, corpora=("ravdess", "emodb"))
        done = apply_labels(space, labels, [None] * 5, "hard")
        assert done.labels.tolist() == [0, 0, -1, 1, 1], setting
        told = describe(done, corpus)
        first, second = space.classes[:2]
        assert (told["counts"][first], told["counts"][second]) == (2, 2) and told["dropped"] == {"calm": 1}
        by_corpus = {
            name: {key: n for key, n in counts.items() if n} for name, counts in told["counts_by_corpus"].items()
        }
        assert by_corpus == {"ravdess": {first: 1, second: 1}, "emodb": {first: 1, second: 1}}
        assert all(list(counts) == list(space.classes) for counts in told["counts_by_corpus"].values())


def test_one_corpus_is_counted_once() -> None:
    done = apply_labels(label_space("native", EMODB), ["anger", "fear"], [None] * 2, "hard")
    assert "counts_by_corpus" not in describe(done, ["emodb", "emodb"])


def test_corpora_of_your_own_share_too_whatever_their_names() -> None:
    known = {"at+home": ("Joy", "Anger", "shy"), "away": ("happy", "angry")}
    space = label_space("shared", ("Joy", "Anger", "shy", "happy", "angry"), known=known, corpora=tuple(known))
    assert space.members == {"angry": ("Anger", "angry"), "happy": ("Joy", "happy")}


def test_spaces_of_one_corpus_for_several_and_the_other_way_round_are_refused() -> None:
    for setting in ("native", "default"):
        with pytest.raises(
            ConfigError, match=rf"data\.labels={setting}: ravdess, emodb have .* give data\.labels=shared"
        ):
            label_space(setting, union("ravdess", "emodb"), known=KNOWN, corpora=("ravdess", "emodb"))
    for corpora in ((), ("emodb",)):
        with pytest.raises(ConfigError, match=r"shared: has no effect on one corpus; give data\.path two folders"):
            label_space("shared", EMODB, known=KNOWN, corpora=corpora)
    known = {"one": ("joy", "anger"), "two": ("joy", "fear")}
    with pytest.raises(ConfigError, match=r"shared:one\+two: happy is all these corpora share"):
        label_space("shared", ("joy", "anger", "fear"), known=known, corpora=("one", "two"))
