"""`sermll audit`: what a reviewer would ask of data and folds, asked before anything is trained.

Leaks are facts: a speaker, an utterance or a recording on two sides of a fold. Copies are recordings that are the same,
to the sample or to the ear. Warnings are what may be innocent and should be known: shared texts, one recording under
two labels, classes that nobody is tested on, levels that give a class away, clipped or narrow-band recordings.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sermll import config, quality
from sermll.design import Design
from sermll.fingerprint import fingerprint, near_duplicates
from sermll.progress import Progress
from sermll.protocol import SIDES, SPLITS, Fold, Leak
from sermll.quality import Quality
from sermll.shards import Waveforms

LEVEL_RANGE_DB = 6.0
"""Between the medians of the loudest and the softest class; from here on loudness alone tells classes apart."""
SHOWN = 8
"""Members of a finding that are named; `--json` and the page have all of them."""
_ONE_CLASS = {
    "train": "it cannot be learned",
    "dev": "it tells no epoch from another",
    "test": "who always says so is right",
}
"""What it means for a split."""


@dataclass(frozen=True)
class Copy:
    """Two recordings that are the same."""

    first: int
    """Row in the prepared table."""
    second: int
    identical: bool
    """To the sample; else to the ear."""
    similarity: float
    """1 for identical samples, else as `near_duplicates` scores it, which may be 1 too."""


@dataclass(frozen=True)
class Warn:
    """Something to know."""

    kind: str
    message: str
    members: tuple[str, ...] = ()
    """Utterances or speakers."""


@dataclass(frozen=True)
class Audit:
    """What was found."""

    design: Design
    copies: tuple[Copy, ...]
    qualities: tuple[Quality, ...]
    """By row of the prepared table."""

    @cached_property
    def leaks(self) -> list[Leak]:
        """What stands on two sides of a fold; copies that are not identical to the sample are of the kind 'copy'."""
        return [*self.design.leaks, *_leaking_copies(self.design.folds.folds, self.ids, self.copies)]

    @cached_property
    def warnings(self) -> list[Warn]:
        """What may be innocent."""
        return [
            *_label_noise(self),
            *_texts(self.design),
            *_balance(self.design),
            *_levels(self),
            *_recordings(self),
            *_formats(self.design),
        ]

    @property
    def ids(self) -> list[str]:
        """Utterance by row."""
        return self.design.prepared.table["id"].to_pylist()

    def as_json(self) -> dict[str, Any]:
        """Everything found, for programs."""
        labels = self.design.prepared.table["label"].to_pylist()
        return {
            "leaks": [
                {"fold": leak.fold, "kind": leak.kind, "sides": leak.sides, "members": leak.members, "text": str(leak)}
                for leak in self.leaks
            ],
            "duplicates": [
                {
                    "utterances": [self.ids[copy.first], self.ids[copy.second]],
                    "labels": [labels[copy.first], labels[copy.second]],
                    "identical": copy.identical,
                    "similarity": round(copy.similarity, 4),
                }
                for copy in self.copies
            ],
            "warnings": [
                {"kind": warning.kind, "text": warning.message, "members": warning.members} for warning in self.warnings
            ],
        }


def audit(data: Path, folds: str = "default", labels: str | dict[str, tuple[str, ...]] = "default") -> Audit:
    """Look at prepared data under a protocol.

    Args:
        data: folder written by `sermll prepare`.
        folds: a fold list of the corpus, or a file, as `protocol.folds`.
        labels: a label space or classes with their labels, as `data.labels`.

    Raises:
        SermllError: the data cannot be read, or labels or folds do not fit them. Folds that leak are no error here.
    """
    settings = {"name": "audit", "data": {"path": str(data), "labels": labels}, "protocol": {"folds": folds}}
    experiment = config.resolve(settings, {}, source="sermll audit")
    design = Design.of(experiment.data, experiment.protocol)
    design.prepared.verify()
    table = design.prepared.table
    waveforms = Waveforms(design.prepared.files, table["shard"].to_numpy(), table["row"].to_numpy())
    rates_hz = table["source_rate_hz"].to_pylist()
    prints, qualities = [], []
    with Progress("listening", table.num_rows) as progress:
        for row in range(table.num_rows):
            samples = waveforms[row]
            prints.append(fingerprint(samples))
            qualities.append(quality.measure(samples, rates_hz[row]))
            progress.advance()
    return Audit(design, tuple(_copies(table["audio_sha256"].to_pylist(), prints)), tuple(qualities))


def text(found: Audit) -> str:
    """The findings for the terminal."""
    prepared, folds = found.design.prepared, found.design.folds
    speakers = len(set(prepared.table["speaker"].to_pylist()))
    lines = [
        f"{prepared.manifest['title']}: {prepared.table.num_rows} utterances, {speakers} speakers, "
        f"{len(found.design.classes)} classes ({found.design.labelled.space.name})",
        f"protocol {folds.name}: {len(folds.folds)} folds, hash {found.design.hash}",
        "",
        f"{'fold':<6}{'train':>8}{'dev':>8}{'test':>8}  speakers",
    ]
    for fold in folds.folds:
        sizes = "".join(f"{len(fold.rows[split]):>8}" for split in SPLITS)
        people = "/".join(str(len(fold.speakers[split])) for split in SPLITS)
        lines.append(f"{fold.index:<6}{sizes}  {people}")
    for title, findings in (
        ("leaks", [str(leak) for leak in found.leaks]),
        ("copies", [_describe(found, copy) for copy in found.copies]),
        ("warnings", [_with_members(warning) for warning in found.warnings]),
    ):
        lines += ["", f"{title}: {len(findings) or 'none'}", *(f"  {finding}" for finding in findings)]
    return "\n".join(lines)


def _copies(audio_sha256: Sequence[str], prints: Sequence[Any]) -> Iterator[Copy]:
    """Pairs of recordings that are the same: identical ones, the first with each other, then near ones."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row, sha256 in enumerate(audio_sha256):
        groups[sha256].append(row)
    for rows in groups.values():
        yield from (Copy(rows[0], row, identical=True, similarity=1.0) for row in rows[1:])
    for first, second, similarity in near_duplicates(prints):
        if audio_sha256[first] != audio_sha256[second]:
            yield Copy(first, second, identical=False, similarity=similarity)


