"""The pictures of a report: plain arrays in, matplotlib figures out, files on disk.

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart with any kind of colour vision;
classes also differ in their marker. Values that are not finite are left out of a line and marked in red.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # matplotlib takes half a second to import, so it waits until something is drawn
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import RcKeyType

ACCENT = "#0b5c9e"
"""The one colour of the report."""
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222", "#8f8f8f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">", "p", "*")
_INK, _GREY, _PALE, _WARNING = "#1d1d1f", "#6a6a6f", "#dfe1e5", "#b00020"
_DOTTED: Mapping[str, Any] = {"color": _GREY, "linestyle": (0, (1, 2)), "linewidth": 1.2}
"""Of chance, and of what others are compared with."""
_MOST_SPEAKER_NAMES = 120
_WIDTH_INCH = 8.6

MOST_PANELS = 12
"""Of a picture with a panel for each fold or row; more would be too small to read."""
MOST_AXES = 9
"""Of parallel coordinates, beside those of what is improved."""

_STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a picture is the same on every machine
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,  # a class may be called $x$
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": _PALE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 200,
    "svg.fonttype": "path",  # looks the same where the font is not installed
    "svg.hashsalt": "sermll",  # the same picture gives the same bytes
}


_BEST = _PALETTE[1]
_MARKS: Mapping[str, Mapping[str, Any]] = {
    "finished": {"marker": "o", "ms": 6, "mfc": ACCENT, "mec": "white", "mew": 0.6},
    "as it stands": {"marker": "D", "ms": 6, "mfc": _INK, "mec": "white", "mew": 0.8},
    "Pareto front": {"marker": "s", "ms": 6, "mfc": "#e69f00", "mec": "white", "mew": 0.6},
    "best": {"marker": "*", "ms": 12, "mfc": _BEST, "mec": "white", "mew": 0.8},
    "running": {"marker": ">", "ms": 5.5, "mfc": "white", "mec": ACCENT, "mew": 1.1},
    "pruned": {"marker": "o", "ms": 5, "mfc": "white", "mec": _GREY, "mew": 1.1},
    "failed": {"marker": "x", "ms": 6, "mec": _WARNING, "mew": 1.6},
}
"""Of trials, the same in every picture of a search."""
_RING: Mapping[str, Any] = {"mec": _BEST, "mew": 2.2, "ms": 10.5}
"""Around the best trial, where its colour tells its value."""


class Bar(NamedTuple):
    """A row of a forest plot: UA with its interval, and the difference to the group's first row; all in 0..1."""

    name: str
    ua: tuple[float, float | None, float | None] | None
    """Value, low, high; no interval with one speaker, and None without a number."""
    difference: tuple[float, float, float] | None
    verdict: str
    """'higher', 'lower', or anything else."""


class Goal(NamedTuple):
    """What a search improves."""

    label: str
    """With the unit of its values."""
    maximize: bool


class Trial(NamedTuple):
    """A trial of a search; all its numbers are finite."""

    number: int
    """0 is the experiment as it stands."""
    state: str
    """'finished', 'pruned', 'failed' or 'running'."""
    values: tuple[float, ...] | None
    """One for each goal; None unless the trial is finished."""
    steps: tuple[tuple[float, float], ...]
    """Step and value of the first goal, as the pruner was told on the way; steps ascend."""
    settings: Mapping[str, float | str]
    """Numbers and words; those that do not apply are absent."""
    role: str
    """Of a finished trial 'best', 'Pareto front', 'as it stands', or empty."""

    @property
    def kind(self) -> str:
        """Which of _MARKS the trial gets."""
        return self.role or self.state


