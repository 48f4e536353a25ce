"""MSP-IMPROV: twelve actors in six sessions of two, improvising around twenty target sentences.

Source: https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Improv.html, on an academic licence from the
University of Texas at Dallas. Speaking turns, 44.1 or 48 kHz WAV.

Layout: `session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav` to `session6`, often in a folder `Audio`. Reading the name
from the left:

| field | values |
|---|---|
| S01A scenario | sentence 01 to 20, target emotion A angry, H happy, N neutral, S sad |
| F01 speaker | F female or M male, session 01 to 06 |
| P recording | P talk between takes, R sentence read, S rest of an improvisation, T sentence improvised |
| FM01 turn | who speaks to whom, number |

Labels of all turns stand in one file, `Evalution.txt` or `Evaluation.txt`, in blocks with an empty line between them:

| line | meaning |
|---|---|
| `UTD-IMPROV-S01A-F01-P-FM01.avi; N; A:3.0; V:3.0; D:3.0 ; N:4.0;` | label, then the means of the raters |
| `<rater>; Neutral; ...` | a rater's Angry, Happy, Sad, Neutral or Other, and more |

Labels are A angry, S sad, H happy, N neutral, O other, X no agreement; means are A activation, V valence, D dominance,
N naturalness.

Counts: 8438 utterances; angry 792, sad 885, happy 2644, neutral 3477. Two labels are no classes: other 85, no agreement
555. By recording:

| | all | angry | sad | happy | neutral | other | no agreement |
|---|---|---|---|---|---|---|---|
| P | 2785 | 38 | 66 | 1372 | 1164 | 11 | 134 |
| R | 620 | 169 | 80 | 88 | 241 | 3 | 39 |
| S | 4381 | 470 | 633 | 1048 | 1789 | 70 | 371 |
| T | 652 | 115 | 106 | 136 | 283 | 1 | 11 |

No fold list: the protocol is to leave one session out, six folds.

Traps:
- The name tells the target emotion, not the label; labels are what raters perceived.
- Labels name the videos, UTD-IMPROV-*.avi; recordings are MSP-IMPROV-*.wav. A space stands before the last `; N:`.
- Means may be NaN, read as None. Some lines of raters stand there twice; exact copies count once.
- Some who use the corpus turn activation round (6 - A): 1 seems to mean active and 5 calm, the reverse of IEMOCAP.
  Arousal is given as it stands in the file.
- The twenty sentences of R and T are the same in all sessions and for all target emotions, so every split shares
  texts. The words of P and S are free.
- A popular list of folds has the test session as validation set, in all six folds.

Licence: academic, signed with the University of Texas at Dallas. Citation: C. Busso, S. Parthasarathy, A. Burmania, M.
AbdelWahab, N. Sadoughi, E. Mower Provost, "MSP-IMPROV: An Acted Corpus of Dyadic Interactions to Study Emotion
Perception", IEEE Transactions on Affective Computing 8(1), 2017, pp. 67-80.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from sermll.corpora.folder import Label, list_files, read_blocks, read_labelled, votes_of
from sermll.rows import Corpus, Problem, Utterance

_COUNTS = {"angry": 792, "sad": 885, "happy": 2644, "neutral": 3477, "other": 85, "no agreement": 555}
_OTHER = ("other", "no agreement")
_LETTERS = {"A": "angry", "S": "sad", "H": "happy", "N": "neutral", "O": "other", "X": "no agreement"}
_CATEGORIES = ("angry", "sad", "happy", "neutral", "other")
_NAME = re.compile(r"MSP-IMPROV-S(\d\d)[AHNS]-([FM])0([1-6])-([PRST])-[FM]{2}\d+", re.ASCII)
_MEAN = r"(\d+(?:\.\d+)?|NaN)"
_HEADER = re.compile(
    rf"(?:UTD|MSP)-IMPROV-(\S+)\.(?:avi|wav); *(\w) *; *A:{_MEAN} *; *V:{_MEAN} *; *D:{_MEAN} *;.*", re.ASCII
)
_LAYOUT = (
    "MSP-IMPROV: session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav to session6/... and Evalution.txt or Evaluation.txt"
)


def read(root: Path) -> Iterator[Utterance | Problem]:
    """Rows of the turns below `root`, sorted by path, then what is wrong with labels.

    Raises:
        CorpusError: `root` cannot be read or holds no labelled turn of MSP-IMPROV.
    """
    files = list_files(root, _LAYOUT)
    return read_labelled(root, files, _LAYOUT, _labels(root, files), _parse)


def _labels(root: Path, files: Sequence[PurePosixPath]) -> Iterator[Label | Problem]:
    for path in files:
        if path.name in ("Evalution.txt", "Evaluation.txt"):
            for block in read_blocks(root, path, "UTD-IMPROV-", "MSP-IMPROV-"):
                yield from _label(str(path), block)


def _label(path: str, block: Sequence[tuple[int, str]]) -> Iterator[Label | Problem]:
    (number, header), *raters = block
    match = _HEADER.fullmatch(header)
    if match is None:
        form = "UTD-IMPROV-<turn>.avi; label; A:activation; V:valence; D:dominance; N:naturalness;"
        yield Problem(path, "label-line", f"line {number} is not {form}: {header[:60]!r}")
        return
    turn, letter, *means = match.groups()
    if letter not in _LETTERS:
        yield Problem(path, "label", f"line {number}: {turn} is {letter}, which is none of {' '.join(_LETTERS)}")
        return
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for line, text in raters:
        rater, category = (part.strip().lower() for part in f"{text};".split(";")[:2])
        if first.get(rater) == text:  # an exact copy
            continue
        if rater not in first and category in _CATEGORIES:
            counts[category] += 1
        else:
            why = "is another of the same rater" if rater in first else "holds no known category"
            yield Problem(path, "vote", f"line {line}, of {turn}, {why}: {text[:60]!r}", used=True)
        first.setdefault(rater, text)
    activation, valence, dominance = (None if mean == "NaN" else float(mean) for mean in means)
    label = _LETTERS[letter]
    yield Label(path, number, f"MSP-IMPROV-{turn}", label, votes_of(counts), valence, activation, dominance)


def _parse(path: PurePosixPath, labels: Mapping[str, Label]) -> Utterance | Problem:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return Problem(str(path), "name", "the name is not like MSP-IMPROV-S01A-F01-P-FM01")
    label = labels.get(path.stem)
    if label is None:
        return Problem(str(path), "no-label", "no label for it in Evalution.txt or Evaluation.txt")
    sentence, sex, session, recording = match.groups()
    return Utterance(
        id=path.stem,
        path=str(path),
        label=label.label,
        speaker=f"{sex}0{session}",
        session=session,
        text=sentence if recording in "RT" else None,
        sex="female" if sex == "F" else "male",
        votes=label.votes,
        valence=label.valence,
        arousal=label.arousal,
        dominance=label.dominance,
    )


CORPUS = Corpus(
    name="msp_improv",
    title="MSP-IMPROV",
    classes=tuple(label for label in _COUNTS if label not in _OTHER),
    counts=_COUNTS,
    folds={},
    licence="academic, signed with the University of Texas at Dallas",
    citation=(
        "C. Busso, S. Parthasarathy, A. Burmania, M. AbdelWahab, N. Sadoughi, E. Mower Provost, MSP-IMPROV: An Acted "
        "Corpus of Dyadic Interactions to Study Emotion Perception, IEEE Transactions on Affective Computing 8(1), "
        "2017, pp. 67-80"
    ),
    source="https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Improv.html, on an academic licence",
    read=read,
    other_labels=_OTHER,
    default_folds="session",
)
