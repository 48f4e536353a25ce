"""CREMA-D: names, counts, folds of actors, and the tables of actors and votes."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from protocols import fewest_dev_classes
from trees import touch, write

from sermll.corpora.cremad import CORPUS, read
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

SENTENCES = ("IEO", "TIE", "IOM", "IWW", "TAI", "MTI", "IWL", "ITH", "DFA", "ITS", "TSI", "WSI")
EMOTIONS = ("NEU", "HAP", "SAD", "ANG", "FEA", "DIS")
# The header of the real table, and its first two rows of actor 1001 for each way of presenting a clip.
HEADER = '"","A","D","F","H","N","S","fileName","numResponses","agreement","emoVote","meanEmoResp"\n'
ROWS = (
    '"100004",2,0,0,6,2,0,"1001_IEO_HAP_HI",10,0.6,"H",57.6\n'
    '"100009",5,5,0,0,1,1,"1001_IEO_ANG_MD",12,0.416666666666667,"A:D",50.5833333333333\n'
    '"200004",0,0,0,9,0,0,"1001_IEO_HAP_HI",9,1,"H",68.25\n'
    '"300004",0,1,0,8,0,0,"1001_IEO_HAP_HI",9,0.888888888888889,"H",73.2\n'
)
ACTORS = '"ActorID","Age","Sex","Race","Ethnicity"\n1001,51,"Male","Caucasian","Not Hispanic"\n'
CLIP = "AudioWAV/1001_IEO_HAP_HI.wav"
VOTES = "processedResults/tabulatedVotes.csv"


def names() -> list[str]:
    """7442 clips: three levels of one sentence, none for neutral, and twenty clips that were lost."""
    levels = {"IEO": ("LO", "MD", "HI")}
    made = [
        f"{actor}_{sentence}_{emotion}_{level}"
        for actor, sentence, emotion in product(range(1001, 1092), SENTENCES, EMOTIONS)
        for level in (("XX",) if emotion == "NEU" else levels.get(sentence, ("XX",)))
    ]
    lost = {f"{actor}_TSI_NEU_XX" for actor in range(1002, 1007)}
    lost |= {f"{actor}_WSI_{emotion}_XX" for actor, emotion in product((1011, 1012, 1013), EMOTIONS[1:])}
    return [name for name in made if name not in lost]


def split(root: Path) -> tuple[list[Utterance], list[Problem]]:
    rows = list(read(root))
    return [r for r in rows if isinstance(r, Utterance)], [r for r in rows if isinstance(r, Problem)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("downloads") / "CREMA-D"
    touch(root, ["README.md", "AudioMP3/1001_DFA_ANG_XX.mp3", "AudioWAV/._1001_DFA_ANG_XX.wav"])
    touch(root, (f"AudioWAV/{name}.wav" for name in names()))
    (root / "AudioWAV/1040_ITH_SAD_XX.wav").rename(root / "AudioWAV/1040_ITH_SAD_X.wav")
    rows = [
        f'"{presented}{number:05d}",{presented},0,7,0,0,1,"{name}",9,0.7,"F",50\n'
        for presented in (1, 2, 3)
        for number, name in enumerate(names(), 1)
    ]
    sexes = "".join(f'{actor},30,"{"Male" if actor < 1049 else "Female"}","","x"\n' for actor in range(1001, 1092))
    columns = ACTORS.splitlines()[0] + "\n"
    return write(root, {VOTES: HEADER + "".join(rows), "VideoDemographics.csv": columns + sexes})


@pytest.fixture(scope="module")
def utterances(whole: Path) -> list[Utterance]:
    rows = list(read(whole))
    assert [row for row in rows if isinstance(row, Problem)] == []
    return [row for row in rows if isinstance(row, Utterance)]


def test_whole_corpus_has_published_counts(whole: Path, utterances: list[Utterance]) -> None:
    assert Counter(u.label for u in utterances) == CORPUS.counts
    assert sum(CORPUS.counts.values()) == len({u.id for u in utterances}) == 7442
    assert {u.id for u in utterances} == set(names())
    assert {u.text for u in utterances} == set(SENTENCES)
    assert len({u.speaker for u in utterances if u.sex == "male"}) == 48
    assert len({u.speaker for u in utterances if u.sex == "female"}) == 43
    assert [u.path for u in utterances] == sorted(u.path for u in utterances)
    assert all((whole / u.path).is_file() for u in utterances)


def test_votes_of_the_whole_corpus_are_those_of_the_voice(utterances: list[Utterance]) -> None:
    assert {u.votes for u in utterances} == {(("anger", 1.0), ("fear", 7.0), ("sad", 1.0))}


def test_classes() -> None:
    assert " ".join(CORPUS.classes) == "anger disgust fear happy neutral sad"
    assert tuple(CORPUS.counts.values()) == (1271, 1271, 1271, 1271, 1087, 1271)


def test_folds_deal_the_actors_in_order() -> None:
    folds = CORPUS.folds["actors5"]
    assert CORPUS.default_folds == "actors5"
    assert sorted(actor for fold in folds for actor in fold) == [str(actor) for actor in range(1001, 1092)]
    assert [len(fold) for fold in folds] == [19, 18, 18, 18, 18]
    assert [fold[:2] for fold in folds] == [
        ("1001", "1006"),
        ("1002", "1007"),
        ("1003", "1008"),
        ("1004", "1009"),
        ("1005", "1010"),
    ]


def test_every_field_of_an_utterance(tmp_path: Path) -> None:
    touch(tmp_path, [CLIP, "AudioWAV/1002_DFA_NEU_XX.FLAC"])
    write(tmp_path, {VOTES: HEADER + ROWS, "VideoDemographics.csv": ACTORS})
    first = Utterance(
        id="1001_IEO_HAP_HI",
        path=CLIP,
        label="happy",
        speaker="1001",
        text="IEO",
        sex="male",
        votes=(("anger", 2.0), ("happy", 6.0), ("neutral", 2.0)),
    )
    second = Utterance("1002_DFA_NEU_XX", "AudioWAV/1002_DFA_NEU_XX.FLAC", "neutral", "1002", text="DFA")
    assert list(read(tmp_path)) == [first, second]


@pytest.mark.parametrize("level", ["X", "XX"])
def test_clip_with_two_names_has_one_id(tmp_path: Path, level: str) -> None:
    votes = '"103213",0,1,0,0,5,4,"1040_ITH_SAD_XX",10,0.5,"N",50\n'
    (row,) = read(write(tmp_path, {VOTES: HEADER + votes, f"AudioWAV/1040_ITH_SAD_{level}.wav": ""}))
    assert isinstance(row, Utterance)
    assert (row.id, row.votes) == ("1040_ITH_SAD_XX", (("disgust", 1.0), ("neutral", 5.0), ("sad", 4.0)))


@pytest.mark.parametrize(
    ("path", "text", "reason", "complaint"),
    [
        (VOTES, HEADER + '"x",1,0,0,0,0,0,"1001_IEO_HAP_HI"\n' + ROWS, "vote", "line 2 holds no clip number"),
        (VOTES, HEADER + '"100001",1,,0,0,0,0,"1001_IEO_HAP_HI"\n' + ROWS, "vote", "line 2"),
        (VOTES, HEADER + ROWS + '"100005",1,0\n', "vote", "line 6"),
        (VOTES, HEADER.replace('"fileName"', '"clip"') + ROWS, "table", "line 1: no column 'fileName'"),
        (VOTES, "", "table", "no column"),
        (VOTES, HEADER + ROWS + '"' + "x\n" * 140_000, "table", "field larger"),
        ("VideoDemographics.csv", ACTORS + '1002,20,"F","",""\n', "sex", "line 3: the sex of actor 1002 is 'F'"),
        ("VideoDemographics.csv", "version https://git-lfs.github.com/spec/v1\n", "table", "'ActorID', 'Sex'"),
    ],
)
def test_broken_tables_are_told_and_clips_still_used(
    tmp_path: Path, path: str, text: str, reason: str, complaint: str
) -> None:
    (utterance,), (problem,) = split(write(tmp_path, {CLIP: "", path: text}))
    assert (problem.path, problem.reason, problem.used) == (path, reason, True)
    assert complaint in problem.detail
    if path == VOTES and reason == "vote":
        assert utterance.votes == (("anger", 2.0), ("happy", 6.0), ("neutral", 2.0))
    if reason == "sex":
        assert utterance.sex == "male"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("1001_DFA_BOR_XX", "label"),
        ("1000_DFA_ANG_XX", "name"),
        ("1092_DFA_ANG_XX", "name"),
        ("1001_ABC_ANG_XX", "name"),
        ("1001_DFA_ANG_ME", "name"),
        ("1001_DFA_ANG", "name"),
        ("1001_DFA_ANG_XX (1)", "name"),
        ("1001_dfa_ang_xx", "name"),
    ],
)
def test_wrong_names_become_problems(tmp_path: Path, name: str, reason: str) -> None:
    utterances, problems = split(touch(tmp_path, [CLIP, f"AudioWAV/{name}.wav"]))
    assert len(utterances) == 1
    assert [(p.path, p.reason) for p in problems] == [(f"AudioWAV/{name}.wav", reason)]


def test_folder_of_wav_itself_and_one_level_above(whole: Path, utterances: list[Utterance]) -> None:
    ids = [u.id for u in utterances]
    assert [u.id for u in split(whole.parent)[0]] == ids
    alone, problems = split(whole / "AudioWAV")
    assert [u.id for u in alone] == ids
    assert problems == []
    assert {(u.sex, u.votes) for u in alone} == {(None, None)}


def test_tables_without_recordings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no WAV or FLAC"):
        read(write(tmp_path, {VOTES: HEADER + ROWS}))


def test_dev_speakers_of_every_fold_say_several_classes(utterances: list[Utterance]) -> None:
    assert fewest_dev_classes(CORPUS, utterances) >= 6
