"""What a search found, for people: a page with pictures, its trials as CSV, lines for a terminal.

All of it is told by the content of search.json, which the search keeps in its folder.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sermll import compare, page, pictures
from sermll.errors import DataError
from sermll.files import naming, read_json
from sermll.page import Html, tag
from sermll.pictures import Goal, Trial
from sermll.storage import send
from sermll.tables import cut, leak_notices, percent, with_interval
from sermll.tally import Json, code_in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 100
"""Columns of the terminal."""
NAMED = 8
"""Trials and failures of a study that the terminal names."""
SHOWN = 15
"""Trials of a study that are seen without a click."""
STANDS = "as it stands"
"""The experiment without any choice of the search: trial 0."""
_OBJECTIVES = {
    "dev_ua": "dev UA",
    "worst_speaker_ua": "worst speaker's UA",
    "ece": "dev ECE",
    "seconds": "seconds",
}
_PERCENT = " in %"
_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


@dataclass(frozen=True)
class Study:
    """A study of search.json, its trials in the units and words of the page; see `_studies`."""

    title: str
    facts: Json
    goals: tuple[Goal, ...]
    trials: tuple[Trial, ...]
    """By number."""
    short: Mapping[str, str]
    """For each setting that a trial has, the end of its name that tells it from the others."""

    @property
    def done(self) -> list[Trial]:
        """The finished trials, by number."""
        return [trial for trial in self.trials if trial.values is not None]

    @property
    def ranked(self) -> list[Trial]:
        """The best first, by the first objective after the Pareto front; trials without a value last."""

        def rank(trial: Trial) -> tuple[float, ...]:
            if trial.values is None:
                return 2, list(_STATES.values()).index(trial.state), trial.number
            value = -trial.values[0] if self.goals[0].maximize else trial.values[0]
            return 0 if trial.number in self.facts["pareto"] else 1, value, trial.number

        return sorted(self.trials, key=rank)

    def raw(self, number: int) -> Json:
        """A trial as search.json has it."""
        return next(trial for trial in self.facts["trials"] if trial["number"] == number)

    def count(self) -> str:
        """Such as `30 trials: 20 finished, 9 pruned, 1 failed`."""
        states = {state: sum(trial.state == state for trial in self.trials) for state in _STATES.values()}
        told = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        return page.count(self.trials, "trial") + (f": {told}" if told else "")


def build(folder: Path) -> Path:
    """Read search.json and write `report/` beside it: index.html, its pictures as PNG and SVG, trials.csv.

    Args:
        folder: of the search.

    Returns:
        Path of the page, which holds everything it shows. The same search.json gives the same bytes.

    Raises:
        DataError: search.json is missing or damaged, or the report cannot be written.
    """
    source = folder / "search.json"
    found = read_json(source)
    with naming(source):
        studies = _studies(found)
        opening, closing = list(_result(found, studies)), list(_rest(found, studies))
    out = folder / "report"
    try:
        out.mkdir(exist_ok=True)
        for old in (*out.glob("*.png"), *out.glob("*.svg")):  # of trials that may be gone
            old.unlink()
        _write_trials(found, studies, out / "trials.csv")
        sections = [opening, *(list(_study(study, number, out)) for number, study in enumerate(studies, 1)), closing]
        path = out / "index.html"
        whole = page.page(found["name"], (tag("section", *parts) for parts in sections))
        path.write_text(whole, encoding="utf-8", newline="\n")
        send(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error})") from None
    return path


def text(found: Json) -> str:
    """The search for the terminal, at most 100 columns wide.

    Args:
        found: content of search.json.
    """
    studies = _studies(found)
    score, first, *others = _headline(found, studies)
    lines = [f"search {found['name']}: {_what(found)}", f"{score}: {first}", *others, *_notices(found, studies)]
    lines = [line for told in lines for line in wrap(cut(told, 4 * WIDTH), WIDTH)]
    for study in studies:
        lines += ["", f"{study.title}, {study.count()}", *_table(study, [each["name"] for each in found["objectives"]])]
        best = next((trial for trial in study.done if trial.number == study.facts["best"]), None)
        if best is not None and best.number:
            chose = " ".join(_override(*choice) for choice in study.raw(best.number)["overrides"].items())
            lines += wrap(cut(f"best: {chose}", 10 * WIDTH), WIDTH, break_long_words=False, break_on_hyphens=False)
        failures = _failures(study)
        lines += [f"trial {number}: {note}" for number, _, note in failures[:NAMED]]
        lines += [f"and {len(failures) - NAMED} more with a note"] if len(failures) > NAMED else []
    return "\n".join(cut(line, WIDTH) for line in lines) + "\n"


def _table(study: Study, objectives: Sequence[str]) -> Iterator[str]:
    """The best trials for the terminal; what they chose is cut."""
    rows = [["trial", "", *objectives, "took s", "chose"]]
    told = study.ranked[:NAMED]
    for trial in [*told, *(trial for trial in study.done if trial.number == 0 and trial not in told)]:
        raw = study.raw(trial.number)
        chose = ", ".join(f"{study.short.get(key, key)} {_word(value)}" for key, value in raw["overrides"].items())
        rows.append([str(trial.number), trial.kind, *_values(study, trial), _seconds(raw["seconds"]), chose])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows if study.trials else []:
        numbers = (cell.rjust(width) for cell, width in zip(row[2:-1], widths[2:], strict=True))
        yield "  ".join((row[0].rjust(widths[0]), row[1].ljust(widths[1]), *numbers, row[-1])).rstrip()
    if len(study.trials) > NAMED:
        yield f"of {len(study.trials)}; all are in trials.csv"


def _studies(found: Json) -> list[Study]:
    """The studies of search.json; what is not finite is left out."""
    goals = tuple(
        Goal(_OBJECTIVES[each["name"]] + _PERCENT * _is_share(each["name"]), each["direction"] == "maximize")
        for each in found["objectives"]
    )
    factors = [100.0 if _is_share(each["name"]) else 1.0 for each in found["objectives"]]
    studies = []
    for facts in found["studies"]:
        keys = list(dict.fromkeys(key for trial in facts["trials"] for key in trial["settings"]))
        pairs = {key for trial in facts["trials"] for key, value in trial["settings"].items() if _is_pair(value)}
        short = _short_names(keys)
        _ = facts["importance"], [(raw["note"], raw["overrides"]) for raw in facts["trials"]]  # needed later
        trials = []
        for raw in sorted(facts["trials"], key=lambda raw: raw["number"]):
            values = raw["values"] if raw["state"] == "COMPLETE" and _finite(*(raw["values"] or [None])) else None
            # Without a value that is a number it has no place among the finished ones, whatever the state says.
            state = "failed" if raw["state"] == "COMPLETE" and values is None else _STATES[raw["state"]]
            trials.append(
                Trial(
                    raw["number"],
                    state,
                    values and tuple(factor * value for factor, value in zip(factors, values, strict=True)),
                    tuple((step, factors[0] * value) for step, value in sorted(raw["intermediate"]) if _finite(value)),
                    _places(raw["settings"], short, pairs),
                    _role(facts, raw["number"]) if values is not None else "",
                )
            )
        tested = f"test fold {', '.join(map(str, facts['test_folds']))}"
        title = f"The search for {tested}" if found["nested"] else "The search"
        studies.append(Study(title, facts, goals, tuple(trials), short))
    return studies


def _role(facts: Json, number: int) -> str:
    if number == facts["best"]:
        return "best"
    return "Pareto front" if number in facts["pareto"] else "" if number else STANDS


def _is_share(objective: str) -> bool:
    return objective != "seconds"


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(end) for end in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last two words of each dotted key, or as many as tell it from the others."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1))
        short[key] = next(
            (end for end in ends if not any(other != key and f".{other}".endswith(f".{end}") for other in keys)), key
        )
    return short


def _places(settings: Json, short: Mapping[str, str], pairs: set[str]) -> dict[str, float | str]:
    """A trial's settings as pictures place them: numbers and words, a pair as its two ends."""
    placed: dict[str, float | str] = {}
    for key, value in settings.items():
        names = [f"{short[key]} {end}" for end in ("from", "to")] if key in pairs else [short[key]]
        for place, name in enumerate(names):
            one = value[place] if key in pairs and _is_pair(value) else value
            placed[name] = float(one) if _is_number(one) and math.isfinite(one) else _word(one)
    return placed


