"""Campaign files: cells from axes, and what would have no effect or cannot be run is told before training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared import tiny_settings

from sermll.campaign import Plan, load_campaign
from sermll.errors import ConfigError
from sermll.files import write_json


@pytest.fixture
def campaign_file(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a campaign with the given axes beside the tiny experiment."""

    def write(axes: dict[str, Any], **more: Any) -> Path:
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny_settings(tiny_data, tmp_path / "runs")))
        path = tmp_path / "x.campaign.yaml"
        content = {"name": "x", "experiment": "x.yaml", "axes": axes, **more}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


MIXUPS = {"eam": {}, "lam": {"mixup.kind": "lam"}}


def test_cells_are_the_product_of_the_axes_in_order(campaign_file: Callable[..., Path]) -> None:
    campaign = load_campaign(campaign_file({"mixup": MIXUPS, "seed": [3, 1], "fold": [0, 2]}), {"optim.epochs": 5})
    told = [(cell.labels["mixup"], cell.experiment.seed, cell.experiment.fold) for cell in campaign.cells]
    assert told == [(mixup, seed, fold) for mixup in ("eam", "lam") for seed in (3, 1) for fold in (0, 2)]
    assert {cell.experiment.optim.epochs for cell in campaign.cells} == {5}
    assert campaign.cells[-1].experiment.mixup.kind == "lam"
    assert campaign.cells[-1].overrides == {"optim.epochs": 5, "mixup.kind": "lam", "seed": 1, "fold": 2}
    assert {cell.experiment.name for cell in campaign.cells} == {"x"}


def test_cells_that_differ_in_the_fold_alone_are_one_run(campaign_file: Callable[..., Path]) -> None:
    plan = Plan.of(load_campaign(campaign_file({"mixup": MIXUPS, "fold": [0, 2]}), {}))
    assert [[job.fold for job, _ in run.jobs] for run in plan.runs] == [[0], [2], [0], [2]]
    assert plan.runs[0].folder == plan.runs[1].folder != plan.runs[2].folder
    (data,) = {id(data) for run in plan.runs for job, data in run.jobs if job.fold == 0}  # shared by both mixups
    assert data


def test_without_a_fold_axis_a_cell_is_every_fold(campaign_file: Callable[..., Path]) -> None:
    plan = Plan.of(load_campaign(campaign_file({"seed": [0]}), {}))
    assert [job.fold for job, _ in plan.runs[0].jobs] == list(range(10))
    assert plan.describe()["cells"][0]["folds"] == list(range(10))


def test_a_run_is_its_id_whatever_it_was_called(campaign_file: Callable[..., Path], tmp_path: Path) -> None:
    (run,) = Plan.of(load_campaign(campaign_file({"seed": [0]}), {})).runs
    begun = tmp_path / "runs" / f"other-{run.id}"
    begun.mkdir(parents=True)
    write_json(begun / "run.json", {})
    assert Plan.of(load_campaign(campaign_file({"seed": [0]}), {})).runs[0].folder == begun


def test_what_is_done_is_counted_and_the_rest_is_estimated(campaign_file: Callable[..., Path]) -> None:
    path = campaign_file({"mixup": MIXUPS, "fold": [0, 1]})
    assert "time: not known before a fold is finished" in Plan.of(load_campaign(path, {})).text()
    for index, wall_s in ((0, 3600.0), (1, 7200.0)):
        folder = Plan.of(load_campaign(path, {})).runs[0].folder / f"fold-{index}"
        folder.mkdir(parents=True)
        write_json(folder / "result.json", {"fold": index, "wall_s": wall_s})
    plan = Plan.of(load_campaign(path, {}))
    assert plan.done == [True, True, False, False]
    assert "4 cells, 4 folds, 2 finished" in plan.text()
    # both folds of the other mixup are thought to take the mean of the two
    assert "time: 3.0 h of training left, going by 2 finished folds" in plan.text()
    json.dumps(plan.describe())


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        ({"a": {"x": {"seed": 1}}, "b": {"y": {"seed": 2}}}, {}, "axes.b sets seed, and so does axes.a"),
        ({"seed": [1, 1]}, {}, "axes.seed: a value stands there twice"),
        ({"seed": []}, {}, "axes.seed: an axis needs a value"),
        ({}, {}, "axes: "),
        ({"mixup": {"bad": {"mixup.snr": 1}}}, {}, r"cell bad: (.|\n)*mixup.snr: no such key; did you mean 'snr_db'"),
        ({"a": {"x": {}}}, {"axis": {}}, "axis: no such key; did you mean 'axes'"),
        ({"a": {"x": {}}}, {"experiment": "gone.yaml"}, "gone.yaml: no such experiment file"),
        ({"a": {"x": {}, "y": {"tracking.runs": "elsewhere"}}}, {}, "tracking.runs must be the same in every cell"),
    ],
)
def test_files_that_are_no_campaign_are_told(
    campaign_file: Callable[..., Path], axes: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_campaign(campaign_file(axes, **more), {})


def test_an_override_that_an_axis_sets_too_is_refused(campaign_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"axes\.seed sets seed, and so does the command line"):
        load_campaign(campaign_file({"seed": [1]}), {"seed": 2})


def test_every_cell_that_cannot_be_run_is_named(campaign_file: Callable[..., Path]) -> None:
    path = campaign_file({"folds": {"gone": {"protocol.folds": "gone"}, "here": {}, "far": {"fold": 77}}})
    with pytest.raises(
        ConfigError, match=r"2 cells cannot be run\ncell gone: (.|\n)*no such fold list(.|\n)*cell far: "
    ):
        Plan.of(load_campaign(path, {}))


def test_the_campaigns_that_come_with_sermll_are_valid() -> None:
    root = Path(__file__).resolve().parents[2] / "experiments"
    found = {path.name: len(load_campaign(path, {}).cells) for path in root.rglob("*.campaign.yaml")}
    assert found["ablation.campaign.yaml"] == 15 and found["ablation_small.campaign.yaml"] == 20
