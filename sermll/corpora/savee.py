"""SAVEE, the Surrey Audio-Visual Expressed Emotion database: four English men, seven emotions.

Source: http://kahlan.eps.surrey.ac.uk/savee/, after registration; folder `AudioData`, 44.1 kHz mono WAV.

Layout: `AudioData/DC/a01.wav`, a folder for each speaker (DC, JE, JK, KL), or all in one folder, `DC_a01.wav`. Letters
for the emotion, then the number of the sentence:

| letters | emotion | sentences |
|---|---|---|
| n | neutral | 01 to 30 |
| a, d, f, h, sa, su | anger, disgust, fear, happiness, sadness, surprise | 01 to 15 |

Counts: 480 utterances, 120 of each speaker; neutral 120, the six others 60.

No fold list: the protocol is to leave one speaker out, four folds.

Traps:
- Sadness is sa and surprise su; a lone s is nothing.
- All speakers say the same sentences, so every split by speaker has the same texts on both sides.
- A number counts the sentences of one emotion, so texts are named a01, sa01. Three sentences are common to all
  emotions, and twelve of emotions are said neutrally too; file names do not tell which, so a sentence may have
  several texts.
- There are only four speakers, all male: results of single folds lie far apart.

Licence: free for research, after registration. Citation: S. Haq, P. J. B. Jackson, "Multimodal Emotion Recognition",
in W. Wang (ed.), Machine Audition: Principles, Algorithms and Systems, IGI Global, 2010, pp. 398-423.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sermll.corpora.folder import read_folder
from sermll.rows import Corpus, Problem, Utterance

_CLASSES = ("neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise")
_LABELS = {
    "a": "anger",
    "d": "disgust",
    "f": "fear",
    "h": "happiness",
    "n": "neutral",
    "sa": "sadness",
    "su": "surprise",
}
_SPEAKERS = ("DC", "JE", "JK", "KL")
_NAME = re.compile(r"(?:([A-Z]{2})_)?(([a-z]{1,2})(\d\d))", re.ASCII)
_LAYOUT = "SAVEE: folders DC, JE, JK, KL with a01.wav to su15.wav, or DC_a01.wav to KL_su15.wav (WAV or FLAC)"


def read(root: Path) -> Iterator[Utterance | Problem]:
    """Rows of the audio files below `root`, sorted by path.

    Raises:
        CorpusError: `root` cannot be read or holds no utterance of SAVEE.
    """
    return read_folder(root, _LAYOUT, _parse)


def _parse(path: PurePosixPath) -> Utterance | Problem:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return Problem(str(path), "name", "the name is not emotion and sentence, as in DC/sa07 or DC_sa07")
    speaker, text, letters, number = match.groups()
    speaker = speaker or path.parent.name
    if speaker not in _SPEAKERS:
        return Problem(str(path), "name", f"speaker {speaker!r} does not exist: {' '.join(_SPEAKERS)} do")
    if letters not in _LABELS:
        return Problem(str(path), "label", f"emotion letters {letters} do not exist: {' '.join(_LABELS)} do")
    label = _LABELS[letters]
    last = 30 if label == "neutral" else 15
    if not 1 <= int(number) <= last:
        return Problem(str(path), "name", f"{label} has no sentence {number}: 01 to {last} exist")
    return Utterance(id=f"{speaker}_{text}", path=str(path), label=label, speaker=speaker, text=text, sex="male")


CORPUS = Corpus(
    name="savee",
    title="SAVEE",
    classes=_CLASSES,
    counts={label: 120 if label == "neutral" else 60 for label in _CLASSES},
    folds={},
    licence="free for research, after registration",
    citation=(
        "S. Haq, P. J. B. Jackson, Multimodal Emotion Recognition, in W. Wang (ed.), Machine Audition: Principles, "
        "Algorithms and Systems, IGI Global, 2010, pp. 398-423"
    ),
    source="http://kahlan.eps.surrey.ac.uk/savee/, after registration",
    read=read,
)
