"""RAVDESS, the Ryerson Audio-Visual Database of Emotional Speech and Song: its spoken, audio-only part.

Source: https://zenodo.org/record/1188976, archive `Audio_Speech_Actors_01-24.zip`, 48 kHz 16-bit WAV.

Layout: `Actor_01` to `Actor_24`, files `MM-VV-EE-II-SS-RR-AA.wav`:

| field | values |
|---|---|
| MM modality | 01 audio and video, 02 video, 03 audio; only 03 is used |
| VV vocal channel | 01 speech, 02 song; only 01 is used |
| EE emotion | 01 neutral 02 calm 03 happy 04 sad 05 angry 06 fearful 07 disgust 08 surprised |
| II intensity | 01 normal, 02 strong (neutral has no strong one) |
| SS statement | 01 "Kids are talking by the door", 02 "Dogs are sitting by the door" |
| RR repetition | 01, 02 |
| AA actor | 01 to 24, odd male, even female |

Counts: 1440 utterances, 60 of each actor; neutral 96, the seven others 192.

Folds of four actors, 240 utterances each (16 neutral, 32 of each other class): `hicmae` (actors in order) and
`emobox` (those of the EmoBox benchmark).

Traps:
- A common download holds everything twice, `Actor_*` again inside `audio_speech_actors_01-24`: copies are
  skipped.
- Five files are stereo: Actor_01 03-01-02-01-01-02-01 and 03-01-08-01-02-02-01, Actor_05
  03-01-02-01-02-02-05, Actor_20 03-01-03-01-02-01-20 and 03-01-06-01-01-02-20.
- The two repetitions 03-01-03-01-02-01-07 and 03-01-03-01-02-02-07 are the same recording.
- There are two statements only, so every split has the same texts on both sides.
- Published accuracies above 90 % mostly come from random splits, in which all actors stand on both sides.

Licence: CC BY-NC-SA 4.0. Citation: S. R. Livingstone, F. A. Russo, "The Ryerson Audio-Visual Database of
Emotional Speech and Song (RAVDESS)", PLoS ONE 13(5): e0196391, 2018.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sermll.corpora.folder import read_folder
from sermll.rows import Archive, Corpus, Problem, Utterance

_CLASSES = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_NAME = re.compile("-".join([r"(\d\d)"] * 7), re.ASCII)
_LAYOUT = "RAVDESS speech: Actor_01/03-01-01-01-01-01-01.wav to Actor_24/... (WAV or FLAC)"


def read(root: Path) -> Iterator[Utterance | Problem]:
    """Rows of the spoken audio files below `root`, sorted by path; songs and videos are left out.

    Raises:
        CorpusError: `root` cannot be read or holds no RAVDESS speech.
    """
    return read_folder(root, _LAYOUT, _parse)


def _parse(path: PurePosixPath) -> Utterance | Problem | None:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return Problem(str(path), "name", "the name is not seven fields of two digits, as in 03-01-01-01-01-01-01")
    modality, vocal, emotion, intensity, statement, repetition, actor = match.groups()
    fields = (
        ("modality", modality, 3),
        ("vocal channel", vocal, 2),
        ("intensity", intensity, 2),
        ("statement", statement, 2),
        ("repetition", repetition, 2),
        ("actor", actor, 24),
    )
    for field, value, largest in fields:
        if not 1 <= int(value) <= largest:
            return Problem(str(path), "name", f"{field} {value} does not exist: 01 to {largest:02d} do")
    if modality != "03" or vocal != "01":
        return None
    if not 1 <= int(emotion) <= len(_CLASSES):
        return Problem(str(path), "label", f"emotion {emotion} does not exist: 01 to {len(_CLASSES):02d} do")
    label = _CLASSES[int(emotion) - 1]
    if label == "neutral" and intensity == "02":
        return Problem(str(path), "name", "neutral has no strong intensity (02)")
    return Utterance(
        id=path.stem,
        path=str(path),
        label=label,
        speaker=actor,
        text=statement,
        sex="male" if int(actor) % 2 else "female",
    )


def _actors(*groups: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"{actor:02d}" for actor in group) for group in groups)


CORPUS = Corpus(
    name="ravdess",
    title="RAVDESS speech",
    classes=_CLASSES,
    counts={label: 96 if label == "neutral" else 192 for label in _CLASSES},
    folds={
        "hicmae": _actors(*(tuple(range(first, first + 4)) for first in range(1, 25, 4))),
        "emobox": _actors(
            (1, 11, 20, 21), (4, 10, 12, 14), (8, 9, 19, 23), (3, 5, 7, 24), (2, 15, 16, 18), (6, 13, 17, 22)
        ),
    },
    licence="CC BY-NC-SA 4.0",
    citation=(
        "S. R. Livingstone, F. A. Russo, The Ryerson Audio-Visual Database of Emotional Speech and Song "
        "(RAVDESS), PLoS ONE 13(5): e0196391, 2018"
    ),
    source="https://zenodo.org/record/1188976",
    read=read,
    default_folds="hicmae",
    archives=(
        Archive(
            "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip?download=1",
            bytes=208_468_073,
            checksum="md5:bc696df654c87fed845eb13823edef8a",
        ),
    ),
)