def _word(value: object) -> str:
    """A setting's value for people."""
    if value is None:
        return "off"
    if _is_pair(value):
        return " to ".join(f"{end:.3g}" for end in value)  # pyright: ignore[reportGeneralTypeIssues]
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def _override(key: str, value: object) -> str:
    """A choice as the command line takes it, to the last digit."""
    return quote(f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}")


def _name(goal: Goal) -> str:
    """An objective without its unit."""
    return goal.label.removesuffix(_PERCENT)


def _values(study: Study, trial: Trial) -> list[str]:
    """The objectives of a trial, in percent or seconds."""
    return ["—"] * len(study.goals) if trial.values is None else [f"{value:.1f}" for value in trial.values]


def _named(study: Study, trial: Trial) -> str:
    """Such as `dev UA 53.1 %`."""
    values = zip(study.goals, _values(study, trial), strict=True)
    return ", ".join(f"{_name(goal)} {value}{' %' * goal.label.endswith(_PERCENT)}" for goal, value in values)


def _seconds(value: float | None) -> str:
    return f"{value:.0f}" if _finite(value) else "—"


def _failures(study: Study) -> list[tuple[int, str, str]]:
    """Number, state and note of every trial that has something to say, or has failed without."""
    rows = []
    for trial in study.trials:
        note = study.raw(trial.number)["note"]
        if note or trial.state == "failed":
            rows.append((trial.number, trial.state, note or "failed, and does not say why"))
    return rows


