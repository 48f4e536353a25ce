"""EMO-DB, the Berlin Database of Emotional Speech: ten German actors, ten sentences, seven emotions.

Source: http://emodb.bilderbar.info, archive `download.zip`, 16 kHz mono 16-bit WAV, 1.2 to 9.0 s long.

Layout: `wav/03a01Fa.wav`. Reading the name from the left:

| characters | meaning |
|---|---|
| 1-2 speaker | 03 10 11 12 15 male, 08 09 13 14 16 female |
| 3-5 text | a01 a02 a04 a05 a07 (short), b01 b02 b03 b09 b10 (long) |
| 6 emotion | by its German name: W anger, L boredom, E disgust, A fear, F happiness, N neutral, T sadness |
| 7 version | a, b, c, ... of several recordings |

Counts: 535 utterances; anger 127, boredom 81, disgust 46, fear 69, happiness 71, neutral 79, sadness 62.

No fold list: the protocol is to leave one speaker out.

Traps:
- Only recordings that listeners recognised (80 %) and found natural (60 %) were kept, so the corpus is easy,
  and speakers are uneven: 35 to 71 utterances each, down to one of a class (fear of 09, disgust of 03 and
  10).
- All speakers say the same ten sentences, so every split by speaker has the same texts on both sides.
- The letters are German: A is Angst (fear), not anger; E is Ekel (disgust); T is Trauer (sadness).
- The EmoBox folds share all ten speakers between training and test.

Licence: free to use with citation. Citation: F. Burkhardt, A. Paeschke, M. Rolfes, W. F. Sendlmeier, B.
Weiss, "A Database of German Emotional Speech", Interspeech 2005, pp. 1517-1520.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sermll.corpora.folder import read_folder
from sermll.rows import Archive, Corpus, Problem, Utterance

_COUNTS = {
    "anger": 127,
    "boredom": 81,
    "disgust": 46,
    "fear": 69,
    "happiness": 71,
    "neutral": 79,
    "sadness": 62,
}
_LABELS = {
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happiness",
    "N": "neutral",
    "T": "sadness",
}
_SEX = {
    **dict.fromkeys(("03", "10", "11", "12", "15"), "male"),
    **dict.fromkeys(("08", "09", "13", "14", "16"), "female"),
}
_TEXTS = ("a01", "a02", "a04", "a05", "a07", "b01", "b02", "b03", "b09", "b10")
_NAME = re.compile(r"(\d\d)([ab]\d\d)([A-Z])[a-z]", re.ASCII)
_LAYOUT = "EMO-DB: a folder wav with 03a01Fa.wav to 16b10Wb.wav (WAV or FLAC)"


def read(root: Path) -> Iterator[Utterance | Problem]:
    """Rows of the audio files below `root`, sorted by path.

    Raises:
        CorpusError: `root` cannot be read or holds no utterance of EMO-DB.
    """
    return read_folder(root, _LAYOUT, _parse)


def _parse(path: PurePosixPath) -> Utterance | Problem:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return Problem(str(path), "name", "the name is not speaker, text, emotion, version, as in 03a01Fa")
    speaker, text, letter = match.groups()
    if speaker not in _SEX:
        return Problem(str(path), "name", f"speaker {speaker} does not exist: {' '.join(sorted(_SEX))} do")
    if text not in _TEXTS:
        return Problem(str(path), "name", f"text {text} does not exist: {' '.join(_TEXTS)} do")
    if letter not in _LABELS:
        return Problem(str(path), "label", f"emotion letter {letter} does not exist: {' '.join(_LABELS)} do")
    return Utterance(id=path.stem, path=str(path), label=_LABELS[letter], speaker=speaker, text=text, sex=_SEX[speaker])


CORPUS = Corpus(
    name="emodb",
    title="EMO-DB",
    classes=tuple(_COUNTS),
    counts=_COUNTS,
    folds={},
    licence="free to use with citation",
    citation=(
        "F. Burkhardt, A. Paeschke, M. Rolfes, W. F. Sendlmeier, B. Weiss, A Database of German Emotional "
        "Speech, Interspeech 2005, pp. 1517-1520"
    ),
    source="http://emodb.bilderbar.info",
    read=read,
    archives=(Archive("http://emodb.bilderbar.info/download/download.zip", bytes=40_567_066, checksum=None),),
)
