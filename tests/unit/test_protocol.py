"""Folds: who is where, and that an overlap is refused by name."""

import numpy as np
import pytest

from sermll.config import Protocol
from sermll.corpora import CORPORA
from sermll.errors import ProtocolError
from sermll.protocol import Fold, check_classes, check_overlap, make_folds

SPEAKERS = ["a", "a", "b", "b", "c", "d"]
NO_SESSIONS = [None] * 6


def test_leave_one_speaker_out_by_hand() -> None:
    folds = make_folds(Protocol(folds="speaker", dev_speakers=1), {}, SPEAKERS, NO_SESSIONS).folds
    assert [(fold.test, fold.dev, fold.train) for fold in folds] == [
        (("a",), ("b",), ("c", "d")),
        (("b",), ("c",), ("a", "d")),
        (("c",), ("d",), ("a", "b")),
        (("d",), ("a",), ("b", "c")),
    ]


def test_rows_of_a_fold_cover_every_utterance_once() -> None:
    fold = make_folds(Protocol(folds="speaker"), {}, SPEAKERS, NO_SESSIONS).folds[1]
    rows = fold.rows(SPEAKERS)
    assert {split: values.tolist() for split, values in rows.items()} == {
        "train": [0, 1, 5],
        "dev": [4],
        "test": [2, 3],
    }


def test_sessions_are_held_out_whole_and_the_next_one_is_dev() -> None:
    speakers, sessions = ["1F", "1M", "2F", "2M", "3F", "3M"], ["1", "1", "2", "2", "3", "3"]
    folds = make_folds(Protocol(folds="session"), {}, speakers, sessions).folds
    assert [(fold.test, fold.dev) for fold in folds] == [
        (("1F", "1M"), ("2F", "2M")),
        (("2F", "2M"), ("3F", "3M")),
        (("3F", "3M"), ("1F", "1M")),
    ]


@pytest.mark.parametrize("name", ["hicmae", "emobox"])
@pytest.mark.parametrize("dev_speakers", ["auto", 4, 7])
def test_ravdess_folds_are_disjoint_and_complete(name: str, dev_speakers: int | str) -> None:
    actors = [f"{actor:02d}" for actor in range(1, 25)]
    protocol = Protocol.model_validate({"folds": name, "dev_speakers": dev_speakers})
    folds = make_folds(protocol, CORPORA["ravdess"].folds, actors, [None] * 24).folds
    assert len(folds) == 6
    assert sorted(speaker for fold in folds for speaker in fold.test) == actors
    for fold in folds:
        sides = [set(fold.test), set(fold.dev), set(fold.train)]
        assert sorted(set.union(*sides)) == actors and sum(map(len, sides)) == 24
        assert len(fold.dev) == (2 if dev_speakers == "auto" else dev_speakers)


def test_the_default_is_the_corpus_own_first_list() -> None:
    actors = [f"{actor:02d}" for actor in range(1, 25)]
    folds = make_folds(Protocol(), CORPORA["ravdess"].folds, actors, [None] * 24)
    assert folds.name == "hicmae" and folds.folds[5].test == ("21", "22", "23", "24")
    assert make_folds(Protocol(), {}, SPEAKERS, NO_SESSIONS).name == "speaker"


def test_the_hash_tells_divisions_apart() -> None:
    one, two = (make_folds(Protocol(folds="speaker", dev_speakers=n), {}, SPEAKERS, NO_SESSIONS) for n in (1, 2))
    assert one.hash != two.hash
    assert one.hash == make_folds(Protocol(folds="speaker", dev_speakers=1), {}, SPEAKERS[::-1], NO_SESSIONS).hash


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([["a", "b"], ["b", "c", "d"]], "b are tested in two folds"),
        ([["a", "b"], ["c"]], "does not place the speakers d"),
        ([["a", "b"], ["c", "d", "e"]], "expects the speakers e"),
        ([["a", "b", "c"], ["d"]], "leave nobody to train on"),
    ],
)
def test_impossible_lists_are_refused(groups: list[list[str]], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        make_folds(Protocol(folds="mine"), {"mine": groups}, SPEAKERS, NO_SESSIONS)


def test_unknown_lists_and_missing_sessions_are_refused() -> None:
    with pytest.raises(ProtocolError, match="this corpus has: hicmae, speaker, session"):
        make_folds(Protocol(folds="kfold"), {"hicmae": [["a"]]}, SPEAKERS, NO_SESSIONS)
    with pytest.raises(ProtocolError, match="tells no sessions"):
        make_folds(Protocol(folds="session"), {}, SPEAKERS, NO_SESSIONS)
    with pytest.raises(ProtocolError, match="2 speakers are too few"):
        make_folds(Protocol(folds="speaker"), {}, ["a", "b"], [None, None])


def test_a_shared_speaker_is_refused_by_name() -> None:
    ids, audio = list("uvwxyz"), list("123456")
    with pytest.raises(ProtocolError, match="train and test share the speakers a"):
        check_overlap(Fold(0, ("a",), ("b",), ("a", "c")), SPEAKERS, ids, audio)
    with pytest.raises(ProtocolError, match="dev and test share the speakers b"):
        check_overlap(Fold(0, ("b",), ("b",), ("c",)), SPEAKERS, ids, audio)


def test_a_shared_recording_is_refused_by_name() -> None:
    fold = Fold(0, ("a",), ("b",), ("c", "d"))
    check_overlap(fold, SPEAKERS, list("uvwxyz"), ["1", "1", "2", "2", "3", "4"])  # copies within a side are allowed
    with pytest.raises(ProtocolError, match=r"stand in train and in test \(y = v\)"):
        check_overlap(fold, SPEAKERS, list("uvwxyz"), ["1", "2", "3", "4", "2", "5"])


def test_unlearnable_folds_are_refused() -> None:
    fold = Fold(0, ("a",), ("b",), ("c", "d"))
    rows = fold.rows(SPEAKERS)
    check_classes(fold, np.array([0, 1, 0, 1, 0, 1]), ["x", "y"], rows)
    with pytest.raises(ProtocolError, match="every training utterance is 'x'"):
        check_classes(fold, np.array([0, 1, 0, 1, 0, 0]), ["x", "y"], rows)
    with pytest.raises(ProtocolError, match="no training utterance of z"):
        check_classes(fold, np.array([2, 1, 0, 1, 0, 1]), ["x", "y", "z"], rows)
    with pytest.raises(ProtocolError, match="no utterance for dev"):
        check_classes(fold, np.zeros(6, np.int64), ["x", "y"], rows | {"dev": np.zeros(0, np.int64)})