def save(stem: Path, draw: Callable[[], Figure]) -> bytes:
    """Draw in the report's style and write `stem`.png and `stem`.svg, byte for byte the same each time.

    Args:
        stem: path of both files without the ending; its folder must exist.
        draw: one of this module's pictures with its data bound.

    Returns:
        The SVG file's content.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = draw()
        figure.savefig(stem.with_name(stem.name + ".png"), metadata={"Software": None})
        figure.set_layout_engine("none")  # keeps the places just found, and saves finding them again
        svg = stem.with_name(stem.name + ".svg")
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return svg.read_bytes()


def confusion(counts: NDArray[np.int64], recalls: NDArray[np.float64], classes: Sequence[str]) -> Figure:
    """Confusion matrix, rows coloured by their share, with the recall of each class beside its row.

    Args:
        counts: [C, C] utterances, true class by predicted class.
        recalls: [C] in 0..1, NaN for a class that was never tested.
        classes: C names.
    """
    size = len(classes)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    names = [_short(name) for name in classes]
    side = max(3.0, min(0.74 * size, 9.0))
    figure = _figure(side + 2.9, 0.82 * side + 1.1)
    cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=(side, 1.35))

    edges = np.arange(size + 1) - 0.5
    mesh = cells.pcolormesh(edges, edges, shares, cmap=_shades(), vmin=0, vmax=1, edgecolors="white", linewidth=1.2)
    cells.invert_yaxis()
    font_pt = min(9.0, max(4.0, 70 * side / size / 6.0))
    for row in range(size):
        for column in range(size):
            ink = _ink(mesh, shares[row, column])
            text = f"{counts[row, column]}\n{100 * shares[row, column]:.0f} %" if totals[row] else "—"
            weight = "bold" if row == column and totals[row] else "normal"
            cells.text(column, row, text, ha="center", va="center", color=ink, fontsize=font_pt, fontweight=weight)
    slanted = max(len(name) for name in names) > 72 * side / size / 5.6
    cells.set_xticks(range(size), names, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    if slanted:
        for label in cells.get_xticklabels():
            label.set_rotation_mode("anchor")
    cells.set_yticks(range(size), names)
    cells.set_xlabel("recognised as")
    cells.set_ylabel("true class")
    cells.tick_params(length=0)
    cells.spines[:].set_visible(False)

    bars.barh(range(size), np.nan_to_num(100 * recalls), height=0.62, color=ACCENT, alpha=0.85)
    for row, recall in enumerate(recalls):
        text = f"{100 * recall:.1f} %" if math.isfinite(recall) else "not tested"
        bars.text(np.nan_to_num(100 * recall) + 4, row, text, va="center", fontsize=8.5)
    bars.set_xlim(0, 165)
    bars.set_title("recall", fontweight="normal")
    bars.tick_params(labelleft=False, left=False, bottom=False, labelbottom=False)
    bars.spines[["bottom"]].set_visible(False)
    return figure


def curves(terms: Mapping[str, Mapping[int, NDArray[np.float64]]]) -> Figure:
    """One panel for each term of the loss: every fold thin, their mean thick.

    Args:
        terms: for each title, the values of each fold by epoch; folds may have different numbers of epochs.
    """
    columns = min(3, len(terms))
    rows = math.ceil(len(terms) / columns)
    figure = _figure(_WIDTH_INCH / 3 * columns, 2.05 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel, (title, folds) in zip(panels.flat, terms.items(), strict=False):
        _lines(panel, folds, [ACCENT] * len(folds))
        panel.set_title(title)
        bottom, top = panel.get_ylim()
        if 0 < bottom < 0.6 * top:  # show how much is left, where that does not flatten the curve
            panel.set_ylim(bottom=0)
    for panel in panels.flat[len(terms) :]:
        panel.set_visible(False)
    for column in range(columns):
        shown = [panel for panel in panels[:, column] if panel.get_visible()]
        shown[-1].set_xlabel("epoch")
        shown[-1].tick_params(labelbottom=True)
    return figure


def dev_ua(folds: Mapping[int, NDArray[np.float64]], chosen: Mapping[int, int], chance: float) -> Figure:
    """Dev UA by epoch, with the epoch that was chosen in each finished fold.

    Args:
        folds: UA in 0..1 of each fold by epoch.
        chosen: the chosen epoch, counted from 0, of each finished fold.
        chance: UA of guessing, in 0..1.
    """
    figure = _figure(_WIDTH_INCH, 3.4)
    axes = figure.subplots()
    colours = _fold_colours(list(folds))
    percent = {fold: 100 * values for fold, values in folds.items()}
    _lines(axes, percent, [colours[fold] for fold in folds], mean_colour=_INK, ticks=12)
    for fold, epoch in sorted(chosen.items()):
        if fold in percent and epoch < len(percent[fold]):
            axes.plot(epoch + 1, percent[fold][epoch], "o", ms=7, mfc=colours[fold], mec="white", mew=1.1, zorder=5)
    axes.axhline(100 * chance, **_DOTTED)
    _above_the_frame(axes, chance)
    axes.set_xlabel("epoch")
    axes.set_ylabel("dev UA in %")

    from matplotlib.lines import Line2D

    keys = []
    if len(set(colours.values())) == len(folds) > 1:
        keys += [Line2D([], [], color=colours[fold], label=f"fold {fold}") for fold in folds]
    if len(folds) > 1:
        keys.append(Line2D([], [], color=_INK, linewidth=2.4, label="mean"))
    if chosen:
        keys.append(Line2D([], [], ls="", marker="o", ms=7, mfc=_GREY, mec="white", label="chosen epoch"))
    keys.append(Line2D([], [], **_DOTTED, label="chance"))
    figure.legend(handles=keys, loc="outside right center")
    return figure


def speakers(names: Sequence[str], ua: NDArray[np.float64], folds: Sequence[int], chance: float) -> Figure:
    """UA of each test speaker, from the lowest to the highest, in the colour of the speaker's fold.

    Args:
        names: S speakers.
        ua: [S] in 0..1.
        folds: S folds.
        chance: UA of guessing, in 0..1.
    """
    order = sorted(range(len(names)), key=lambda place: (ua[place], names[place]))
    figure = _figure(min(11.0, max(_WIDTH_INCH, 0.13 * len(names) + 0.8)), 3.6)
    axes = figure.subplots()
    colours = _fold_colours(sorted(set(folds)))
    size_pt = min(8.0, max(4.5, 300 / len(names)))
    percent = 100 * ua[order]
    mean = float(np.mean(percent))
    for place, index in enumerate(order):
        axes.plot([place, place], [mean, percent[place]], color=_PALE, linewidth=1.2, zorder=1)
        axes.plot(place, percent[place], "o", ms=size_pt, mfc=colours[folds[index]], mec="white", mew=0.7, zorder=3)
    axes.axhline(mean, color=_INK, linewidth=1.2, zorder=2)
    axes.axhline(100 * chance, **_DOTTED)
    axes.margins(x=0.5 / len(names) + 0.01)
    axes.set_ylim(min(100 * chance, percent.min()) - 6, min(104.0, percent.max() + 8))
    axes.set_ylabel("UA in %")
    axes.grid(axis="y")
    if len(names) <= _MOST_SPEAKER_NAMES:
        shown = [_short(names[index], 16) for index in order]
        upright = sum(map(len, shown)) + len(shown) > 85
        small = 8.5 if len(names) <= 40 else 6.5
        axes.set_xticks(range(len(names)), shown, rotation=90 if upright else 0, fontsize=small)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("speaker")
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(names)} speakers")

    from matplotlib.lines import Line2D

    keys = []
    if len(set(colours.values())) == len(colours) > 1:
        keys += [
            Line2D([], [], ls="", marker="o", ms=7, mfc=colour, mec="white", label=f"fold {fold}")
            for fold, colour in colours.items()
        ]
    keys.append(Line2D([], [], color=_INK, linewidth=1.2, label=f"mean {mean:.1f} %"))
    keys.append(Line2D([], [], **_DOTTED, label="chance"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), columnspacing=1.2)
    return figure


def reliability(panels: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> Figure:
    """Share that is right by confidence, beside the diagonal where both are equal; below, how often each is said.

    Args:
        panels: for each title, by range of confidence, B ranges of equal width from 0 to 1: `confidence` and
            `accuracy`, the latter's interval `low` to `high`, all in 0..1 and NaN without utterances, and `count`.
    """
    figure = _figure(_WIDTH_INCH, 4.8)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3.4, 1))
    for column, (title, bins) in enumerate(panels.items()):
        share, counts = axes[:, column]
        some = bins["count"] > 0
        confidence, accuracy = (100 * bins[name][some] for name in ("confidence", "accuracy"))
        reach = np.abs([100 * bins[name][some] - accuracy for name in ("low", "high")])
        share.plot([0, 100], [0, 100], **_DOTTED)
        share.vlines(confidence, confidence, accuracy, color="#9cc3e3", linewidth=6, zorder=2)
        share.errorbar(confidence, accuracy, reach, fmt="o", ms=5, color=ACCENT, mec="white", elinewidth=1.2, zorder=3)
        share.set_title(title)
        share.set_xlim(-2, 102)
        share.set_ylim(-2, 102)
        share.grid()
        edges = np.linspace(0, 100, len(some) + 1)
        counts.bar(edges[:-1], bins["count"], width=np.diff(edges), align="edge", color="#9cc3e3", edgecolor="white")
        counts.set_xlabel("confidence in %")
    axes[0, 0].set_ylabel("right in %")
    axes[1, 0].set_ylabel("utterances")
    return figure


def embedding(folds: Mapping[int, tuple[NDArray[np.float64], NDArray[np.int64]]], classes: Sequence[str]) -> Figure:
    """Principal components of the test embeddings: one panel for each fold, coloured by true class.

    Args:
        folds: for each fold, finite embeddings [N, D] and true class indices [N]; the first MOST_PANELS
            folds are drawn.
        classes: C names.
    """
    from matplotlib.lines import Line2D

    shown = list(folds.items())[:MOST_PANELS]
    columns = min(len(shown), 3 if len(shown) <= 9 else 4)
    rows = math.ceil(len(shown) / columns)
    side = {1: 5.0, 2: 4.0, 3: 2.85, 4: 2.15}[columns]
    longest = max(len(_short(name)) for name in classes)
    key_rows = math.ceil(len(classes) / max(2, int(side * columns * 13 / (longest + 5))))
    figure = _figure(side * columns, side * 0.95 * rows + 0.24 * key_rows + 0.1)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, (fold, (vectors, labels)) in zip(panels.flat, shown, strict=False):
        points, share = principal_components(vectors)
        size_pt2 = float(np.clip(5000 / max(len(points), 1), 7, 30))
        for index in range(len(classes)):
            own = points[labels == index]
            panel.scatter(
                own[:, 0],
                own[:, 1],
                s=size_pt2,
                marker=_MARKERS[index % len(_MARKERS)],
                color=_PALETTE[index % len(_PALETTE)],
                edgecolors="white",
                linewidths=0.3,
                alpha=0.85,
                rasterized=len(points) > 1500,
            )
        panel.set_title(f"fold {fold}", pad=4)
        panel.set_title(f"{100 * share:.0f} % of variance", loc="right", fontweight="normal", fontsize=8, pad=4)
        panel.set_aspect("equal", adjustable="datalim")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(True)
        panel.spines[:].set_color(_PALE)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    keys = [
        Line2D(
            [],
            [],
            ls="",
            marker=_MARKERS[index % len(_MARKERS)],
            ms=6.5,
            mfc=_PALETTE[index % len(_PALETTE)],
            mec="white",
            mew=0.3,
            label=_short(name),
        )
        for index, name in enumerate(classes)
    ]
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=math.ceil(len(classes) / key_rows),
        handletextpad=0.2,
        columnspacing=1.4,
    )
    return figure


_NOTHING_SHOWN = "no difference shown"
_VERDICTS: Mapping[str, Mapping[str, Any]] = {
    "higher": {"color": _PALETTE[0], "marker": ">", "mfc": _PALETTE[0]},
    "lower": {"color": _PALETTE[1], "marker": "<", "mfc": _PALETTE[1]},
    _NOTHING_SHOWN: {"color": _GREY, "marker": "o", "mfc": "white"},
}
"""Of differences in a forest plot."""


def forest(groups: Sequence[tuple[str, Sequence[Bar]]]) -> Figure:
    """UA of every row with its interval and, beside it, the paired difference to the first row of its group.

    Args:
        groups: titles, each with its rows, the reference first.
    """
    heights = [len(bars) + 0.4 for _, bars in groups]
    figure = _figure(_WIDTH_INCH, 0.25 * sum(heights) + 0.42 * len(groups) + 0.75)
    panels = figure.subplots(len(groups), 2, squeeze=False, sharex="col", height_ratios=heights, width_ratios=(1.15, 1))
    for (scores, differences), (title, bars) in zip(panels, groups, strict=True):
        for place, bar in enumerate(bars):
            _forest_row(scores, differences, place, bar)
        if bars[0].ua is not None:
            scores.axvline(100 * bars[0].ua[0], **_DOTTED, zorder=0)
        differences.axvline(0, **_DOTTED, zorder=0)
        scores.set_title(_short(title, 60))
        for axes in (scores, differences):
            axes.set_ylim(len(bars) - 0.4, -0.6)
            axes.set_yticks(range(len(bars)), [_short(bar.name, 32) for bar in bars] if axes is scores else [])
            axes.tick_params(axis="y", length=0)
            axes.spines[["left"]].set_visible(False)
            axes.grid(axis="x")
            for stripe in range(1, len(bars), 2):
                axes.axhspan(stripe - 0.5, stripe + 0.5, color="#f5f7f9", zorder=-1)
    panels[-1, 0].set_xlabel("UA in %")
    panels[-1, 1].set_xlabel("difference to the reference, in points")
    shown = {_verdict(bar) for _, bars in groups for bar in bars if bar.difference}
    if not shown:
        for axes in panels[:, 1]:
            axes.set_visible(False)
        return figure

    from matplotlib.lines import Line2D

    left, right = panels[0, 1].get_xlim()
    side, away_pt = ("left", 6) if right > -left else ("right", -6)  # of the zero line, where there is more room
    for differences in (differences for (_, differences), (_, bars) in zip(panels, groups, strict=True) if bars[1:]):
        differences.annotate(
            "reference", (0, 0), (away_pt, 0), textcoords="offset points", ha=side, va="center", fontsize=8.5
        )
    keys = [Line2D([], [], label=label, ms=6.5, mew=1.2, **look) for label, look in _VERDICTS.items() if label in shown]
    figure.legend(handles=keys, loc="outside lower right", ncols=len(keys), columnspacing=1.4)
    return figure


def _forest_row(scores: Axes, differences: Axes, place: int, bar: Bar) -> None:
    """One row of both columns; the reference has `place` 0."""
    side = scores.get_yaxis_transform()  # x in parts of the panel, y in rows
    if bar.ua is None:
        scores.text(0.02, place, "no number yet", transform=side, va="center", color=_GREY)
        return
    ink = ACCENT if place else _INK
    value, low, high = bar.ua
    if low is not None and high is not None:
        scores.plot([100 * low, 100 * high], [place, place], color=ink, linewidth=2.2, alpha=0.45)
    scores.plot(100 * value, place, "o" if place else "D", ms=6.5 if place else 6, mfc=ink, mec="white", mew=0.8)
    scores.text(1.01, place, f"{100 * value:.1f}", transform=side, va="center", fontsize=8.5)
    if bar.difference is not None:
        middle, low, high = (100 * one for one in bar.difference)
        look = _VERDICTS[_verdict(bar)]
        differences.plot([low, high], [place, place], color=look["color"], linewidth=2.2, alpha=0.55)
        differences.plot(middle, place, ls="", ms=6.5, mew=1.2, **look)


def _verdict(bar: Bar) -> str:
    return bar.verdict if bar.verdict in _VERDICTS else _NOTHING_SHOWN


def dev_curves(rows: Mapping[str, NDArray[np.float64]], chance: float) -> Figure:
    """Dev UA by epoch, a small panel for each row with the first row's curve behind it.

    Args:
        rows: for each name [epochs] in 0..1; the first MOST_PANELS are drawn.
        chance: UA of guessing, in 0..1.
    """
    from matplotlib.ticker import MaxNLocator

    shown = list(rows.items())[:MOST_PANELS]
    figure, panels = _small_panels(len(shown), most=5, ratio=0.72, share=True)
    for panel, (name, values) in zip(panels.flat, shown, strict=False):
        reference = shown[0][1]
        panel.axhline(100 * chance, **_DOTTED)
        _line(panel, 100 * reference, "#a9a9ae", {"linewidth": 1.6})
        _line(panel, 100 * values, _INK if name == shown[0][0] else ACCENT, {"linewidth": 2.0})
        panel.set_title(_short(name, 26), fontsize=8.5, pad=4)
        panel.grid(axis="y")
    longest = max(len(values) for _, values in shown)
    panels[0, 0].set_xlim(1 - 0.04 * longest, 1.04 * longest)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    for panel in panels[:, 0]:
        panel.set_ylabel("dev UA in %")
    for panel in panels.flat[max(0, len(shown) - panels.shape[1]) : len(shown)]:  # the lowest of each column
        panel.set_xlabel("epoch")
        panel.tick_params(labelbottom=True)
    return figure


def confusions(rows: Mapping[str, NDArray[np.float64]], classes: Sequence[str]) -> Figure:
    """A small confusion matrix for each row, as shares of the true class in percent.

    Args:
        rows: for each name [C, C] counts, true class by predicted class; the first MOST_PANELS are drawn.
        classes: C names.
    """
    shown = list(rows.items())[:MOST_PANELS]
    figure, panels = _small_panels(len(shown), most=4, ratio=1.08, share=False)
    size = len(classes)
    names = [_short(name, 11) for name in classes]
    edges = np.arange(size + 1) - 0.5
    for number, (panel, (name, counts)) in enumerate(zip(panels.flat, shown, strict=False)):
        totals = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
        mesh = panel.pcolormesh(edges, edges, shares, cmap=_shades(), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
        panel.invert_yaxis()
        panel.set_aspect("equal")
        for row, column in np.ndindex(size, size):
            if size <= 10 and shares[row, column] >= 0.005:
                ink = _ink(mesh, shares[row, column])
                told = f"{100 * shares[row, column]:.0f}"
                panel.text(column, row, told, ha="center", va="center", color=ink, fontsize=min(8.0, 50 / size))
        panel.set_title(_short(name, 26), fontsize=8.5, pad=4)
        first, last = number % panels.shape[1] == 0, number + panels.shape[1] >= len(shown)
        panel.set_yticks(range(size), names if first else [], fontsize=7)
        panel.set_xticks(range(size), names if last else [], fontsize=7, rotation=90)
        panel.tick_params(length=0, pad=2)
        panel.spines[:].set(visible=True, color=_PALE)  # cells of zero are as white as the page
    figure.supxlabel("recognised as", fontsize=9)
    figure.supylabel("true class", fontsize=9)
    return figure


def balance(counts: NDArray[np.int64], speakers: Sequence[str], classes: Sequence[str]) -> Figure:
    """Utterances of each speaker and class: holes and heaps are seen at a glance.

    Args:
        counts: [S, C] utterances.
        speakers: S names.
        classes: C names.
    """
    few = len(speakers) <= 40
    figure = _figure(min(11.0, max(5.0, 0.9 * len(classes) + 1.6)), min(11.0, max(2.2, 0.21 * len(speakers) + 0.9)))
    axes = figure.subplots()
    across, down = np.arange(len(classes) + 1) - 0.5, np.arange(len(speakers) + 1) - 0.5
    largest = int(counts.max(initial=1))
    mesh = axes.pcolormesh(
        across, down, counts, cmap=_shades(), vmin=0, vmax=largest, edgecolors="white", linewidth=0.8 if few else 0
    )
    axes.invert_yaxis()
    if few:
        for row, column in np.ndindex(*counts.shape):
            ink = _ink(mesh, counts[row, column]) if counts[row, column] else _WARNING
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=ink, fontsize=7.5)
        axes.set_yticks(range(len(speakers)), [_short(name, 16) for name in speakers])
    else:
        axes.set_yticks([])
        figure.colorbar(mesh, ax=axes, label="utterances", shrink=0.6)
    axes.set_ylabel("speaker" if few else f"{len(speakers)} speakers")
    axes.set_xticks(range(len(classes)), [_short(name, 12) for name in classes])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def spread(values: Mapping[str, NDArray[np.float64]], label: str) -> Figure:
    """A row for each class: the median, the middle half as a box, 5 to 95 % as a line.

    Args:
        values: [utterances] of each class.
        label: what they are, with the unit.
    """
    figure = _figure(_WIDTH_INCH, 0.36 * len(values) + 0.9)
    axes = figure.subplots()
    for place, members in enumerate(values.values()):
        if len(members) == 0:
            continue
        low, lower, median, upper, high = np.percentile(members, [5, 25, 50, 75, 95])
        axes.plot([low, high], [place, place], color=_GREY, linewidth=1.4, zorder=1)
        axes.barh(place, upper - lower, left=lower, height=0.5, color="#9cc3e3", zorder=2)
        axes.plot([median, median], [place - 0.3, place + 0.3], color=ACCENT, linewidth=2.4, zorder=3)
    axes.set_yticks(range(len(values)), [_short(name) for name in values])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    return figure


def spectrograms(spectra: Mapping[str, NDArray[np.float64]], frame_s: float, highest_hz: float) -> Figure:
    """One sample of each class, side by side, each over the 70 dB below its loudest point.

    Args:
        spectra: [frequencies, frames] in dB of each class, from 0 Hz up.
        frame_s: seconds from one frame to the next.
        highest_hz: frequency of the last row.
    """
    columns = min(4, len(spectra))
    rows = math.ceil(len(spectra) / columns)
    figure = _figure(2.5 * columns + 0.6, 1.9 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(spectra) :]:
        panel.set_visible(False)
    for panel, (name, values) in zip(panels.flat, spectra.items(), strict=False):
        extent = (0.0, values.shape[1] * frame_s, 0.0, highest_hz / 1000)
        top = float(values.max())
        look = {"cmap": "magma", "vmin": top - 70, "vmax": top, "rasterized": True}
        panel.imshow(values, origin="lower", aspect="auto", extent=extent, **look)
        panel.set_title(_short(name))
    for panel in panels[:, 0]:
        panel.set_ylabel("frequency in kHz")
    for panel in panels[-1]:
        panel.set_xlabel("time in s")
    return figure


def principal_components(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The two directions of largest variance, each turned so that its largest weight is positive.

    Args:
        vectors: [N, D], finite.

    Returns:
        [N, 2] coordinates (zero where there are fewer than two directions) and their share of the variance.
    """
    centered = vectors - vectors.mean(axis=0, keepdims=True) if len(vectors) else vectors
    points = np.zeros((len(vectors), 2))
    if not centered.any():
        return points, 1.0
    _, scales, axes = np.linalg.svd(centered, full_matrices=False)
    axes = axes[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
    points[:, : len(axes)] = centered @ axes.T
    return points, float((scales[:2] ** 2).sum() / (scales**2).sum())


def noise_curves(
    snr_db: Sequence[float],
    noises: Mapping[str, NDArray[np.float64]],
    mean: NDArray[np.float64],
    clean: float,
    chance: float,
) -> Figure:
    """UA over SNR, from little noise to much: a line with intervals for each noise, their mean thick with a band.

    Args:
        snr_db: S levels, descending.
        noises: for each noise, [S, 3] UA in 0..1 and the ends of its interval, NaN where there is none.
        mean: [S, 3] likewise, over the noises; drawn if there are several.
        clean: UA without noise, in 0..1.
        chance: UA of guessing, in 0..1.
    """
    figure = _figure(_WIDTH_INCH, 4.3)
    axes = figure.subplots()
    levels = np.array(snr_db, np.float64)
    apart_db = float(np.abs(np.diff(levels)).min()) if len(levels) > 1 else 1.0
    few = len(noises) <= len(_MARKERS)
    # Side by side within a third of the least distance between levels, so that no interval hides another.
    shifts = np.linspace(1, -1, len(noises)) * (apart_db / 6 if few and len(noises) > 1 else 0)
    for place, (name, values) in enumerate(noises.items()):
        ua, low, high = 100 * values.T
        colour = _PALETTE[place % len(_PALETTE)] if few else ACCENT
        axes.plot(
            levels + shifts[place],
            ua,
            marker=_MARKERS[place % len(_MARKERS)] if few else None,
            ms=5.5,
            mec="white",
            mew=0.5,
            color=colour,
            linewidth=1.3 if few else 0.7,
            alpha=1.0 if few else 0.35,
            label=_short(name) if few else ("one noise each" if place == 0 else None),
            zorder=3,
        )
        if few:
            axes.vlines(levels + shifts[place], low, high, color=colour, linewidth=1.0, alpha=0.55, zorder=2)
    if len(noises) > 1:
        ua, low, high = 100 * mean.T
        axes.fill_between(levels, low, high, color=_INK, alpha=0.1, linewidth=0, zorder=1)
        axes.plot(levels, ua, color=_INK, linewidth=2.6, label="mean of noises", zorder=4)
    axes.axhline(100 * clean, color=ACCENT, linewidth=1.4, linestyle=(0, (6, 3)), label=f"clean {100 * clean:.1f} %")
    axes.axhline(100 * chance, **_DOTTED, label=f"chance {100 * chance:.1f} %")
    axes.set_xticks(levels, [f"{level:g}".replace("-", "\u2212") for level in snr_db])
    axes.set_xlim(levels.max() + apart_db / 3, levels.min() - apart_db / 3)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    _above_the_frame(axes, chance)
    axes.set_xlabel("SNR in dB, active speech level over noise level")
    axes.set_ylabel("UA in %")
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


def heat_map(
    values: NDArray[np.float64],
    lows: NDArray[np.float64],
    highs: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    chance: float,
) -> Figure:
    """UA by what was trained on and what was tested, with intervals.

    Args:
        values: [R, C] in 0..1, NaN where there is none.
        lows: [R, C] ends of their intervals.
        highs: [R, C] likewise.
        rows: R names of training corpora.
        columns: C names of test corpora.
        chance: UA of guessing, where the colours begin.
    """
    figure = _figure(1.55 * len(columns) + 2.4, 0.78 * len(rows) + 1.3)
    cells = figure.subplots()
    across, down = np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    mesh = cells.pcolormesh(
        across, down, 100 * values, cmap=_shades(), vmin=100 * chance, vmax=100, edgecolors="white", linewidth=2
    )
    cells.invert_yaxis()
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        if not math.isfinite(value):
            cells.text(column, row, "not finished", ha="center", va="center", color=_GREY, fontsize=8)
            continue
        ink = _ink(mesh, 100 * value)
        weight = "bold" if row < len(columns) and rows[row] == columns[column] else "normal"
        cells.text(
            column, row - 0.1, f"{100 * value:.1f}", ha="center", va="center", color=ink, fontsize=11, fontweight=weight
        )
        if math.isfinite(lows[row, column]):
            interval = f"{100 * lows[row, column]:.1f} to {100 * highs[row, column]:.1f}"
            cells.text(column, row + 0.24, interval, ha="center", va="center", color=ink, fontsize=7.5)
    cells.set_xticks(range(len(columns)), [_short(name) for name in columns])
    cells.set_yticks(range(len(rows)), [_short(name) for name in rows])
    cells.xaxis.set_label_position("top")
    cells.xaxis.tick_top()
    cells.set_xlabel("tested on", fontweight="bold")
    cells.set_ylabel("trained on", fontweight="bold")
    cells.tick_params(length=0)
    cells.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=cells, shrink=0.9, pad=0.02)
    bar.set_label(f"UA in %, white is chance ({100 * chance:.0f})")
    bar.outline.set_visible(False)
    return figure


