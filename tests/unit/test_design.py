"""The design of an experiment: labels and folds meet, leaks are refused or marked, and the hash covers all of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prepared import write_prepared

from sermll.config import Data, Experiment, Protocol, parse_overrides, resolve, to_yaml
from sermll.design import Design
from sermll.errors import ConfigError, DataError, ProtocolError
from sermll.search_plan import inner_design
from sermll.shards import Prepared
from sermll.train import Designs


def design_of(path: Path | list[Path], data: dict[str, Any] | None = None, **protocol: Any) -> Design:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return Design.of(Data.model_validate({"path": paths, **(data or {})}), Protocol.model_validate(protocol))


@pytest.fixture
def leaky(tmp_path: Path) -> str:
    path = tmp_path / "leaky.yaml"
    path.write_text(yaml.safe_dump([{"test": ["03", "08"], "dev": ["09"], "train": ["08", "10", "11", "12"]}]))
    return str(path)


def test_a_label_space_drops_utterances_from_every_split_and_keeps_the_folds(tiny_data: Path) -> None:
    native, four = design_of(tiny_data), design_of(tiny_data, {"labels": "4class"})
    assert four.classes == ("angry", "happy", "neutral", "sad") and len(native.classes) == 7
    assert four.labelled.dropped == {"boredom": 20, "disgust": 20, "fear": 20}
    labels = four.prepared.table["label"].to_pylist()
    for one, other in zip(native.folds.folds, four.folds.folds, strict=True):
        assert one.speakers == other.speakers
        for split, rows in other.rows.items():
            wanted = [row for row in one.rows[split].tolist() if labels[row] not in ("boredom", "disgust", "fear")]
            assert rows.tolist() == wanted
    assert four.describe()["data"]["utterances"] == 80
    assert four.describe()["data"]["counts"] == {"angry": 20, "happy": 20, "neutral": 20, "sad": 20}


def test_the_hash_covers_data_labels_folds_dev_and_selection(tiny_data: Path, tmp_path: Path) -> None:
    reference = design_of(tiny_data)
    assert design_of(tiny_data).hash == reference.hash
    assert design_of(tiny_data, {"labels": "native"}, folds="speaker").hash == reference.hash  # the defaults, said
    others = [
        design_of(tiny_data, {"labels": "4class"}),
        design_of(tiny_data, {"labels": {"high": ["anger", "fear"], "low": ["sadness", "boredom"]}}),
        design_of(tiny_data, dev_speakers=2),
        design_of(tiny_data, select="last"),
    ]
    assert len({design.hash for design in [reference, *others]}) == 5
    # Predictions of a run are read by one order of the classes.
    turned = design_of(tiny_data, {"labels": {"low": ["sadness", "boredom"], "high": ["anger", "fear"]}})
    assert turned.classes != others[1].classes and turned.hash != others[1].hash


def test_leaks_are_refused_by_name_unless_allowed_and_then_told(tiny_data: Path, leaky: str) -> None:
    design = design_of(tiny_data, folds=leaky)
    with pytest.raises(ProtocolError, match=r"(?s)'leaky' leaks:.*14 utterances stand in train and in test.*\(08\)"):
        design.check(Protocol(folds=leaky))
    design.check(Protocol(folds=leaky, allow_leak=True))
    told = design.describe()["protocol"]["leaks"]
    assert any("train and test share 1 speakers (08)" in leak for leak in told)


def test_allowing_leaks_where_there_are_none_is_refused(tiny_data: Path) -> None:
    with pytest.raises(ProtocolError, match="allow_leak has no effect"):
        design_of(tiny_data).check(Protocol(allow_leak=True))


def test_epochs_are_not_chosen_by_a_dev_speaker_of_one_class(tmp_path: Path) -> None:
    spoken = {"a": "xy", "b": "x", "c": "xy", "d": "xy", "e": "xy"}  # b says x alone, and is dev of fold 0
    rows = [
        (f"{speaker}{label}{take}", label, speaker) for speaker in spoken for label in spoken[speaker] for take in "12"
    ]
    path = write_prepared(tmp_path / "few", "few", rows)

    def opened(*words: str) -> Design:
        tree = {"name": "x", "data": {"path": str(path)}, "protocol": {"dev_speakers": 1}}
        return Designs().of(resolve(tree, parse_overrides(words)))

    for select in ("dev_ua", "dev_loss"):
        with pytest.raises(ProtocolError, match=r"fold 0: every dev utterance is 'x' \(speakers b\).*select=last"):
            opened(f"protocol.select={select}")
    assert len(opened("protocol.select=last").folds.folds) == len(opened("protocol.dev_speakers=2").folds.folds) == 5
    with pytest.raises(
        ProtocolError, match=r"inner fold 0: every dev utterance is 'x'.*other protocol.folds or test_folds"
    ):
        inner_design(opened("protocol.select=last"), [0], 2)  # which is worth its dev UA, whatever the rule
    inner_design(opened("protocol.select=last"), [1], 2)


def test_soft_targets_need_votes(tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match="tell no annotators' votes"):
        design_of(tiny_data, {"targets": "soft"})


def test_rows_of_a_design_cover_the_corpus(tiny_data: Path) -> None:
    for fold in design_of(tiny_data).folds.folds:
        rows = np.concatenate([fold.rows[split] for split in ("train", "dev", "test")])
        assert sorted(rows.tolist()) == list(range(140))


def test_the_hash_of_a_corpus_is_the_same_for_ever(tmp_path: Path) -> None:
    """Runs are named by it: a change here makes every finished run another one."""
    rows = [
        (f"{speaker}{label[0]}{take}", label, speaker)
        for speaker in "abcd"
        for label in ("anger", "joy", "neutral")
        for take in (1, 2)
    ]
    sessions = [{"a": "1", "b": "2"}.get(speaker, "3") for _, _, speaker in rows]
    halves = {"folds": {"halves": [["a", "b"], ["c", "d"]]}}
    path = write_prepared(tmp_path / "hand", "hand", rows, halves, session=sessions)
    assert Prepared.open(path).data_hash == "52d57b5666d87e4ad2b3e0c1169035258da339f2afe39843c795a7f721942a80"
    assert design_of(path).hash == "f418df4a27d6"
    assert design_of(path, {"labels": {"bad": ["anger"], "good": ["joy"]}}, folds="halves").hash == "bfc4a1ae3225"
    assert design_of(path, {"labels": {"good": ["joy"], "bad": ["anger"]}}, folds="halves").hash == "99528834d25f"
    assert design_of(path, folds="session", select="last").hash == "e764fe4cbcda"


@pytest.fixture
def pair(tmp_path: Path, tiny_data: Path) -> list[Path]:
    """Twelve utterances of three speakers, and EMO-DB's; emotions in other words."""
    rows = [(f"{speaker}{label}", label, speaker) for speaker in "xyz" for label in ("angry", "happy", "calm", "sad")]
    return [write_prepared(tmp_path / "acted", "acted", rows, {"trim_db": 25.0}), tiny_data]


