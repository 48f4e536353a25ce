"""The page of `sermll audit`: findings first, then what the corpus holds, with pictures; nothing outside the file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sermll import page, pictures
from sermll.audio import SAMPLE_RATE_HZ, to_float
from sermll.audit import Audit, by_class, counts_by_speaker
from sermll.errors import DataError
from sermll.page import Html, tag
from sermll.protocol import SPLITS
from sermll.shards import Waveforms
from sermll.storage import send

WINDOW, HOP = 512, 160
SHOWN = 50
"""Rows of a table of findings; `--json` has all of them."""


def build(found: Audit, out: Path) -> Path:
    """Write `out`/index.html and its pictures as PNG and SVG.

    Returns:
        Path of the page.

    Raises:
        DataError: `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "index.html"
        title = f"Audit of {found.design.prepared.manifest['title']}"
        sections = [tag("section", *_findings(found, title)), tag("section", *_statistics(found, out))]
        path.write_text(page.page(title, sections), encoding="utf-8", newline="\n")
        send(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); give another --out") from None
    return path


def _findings(found: Audit, title: str) -> Iterator[Html]:
    design = found.design
    yield tag("h1", title)
    verdict = (
        f"{page.count(found.leaks, 'leak')}: numbers from these folds would be too high."
        if found.leaks
        else "No leak: no speaker, utterance or recording stands on two sides of a fold."
    )
    yield tag("p", verdict, class_="notice" if found.leaks else "result")
    yield page.facts(
        {
            "data": f"{design.prepared.path} (hash {design.prepared.data_hash[:12]})",
            "protocol": f"{design.folds.name}, {page.count(design.folds.folds, 'fold')} (hash {design.hash})",
            "label space": f"{design.labelled.space.name}: {', '.join(design.classes)}",
            "licence": design.prepared.manifest["licence"],
        }
    )
    yield from _listed("Leaks", ("fold", "kind", "between", "what"), [
        (leak.fold, leak.kind, " and ".join(leak.sides), f"{len(leak.members)}: {', '.join(leak.members[:20])}")
        for leak in found.leaks
    ])  # fmt: skip
    labels, ids = design.prepared.table["label"].to_pylist(), found.ids
    yield from _listed("Copies", ("recording", "label", "is also", "label", "similarity"), [
        (ids[copy.first], labels[copy.first], ids[copy.second], labels[copy.second], f"{copy.similarity:.3f}")
        for copy in found.copies
    ])  # fmt: skip
    yield from _listed("Warnings", ("kind", "what", "which"), [
        (warning.kind, warning.message, ", ".join(warning.members[:20]) + (" ..." if len(warning.members) > 20 else ""))
        for warning in found.warnings
    ])  # fmt: skip
    problems = design.prepared.manifest["problems"]
    if problems:
        yield tag("h3", "Left out when prepared")
        yield page.table(("reason", "files"), list(problems.items()))


def _listed(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[Html]:
    yield tag("h3", f"{title}: {len(rows) or 'none'}")
    if rows:
        yield page.table(header, rows[:SHOWN], words=range(len(header)))
    if len(rows) > SHOWN:
        yield tag("p", f"The first {SHOWN} are shown; --json has all.")


def _statistics(found: Audit, out: Path) -> Iterator[Html]:
    design = found.design
    table, labels = design.prepared.table, design.labelled.labels
    seconds = design.prepared.num_samples / SAMPLE_RATE_HZ
    speakers = np.array(table["speaker"].to_pylist())
    yield tag("h2", "The corpus")
    rows = []
    for index, name in enumerate(design.classes):
        members = labels == index
        low, middle, high = np.percentile(seconds[members], [5, 50, 95]) if members.any() else (np.nan,) * 3
        spoken = len(set(speakers[members]))
        rows.append(
            (
                name,
                members.sum(),
                spoken,
                f"{seconds[members].sum() / 60:.1f}",
                f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}",
            )
        )
    kept = design.labelled.kept
    rows.append(
        (
            "all",
            kept.sum(),
            len(set(speakers[kept])),
            f"{seconds[kept].sum() / 60:.1f}",
            f"{np.median(seconds[kept]):.2f}",
            "",
        )
    )
    yield page.table(("class", "utterances", "speakers", "minutes", "median s", "5 to 95 % s"), rows)
    yield tag("h3", "Folds")
    yield page.table(
        ("fold", *(f"{split}: utterances (speakers)" for split in SPLITS)),
        [
            (fold.index, *(f"{len(fold.rows[split])} ({len(fold.speakers[split])})" for split in SPLITS))
            for fold in design.folds.folds
        ],
    )
    names, counts = counts_by_speaker(found)
    lengths = {name: seconds[labels == index] for index, name in enumerate(design.classes)}
    drawn = {
        "balance": (
            "Speakers and classes",
            "Utterances of each speaker and class.",
            lambda: pictures.balance(counts, names, design.classes),
        ),
        "lengths": (
            "Lengths",
            "Median, middle half, 5 to 95 %.",
            lambda: pictures.spread(lengths, "duration in s"),
        ),
        "levels": (
            "Levels",
            "Level of what is spoken. Far apart, loudness or gain alone tells classes apart.",
            lambda: pictures.spread(by_class(found, "level_db"), "level in dB of full scale"),
        ),
        "spectrograms": (
            "One utterance of each class",
            "The one of median length, each over the 70 dB below its loudest point.",
            lambda: pictures.spectrograms(_spectra(found), HOP / SAMPLE_RATE_HZ, SAMPLE_RATE_HZ / 2),
        ),
    }
    for stem, (title, caption, draw) in drawn.items():
        yield tag("h3", title)
        yield page.figure(pictures.save(out / stem, draw), title, caption)


def _spectra(found: Audit) -> dict[str, np.ndarray]:
    """Spectrogram in dB, (frequencies, frames), of the utterance of median length of each class."""
    design = found.design
    table, num_samples = design.prepared.table, design.prepared.num_samples
    waveforms = Waveforms(design.prepared.files, table["shard"].to_numpy(), table["row"].to_numpy())
    spectra = {}
    for index, name in enumerate(design.classes):
        rows = np.flatnonzero(design.labelled.labels == index)
        if len(rows) == 0:
            continue
        row = int(rows[np.argsort(num_samples[rows], kind="stable")[len(rows) // 2]])
        samples = np.pad(to_float(waveforms[row]), (0, WINDOW))
        frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP] * np.hanning(WINDOW)
        spectra[name] = 20 * np.log10(np.abs(np.fft.rfft(frames)).T + 1e-5)
    return spectra
