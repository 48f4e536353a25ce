"""The page of a search, its trials as CSV and its lines for the terminal: what they say, and that all can be drawn."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from runs import Page

from sermll import pictures
from sermll.errors import DataError
from sermll.pictures import Goal, Trial
from sermll.search import Outcome
from sermll.search_page import build, text

Json = dict[str, Any]
SPACE = {
    "losses.kl.weight": "log 0.05 to 2",
    "losses.focal": "off, on",
    "losses.focal.weight": "log 0.05 to 2, with losses.focal={}",
    "losses.supcon.weight": "log 0.02 to 1",
    "mixup.snr_db": "range within -15 to 20",
    "model.pool.kind": "flam, mean, max",
    "optim.batch_size": "16, 32, 64",
}
OUT_OF_MEMORY = "out of memory: 3.1 GB of 2.0 GB <asked>"


def trial(number: int, values: Sequence[float], settings: Json) -> Json:
    """A trial that set all that it has, but for trial 0."""
    return {
        "number": number,
        "state": "COMPLETE",
        "values": values,
        "intermediate": [],
        "overrides": {key: {} if value == "on" else value for key, value in settings.items()} if number else {},
        "settings": settings,
        "seconds": 40.0 + number,
        "note": "",
    }


def study(trials: int, objectives: int = 1, fold: int = 0) -> Json:
    """Trials of SPACE whose values depend on their settings; some are pruned, every ninth fails, the last may run."""
    generator = np.random.default_rng([trials, fold])
    made = []
    for number in range(trials):
        low = generator.uniform(-15, 10)
        kl, focal, supcon = (float(np.exp(generator.uniform(np.log(0.05), np.log(2)))) for _ in range(3))
        settings: Json = {
            "losses.kl.weight": kl,
            "losses.focal": "on",
            "losses.focal.weight": focal,
            "losses.supcon.weight": supcon / 2,
            "mixup.snr_db": [low, low + generator.uniform(1, 10)],
            "model.pool.kind": ("flam", "mean", "max")[generator.integers(3)],
            "optim.batch_size": int(16 * 2 ** generator.integers(3)),
        }
        if number == 0:
            settings |= {"losses.kl.weight": "auto", "losses.focal.weight": "auto", "losses.supcon.weight": "auto"}
        elif generator.random() < 0.25:
            settings |= {"losses.focal": None, "losses.focal.weight": None}
        good = 0.6 - 0.05 * np.log(kl) ** 2 - 0.02 * (settings["model.pool.kind"] == "max") + generator.normal() * 0.01
        curve = [[step, float(good * (1 - 0.7 ** (step + 2)))] for step in range(12)]
        values = [
            float(good),
            float(max(0.0, good - 0.2 + generator.normal() * 0.03)),
            0.25 - 0.2 * abs(focal - 0.5) / 2,
            30 + 10 * kl,
        ]
        ended: Json = {"intermediate": curve}
        if number % 9 == 5:
            ended = {"state": "FAIL", "values": None, "intermediate": curve[:3], "note": OUT_OF_MEMORY, "seconds": None}
        elif number and curve[4][1] < 0.42 and objectives == 1:
            ended = {"state": "PRUNED", "values": None, "intermediate": curve[:5]}
        elif number == trials - 1 and number > 2:
            ended = {"state": "RUNNING", "values": None, "intermediate": curve[:2], "seconds": None}
        made.append(trial(number, values[:objectives], settings) | ended)
    done = [one for one in made if one["values"]]
    front = [
        one["number"]
        for one in done
        if not any(
            all(sign * (a - b) >= 0 for sign, a, b in zip((1, 1, -1, -1), other["values"], one["values"], strict=False))
            and other is not one
            for other in done
        )
    ]
    return {
        "test_folds": [fold],
        "pool_speakers": 20,
        "inner": [{"train": ["01", "02", "03"], "dev": ["05"]}, {"train": ["05"], "dev": ["01", "02", "03"]}],
        "trials": made,
        "best": max(done, key=lambda one: one["values"][0])["number"] if done else None,
        "pareto": front if objectives > 1 else [],
        "importance": {
            "losses.kl.weight": 0.41,
            "mixup.snr_db.low": 0.2,
            "mixup.snr_db.share": 0.1,
            "losses.focal": 0.05,
        },
    }


FINAL: Json = {
    "folds": [0],
    "seeds": [0],
    "speakers": 4,
    "utterances": 240,
    "test_reads": 2,
    "looks": [{"at": "2026-05-01T12:00:00+00:00", "trials": 30, "runs": ["/runs/found-0123456789ab/fold-0"]}],
    "searched": {"value": 0.5512, "low": 0.4921, "high": 0.6133},
    "defaults": {"value": 0.5311, "low": 0.4722, "high": 0.5933},
    "searched_last": {"value": 0.5414, "low": 0.4825, "high": 0.6036},
    "defaults_last": {"value": 0.5217, "low": 0.4628, "high": 0.5839},
    "difference": {"value": 0.0201, "low": -0.0102, "high": 0.0503, "p": 0.25},
    "verdict": "no difference shown",
    "runs": {"searched": ["/runs/found-0123456789ab"], "defaults": ["/runs/stands-ba9876543210"]},
}


def search(*studies: Json, objectives: Sequence[str] = ("dev_ua",), **changes: Any) -> Json:
    """Content of search.json."""
    down = ("ece", "seconds")
    return {
        "name": "loss_search",
        "created": "2026-05-01T12:00:00+00:00",
        "code": {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": False},
        "experiment": "ravdess",
        "title": "RAVDESS",
        "classes": list("abcdefgh"),
        "protocol": "speaker6",
        "select": "dev_ua",
        "objectives": [{"name": name, "direction": "minimize" if name in down else "maximize"} for name in objectives],
        "sampler": "tpe",
        "pruner": "median",
        "trials": max((len(one["trials"]) for one in studies), default=30),
        "inner_folds": 2,
        "seeds": [0],
        "nested": len(studies) > 1,
        "space": SPACE,
        "studies": list(studies),
        "final": FINAL,
        **changes,
    }


def write(folder: Path, found: Json) -> Path:
    """The folder of a search."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def plain(values: Sequence[float], settings: Callable[[int], Json], **changes: Any) -> Json:
    """One study of trials that all finished, not yet tested."""
    trials = [trial(number, [value], settings(number)) for number, value in enumerate(values)]
    best = int(np.argmax(values)) if values else None
    return search({**study(0), "trials": trials, "importance": {}, "best": best}, final=None, **changes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """Leave the drawing out, for tests of what a page says; what would have been drawn, by file stem."""
    drawn: dict[str, Callable[[], Any]] = {}

    def save(stem: Path, draw: Callable[[], Any]) -> bytes:
        drawn[stem.name] = draw
        return b"<svg/>"

    monkeypatch.setattr(pictures, "save", save)
    return drawn


def figure_of(draw: Callable[[], Any]) -> Any:
    """A picture in the report's style, laid out."""
    with matplotlib.rc_context(pictures._STYLE):
        figure = draw()
        figure.draw_without_rendering()
    return figure


def test_page_is_whole_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pictures._STYLE, "savefig.dpi", 30)
    found, written = search(study(14)), []
    for name in ("first", "second"):
        folder = write(tmp_path / name, found)
        (folder / "report").mkdir()
        (folder / "report" / "slices-9.png").touch()  # of an earlier search.json
        assert build(folder) == folder / "report" / "index.html"
        written.append({path.name: path.read_bytes() for path in (folder / "report").iterdir()})
    assert written[0] == written[1]
    stems = [f"{stem}-1" for stem in ("history", "curves", "importance", "slices", "parallel", "mixture")]
    pictured = {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert set(written[0]) == {*pictured, "index.html", "trials.csv"}
    page = Page(tmp_path / "first" / "report" / "index.html")
    assert page.images == [written[0][f"{stem}.svg"] for stem in stems]
    for svg in page.images:
        ElementTree.fromstring(svg)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        assert (attributes.get("src") or "data:").startswith("data:")
    assert page.headings == [
        *("loss_search", "On speakers that no trial saw", "What the trials were allowed to see"),
        *("What was searched, and what was found", "The search", "Best settings", "Trials", "What went wrong"),
        *("Value by trial", "Values on the way", "Importance", "Value by setting", "All settings at once"),
        *("dev UA by shares of the weights", "How it was searched", "Words"),
    ]


def test_headline_tells_the_test_and_what_it_is_worth(tmp_path: Path, quick: Any) -> None:
    found = search(study(14))
    for said in (Page(build(write(tmp_path / "a", found))).text, " ".join(text(found).split())):
        for told in (
            *("UA 55.1 %", "[49.2, 61.3] on 4 speakers that no trial saw (240 utterances)"),
            *(
                "as it stands: 53.1 [47.2, 59.3]. Chance 12.5.",
                "No difference shown: +2.0 points [-1.0, +5.0], p 0.2500",
            ),
            "Chosen without test speakers: tested once after the search, by 2 trained folds.",
        ):
            assert told in said
    page = Page(tmp_path / "a" / "report" / "index.html").text
    for told in (
        "54.1 [48.2, 60.4]",
        "52.2 [46.3, 58.4]",
        "found-0123456789ab",
        "The 20 speakers of the pool, no others",
    ):
        assert told in page
    better = search(study(3), final={**FINAL, "verdict": "higher"})
    assert "UA is 2.0 points higher than as it stands" in Page(build(write(tmp_path / "b", better))).text
    alone = {
        **FINAL,
        "difference": None,
        "searched": {"value": 0.5, "low": None, "high": None},
    }
    said = Page(build(write(tmp_path / "c", search(study(3), final=alone)))).text
    same = {**FINAL, "difference": None, "runs": {"searched": ["/runs/one"], "defaults": ["/runs/one"]}}
    assert "They are the same: no choice was better" in text(search(study(3), final=same))
    again = {**FINAL, "speakers": 8, "looks": [*FINAL["looks"], {"at": "", "trials": 40, "runs": []}]}
    assert "Test was read 2 times, with what was best after 30, 40 trials" in " ".join(
        text(search(study(3), final=again)).split()
    )
    few = "4 tested speakers show no difference, however large: p is 0.125 at least; nested=true or more test_folds"
    assert few in said and few not in text(search(study(3), final=again))
    assert "The two were not compared" in said and "UA 50.0 %\non 4 speakers" in said


def test_numbers_are_those_of_the_search(tmp_path: Path, quick: Any) -> None:
    given = study(30)
    page = Page(build(write(tmp_path, search(given))))
    with (tmp_path / "report" / "trials.csv").open(newline="") as file:
        rows = {int(row["trial"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == list(range(30))
    for raw in given["trials"]:
        row = rows[raw["number"]]
        assert [float(row["value_dev_ua"])] == raw["values"] if raw["values"] else row["value_dev_ua"] == ""
        assert row["note"] == raw["note"] and json.loads(row["overrides"]) == raw["overrides"]
        assert float(row["last_step_value"]) == raw["intermediate"][-1][1] and int(row["steps"]) == len(
            raw["intermediate"]
        )
        assert {key: json.loads(row[f"setting_{key}"]) for key in raw["settings"]} == raw["settings"]
        if raw["values"]:
            assert f"{100 * raw['values'][0]:.1f}" in page.text
    values = [float(row["value_dev_ua"]) for row in rows.values() if row["value_dev_ua"]]
    assert values == sorted(values, reverse=True)  # the best first
    best = given["trials"][given["best"]]
    assert rows[given["best"]]["role"] == "best" and next(iter(rows)) == given["best"]
    assert f"Trial {best['number']}: dev UA {100 * best['values'][0]:.1f} %" in page.text
    for key, value in best["overrides"].items():
        assert f"  {key}: {json.dumps(value)}" in page.text
        assert f"{key}={json.dumps(value, separators=(',', ':'))}".replace('"', "") in text(search(given))
    counts = [sum(raw["state"] == state for raw in given["trials"]) for state in ("COMPLETE", "PRUNED", "FAIL")]
    assert "30 trials: {} finished, {} pruned, {} failed".format(*counts) in page.text
    assert page.text.count(OUT_OF_MEMORY) == counts[2]
    assert "The other 15" in page.text


def test_terminal_is_narrow(quick: Any) -> None:
    names = ("dev_ua", "worst_speaker_ua", "ece", "seconds")
    long = search(study(30, 4), study(30, 4, fold=1), objectives=names, title="T" * 150, name="n" * 150)
    for found in (search(study(30)), long):
        assert max(map(len, text(found).splitlines())) <= 100
    assert re.search(r"^ +\d+  best +6\d\.\d +\d+  kl\.weight", text(search(study(30))), re.MULTILINE)
    assert "as it stands  " in text(search(study(30)))  # beside the best, wherever it ranks


def test_several_objectives_have_a_front(tmp_path: Path, quick: dict[str, Callable[[], Any]]) -> None:
    given = study(20, 2)
    found = search(given, objectives=("dev_ua", "worst_speaker_ua"))
    page = Page(build(write(tmp_path, found)))
    assert {"pareto-1", "slices_dev_ua-1", "slices_worst_speaker_ua-1"} <= quick.keys()
    assert f"The other {len(given['pareto']) - 1} trials of the Pareto front" in page.text
    with (tmp_path / "report" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["trial"]) for row in rows if row["role"] in ("best", "Pareto front")} == set(given["pareto"])
    (axes,) = figure_of(quick["pareto-1"]).axes
    line = axes.lines[0]
    front = sorted((given["trials"][number]["values"] for number in given["pareto"]), reverse=True)
    assert [*zip(line.get_xdata(), line.get_ydata(), strict=True)] == [
        pytest.approx([100 * one for one in values]) for values in front
    ]
    assert len(figure_of(quick["history-1"]).axes) == 2


def test_each_test_fold_has_its_study(tmp_path: Path, quick: dict[str, Callable[[], Any]]) -> None:
    page = Page(build(write(tmp_path, search(study(12), study(12, fold=3)))))
    assert "The search for test fold 3" in page.headings
    assert {"slices-1", "slices-2"} <= quick.keys()
    assert "The search for test fold 3: 1 of 12 trials failed, see below." in page.text
    assert "Each study searched for itself" in page.text


def test_nothing_finished_is_said(tmp_path: Path, quick: dict[str, Callable[[], Any]]) -> None:
    given = study(6)
    failed = [raw | {"state": "FAIL", "values": None, "note": f"cause {raw['number']}"} for raw in given["trials"]]
    cases = {
        "none": search({**study(0), "importance": {}}, final=None, trials=30),
        "no study": search(final=None),
        "failed": search({**given, "trials": failed, "best": None, "importance": {}}, final=None),
    }
    for name, found in cases.items():
        page = Page(build(write(tmp_path / name, found)))
        assert "No result" in page.text and "nan" not in page.text.lower().split()
        assert text(found)
    page = Page(tmp_path / "none" / "report" / "index.html")
    assert "The search is not finished: 0 of 30 trials have ended." in page.text
    assert "No trial has finished." in page.text and "None: no trial has finished." in page.text
    page = Page(tmp_path / "failed" / "report" / "index.html").text
    assert all(f"cause {number}" in page for number in range(6))
    assert "was not tested" in page
    assert quick.keys() == {"curves-1"}


def test_what_is_not_finite_has_no_value(tmp_path: Path, quick: dict[str, Callable[[], Any]]) -> None:
    given = study(8)
    given["trials"][1] |= {"state": "COMPLETE", "values": [float("nan")], "intermediate": [[0, float("nan")]]}
    given["best"] = 3
    page = Page(build(write(tmp_path, search(given))))
    assert "failed, and does not say why" in page.text
    assert "nan" not in page.text.lower() and "nan" not in (tmp_path / "report" / "trials.csv").read_text().lower()
    for draw in quick.values():
        figure_of(draw)


def test_where_the_last_epoch_is_the_rule_test_scores_are_told_once(tmp_path: Path, quick: Any) -> None:
    final = FINAL | {"searched_last": FINAL["searched"], "defaults_last": FINAL["defaults"]}
    page = Page(build(write(tmp_path, search(study(3), final=final, select="last")))).text
    assert "chosen on dev" not in page and "last epoch" in page
    assert page.count("55.1 [49.2, 61.3]") == 1


def test_inner_folds_that_leak_are_told(tmp_path: Path, quick: Any) -> None:
    given = study(3)
    given["inner"][1]["train"] += ["02"]
    leak = "fold 0: train and test share 1 speakers (a)"
    found = search(given, leaks=[leak])
    page = build(write(tmp_path, found))
    assert "LEAK, values are too high: inner fold 2 trains and values on 02." in Page(page).text
    assert f"LEAK, scores are too high: {leak}." in Page(page).text
    assert Outcome(tmp_path, found, page, (), None).as_json()["leaks"] == [leak]
    assert {row["leaks"] for row in csv.DictReader((page.parent / "trials.csv").open(newline=""))} == {leak}


@pytest.mark.parametrize(
    ("count", "settings", "stems"),
    [
        (1, lambda number: {"optim.lr": 0.001}, set()),
        (4, lambda number: {"optim.lr": 0.001}, {"history"}),
        (4, lambda number: {"optim.lr": 10.0**-number}, {"history", "slices"}),
        (4, lambda number: {"model.pool.kind": "flam" if number % 2 else "mean"}, {"history", "slices"}),
        (4, lambda number: {"mixup.snr_db": [-number, number]}, {"history", "slices", "parallel", "plane"}),
        (
            4,
            lambda number: {"a.b": number or "auto", "a.c": None if number == 1 else 0.1 * number},
            {"history", "slices", "parallel", "plane"},
        ),
        (3, lambda number: {"a.b": number} if number else {}, {"history", "slices"}),
    ],
)
def test_few_trials_and_settings_can_be_drawn(
    tmp_path: Path, quick: dict[str, Callable[[], Any]], count: int, settings: Callable[[int], Json], stems: set[str]
) -> None:
    found = plain([0.4 + 0.01 * number for number in range(count)], settings)
    build(write(tmp_path, found))
    assert quick.keys() == {f"{stem}-1" for stem in stems}
    for draw in quick.values():
        figure_of(draw)
    assert "None" not in text(found)


def test_names_are_text_everywhere(tmp_path: Path, quick: dict[str, Callable[[], Any]]) -> None:
    evil = "<script>x</script> & $a_b$ \x1b[2J"
    found = plain([0.5, 0.4, 0.6], lambda number: {f"{evil}.{end}": evil * number for end in ("one", "two")}, name=evil)
    found["studies"][0]["trials"][1] |= {"state": "FAIL", "values": None, "note": evil}
    found["studies"][0]["importance"] = {f"{evil}.one": 1.0}
    page = Page(build(write(tmp_path, found)))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(evil) > 5
    assert "\x1b" not in text(found)
    for draw in quick.values():
        figure_of(draw)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"search\.json: not there"):
        build(tmp_path)
    (tmp_path / "search.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match=r"search\.json: no 'objectives' in it"):
        build(tmp_path)
    write(tmp_path, search(study(3)))
    (tmp_path / "report").write_text("a file")
    with pytest.raises(DataError, match="report: cannot be written"):
        build(tmp_path)


def drawn() -> list[Trial]:
    """Five finished trials with a number and a word each, the later the better."""
    return [
        Trial(place, "finished", (50.0 + place, 10.0 - place), (), {"n": 10.0**place, "w": "ab"[place % 2]}, "")
        for place in range(5)
    ]


GOALS = (Goal("up in %", True), Goal("down", False))


def test_history_shows_the_best_so_far_and_every_trial() -> None:
    trials = [
        Trial(0, "finished", (50.0,), (), {}, "as it stands"),
        Trial(1, "finished", (40.0,), (), {}, ""),
        Trial(2, "pruned", None, ((0.0, 30.0), (1.0, 35.0)), {}, ""),
        Trial(3, "failed", None, (), {}, ""),
        Trial(4, "finished", (60.0,), (), {}, "best"),
    ]
    figure = figure_of(
        lambda: pictures.trial_history(
            trials,
            GOALS[:1],
        )
    )
    steps, *marks = figure.axes[0].lines
    assert [*steps.get_ydata()] == [50, 50, 60, 60]
    places = {line.get_marker(): (*line.get_xdata(), *line.get_ydata()) for line in marks if len(line.get_xdata())}
    assert places["D"] == (0, 50) and places["*"] == (4, 60) and places["x"][0] == 3
    assert (2, 0.04) in [(*line.get_xdata(), *line.get_ydata()) for line in marks]
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels == ["finished", "as it stands", "best", "pruned", "failed", "best so far"]


def test_slices_have_logarithms_and_columns() -> None:
    figure = figure_of(lambda: pictures.slices(drawn(), ("n", "w"), GOALS, 0))
    numbers, words = figure.axes
    dots = numbers.lines[0]
    assert [*dots.get_xdata()] == pytest.approx([0, 0.25, 0.5, 0.75, 1]) and [*dots.get_ydata()] == [50, 51, 52, 53, 54]
    assert [label.get_text() for label in words.get_xticklabels()] == ["a", "b"]
    assert words.lines[0].get_xdata()[1] > 0.5 > words.lines[0].get_xdata()[0]
    assert "median" in legend_of(figure) and "median" not in legend_of(
        figure_of(lambda: pictures.slices(drawn(), ("n",), GOALS, 0))
    )


def legend_of(figure: Any) -> list[str]:
    return [label.get_text() for label in figure.legends[0].get_texts()]


def test_scale_puts_words_below_numbers() -> None:
    scale = pictures._Scale([0.05, 2.0, "auto", "off"])
    assert scale.place(0.05) == 0 and scale.place(2.0) == 1 and scale.place("off") < scale.place("auto") < scale.border
    assert [label for _, label in scale.ticks] == ["auto", "off", "0.1", "0.3", "1"]
    assert pictures._Scale([3.0]).place(3.0) == 0.5
    assert [label for _, label in pictures._Scale([16.0, 32.0, 64.0]).ticks] == ["16", "32", "64"]
    assert pictures._Scale([-15.0, 20.0]).place(2.5) == 0.5
    middle = {
        name: pictures._Scale([1.0, 20.0], name).place(10.5) for name in ("a.weight", "mixup.snr_db to", "snr_db")
    }
    assert middle["mixup.snr_db to"] == middle["snr_db"] == 0.5 < middle["a.weight"]  # decibels are logarithms


def test_parallel_turns_what_is_to_be_small() -> None:
    figure = figure_of(lambda: pictures.parallel(drawn(), ("n", "w"), GOALS))
    paths = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 4]
    assert len(paths) == 5
    assert all(np.diff([path[2] for path in paths]) > 0) and all(np.diff([path[3] for path in paths]) > 0)


def test_mixtures_put_shares_into_triangles() -> None:
    weights = {
        "a": np.array([1.0, 0, 0, 1, np.nan]),
        "b": np.array([0.0, 2, 0, 1, 1]),
        "c": np.array([0.0, 0, 3, 1, 1]),
    }
    trials = drawn()
    trials[-1] = trials[-1]._replace(role="best")
    figure = figure_of(lambda: pictures.mixtures(trials, weights, GOALS[0]))
    assert legend_of(figure) == ["as it stands"]  # the best, of which nothing is drawn, is not explained
    points = [(*line.get_xdata(), *line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert points == [pytest.approx(one) for one in ((0, 0), (1, 0), (0.5, 0.75**0.5), (0.5, 0.75**0.5 / 3))]


def test_weights_of_other_size_are_compared_by_their_medians(
    tmp_path: Path, quick: dict[str, Callable[[], Any]]
) -> None:
    sizes = {"kl": 0.5, "center": 0.002, "supcon": 0.1}

    def settings(number: int) -> Json:
        return {
            f"losses.{name}.weight": size * (1 + (number + place) % 3)
            for place, (name, size) in enumerate(sizes.items(), 1)
        }

    page = Page(build(write(tmp_path, plain([0.4, 0.5, 0.45], settings))))
    assert "units of its median: kl.weight 1, center.weight 0.004, supcon.weight 0.2" in page.text
    figure_of(quick["mixture-1"])
