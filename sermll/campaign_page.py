"""What a campaign shows, for people: a page with pictures, the table as CSV, Markdown and LaTeX, lines for a terminal.

All of them are printed from `Tally.as_json`. A score stands with its interval, a difference with its verdict.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from sermll import metrics, page, pictures
from sermll.errors import DataError
from sermll.page import Html, tag
from sermll.storage import place, send
from sermll.tables import cut, latex, leak_notices, markdown, percent, with_interval
from sermll.tally import Cost, Group, Json, Row, Tally, code_in_words, tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 100
"""Columns of the terminal."""
NAMED = 8
"""Differences that the headline names, and failures that the terminal does."""
UNDECIDED = "no difference shown"
LAST = "last epoch"
SAME = "the same"
"""The score by the last epoch, where the last epoch is the rule."""
PRINTED = ("UA", "WA", "macro F1", "UA, last epoch", "difference in UA", "p (Holm)", "verdict", "folds x seeds")
"""Columns of table.md and table.tex after those of the axes; table.csv has every number."""


def build(campaign_dir: Path) -> tuple[Tally, Path]:
    """Count a campaign and write its page, see `tally` and `write`."""
    found = tally(campaign_dir)
    return found, write(found)


def write(found: Tally) -> Path:
    """Write `report/` in the campaign's folder: index.html, its pictures as PNG and SVG, table.csv, .md and .tex.

    Returns:
        Path of the page, which holds everything it shows.

    Raises:
        DataError: the folder cannot be written.
    """
    out = found.folder / "report"
    try:
        out.mkdir(exist_ok=True)
        for old in (*out.glob("*.png"), *out.glob("*.svg")):  # of groups that may be gone
            old.unlink()
        _write_tables(found, out)
        sections = [_overview(found, out), *(_group(found, number, out) for number in range(len(found.groups)))]
        path = out / "index.html"
        whole = page.page(found.campaign["name"], (tag("section", *parts) for parts in (*sections, _rest(found))))
        path.write_text(whole, encoding="utf-8", newline="\n")
        send(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error})") from None
    return path


def text(found: Tally) -> str:
    """The campaign for the terminal, at most 100 columns wide."""
    notices = [line for notice in _notices(found) for line in wrap(cut(notice, 4 * WIDTH), WIDTH)]
    lines = [f"campaign {found.campaign['name']}: {_progress(found)}", *notices]
    for group, records in _by_group(found):
        header = {"name": "", "UA": "UA [95 % interval]", "last": "last", "sd": "sd", "folds": "folds"}
        rows = [{**header, "versus": "difference", "verdict": ""}]
        for rank, (name, record) in enumerate(zip(group.names, records, strict=True)):
            cells = _cells(record)
            last = "" if record["select"] == "last" else percent(record["last_ua"])
            row = {"name": name, "UA": cells["UA"], "last": last, "sd": cells["sd over seeds"]}
            row["folds"] = f"{record['finished']}/{record['asked']}"
            row["versus"] = cells["difference in UA"] or "reference" * (rank == 0 and len(records) > 1)
            rows.append({**row, "verdict": cells["verdict"]})
        told = [key for key in rows[0] if key == "name" or any(row[key] for row in rows[1:])]
        if all(record["finished"] == record["asked"] for record in records):
            told.remove("folds")
        widths = {key: max(len(row[key]) for row in rows) for key in told}
        widths["name"] = min(widths["name"], WIDTH - sum(widths[key] + 2 for key in told[1:]))
        aligned = ("  ".join(cut(row[key], widths[key]).ljust(widths[key]) for key in told) for row in rows)
        lines += ["", group.title, *(line.rstrip() for line in aligned)]
    failures = _failures(found)
    lines += ["", *(f"failed: {name}, {why}" for name, why in failures[:NAMED])]
    lines += [f"and {len(failures) - NAMED} more failed"] if len(failures) > NAMED else []
    last = "last: UA by the last epoch. " if _epoch(found) != LAST else ""
    legend = f"UA: {_epoch(found)}. {last}sd: standard deviation of the seeds' UA. Intervals are over speakers."
    lines += wrap(legend, WIDTH)
    return "\n".join(cut(line, WIDTH) for line in lines)


def _by_group(found: Tally) -> list[tuple[Group, list[Json]]]:
    records = iter(found.as_json())
    return [(group, [next(records) for _ in group.rows]) for group in found.groups]


def _cells(record: Json) -> dict[str, str]:
    """A row's numbers as they are printed, by column; empty where there is none."""
    difference = _signed(record["difference"])
    interval = f" [{_signed(record['difference_low'])}, {_signed(record['difference_high'])}]" if difference else ""
    return {
        "UA": _ci(record, "ua"),
        "WA": _ci(record, "wa"),
        "macro F1": _ci(record, "macro_f1"),
        "UA, last epoch": SAME if _is_last(record) else _ci(record, "last_ua"),
        "sd over seeds": percent(record["seed_sd"]),
        "sd over folds": percent(record["fold_sd"]),
        "difference in UA": difference + interval,
        "p": _p(record["p"]),
        "p (Holm)": _p(record["p_holm"]),
        "verdict": record["verdict"] or "",
        "folds x seeds": f"{record['finished']} of {record['asked']}",
    }


