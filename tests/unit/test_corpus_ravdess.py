"""RAVDESS: names, counts, folds, and what real downloads have wrong with them."""

import csv
import os
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from protocols import fewest_dev_classes

from sermll.corpora.ravdess import CORPUS, read
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

REAL = Path(os.environ.get("SERMLL_CORPORA", Path(__file__).parents[3] / "shared" / "corpora")) / "ravdess"


def names() -> list[str]:
    """The 1440 file stems of the published corpus, built field by field."""
    return [
        f"03-01-{emotion:02d}-{intensity:02d}-{statement:02d}-{repetition:02d}-{actor:02d}"
        for actor, emotion, intensity, statement, repetition in product(
            range(1, 25), range(1, 9), (1, 2), (1, 2), (1, 2)
        )
        if not (emotion == 1 and intensity == 2)
    ]


def put(root: Path, *paths: str, content: bytes = b"") -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def put_all(root: Path, prefix: str = "", suffix: str = ".wav") -> Path:
    return put(root, *(f"{prefix}Actor_{name[-2:]}/{name}{suffix}" for name in names()))


def split(rows: list[Utterance | Problem]) -> tuple[list[Utterance], list[Problem]]:
    return [r for r in rows if isinstance(r, Utterance)], [r for r in rows if isinstance(r, Problem)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_all(tmp_path_factory.mktemp("downloads") / "ravdess")


def test_whole_corpus_has_published_counts(whole: Path) -> None:
    utterances, problems = split(list(read(whole)))
    assert not problems
    assert Counter(u.label for u in utterances) == CORPUS.counts
    assert sum(CORPUS.counts.values()) == len({u.id for u in utterances}) == 1440
    assert Counter(u.speaker for u in utterances) == {f"{n:02d}": 60 for n in range(1, 25)}
    assert Counter(u.text for u in utterances) == {"01": 720, "02": 720}
    assert Counter(u.sex for u in utterances) == {"female": 720, "male": 720}
    assert all((whole / u.path).is_file() for u in utterances)


def test_fields_of_a_name(tmp_path: Path) -> None:
    rows = list(read(put(tmp_path, "Actor_12/03-01-06-01-02-01-12.wav", "Actor_07/03-01-08-02-01-02-07.FLAC")))
    assert rows == [
        Utterance(
            id="03-01-08-02-01-02-07",
            path="Actor_07/03-01-08-02-01-02-07.FLAC",
            label="surprised",
            speaker="07",
            text="01",
            sex="male",
        ),
        Utterance(
            id="03-01-06-01-02-01-12",
            path="Actor_12/03-01-06-01-02-01-12.wav",
            label="fearful",
            speaker="12",
            text="02",
            sex="female",
        ),
    ]


def test_class_order_is_the_published_code() -> None:
    order = "neutral calm happy sad angry fearful disgust surprised"
    assert " ".join(CORPUS.classes) == order
    assert tuple(CORPUS.counts) == CORPUS.classes


@pytest.mark.parametrize("name", ["hicmae", "emobox"])
def test_folds_are_disjoint_cover_all_and_balanced(whole: Path, name: str) -> None:
    utterances, _ = split(list(read(whole)))
    folds = CORPUS.folds[name]
    assert sorted(s for fold in folds for s in fold) == [f"{n:02d}" for n in range(1, 25)]
    for fold in folds:
        counts = Counter(u.label for u in utterances if u.speaker in fold)
        assert counts == {label: 16 if label == "neutral" else 32 for label in CORPUS.classes}


def test_default_folds_are_actors_in_order() -> None:
    assert next(iter(CORPUS.folds)) == "hicmae"
    assert CORPUS.folds["hicmae"][0] == ("01", "02", "03", "04")
    assert CORPUS.folds["hicmae"][5] == ("21", "22", "23", "24")
    assert CORPUS.folds["emobox"][1] == ("04", "10", "12", "14")


def test_tree_held_twice_is_read_once(tmp_path: Path) -> None:
    put_all(put_all(tmp_path), prefix="audio_speech_actors_01-24/")
    utterances, problems = split(list(read(tmp_path)))
    assert (len(utterances), problems) == (1440, [])
    assert all(u.path.startswith("Actor_") for u in utterances)


def test_same_name_with_another_size_is_a_problem(tmp_path: Path) -> None:
    name = "Actor_01/03-01-05-01-01-01-01.wav"
    put(tmp_path, name, content=b"one")
    put(tmp_path, f"audio_speech_actors_01-24/{name}", content=b"three")
    first, second = read(tmp_path)
    assert isinstance(first, Utterance)
    assert isinstance(second, Problem)
    assert (second.path, second.reason) == (f"audio_speech_actors_01-24/{name}", "duplicate-name")
    assert name in second.detail


def test_second_copy_that_cannot_be_compared_is_a_problem(tmp_path: Path) -> None:
    put(tmp_path, "Actor_01/03-01-05-01-01-01-01.wav")
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "03-01-05-01-01-01-01.wav").symlink_to(tmp_path / "nowhere.wav")
    first, second = read(tmp_path)
    assert isinstance(first, Utterance)
    assert isinstance(second, Problem)
    assert second.reason == "duplicate-name"


