"""IEMOCAP: labels in files of their own, who speaks, whose votes count, and what the release holds besides."""

from collections import Counter, defaultdict
from itertools import cycle, product
from pathlib import Path

import pytest
from protocols import fewest_dev_classes
from trees import touch, write

from sermll.corpora.iemocap import CORPUS, read
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

# Utterances of each label in sessions 1 to 5. The first five rows are the published ones.
SESSIONS = {
    "ang": (229, 137, 240, 327, 170),
    "hap": (135, 117, 135, 65, 143),
    "exc": (143, 210, 151, 238, 299),
    "neu": (384, 362, 320, 258, 384),
    "sad": (194, 197, 305, 143, 245),
    "fru": (280, 325, 382, 481, 381),
    "fea": (8, 8, 8, 8, 8),
    "sur": (22, 22, 21, 21, 21),
    "dis": (1, 1, 0, 0, 0),
    "oth": (1, 1, 1, 0, 0),
    "xxx": (502, 502, 501, 501, 501),
}
WORDS = {
    "ang": "Anger",
    "hap": "Happiness",
    "exc": "Excited",
    "neu": "Neutral",
    "sad": "Sadness",
    "fru": "Frustration",
    "fea": "Fear",
    "sur": "Surprise",
    "dis": "Disgust",
    "oth": "Other",
}
HEAD = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
MAN = "Ses01F_impro01_M000"  # the woman wears the markers, the man speaks
WOMAN = "Ses01F_impro01_F000"
TRANSCRIPTION = "Session1/dialog/transcriptions/Ses01F_impro01.txt"


def entry(utterance: str, label: str, *raters: str, means: str = "[2.5000, 4.0000, 3.1667]") -> str:
    """One block of a label file."""
    return "\n".join([f"[6.2901 - 8.2357]\t{utterance}\t{label}\t{means}", *raters, "", ""])


def evaluators(*choices: str) -> list[str]:
    return [f"C-E{number}:\t{choice};\t()" for number, choice in enumerate(choices, 1)]


def wav(utterance: str) -> str:
    return f"Session{utterance[4]}/sentences/wav/{utterance[: utterance.rindex('_')]}/{utterance}.wav"


def labels(dialog: str = "Ses01F_impro01") -> str:
    return f"Session{dialog[4]}/dialog/EmoEvaluation/{dialog}.txt"