def _write_tables(found: Tally, out: Path) -> None:
    """The same rows three times: every number for programs, the printed ones for documents."""
    records = found.as_json()
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        listed = {"folds": " ", "compared_folds": " ", "failures": "; ", "leaks": "; "}
        for record in records:
            writer.writerow(record | {key: mark.join(map(str, record[key])) for key, mark in listed.items()})
    axes = [key for key in records[0] if key.startswith("axis_")]
    header = [*(axis.removeprefix("axis_") for axis in axes), *PRINTED]
    groups = [
        [[*(record[axis] for axis in axes), *(_cells(record)[column] for column in PRINTED)] for record in members]
        for _, members in _by_group(found)
    ]
    leaks = _leaks(found)
    (out / "table.md").write_text(markdown(header, [row for rows in groups for row in rows], leaks), encoding="utf-8")
    columns = "l" * len(axes) + "r" * (len(PRINTED) - 2) + "lr"
    note = f"in percent, mean over folds and seeds, {_epoch(found)}, [95 % interval over speakers]"
    (out / "table.tex").write_text(latex(header, groups, columns, note, leaks), encoding="utf-8")


def _overview(found: Tally, out: Path) -> Iterator[Html]:
    yield tag("h1", found.campaign["name"])
    axes = " x ".join(f"{axis} ({len(values)})" for axis, values in found.campaign["axes"].items())
    yield tag("p", f"{axes}: {_progress(found)}.")
    headline, *sentences = _headline(found)
    yield tag("div", tag("span", headline, class_="score"), *(tag("div", line) for line in sentences), class_="result")
    yield from (tag("p", notice, class_="notice") for notice in _notices(found))
    if any(row.scores for row in found.rows):
        yield tag("h3", "Scores and differences")
        yield _drawn(
            partial(pictures.forest, list(_bars(found))),
            out / "forest",
            "Scores and differences",
            f"Left: UA, mean over folds and seeds, {_epoch(found)}, with its 95 % interval over speakers. Right: "
            "the paired difference to the first row of the group, on the folds that both have. Rows share their "
            "speakers: intervals on the left may overlap where the difference on the right is clear.",
        )


def _headline(found: Tally) -> list[str]:
    """What is shown and what is not; of a single row its score."""
    shown, differences = [], 0
    for group, records in _by_group(found):
        for name, record in zip(group.names, records, strict=True):
            differences += record["difference"] is not None
            if record["verdict"] not in (None, UNDECIDED):
                shown.append(f"{group.title}: {name} is {_in_words(record)} than {group.names[0]}.")
    scored = [record for record in found.as_json() if record["ua"] is not None]
    if not differences:
        if len(scored) == 1:
            return [f"UA {percent(scored[0]['ua'])} %", f"{_ci(scored[0], 'ua')}, {_epoch(found)}."]
        return ["No differences yet" if scored else "No numbers yet"]
    rest = differences - len(shown)
    more = [f"And {len(shown) - NAMED} more, see below."] if len(shown) > NAMED else []
    others = f"The other {rest}" if shown else f"Of all {rest}"
    more += [f"{others}: {UNDECIDED}, which does not say that they are equal."] if rest else []
    return [f"{len(shown)} of {page.count(range(differences), 'difference')} shown", *shown[:NAMED], *more]