def trial_history(trials: Sequence[Trial], goals: Sequence[Goal]) -> Figure:
    """Value by trial, a panel for each goal, and the best so far as steps.

    Args:
        trials: at least one is finished.
        goals: one or more.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = _figure(_WIDTH_INCH, 2.6 * len(goals) + 0.8)
    panels = figure.subplots(len(goals), 1, squeeze=False, sharex=True)[:, 0]
    done = [trial for trial in trials if trial.values is not None]
    longest = max(trial.number for trial in trials)
    for index, (panel, goal) in enumerate(zip(panels, goals, strict=True)):
        foot = panel.get_xaxis_transform()  # for trials without a value: x in trials, y in parts of the panel
        values = _values(done, index)
        best = (np.maximum if goal.maximize else np.minimum).accumulate(values)
        ends = [*(trial.number for trial in done), longest + 0.4]
        panel.step(ends, [*best, best[-1]], where="post", color=_INK, linewidth=1.2, alpha=0.55, zorder=1)
        _points(panel, done, [trial.number for trial in done], values)
        for trial in trials:
            if trial.values is None:  # a pruned one's last value is of fewer inner folds: nothing to set beside these
                panel.plot(trial.number, 0.04, transform=foot, clip_on=False, **{**_MARKS[trial.state], "ls": ""})
        panel.margins(y=0.16)
        panel.set_ylabel(goal.label)
        panel.grid(axis="y")
    panels[-1].set_xlabel("trial")
    panels[-1].set_xlim(-0.02 * longest - 0.5, 1.02 * longest + 0.5)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    keys = [*_mark_keys(trials), Line2D([], [], color=_INK, linewidth=1.2, alpha=0.55, label="best so far")]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), columnspacing=1.2, handletextpad=0.4)
    return figure


def trial_curves(trials: Sequence[Trial], goal: Goal) -> Figure:
    """What the pruner was told of each trial, step by step.

    Args:
        trials: at least one has a step.
        goal: the first.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = _figure(_WIDTH_INCH, 3.9)
    axes = figure.subplots()
    drawn = [trial for trial in trials if trial.steps]
    pale = float(np.clip(12 / len(drawn), 0.25, 0.75))
    looks: dict[str, dict[str, Any]] = {
        "finished": {"color": ACCENT, "linewidth": 1.1, "alpha": pale},
        "pruned": {"color": _GREY, "linewidth": 1.0, "alpha": pale},
        "failed": {"color": _WARNING, "linewidth": 1.0, "alpha": pale},
        "running": {"color": ACCENT, "linewidth": 1.1, "linestyle": (0, (3, 2))},
        "as it stands": {"color": _INK, "linewidth": 1.8, "zorder": 3},
        "best": {"color": _BEST, "linewidth": 2.4, "zorder": 4},
    }
    looks["Pareto front"] = looks["finished"]  # of several goals, of which only one is drawn
    for trial in drawn:
        look = looks[trial.kind]
        axes.plot(*np.array(trial.steps).T, **look)
        if trial.values is None or len(trial.steps) == 1:  # where it ended; a line through one point is not seen
            axes.plot(*trial.steps[-1], **{**_MARKS[trial.kind], "zorder": look.get("zorder", 2)})
    axes.set_xlabel("step")
    axes.set_ylabel(goal.label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")
    keys = []
    for kind, look in looks.items():
        mark = _MARKS[kind] if kind in ("pruned", "failed", "running") else {}
        if any(trial.kind == kind for trial in drawn) and kind != "Pareto front":
            keys.append(Line2D([], [], **{**look, **mark, "alpha": 1}, label=kind))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), columnspacing=1.2)
    return figure


