"""How the results of `sermll robustness` are shown: text for the terminal, table.csv, a picture and a page.

All of it is told by the content of robustness.json, which `sermll.robustness` writes.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sermll import page, pictures
from sermll.page import Html, tag
from sermll.storage import send
from sermll.tables import leak_notices, percent, with_interval

Json = dict[str, Any]
SCORES = {"ua": "UA", "wa": "WA", "macro_f1": "macro F1"}
MEAN = "mean of noises"
_WIDTH, _NAME_WIDTH, _CELL_WIDTH = 100, 28, 8

_HOW = (
    "SNR is the active speech level of the utterance (ITU-T P.56, method B: pauses do not count) minus the level of "
    "the noise (root mean square over all of the utterance). Sums are not clipped.",
    "An utterance meets one segment of each noise, drawn by seed, utterance and noise: the same at every SNR and in "
    "every run, so that runs can be compared in pairs.",
    "Intervals of 95 %, by bootstrap over speakers: they say how a score varies with the speakers tested, not with "
    "seeds or noises. Under the mean of noises, UA and WA are means over the noises, and macro F1 is that of the "
    "counts of all noises together.",
)


def text(found: Json) -> str:
    """The results for the terminal, at most 100 columns wide."""
    levels = found["snr_db"]
    shown = levels[: (_WIDTH - _NAME_WIDTH) // _CELL_WIDTH]
    by_noise = _by_noise(found)

    def line(name: str, cells: Sequence[str]) -> str:
        name = name if len(name) < _NAME_WIDTH else name[: _NAME_WIDTH - 2] + "…"
        return f"{name:<{_NAME_WIDTH}}" + "".join(f"{cell:>{_CELL_WIDTH}}" for cell in cells)

    lines = [
        f"{found['run']}  {found['title']}, protocol {found['protocol']}: {page.count(found['folds'], 'fold')}",
        f"clean UA {with_interval(found['clean']['ua'])}, chance {percent(found['chance'])}",
        *_notes(found),
        "",
        line("UA in %", [f"{level:g} dB" for level in shown]),
    ]
    lines += [line(name, [percent(row["ua"]["value"]) for row in rows[: len(shown)]]) for name, rows in by_noise]
    mean = found["mean"][: len(shown)]
    if len(by_noise) > 1:
        lines.append(line(MEAN, [percent(row["ua"]["value"]) for row in mean]))
    for end in ("low", "high"):
        lines.append(line(f"  95 % interval, {end}", [percent(row["ua"][end]) for row in mean]))
    if len(shown) < len(levels):
        lines.append(f"the other {len(levels) - len(shown)} levels stand in table.csv")
    return "\n".join(line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…" for line in lines) + "\n"


def write_table(found: Json, path: Path) -> None:
    """Write every score with its interval, shares of 0..1, as CSV: clean, then each noise, then their mean."""
    names = [f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")]
    rows = [("clean", "", "", found["clean"])]
    rows += [("noise", row["noise"], row["snr_db"], row) for row in found["conditions"]]
    rows += [("mean", "", row["snr_db"], row) for row in found["mean"]]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("kind", "noise", "snr_db", *names, "leaks"))
        for kind, noise, level, row in rows:
            cells = [row[score][end] for score in SCORES for end in ("value", "low", "high")]
            table.writerow((kind, noise, level, *cells, "; ".join(found["leaks"])))


def build(found: Json, out: Path) -> Path:
    """Write `out`/index.html, curves.png, curves.svg and table.csv.

    Args:
        found: content of robustness.json.
        out: an existing folder.

    Returns:
        Path of the page.
    """
    write_table(found, out / "table.csv")
    path = out / "index.html"
    title = f"Noise robustness of {found['run']}"
    sections = [tag("section", *_headline(found, title), *_scores(found), *_curves(found, out), *_how(found))]
    path.write_text(page.page(title, sections), encoding="utf-8", newline="\n")
    send(out)
    return path


def _headline(found: Json, title: str) -> Iterator[Html]:
    yield tag("h1", title)
    clean, lowest = found["clean"]["ua"], found["mean"][-1]
    number = tag("span", f"UA {percent(clean['value'])} → {percent(lowest['ua']['value'])} %", class_="score")
    noises = page.count(found["noises"], "noise")
    yield tag("p", number, f"From clean speech to {lowest['snr_db']:g} dB SNR, mean of {noises}.", class_="result")
    yield from (tag("p", note, class_="notice") for note in _notes(found))


def _scores(found: Json) -> Iterator[Html]:
    header = ("UA in %", *(f"{level:g} dB" for level in found["snr_db"]))
    shown = [*_by_noise(found), (MEAN, found["mean"])]
    yield tag("h3", "UA by noise and SNR, with 95 % intervals")
    yield page.table(header, [(name, *(_two_lines(row["ua"]) for row in rows)) for name, rows in shown])
    yield tag("p", f"Clean: {with_interval(found['clean']['ua'])}. Chance: {percent(found['chance'])}.")
    yield tag("h3", "All scores, mean of noises")
    yield page.table(
        ("in % [95 % interval]", *SCORES.values()),
        [
            (name, *(with_interval(row[score]) for score in SCORES))
            for name, row in [("clean", found["clean"]), *((f"{row['snr_db']:g} dB", row) for row in found["mean"])]
        ],
    )


def _curves(found: Json, out: Path) -> Iterator[Html]:
    noises = {name: _ends(rows) for name, rows in _by_noise(found)}
    svg = pictures.save(
        out / "curves",
        lambda: pictures.noise_curves(
            found["snr_db"], noises, _ends(found["mean"]), found["clean"]["ua"]["value"], found["chance"]
        ),
    )
    yield tag("h3", "Curves")
    mean = " Thick: mean of the noises, with its interval as a band." if len(noises) > 1 else ""
    yield page.figure(svg, "UA over SNR", f"UA over SNR, each noise with its 95 % interval.{mean}")


def _how(found: Json) -> Iterator[Html]:
    yield tag("h3", "How it was measured")
    epoch = "of the last epoch" if found["select"] == "last" else "chosen on dev"
    yield tag(
        "p",
        f"The model of each fold, {epoch}, recognises the fold's test utterances as they are and with noise added.",
    )
    yield from (tag("p", words) for words in _HOW)
    lengths = ", ".join(f"{noise['name']} {noise['duration_s']:.0f} s" for noise in found["noises"])
    yield page.facts(
        {
            "run": f"{found['run']}, {page.count(found['folds'], 'fold')}",
            "data": f"{found['title']} (hash {found['data_hash'][:12]})",
            "folds": f"{found['protocol']} (hash {found['protocol_hash']})",
            "noises": f"{found['noise_dir']}: {lengths}",
            "seed": found["seed"],
            "code": f"sermll {found['version']}",
        }
    )


def _notes(found: Json) -> Iterator[str]:
    """What a reader must know before trusting the numbers, one sentence each."""
    yield from leak_notices({found["run"]: found["leaks"]})
    if len(found["folds"]) < found["folds_of_protocol"]:
        yield f"{len(found['folds'])} of the protocol's {found['folds_of_protocol']} folds are finished."
    quiet = found["without_level"]
    if quiet:
        named = ", ".join(quiet[:5]) + (", …" if len(quiet) > 5 else "")
        yield f"{page.count(quiet, 'utterance')} without active speech got no noise: {named}."


def _by_noise(found: Json) -> list[tuple[str, list[Json]]]:
    """The conditions of each noise, in the order of the levels."""
    return [
        (noise["name"], [row for row in found["conditions"] if row["noise"] == noise["name"]])
        for noise in found["noises"]
    ]


def _ends(rows: Sequence[Json]) -> NDArray[np.float64]:
    """UA and the ends of its interval, [rows, 3], NaN where there is none."""
    return np.array([[row["ua"][end] for end in ("value", "low", "high")] for row in rows], np.float64)


def _two_lines(score: Mapping[str, float | None]) -> Html:
    """A score with its interval below it, so that many levels fit beside one another."""
    interval = "" if score["low"] is None else tag("small", f"{percent(score['low'])} to {percent(score['high'])}")
    return Html(percent(score["value"]) + interval)