def _in_words(record: Json) -> str:
    if record["difference"] is None:
        return "too few common folds"
    if record["verdict"] == UNDECIDED:
        return UNDECIDED
    return f"{100 * abs(record['difference']):.1f} points {record['verdict']}"


def _notices(found: Tally) -> list[str]:
    """What a reader must know before trusting the numbers."""
    notices = _leaks(found)
    unfinished = [row for row in found.rows if row.finished < row.asked]
    if unfinished:
        count = page.count(unfinished, "row")
        notices.append(f"{count} not finished: only folds that are finished with every seed count.")
    failed = _failures(found)
    notices += [f"{page.count(failed, 'fold')} failed, see below."] if failed else []
    codes = sorted(set().union(*(row.codes for row in found.rows)))
    notices += [f"The runs were made by different code: {'; '.join(codes)}."] if len(codes) > 1 else []
    differences = sum(row.versus is not None for row in found.rows)
    for group in found.groups:
        least = group.smallest_p
        if least is not None and differences * least >= 0.05:
            notices.append(
                f"{group.title}: with so few speakers p is at least {least:.2g}, before it is corrected for "
                f"{page.count(range(differences), 'difference')}. Hardly any can be shown, whatever its size."
            )
    return notices


def _epoch(found: Tally) -> str:
    """By which epoch the scores are."""
    rules = {row.select == "last" for row in found.rows if row.select}
    return "epoch as protocol.select says" if len(rules) > 1 else LAST if True in rules else "epoch chosen on dev"


def _is_last(record: Json) -> bool:
    """Whether a row's scores are those by the last epoch, as its rule has it."""
    return record["select"] == "last" and record["ua"] is not None


def _leaks(found: Tally) -> list[str]:
    return leak_notices({", ".join(row.labels.values()): row.leaks for row in found.rows})


def _group(found: Tally, number: int, out: Path) -> Iterator[Html]:
    """Everything about the rows that test the same utterances."""
    group, records = _by_group(found)[number]
    names, facts = group.names, group.rows[0].facts
    yield tag("h2", group.title)
    if facts is None:
        yield tag("p", f"No run of these has started: {'; '.join(names)}.")
        return
    classes, folds = facts["data"]["classes"], facts["protocol"]["folds"]
    done = {fold for row in group.rows for fold in row.folds}
    tested = [fold for fold in folds if fold["fold"] in done] or folds
    speakers = page.count(sorted({speaker for fold in tested for speaker in fold["test"]}), "test speaker")
    heard = page.count(tested, "fold") + (f" of {len(folds)}" if len(tested) < len(folds) else "")
    seeds = page.count(range(max(row.seeds for row in group.rows)), "seed")
    size = f"{len(classes)} classes, chance {percent(1 / len(classes))} %"
    yield tag("p", f"{size}; {heard}, {speakers}; {seeds}.")
    scored = {name: row.scores for name, row in zip(names, group.rows, strict=True) if row.scores}
    if not scored:
        yield tag("p", "No fold is finished with every seed yet.")
        return
    yield tag("h3", "Scores")
    yield page.table(
        ("in %", "UA", "WA", "macro F1", "UA, last epoch", "sd over seeds", "sd over folds", "folds x seeds",
         "no result: UA chosen on test"),
        [_score_row(name, row, record) for name, row, record in zip(names, group.rows, records, strict=True)],
    )  # fmt: skip
    yield tag("p", _NO_RESULT)
    if len(names) > 1:
        yield tag("h3", f"Differences to {names[0]}")
        rows = []
        for name, record in list(zip(names, records, strict=True))[1:]:
            cells = _cells(record)
            numbers = (cells[key] or "—" for key in ("difference in UA", "p", "p (Holm)"))
            compared = record["compared_folds"]
            of = "all" if len(compared) == len(folds) else ", ".join(map(str, compared)) or "none"
            rows.append((name, *numbers, of, _in_words(record)))
        header = ("row", "points of UA [95 % interval]", "p", "p (Holm)", "of folds", "in words")
        yield page.table(header, rows, words=(0, 4, 5))
    hidden = f" The first {pictures.MOST_PANELS} of {len(scored)} rows are shown." * (
        len(scored) > pictures.MOST_PANELS
    )
    yield tag("h3", "UA on dev")
    curves = {name: scores.dev_ua for name, scores in scored.items()}
    yield _drawn(
        partial(pictures.dev_curves, curves, 1 / len(classes)),
        out / f"dev_ua-{number + 1}",
        f"UA on dev, {group.title}",
        f"Mean over folds and seeds by epoch. Grey: {next(iter(scored))}. Dotted: chance." + hidden,
    )
    yield tag("h3", "Confusion matrices")
    counts = {name: scores.counts.sum(axis=0) for name, scores in scored.items()}
    draw = partial(pictures.confusions, counts, classes)
    if len(counts) == 1:
        (only,) = counts.values()
        draw = partial(pictures.confusion, only.astype(int), metrics.recalls(only), classes)
    yield _drawn(
        draw,
        out / f"confusion-{number + 1}",
        f"Confusion matrices, {group.title}",
        "Percent of the true class, over all folds and seeds that count." + hidden,
    )