def importances(shares: Mapping[str, float]) -> Figure:
    """A bar for each setting, the most important on top.

    Args:
        shares: at least one, in 0..1, by setting.
    """
    order = sorted(shares, key=lambda name: (-shares[name], name))
    figure = _figure(_WIDTH_INCH, 0.29 * len(order) + 0.8)
    axes = figure.subplots()
    percent = [100 * shares[name] for name in order]
    axes.barh(range(len(order)), percent, height=0.62, color=ACCENT, alpha=0.85)
    for place, value in enumerate(percent):
        axes.text(value + 0.01 * max(percent), place, f"{value:.0f} %", va="center", fontsize=8.5)
    axes.set_yticks(range(len(order)), [_end_of(name, 40) for name in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, max(1.12 * max(percent), 10.0))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("importance in %")
    axes.grid(axis="x")
    return figure


def slices(trials: Sequence[Trial], names: Sequence[str], goals: Sequence[Goal], index: int) -> Figure:
    """Value against each setting, a small panel each; words stand in columns, with their median.

    Args:
        trials: finished ones.
        names: settings; the first MOST_PANELS are drawn.
        goals: those of the search.
        index: of the goal that is drawn.
    """
    from matplotlib.lines import Line2D

    shown = names[:MOST_PANELS]
    if len(shown) == 1:
        figure = _figure(5.4, 3.4)
        panels = figure.subplots(1, 1, squeeze=False)
    else:
        figure, panels = _small_panels(len(shown), most=4, ratio=0.86, share=False)
    values = _values(trials, index)
    keys = _mark_keys(trials)
    median = Line2D([], [], color=_INK, linewidth=1.4, label="median")
    margin = 0.08 * (values.max() - values.min()) or 1.0
    for number, (panel, name) in enumerate(zip(panels.flat, shown, strict=False)):
        having = [trial for trial in trials if name in trial.settings]
        settings, heights = [trial.settings[name] for trial in having], _values(having, index)
        scale = _Scale(settings, name)
        places = np.array([scale.place(setting) for setting in settings])
        for word, middle in scale.words.items():
            own = [place for place, setting in enumerate(settings) if setting == word]
            if len(own) > 1:
                places[own] += 0.7 * scale.reach * np.linspace(-1, 1, len(own))  # so that equal values are told apart
                ends = (middle - scale.reach, middle + scale.reach)
                panel.hlines(np.median(heights[own]), *ends, color=_INK, linewidth=1.4, zorder=3.5)
                keys = [*_mark_keys(trials), median]
        if scale.words and scale.numeric:
            panel.axvline(scale.border, color=_PALE, linewidth=1.0)
        _points(panel, having, places, heights)
        panel.set_xlim(*scale.ends)
        panel.set_ylim(values.min() - margin, values.max() + margin)
        labels = [_short(label, 12) for _, label in scale.ticks]
        crowded = not scale.numeric and sum(map(len, labels)) + 2 * len(labels) > 26
        slant = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        panel.set_xticks([place for place, _ in scale.ticks], labels, fontsize=7.5, **slant)
        panel.tick_params(axis="y", labelleft=number % panels.shape[1] == 0)
        panel.set_title(_end_of(name, 23 if len(shown) > 1 else 50), fontsize=8.5, pad=4)
        panel.grid(axis="y")
    for panel in panels[:, 0]:
        panel.set_ylabel(goals[index].label)
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), columnspacing=1.2, handletextpad=0.2)
    return figure


