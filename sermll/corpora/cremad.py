"""CREMA-D, the Crowd-sourced Emotional Multimodal Actors Dataset: 91 American actors, twelve sentences, six emotions.

Source: https://github.com/CheyneyComputerScience/CREMA-D, cloned with git-lfs; folder `AudioWAV`, 16 kHz mono WAV.

Layout: `AudioWAV/1001_DFA_ANG_XX.wav`. Reading the name from the left:

| field | values |
|---|---|
| actor | 1001 to 1091 |
| sentence | DFA IEO IOM ITH ITS IWL IWW MTI TAI TIE TSI WSI |
| emotion | ANG anger, DIS disgust, FEA fear, HAP happy, NEU neutral, SAD sad |
| level | LO low, MD medium, HI high (of IEO alone), XX not told |

Two tables are read where they exist:

| table | columns | what |
|---|---|---|
| `VideoDemographics.csv` | ActorID, Sex | 48 actors are Male, 43 Female |
| `processedResults/tabulatedVotes.csv` | first, A D F H N S, fileName | how many of the crowd chose each emotion |

The first column of votes is the number of the clip, plus 100000 for those who only heard it, 200000 for those who
only saw it, 300000 for those who did both. Votes here are those of the first, about ten for a clip.

Counts: 7442 utterances; anger 1271, disgust 1271, fear 1271, happy 1271, neutral 1087, sad 1271.

Folds `actors5`: actors dealt in order to five folds, 19 to the first and 18 to each other.

Traps:
- The label is the emotion that was acted. Those who only heard a clip recognised it 41 times in 100, so accuracies
  against labels and against votes are not comparable.
- 1040_ITH_SAD_XX.wav is called 1040_ITH_SAD_X.wav in many copies; its id is the same under both names.
- 1076_MTI_SAD_XX.wav holds no sound.
- Downloaded without git-lfs, the WAV files are short texts that point to the recordings.
- There are twelve sentences, so every split by actor has the same texts on both sides.
- The EmoBox split shares all 91 actors between training and test.

Licence: Open Database License 1.0. Citation: H. Cao, D. G. Cooper, M. K. Keutmann, R. C. Gur, A. Nenkova, R. Verma,
"CREMA-D: Crowd-Sourced Emotional Multimodal Actors Dataset", IEEE Transactions on Affective Computing 5(4), 2014,
pp. 377-390.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from sermll.corpora.folder import Votes, list_files, read_audio, read_text, votes_of
from sermll.rows import Archive, Corpus, Problem, Utterance

_LABELS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
_CLASSES = tuple(_LABELS.values())
_VOTES = {label[0].upper(): label for label in _CLASSES}
_ACTORS = tuple(str(actor) for actor in range(1001, 1092))
_SENTENCES = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")
_NAME = re.compile(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_(LO|MD|HI|XX?)", re.ASCII)
_LAYOUT = "CREMA-D: a folder AudioWAV with 1001_DFA_ANG_XX.wav to 1091_... (WAV or FLAC)"


def read(root: Path) -> Iterator[Utterance | Problem]:
    """Rows of the audio files below `root`, sorted by path, then what is wrong with the tables of actors and votes.

    Raises:
        CorpusError: `root` cannot be read or holds no utterance of CREMA-D.
    """
    files = list_files(root, _LAYOUT)
    problems: list[Problem] = []
    sexes = _sexes(root, files, problems)
    votes = _votes(root, files, problems)
    rows = read_audio(root, files, _LAYOUT, partial(_parse, sexes, votes))
    return iter([*rows, *problems])


def _sexes(root: Path, files: Sequence[PurePosixPath], problems: list[Problem]) -> dict[str, str]:
    """Sex by actor; lines that do not tell it are added to `problems`."""
    sexes: dict[str, str] = {}
    for path, number, row in _table(root, files, "VideoDemographics.csv", ("ActorID", "Sex"), problems):
        if row["Sex"] in ("Female", "Male"):
            sexes[row["ActorID"]] = row["Sex"].lower()
        else:
            detail = f"line {number}: the sex of actor {row['ActorID']} is {row['Sex']!r}, neither Female nor Male"
            problems.append(Problem(path, "sex", detail, used=True))
    return sexes


def _votes(root: Path, files: Sequence[PurePosixPath], problems: list[Problem]) -> dict[str, Votes | None]:
    """Votes of those who heard the voice alone, by clip; lines that cannot be understood are added to `problems`."""
    votes: dict[str, Votes | None] = {}
    for path, number, row in _table(root, files, "tabulatedVotes.csv", ("", *_VOTES, "fileName"), problems):
        try:
            if int(row[""]) // 100_000 == 1:
                votes[row["fileName"]] = votes_of({label: int(row[letter]) for letter, label in _VOTES.items()})
        except (TypeError, ValueError):
            problems.append(Problem(path, "vote", f"line {number} holds no clip number and counts of votes", used=True))
    return votes


def _table(
    root: Path, files: Sequence[PurePosixPath], name: str, columns: Sequence[str], problems: list[Problem]
) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Path, line number and cells of the rows of the first file called `name`, if there is one with these columns."""
    path = next((path for path in files if path.name == name), None)
    if path is None:
        return
    table = csv.DictReader(read_text(root, path).splitlines(), restval="")
    try:
        missing = [column for column in columns if column not in (table.fieldnames or ())]
        if missing:
            raise csv.Error(f"no column {', '.join(map(repr, missing))}")
        for row in table:
            yield str(path), table.line_num, row
    except csv.Error as error:
        detail = f"line {table.line_num}: {error}; the table is not read from there on"
        problems.append(Problem(str(path), "table", detail, used=True))


