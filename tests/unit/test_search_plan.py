"""Searches without training: what trials may see, and files that make no sense."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prepared import tiny_settings

from sermll.cli import main
from sermll.config import load_experiment
from sermll.design import Design
from sermll.errors import ConfigError
from sermll.search import _guesses, _write_best
from sermll.search_plan import inner_design, load_search, plan_text
from sermll.study import Taken
from sermll.trials import open_study

SPACE = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "losses.focal.weight": {"uniform": [0.1, 2]}}

CONDITIONAL = {"losses.focal": {"choice": [None, {}]}, "losses.focal.weight": {"uniform": [0.1, 2]}}
FROZEN = {"model.encoder.kind": "pretrained", "model.encoder.name": "nowhere", "model.encoder.tune": "none"}
BANK = {"space": {"mixup.kind": {"choice": ["eam", "lam"]}}, "overrides": FROZEN, "bank_mixes": 2}


def write_search(folder: Path, data: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.yaml").write_text(yaml.safe_dump(tiny_settings(data, folder / "runs")))
    path = folder / "x.search.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "experiment": "x.yaml", "space": SPACE} | keys, sort_keys=False))
    return path


@pytest.mark.parametrize("held_out", [(0,), (4,), (9,), (2, 5)])
def test_no_inner_fold_holds_an_utterance_of_who_is_tested(
    settings: Callable[..., Any], held_out: tuple[int, ...]
) -> None:
    experiment = settings()
    design = Design.of(experiment.data, experiment.protocol)
    speakers = np.array(design.prepared.table["speaker"].to_pylist())
    tested = {speaker for fold in held_out for speaker in design.folds.folds[fold].speakers["test"]}
    inner = inner_design(design, held_out, 3)
    devs = []
    for fold in inner.folds.folds:
        seen = {split: set(speakers[rows]) for split, rows in fold.rows.items()}
        assert not seen["test"] and not seen["train"] & seen["dev"]
        assert seen["train"] | seen["dev"] == set(speakers) - tested
        assert seen == {split: set(names) for split, names in fold.speakers.items()}
        devs.append(seen["dev"])
    assert len(set.union(*devs)) == sum(map(len, devs)) == 3  # each dev speaker once
    assert inner.hash not in (design.hash, inner_design(design, held_out, 2).hash)
    with pytest.raises(ConfigError, match=f"has {10 - len(held_out)} other"):
        inner_design(design, held_out, 10)


def test_who_is_tested_in_several_folds_is_dev_of_no_trial(settings: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "folds.yaml").write_text("[{test: ['03', '08']}, {test: ['08', '09']}, {test: ['10', '03']}]")
    experiment = settings(f"protocol.folds={tmp_path / 'folds.yaml'}")
    inner = inner_design(Design.of(experiment.data, experiment.protocol), (0,), 2)
    assert [fold.speakers["dev"] for fold in inner.folds.folds] == [("09",), ("10",)]
    for fold in inner.folds.folds:
        assert set(fold.speakers["train"]).isdisjoint({"03", "08", *fold.speakers["dev"]})


def test_a_protocol_of_one_fold_lends_its_own_dev_speakers(settings: Callable[..., Any]) -> None:
    experiment = settings()
    design = Design.of(experiment.data, experiment.protocol)
    alone = replace(design, folds=replace(design.folds, folds=design.folds.folds[:1]))
    (fold,) = inner_design(alone, (0,), 1).folds.folds
    first = design.folds.folds[0]
    np.testing.assert_array_equal(fold.rows["dev"], first.rows["dev"])
    np.testing.assert_array_equal(fold.rows["train"], first.rows["train"])
    with pytest.raises(ConfigError, match=r"has 1 other \(its own dev speakers\)"):
        inner_design(alone, (0,), 2)


def test_nested_searches_hold_out_one_fold_each(tiny_data: Path, tmp_path: Path) -> None:
    path = write_search(tmp_path, tiny_data, nested=True)
    search = load_search(path, {})
    assert [inner.test_folds for inner in search.studies] == [(fold,) for fold in range(10)]
    assert (
        len({inner.folder for inner in search.studies} | {search.fingerprint(inner) for inner in search.studies}) == 20
    )
    assert [inner.test_folds for inner in load_search(path, {"test_folds": [3, 1]}).studies] == [(3,), (1,)]
    assert [inner.test_folds for inner in load_search(path, {"nested": False, "test_folds": [3, 1]}).studies] == [
        (3, 1)
    ]


def test_a_trial_is_the_experiment_with_its_overrides_for_each_seed_and_inner_fold(
    tiny_data: Path, tmp_path: Path
) -> None:
    search = load_search(write_search(tmp_path, tiny_data, seeds=[0, 7], inner_folds=2), {"optim.epochs": 3})
    jobs = search.jobs(search.studies[0], Taken(4, {"optim.lr": 0.005}))
    assert [(job.settings["seed"], job.fold) for job in jobs] == [(0, 0), (0, 1), (7, 0), (7, 1)]
    assert all(job.settings["optim"]["lr"] == 0.005 and job.settings["optim"]["epochs"] == 3 for job in jobs)
    assert len({job.folder for job in jobs}) == 4 and all("/fold-0/trials/0004-" in job.folder for job in jobs)


def test_the_plan_names_who_chooses_and_how(tiny_data: Path, tmp_path: Path) -> None:
    told = plan_text(load_search(write_search(tmp_path, tiny_data), {"trials": 7, "pruner": "asha"}))
    for words in ("7 trials", "log 0.0001 to 0.01", "proposed by tpe, ended early by asha", "4 epochs in all"):
        assert words in told
    assert "dev 08" in told and "dev 09" in told and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("keys", "overrides", "message"),
    [
        ({"spaec": {}}, {}, "did you mean 'space'"),
        ({"space": {}}, {}, "nothing to search"),
        ({"space": {"optim.lr": {"uniform": [2, 1]}}}, {}, "low < high"),
        ({"objectives": ["accuracy"]}, {}, "objectives"),
        ({"objectives": ["dev_ua", "dev_ua"]}, {}, "stands there twice"),
        ({"objectives": ["dev_ua", "ece"], "pruner": "asha"}, {}, "give none"),
        ({"objectives": ["ece"], "pruner": "median"}, {}, "give none"),
        ({"first": [{"optim.lrr": 1}]}, {}, "did you mean 'lr'"),
        ({"test_folds": [10]}, {}, "has the folds 0 to 9"),
        ({"trials": 0}, {}, "trials"),
        ({}, {"seed": 3}, "says its seeds"),
        ({"overrides": {"fold": 1}}, {}, "says its test_folds"),
        ({}, {"optim.lr": 0.1}, r"space.optim.lr sets optim.lr, and so does overrides"),
        ({}, {"resources.workers": 2}, "a trial trains in one process"),
        ({}, {"resources.workers": [1, 2]}, "a trial trains in one process"),
        ({"inner_folds": 30}, {}, "has 9 other"),
        ({"objectives": ["dev_ua", "ece"], "sampler": "cmaes"}, {}, "cmaes knows one objective"),
        (
            {"space": {"model.pool.kind": {"choice": ["mean", "max"]}}, "sampler": "cmaes"},
            {},
            "space.model.pool.kind is",
        ),
        ({"space": CONDITIONAL, "sampler": "gp"}, {}, "would draw losses.focal.weight at random"),
        ({"space": CONDITIONAL, "sampler": "nsga2"}, {}, "would draw losses.focal.weight at random"),
        ({"space": {"optim.epochs": {"int": [1, 3]}}}, {}, "pruner=median compares trials step by step"),
        ({"first": [{"optim.epochs": 3}], "pruner": "asha"}, {}, "pruner=asha compares trials step by step"),
        (BANK, {}, r"bank_mixes does not go .*\n.*kind=lam.*\n.*mixup.kind=lam"),
        (BANK | {"space": SPACE, "first": [{"data.crop_s": 1.0}]}, {}, r"data.crop_s=1: the feature bank has 6.25"),
        (BANK | {"space": SPACE, "first": [{"model.encoder.layer": 3}]}, {}, "another encoder"),
        (BANK | {"space": SPACE}, {"optim.precision": "bf16"}, "encoded in 32 bits"),
        (BANK | {"space": SPACE}, {"mixup.kind": "none"}, "no trial mixes"),
    ],
)
def test_files_that_make_no_sense_are_refused(
    tiny_data: Path, tmp_path: Path, keys: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_search(write_search(tmp_path, tiny_data, **keys), overrides)
    assert not (tmp_path / "runs").exists()


BATCHES = {"optim.batch_size": {"choice": [8, 112, 113]}}
WAITING = {
    "optim.batch_size": {"int": [8, 113], "when": {"model.pool.kind": "max"}},
    "model.pool.kind": {"choice": ["flam", "mean", "max", "first"]},
}


@pytest.mark.parametrize("keys", [{"space": BATCHES}, {"space": WAITING}, {"first": [{"optim.batch_size": 113}]}])
def test_no_trial_has_batches_of_more_than_it_or_the_final_run_trains_on(
    tiny_data: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    # Ten speakers of 14 utterances: one is tested, one is dev, or two in the final run where the protocol says so.
    message = "optim.batch_size=113: inner fold 0 of test fold 0 has only 112 training utterances"
    with pytest.raises(ConfigError, match=message):
        load_search(write_search(tmp_path, tiny_data, **keys), {})
    fewer = {"space": {"optim.batch_size": {"choice": [8, 98, 112]}}}
    load_search(write_search(tmp_path, tiny_data, **fewer), {})
    with pytest.raises(ConfigError, match=r"optim.batch_size=112: fold 0 has only 98 training utterances"):
        load_search(write_search(tmp_path, tiny_data, **fewer), {"protocol.dev_speakers": 2})


def test_a_bank_holds_what_every_guess_and_choice_may_ask_for(tiny_data: Path, tmp_path: Path) -> None:
    wide = [{"mixup.snr_db": [-25, 20]}]
    recipe = load_search(write_search(tmp_path, tiny_data, **BANK | {"space": SPACE, "first": wide}), {}).recipe
    assert recipe and recipe.snr_db == (-25, 20)
    space = {"mixup.probability": {"choice": [0.5, 1.0], "when": {"mixup.kind": "eam"}}}
    on = BANK | {"space": space | {"mixup.kind": {"choice": ["none", "eam"]}}}
    recipe = load_search(write_search(tmp_path, tiny_data, **on), {}).recipe
    assert recipe and recipe.snr_db == (-5, 10)


def test_guesses_tell_the_sampler_what_is_known_of_them(tiny_data: Path, tmp_path: Path) -> None:
    space = {f"losses.{name}.weight": {"uniform": [0.1, 2]} for name in ("kl", "focal", "supcon")}
    first = [{"losses.supcon.weight": 0.5}, {"model.embedding_dim": 4}]
    search = load_search(write_search(tmp_path, tiny_data, space=space, first=first), {})
    (_, stands), (_, whole), (elsewhere, nothing) = _guesses(search)
    auto = {f"losses.{name}.weight": pytest.approx(1 / np.log(7)) for name in ("kl", "focal")}
    assert stands == auto and whole == auto | {"losses.supcon.weight": 0.5}
    assert elsewhere == {"model.embedding_dim": 4} and nothing == {}


@pytest.mark.parametrize(("test_folds", "more"), [([3], []), ([3, 5], ["fold=5"])])
def test_the_best_settings_are_trained_on_test_folds_alone(
    tiny_data: Path, tmp_path: Path, test_folds: list[int], more: list[str]
) -> None:
    search = load_search(write_search(tmp_path, tiny_data, test_folds=test_folds, seeds=[4]), {})
    search.folder.mkdir(parents=True)
    best = {"number": 7, "overrides": {"optim.lr": 0.005}}
    commands = _write_best(search, search.studies[0], {"best": 7, "trials": [best]})  # number 7 is not at place 7
    path = search.folder / "best.yaml"
    assert commands == [str(path), *(f"{path} {one}" for one in more)]
    written = load_experiment(path)
    assert (written.fold, written.seed, written.optim.lr) == (3, 4, 0.005)


def test_the_plan_counts_what_is_done_and_says_when_nothing_can_be_shown(tiny_data: Path, tmp_path: Path) -> None:
    path = write_search(tmp_path, tiny_data, storage=f"{tmp_path}/x.journal", sampler="gp")
    search = load_search(path, {})
    told = plan_text(search)
    assert "1 tested speakers show no difference" in told and "done already" not in told
    assert "gp draws at random until 10 trials are finished" in told
    with open_study(search, search.studies[0]) as study:
        study.begin([({}, {})])
        assert study.take(2, lambda chooser: {})
        study.tell(0, None, "", {})
    assert "1 trials are done already" in plan_text(search) and not (search.folder / "search.json").exists()


def test_a_dry_run_has_json_for_programs(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_search(tmp_path, tiny_data, nested=True, test_folds=[0, 1], trials=3)
    assert main(["search", str(path), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"study": str(tmp_path / "runs" / "search-x"), "trials": 6, "finished": 0}