def parallel(trials: Sequence[Trial], names: Sequence[str], goals: Sequence[Goal]) -> Figure:
    """A line for each trial through its settings to its values; the better, the darker and, at the end, the higher.

    Args:
        trials: finished ones.
        names: settings, one axis each; the first MOST_AXES are drawn.
        goals: one axis each, after those of the settings; the first gives the colours.
    """
    from matplotlib.lines import Line2D

    shown = names[:MOST_AXES]
    figure = _figure(_WIDTH_INCH, 4.6)
    axes = figure.subplots()
    columns: list[list[float | str | None]] = [[trial.settings.get(name) for trial in trials] for name in shown]
    columns += [_values(trials, index).tolist() for index in range(len(goals))]
    turned = [False] * len(shown) + [not goal.maximize for goal in goals]
    titles = [*shown, *(goal.label for goal in goals)]
    drawn = enumerate(zip(titles, columns, turned, strict=True))
    paths = [_upright(axes, across, *column) for across, column in drawn]
    heights = np.stack(paths, axis=1)
    colours = _better(_values(trials, 0), goals[0])
    looks: dict[str, dict[str, Any]] = {
        "as it stands": {"color": _INK, "linewidth": 1.8, "linestyle": (0, (4, 2)), "zorder": 3},
        "best": {"color": _BEST, "linewidth": 2.4, "zorder": 4},
    }
    thin = float(np.clip(40 / len(trials), 0.5, 1.3))
    order = np.argsort(_values(trials, 0), kind="stable")
    for row in order if goals[0].maximize else order[::-1]:  # the better above the worse
        look = looks.get(trials[row].kind, {"color": colours.to_rgba(columns[len(shown)][row]), "linewidth": thin})
        axes.plot(range(len(columns)), heights[row], marker="o", ms=2 * thin, **look)
    axes.set_xlim(-0.05 * len(columns), len(columns) - 1 + 0.02 * len(columns))
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([])
    labels = [_end_of(name, 24) for name in titles]
    axes.set_xticks(range(len(columns)), labels, rotation=25, ha="left", rotation_mode="anchor")
    axes.tick_params(axis="x", top=False, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
    keys = [Line2D([], [], color=ACCENT, linewidth=1.3, label="finished, darker is better")]
    kinds = {trial.kind for trial in trials}
    keys += [Line2D([], [], **look, label=kind) for kind, look in looks.items() if kind in kinds]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), columnspacing=1.4)
    return figure


