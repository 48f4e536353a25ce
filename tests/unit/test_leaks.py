"""What `protocol.allow_leak` runs is marked wherever its scores stand: in words for people, as `leaks` for programs."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from answers import gathered
from prepared import tiny_settings
from runs import Page, change, write_campaign

from sermll import report
from sermll.campaign_page import build, text
from sermll.cli import main
from sermll.compare import compare
from sermll.compare import text as compared
from sermll.ensemble import ensemble
from sermll.files import read_json
from sermll.results import gather
from sermll.store import store
from sermll.tables import leak_notices, markdown
from sermll.tally import tally
from sermll.train import Outcome

LEAK = "fold 1: train and test share 1 speakers (c)"
NOTICE = f"LEAK, scores are too high: {LEAK}."


def leaking(run: Path) -> Path:
    """The run, as `protocol.allow_leak` would have marked it."""
    change(run / "run.json", protocol=read_json(run / "run.json")["protocol"] | {"leaks": [LEAK]})
    return run


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    run = leaking(gathered(tmp_path / "leaky-0123456789ab"))
    gather(run)
    return run


def test_a_leak_of_several_is_told_once_and_of_some_with_their_names() -> None:
    assert leak_notices({"a": [], "b": []}) == []
    assert leak_notices({"a": ["x", "x"], "b": ["x"]}) == ["LEAK, scores are too high: x."]
    assert leak_notices({"a": ["x"], "b": ["y", "x"], "c": []}) == [
        "LEAK, scores are too high: x. This is of a; b.",
        "LEAK, scores are too high: y. This is of b.",
    ]
    assert markdown(["a"], [["b"]], ["of *one*"]).startswith("of \\*one\\*\n\n| a |")


def test_compared_runs_are_marked_each(tmp_path: Path, leaky: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = gathered(tmp_path / "clean-0123456789ab", seed=1)
    assert main(["compare", str(clean), str(leaky), "--json"]) == 0
    shown = capsys.readouterr().out
    assert f"{NOTICE} This is of {leaky}." in shown.splitlines()
    assert [row["leaks"] for row in json.loads(shown.splitlines()[-1])] == [[], [LEAK]]
    assert NOTICE in compared(compare([leaky, leaky])).splitlines()
    assert "LEAK" not in compared(compare([clean, clean]))


def test_trained_runs_are_marked_for_programs_too(
    tmp_path: Path, leaky: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = Outcome(leaky, read_json(leaky / "metrics.json"), tmp_path / "index.html", None)
    monkeypatch.setattr("sermll.train.train", lambda experiment: outcome)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny_settings(tmp_path, tmp_path)))
    assert main(["train", str(tmp_path / "x.yaml"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert f"WARNING: {NOTICE}" in shown.splitlines()
    assert json.loads(shown.splitlines()[-1])["leaks"] == [LEAK]


def test_a_page_of_several_runs_marks_the_row_of_one(tmp_path: Path, leaky: Path, undrawn: None) -> None:
    clean = gathered(tmp_path / "clean-0123456789ab", seed=1)
    head, _, rest = Page(report.build([clean, leaky], tmp_path / "out")).text.partition("Mean over folds")
    assert head.count("LEAK, see below") == 1 and NOTICE in rest


def test_ensembles_are_marked(tmp_path: Path, leaky: Path) -> None:
    other = leaking(gathered(tmp_path / "other-aaaaaaaaaaaa", seed=1))
    found = ensemble([leaky, other], tmp_path / "both", "mean")
    assert found.as_json()["leaks"] == [LEAK]
    assert NOTICE in report.text_table(report.load(found.run_dir))


def test_every_table_of_a_campaign_marks_the_rows_that_leak(tmp_path: Path, undrawn: None) -> None:
    axes = {"variant": ("honest", "leaky")}
    campaign = write_campaign(tmp_path, axes, lambda labels: {"skill": 0.9 if labels["variant"] == "leaky" else 0.6})
    leaking(tmp_path / "demo-000000000001")
    found, page = build(campaign)
    notice = f"{NOTICE} This is of leaky."
    assert notice in Page(page).text and notice in text(found)
    assert notice in (page.parent / "table.md").read_text().splitlines()
    assert rf"\par {notice}" in (page.parent / "table.tex").read_text().splitlines()
    records = list(csv.DictReader((page.parent / "table.csv").open(newline="")))
    assert [(row["axis_variant"], row["leaks"]) for row in records] == [("honest", ""), ("leaky", LEAK)]
    assert [row["leaks"] for row in tally(campaign).as_json()] == [[], [LEAK]]
    answers = pq.read_table(store(campaign)).to_pandas()
    assert answers.groupby("axis_variant").leaks.unique().map(list).to_dict() == {"honest": [""], "leaky": [LEAK]}