def test_joined_corpora_are_divided_by_corpus(pair: list[Path]) -> None:
    design = design_of(pair, {"labels": "shared"}, folds="corpus")
    design.check(Protocol(folds="corpus"))
    assert design.classes == ("angry", "happy", "sad")
    told = design.describe()
    assert told["data"]["corpus"] == "acted+emodb" and told["data"]["utterances"] == 9 + 60
    assert told["data"]["trim_db"] == {"acted": 25.0, "emodb": None}
    assert told["data"]["counts_by_corpus"] == {
        "acted": {"angry": 3, "happy": 3, "sad": 3},
        "emodb": {"angry": 20, "happy": 20, "sad": 20},
    }
    assert told["data"]["dropped"] == {"calm": 3, "boredom": 20, "disgust": 20, "fear": 20, "neutral": 20}
    folds = told["protocol"]["folds"]
    assert [(fold["train_corpora"], fold["test_corpora"]) for fold in folds] == [
        (["emodb"], ["acted"]),
        (["acted"], ["emodb"]),
    ]
    assert folds[1]["train"] == ("acted/y", "acted/z") and folds[1]["dev"] == ("acted/x",)
    assert folds[1]["utterances"] == {"train": 6, "dev": 3, "test": 60}
    json.dumps(told)


def test_speakers_of_joined_corpora_are_trained_on_together(pair: list[Path]) -> None:
    folds = design_of(pair[::-1], {"labels": "shared"}, folds="speaker").describe()["protocol"]["folds"]
    assert len(folds) == 13
    assert all(fold["train_corpora"] == ["emodb", "acted"] and len(fold["test_corpora"]) == 1 for fold in folds)
    assert "train_corpora" not in design_of(pair[1]).describe()["protocol"]["folds"][0]


