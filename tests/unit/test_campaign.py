"""Campaign files: cells from axes, and what would have no effect or cannot be run is told before training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared import tiny_settings

from sermll import campaign, campaign_page
from sermll.campaign import Plan, count, load_campaign, run_campaign
from sermll.errors import ConfigError, SermllError, TrainingError
from sermll.files import LOCK, read_json, write_json
from sermll.storage import locked


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


def test_what_is_done_is_counted_and_the_rest_is_estimated(
    campaign_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "lanes_here", lambda resources: 64)
    path = campaign_file({"mixup": MIXUPS, "fold": [0, 1]})
    assert "time: not known before a fold is finished" in Plan.of(load_campaign(path, {})).text()
    for index, wall_s in ((0, 3600.0), (1, 7200.0)):
        folder = Plan.of(load_campaign(path, {})).runs[0].folder / f"fold-{index}"
        folder.mkdir(parents=True)
        write_json(folder / "result.json", {"fold": index, "epochs": 2, "wall_s": wall_s})
    plan = Plan.of(load_campaign(path, {}))
    assert plan.done == [True, True, False, False]
    assert "4 cells, 4 folds, 2 finished" in plan.text()
    # both folds of the other mixup are thought to take the mean of the two
    assert "time: 3.0 h of training left, going by 2 finished folds; 1.5 h on this machine, 2 at once" in plan.text()
    job, _ = plan.runs[2].jobs[0]
    Path(job.folder).mkdir(parents=True)
    write_json(Path(job.folder) / "history.json", [{}])  # half of one is done: the other is the longest
    plan = Plan.of(load_campaign(path, {}))
    assert "time: 2.2 h of training left, going by 2 finished folds; 1.5 h on this machine, 2 at once" in plan.text()
    monkeypatch.setattr(campaign, "lanes_here", lambda resources: 1 if resources.cpus_per_worker > 1 else 64)
    large = campaign_file({"mixup": {"eam": {}, "lam": {**MIXUPS["lam"], "resources.cpus_per_worker": 2}}})
    # 8 folds at once and then, one after the other, those that need more, one of them half done
    assert f"{1.5 + 9.5 * 1.5:.1f} h on this machine, 8 at once" in Plan.of(load_campaign(large, {})).text()
    monkeypatch.setattr(campaign, "lanes_here", lambda resources: None)
    assert Plan.of(load_campaign(large, {})).text().endswith("going by 2 finished folds")
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


def test_an_override_that_every_value_of_an_axis_sets_has_no_effect(campaign_file: Callable[..., Path]) -> None:
    path = campaign_file({"seed": [1, 2]}, overrides={"seed": 3})
    with pytest.raises(ConfigError, match=r"overrides sets seed, and so does every value of axes\.seed"):
        load_campaign(path, {})
    load_campaign(campaign_file({"a": {"x": {}, "y": {"seed": 1}}}, overrides={"seed": 3}), {})  # it is x's


def test_what_is_set_for_every_cell_holds_in_cells_of_another_kind_as_far_as_they_have_it(
    campaign_file: Callable[..., Path],
) -> None:
    everywhere = {"mixup.probability": 1.0, "mixup.snr_db": [0, 5], "losses.focal.gamma": 3.0}
    axes = {"mixup": {**MIXUPS, "plain": {"mixup.kind": "none", "losses.focal": None}}}
    eam, lam, plain = load_campaign(campaign_file(axes, overrides=everywhere), {}).cells
    assert eam.overrides == everywhere
    assert lam.overrides == {"mixup.probability": 1.0, "losses.focal.gamma": 3.0, "mixup.kind": "lam"}
    assert lam.experiment.mixup.model_dump() == {"kind": "lam", "probability": 1.0}
    assert plain.overrides == {"mixup.kind": "none", "losses.focal": None}
    (_, by_word, _) = load_campaign(campaign_file(axes), {"mixup.probability": 0.9}).cells
    assert by_word.experiment.mixup.probability == 0.9  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("axes", "overrides", "told"),
    [
        ({"a": {"x": {}, "y": {"losses.focal": {}}}}, {"losses.focal.gamma": 5}, "a whole, without losses.focal.gamma"),
        ({"mixup.kind": ["lam", "none"]}, {"mixup.snr_db": [0, 1]}, "mixup.snr_db: has no effect in any cell"),
        ({"a": {"x": {"losses.focal": None}, "y": {}}, "losses.focal.gamma": [1, 2]}, {}, "axes.a losses.focal; one"),
    ],
)
def test_what_would_silently_be_lost_is_refused(
    campaign_file: Callable[..., Path], axes: dict[str, Any], overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        load_campaign(campaign_file(axes, overrides=overrides), {})


def test_what_only_the_file_says_is_no_override(campaign_file: Callable[..., Path]) -> None:
    path = campaign_file({"seed": [0]})
    for key in ("axes.seed", "axes", "experiment", "overrides.seed"):
        with pytest.raises(ConfigError, match=rf"^{key}: .*x.campaign.yaml says what the cells are; change it there"):
            load_campaign(path, {key: [0, 1]})


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ({"a": {"x": {}, "y": {"mixup.kind": "eam"}}}, "cells x and y are one run"),
        ({"a": {"x": {"fold": 0}, "y": {"fold": 1}}}, "cells x and y are one run"),
        ({"fold": {"first": {"fold": 0}, "again": {"fold": 0}}}, "cells fold first and fold again are one run, fold-0"),
    ],
)
def test_cells_that_are_one_run_are_refused_before_anything_is_written(
    campaign_file: Callable[..., Path], axes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        Plan.of(load_campaign(campaign_file(axes), {}))
    assert not (tmp_path / "runs").exists()


def run(path: Path, **overrides: Any) -> campaign.Outcome:
    return run_campaign(load_campaign(path, overrides), campaign_page.build)


def test_a_campaign_may_grow_and_loses_nothing(
    campaign_file: Callable[..., Path], untrained: list[str], undrawn: None
) -> None:
    first = run(campaign_file({"mixup": MIXUPS, "fold": [0]}))
    assert (first.cells, first.finished, len(untrained)) == (2, 2, 2)
    grown = run(campaign_file({"mixup": MIXUPS, "fold": [0, 1], "seed": [0, 1]}))
    assert (grown.cells, grown.finished, len(untrained)) == (8, 8, 8)
    page, told = grown.page.read_bytes(), (grown.folder / "campaign.json").read_bytes()
    for overrides in ({"optim.epochs": 1}, {"optim.lr": 0.5}):
        with pytest.raises(ConfigError, match=r"campaign-x: its table holds 8 finished folds (.|\n)* name=\.\.\."):
            run(campaign_file({"mixup": MIXUPS, "fold": [0, 1], "seed": [0, 1]}), **overrides)
    with pytest.raises(ConfigError, match=r"its table holds 4 finished folds .* \(eam fold 0 seed 1, run \w+ is the"):
        run(campaign_file({"mixup": MIXUPS, "fold": [0, 1]}))
    assert (page, told) == (grown.page.read_bytes(), (grown.folder / "campaign.json").read_bytes())
    named = run(campaign_file({"mixup": MIXUPS, "fold": [0]}), name="other", **{"optim.epochs": 1})
    assert named.folder == grown.folder.with_name("campaign-other")
    assert read_json(named.folder / "campaign.json")["name"] == "other"


def test_a_cell_that_never_ended_may_be_taken_out(campaign_file: Callable[..., Path], untrained: list[str]) -> None:
    begun = load_campaign(campaign_file({"mixup": MIXUPS, "fold": [0]}), {})
    begun.folder.mkdir(parents=True)
    write_json(begun.folder / "campaign.json", Plan.of(begun).describe())
    assert Plan.of(load_campaign(campaign_file({"fold": [0]}), {})).done == [False]


def test_a_second_command_is_refused_before_it_writes(
    campaign_file: Callable[..., Path], untrained: list[str], tmp_path: Path
) -> None:
    path = campaign_file({"mixup": MIXUPS, "fold": [0]})
    folder = load_campaign(path, {}).folder
    folder.mkdir(parents=True)
    with locked(folder / LOCK), pytest.raises(TrainingError, match=r"another command is running this campaign \(proc"):
        run(path)
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == [folder.name] and untrained == []


def test_what_is_finished_is_counted_when_training_ends_early(
    campaign_file: Callable[..., Path], untrained: list[str], undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = campaign_file({"mixup": MIXUPS, "fold": [0]})
    train_jobs: Any = campaign.train_jobs
    fault: list[BaseException] = [KeyboardInterrupt(), SermllError("workers cannot be started")]

    def half(work: Any, *words: Any) -> None:
        train_jobs(work[:1], *words)
        raise fault[0]

    monkeypatch.setattr(campaign, "train_jobs", half)
    folder = load_campaign(path, {}).folder
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert not (folder / "report").exists()
    found, page = count(folder, campaign_page.build)  # as `sermll report` does
    assert page.is_file() and [row.finished for row in found.rows] == [1, 0]
    fault.pop(0)
    with pytest.raises(SermllError, match="workers cannot be started"):
        run(path)
    assert [row["ua"] is not None for row in campaign_page.tally(folder).as_json()] == [True, True]
    assert len(list((folder / "predictions").glob("*.parquet"))) == 2


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