def _upright(
    axes: Axes, across: int, name: str, column: Sequence[float | str | None], turned: bool
) -> NDArray[np.float64]:
    """Draw one axis of parallel coordinates; its low end is on top where it is `turned`.

    Returns:
        [T] heights of the column's values in 0..1, NaN for None.
    """
    scale = _Scale((value for value in column if value is not None), name)
    low, high = reversed(scale.ends) if turned else scale.ends
    axes.axvline(across, color=_GREY, linewidth=0.9, zorder=5)
    under = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
    for place, label in scale.ticks:
        height = (place - low) / (high - low)
        axes.plot(across, height, "_", ms=5, color=_GREY, zorder=5)
        look = {"ha": "right", "va": "center", "fontsize": 7, "bbox": under, "zorder": 6}
        axes.annotate(_short(label, 10), (across, height), (-4, 0), textcoords="offset points", **look)
    places = np.array([math.nan if value is None else scale.place(value) for value in column])
    return (places - low) / (high - low)


def pareto(trials: Sequence[Trial], goals: Sequence[Goal]) -> Figure:
    """The finished trials by each pair of goals; the line joins those that none beats in both of the pair.

    Args:
        trials: finished ones.
        goals: two or more.
    """
    pairs = list(combinations(range(len(goals)), 2))[:MOST_PANELS]
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    side = {1: 5.6, 2: 4.2, 3: 2.9}[columns]
    figure = _figure(side * columns, 0.82 * side * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(pairs) :]:
        panel.set_visible(False)
    for panel, pair in zip(panels.flat, pairs, strict=False):
        x, y = (_values(trials, index) for index in pair)
        up = [goals[index].maximize for index in pair]
        edge = _edge(x if up[0] else -x, y if up[1] else -y)
        panel.step(x[edge], y[edge], where="post", color=_BEST, linewidth=1.4, alpha=0.7, zorder=1)
        _points(panel, trials, x, y)
        front = [place for place, trial in enumerate(trials) if trial.kind in ("best", "Pareto front")]
        panel.margins(0.12)
        named: list[int] = []
        for place in sorted(front, key=lambda place: trials[place].kind != "best") if len(front) <= 10 else ():
            near = [abs(each[named] - each[place]) < 0.03 * np.ptp(each) for each in (x, y)]
            if not (near[0] & near[1]).any():  # numbers over one another cannot be read
                named.append(place)
                where = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7.5, "zorder": 7}
                panel.annotate(str(trials[place].number), (x[place], y[place]), **where)
        arrow = ("↗" if up[1] else "↘") if up[0] else ("↖" if up[1] else "↙")
        panel.set_title(
            f"better {arrow}", loc="right" if up[0] else "left", color=_GREY, fontsize=8, fontweight="normal"
        )
        panel.set_xlabel(goals[pair[0]].label)
        panel.set_ylabel(goals[pair[1]].label)
        panel.grid()
    keys = _mark_keys(trials)
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), columnspacing=1.2, handletextpad=0.2)
    return figure


