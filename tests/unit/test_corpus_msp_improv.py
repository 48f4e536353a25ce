"""MSP-IMPROV: one label file in two spellings, names of videos for names of recordings, raters named twice."""

from collections import Counter
from itertools import cycle, islice, product
from pathlib import Path

import pytest
from protocols import fewest_dev_classes
from trees import touch, write

from sermll.corpora.msp_improv import CORPUS, read
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

# Published number of turns by recording and label.
TURNS = {
    "P": {"A": 38, "S": 66, "H": 1372, "N": 1164, "O": 11, "X": 134},
    "R": {"A": 169, "S": 80, "H": 88, "N": 241, "O": 3, "X": 39},
    "S": {"A": 470, "S": 633, "H": 1048, "N": 1789, "O": 70, "X": 371},
    "T": {"A": 115, "S": 106, "H": 136, "N": 283, "O": 1, "X": 11},
}
WORDS = {"A": "Angry", "S": "Sad", "H": "Happy", "N": "Neutral", "O": "Other", "X": "Other"}
FREE = "S01A-F01-P-FM01"
READ = "S07N-M06-R-MF02"


def wav(turn: str) -> str:
    scenario, speaker, recording, _ = turn.split("-")
    return f"session{speaker[-1]}/{scenario}/{recording}/MSP-IMPROV-{turn}.wav"


def entry(turn: str, letter: str, *raters: str, means: str = "A:2.5; V:3.0; D:3.5 ; N:4.0;") -> str:
    return "\n".join([f"UTD-IMPROV-{turn}.avi; {letter}; {means}", *raters, "", ""])


def rater(name: str, word: str) -> str:
    return f"{name}; {word}; {word},Surprised; A:3.000000; V:3.000000; D:NaN; N:4.000000;"


