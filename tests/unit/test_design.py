"""The design of an experiment: labels and folds meet, leaks are refused or marked, and the hash covers all of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sermll.config import Data, Protocol
from sermll.design import Design
from sermll.errors import ConfigError, ProtocolError


def design_of(path: Path, data: dict[str, Any] | None = None, **protocol: Any) -> Design:
    return Design.of(Data.model_validate({"path": str(path), **(data or {})}), Protocol.model_validate(protocol))


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


def test_soft_targets_need_votes(tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match="tell no annotators' votes"):
        design_of(tiny_data, {"targets": "soft"})


def test_rows_of_a_design_cover_the_corpus(tiny_data: Path) -> None:
    for fold in design_of(tiny_data).folds.folds:
        rows = np.concatenate([fold.rows[split] for split in ("train", "dev", "test")])
        assert sorted(rows.tolist()) == list(range(140))