def mixtures(trials: Sequence[Trial], weights: Mapping[str, NDArray[np.float64]], goal: Goal) -> Figure:
    """Triangles of three weights each, coloured by value: in a corner its weight is alone, in the middle all are equal.

    Args:
        trials: T finished ones.
        weights: [T] of at least three names, 0 or more, in units that can be compared; NaN leaves a trial out.
        goal: the first, which gives the colours.
    """
    triples = list(combinations(weights, 3))[:MOST_PANELS]
    columns = 1 if len(triples) == 1 else 2 if len(triples) <= 4 else 4
    rows = math.ceil(len(triples) / columns)
    side = {1: 5.4, 2: 4.3, 4: 2.4}[columns]
    figure = _figure(side * columns + 0.9, 0.92 * side * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(triples) :]:
        panel.set_visible(False)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    colours = _better(_values(trials, 0), goal)
    told: set[int] = set()
    for panel, names in zip(panels.flat, triples, strict=False):
        panel.plot(*corners[[0, 1, 2, 0]].T, color=_GREY, linewidth=0.9, zorder=1)
        for share in (0.25, 0.5, 0.75):
            for corner in range(3):
                others = [corners[(corner + turn) % 3] for turn in (1, 2)]
                ends = np.array([share * corners[corner] + (1 - share) * other for other in others])
                panel.plot(*ends.T, color=_PALE, linewidth=0.7, zorder=0)
        stack = np.stack([weights[name] for name in names], axis=1)
        total = stack.sum(axis=1)
        drawn = np.flatnonzero(np.isfinite(total) & (total > 0)).tolist()
        x, y = (stack[drawn] / total[drawn, None] @ corners).T
        _coloured(panel, [trials[row] for row in drawn], x, y, colours)
        told.update(drawn)
        for place, name, where in zip(corners, names, ("left", "right", "center"), strict=True):
            shift, level = (-0.05, "top") if where != "center" else (0.04, "bottom")
            panel.text(
                place[0], place[1] + shift, _end_of(name, 24), ha=where, va=level, fontsize=8.5, fontweight="bold"
            )
        panel.set_xlim(-0.08, 1.08)
        panel.set_ylim(-0.13, 1.0)
        panel.set_aspect("equal")
        panel.set_axis_off()
    _quality_bar(figure, panels, colours, goal, [trials[row] for row in told])
    return figure


def plane(trials: Sequence[Trial], across: str, up: str, goal: Goal) -> Figure:
    """The finished trials in the plane of two settings, coloured by value.

    Args:
        trials: finished ones that have both settings.
        across: name of a setting.
        up: likewise.
        goal: the first, which gives the colours.
    """
    figure = _figure(6.6, 4.4)
    axes = figure.subplots()
    places = []
    for name in (across, up):
        scale = _Scale((trial.settings[name] for trial in trials), name)
        places.append([scale.place(trial.settings[name]) for trial in trials])
        side = axes.xaxis if name == across else axes.yaxis
        side.set_ticks([place for place, _ in scale.ticks], [_short(label, 12) for _, label in scale.ticks])
        side.set_label_text(_end_of(name, 50))
        (axes.set_xlim if name == across else axes.set_ylim)(*scale.ends)
        if scale.words and scale.numeric:
            (axes.axvline if name == across else axes.axhline)(scale.border, color=_PALE, linewidth=1.0)
    colours = _better(_values(trials, 0), goal)
    _coloured(axes, trials, places[0], places[1], colours)
    axes.grid()
    _quality_bar(figure, axes, colours, goal, trials)
    return figure


class _Scale:
    """Where the values of a setting stand along an axis: numbers from 0 to 1, words below them or, alone, side by side.

    Numbers are placed by their logarithm where they are positive and span more than a decade, but for decibels, which
    are logarithms.
    """

    _APART = 0.28

    def __init__(self, values: Iterable[float | str], name: str = "") -> None:
        values = set(values)
        self._numbers = sorted(value for value in values if not isinstance(value, str))
        words = sorted(value for value in values if isinstance(value, str))
        self.numeric = bool(self._numbers)
        if self.numeric:
            self.words = {word: -self._APART * (place + 1) for place, word in enumerate(words)}
            self.reach = 0.3 * self._APART
            """Half the width of a word's column."""
            self.ends = (-self._APART * len(words) - (0.17 if words else 0.07), 1.07)
        else:
            self.words = {word: (place + 0.5) / len(words) for place, word in enumerate(words)}
            self.reach, self.ends = 0.3 / max(1, len(words)), (0.0, 1.0)
        self.border = -self._APART / 2
        """Between words and numbers."""
        low, high = (self._numbers[0], self._numbers[-1]) if self.numeric else (0.0, 1.0)
        self._log = 0 < 10 * low < high and not name.removesuffix(" from").removesuffix(" to").endswith("_db")
        self._ends = (math.log(low), math.log(high)) if self._log else (low, high)

    def place(self, value: float | str) -> float:
        """Of one of the values, or of a number between them."""
        if isinstance(value, str):
            return self.words[value]
        low, high = self._ends
        return ((math.log(value) if self._log else value) - low) / (high - low) if high > low else 0.5

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels, few enough for a small panel."""
        return [
            *((place, word) for word, place in self.words.items()),
            *((self.place(number), f"{number:.4g}".replace("-", "\u2212")) for number in self._round_numbers()),
        ]

    def _round_numbers(self) -> Sequence[float]:
        from matplotlib.ticker import MaxNLocator

        if len(self._numbers) < 2:
            return self._numbers
        low, high = self._numbers[0], self._numbers[-1]
        if self._log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks: list[float] = []
            for factors in ((1, 2, 5), (1, 3), (1,)):
                ticks = [factor * 10.0**decade for decade in decades for factor in factors]
                ticks = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick * (1 - 1e-9) <= high]
                if len(ticks) <= 4:
                    break
            return ticks[:: math.ceil(len(ticks) / 4)]
        whole = all(number == round(number) for number in self._numbers)
        if whole and len(self._numbers) <= 4 and min(np.diff(self._numbers)) > 0.15 * (high - low):
            return self._numbers
        return [
            tick
            for tick in MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            if low <= tick <= high
        ]


def _values(trials: Sequence[Trial], index: int) -> NDArray[np.float64]:
    """[T] values of one goal; all trials are finished."""
    return np.array([trial.values[index] for trial in trials if trial.values is not None], np.float64)


def _mark_keys(trials: Sequence[Trial]) -> list[Line2D]:
    """The legend of the marks that these trials have."""
    from matplotlib.lines import Line2D

    kinds = {trial.kind for trial in trials}
    return [Line2D([], [], ls="", label=kind, **mark) for kind, mark in _MARKS.items() if kind in kinds]


def _points(
    axes: Axes,
    trials: Sequence[Trial],
    x: Sequence[float] | NDArray[np.float64],
    y: Sequence[float] | NDArray[np.float64],
) -> None:
    """The marks of finished trials, the best on top."""
    for height, kind in enumerate(("finished", "as it stands", "Pareto front", "best")):
        own = [place for place, trial in enumerate(trials) if trial.kind == kind]
        axes.plot([x[place] for place in own], [y[place] for place in own], ls="", zorder=3 + height, **_MARKS[kind])


def _coloured(
    axes: Axes,
    trials: Sequence[Trial],
    x: Sequence[float] | NDArray[np.float64],
    y: Sequence[float] | NDArray[np.float64],
    colours: ScalarMappable,
) -> None:
    """Finished trials in the colour of their value; a ring tells the best, a diamond the experiment as it stands."""
    for trial, left, foot, colour in zip(trials, x, y, colours.to_rgba(_values(trials, 0)), strict=True):
        best = trial.kind == "best"
        ring = _RING if best else {"mec": "white", "mew": 0.6, "ms": 8}
        axes.plot(left, foot, "o" if trial.number else "D", mfc=colour, **ring, zorder=4 if best else 3, clip_on=False)


def _better(values: NDArray[np.float64], goal: Goal) -> ScalarMappable:
    """Colours of values, the darker the better."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shades = LinearSegmentedColormap.from_list("better", ["#cfe0ef", "#5a9bd0", ACCENT, "#062f54"])
    low, high = float(values.min()), float(values.max())
    around = 0.5 if low == high else 0.0
    return ScalarMappable(Normalize(low - around, high + around), shades if goal.maximize else shades.reversed())