def _leaking_copies(folds: Sequence[Fold], ids: Sequence[str], copies: Sequence[Copy]) -> Iterator[Leak]:
    near = [copy for copy in copies if not copy.identical]
    for fold in folds:
        sides = {split: set(rows.tolist()) for split, rows in fold.rows.items()}
        for one, other in SIDES:
            pairs = [
                f"{ids[copy.first]} ~ {ids[copy.second]}"
                for copy in near
                if (copy.first in sides[one] and copy.second in sides[other])
                or (copy.second in sides[one] and copy.first in sides[other])
            ]
            if pairs:
                yield Leak(fold.index, "copy", (one, other), tuple(pairs))


def _label_noise(found: Audit) -> Iterator[Warn]:
    labels = found.design.prepared.table["label"].to_pylist()
    pairs = [copy for copy in found.copies if labels[copy.first] != labels[copy.second]]
    if pairs:
        named = tuple(
            f"{found.ids[c.first]} ({labels[c.first]}) = {found.ids[c.second]} ({labels[c.second]})" for c in pairs
        )
        yield Warn("label noise", f"{len(pairs)} recordings have two labels", named)
    ties = found.design.labelled.ties
    if ties:
        yield Warn("ties", f"{ties} utterances have no majority among the annotators")


def _texts(design: Design) -> Iterator[Warn]:
    """Sentences that are tested and were trained on: a model may know the words instead of the emotion."""
    texts = np.array(design.prepared.table["text"].to_pylist(), dtype=object)
    shares = []
    for fold in design.folds.folds:
        heard = {text for text in texts[fold.rows["train"]] if text is not None}
        tested = [text for text in texts[fold.rows["test"]] if text is not None]
        if tested:
            shares.append(sum(text in heard for text in tested) / len(fold.rows["test"]))
    if any(shares):
        percent = sorted(round(100 * share) for share in shares)
        span = f"{percent[0]}" if percent[0] == percent[-1] else f"{percent[0]} to {percent[-1]}"
        yield Warn("texts", f"{span} % of a fold's test utterances say a sentence that is also trained on")