def split(root: Path) -> tuple[list[Utterance], list[Problem]]:
    rows = list(read(root))
    return [r for r in rows if isinstance(r, Utterance)], [r for r in rows if isinstance(r, Problem)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many utterances of each label and session as the release has, among the files that stand beside them."""
    root = tmp_path_factory.mktemp("downloads") / "IEMOCAP_full_release"
    plays = ["impro01", "impro02", "impro05a", "script01_1", "script02_2", "script01_1b"]
    for session in range(1, 6):
        dialogs = [f"Ses0{session}{marked}_{play}" for marked, play in product("FM", plays)]
        wanted = [label for label, counts in SESSIONS.items() for _ in range(counts[session - 1])]
        evaluation, transcription = defaultdict(list), defaultdict(list)
        numbers: Counter[str] = Counter()
        for label, (dialog, speaker) in zip(wanted, cycle(product(dialogs, "FM")), strict=False):
            utterance = f"{dialog}_{speaker}{numbers[dialog + speaker]:03d}"
            numbers[dialog + speaker] += 1
            own = ["C-F1:\tDisgust;\t()", "C-M1:\tFear; Anger;\t(me)"]
            attributes = ["A-E3:\tval 3; act 2; dom  2;\t()", "A-E4:\tval 2; act 3; dom  ;\t(tense; [ready])"]
            if label == "xxx":
                choices = evaluators("Neutral", "Anger", "Sadness")
            else:
                choices = evaluators(WORDS[label], WORDS[label], "Frustration; Surprise")
            evaluation[dialog].append(entry(utterance, label, *choices, *own, *attributes))
            words = f"Line {utterance[-3:]}" if "script" in dialog else f"Words of {utterance}"
            transcription[dialog].append(f"{utterance} [006.2901-008.2357]: {words}\n")
        files: dict[str, str | bytes] = {}
        recordings: list[str] = []
        for dialog in dialogs:
            folder = f"Session{session}/dialog"
            files[f"{folder}/EmoEvaluation/{dialog}.txt"] = HEAD + "".join(evaluation[dialog])
            files[f"{folder}/EmoEvaluation/._{dialog}.txt"] = b"\x00\x05\x16\x07\x00\x02[\x00"
            files[f"{folder}/EmoEvaluation/Categorical/{dialog}_e1_cat.txt"] = f"{dialog}_F000 :Neutral state; ()\n"
            files[f"{folder}/EmoEvaluation/Attribute/{dialog}_e1_atr.txt"] = f"{dialog}_F000 :act 4; :val 3; ()\n"
            files[f"{folder}/EmoEvaluation/Self-evaluation/{dialog}_f1_cat.txt"] = f"{dialog}_F000 :Anger; ()\n"
            files[f"{folder}/transcriptions/{dialog}.txt"] = "".join(transcription[dialog])
            recordings.append(f"{folder}/wav/{dialog}.wav")
            recordings.append(f"Session{session}/sentences/wav/{dialog}/._{dialog}_F000.wav")
            files[f"Session{session}/sentences/MOCAP_head/{dialog}/{dialog}_F000.txt"] = "Frame# Time pitch\n"
            for speaker in "FM":
                spoken = (f"{dialog}_{speaker}{number:03d}" for number in range(numbers[dialog + speaker]))
                recordings.extend(wav(utterance) for utterance in spoken)
        touch(write(root, files), recordings)
    return root


@pytest.fixture(scope="module")
def utterances(whole: Path) -> list[Utterance]:
    rows = list(read(whole))
    assert [row for row in rows if isinstance(row, Problem)] == []
    return [row for row in rows if isinstance(row, Utterance)]


def test_whole_corpus_has_published_counts(whole: Path, utterances: list[Utterance]) -> None:
    assert Counter(u.label for u in utterances) == CORPUS.counts
    assert sum(CORPUS.counts.values()) == len({u.id for u in utterances}) == 10039
    assert [u.path for u in utterances] == sorted(u.path for u in utterances)
    assert all((whole / u.path).is_file() for u in utterances)


def test_sessions_are_the_published_folds(utterances: list[Utterance]) -> None:
    assert CORPUS.default_folds == "session"
    assert CORPUS.default_labels == "4class"
    four = {"ang": 0, "hap": 1, "exc": 1, "neu": 2, "sad": 3}
    counts = Counter((u.session, four[u.label]) for u in utterances if u.label in four)
    table = {session: tuple(counts[session, label] for label in range(4)) for session in "12345"}
    assert table == {
        "1": (229, 278, 384, 194),
        "2": (137, 327, 362, 197),
        "3": (240, 286, 320, 305),
        "4": (327, 303, 258, 143),
        "5": (170, 442, 384, 245),
    }


def test_ten_speakers_two_of_each_session(utterances: list[Utterance]) -> None:
    told = {(u.speaker, u.session, u.sex) for u in utterances}
    assert told == {
        (f"Ses0{session}{letter}", session, sex)
        for session in "12345"
        for letter, sex in (("F", "female"), ("M", "male"))
    }
    # The speaker is in the last part of the name: both speak in dialogs in which the woman wears the markers.
    assert {u.speaker for u in utterances if u.id.startswith("Ses03F_impro01")} == {"Ses03F", "Ses03M"}


def test_votes_of_the_whole_corpus(utterances: list[Utterance]) -> None:
    assert all(u.votes and sum(count for _, count in u.votes) == 3 for u in utterances)
    by_label = {u.label: u.votes for u in utterances}
    assert by_label["neu"] == (("fru", 0.5), ("neu", 2.0), ("sur", 0.5))
    assert by_label["sur"] == (("fru", 0.5), ("sur", 2.5))
    assert by_label["xxx"] == (("ang", 1.0), ("neu", 1.0), ("sad", 1.0))


def test_scripted_texts_recur_and_improvised_ones_do_not(utterances: list[Utterance]) -> None:
    sessions = defaultdict(set)
    for u in utterances:
        sessions[u.text].add(u.session)
    assert sessions["line 003"] == set("12345")
    assert len(sessions["words of ses01f_impro01_f000"]) == 1


def test_classes() -> None:
    assert " ".join(CORPUS.classes) == "ang hap exc neu sad fru fea sur dis"
    assert CORPUS.other_labels == ("oth", "xxx")
    assert tuple(CORPUS.counts.values()) == (1103, 595, 1041, 1708, 1084, 1849, 40, 107, 2, 3, 2507)


def test_every_field_of_an_utterance(tmp_path: Path) -> None:
    """The example of the corpus's own documentation, with one more rater."""
    raters = [
        "C-E2:\tNeutral;\t()",
        "C-E3:\tNeutral; Anger;\t()",
        "C-E4:\tNeutral state;\t(calm; so)",
        "C-M1:\tFear;\t()",
    ]
    write(
        tmp_path,
        {
            labels(): HEAD + entry(MAN, "neu", *raters, "A-E3:\tval 3; act 2; dom  2;\t()"),
            TRANSCRIPTION: f"{MAN} [007.5712-010.4750]: Don't you, uh-huh? [BREATHING]\n",
            wav(MAN): b"",
        },
    )
    assert list(read(tmp_path)) == [
        Utterance(
            id=MAN,
            path=f"Session1/sentences/wav/Ses01F_impro01/{MAN}.wav",
            label="neu",
            speaker="Ses01M",
            session="1",
            text="dont you uh huh",
            sex="male",
            votes=(("ang", 0.5), ("neu", 2.5)),
            valence=2.5,
            arousal=4.0,
            dominance=3.1667,
        )
    ]


@pytest.mark.parametrize("line", ["[LAUGHTER]", " ...", ""])
def test_nothing_said_is_no_text(tmp_path: Path, line: str) -> None:
    transcription = f"M: [GARBAGE]\n{MAN} [001.0-002.0]: {line}\n"
    root = write(tmp_path, {labels(): HEAD + entry(MAN, "neu"), TRANSCRIPTION: transcription, wav(MAN): b""})
    (row,) = read(root)
    assert isinstance(row, Utterance)
    assert row.text is None


def test_without_transcriptions_and_raters(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path, {labels(): HEAD + entry(MAN, "xxx"), wav(MAN): b""}))
    assert isinstance(row, Utterance)
    assert (row.label, row.text, row.votes) == ("xxx", None, None)


