"""`sermll run`, `matrix`, `report` and `ui` as a user meets them: what they print, as JSON too, and how they exit."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared import tiny_settings

from sermll import campaign
from sermll.cli import main


@pytest.fixture
def campaign_file(tiny_data: Path, tmp_path: Path, undrawn: None) -> Path:
    """Two variants of one fold each."""
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny_settings(tiny_data, tmp_path / "runs")))
    axes = {"mixup": {"eam": {}, "lam": {"mixup.kind": "lam"}}, "fold": [0]}
    (tmp_path / "x.campaign.yaml").write_text(yaml.safe_dump({"name": "x", "experiment": "x.yaml", "axes": axes}))
    return tmp_path / "x.campaign.yaml"


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_campaign_as_json_and_its_report(
    campaign_file: Path, untrained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = campaign_file.with_name("runs") / "campaign-x"
    assert main(["run", str(campaign_file), "--json"]) == 0
    assert last_line(capsys) == {
        "campaign_dir": str(folder),
        "cells": 2,
        "finished": 2,
        "failed": 0,
        "table": str(folder / "report" / "table.csv"),
    }
    assert main(["report", str(folder), "--json"]) == 0
    shown = capsys.readouterr().out
    assert "campaign x: 2 rows, 2 of 2 folds finished" in shown
    assert json.loads(shown.splitlines()[-1]) == {"report": str(folder / "report" / "index.html")}
    assert main(["report", str(folder), "--out", str(campaign_file.parent / "elsewhere")]) == 1
    assert "a campaign is reported by itself, into its own folder" in capsys.readouterr().err


def test_a_dry_run_tells_cells_needs_and_time_and_writes_nothing(
    campaign_file: Path, untrained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(campaign_file), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for told in ("campaign x: 2 cells, 2 folds, 0 finished", "fold 0 eam  run ", "each fold needs 1 worker with 1 CPU"):
        assert told in shown
    assert shown.endswith(f"time: not known before a fold is finished\nnext: sermll run {campaign_file}\n")
    assert main(["run", str(campaign_file), "--dry-run", "name=y", "seed=3"]) == 0  # overrides after an option, too
    assert capsys.readouterr().out.endswith(f"next: sermll run {campaign_file} name=y seed=3\n")
    labels = "data.labels={calm: [boredom, neutral], loud: [anger, fear]}"
    assert main(["run", str(campaign_file), "--dry-run", labels]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == labels  # a word, as a shell reads it
    assert not campaign_file.with_name("runs").exists() and untrained == []
    assert main(["run", str(campaign_file), "--dry-run", "--json"]) == 0
    folder = str(campaign_file.with_name("runs") / "campaign-x")
    assert last_line(capsys) == {"campaign_dir": folder, "cells": 2, "finished": 0}


def test_folds_that_failed_are_listed_and_the_exit_status_is_1(
    campaign_file: Path, untrained: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_jobs: Any = campaign.train_jobs

    def one_fails(work: Any, *words: Any) -> dict[Any, str]:
        train_jobs(work[1:], *words)
        return {work[0][0]: "loss is not finite\nand a long story"}

    monkeypatch.setattr(campaign, "train_jobs", one_fails)
    assert main(["run", str(campaign_file), "--json"]) == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert (told["cells"], told["finished"], told["failed"]) == (2, 1, 1)
    assert "1 folds could not be trained, the others are kept:\n  eam, fold 0: loss is not finite\n" in shown.err
    assert "a long story" not in shown.err


def test_who_interrupts_is_told_how_to_make_the_table(
    campaign_file: Path, untrained: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "train_jobs", interrupted)
    assert main(["run", str(campaign_file)]) == 130
    folder = campaign_file.with_name("runs") / "campaign-x"
    assert f"sermll report {folder} makes the table of what is finished" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0
    assert "0 of 2 folds finished" in capsys.readouterr().out


def test_a_matrix_is_planned_and_reported_as_one(
    campaign_file: Path, tiny_data: Path, untrained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from prepared import write_prepared

    rows = [(f"{s}-{k}", label, f"s{s}") for s in range(4) for k, label in enumerate(("anger", "neutral") * 4)]
    other = write_prepared(campaign_file.with_name("other"), "other", rows)
    path = campaign_file.with_name("m.yaml")
    more = {"overrides": {"optim.batch_size": 4, "protocol.dev_speakers": 1}}
    path.write_text(
        yaml.safe_dump({"name": "m", "experiment": "x.yaml", "corpora": [str(tiny_data), str(other)], **more})
    )
    assert main(["matrix", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "campaign m: 3 cells, 16 folds, 0 finished" in shown and "from one corpus" in shown
    assert shown.endswith(f"next: sermll matrix {path}\n")
    assert main(["matrix", str(path), "--json"]) == 0
    told = last_line(capsys)
    assert told.keys() == {"train", "test", "ua", "ua_low", "ua_high", "cells", "leaks"}
    assert told["train"] == told["test"] == ["emodb", "other"]
    assert main(["report", str(path.with_name("runs") / "campaign-m"), "--json"]) == 0
    assert last_line(capsys)["report"].endswith("report/matrix.html")


def test_ui_shows_the_store_of_the_runs_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    called: list[list[str]] = []
    start = subprocess.Popen

    def started(command: list[str], **options: Any) -> Any:
        called.append(command)
        return start(["true"], **options)

    monkeypatch.setattr(subprocess, "Popen", started)
    assert main(["ui", "--runs", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "no results were tracked here yet" in shown.err and shown.out == "" and called == []
    (tmp_path / "mlflow.db").touch()
    assert main(["ui", "--runs", str(tmp_path), "--port", "5051"]) == 0
    assert "http://127.0.0.1:5051 shows" in capsys.readouterr().out
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert called == [[sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", "5051"]]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    assert main(["ui", "--runs", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "open that address in a browser" in told and "secret" not in told