_NO_RESULT = (
    "The last column is no result: it tells what choosing the epoch of each fold on that test fold would have shown, "
    "and so how far published numbers may be lifted where that choice is not stated."
)


def _score_row(name: str, row: Row, record: Json) -> list[object]:
    cells = _cells(record)
    scores: list[object] = [_stacked(record, key) for key in ("ua", "wa", "macro_f1")]
    scores.append(SAME if _is_last(record) else _stacked(record, "last_ua"))
    done: object = cells["folds x seeds"]
    if row.folds and row.finished < row.asked:
        counted = f"of fold {', '.join(map(str, row.folds))}"
        done = Html(f"{done}{tag('small', counted)}")
    chosen, ua = record["chosen_on_test_ua"], record["ua"]
    lifted = "—" if chosen is None else f"{percent(chosen)} ({_signed(chosen - ua)})"
    return [name, *scores, cells["sd over seeds"] or "—", cells["sd over folds"] or "—", done, lifted]


def _rest(found: Tally) -> Iterator[Html]:
    """Failures, cost, and what it takes to do it again."""
    campaign = found.campaign
    yield tag("h2", "The runs")
    failed = _failures(found)
    if failed:
        yield tag("h3", "Failures")
        yield page.table(("row", "which and why"), failed, words=(0, 1))
    yield tag("h3", "Cost in hours")
    rows = [
        (name, group.title, *hours(row.cost))
        for group in found.groups
        for name, row in zip(group.names, group.rows, strict=True)
    ]
    total = sum((row.cost for row in found.rows), Cost())
    header = ("row", "group", "wall clock", "training", "CPU", "GPU")
    yield page.table(header, [*rows, ("all", "", *hours(total))], words=(0, 1))
    yield tag(
        "p",
        "Wall clock is summed over folds, though they may have been trained side by side. CPU and GPU hours are those "
        "of training, times what the workers held; a dash where an earlier version did not tell.",
    )
    yield tag("h3", "To do it again")
    everywhere, cells = _overrides(campaign["cells"])
    values = {f"axis {axis}": ", ".join(names) for axis, names in campaign["axes"].items()}
    codes = "; ".join(sorted(set().union(*(row.codes for row in found.rows)))) or "no run has started"
    yield page.facts(
        {
            **values,
            "overrides": everywhere or "none beside those of the axes",
            "code": code_in_words(campaign["code"]),
            "code of the runs": codes,
            "made": campaign["created"],
            "folder": found.folder.name,
        }
    )
    listed = page.table((*campaign["axes"], "overrides", "run"), cells, words=range(len(campaign["axes"]) + 2))
    yield tag("details", tag("summary", f"All {page.count(cells, 'cell')}"), listed)
    yield tag("h3", "Words")
    yield page.facts({word: told for word, told in _WORDS.items() if word != "Chosen on dev" or _epoch(found) != LAST})