@pytest.mark.parametrize(
    ("rater", "complaint"),
    [
        ("C-E2:\tHungry;\t()", "holds no known categories: 'C-E2:"),
        ("C-E2:\tAnger; Hungry;\t()", "holds no known categories"),
        ("C-E2:\t;\t()", "holds no known categories"),
        ("Anger", "holds no known categories: 'Anger'"),
    ],
)
def test_vote_that_cannot_be_understood_is_left_out_and_told(tmp_path: Path, rater: str, complaint: str) -> None:
    root = write(tmp_path, {labels(): HEAD + entry(MAN, "ang", "C-E1:\tAnger;\t()", rater), wav(MAN): b""})
    (utterance,), (problem,) = split(root)
    assert utterance.votes == (("ang", 1.0),)
    assert (problem.path, problem.reason, problem.used) == (labels(), "vote", True)
    assert problem.detail.startswith(f"line 5, of {MAN}, ")
    assert complaint in problem.detail


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (f"[6.2901 - 8.2357]\t{WOMAN}\tbored\t[2.5000, 2.5000, 2.5000]", "label"),
        (f"[6.2901 - 8.2357]\t{WOMAN}\tneu\t[2.5000, 2.5000]", "label-line"),
        (f"[6.2901 - 8.2357]\t{WOMAN}\tneu\t[2.5000, 2.5000, x]", "label-line"),
        (f"[6.2901 - 8.2357]\t{WOMAN}\tneu", "label-line"),
        (f"6.2901 - 8.2357]\t{WOMAN}\tneu\t[2.5000, 2.5000, 2.5000]", "label-line"),
        ("[\ufffd", "label-line"),
    ],
)
def test_broken_label_is_told_and_its_raters_go_to_nobody(tmp_path: Path, header: str, reason: str) -> None:
    text = HEAD + entry(MAN, "ang", "C-E1:\tAnger;\t()") + header + "\nC-E1:\tSadness;\t()\n\n"
    (man,), (unlabelled, broken) = split(write(tmp_path, {labels(): text, wav(MAN): b"", wav(WOMAN): b""}))
    assert man.votes == (("ang", 1.0),)
    assert (unlabelled.path, unlabelled.reason, unlabelled.used) == (wav(WOMAN), "no-label", False)
    assert "dialog/EmoEvaluation/Ses01F_impro01.txt" in unlabelled.detail
    assert (broken.path, broken.reason, broken.used) == (labels(), reason, False)
    assert broken.detail.startswith("line 6")