def _balance(design: Design) -> Iterator[Warn]:
    labels, classes = design.labelled.labels, design.classes
    total = np.bincount(labels[design.labelled.kept], minlength=len(classes))
    if np.count_nonzero(total) == 1:
        only = classes[int(total.argmax())]
        yield Warn("balance", f"every utterance is {only}: no class can be told from another", (only,))
        return
    for fold in design.folds.folds:
        for split in SPLITS:
            counts = np.bincount(labels[fold.rows[split]], minlength=len(classes))
            present = tuple(name for name, count in zip(classes, counts, strict=True) if count)
            absent = tuple(name for name in classes if name not in present)
            if len(present) == 1:
                told = f"fold {fold.index}: every {split} utterance is {present[0]}: {_ONE_CLASS[split]}"
                yield Warn("balance", told, present)
            elif absent:
                yield Warn("balance", f"fold {fold.index}: no {split} utterance of {', '.join(absent)}", absent)
    kept = design.labelled.kept
    speakers = np.array(design.prepared.table["speaker"].to_pylist())
    single = tuple(name for name in sorted(set(speakers[kept])) if len(set(labels[kept & (speakers == name)])) == 1)
    if single:
        yield Warn("balance", f"{len(single)} speakers have utterances of one class only", single)
    if total.min() * 10 < total.max():
        least, most = classes[int(total.argmin())], classes[int(total.argmax())]
        yield Warn("balance", f"{most} has {total.max()} utterances, {least} {total.min()}: report UA, not WA alone")
    dropped = design.labelled.dropped
    if dropped:
        named = ", ".join(f"{label} {count}" for label, count in dropped.items())
        yield Warn(
            "labels", f"{sum(dropped.values())} utterances have no class in {design.labelled.space.name}: {named}"
        )


def _levels(found: Audit) -> Iterator[Warn]:
    medians = {name: float(np.median(levels)) for name, levels in by_class(found, "level_db").items() if len(levels)}
    if not medians:
        return
    soft, loud = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    if medians[loud] - medians[soft] >= LEVEL_RANGE_DB:
        yield Warn(
            "levels",
            f"{loud} is {medians[loud] - medians[soft]:.0f} dB louder than {soft} (medians): acted loudness, or gain? "
            "Models that hear absolute level may use either",
        )


def _recordings(found: Audit) -> Iterator[Warn]:
    """What is wrong with single recordings."""
    one = found.qualities
    for kind, message, wrong in (
        ("clipping", "are clipped", [quality.is_clipped(measured) for measured in one]),
        ("silence", "are nearly silent", [quality.is_nearly_silent(measured) for measured in one]),
        ("offset", "have a constant offset", [quality.is_offset(measured) for measured in one]),
        ("bandwidth", "hold less than their sampling rate promises", [quality.is_band_limited(m) for m in one]),
        ("bandwidth", "have a narrower band than the rest of the corpus", quality.narrow_band(one)),
    ):
        members = tuple(name for name, bad in zip(found.ids, wrong, strict=True) if bad)
        if members:
            yield Warn(kind, f"{len(members)} recordings {message}", members)


def _formats(design: Design) -> Iterator[Warn]:
    count = design.prepared.manifest["noted"].get("format", 0)
    if count:
        yield Warn("format", f"{count} recordings have another format than most, see problems.csv of the data")


def by_class(found: Audit, measure: str) -> dict[str, np.ndarray]:
    """A measure of `Quality` of the kept utterances, float64, by class; what was not measured is left out."""
    values = np.array([getattr(one, measure) for one in found.qualities], np.float64)
    labels = found.design.labelled.labels
    return {name: values[(labels == index) & np.isfinite(values)] for index, name in enumerate(found.design.classes)}


def _describe(found: Audit, copy: Copy) -> str:
    table = found.design.prepared.table
    labels, speakers = table["label"].to_pylist(), table["speaker"].to_pylist()
    how = "the same samples" if copy.identical else f"similarity {copy.similarity:.2f}"
    one, other = (f"{found.ids[row]} ({speakers[row]}, {labels[row]})" for row in (copy.first, copy.second))
    return f"{one} = {other}: {how}"


def _with_members(warning: Warn) -> str:
    if not warning.members or all(member in warning.message for member in warning.members):
        return warning.message
    more = ", ..." if len(warning.members) > SHOWN else ""
    return f"{warning.message}: {', '.join(warning.members[:SHOWN])}{more}"


def counts_by_speaker(found: Audit) -> tuple[list[str], np.ndarray]:
    """Speakers in order, and int64 (speakers, classes) their kept utterances."""
    labels, kept = found.design.labelled.labels, found.design.labelled.kept
    speakers = found.design.prepared.table["speaker"].to_pylist()
    counted = Counter(
        (speaker, int(label)) for speaker, label, keep in zip(speakers, labels, kept, strict=True) if keep
    )
    order = sorted(set(speakers))
    classes = range(len(found.design.classes))
    return order, np.array([[counted[speaker, index] for index in classes] for speaker in order], np.int64)