def split(root: Path) -> tuple[list[Utterance], list[Problem]]:
    rows = list(read(root))
    return [r for r in rows if isinstance(r, Utterance)], [r for r in rows if isinstance(r, Problem)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many turns of each recording and label as the corpus has, with the flaws of its label file."""
    root = tmp_path_factory.mktemp("downloads") / "MSP-IMPROV"
    text, recordings = [], []
    for recording, counts in TURNS.items():
        letters = [letter for letter, count in counts.items() for _ in range(count)]
        places = product(range(1, 7), "AHNS", range(1, 21), "FM", range(1, 7))
        turns = (
            f"S{sentence:02d}{target}-{sex}0{session}-{recording}-FM{number:02d}"
            for number, target, sentence, sex, session in places
        )
        for letter, turn, flaw in zip(letters, islice(turns, len(letters)), cycle(range(3)), strict=False):
            raters = [rater("-ab_C1", WORDS[letter]), rater("w2", WORDS[letter]), rater("w3", "Neutral")]
            if flaw == 1:
                raters.insert(2, raters[0])
            mean = (
                "A:2.200000; V:3.600000; D:NaN ; N:NaN;" if flaw == 2 else "A:2.200000; V:3.600000; D:3.000000 ; N:4.0;"
            )
            text.append(entry(turn, letter, *raters, means=mean))
            recordings.append(f"Audio/{wav(turn)}")
            if turn.endswith("2"):
                recordings.append(recordings[-1].replace("/MSP-", "/._MSP-"))
    return touch(write(root, {"Evalution.txt": "".join(text)}), recordings)


@pytest.fixture(scope="module")
def utterances(whole: Path) -> list[Utterance]:
    rows = list(read(whole))
    assert [row for row in rows if isinstance(row, Problem)] == []
    return [row for row in rows if isinstance(row, Utterance)]


def test_whole_corpus_has_published_counts(utterances: list[Utterance]) -> None:
    assert Counter(u.label for u in utterances) == CORPUS.counts
    assert sum(CORPUS.counts.values()) == len({u.id for u in utterances}) == 8438
    assert sum(CORPUS.counts[label] for label in CORPUS.classes) == 7798
    assert [u.path for u in utterances] == sorted(u.path for u in utterances)


def test_recordings_have_published_counts(utterances: list[Utterance]) -> None:
    names = {"A": "angry", "S": "sad", "H": "happy", "N": "neutral", "O": "other", "X": "no agreement"}
    counts = Counter((u.id.split("-")[4], u.label) for u in utterances)
    assert counts == {(kind, names[letter]): n for kind, row in TURNS.items() for letter, n in row.items()}


def test_classes_and_folds() -> None:
    assert " ".join(CORPUS.classes) == "angry sad happy neutral"
    assert CORPUS.other_labels == ("other", "no agreement")
    assert tuple(CORPUS.counts.values()) == (792, 885, 2644, 3477, 85, 555)
    assert (CORPUS.default_folds, CORPUS.default_labels) == ("session", "native")


def test_twelve_speakers_two_of_each_session(utterances: list[Utterance]) -> None:
    assert {(u.speaker, u.session, u.sex) for u in utterances} == {
        (f"{letter}0{session}", session, sex)
        for session in "123456"
        for letter, sex in (("F", "female"), ("M", "male"))
    }


def test_texts_are_the_target_sentences_where_these_are_spoken(utterances: list[Utterance]) -> None:
    assert {u.text for u in utterances if u.id.split("-")[4] in "PS"} == {None}
    spoken = {u.text for u in utterances if u.id.split("-")[4] in "RT"}
    assert spoken == {f"{sentence:02d}" for sentence in range(1, 21)}
    # Whatever the target emotion, the words are the same.
    assert {u.text for u in utterances if u.id.split("-")[2][:3] == "S04" and u.text} == {"04"}


def test_copied_raters_count_once_and_nan_is_none(utterances: list[Utterance]) -> None:
    votes = {u.label: u.votes for u in utterances}
    assert votes == {
        "angry": (("angry", 2.0), ("neutral", 1.0)),
        "sad": (("neutral", 1.0), ("sad", 2.0)),
        "happy": (("happy", 2.0), ("neutral", 1.0)),
        "neutral": (("neutral", 3.0),),
        "other": (("neutral", 1.0), ("other", 2.0)),
        "no agreement": (("neutral", 1.0), ("other", 2.0)),
    }
    assert Counter(u.dominance for u in utterances).keys() == {3.0, None}
    assert {(u.arousal, u.valence) for u in utterances} == {(2.2, 3.6)}


@pytest.mark.parametrize("spelling", ["Evalution.txt", "Evaluation.txt"])
@pytest.mark.parametrize("folder", ["", "Human Labels/"])
def test_every_field_of_an_utterance_in_both_spellings(tmp_path: Path, spelling: str, folder: str) -> None:
    raters = [rater("a", "Happy"), rater("b", "Neutral"), rater("b", "Neutral"), rater("c", "Happy")]
    text = entry(READ, "H", *raters, means="A:1.5; V:4.25; D:NaN ; N:3.0;") + entry(FREE, "X")
    rows = list(read(write(tmp_path, {folder + spelling: text, wav(READ): b"", wav(FREE): b""})))
    assert rows == [
        Utterance(
            id=f"MSP-IMPROV-{FREE}",
            path=wav(FREE),
            label="no agreement",
            speaker="F01",
            session="1",
            sex="female",
            valence=3.0,
            arousal=2.5,
            dominance=3.5,
        ),
        Utterance(
            id=f"MSP-IMPROV-{READ}",
            path=wav(READ),
            label="happy",
            speaker="M06",
            session="6",
            text="07",
            sex="male",
            votes=(("happy", 2.0), ("neutral", 1.0)),
            valence=4.25,
            arousal=1.5,
        ),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("b; Bored; ; A:3;", "holds no known category"),
        ("b", "holds no known category"),
        (rater("a", "Sad"), "is another of the same rater"),
    ],
)
def test_vote_that_cannot_be_used_is_left_out_and_told(tmp_path: Path, line: str, complaint: str) -> None:
    text = entry(READ, "H", rater("a", "Happy"), line, line)
    (utterance,), problems = split(write(tmp_path, {"Evalution.txt": text, wav(READ): b""}))
    assert utterance.votes == (("happy", 1.0),)
    assert {(p.path, p.reason, p.used) for p in problems} == {("Evalution.txt", "vote", True)}
    assert problems[0].detail.startswith(f"line 3, of {READ}, {complaint}: '{line[:20]}")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (f"UTD-IMPROV-{FREE}.avi; Q; A:2.5; V:3.0; D:3.5 ; N:4.0;", "label"),
        (f"UTD-IMPROV-{FREE}.avi; N; A:2.5; V:; D:3.5 ; N:4.0;", "label-line"),
        (f"UTD-IMPROV-{FREE}.avi; N", "label-line"),
        (f"UTD-IMPROV-{FREE}; N; A:2.5; V:3.0; D:3.5 ; N:4.0;", "label-line"),
        (f"{FREE}.avi; N; A:2.5; V:3.0; D:3.5 ; N:4.0;", "label-line"),
    ],
)
def test_broken_label_is_told_and_its_raters_go_to_nobody(tmp_path: Path, header: str, reason: str) -> None:
    text = entry(READ, "H", rater("a", "Happy")) + header + f"\n{rater('b', 'Sad')}\n\n"
    root = write(tmp_path, {"Evalution.txt": text, wav(READ): b"", wav(FREE): b""})
    (utterance,), (unlabelled, broken) = split(root)
    assert utterance.votes == (("happy", 1.0),)
    assert (unlabelled.path, unlabelled.reason, unlabelled.used) == (wav(FREE), "no-label", False)
    assert (broken.path, broken.reason, broken.used) == ("Evalution.txt", reason, False)
    assert broken.detail.startswith("line 4")


def test_recording_without_label_and_label_without_recording(tmp_path: Path) -> None:
    other = "S02S-F03-T-MF01"
    text = entry(READ, "H") + entry(FREE, "N")
    (utterance,), problems = split(write(tmp_path, {"Evalution.txt": text, wav(READ): b"", wav(other): b""}))
    assert utterance.label == "happy"
    assert [(p.path, p.reason) for p in problems] == [(wav(other), "no-label"), ("Evalution.txt", "no-audio")]
    assert problems[1].detail == f"line 3: there is no recording of MSP-IMPROV-{FREE}"


def test_both_spellings_at_once(tmp_path: Path) -> None:
    write(tmp_path, {"Evalution.txt": entry(READ, "H"), "Evaluation.txt": entry(READ, "H"), wav(READ): b""})
    assert [type(row) for row in read(tmp_path)] == [Utterance]
    write(tmp_path, {"Evalution.txt": entry(READ, "S")})
    (utterance,), (problem,) = split(tmp_path)
    assert utterance.label == "happy"  # Evaluation sorts before Evalution
    assert (problem.path, problem.reason, problem.used) == ("Evalution.txt", "repeated-label", True)


@pytest.mark.parametrize(
    "name",
    ["UTD-IMPROV-S01A-F01-P-FM02", "MSP-IMPROV-S01A-F07-P-FM02", "MSP-IMPROV-S01B-F01-P-FM02", "MSP-IMPROV-S01A-F01-P"],
)
def test_wrong_names_become_problems(tmp_path: Path, name: str) -> None:
    _, problems = split(write(tmp_path, {"Evalution.txt": entry(READ, "H"), wav(READ): b"", f"{name}.wav": b""}))
    assert [(p.path, p.reason) for p in problems] == [(f"{name}.wav", "name")]


def test_folder_above(whole: Path, utterances: list[Utterance]) -> None:
    above, problems = split(whole.parent)
    assert problems == []
    assert [u.id for u in above] == [u.id for u in utterances]


def test_folder_without_label_file_is_refused(whole: Path) -> None:
    with pytest.raises(CorpusError, match=r"audio files fits \(.*no label for it in Evalution.txt or Evaluation.txt"):
        read(whole / "Audio")


def test_dev_speakers_of_every_fold_say_several_classes(utterances: list[Utterance]) -> None:
    assert fewest_dev_classes(CORPUS, utterances) >= 4
