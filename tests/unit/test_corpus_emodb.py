"""EMO-DB: names, counts, and what must not pass for it."""

import csv
import os
from collections import Counter
from itertools import islice, product
from pathlib import Path

import pytest
from protocols import fewest_dev_classes

from sermll.corpora.emodb import CORPUS, read
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

REAL = Path(os.environ.get("SERMLL_CORPORA", Path(__file__).parents[3] / "shared" / "corpora")) / "emodb"
LETTERS = {"W": 127, "L": 81, "E": 46, "A": 69, "F": 71, "N": 79, "T": 62}
SPEAKERS = ["03", "08", "09", "10", "11", "12", "13", "14", "15", "16"]
TEXTS = ["a01", "a02", "a04", "a05", "a07", "b01", "b02", "b03", "b09", "b10"]


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many files of each emotion as the published corpus has."""
    root = tmp_path_factory.mktemp("downloads") / "emodb"
    for letter, count in LETTERS.items():
        for version, text, speaker in islice(product("ab", TEXTS, SPEAKERS), count):
            put(root, f"wav/{speaker}{text}{letter}{version}.wav")
    return root


def test_whole_corpus_has_published_counts(whole: Path) -> None:
    rows = list(read(whole))
    assert all(isinstance(row, Utterance) for row in rows)
    assert len(rows) == sum(CORPUS.counts.values()) == 535
    assert Counter(row.label for row in rows if isinstance(row, Utterance)) == CORPUS.counts
    assert [row.path for row in rows] == sorted(row.path for row in rows)


def test_classes_and_folds() -> None:
    assert " ".join(CORPUS.classes) == "anger boredom disgust fear happiness neutral sadness"
    assert tuple(CORPUS.counts.values()) == (127, 81, 46, 69, 71, 79, 62)
    assert CORPUS.folds == {}


@pytest.mark.parametrize(
    ("letter", "label"),
    [
        ("W", "anger"),
        ("L", "boredom"),
        ("E", "disgust"),
        ("A", "fear"),
        ("F", "happiness"),
        ("N", "neutral"),
        ("T", "sadness"),
    ],
)
def test_letters_are_german(tmp_path: Path, letter: str, label: str) -> None:
    (row,) = read(put(tmp_path, f"wav/16b10{letter}d.flac"))
    path = f"wav/16b10{letter}d.flac"
    assert row == Utterance(f"16b10{letter}d", path, label, "16", text="b10", sex="female")


def test_sexes(whole: Path) -> None:
    sexes = {row.speaker: row.sex for row in read(whole) if isinstance(row, Utterance)}
    assert {speaker for speaker, sex in sexes.items() if sex == "male"} == {"03", "10", "11", "12", "15"}
    assert {speaker for speaker, sex in sexes.items() if sex == "female"} == {"08", "09", "13", "14", "16"}


def test_folder_of_wav_wav_itself_and_one_level_above(whole: Path) -> None:
    ids = [row.id for row in read(whole) if isinstance(row, Utterance)]
    for root in (whole / "wav", whole.parent):
        assert [row.id for row in read(root) if isinstance(row, Utterance)] == ids


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("03a01Xa", "label"),
        ("01a01Fa", "name"),
        ("03a03Fa", "name"),
        ("03c01Fa", "name"),
        ("03a01F", "name"),
        ("03a01Fab", "name"),
        ("03a01fa", "name"),
        ("03a01Fa copy", "name"),
        ("03-01-03-01-01-01-01", "name"),
    ],
)
def test_wrong_names_become_problems(tmp_path: Path, name: str, reason: str) -> None:
    rows = list(read(put(tmp_path, "wav/03a01Wa.wav", f"wav/{name}.wav", "wav/._03a01Wb.wav", "erkennung.txt")))
    problems = [row for row in rows if isinstance(row, Problem)]
    assert len(rows) == 2
    assert [(p.path, p.reason) for p in problems] == [(f"wav/{name}.wav", reason)]


def test_other_corpus_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "Actor_01/03-01-03-01-01-01-01.wav", "Actor_01/03-01-03-01-01-02-01.wav")
    with pytest.raises(CorpusError, match=r"none of the 2 audio files fits \(Actor_01/.*03a01Fa"):
        read(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no WAV or FLAC"):
        read(tmp_path)
    with pytest.raises(CorpusError, match="no such folder; expected EMO-DB"):
        read(tmp_path / "wav")


@pytest.mark.audio
def test_real_recordings_agree_with_their_manifest() -> None:
    if not REAL.is_dir():
        pytest.skip(f"no EMO-DB at {REAL}; set SERMLL_CORPORA to the folder that holds it")
    utterances = {row.id: row for row in read(REAL) if isinstance(row, Utterance)}
    assert len(list(read(REAL))) == len(utterances) == 535
    assert Counter(u.label for u in utterances.values()) == CORPUS.counts
    with (REAL / "manifest.csv").open(newline="") as file:
        manifest = {Path(row["file"]).stem: (row["emotion"], row["speaker"]) for row in csv.DictReader(file)}
    assert {name: (u.label, u.speaker) for name, u in utterances.items()} == manifest


def test_dev_speakers_of_every_fold_say_several_classes(whole: Path) -> None:
    assert fewest_dev_classes(CORPUS, read(whole)) >= 7
