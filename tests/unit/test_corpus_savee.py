"""SAVEE: two layouts, letters of one and two characters, sentences counted within an emotion."""

from collections import Counter
from pathlib import Path

import pytest
from protocols import fewest_dev_classes
from trees import touch, write

from sermll.corpora.savee import CORPUS, read
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

LETTERS = {"n": 30, "a": 15, "d": 15, "f": 15, "h": 15, "sa": 15, "su": 15}
LABELS = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
SPEAKERS = ("DC", "JE", "JK", "KL")


def put_all(root: Path, form: str) -> Path:
    numbered = [f"{letters}{number + 1:02d}" for letters, count in LETTERS.items() for number in range(count)]
    return touch(root, (form.format(speaker=speaker, name=name) for speaker in SPEAKERS for name in numbered))


@pytest.mark.parametrize("form", ["SAVEE/AudioData/{speaker}/{name}.wav", "ALL/{speaker}_{name}.wav"])
def test_whole_corpus_has_published_counts_in_both_layouts(tmp_path: Path, form: str) -> None:
    root = put_all(tmp_path, form)
    touch(root, ["SAVEE/AudioData/Info.txt", "SAVEE/AudioData/DC/._a01.wav"])
    rows = list(read(root))
    utterances = [row for row in rows if isinstance(row, Utterance)]
    assert len(rows) == len(utterances) == len({u.id for u in utterances}) == sum(CORPUS.counts.values()) == 480
    assert Counter(u.label for u in utterances) == CORPUS.counts
    assert Counter(u.speaker for u in utterances) == dict.fromkeys(SPEAKERS, 120)
    assert Counter(u.text for u in utterances)["su15"] == 4
    assert len({u.text for u in utterances}) == 120
    assert {u.sex for u in utterances} == {"male"}
    assert {u.id for u in utterances} >= {"DC_a01", "KL_su15", "JE_sa07", "JK_n30"}


def test_classes_and_folds() -> None:
    assert CORPUS.classes == LABELS
    assert tuple(CORPUS.counts.values()) == (120, 60, 60, 60, 60, 60, 60)
    assert (CORPUS.folds, CORPUS.default_folds) == ({}, "speaker")


@pytest.mark.parametrize(("letters", "label"), list(zip(LETTERS, LABELS, strict=True)))
def test_fields_of_a_name(tmp_path: Path, letters: str, label: str) -> None:
    (row,) = read(touch(tmp_path, [f"JE/{letters}07.flac"]))
    assert row == Utterance(f"JE_{letters}07", f"JE/{letters}07.flac", label, "JE", text=f"{letters}07", sex="male")


def test_both_layouts_at_once_are_read_once(tmp_path: Path) -> None:
    write(tmp_path, {"ALL/DC_a01.wav": "one", "DC/a01.wav": "one", "ALL/DC_a02.wav": "one", "DC/a02.wav": "three"})
    rows = list(read(tmp_path))
    assert [row.path for row in rows] == ["ALL/DC_a01.wav", "ALL/DC_a02.wav", "DC/a02.wav"]
    assert [row.reason for row in rows if isinstance(row, Problem)] == ["duplicate-name"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("DC/s01.wav", "label"),
        ("DC/b01.wav", "label"),
        ("DC/as01.wav", "label"),
        ("DC/a00.wav", "name"),
        ("DC/a16.wav", "name"),
        ("DC/n31.wav", "name"),
        ("DC/a1.wav", "name"),
        ("DC/A01.wav", "name"),
        ("XY/a01.wav", "name"),
        ("a01.wav", "name"),
        ("XY_a01.wav", "name"),
        ("DC/a01 copy.wav", "name"),
    ],
)
def test_wrong_names_become_problems(tmp_path: Path, path: str, reason: str) -> None:
    rows = list(read(touch(tmp_path, ["KL/n30.wav", path])))
    assert [(row.path, row.reason) for row in rows if isinstance(row, Problem)] == [(path, reason)]
    assert len(rows) == 2


def test_folder_of_one_speaker_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, ["voices/a01.wav", "voices/su02.wav"])
    with pytest.raises(CorpusError, match=r"none of the 2 audio files fits .*speaker 'voices' does not exist"):
        read(tmp_path)


def test_dev_speakers_of_every_fold_say_several_classes(tmp_path: Path) -> None:
    assert fewest_dev_classes(CORPUS, read(put_all(tmp_path, "ALL/{speaker}_{name}.wav"))) >= 7
