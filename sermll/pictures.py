"""The pictures of a report: plain arrays in, matplotlib figures out, files on disk.

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart with any kind of colour vision;
classes also differ in their marker. Values that are not finite are left out of a line and marked in red.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # matplotlib takes half a second to import, so it waits until something is drawn
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

ACCENT = "#0b5c9e"
"""The one colour of the report."""
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222", "#8f8f8f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", ">", "p", "*")
_INK, _GREY, _PALE, _WARNING = "#1d1d1f", "#6a6a6f", "#dfe1e5", "#b00020"
_MOST_SPEAKER_NAMES = 120
_WIDTH_INCH = 8.6

MOST_PANELS = 12
"""Of a picture with a panel for each fold or row; more would be too small to read."""

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


class Bar(NamedTuple):
    """A row of a forest plot: UA with its interval, and the difference to the group's first row; all in 0..1."""

    name: str
    ua: tuple[float, float | None, float | None] | None
    """Value, low, high; no interval with one speaker, and None without a number."""
    difference: tuple[float, float, float] | None
    verdict: str
    """'higher', 'lower', or anything else."""


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
    cells.pcolormesh(edges, edges, shares, cmap=_shades(), vmin=0, vmax=1, edgecolors="white", linewidth=1.2)
    cells.invert_yaxis()
    font_pt = min(9.0, max(4.0, 70 * side / size / 6.0))
    for row in range(size):
        for column in range(size):
            ink = "white" if shares[row, column] > 0.45 else _INK
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
    axes.axhline(100 * chance, color=_GREY, linestyle=(0, (1, 2)), linewidth=1.2)
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
    keys.append(Line2D([], [], color=_GREY, linestyle=(0, (1, 2)), linewidth=1.2, label="chance"))
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
    axes.axhline(100 * chance, color=_GREY, linestyle=(0, (1, 2)), linewidth=1.2)
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
    keys.append(Line2D([], [], color=_GREY, linestyle=(0, (1, 2)), linewidth=1.2, label="chance"))
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
        share.plot([0, 100], [0, 100], color=_GREY, linestyle=(0, (1, 2)), linewidth=1.2)
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


