"""The out-of-fold store: what it holds is what the runs said, and it is written again only when there is more."""

import os
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from runs import change, write_campaign

from sermll.errors import DataError
from sermll.files import read_json
from sermll.store import store

AXES = {"variant": ("plain", "a/b"), "seed": ("0", "1")}


def begun(labels: dict[str, str]) -> dict | None:
    """The last run has not begun, the second has one fold of three, the others all."""
    if labels == {"variant": "a/b", "seed": "1"}:
        return None
    return {"seed": int(labels["seed"]), "finished": 1 if labels == {"variant": "plain", "seed": "1"} else 3}


def test_every_answer_is_there_with_its_run_and_labels(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, AXES, begun)
    folder = store(campaign)
    assert folder == campaign / "predictions"
    (folder / ".left-by-a-kill.parquet.tmp").write_text("PAR1")
    table = pq.read_table(folder).to_pandas()
    pd.testing.assert_frame_equal(pd.read_parquet(folder), table)
    assert {"utterance", "probabilities", "embedding", "run_id", "axis_variant", "axis_seed"} <= set(table.columns)
    sizes = table.groupby(["axis_variant", "axis_seed", "run_id"]).size()
    assert sizes.to_dict() == {
        ("plain", "0", "000000000000"): 72,
        ("plain", "1", "000000000001"): 24,
        ("a/b", "0", "000000000002"): 72,
    }
    first = table[table.run_id == "000000000000"]
    run = pq.read_table(tmp_path / "demo-000000000000" / "predictions.parquet").to_pandas()
    pd.testing.assert_frame_equal(first[run.columns].reset_index(drop=True), run)


def test_files_are_written_again_only_for_more_folds_or_other_labels(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, AXES, begun)
    paths = sorted(store(campaign).glob("*.parquet"))
    for path in paths:
        os.utime(path, (0, 0))
    store(campaign)
    assert [path.stat().st_mtime for path in paths] == [0, 0, 0]
    # Fold 2 of the second run ends; the third run gets another name, and the first is no longer asked for.
    run = tmp_path / "demo-000000000001"
    (run / "fold-2").mkdir()
    for name in ("result.json", "predictions.parquet"):
        (run / "fold-2" / name).write_bytes((run / "fold-0" / name).read_bytes())
    cells = read_json(campaign / "campaign.json")["cells"][1:]
    cells[1]["labels"]["variant"] = "other"
    change(campaign / "campaign.json", cells=cells)
    folder = store(campaign)
    assert sorted(folder.glob("*.parquet")) == paths[1:]
    assert all(path.stat().st_mtime > 0 for path in paths[1:])
    table = pq.read_table(folder).to_pandas()
    assert table.groupby("axis_variant").size().to_dict() == {"plain": 48, "other": 72}


def test_a_fold_that_was_trained_again_is_there_anew(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, AXES, begun)
    path = store(campaign) / "demo-000000000000.parquet"
    before = pq.read_table(path)["predicted"].to_pylist()
    fold = tmp_path / "demo-000000000000" / "fold-0"
    answers = pq.read_table(fold / "predictions.parquet")
    (fold / "predictions.parquet").unlink()
    other = answers.set_column(answers.column_names.index("predicted"), "predicted", [["sad"] * len(answers)])
    pq.write_table(other, fold / "predictions.parquet")
    os.utime(fold / "result.json")
    store(campaign)
    assert pq.read_table(path)["predicted"].to_pylist() == ["sad"] * len(answers) + before[len(answers) :]


def test_folds_as_an_axis_are_one_file(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, {"fold": ("0", "2"), "variant": ("plain",)}, lambda labels: {})
    table = pq.read_table(store(campaign)).to_pandas()
    assert sorted(set(table.fold)) == [0, 2]
    assert "axis_fold" not in table.columns


def test_nothing_finished_is_an_empty_folder(tmp_path: Path) -> None:
    folder = store(write_campaign(tmp_path, AXES, lambda labels: None))
    assert list(folder.iterdir()) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, AXES, begun)
    (tmp_path / "demo-000000000001" / "fold-0" / "predictions.parquet").write_text("PAR1")
    with pytest.raises(DataError, match=r"fold-0/predictions\.parquet: damaged"):
        store(campaign)
