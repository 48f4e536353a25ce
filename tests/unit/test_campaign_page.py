"""The page of a campaign, its tables and its lines for the terminal: what they say, and that all can be drawn."""

import csv
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from runs import Page, change, write_campaign

from sermll import pictures
from sermll.campaign_page import build, text, write
from sermll.errors import DataError
from sermll.files import read_json
from sermll.tally import Tally, tally

SKILL = {"base": 0.6, "better": 0.98, "same": 0.6}
MANY = [list("abcd"), list("efgh"), list("ijkl")]


def settings(labels: dict[str, str], **more: Any) -> dict[str, Any]:
    variant = labels.get("variant", "base")
    seed = 10 * list(SKILL).index(variant) + int(labels.get("seed", 0)) if variant in SKILL else 0
    given = {"skill": SKILL.get(variant, 0.6), "seed": seed, "groups": MANY, **more}
    return given | ({"title": "Other", "classes": ("x", "y")} if labels.get("corpus") == "other" else {})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Tally:
    """Two corpora, three variants, two seeds; the page is written, over one that had more."""
    axes = {"corpus": ("tiny", "other"), "variant": tuple(SKILL), "seed": ("0", "1")}
    campaign = write_campaign(tmp_path_factory.mktemp("two"), axes, settings)
    (campaign / "report").mkdir()
    (campaign / "report" / "confusion-9.png").touch()
    found = tally(campaign)
    assert write(found) == campaign / "report" / "index.html"
    return found


