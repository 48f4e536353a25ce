"""The page, table and text of a noise test: every number where it belongs, and nothing hidden."""

import csv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from runs import Page

from sermll import pictures, robustness_page
from sermll.robustness import Robustness
from sermll.robustness_page import build, text, write_table


def score(value: float, interval: bool = True) -> dict[str, dict[str, float | None]]:
    """UA, WA and macro F1 that can be told apart, with or without an interval around the UA."""
    low, high = (value - 0.05, value + 0.05) if interval else (None, None)
    return {
        name: {"value": value + plus, "low": low, "high": high}
        for name, plus in (("ua", 0.0), ("wa", 0.01), ("macro_f1", 0.02))
    }


def results(
    noises: tuple[str, ...] = ("rain", "street"),
    levels: tuple[float, ...] = (20.0, 0.0, -5.0),
    interval: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Content of robustness.json: noise n at level l has UA 0.6 - 0.1 l's place - 0.01 n's place."""

    def at(noise: float, level: int) -> dict[str, Any]:
        return score(0.6 - 0.1 * level - 0.01 * noise, interval)

    return {
        "run": "demo-0123456789ab",
        "version": "1.2.3",
        "title": "EMO-DB",
        "data_hash": "feedc0dedeadbeef",
        "protocol": "speaker",
        "protocol_hash": "abcdef",
        "select": "dev_ua",
        "leaks": [],
        "folds": [0, 1],
        "folds_of_protocol": 2,
        "chance": 0.25,
        "noise_dir": "/noises",
        "noises": [{"name": name, "sha256": "0" * 64, "duration_s": 61.2} for name in noises],
        "snr_db": list(levels),
        "seed": 7,
        "clean": score(0.7, interval),
        "conditions": [
            {"noise": name, "snr_db": level, **at(place, row)}
            for place, name in enumerate(noises)
            for row, level in enumerate(levels)
        ],
        "mean": [{"snr_db": level, **at((len(noises) - 1) / 2, row)} for row, level in enumerate(levels)],
        "without_level": [],
        **changes,
    }


def test_page_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert build(results(), tmp_path / name) == tmp_path / name / "index.html"
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"index.html", "table.csv", "curves.png", "curves.svg"}
    ElementTree.fromstring(written[0]["curves.svg"])
    page = Page(tmp_path / "first" / "index.html")
    assert page.images == [written[0]["curves.svg"]]
    assert page.headings == [
        "Noise robustness of demo-0123456789ab",
        *("UA by noise and SNR, with 95 % intervals", "All scores, mean of noises", "Curves", "How it was measured"),
    ]
    for told in ("UA 70.0 → 39.5 %", "From clean speech to -5 dB SNR, mean of 2 noises", "rain 61 s, street 61 s"):
        assert told in page.text
    for told in (
        "60.055.0 to 65.0",
        "39.034.0 to 44.0",
        "59.5 [54.5, 64.5]",
        "41.5",
        "Clean: 70.0 [65.0, 75.0]. Chance: 25.0",
        "feedc0de",
    ):
        assert told in page.text
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        assert (attributes.get("src") or "data:").startswith("data:")


def test_table_holds_every_score(tmp_path: Path) -> None:
    found = results()
    write_table(found, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["noise"], row["snr_db"]) for row in rows] == [
        ("clean", "", ""),
        *(("noise", noise, level) for noise in ("rain", "street") for level in ("20.0", "0.0", "-5.0")),
        *(("mean", "", level) for level in ("20.0", "0.0", "-5.0")),
    ]
    for row, scores in zip(rows, [found["clean"], *found["conditions"], *found["mean"]], strict=True):
        for name in ("ua", "wa", "macro_f1"):
            assert float(row[name]) == scores[name]["value"]
            assert (float(row[f"{name}_low"]), float(row[f"{name}_high"])) == (
                scores[name]["low"],
                scores[name]["high"],
            )


def test_text_is_narrow_and_has_noises_by_level() -> None:
    lines = text(results()).splitlines()
    assert lines[0] == "demo-0123456789ab  EMO-DB, protocol speaker: 2 folds"
    assert lines[1] == "clean UA 70.0 [65.0, 75.0], chance 25.0"
    cells = [line.split() for line in lines[3:]]
    assert cells[0] == ["UA", "in", "%", "20", "dB", "0", "dB", "-5", "dB"]
    assert cells[1:3] == [["rain", "60.0", "50.0", "40.0"], ["street", "59.0", "49.0", "39.0"]]
    assert cells[3] == ["mean", "of", "noises", "59.5", "49.5", "39.5"]
    assert cells[4][-3:] == ["54.5", "44.5", "34.5"] and cells[5][-3:] == ["64.5", "54.5", "44.5"]


def test_long_names_and_many_levels_keep_the_width() -> None:
    levels = tuple(float(level) for level in range(20, -10, -2))
    shown = text(results(("n" * 80, "street"), levels, title="T" * 120))
    assert max(map(len, shown.splitlines())) <= 100
    assert "the other 6 levels stand in table.csv" in shown
    assert "n" * 26 + "…" in shown


def test_what_a_reader_must_know_is_told_first(tmp_path: Path) -> None:
    found = results(
        leaks=["fold 0: train and test share 1 speakers: 08"],
        folds=[0],
        without_level=["u1", "u2", "u3", "u4", "u5", "u6"],
    )
    notes = [
        "LEAK, scores are too high: fold 0: train and test share 1 speakers: 08.",
        "1 of the protocol's 2 folds are finished.",
        "6 utterances without active speech got no noise: u1, u2, u3, u4, u5, ….",
    ]
    assert text(found).splitlines()[2:5] == notes
    build(found, tmp_path)
    assert all(note in Page(tmp_path / "index.html").text for note in notes)
    assert Robustness(tmp_path, tmp_path / "index.html", found).as_json()["leaks"] == found["leaks"]
    with (tmp_path / "table.csv").open(newline="") as file:
        assert {row["leaks"] for row in csv.DictReader(file)} == {"fold 0: train and test share 1 speakers: 08"}


def test_the_epoch_of_the_models_is_told_by_its_rule(tmp_path: Path) -> None:
    for select, told in (("dev_ua", "chosen on dev"), ("dev_loss", "chosen on dev"), ("last", "of the last epoch")):
        build(results(select=select), tmp_path)
        assert f"The model of each fold, {told}, recognises" in Page(tmp_path / "index.html").text


def test_names_are_no_markup(tmp_path: Path) -> None:
    build(results(("<b>&", "$x^2$")), tmp_path)
    page = Page(tmp_path / "index.html")
    assert "<b>&" in page.text and "b" not in [tag for tag, _ in page.tags]


@pytest.mark.parametrize(
    ("noises", "levels"), [(("rain",), (5.0,)), (("rain", "street"), (5.0,)), (("rain",), (5.0, 0.0))]
)
def test_one_noise_one_level_and_no_interval_can_be_shown(
    tmp_path: Path, noises: tuple[str, ...], levels: tuple[float, ...]
) -> None:
    found = results(noises, levels, interval=False)
    build(found, tmp_path)
    assert "UA 70.0 → " in Page(tmp_path / "index.html").text
    assert "None" not in (tmp_path / "table.csv").read_text() and "None" not in text(found)
    assert ("mean of noises" in text(found)) == (len(noises) > 1)


def drawn(found: dict[str, Any]) -> Any:  # matplotlib's figure
    noises = {name: robustness_page._ends(rows) for name, rows in robustness_page._by_noise(found)}
    return pictures.noise_curves(found["snr_db"], noises, robustness_page._ends(found["mean"]), 0.7, 0.25)


def test_picture_goes_from_little_noise_to_much() -> None:
    figure = drawn(results())
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20", "0", "\u22125"]
    left, right = axes.get_xlim()
    assert left > 20 and right < -5
    assert axes.get_ylim()[0] <= 22  # chance, 25 %, does not lie on the frame
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"rain", "street", "mean of noises", "clean 70.0 %", "chance 25.0 %"}
    assert lines["street"].get_ydata() == pytest.approx([59.0, 49.0, 39.0])
    assert lines["mean of noises"].get_xdata() == pytest.approx([20.0, 0.0, -5.0])
    assert all(abs(lines["rain"].get_xdata() - [20.0, 0.0, -5.0]) < 2.5)
    assert axes.get_ylim()[0] <= 25 and axes.get_ylim()[1] >= 70  # chance and clean are seen


def test_many_noises_are_drawn_thin_with_one_key() -> None:
    figure = drawn(results(tuple(f"noise {number}" for number in range(40))))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["one noise each", "mean of noises", "clean 70.0 %", "chance 25.0 %"]