_WORDS = {
    "UA": "unweighted accuracy, the mean of the recalls of the classes: every class counts the same.",
    "WA": "weighted accuracy, the share of utterances recognised: frequent classes count more.",
    "Chosen on dev": "by the best epoch on the dev speakers; test speakers have no say.",
    "Interval": "where the mean over seeds lies in 95 % of random draws of the test speakers, with replacement. "
    "Neither it nor p tells how another seed would vary the score: the standard deviation over seeds does, as far as "
    "few seeds can.",
    "p": "how often a difference as large comes about if, speaker by speaker, it is left to chance which of the two "
    "rows said what. Holm: corrected for all differences of the campaign.",
    "Shown": "the interval of the difference leaves out 0, and the corrected p is below 0.05.",
}


def _overrides(cells: Sequence[Json]) -> tuple[str, list[list[str]]]:
    """The overrides of all cells, and for each cell its labels, the others, and its run's folder."""

    def words(overrides: Json) -> str:
        return " ".join(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()
        )

    common = {
        key: value
        for key, value in cells[0]["overrides"].items()
        if all(key in cell["overrides"] and cell["overrides"][key] == value for cell in cells)
    }
    rows = []
    for cell in cells:
        own = {key: value for key, value in cell["overrides"].items() if key not in common}
        rows.append([*cell["labels"].values(), words(own), place(cell["run_dir"]).name])
    return words(common), rows


def _bars(found: Tally) -> Iterator[tuple[str, list[pictures.Bar]]]:
    """The rows of the forest plot, of groups that have a number."""

    def ends(record: Json, key: str) -> tuple[Any, ...] | None:
        return None if record[key] is None else (record[key], record[f"{key}_low"], record[f"{key}_high"])

    for group, records in _by_group(found):
        if any(row.scores for row in group.rows):
            yield (
                group.title,
                [
                    pictures.Bar(
                        name
                        if len(row.folds) * row.seeds == row.asked
                        else f"{name} ({page.count(row.folds, 'fold')})",
                        ends(record, "ua"),
                        ends(record, "difference"),
                        record["verdict"] or "",
                    )
                    for name, row, record in zip(group.names, group.rows, records, strict=True)
                ],
            )


def _drawn(draw: "Callable[[], Figure]", stem: Path, title: str, caption: str) -> Html:
    return page.figure(pictures.save(stem, draw), title, caption)


def _progress(found: Tally) -> str:
    finished, asked = (sum(getattr(row, name) for row in found.rows) for name in ("finished", "asked"))
    return f"{page.count(found.rows, 'row')}, {finished} of {page.count(range(asked), 'fold')} finished"


def _failures(found: Tally) -> list[tuple[str, str]]:
    return [(", ".join(row.labels.values()), failure) for row in found.rows for failure in row.failures]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ci(record: Json, key: str) -> str:
    return with_interval({"value": record[key], "low": record[f"{key}_low"], "high": record[f"{key}_high"]})


def _stacked(record: Json, key: str) -> object:
    """A score with its interval below it."""
    low, high = (record[f"{key}_{end}"] for end in ("low", "high"))
    below = "" if low is None else tag("small", f"{percent(low)}\u00a0to\u00a0{percent(high)}")
    return Html(percent(record[key]) + below)


def hours(cost: Cost) -> tuple[str, ...]:
    """Wall clock, training, CPU and GPU hours as they are printed."""
    return tuple(
        "—" if hours is None else f"{hours:.2f}" for hours in (cost.wall_h, cost.train_h, cost.cpu_h, cost.gpu_h)
    )