def _parse(sexes: Mapping[str, str], votes: Mapping[str, Votes | None], path: PurePosixPath) -> Utterance | Problem:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return Problem(str(path), "name", "the name is not actor, sentence, emotion, level, as in 1001_DFA_ANG_XX")
    actor, sentence, emotion, level = match.groups()
    if actor not in _ACTORS:
        return Problem(str(path), "name", f"actor {actor} does not exist: {_ACTORS[0]} to {_ACTORS[-1]} do")
    if sentence not in _SENTENCES:
        return Problem(str(path), "name", f"sentence {sentence} does not exist: {' '.join(_SENTENCES)} do")
    if emotion not in _LABELS:
        return Problem(str(path), "label", f"emotion {emotion} does not exist: {' '.join(_LABELS)} do")
    clip = f"{actor}_{sentence}_{emotion}_{'XX' if level == 'X' else level}"
    return Utterance(
        id=clip,
        path=str(path),
        label=_LABELS[emotion],
        speaker=actor,
        text=sentence,
        sex=sexes.get(actor),
        votes=votes.get(clip),
    )


CORPUS = Corpus(
    name="cremad",
    title="CREMA-D",
    classes=_CLASSES,
    counts={label: 1087 if label == "neutral" else 1271 for label in _CLASSES},
    folds={"actors5": tuple(_ACTORS[fold::5] for fold in range(5))},
    licence="Open Database License 1.0",
    citation=(
        "H. Cao, D. G. Cooper, M. K. Keutmann, R. C. Gur, A. Nenkova, R. Verma, CREMA-D: Crowd-Sourced Emotional "
        "Multimodal Actors Dataset, IEEE Transactions on Affective Computing 5(4), 2014, pp. 377-390"
    ),
    source="https://github.com/CheyneyComputerScience/CREMA-D",
    read=read,
    default_folds="actors5",
    archives=(
        # The authors' mirror: their first repository has no bandwidth left for its recordings. Made on demand, so
        # that neither length nor checksum is known before; the archive's own checksums tell damage.
        Archive(
            "https://gitlab.com/api/v4/projects/cs-cooper-lab%2Fcrema-d-mirror/repository/archive.zip?path=AudioWAV",
            bytes=None,
            checksum=None,
        ),
        *(
            Archive(f"https://raw.githubusercontent.com/CheyneyComputerScience/CREMA-D/master/{name}", None, None)
            for name in ("VideoDemographics.csv", "processedResults/tabulatedVotes.csv")
        ),
    ),
)