def _quality_bar(figure: Figure, panels: Any, colours: ScalarMappable, goal: Goal, trials: Collection[Trial]) -> None:
    """What the colours and marks of `_coloured` mean."""
    from matplotlib.lines import Line2D

    marks: dict[str, Mapping[str, Any]] = {
        "as it stands": {"marker": "D", "ms": 8, "mfc": _GREY, "mec": "white", "mew": 0.6},
        "best": {"marker": "o", "mfc": "white", **_RING},
    }
    there = {"as it stands": any(not trial.number for trial in trials), "best": any(t.kind == "best" for t in trials)}
    keys = [Line2D([], [], ls="", label=label, **mark) for label, mark in marks.items() if there[label]]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=2, columnspacing=1.2, handletextpad=0.2)
    bar = figure.colorbar(colours, ax=panels, shrink=0.8, pad=0.03, aspect=28)
    bar.set_label(f"{goal.label}, darker is better")
    bar.outline.set_visible(False)


def _edge(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[int]:
    """Places of the points that none beats in both, by descending x; more is better."""
    edge: list[int] = []
    for place in sorted(range(len(x)), key=lambda place: (-x[place], -y[place])):
        if not edge or y[place] > y[edge[-1]]:
            edge.append(place)
    return edge


def _figure(width_inch: float, height_inch: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch))
    FigureCanvasAgg(figure)
    return figure


def _shades() -> Colormap:
    """Colours of the cells of a matrix, from white to dark."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#ffffff", "#c6dbee", "#5a9bd0", ACCENT, "#073a66"])


def _ink(cells: ScalarMappable, value: float | NDArray[Any]) -> str:
    """Black or white, whichever can be read better in a cell of this value: their contrast (WCAG) is 4.5 at least."""
    rgb = np.array(cells.to_rgba(np.asarray(value))[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def _small_panels(count: int, most: int, ratio: float, share: bool) -> tuple[Figure, NDArray[Any]]:
    """A figure of `count` small panels, up to `most` in a row, each `ratio` as high as wide; [rows, columns]."""
    rows = math.ceil(count / most)
    columns = math.ceil(count / rows)
    width_inch = min(2.9, _WIDTH_INCH / columns)
    figure = _figure(width_inch * columns + 0.4, width_inch * ratio * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for panel in panels.flat[count:]:
        panel.set_visible(False)
    return figure, panels


def _lines(
    axes: Axes,
    folds: Mapping[int, NDArray[np.float64]],
    colours: Sequence[str],
    mean_colour: str = ACCENT,
    ticks: int = 6,
) -> None:
    """Every fold thin, their mean thick over the epochs all of them reached; missing values are marked."""
    from matplotlib.ticker import MaxNLocator

    several = len(folds) > 1
    thin = {"linewidth": 0.9, "alpha": float(np.clip(3 / len(folds), 0.12, 0.45))}
    thick = {"linewidth": 2.4}
    missing: list[int] = []
    for values, colour in zip(folds.values(), colours, strict=True):
        finite = np.isfinite(values)
        missing += (np.flatnonzero(~finite) + 1).tolist()
        _line(axes, np.where(finite, values, np.nan), colour, thin if several else thick)
    if several:
        reached = min(len(values) for values in folds.values())
        stack = np.stack([values[:reached] for values in folds.values()])
        mean = np.where(np.isfinite(stack).all(axis=0), np.where(np.isfinite(stack), stack, 0).mean(axis=0), np.nan)
        _line(axes, mean, mean_colour, thick)
    if missing:
        # At the foot of the panel, whatever its range: x in epochs, y in parts of the panel.
        foot = axes.get_xaxis_transform()
        axes.plot(missing, [0.04] * len(missing), "x", color=_WARNING, ms=5, transform=foot, clip_on=False, zorder=6)
        text = "1 value is not finite" if len(missing) == 1 else f"{len(missing)} values are not finite"
        axes.text(0.98, 0.94, text, color=_WARNING, transform=axes.transAxes, ha="right", va="top", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    longest = max((len(values) for values in folds.values()), default=1)
    axes.set_xlim(1 - 0.02 * longest - 0.1, longest + 0.02 * longest + 0.1)
    axes.grid(axis="y")


def _line(axes: Axes, values: NDArray[np.float64], colour: str, look: Mapping[str, Any]) -> None:
    alone = np.isfinite(values).sum() == 1  # a line through one point would not be seen
    axes.plot(np.arange(1, len(values) + 1), values, marker="o" if alone else None, ms=4, color=colour, **look)


def _above_the_frame(axes: Axes, chance: float) -> None:
    """Leave room below the line of chance, in 0..1, which would else lie on the axis where nothing is as low."""
    axes.set_ylim(bottom=min(axes.get_ylim()[0], 100 * chance - 3))


def _fold_colours(folds: Sequence[int]) -> dict[int, str]:
    """A colour for each fold, or the accent for all where there are more folds than colours."""
    if len(folds) > len(_PALETTE) or len(folds) < 2:
        return dict.fromkeys(folds, ACCENT)
    return dict(zip(folds, _PALETTE, strict=False))


def _short(name: str, width: int = 24) -> str:
    """A name that fits a picture: one line, cut with an ellipsis, without characters that an SVG file must not hold."""
    name = "".join(character if character.isprintable() else "?" for character in " ".join(name.split()))
    return name if len(name) <= width else name[: width - 1].rstrip() + "…"


def _end_of(name: str, width: int) -> str:
    """The same of a dotted key, whose end tells more than its beginning."""
    name = _short(name, len(name))
    return name if len(name) <= width else "…" + name[1 - width :]
