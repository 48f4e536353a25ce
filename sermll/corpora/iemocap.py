"""IEMOCAP, the Interactive Emotional Dyadic Motion Capture database: ten actors in five sessions of dialogs.

Source: https://sail.usc.edu/iemocap/, on a signed release form; folder `IEMOCAP_full_release`. Utterances cut from
the dialogs, 16 kHz mono WAV, 4.55 s long on average and 34.1 s at most.

Layout: below `Session1` to `Session5`,

| path | what |
|---|---|
| `sentences/wav/<dialog>/<dialog>_F000.wav` | an utterance: F or M speaks, then its number |
| `dialog/EmoEvaluation/<dialog>.txt` | labels; only the files directly in that folder |
| `dialog/transcriptions/<dialog>.txt` | words: `Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.` |

A dialog is `Ses01F_impro01` or `Ses01F_script01_1`: session, who wore the markers, what was played. Its label file has
blocks with an empty line between them and tabs between the fields:

| line | meaning |
|---|---|
| `[6.2901 - 8.2357] Ses01F_impro01_F000 neu [2.5000, 3.0000, 2.5000]` | label; valence, activation, dominance |
| `C-E2: Neutral; ()` | what an evaluator chose, one category or several |
| `C-F1:` or `C-M1:` | what the actors chose for themselves |
| `A-E3: val 3; act 2; dom 2; ()` | an evaluator's valence, activation, dominance |

Counts: 10039 utterances; ang 1103, hap 595, exc 1041, neu 1708, sad 1084, fru 1849, fea 40, sur 107, dis 2. Two labels
are no classes: oth 3, and xxx (no majority) 2507. The usual task has 5531: ang, hap with exc, neu, sad.

No fold list: the protocol is to leave one session out, five folds. The usual 5531 by session: 1085, 1023, 1151, 1031,
1241.

Traps:
- The letter in `Ses01F` says who wore the markers. Who speaks is the first letter of the last part: the man speaks
  `Ses01F_impro01_M000`. Speakers are named by session and that letter: Ses01M.
- `Categorical`, `Attribute` and `Self-evaluation` in EmoEvaluation hold files of single raters in another format, and
  `dialog/wav` holds whole dialogs; neither is read. AppleDouble files `._*` stand beside the real ones.
- Votes are those of evaluators (C-E), not the actors' own. An evaluator who chose several categories splits one vote
  among them, so votes may be fractions.
- In scripted dialogs the same texts recur in all sessions, so every split shares texts. The text of an utterance is
  its words without case, punctuation and events such as [LAUGHTER].
- Results without exc, on improvised dialogs alone, or on random splits are another task.

Licence: for research, on a signed release form. Citation: C. Busso, M. Bulut, C.-C. Lee, A. Kazemzadeh, E. Mower, S.
Kim, J. N. Chang, S. Lee, S. S. Narayanan, "IEMOCAP: Interactive emotional dyadic motion capture database", Language
Resources and Evaluation 42(4), 2008, pp. 335-359.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from sermll.corpora.folder import Label, list_files, read_blocks, read_labelled, read_text, votes_of
from sermll.rows import Corpus, Problem, Utterance

_COUNTS = {
    "ang": 1103,
    "hap": 595,
    "exc": 1041,
    "neu": 1708,
    "sad": 1084,
    "fru": 1849,
    "fea": 40,
    "sur": 107,
    "dis": 2,
    "oth": 3,
    "xxx": 2507,
}
_OTHER = ("oth", "xxx")
_CATEGORIES = {
    "anger": "ang",
    "happiness": "hap",
    "excited": "exc",
    "neutral": "neu",
    "neutral state": "neu",
    "sadness": "sad",
    "frustration": "fru",
    "fear": "fea",
    "surprise": "sur",
    "disgust": "dis",
    "other": "oth",
}
_DIALOG = r"Ses0([1-5])[FM]_(?:impro|script)\d\d[a-z]?(?:_\d[a-z]?)?"
_NAME = re.compile(rf"({_DIALOG})(?:_([FM])\w{{3}})?", re.ASCII)
_MEAN = r"(\d+(?:\.\d+)?)"
_HEADER = re.compile(rf"\[[\d.]+ *- *[\d.]+\]\s+(\w+)\s+(\w+)\s+\[{_MEAN}, *{_MEAN}, *{_MEAN}\]", re.ASCII)
_EVALUATOR = re.compile(r"C-E\d+:([^(]*)", re.ASCII)
_TRANSCRIPTION = re.compile(r"(\w+) \[[^\]]*\]:(.*)")
_LAYOUT = (
    "IEMOCAP: Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav and "
    "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt to Session5/..."
)


def read(root: Path) -> Iterator[Utterance | Problem]:
    """Rows of the utterances below `root`, sorted by path, then what is wrong with labels.

    Raises:
        CorpusError: `root` cannot be read or holds no labelled utterance of IEMOCAP.
    """
    files = list_files(root, _LAYOUT)
    parse = partial(_parse, _texts(root, files))
    return read_labelled(root, files, _LAYOUT, _labels(root, files), parse)


def _labels(root: Path, files: Sequence[PurePosixPath]) -> Iterator[Label | Problem]:
    for path in files:
        if path.suffix == ".txt" and path.parent.name == "EmoEvaluation":
            for block in read_blocks(root, path, "["):
                yield from _label(str(path), block)


def _label(path: str, block: Sequence[tuple[int, str]]) -> Iterator[Label | Problem]:
    (number, header), *raters = block
    if header.startswith("%"):  # the names of the fields
        return
    match = _HEADER.fullmatch(header)
    if match is None:
        form = "[start - end] utterance label [valence, activation, dominance]"
        yield Problem(path, "label-line", f"line {number} is not {form}: {header[:60]!r}")
        return
    utterance, label, *means = match.groups()
    if label not in _COUNTS:
        yield Problem(path, "label", f"line {number}: {utterance} is {label}, which is none of {' '.join(_COUNTS)}")
        return
    counts: defaultdict[str, float] = defaultdict(float)
    for line, rater in raters:
        if rater.startswith(("A-", "C-F", "C-M")):
            continue
        chosen = _chosen(rater)
        if not chosen:
            detail = f"line {line}, of {utterance}, holds no known categories: {rater[:60]!r}"
            yield Problem(path, "vote", detail, used=True)
        for category in chosen:
            counts[category] += 1 / len(chosen)
    valence, arousal, dominance = map(float, means)
    yield Label(path, number, utterance, label, votes_of(counts), valence, arousal, dominance)


def _chosen(line: str) -> list[str]:
    """The categories an evaluator chose; empty if the line cannot be understood as a whole."""
    match = _EVALUATOR.match(line)
    names = [name.strip().lower() for name in match[1].split(";") if name.strip()] if match else []
    return [_CATEGORIES[name] for name in names] if all(name in _CATEGORIES for name in names) else []


def _texts(root: Path, files: Sequence[PurePosixPath]) -> dict[str, str]:
    """The words of each utterance, where transcriptions exist."""
    texts: dict[str, str] = {}
    for path in files:
        if path.suffix == ".txt" and path.parent.name == "transcriptions":
            for line in read_text(root, path).split("\n"):
                if match := _TRANSCRIPTION.match(line):
                    texts[match[1]] = _words(match[2])
    return texts


def _words(text: str) -> str:
    spoken = re.sub(r"\[[^\]]*\]", " ", text.lower())  # [LAUGHTER] and the like
    return " ".join(re.findall(r"\w+", re.sub(r"['\u2019]", "", spoken)))


def _parse(texts: Mapping[str, str], path: PurePosixPath, labels: Mapping[str, Label]) -> Utterance | Problem | None:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return Problem(str(path), "name", "the name is not dialog, speaker and number, as in Ses01F_impro01_M000")
    dialog, session, letter = match.groups()
    if letter is None:  # a whole dialog
        return None
    label = labels.get(path.stem)
    if label is None:
        return Problem(str(path), "no-label", f"no label for it in dialog/EmoEvaluation/{dialog}.txt")
    return Utterance(
        id=path.stem,
        path=str(path),
        label=label.label,
        speaker=f"Ses0{session}{letter}",
        session=session,
        text=texts.get(path.stem) or None,
        sex="female" if letter == "F" else "male",
        votes=label.votes,
        valence=label.valence,
        arousal=label.arousal,
        dominance=label.dominance,
    )


CORPUS = Corpus(
    name="iemocap",
    title="IEMOCAP",
    classes=tuple(label for label in _COUNTS if label not in _OTHER),
    counts=_COUNTS,
    folds={},
    licence="for research, on a signed release form",
    citation=(
        "C. Busso, M. Bulut, C.-C. Lee, A. Kazemzadeh, E. Mower, S. Kim, J. N. Chang, S. Lee, S. S. Narayanan, "
        "IEMOCAP: Interactive emotional dyadic motion capture database, Language Resources and Evaluation 42(4), "
        "2008, pp. 335-359"
    ),
    source="https://sail.usc.edu/iemocap/, on a signed release form",
    read=read,
    other_labels=_OTHER,
    default_labels="4class",
    default_folds="session",
)