def test_folder_above_and_single_actor_folder(whole: Path) -> None:
    rows = list(read(whole / "Actor_07"))
    assert len(rows) == 60
    above = list(read(whole.parent))
    assert len(above) == 1440
    assert {r.path.split("/")[0] for r in above} == {whole.name}


def test_order_does_not_depend_on_the_file_system(whole: Path) -> None:
    paths = [row.path for row in read(whole)]
    assert paths == sorted(paths)


def test_songs_videos_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    kept = "Actor_02/03-01-02-02-02-02-02.wav"
    put(
        tmp_path,
        kept,
        "Actor_02/03-02-02-02-02-02-02.wav",
        "Actor_02/01-01-02-02-02-02-02.wav",
        "Actor_02/02-01-02-02-02-02-02.wav",
        "Actor_02/02-01-02-02-02-02-02.mp4",
        "Actor_02/._03-01-02-02-02-01-02.wav",
        "Actor_02/.DS_Store",
        ".cache/03-01-02-02-02-01-02.wav",
        "__MACOSX/Actor_02/._03-01-02-02-02-01-02.wav",
        "readme.txt",
    )
    assert [row.path for row in read(tmp_path)] == [kept]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("03-01-09-01-01-01-01", "label"),
        ("03-01-00-01-01-01-01", "label"),
        ("03-01-01-02-01-01-01", "name"),  # strong neutral
        ("03-01-03-03-01-01-01", "name"),
        ("03-01-03-01-03-01-01", "name"),
        ("03-01-03-01-01-03-01", "name"),
        ("03-01-03-01-01-01-25", "name"),
        ("03-01-03-01-01-01-00", "name"),
        ("04-01-03-01-01-01-01", "name"),
        ("03-03-03-01-01-01-01", "name"),
        ("03-01-03-01-01-01", "name"),
        ("03-01-03-01-01-01-01 (1)", "name"),
        ("03-01-03-01-01-01-٠١", "name"),  # digits, but not these  # noqa: RUF001
        ("noise", "name"),
    ],
)
def test_wrong_names_become_problems(tmp_path: Path, name: str, reason: str) -> None:
    put(tmp_path, "Actor_01/03-01-03-01-01-01-01.wav", f"Actor_01/{name}.wav")
    utterances, problems = split(list(read(tmp_path)))
    assert len(utterances) == 1
    assert [(p.path, p.reason) for p in problems] == [(f"Actor_01/{name}.wav", reason)]
    assert problems[0].detail


def test_missing_file_empty_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere: no such folder; expected RAVDESS"):
        read(tmp_path / "nowhere")
    put(tmp_path, "a.wav", "empty/readme.txt", "emodb/wav/03a01Fa.wav", "songs/03-02-01-01-01-01-01.wav")
    with pytest.raises(CorpusError, match=r"a\.wav: not a folder"):
        read(tmp_path / "a.wav")
    with pytest.raises(CorpusError, match="no WAV or FLAC file"):
        read(tmp_path / "empty")
    with pytest.raises(CorpusError, match=r"none of the 1 audio files fits \(wav/03a01Fa.wav: .*Actor_01"):
        read(tmp_path / "emodb")
    with pytest.raises(CorpusError, match="of a part not used"):
        read(tmp_path / "songs")


def test_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "Actor_01/03-01-03-01-01-01-01.wav", "Actor_02/03-01-03-01-01-01-02.wav")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:  # permissions do not bind root, whom tests may run as
        if str(path).endswith("Actor_02"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match=r"cannot be read .*Permission denied.*Actor_02"):
        read(tmp_path)


def test_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "disk", "Actor_01/03-01-03-01-01-01-01.wav")
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "Actor_01").symlink_to(tmp_path / "disk" / "Actor_01")
    (tmp_path / "disk" / "Actor_01" / "loop").symlink_to(root)
    assert [row.path for row in read(root)] == ["Actor_01/03-01-03-01-01-01-01.wav"]


@pytest.mark.audio
def test_real_recordings_agree_with_their_manifest() -> None:
    if not REAL.is_dir():
        pytest.skip(f"no RAVDESS at {REAL}; set SERMLL_CORPORA to the folder that holds it")
    utterances, problems = split(list(read(REAL)))
    assert not problems
    assert Counter(u.label for u in utterances) == CORPUS.counts
    with (REAL / "manifest.csv").open(newline="") as file:
        manifest = {Path(row["file"]).stem: (row["emotion"], row["speaker"]) for row in csv.DictReader(file)}
    assert {u.id: (u.label, u.speaker) for u in utterances} == manifest


def test_dev_speakers_of_every_fold_say_several_classes(whole: Path) -> None:
    assert fewest_dev_classes(CORPUS, read(whole)) >= 8