def _write_trials(found: Json, studies: Sequence[Study], path: Path) -> None:
    """A row for each trial, the best of each study first; objectives as shares of 1 or seconds, settings as JSON."""
    names = [each["name"] for each in found["objectives"]]
    keys = list(dict.fromkeys(key for study in studies for key in study.short))
    values, settings = ([f"{kind}_{name}" for name in those] for kind, those in (("value", names), ("setting", keys)))
    header = [
        "test_folds",
        "trial",
        "state",
        "role",
        *values,
        "steps",
        "last_step_value",
        "seconds",
        "note",
        "overrides",
        "leaks",
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*header, *settings])
        for study in studies:
            for trial in study.ranked:
                raw = study.raw(trial.number)
                values = raw["values"] if trial.values is not None else [""] * len(names)
                steps = [value for _, value in sorted(raw["intermediate"]) if _finite(value)]
                settings = (json.dumps(raw["settings"][key]) if key in raw["settings"] else "" for key in keys)
                row = [" ".join(map(str, study.facts["test_folds"])), trial.number, trial.state, trial.role, *values]
                row += [len(steps), steps[-1] if steps else "", raw["seconds"], raw["note"]]
                table.writerow([*row, json.dumps(raw["overrides"]), "; ".join(found.get("leaks", [])), *settings])


def _what(found: Json) -> str:
    """The search in a line."""
    improved = ", ".join(_OBJECTIVES[each["name"]] for each in found["objectives"])
    trials = page.count(range(found["trials"]), "trial") + (" for each test fold" if found["nested"] else "")
    return f"{found['title']}, protocol {found['protocol']}; {trials} by {found['sampler']}, for {improved}"


def _headline(found: Json, studies: Sequence[Study]) -> list[str]:
    """The score, and sentences that tell what it is worth."""
    final = found["final"]
    if final is None:
        ended = min((sum(trial.state != "running" for trial in study.trials) for study in studies), default=0)
        if ended < found["trials"]:
            told = f"The search is not finished: {ended} of {found['trials']} trials have ended"
            return ["No result yet", told + (" where fewest have." if found["nested"] else ".")]
        return ["No result", "The search has ended; what it found was not tested, as it was asked, or not yet."]
    searched, stands = final["searched"], final["defaults"]
    chance = percent(1 / len(found["classes"]))
    who = f"{page.count(range(final['speakers']), 'speaker')} that no trial saw ({final['utterances']} utterances)"
    interval = "" if searched["low"] is None else f"[{percent(searched['low'])}, {percent(searched['high'])}] "
    yet = "The experiment as it stands was not tested."
    return [
        f"UA {percent(searched['value'])} %",
        f"{interval}on {who}, with the settings that were found.",
        (f"The experiment as it stands: {with_interval(stands)}." if stands else yet) + f" Chance {chance}.",
        _verdict(final),
        _looks(final),
    ]


def _looks(final: Json) -> str:
    """How often test was read."""
    if len(final["looks"]) == 1:
        folds = page.count(range(final["test_reads"]), "trained fold")
        return f"Chosen without test speakers: tested once after the search, by {folds}."
    after = ", ".join(str(look["trials"]) for look in final["looks"])
    return (
        f"Test was read {len(final['looks'])} times, with what was best after {after} trials: who went on knew the "
        "scores before, so that this one is no longer of speakers that chose nothing."
    )


