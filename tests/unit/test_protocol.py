"""Folds: who is where, that every planted leak is found and named, and what a fold file may say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from sermll.config import Protocol
from sermll.corpora import CORPORA
from sermll.errors import ProtocolError
from sermll.protocol import SPLITS, Fold, check_classes, check_dev, find_leaks, make_folds

ACTORS = [f"{actor:02d}" for actor in range(1, 25)]


def table_of(speakers: list[str], **columns: list[Any]) -> pa.Table:
    size = len(speakers)
    defaults = {
        "id": [f"u{row}" for row in range(size)],
        "corpus": ["mine"] * size,
        "session": [None] * size,
        "fold": [None] * size,
        "audio_sha256": [str(row) for row in range(size)],
    }
    return pa.table({"speaker": speakers, **defaults, **columns})


TABLE = table_of(["a", "a", "b", "b", "c", "d"])


def folds_of(table: pa.Table = TABLE, **settings: Any) -> list[Fold]:
    return list(make_folds(Protocol(**settings), table, {}, "speaker").folds)


def who(fold: Fold) -> tuple[tuple[str, ...], ...]:
    return fold.speakers["test"], fold.speakers["dev"], fold.speakers["train"]


def written(path: Path, folds: Any) -> str:
    path.write_text(yaml.safe_dump(folds))
    return str(path)


def test_leave_one_speaker_out_by_hand() -> None:
    assert [who(fold) for fold in folds_of(folds="speaker", dev_speakers=1)] == [
        (("a",), ("b",), ("c", "d")),
        (("b",), ("c",), ("a", "d")),
        (("c",), ("d",), ("a", "b")),
        (("d",), ("a",), ("b", "c")),
    ]


def test_rows_of_a_fold_cover_every_utterance_once() -> None:
    rows = folds_of(folds="speaker")[1].rows
    assert {split: rows[split].tolist() for split in SPLITS} == {"train": [0, 1, 5], "dev": [4], "test": [2, 3]}


@pytest.mark.parametrize("column", ["session", "fold"])
def test_groups_are_held_out_whole(column: str) -> None:
    table = table_of(["1F", "1M", "2F", "2M", "3F", "3M"], **{column: ["1", "1", "2", "2", "3", "3"]})
    folds = folds_of(table, folds=column, dev_speakers=2)
    assert [(fold.speakers["test"], fold.speakers["dev"]) for fold in folds] == [
        (("1F", "1M"), ("2F", "2M")),
        (("2F", "2M"), ("3F", "3M")),
        (("3F", "3M"), ("1F", "1M")),
    ]


def test_the_next_session_is_dev_unless_told_otherwise() -> None:
    table = table_of(["1F", "1M", "2F", "2M", "3F", "3M"], session=["1", "1", "2", "2", "3", "3"])
    assert [fold.speakers["dev"] for fold in folds_of(table, folds="session")] == [
        ("2F", "2M"),
        ("3F", "3M"),
        ("1F", "1M"),
    ]
    uneven = table_of(["1F", "1M", "2F", "3F", "3M", "3N"], session=["1", "1", "2", "3", "3", "3"])
    assert [fold.speakers["dev"] for fold in folds_of(uneven, folds="session")] == [
        ("2F",),
        ("3F", "3M", "3N"),
        ("1F", "1M"),
    ]


@pytest.mark.parametrize("name", ["hicmae", "emobox"])
@pytest.mark.parametrize("dev_speakers", ["auto", 4, 7])
def test_ravdess_folds_are_disjoint_and_complete(name: str, dev_speakers: int | str) -> None:
    protocol = Protocol.model_validate({"folds": name, "dev_speakers": dev_speakers})
    table = table_of(ACTORS)
    folds = make_folds(protocol, table, CORPORA["ravdess"].folds, "hicmae").folds
    assert len(folds) == 6
    assert sorted(speaker for fold in folds for speaker in fold.speakers["test"]) == ACTORS
    for fold in folds:
        sides = [set(fold.speakers[split]) for split in SPLITS]
        assert sorted(set.union(*sides)) == ACTORS and sum(map(len, sides)) == 24
        assert len(fold.speakers["dev"]) == (2 if dev_speakers == "auto" else dev_speakers)
        assert find_leaks(fold, table) == []


def test_the_default_is_the_corpus_own() -> None:
    folds = make_folds(Protocol(), table_of(ACTORS), CORPORA["ravdess"].folds, "hicmae")
    assert folds.name == "hicmae" and folds.folds[5].speakers["test"] == ("21", "22", "23", "24")
    assert make_folds(Protocol(), TABLE, {}, "speaker").name == "speaker"


def test_the_hash_tells_divisions_and_rules_apart(tmp_path: Path) -> None:
    one, two = (make_folds(Protocol(folds="speaker", dev_speakers=n), TABLE, {}, "speaker") for n in (1, 2))
    assert one.hash({}) != two.hash({})
    assert one.hash({"select": "last"}) != one.hash({"select": "dev_ua"})
    assert one.hash({"select": "last", "dev": 1}) == one.hash({"dev": 1, "select": "last"})
    listed = [{split: list(fold.speakers[split]) for split in SPLITS} for fold in one.folds]
    same = make_folds(Protocol(folds=written(tmp_path / "mine.yaml", listed)), TABLE, {}, "speaker")
    assert same.name == "mine" and same.hash({}) == one.hash({})  # a name decides nothing


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
        make_folds(Protocol(folds="mine"), TABLE, {"mine": groups}, "mine")


def test_unknown_lists_and_missing_sessions_are_refused() -> None:
    lists = {"part": [["a"]], "all": [["a"], ["b", "c"], ["d"]]}
    with pytest.raises(ProtocolError, match="no such fold list; fold lists that fit these data: all, speaker; or give"):
        make_folds(Protocol(folds="kfold"), TABLE, lists, "part")
    with pytest.raises(ProtocolError, match="'session': not every utterance"):
        folds_of(folds="session")
    with pytest.raises(ProtocolError, match="2 speakers are too few"):
        folds_of(table_of(["a", "b"]), folds="speaker")


def test_a_file_of_speakers(tmp_path: Path) -> None:
    listed = [{"test": ["a"], "dev": ["b"]}, {"test": ["b"], "train": ["a", "c"]}, {"test": ["c"], "dev": ["d"]}]
    path = written(tmp_path / "mine.yaml", listed)
    assert [who(fold) for fold in folds_of(folds=path)] == [
        (("a",), ("b",), ("c", "d")),
        (("b",), ("c",), ("a",)),  # dev is the next one of those it may train on
        (("c",), ("d",), ("a", "b")),
    ]


def test_a_file_of_utterances(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"folds": [{"test": ["u5"], "dev": ["u4"], "train": ["u0", "u2"]}]}))
    (fold,) = folds_of(folds=str(path))
    assert {split: fold.rows[split].tolist() for split in SPLITS} == {"train": [0, 2], "dev": [4], "test": [5]}
    assert who(fold) == (("d",), ("c",), ("a", "b"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "cannot be read as YAML"),
        ("", "not a fold list"),
        ("- {dev: [a]}", "not a fold list"),
        ("- {test: []}", "not a fold list"),
        ("- {test: [a], val: [b]}", "not a fold list"),
        ("- {test: [a, nobody]}", "must be all speakers or all utterances of these data, and not all are: nobody$"),
        ("- {test: [u0]}", "must say which are dev"),
    ],
)
def test_files_that_are_no_fold_lists_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "folds.yaml"
    path.write_text(content)
    with pytest.raises(ProtocolError, match=words):
        folds_of(folds=str(path))


def test_a_missing_file_and_a_setting_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="no such file"):
        folds_of(folds="nowhere.yaml")
    path = written(tmp_path / "mine.yaml", [{"test": ["a"], "dev": ["b"]}])
    with pytest.raises(ProtocolError, match="dev_speakers has no effect"):
        folds_of(folds=path, dev_speakers=1)


def found(tmp_path: Path, table: pa.Table, listed: list[dict[str, list[str]]]) -> set[tuple[int, str, tuple[str, str]]]:
    folds = folds_of(table, folds=written(tmp_path / "leaky.yaml", listed))
    return {(leak.fold, leak.kind, leak.sides) for fold in folds for leak in find_leaks(fold, table)}


def test_dev_that_is_the_test_fold_is_found(tmp_path: Path) -> None:
    listed = [{"test": [name], "dev": [name]} for name in "abcd"]
    leaks = found(tmp_path, TABLE, listed)
    for fold in range(4):
        assert {(fold, "same split", ("dev", "test")), (fold, "speaker", ("dev", "test"))} <= leaks
    assert not any("train" in sides for _, _, sides in leaks)


def test_a_random_split_of_utterances_shares_every_speaker(tmp_path: Path) -> None:
    table = table_of([actor for actor in ACTORS for _ in range(20)])
    ids = np.random.default_rng(0).permutation(table["id"].to_pylist()).tolist()
    path = written(tmp_path / "random.yaml", [{"test": ids[:96], "dev": ids[96:192], "train": ids[192:]}])
    leaks = find_leaks(folds_of(table, folds=path)[0], table)
    assert {(leak.kind, leak.sides) for leak in leaks} == {
        ("speaker", sides) for sides in (("train", "dev"), ("train", "test"), ("dev", "test"))
    }
    assert len(leaks[1].members) == 24 and "train and test share 24 speakers (01, 02, 03, 04, 05, ...)" in str(leaks[1])


def test_utterances_of_two_sides_are_found(tmp_path: Path) -> None:
    leaks = found(tmp_path, TABLE, [{"test": ["u5"], "dev": ["u4"], "train": ["u0", "u5"]}])
    assert leaks == {(0, "utterance", ("train", "test")), (0, "speaker", ("train", "test"))}


def test_one_recording_under_two_names_is_found() -> None:
    copies = table_of(["a", "a", "b", "b", "c", "d"], audio_sha256=["1", "1", "2", "2", "3", "1"])
    leaks = [leak for fold in folds_of(copies, folds="speaker") for leak in find_leaks(fold, copies)]
    assert {(leak.fold, leak.kind, leak.sides) for leak in leaks} == {
        (0, "audio", ("train", "test")),
        (2, "audio", ("train", "dev")),
        (3, "audio", ("dev", "test")),
    }
    assert "(u5 = u0, u5 = u1)" in str(next(leak for leak in leaks if leak.fold == 0))


def test_unlearnable_folds_are_refused() -> None:
    fold = folds_of(folds="speaker", dev_speakers=1)[0]
    check_classes(fold, np.array([0, 1, 0, 1, 0, 1]), ["x", "y"])
    with pytest.raises(ProtocolError, match="every training utterance is 'x'"):
        check_classes(fold, np.array([0, 1, 0, 1, 0, 0]), ["x", "y"])
    with pytest.raises(ProtocolError, match="no training utterance of z"):
        check_classes(fold, np.array([2, 1, 0, 1, 0, 1]), ["x", "y", "z"])
    dropped = fold.keep(np.array([True, True, False, False, True, True]))
    assert dropped.rows["dev"].tolist() == [] and dropped.rows["train"].tolist() == [4, 5]
    with pytest.raises(ProtocolError, match="no utterance for dev"):
        check_classes(dropped, np.zeros(6, np.int64), ["x", "y"])


def test_a_dev_split_of_one_class_chooses_no_epoch() -> None:
    fold = folds_of(folds="speaker", dev_speakers=1)[0]
    assert fold.rows["dev"].tolist() == [2, 3] and fold.speakers["dev"] == ("b",)
    check_dev(fold, np.array([0, 0, 0, 1, 1, 0]), ["x", "y"], "do this")
    with pytest.raises(ProtocolError, match=r"fold 0: every dev utterance is 'y' \(speakers b\).*; do this"):
        check_dev(fold, np.array([0, 1, 1, 1, 1, 0]), ["x", "y"], "do this")


def joined(corpora: dict[str, list[str]], **columns: list[Any]) -> pa.Table:
    """Two utterances of each speaker of each corpus, in the order given."""
    pairs = [(corpus, f"{corpus}/{name}") for corpus, names in corpora.items() for name in names for _ in range(2)]
    return table_of([speaker for _, speaker in pairs], corpus=[corpus for corpus, _ in pairs], **columns)


THREE = joined({"z": ACTORS, "a": [str(number) for number in range(10)], "m": ["p", "q"]})


def test_one_corpus_is_left_out_by_hand() -> None:
    table = joined({"b": ["x", "y"], "a": ["x", "y", "z"]})
    assert [who(fold) for fold in folds_of(table, folds="corpus")] == [
        (("b/x", "b/y"), ("a/x",), ("a/y", "a/z")),
        (("a/x", "a/y", "a/z"), ("b/x",), ("b/y",)),
    ]
    first = folds_of(table, folds="corpus")[0].rows
    assert {split: first[split].tolist() for split in SPLITS} == {
        "train": [6, 7, 8, 9],
        "dev": [4, 5],
        "test": [0, 1, 2, 3],
    }
    # Of two corpora, to train on one is to leave the other out, in the other order.
    assert [who(fold) for fold in folds_of(table, folds="one_corpus")] == [
        who(fold) for fold in folds_of(table, folds="corpus")[::-1]
    ]


@pytest.mark.parametrize("name", ["corpus", "one_corpus"])
@pytest.mark.parametrize("dev_speakers", ["auto", 1])
def test_folds_of_whole_corpora_against_sets(name: str, dev_speakers: int | str) -> None:
    column = {split: np.array(THREE["corpus"].to_pylist()) for split in SPLITS}
    protocol = Protocol.model_validate({"folds": name, "dev_speakers": dev_speakers})
    folds = make_folds(protocol, THREE, {}, "default").folds
    assert len(folds) == 3
    for fold, corpus in zip(folds, "zam", strict=True):
        others = {"z", "a", "m"} - {corpus}
        trained, tested = (others, {corpus}) if name == "corpus" else ({corpus}, others)
        sides = {split: set(column[split][fold.rows[split]].tolist()) for split in SPLITS}
        assert sides == {"train": trained, "dev": trained, "test": tested}
        speakers = {split: [one.split("/") for one in fold.speakers[split]] for split in SPLITS}
        for one in trained:
            size = sum(owner == one for owner, _ in speakers["dev"])
            assert size == ({"z": 2, "a": 1, "m": 1}[one] if dev_speakers == "auto" else 1)
        assert sorted(np.concatenate([fold.rows[split] for split in SPLITS]).tolist()) == list(range(len(THREE)))
        assert find_leaks(fold, THREE) == []


@pytest.mark.parametrize(
    ("size", "asked", "count"),
    [(91, "auto", 9), (24, "auto", 2), (14, "auto", 1), (2, "auto", 1), (24, 7, 7), (10, 9, 9)],
)
def test_dev_speakers_are_spread_over_a_training_corpus(size: int, asked: int | str, count: int) -> None:
    names = [f"{number:03d}" for number in range(size)]
    table = joined({"one": names[::-1], "two": [f"{number:02d}" for number in range(100)]})
    protocol = Protocol.model_validate({"folds": "corpus", "dev_speakers": asked})
    dev = make_folds(protocol, table, {}, "default").folds[1].speakers["dev"]
    places = [names.index(speaker.removeprefix("one/")) for speaker in dev]
    assert len(set(places)) == count and places[0] == 0
    if count > 1:
        gaps = np.diff(places)
        assert places[-1] == size - 1 and gaps.max() - gaps.min() <= 1 <= gaps.min()


def test_dev_actors_of_ravdess_are_a_man_and_a_woman() -> None:
    assert folds_of(joined({"ravdess": ACTORS, "other": ["x", "y"]}), folds="one_corpus")[0].speakers["dev"] == (
        "ravdess/01",
        "ravdess/24",
    )


@pytest.mark.parametrize("name", ["corpus", "one_corpus"])
def test_a_training_corpus_keeps_a_speaker_to_train_on(name: str) -> None:
    with pytest.raises(ProtocolError, match="trains on m, which has 2 speakers; 2 dev speakers leave nobody of it"):
        folds_of(THREE, folds=name, dev_speakers=2)
    with pytest.raises(ProtocolError, match="trains on b, which has 1 speakers; 1 dev speakers leave nobody"):
        folds_of(joined({"a": ["x", "y"], "b": ["x"]}), folds=name)


@pytest.mark.parametrize("name", ["corpus", "one_corpus"])
def test_one_corpus_alone_has_no_folds_of_corpora(name: str) -> None:
    with pytest.raises(
        ProtocolError, match=f"protocol.folds={name}: divides joined corpora, and these data are mine alone"
    ):
        folds_of(folds=name)


def test_joined_corpora_have_no_fold_lists_of_their_own() -> None:
    few = joined({"a": ["x"], "b": ["y", "z"]})  # a speaker alone is not enough to train on and to choose by
    for name, table, fit in (("default", THREE, "corpus, one_corpus, speaker"), ("hicmae", few, "speaker")):
        with pytest.raises(
            ProtocolError, match=f"folds={name}: no such fold list; fold lists that fit these data: {fit};"
        ):
            make_folds(Protocol(folds=name), table, {}, "default")
    with pytest.raises(ProtocolError, match="not every utterance of these data tells one"):
        folds_of(joined({"a": ["x"], "b": ["y", "z"]}, session=["a/1", "a/1", *[None] * 4]), folds="session")


def test_speakers_of_joined_corpora_are_left_out_one_by_one() -> None:
    folds = folds_of(THREE, folds="speaker")
    assert [fold.speakers["test"] for fold in folds] == [(name,) for name in sorted(set(THREE["speaker"].to_pylist()))]
    for fold in folds:
        assert sorted(np.concatenate([fold.rows[split] for split in SPLITS]).tolist()) == list(range(len(THREE)))
        assert find_leaks(fold, THREE) == []


def test_one_recording_in_two_corpora_is_found() -> None:
    table = joined({"b": ["x", "y"], "a": ["x", "y", "z"]}, audio_sha256=list("0123456783"))
    leaks = [leak for fold in folds_of(table, folds="corpus") for leak in find_leaks(fold, table)]
    assert [(leak.fold, leak.kind, leak.sides, leak.members) for leak in leaks] == [
        (0, "audio", ("train", "test"), ("u9 = u3",)),
        (1, "audio", ("train", "test"), ("u3 = u9",)),
    ]