def test_the_hash_of_joined_corpora_tells_protocols_and_orders_apart(pair: list[Path], tmp_path: Path) -> None:
    shared = {"labels": "shared"}
    reference = design_of(pair, shared, folds="corpus")
    assert design_of(pair, {"labels": reference.labelled.space.members}, folds="corpus").hash == reference.hash
    third = write_prepared(tmp_path / "third", "third", [(f"{s}{w}", w, s) for s in "pq" for w in ("anger", "sad")])
    others = [
        design_of(pair, shared, folds="one_corpus"),
        design_of(pair[::-1], shared, folds="corpus"),
        design_of([*pair, third], shared, folds="corpus"),
        design_of([*pair, third], shared, folds="one_corpus"),
        design_of(pair, {"labels": {"angry": ["angry", "anger"], "sad": ["sad", "sadness"]}}, folds="corpus"),
    ]
    assert len({design.hash for design in [reference, *others]}) == 6


def test_a_recording_of_two_corpora_is_a_leak(tmp_path: Path) -> None:
    rows = [(f"{speaker}{label}", label, speaker) for speaker in "xyz" for label in ("angry", "sad")]
    audio = [np.arange(9, dtype=np.int16), *[None] * 5]
    paths = [
        write_prepared(tmp_path / "one", "one", rows, audio=audio),
        write_prepared(tmp_path / "two", "two", rows[::-1], audio=audio),
    ]
    design = design_of(paths, {"labels": "shared"}, folds="corpus")
    leak = r"1 recordings stand in train and, under another name, in test \(two/zsad = one/xangry\)"
    with pytest.raises(ProtocolError, match=rf"(?s)'corpus' leaks:.*fold 0: {leak}"):
        design.check(Protocol(folds="corpus"))


def test_a_training_corpus_without_a_class_is_refused(pair: list[Path]) -> None:
    design = design_of(pair, {"labels": "4class"}, folds="corpus")
    with pytest.raises(ProtocolError, match="fold 1: no training utterance of neutral"):
        design.check(Protocol(folds="corpus"))


def test_what_joined_corpora_do_not_have_is_refused(pair: list[Path], tiny_data: Path) -> None:
    for labels in ("default", "native"):
        with pytest.raises(ConfigError, match=f"labels={labels}: acted, emodb have no .* give data.labels=shared"):
            design_of(pair, {"labels": labels}, folds="corpus")
    for folds in ("default", "hicmae"):
        with pytest.raises(ProtocolError, match="fit these data: corpus, one_corpus, speaker"):
            design_of(pair, {"labels": "shared"}, folds=folds)
    with pytest.raises(ConfigError, match="shared: has no effect on one corpus"):
        design_of(tiny_data, {"labels": "shared"})
    with pytest.raises(ProtocolError, match="these data are emodb alone"):
        design_of([tiny_data], folds="corpus")
    with pytest.raises(DataError, match="given twice"):
        design_of([tiny_data, tiny_data], {"labels": "shared"}, folds="corpus")


def test_the_setting_takes_one_folder_or_several() -> None:
    tree = {"name": "x", "data": {"path": "data/a"}}
    assert resolve(tree, parse_overrides(["data.path=data/b"])).data.path == "data/b"
    several = resolve(tree, parse_overrides(["data.path=[data/a, data/b]"]))
    assert several.data.path == ("data/a", "data/b")
    assert Experiment.model_validate(yaml.safe_load(to_yaml(several))) == several
    for word in ("data.path=[]", "data.path=3", "data.path=[data/a, 3]"):
        with pytest.raises(ConfigError, match=r"data\.path: "):
            resolve(tree, parse_overrides([word]))