def test_the_page_is_whole(two: Tally) -> None:
    path = two.folder / "report" / "index.html"
    stems = ["forest", "dev_ua-1", "confusion-1", "dev_ua-2", "confusion-2"]
    pictured = {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert {file.name for file in path.parent.iterdir()} == {
        *pictured,
        *("index.html", "table.csv", "table.md", "table.tex"),
    }
    page = Page(path)
    assert page.images == [(path.parent / f"{stem}.svg").read_bytes() for stem in stems]
    assert page.headings == [
        *("demo", "Scores and differences"),
        *("Synthetic, protocol pairs", "Scores", "Differences to base", "UA on dev", "Confusion matrices"),
        *("Other, protocol pairs", "Scores", "Differences to base", "UA on dev", "Confusion matrices"),
        *("The runs", "Cost in hours", "To do it again", "Words"),
    ]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        assert (attributes.get("src") or "data:").startswith("data:")
    for told in (
        *("2 of 4 differences shown", "better is", "points higher than base", "no difference shown"),
        *("3 classes, chance 33.3 %", "no result", "optim.epochs=5", "x.variant=better", "commit 0123456789ab"),
    ):
        assert told in page.text
    assert "failed" not in page.text


def test_all_tables_tell_the_same(two: Tally) -> None:
    out = two.folder / "report"
    records = list(csv.DictReader((out / "table.csv").open(newline="")))
    markdown = [line.strip("| ").split(" | ") for line in (out / "table.md").read_text().splitlines()]
    latex = [line.removesuffix(r" \\").split(" & ") for line in (out / "table.tex").read_text().splitlines()]
    bodies = [row for row in latex if row[0] in ("tiny", "other")]
    assert len(records) == len(markdown) - 2 == len(bodies) == 6
    assert markdown[0][:3] == latex[3][:3] == ["corpus", "variant", "UA"]
    for record, row, other in zip(records, markdown[2:], bodies, strict=True):
        ua, low, high = (100 * float(record[name]) for name in ("ua", "ua_low", "ua_high"))
        assert row[:3] == [record["axis_corpus"], record["axis_variant"], f"{ua:.1f} [{low:.1f}, {high:.1f}]"]
        assert [cell.replace("$-$", "-") for cell in other] == row
        assert row[-2:] == [record["verdict"], "6 of 6"]
    assert (out / "table.tex").read_text().count("midrule") == 2


def test_the_terminal_fits_and_tells_intervals_and_verdicts(two: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    notice = " ".join(["What must be known before the numbers are trusted."] * 4)
    monkeypatch.setattr("sermll.campaign_page._notices", lambda found: [notice])
    told = text(two)
    assert max(map(len, told.splitlines())) <= 100
    assert notice in " ".join(told.split())  # whole, over several lines
    better = two.groups[0].rows[1]
    assert better.scores is not None
    score = better.scores.selected["ua"]
    interval = f"{100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
    (line, _) = re.findall(r"^better .*$", told, re.MULTILINE)
    assert interval in line
    assert line.endswith("higher")
    assert "campaign demo: 6 rows, 36 of 36 folds finished" in told
    assert re.findall(r"^base .*$", told, re.MULTILINE)[0].endswith("reference")


def test_what_is_missing_or_failed_is_said(tmp_path: Path, undrawn: None) -> None:
    axes = {"variant": ("base", "better", "same"), "seed": ("0", "1")}
    done = {"base": 3, "better": 2, "same": 0}
    campaign = write_campaign(
        tmp_path,
        axes,
        lambda labels: settings(labels, finished=done[labels["variant"]]),
        failed={2: "TrainingError: x"},
    )
    page, told = Page(build(campaign)[1]), text(tally(campaign))
    for said in (page.text, told):
        assert "2 rows not finished: only folds that are finished with every seed count." in said
        assert "4 folds failed, see below." in said
        assert "seed 1, fold 2: TrainingError: x" in said
    assert "of fold 0, 1" in page.text
    assert "0, 1" in page.text
    assert "too few common folds" in page.text
    assert re.search(r"^better .* 4/6 ", told, re.MULTILINE)


def test_leaks_other_code_and_too_few_speakers_are_told(tmp_path: Path, undrawn: None) -> None:
    axes = {"variant": ("base", "better")}
    campaign = write_campaign(tmp_path, axes, lambda labels: settings(labels, groups=(("a", "b"), ("c", "d"))))
    run = Path(read_json(campaign / "campaign.json")["cells"][1]["run_dir"]) / "run.json"
    facts = read_json(run)
    code = facts["code"] | {"commit": "f" * 40, "dirty": True}
    change(run, code=code, protocol=facts["protocol"] | {"leaks": ["fold 0: train and test share 1 speakers (a)"]})
    for said in (Page(build(campaign)[1]).text, text(tally(campaign))):
        assert "LEAK, scores are too high: fold 0: train and test share 1 speakers (a)." in said
        assert "The runs were made by different code" in said
        assert "with so few speakers p is at least 0.12" in said
    assert "commit ffffffffffff, with uncommitted changes" in Page(campaign / "report" / "index.html").text


def test_a_single_row_and_nothing_finished(tmp_path: Path, undrawn: None) -> None:
    alone = write_campaign(tmp_path / "alone", {"seed": ("0", "1")}, settings)
    page = Page(build(alone)[1])
    value = 100 * tally(alone).as_json()[0]["ua"]
    assert f"UA {value:.1f} %" in page.text
    assert "Differences to" not in page.text
    assert len(page.images) == 3
    for name, begun in (("begun", {"finished": 0}), ("waiting", None)):
        campaign = write_campaign(tmp_path / name, {"variant": ("base", "same")}, lambda labels, begun=begun: begun)
        page = Page(build(campaign)[1])
        assert "No numbers yet" in page.text
        assert page.images == []
        assert "6 folds" in text(tally(campaign))
        assert len((campaign / "report" / "table.md").read_text().splitlines()) == 4


def test_names_are_text_in_every_file(tmp_path: Path, undrawn: None) -> None:
    evil = "<script>x</script> & 50% $a_b$ | [c] \\d #~^{}\x1b[2J"
    axes = {"vari|ant_1": (evil, "[d]"), "corpus": ("tiny",)}
    campaign = write_campaign(tmp_path, axes, lambda labels: settings(labels, title=evil, epochs=1))
    change(campaign / "campaign.json", name=evil)
    page = Page(build(campaign)[1])
    assert "script" not in [tag for tag, _ in page.tags]
    assert evil in page.text
    told = text(tally(campaign))
    assert "\x1b" not in told
    assert max(map(len, told.splitlines())) <= 100
    latex = (campaign / "report" / "table.tex").read_text()
    assert r"\textless{}script\textgreater{}x\textless{}/script\textgreater{} \& 50\% \$a\_b\$ \textbar{}" in latex
    assert "\n{}[d] & tiny & " in latex
    (header, _, first, _) = (campaign / "report" / "table.md").read_text().splitlines()
    # Bars that part cells, not those of names.
    assert len(re.findall(r"(?<!\\)\|", first)) == len(re.findall(r"(?<!\\)\|", header))
    assert r"\<script\>" in first


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, {"seed": ("0",)}, lambda labels: None)
    (campaign / "report").write_text("a file")
    with pytest.raises(DataError, match="report: cannot be written"):
        build(campaign)


def test_pictures_of_many_rows_say_what_they_leave_out(tmp_path: Path, undrawn: None) -> None:
    axes = {"variant": tuple(f"v{number}" for number in range(14))}
    campaign = write_campaign(tmp_path, axes, lambda labels: settings(labels, epochs=1, groups=(("a", "b"),)))
    assert "The first 12 of 14 rows are shown." in Page(build(campaign)[1]).text


def test_the_forest_shows_intervals_and_verdicts() -> None:
    bars = [
        pictures.Bar("one", (0.6, 0.5, 0.7), None, ""),
        pictures.Bar("two $x$\x1b", (0.8, 0.7, 0.9), (0.2, 0.1, 0.3), "higher"),
        pictures.Bar("three", (0.6, None, None), (0.0, -0.1, 0.1), "no difference shown"),
        pictures.Bar("four", None, None, ""),
    ]
    with matplotlib.rc_context(pictures._STYLE):
        figure = pictures.forest([("group", bars)])
        figure.draw_without_rendering()
    scores, differences = figure.axes
    lines = [tuple(np.asarray(line.get_xdata())) for line in scores.lines]
    assert [line for line in lines if len(line) == 2 and line[0] != line[1]] == [(50, 70), (70, 90)]
    assert [text.get_text() for text in scores.texts] == ["60.0", "80.0", "60.0", "no number yet"]
    assert [line.get_marker() for line in differences.lines] == ["None", ">", "None", "o", "None"]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["one", "two $x$?", "three", "four"]
    # What is explained is what there is, and the word beside the zero line does not stand on it.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["higher", "no difference shown"]
    (word,) = differences.texts
    zero = differences.transData.transform((0, 0))[0]
    assert word.get_text() == "reference" and zero < word.get_window_extent().x0
    with matplotlib.rc_context(pictures._STYLE):
        figure = pictures.forest(
            [("group", [bars[0], bars[0]._replace(difference=(-0.2, -0.3, -0.1), verdict="lower")])]
        )
        figure.draw_without_rendering()
    (word,) = figure.axes[1].texts
    assert word.get_window_extent().x1 < figure.axes[1].transData.transform((0, 0))[0]


def test_small_panels_hold_rows_without_utterances_of_a_class() -> None:
    counts = {f"row {number}": np.array([[number, 1.0], [0.0, 0.0]]) for number in range(14)}
    with matplotlib.rc_context(pictures._STYLE):
        figure = pictures.confusions(counts, ("x", "never tested"))
        curves = pictures.dev_curves({"one": np.array([0.5]), "two": np.array([0.1, np.nan, 0.3])}, 0.25)
        figure.draw_without_rendering()
        curves.draw_without_rendering()
    assert len([axes for axes in figure.axes if axes.get_visible()]) == pictures.MOST_PANELS
    assert [text.get_text() for text in figure.axes[1].texts] == ["50", "50"]
    assert [axes.get_title(loc="left") for axes in curves.axes] == ["one", "two"]


def test_where_the_last_epoch_is_the_rule_it_is_told_once_and_not_as_chosen(tmp_path: Path, undrawn: None) -> None:
    def by(rules: dict[str, str]) -> tuple[str, str, list[str], list[dict[str, str]]]:
        """Page, terminal, table.md and table.csv of rows with a rule each; one called same has no score yet."""
        campaign = write_campaign(
            tmp_path / "-".join(rules.values()),
            {"variant": tuple(rules)},
            lambda labels: settings(
                labels,
                overrides={"protocol.select": rules[labels["variant"]]},
                finished=0 if labels["variant"] == "same" else None,
            ),
        )
        found, page = build(campaign)
        records = list(csv.DictReader((page.parent / "table.csv").open(newline="")))
        return Page(page).text, text(found), (page.parent / "table.md").read_text().splitlines()[2:], records

    page, told, rows, records = by({"base": "last", "better": "last", "same": "last"})
    assert "chosen on dev" not in (page + told).lower() and "last epoch" in page and "UA: last epoch. sd:" in told
    assert not re.search(r"UA \[95 % interval\] +last", told)
    assert [" | the same | " in row for row in rows] == [True, True, False]
    assert [(row["select"], row["last_ua"] == row["ua"]) for row in records] == [("last", True)] * 3

    page, told, rows, records = by({"base": "dev_loss", "better": "last"})
    assert "epoch as protocol.select says" in page and "UA: epoch as protocol.select says. last:" in told
    assert [" | the same | " in row for row in rows] == [False, True]
    assert [row["select"] for row in records] == ["dev_loss", "last"]
    assert max(map(len, told.splitlines())) <= 100

    page, told, rows, _ = by({"base": "dev_ua", "better": "dev_loss"})
    assert "epoch chosen on dev" in page and "UA: epoch chosen on dev. last:" in told
    assert re.search(r"UA \[95 % interval\] +last", told) and not any("the same" in row for row in rows)