def test_label_file_without_empty_lines_with_other_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = HEAD + entry(WOMAN, "sad", "C-E1:\tSadness;\t()") + entry(MAN, "ang", "C-E1:\tAnger;\t()")
    for name, content in (("bare", text.replace("\n\n", "\n")), ("windows", "\ufeff" + text.replace("\n", "\r\n"))):
        found, problems = split(write(tmp_path / name, {labels(): content, wav(MAN): b"", wav(WOMAN): b""}))
        assert problems == []
        assert [u.votes for u in found] == [(("sad", 1.0),), (("ang", 1.0),)]


def test_missing_label_file_and_missing_recordings(tmp_path: Path) -> None:
    other = "Ses02M_script01_1_F003"
    root = write(tmp_path, {labels(): HEAD + entry(WOMAN, "sad") + entry(MAN, "ang"), wav(MAN): b"", wav(other): b""})
    (man,), problems = split(root)
    assert man.id == MAN
    assert [(p.path, p.reason, p.used) for p in problems] == [
        (wav(other), "no-label", False),
        (labels(), "no-audio", False),
    ]
    assert problems[1].detail == f"line 3: there is no recording of {WOMAN}"


def test_label_told_twice(tmp_path: Path) -> None:
    same = HEAD + entry(MAN, "ang")
    root = write(tmp_path, {labels(): same, f"copy/{labels()}": same, wav(MAN): b"", f"copy/{wav(MAN)}": b""})
    assert [row.id for row in split(root)[0]] == [MAN]
    assert split(root)[1] == []
    write(root, {f"copy/{labels()}": HEAD + entry(MAN, "sad")})
    (utterance,), (problem,) = split(root)
    # Session1/... sorts before copy/...
    assert utterance.label == "ang"
    assert (problem.path, problem.reason, problem.used) == (f"copy/{labels()}", "repeated-label", True)
    assert f"line 3: {MAN} has another label in {labels()}, line 3" in problem.detail


@pytest.mark.parametrize(
    "name", ["Ses06F_impro01_F000", "Ses01X_impro01_F000", "Ses01F_impro01_X000", "Ses01F_impro01_F00", "Ses01F_F000"]
)
def test_wrong_names_become_problems(tmp_path: Path, name: str) -> None:
    text = HEAD + entry(MAN, "ang")
    _, problems = split(write(tmp_path, {labels(): text, wav(MAN): b"", f"Session1/sentences/wav/x/{name}.wav": b""}))
    assert [(p.path, p.reason) for p in problems] == [(f"Session1/sentences/wav/x/{name}.wav", "name")]


def test_folder_above_and_single_session(whole: Path, utterances: list[Utterance]) -> None:
    above, problems = split(whole.parent)
    assert problems == []
    assert [u.id for u in above] == [u.id for u in utterances]
    second, problems = split(whole / "Session2")
    assert problems == []
    assert {u.session for u in second} == {"2"}


def test_folders_without_labels_or_recordings_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {f"audio/{wav(MAN)}": b"", f"labels/{labels()}": HEAD + entry(MAN, "ang")})
    with pytest.raises(
        CorpusError, match=r"none of the 1 audio files fits \(.*no label for it in dialog/EmoEvaluation"
    ):
        read(tmp_path / "audio")
    with pytest.raises(CorpusError, match="no WAV or FLAC file"):
        read(tmp_path / "labels")
    write(tmp_path, {"dialogs/Session1/dialog/wav/Ses01F_impro01.wav": b""})
    with pytest.raises(CorpusError, match="of a part not used"):
        read(tmp_path / "dialogs")


def test_label_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {wav(MAN): b""})
    (tmp_path / labels()).parent.mkdir(parents=True)
    (tmp_path / labels()).symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(CorpusError, match=r"Ses01F_impro01\.txt: cannot be read"):
        read(tmp_path)


def test_dev_speakers_of_every_fold_say_several_classes(utterances: list[Utterance]) -> None:
    assert fewest_dev_classes(CORPUS, utterances) >= 7