def _verdict(final: Json) -> str:
    """Whether the search has helped, in words."""
    difference = final["difference"]
    if difference is None and final["runs"]["searched"] == final["runs"]["defaults"]:
        return "They are the same: no choice was better on dev than the experiment as it stands."
    if difference is None:
        return "The two were not compared: there is no paired difference."
    low, value, high = (f"{100 * difference[key]:+.1f}" for key in ("low", "value", "high"))
    told = f"{value} points [{low}, {high}], p {difference['p']:.4f}"
    if final["verdict"] in ("higher", "lower"):
        points = f"{100 * abs(difference['value']):.1f} points {final['verdict']}"
        return f"With what was found, UA is {points} than as it stands: {told}."
    return f"No difference shown: {told}. This does not say that the two are equal."


def _notices(found: Json, studies: Sequence[Study]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    notices = leak_notices({found["name"]: found.get("leaks", [])})
    for study in studies:
        of = f"{study.title}: " if len(studies) > 1 else ""
        failed = sum(trial.state == "failed" for trial in study.trials)
        for number, inner in enumerate(study.facts["inner"], 1):
            both = ", ".join(sorted({*map(str, inner["train"])} & {*map(str, inner["dev"])}))
            notices += [f"LEAK, values are too high: {of}inner fold {number} trains and values on {both}."] * bool(both)
        if not study.done:
            notices.append(f"{of}No trial has finished.")
        if failed:
            notices.append(f"{of}{failed} of {page.count(study.trials, 'trial')} failed, see below.")
    few = compare.too_few(found["final"]["speakers"]) if found["final"] else ""
    return [*notices, f"{few}; nested=true or more test_folds test more."] if few else notices


def _result(found: Json, studies: Sequence[Study]) -> Iterator[Html]:
    yield tag("h1", found["name"])
    yield tag("p", f"{_what(found)}.")
    score, *sentences = _headline(found, studies)
    yield tag("div", tag("span", score, class_="score"), *(tag("div", line) for line in sentences), class_="result")
    yield from (tag("p", notice, class_="notice") for notice in _notices(found, studies))
    final = found["final"]
    if final is not None:
        yield tag("h3", "On speakers that no trial saw")
        epochs = {"": "last epoch"} if found["select"] == "last" else {"": "epoch chosen on dev", "_last": "last epoch"}
        rows = [
            (title, *(with_interval(final[key + which]) for which in epochs), len(final["runs"].get(key, [])))
            for key, title in (("searched", "what was found"), ("defaults", STANDS))
        ]
        yield page.table(("UA in % [95 % interval]", *epochs.values(), "runs"), rows)
    yield tag("h3", "What the trials were allowed to see")
    yield from _seen(studies)
    yield tag("h3", "What was searched, and what was found")
    yield from _found(found, studies)


def _seen(studies: Sequence[Study]) -> Iterator[Html]:
    several = len(studies) > 1
    rows = [
        (
            ", ".join(map(str, study.facts["test_folds"])) if number == 0 else "",
            number,
            *(_listed(inner[side]) for side in ("train", "dev")),
        )
        for study in studies
        for number, inner in enumerate(study.facts["inner"])
    ]
    if rows:
        header = ("kept for the test: fold", "inner fold", "trained on", "valued on")
        yield page.table(header, rows, words=(0, 1, 2, 3))
    sizes = [study.facts["pool_speakers"] for study in studies]
    pool = " to ".join(map(str, sorted({min(sizes, default=0), max(sizes, default=0)})))
    yield tag(
        "div",
        tag("div", tag("strong", f"The {pool} speakers of the pool{' of each study' if several else ''}, no others.")),
        tag(
            "div",
            "Within the pool, inner folds part the speakers: a trial is trained on some, and valued by its scores on "
            "the others. The test speakers of the folds below are not in the pool. No trial is given them, neither to "
            "train, nor to choose an epoch, nor to be valued or pruned.",
        ),
        class_="result",
    )


def _listed(speakers: Sequence[object]) -> Html:
    more = f", … and {len(speakers) - 24} more" if len(speakers) > 24 else ""
    return Html(page.count(speakers, "speaker") + tag("small", ", ".join(map(str, speakers[:24])) + more))


def _found(found: Json, studies: Sequence[Study]) -> Iterator[Html]:
    """The space, and in its terms the experiment as it stands and what each study found."""

    def settings(study: Study, number: int | None) -> Json:
        return next((raw["settings"] for raw in study.facts["trials"] if raw["number"] == number), {})

    columns = [settings(study, study.facts["best"]) for study in studies]
    columns = [next((held for study in studies if (held := settings(study, 0))), {}), *columns]
    keys = dict.fromkeys([*found["space"], *(key for study in studies for key in study.short)])
    rows = []
    for key in keys:
        held = (_word(each[key]) if key in each else "—" for each in columns)
        rows.append((key, found["space"].get(key, ""), *held))
    titles = ["found"] if len(studies) == 1 else [f"test fold {_folds(study)}" for study in studies]
    yield page.table(("setting", "within", STANDS, *titles), rows, words=(0, 1))
    if len(studies) > 1:
        yield tag(
            "p", "Each study searched for itself: where they agree, the choice does not hang on who was in the pool."
        )


def _folds(study: Study) -> str:
    return ", ".join(map(str, study.facts["test_folds"]))


def _study(study: Study, number: int, out: Path) -> Iterator[Html]:
    """Everything about one study; its pictures carry its number."""
    yield tag("h2", study.title)
    yield tag("p", f"{study.count()}.")
    yield tag("h3", "Best settings")
    yield from _best(study)
    if study.trials:
        yield tag("h3", "Trials")
        yield from _trials(study)
    failures = _failures(study)
    if failures:
        yield tag("h3", "What went wrong")
        yield page.table(("trial", "state", "why"), failures, words=(0, 1, 2))
    for stem, title, draw, caption in _drawings(study):
        yield tag("h3", title)
        svg = pictures.save(out / f"{stem}-{number}", draw)
        yield page.figure(svg, f"{title}, {study.title}", caption)


def _best(study: Study) -> Iterator[Html]:
    best = next((trial for trial in study.done if trial.number == study.facts["best"]), None)
    if best is None:
        yield tag("p", "None: no trial has finished.")
        return
    told = f"Trial {best.number}: {_named(study, best)}."
    stands = next((trial for trial in study.done if trial.number == 0), None)
    if best is stands:
        told += " It is the experiment as it stands: no choice was better."
    elif stands is not None:
        told += f" As it stands (trial 0): {_named(study, stands)}."
    yield tag("p", told)
    yield tag("pre", _block(study, best))
    yield tag(
        "p",
        f"The best of {page.count(study.done, 'finished trial')}, by the scores that it was chosen by: its values are "
        "too good to be expected again, the more so the more trials there were.",
    )
    others = [trial for trial in study.ranked if trial.role == "Pareto front"]
    if others:
        yield tag("p", "Of several objectives it is the best in the first; others are as good in their way.")
        blocks = (tag("pre", _block(study, trial)) for trial in others)
        yield tag("details", tag("summary", f"The other {page.count(others, 'trial')} of the Pareto front"), *blocks)


def _block(study: Study, trial: Trial) -> str:
    """A trial's choices, as a campaign's file takes them."""
    overrides = study.raw(trial.number)["overrides"]
    lines = [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    heading = "overrides:" if lines else "overrides: {}"
    return "\n".join([f"# trial {trial.number}: {_named(study, trial)}", heading, *lines])


def _trials(study: Study) -> Iterator[Html]:
    labels = (goal.label.replace(" ", "\u00a0") for goal in study.goals)
    header = ["trial", "state", *labels, "seconds", *study.short.values()]
    rows = []
    for trial in study.ranked:
        raw = study.raw(trial.number)
        name = Html(f"{trial.number}{tag('small', trial.role)}") if trial.role else trial.number
        settings = (_word(raw["settings"][key]) if key in raw["settings"] else "—" for key in study.short)
        rows.append((name, trial.state, *_values(study, trial), _seconds(raw["seconds"]), *settings))
    yield page.table(header, rows[:SHOWN], words=(0, 1))
    if len(rows) > SHOWN:
        rest = page.table(header, rows[SHOWN:], words=(0, 1))
        yield tag("details", tag("summary", f"The other {len(rows) - SHOWN}"), rest)


def _drawings(study: Study) -> "Iterator[tuple[str, str, Callable[[], Figure], str]]":
    """The pictures that the study has data for: stem, title, how it is drawn, caption."""
    trials, done, goals = study.trials, study.done, study.goals
    if len(trials) > 1 and done:
        caption = "The line is the best so far. At the foot, whatever the scale: trials that have no value."
        yield "history", "Value by trial", partial(pictures.trial_history, trials, goals), caption
    if any(trial.steps for trial in trials):
        caption = f"{goals[0].label} as the pruner was told of it, step by step; a mark where a trial did not finish."
        yield "curves", "Values on the way", partial(pictures.trial_curves, trials, goals[0]), caption
    importance = {
        _importance_name(study, key): value for key, value in study.facts["importance"].items() if _finite(value)
    }
    if importance:
        caption = (
            f"How much of the variance of {_name(goals[0])} among the finished trials each choice "
            "explains, by a forest of decision trees (fANOVA). With few trials it is a rough guess."
        )
        yield "importance", "Importance", partial(pictures.importances, importance), caption
    names = _varying(study)
    if names:
        yield from _slices(study, names)
    if len(names) > 1:
        caption = "Each line is a finished trial. Settings that have words beside numbers have them at the foot. "
        caption += "At the right the better end is on top; a line breaks where a setting does not apply."
        if len(names) > pictures.MOST_AXES:
            caption += f" The {pictures.MOST_AXES} most important of {len(names)} settings are shown."
        yield "parallel", "All settings at once", partial(pictures.parallel, done, names, goals), caption
    if len(goals) > 1 and len(done) > 1:
        caption = "Numbers are those of trials of the Pareto front. "
        caption += "The line joins the trials that no other beats in both objectives of the panel."
        yield "pareto", "Pareto front", partial(pictures.pareto, done, goals), caption
    yield from _mixture_or_plane(study, names)


def _importance_name(study: Study, key: str) -> str:
    """What the sampler chose, in words: of a pair its lower end and its width, of weights of one sum the parts."""
    for ending, word in ((".low", ", lower end"), (".share", ", width"), (".part", ", share of the sum")):
        if key not in study.short and key.removesuffix(ending) in study.short:
            return study.short[key.removesuffix(ending)] + word
    return study.short.get(key, key)


def _varying(study: Study) -> list[str]:
    """Settings, as pictures name them, that are not the same in all finished trials; the most important first."""
    importance = study.facts["importance"]

    def weight(name: str) -> float:
        own = [key for key, short in study.short.items() if name in (short, f"{short} from", f"{short} to")]
        ends = ("", ".low", ".share", ".part")
        return -sum(importance.get(key + end) or 0.0 for key in own for end in ends)

    names = dict.fromkeys(name for trial in study.trials for name in trial.settings)
    varying = [name for name in names if len({trial.settings.get(name) for trial in study.done} - {None}) > 1]
    return sorted(varying, key=weight)


def _slices(study: Study, names: Sequence[str]) -> "Iterator[tuple[str, str, Callable[[], Figure], str]]":
    for index, goal in enumerate(study.goals):
        several = len(study.goals) > 1
        caption = (
            "The finished trials. Words stand in columns with a bar at their median. Axes of positive numbers that "
        )
        caption += (
            "span more than a decade are logarithmic. Settings change together: no panel shows the effect of its own."
        )
        if len(names) > pictures.MOST_PANELS:
            caption += f" The {pictures.MOST_PANELS} most important of {len(names)} settings are shown."
        title = f"{_name(goal)} by setting" if several else "Value by setting"
        draw = partial(pictures.slices, study.done, names, study.goals, index)
        objective = {value: key for key, value in _OBJECTIVES.items()}[_name(goal)]
        yield f"slices_{objective}" if several else "slices", title, draw, caption


def _mixture_or_plane(study: Study, names: Sequence[str]) -> "Iterator[tuple[str, str, Callable[[], Figure], str]]":
    """The shares of three weights, or else the plane of the only two numbers that vary."""
    goal = study.goals[0]
    label = _name(goal)
    weights = [
        short
        for key, short in study.short.items()
        if key.startswith("losses.") and key.endswith(".weight") and short in names
    ]
    numeric = [
        name
        for name in names
        if len({trial.settings[name] for trial in study.done if isinstance(trial.settings.get(name), float)}) > 1
    ]
    if len(weights) >= 3:
        columns = {name: _weights(study.done, name) for name in weights}
        largest = [np.nanmax(values, initial=0.0) for values in columns.values()]
        caption = "A corner is one weight alone, the middle all three alike; pale lines stand at 25, 50 and 75 %. "
        caption += "A loss that is off has weight 0. A ring is the best trial, a diamond the experiment as it stands."
        if max(largest) > 10 * min(largest):  # shares would all lie at an edge
            units = {name: float(np.nanmedian(values[values > 0])) for name, values in columns.items()}
            columns = {name: values / units[name] for name, values in columns.items()}
            told = ", ".join(f"{name} {unit:.2g}" for name, unit in units.items())
            caption += f" The weights differ in size, so each is taken in units of its median: {told}."
        hidden = int(np.isnan(np.stack(list(columns.values()))).any(axis=0).sum())
        caption += f" Left out, for a weight that is no number: {page.count(range(hidden), 'trial')}." if hidden else ""
        draw = partial(pictures.mixtures, study.done, columns, goal)
        yield "mixture", f"{label} by shares of the weights", draw, caption
    elif len(numeric) == 2:
        across, up = sorted(numeric, key=list(study.done[0].settings).index)
        both = [trial for trial in study.done if {across, up} <= trial.settings.keys()]
        if len(both) > 1:
            draw = partial(pictures.plane, both, across, up, goal)
            caption = "The finished trials by the two numbers that vary. A ring is the best, a diamond is as it stands."
            yield "plane", f"{label} by {across} and {up}", draw, caption


def _weights(trials: Sequence[Trial], name: str) -> NDArray[np.float64]:
    """[T] weights of a loss; 0 where it is off, NaN where it is a word such as auto."""
    values = [trial.settings.get(name, "off") for trial in trials]
    numbers = [0.0 if value == "off" else math.nan if isinstance(value, str) else value for value in values]
    return np.array(numbers, np.float64)


def _rest(found: Json, studies: Sequence[Study]) -> Iterator[Html]:
    """What it took, and what it takes to do it again."""
    yield tag("h2", "How it was searched")
    seconds = [raw["seconds"] or 0.0 for study in studies for raw in study.facts["trials"]]
    final = found["final"] or {"runs": {}}
    runs = {f"runs, {name}": ", ".join(Path(run).name for run in paths) for name, paths in final["runs"].items()}
    objectives = (f"{_OBJECTIVES[each['name']]} ({each['direction']})" for each in found["objectives"])
    yield page.facts(
        {
            "experiment": found["experiment"],
            "data": f"{found['title']}, {len(found['classes'])} classes",
            "protocol": found["protocol"],
            "objectives": ", ".join(objectives),
            "sampler": found["sampler"],
            "pruner": found["pruner"],
            "asked": f"{page.count(range(found['trials']), 'trial')}, {found['inner_folds']} inner folds, "
            f"seed {', '.join(map(str, found['seeds']))}",
            "trials took": f"{sum(seconds) / 3600:.2f} hours, summed over trials that may have run side by side",
            **runs,
            "code": code_in_words(found["code"]),
            "made": found["created"],
        }
    )
    yield tag("h3", "Words")
    yield page.facts(_WORDS)


_WORDS = {
    "UA": "unweighted accuracy, the mean of the recalls of the classes: every class counts the same.",
    "dev UA": "UA on the dev speakers of the inner folds, by the epoch that protocol.select chooses there.",
    "worst speaker": "the lowest UA that a dev speaker of the inner folds has.",
    "ECE": "expected calibration error: how far confidence lies from the share that is right; 0 is best.",
    "trial": "the experiment with one choice of settings, trained and valued in every inner fold.",
    "as it stands": "trial 0, and the run it is compared with: the experiment's file, nothing chosen by the search.",
    "sampler": "what proposes the settings of the next trial from the values of earlier ones.",
    "pruned": "stopped early because others were better at the same step. It has no value, and its last step is not "
    "one.",
    "Pareto front": "the trials that no other betters in one objective without being worse in another.",
    "interval": "where the score lies in 95 % of random draws of the test speakers, with replacement; another seed, or "
    "another search, varies it further.",
    "p": "how often a difference as large comes about if, speaker by speaker, it is left to chance which of the two "
    "said what.",
    "shown": "the interval of the difference leaves out 0, and p is below 0.05.",
}