def forest(groups: Sequence[tuple[str, Sequence[Bar]]]) -> Figure:
    """UA of every row with its interval and, beside it, the paired difference to the first row of its group.

    Args:
        groups: titles, each with its rows, the reference first.
    """
    heights = [len(bars) + 0.4 for _, bars in groups]
    figure = _figure(_WIDTH_INCH, 0.25 * sum(heights) + 0.42 * len(groups) + 0.75)
    panels = figure.subplots(len(groups), 2, squeeze=False, sharex="col", height_ratios=heights, width_ratios=(1.15, 1))
    looks = {"higher": (">", _PALETTE[0], _PALETTE[0]), "lower": ("<", _PALETTE[1], _PALETTE[1])}
    for (scores, differences), (title, bars) in zip(panels, groups, strict=True):
        for place, bar in enumerate(bars):
            ink = ACCENT if place else _INK
            if bar.ua is None:
                scores.text(
                    0.02, place, "no number yet", transform=scores.get_yaxis_transform(), va="center", color=_GREY
                )
                continue
            value, *ends = (None if one is None else 100 * one for one in bar.ua)
            if ends[0] is not None:
                scores.plot(ends, [place, place], color=ink, linewidth=2.2, alpha=0.45)
            scores.plot(value, place, "o" if place else "D", ms=6.5 if place else 6, mfc=ink, mec="white", mew=0.8)
            side = scores.get_yaxis_transform()
            scores.text(1.01, place, f"{value:.1f}", transform=side, va="center", fontsize=8.5)
            if bar.difference is not None:
                middle, low, high = (100 * one for one in bar.difference)
                marker, edge, face = looks.get(bar.verdict, ("o", _GREY, "white"))
                differences.plot([low, high], [place, place], color=edge, linewidth=2.2, alpha=0.55)
                differences.plot(middle, place, marker, ms=6.5, mfc=face, mec=edge, mew=1.2)
        if bars[0].ua is not None:
            scores.axvline(100 * bars[0].ua[0], color=_GREY, linestyle=(0, (1, 2)), linewidth=1.0, zorder=0)
        differences.axvline(0, color=_GREY, linestyle=(0, (1, 2)), linewidth=1.0, zorder=0)
        if len(bars) > 1:
            differences.text(
                0, 0, " reference ", va="center", ha="center", fontsize=8.5, color=_INK, backgroundcolor="white"
            )
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
    if not any(bar.difference for _, bars in groups for bar in bars):
        for axes in panels[:, 1]:
            axes.set_visible(False)
        return figure

    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=edge, marker=marker, ms=6.5, mfc=face, mec=edge, mew=1.2, label=label)
        for label, (marker, edge, face) in {**looks, "no difference shown": ("o", _GREY, "white")}.items()
    ]
    figure.legend(handles=keys, loc="outside lower right", ncols=3, columnspacing=1.4)
    return figure


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
        panel.axhline(100 * chance, color=_GREY, linestyle=(0, (1, 2)), linewidth=1.0)
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
        panel.pcolormesh(edges, edges, shares, cmap=_shades(), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
        panel.invert_yaxis()
        panel.set_aspect("equal")
        for row, column in np.ndindex(size, size):
            if size <= 10 and shares[row, column] >= 0.005:
                ink = "white" if shares[row, column] > 0.45 else _INK
                told = f"{100 * shares[row, column]:.0f}"
                panel.text(column, row, told, ha="center", va="center", color=ink, fontsize=min(8.0, 50 / size))
        panel.set_title(_short(name, 26), fontsize=8.5, pad=4)
        first, last = number % panels.shape[1] == 0, number + panels.shape[1] >= len(shown)
        panel.set_yticks(range(size), names if first else [], fontsize=7)
        panel.set_xticks(range(size), names if last else [], fontsize=7, rotation=90)
        panel.tick_params(length=0, pad=2)
        panel.spines[:].set_visible(False)
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
    from matplotlib.colors import LinearSegmentedColormap

    few = len(speakers) <= 40
    figure = _figure(min(11.0, max(5.0, 0.9 * len(classes) + 1.6)), min(11.0, max(2.2, 0.21 * len(speakers) + 0.9)))
    axes = figure.subplots()
    shades = LinearSegmentedColormap.from_list("count", ["#ffffff", "#c6dbee", "#5a9bd0", ACCENT])
    across, down = np.arange(len(classes) + 1) - 0.5, np.arange(len(speakers) + 1) - 0.5
    largest = int(counts.max(initial=1))
    mesh = axes.pcolormesh(
        across, down, counts, cmap=shades, vmin=0, vmax=largest, edgecolors="white", linewidth=0.8 if few else 0
    )
    axes.invert_yaxis()
    if few:
        for row, column in np.ndindex(*counts.shape):
            ink = "white" if counts[row, column] > 0.6 * largest else _INK
            ink = _WARNING if counts[row, column] == 0 else ink
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
        panel.set_ylabel("kHz")
    for panel in panels[-1]:
        panel.set_xlabel("s")
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
    axes.axhline(100 * chance, color=_GREY, linewidth=1.2, linestyle=(0, (1, 2)), label=f"chance {100 * chance:.1f} %")
    axes.set_xticks(levels, [f"{level:g}" for level in snr_db])
    axes.set_xlim(levels.max() + apart_db / 3, levels.min() - apart_db / 3)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
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
    from matplotlib.colors import LinearSegmentedColormap

    figure = _figure(1.55 * len(columns) + 2.4, 0.78 * len(rows) + 1.3)
    cells = figure.subplots()
    shades = LinearSegmentedColormap.from_list("ua", ["#ffffff", "#c6dbee", "#5a9bd0", ACCENT, "#073a66"])
    across, down = np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    mesh = cells.pcolormesh(
        across, down, 100 * values, cmap=shades, vmin=100 * chance, vmax=100, edgecolors="white", linewidth=2
    )
    cells.invert_yaxis()
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        if not math.isfinite(value):
            cells.text(column, row, "not finished", ha="center", va="center", color=_GREY, fontsize=8)
            continue
        ink = "white" if value > chance + 0.5 * (1 - chance) else _INK
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


def _figure(width_inch: float, height_inch: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch))
    FigureCanvasAgg(figure)
    return figure


def _shades() -> Colormap:
    """Colours of a share from 0 to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#ffffff", "#c6dbee", "#5a9bd0", ACCENT, "#073a66"])


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


def _fold_colours(folds: Sequence[int]) -> dict[int, str]:
    """A colour for each fold, or the accent for all where there are more folds than colours."""
    if len(folds) > len(_PALETTE) or len(folds) < 2:
        return dict.fromkeys(folds, ACCENT)
    return dict(zip(folds, _PALETTE, strict=False))


def _short(name: str, width: int = 24) -> str:
    """A name that fits a picture: one line, cut with an ellipsis, without characters that an SVG file must not hold."""
    name = "".join(character if character.isprintable() else "?" for character in " ".join(name.split()))
    return name if len(name) <= width else name[: width - 1].rstrip() + "…"
