"""What a search chooses from: points of the space, as overrides that make valid experiments."""

import json
from typing import Any

import numpy as np
import optuna
import pytest
from scipy import stats

from sermll.config import resolve
from sermll.errors import ConfigError
from sermll.space import Choice, Drawn, check, conditional, params_of, settings_of, suggest
from sermll.space import points as space_points

BASE = {
    "name": "demo",
    "data": {"path": "data/demo"},
    "model": {"encoder": {"kind": "logmel"}},
    "losses": {"kl": {"weight": 0.5}, "focal": {"weight": 0.3}, "supcon": {"weight": 0.2}},
}
WEIGHTS = ("losses.kl.weight", "losses.focal.weight", "losses.supcon.weight")


def space_of(**entries: dict[str, Any]) -> dict[str, Choice]:
    return {name.replace("__", "."): Choice.model_validate(entry) for name, entry in entries.items()}


def tree_of(base: dict[str, Any]) -> dict[str, Any]:
    return resolve(base, {}).model_dump(mode="json")


def points(space: dict[str, Choice], base: dict[str, Any], count: int = 300) -> list[dict[str, Any]]:
    tree = tree_of(base)
    return [suggest(space, tree, Drawn(np.random.default_rng([1, number]))) for number in range(count)]


def test_each_kind_stays_within_its_bounds_and_is_spread_over_them() -> None:
    space = space_of(
        optim__decay={"uniform": [0.5, 0.9]},
        optim__lr={"loguniform": [1e-5, 1e-1]},
        optim__batch_size={"int": [4, 7]},
        model__pool__kind={"choice": ["flam", "mean"]},
    )
    drawn = points(space, BASE)
    assert stats.kstest([point["optim.decay"] for point in drawn], stats.uniform(0.5, 0.4).cdf).pvalue > 0.01
    assert stats.kstest([point["optim.lr"] for point in drawn], stats.loguniform(1e-5, 1e-1).cdf).pvalue > 0.01
    assert {point["optim.batch_size"] for point in drawn} == {4, 5, 6, 7}
    assert {point["model.pool.kind"] for point in drawn} == {"flam", "mean"}


def test_a_range_is_low_below_high_and_within_its_bounds() -> None:
    for point in points(space_of(mixup__snr_db={"range": [-15, 20]}), BASE):
        low, high = point["mixup.snr_db"]
        assert -15 <= low < high <= 20


def test_weights_on_a_simplex_have_their_sum_and_are_evenly_spread() -> None:
    drawn = points(space_of(weights={"simplex": list(WEIGHTS), "sum": 2.0}), BASE, 2000)
    parts = np.array([[point[key] for key in WEIGHTS] for point in drawn])
    np.testing.assert_allclose(parts.sum(axis=1), 2.0)
    assert (parts > 0).all()
    for share in (parts / 2).T:  # each alone is a Beta(1, 2) there, but for the ends that are cut off
        assert stats.kstest(share, stats.beta(1, 2).cdf).statistic < 0.05


def test_settings_of_a_loss_that_is_off_are_not_chosen() -> None:
    space = space_of(
        losses__supcon__weight={"uniform": [0.1, 1]},
        losses__supcon__temperature={"loguniform": [0.05, 1]},
        losses__supcon={"choice": [None, {}]},
    )
    for point in points(space, BASE):
        on = "losses.supcon" not in point  # as it stands, it is on
        assert ("losses.supcon.weight" in point) == ("losses.supcon.temperature" in point) == on
        experiment = resolve(BASE, point)
        assert (experiment.losses.supcon is not None) == on
        kept = settings_of(space, experiment)
        assert kept["losses.supcon"] == ("on" if on else None)
        assert kept["losses.supcon.weight"] == (point["losses.supcon.weight"] if on else None)


def test_a_section_that_is_turned_on_is_the_one_that_the_experiment_has() -> None:
    base = {**BASE, "losses": {"supcon": {"temperature": 0.07}}}
    space = space_of(
        losses__supcon={"choice": [None, {}], "when": {"model.pool.kind": "flam"}},
        losses__supcon__weight={"uniform": [0.1, 1]},
        model__pool__kind={"choice": ["flam", "mean"]},
        optim__lr={"uniform": [0.1, 1], "when": {"losses.supcon": {}}},
    )
    check(space, base, {}, "x.yaml")
    seen = set()
    for point in points(space, base, 60):
        supcon = resolve(base, point).losses.supcon
        seen.add(supcon is not None)
        assert ("losses.supcon.weight" in point) == ("optim.lr" in point) == (supcon is not None)
        if supcon is not None:
            assert (supcon.temperature, supcon.weight) == (0.07, point["losses.supcon.weight"])
    assert seen == {True, False}


def test_entries_that_wait_for_each_other_are_refused() -> None:
    space = space_of(
        optim__lr={"uniform": [0.1, 1], "when": {"optim.decay": 0.5}},
        optim__decay={"choice": [0.5, 0.6], "when": {"optim.lr": 0.1}},
    )
    with pytest.raises(ConfigError, match="wait for each other"):
        check(space, BASE, {}, "x.yaml")


def test_what_waits_for_what_waits_comes_last() -> None:
    space = space_of(
        optim__lr={"uniform": [0.1, 1], "when": {"model.pool.heads": 8}},
        model__pool__heads={"choice": [4, 8], "when": {"model.pool.kind": "flam"}},
        model__pool__kind={"choice": ["flam", "mean"]},
    )
    drawn = points(space, {**BASE, "model": {**BASE["model"], "pool": {"heads": 8}}}, 60)
    assert all(("optim.lr" in point) == (point.get("model.pool.heads") == 8) for point in drawn)
    assert {"optim.lr" in point for point in drawn} == {True, False}


@pytest.mark.parametrize("values", [(0.5, 0.3, 0.3), (0.7, 0.3, 0.0), (1.2, -0.1, -0.1), ("auto", 0.5, 0.5)])
def test_weights_beside_the_simplex_are_no_choice_of_a_trial(values: tuple[Any, ...]) -> None:
    weights = Choice(simplex=WEIGHTS)
    assert weights.params("weights", WEIGHTS, dict(zip(WEIGHTS, (0.5, 0.3, 0.2), strict=True)))
    assert weights.params("weights", WEIGHTS, dict(zip(WEIGHTS, values, strict=True))) is None
    assert weights.params("weights", WEIGHTS[:1], {WEIGHTS[0]: 1.0}) == {}  # alone it is the sum


def test_a_simplex_is_that_of_the_losses_that_are_on() -> None:
    space = space_of(
        losses__focal={"choice": [None, {}]},
        losses__supcon={"choice": [None, {}]},
        weights={"simplex": list(WEIGHTS), "sum": 2.0},
    )
    check(space, BASE, {}, "x.yaml")
    counts = set()
    for point in points(space, BASE, 60):
        weights = {key: point[key] for key in WEIGHTS if key in point}
        counts.add(len(weights))
        assert sum(weights.values()) == pytest.approx(2.0)
        losses = resolve(BASE, point).losses
        assert weights == {
            f"losses.{name}.weight": one.weight for name in ("kl", "focal", "supcon") if (one := getattr(losses, name))
        }
        params = params_of(space, resolve(BASE, point).model_dump(mode="json"))
        assert suggest(space, tree_of(BASE), optuna.trial.FixedTrial(params)) == pytest.approx(point)
    assert counts == {1, 2, 3}


def test_what_some_trials_alone_choose_is_named() -> None:
    assert conditional(SPACE, tree_of(BASE)) == ()
    space = space_of(losses__focal={"choice": [None, {}]}, losses__focal__weight={"uniform": [0.1, 1]})
    assert conditional(space, tree_of(BASE)) == ("losses.focal.weight",)


def test_a_loss_that_the_experiment_has_not_can_be_turned_on() -> None:
    base = {**BASE, "losses": {"supcon": None}}
    space = space_of(losses__supcon={"choice": [None, {}]}, losses__supcon__weight={"uniform": [0.1, 1]})
    found = [point for point in points(space, base) if point["losses.supcon"] == {}]
    assert found and all(resolve(base, point).losses.supcon is not None for point in found)


def test_what_waits_for_another_setting_is_chosen_with_it_alone() -> None:
    space = space_of(
        model__pool__heads={"choice": [4, 8], "when": {"model.pool.kind": "flam"}},
        model__pool__kind={"choice": ["flam", "mean"]},
    )
    for point in points(space, BASE):
        assert ("model.pool.heads" in point) == (point["model.pool.kind"] == "flam")
        assert "model.pool.heads" not in settings_of(space, resolve(BASE, point)) or "model.pool.heads" in point


SPACE = space_of(
    optim__lr={"loguniform": [1e-5, 1e-1]},
    optim__batch_size={"int": [4, 32]},
    optim__decay={"uniform": [0.5, 1.0]},
    mixup__snr_db={"range": [-15, 20]},
    model__pool__kind={"choice": ["flam", "mean"]},
    weights={"simplex": list(WEIGHTS)},
)


def test_a_point_comes_back_from_what_it_would_have_had_to_choose() -> None:
    tree = tree_of(BASE)
    for point in [{}, *points(SPACE, BASE, 50)]:
        settings = resolve(BASE, point).model_dump(mode="json")
        params = params_of(SPACE, settings)
        assert len(params) == 4 + 2 + 3
        again = suggest(SPACE, tree, optuna.trial.FixedTrial(params))
        kept = settings_of(SPACE, resolve(BASE, again))
        for key, value in settings_of(SPACE, resolve(BASE, point)).items():
            assert kept[key] == pytest.approx(value) if not isinstance(value, str) else kept[key] == value


def test_what_is_no_number_or_not_within_is_left_open() -> None:
    base = {**BASE, "losses": {}, "optim": {"lr": 0.5}}  # weights are auto, the rate lies outside
    params = params_of(SPACE, tree_of(base))
    assert params.keys() == {
        *("optim.batch_size", "optim.decay", "mixup.snr_db.low", "mixup.snr_db.share", "model.pool.kind")
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "give one of uniform, .* found none"),
        ({"uniform": [0, 1], "int": [0, 1]}, "found uniform, int"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"loguniform": [0, 1]}, "above 0"),
        ({"choice": ["a"]}, "two values at least"),
        ({"choice": [[1], [1]]}, "each once"),
        ({"simplex": ["a"]}, "two values at least"),
        ({"uniform": [0, 1], "sum": 2}, "sum has no effect"),
        ({"uniform": [0, float("nan")]}, "finite"),
    ],
)
def test_entries_that_make_no_sense_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice.model_validate(entry)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "the space is empty"),
        ({"optim__lrr": {"uniform": [0.1, 1]}}, "did you mean 'lr'"),
        ({"protocol__dev_speakers": {"int": [1, 3]}}, "decides what is asked"),
        ({"seed": {"int": [1, 3]}}, "decides what is asked"),
        ({"data__path": {"choice": ["a", "b"]}}, "decides what is asked"),
        ({"optim__epochs": {"int": [1, 3]}}, r"space.optim.epochs sets optim.epochs, and so does overrides"),
        ({"optim__lr": {"uniform": [0.1, 1]}, "w": {"simplex": ["optim.lr", "optim.decay"]}}, "so does space.optim.lr"),
        ({"optim__average": {"uniform": [0.1, 1.5]}}, "Such a trial would be asked of the space: optim.average=1.5"),
        ({"optim__decay": {"uniform": [-1, 0.5]}}, "optim.decay=-1.0"),
        ({"mixup__snr_db": {"range": [-80, 20]}}, "snr_db needs -60"),
        ({"optim__lr": {"uniform": [0.1, 1], "when": {"model.pool.kind": "mean"}}}, "never be chosen"),
        ({"model__pool__heads": {"choice": [8, 16]}, "model__pool__kind": {"choice": ["flam", "max"]}}, "heads"),
        ({"model__encoder__dim": {"int": [32, 64]}}, "model.encoder.dim: .* multiple of 2, got 33"),
        ({"model__pool__heads": {"int": [1, 4]}}, r"3 heads \(model.pool.heads\) do not divide"),
    ],
)
def test_spaces_that_make_invalid_experiments_are_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(space_of(**space), {**BASE, "optim": {"epochs": 5}}, {"optim.epochs": 5}, "x.yaml")


def test_every_combination_of_choices_and_whole_numbers_is_looked_at() -> None:
    space = space_of(
        model__encoder__dim={"choice": [32, 48, 64]},
        model__pool__heads={"int": [1, 3], "when": {"model.pool.kind": "flam"}},
        model__pool__kind={"choice": ["flam", "mean"]},
        optim__lr={"loguniform": [0.1, 1], "when": {"model.pool.kind": "mean"}},
    )
    looked = list(space_points(space, tree_of(BASE)))
    flam = {(point["model.encoder.dim"], point["model.pool.heads"]) for point in looked if "model.pool.heads" in point}
    assert flam == {(dim, heads) for dim in (32, 48, 64) for heads in (1, 2, 3)}
    mean = [(point["model.encoder.dim"], point["optim.lr"]) for point in looked if "optim.lr" in point]
    assert {(dim, end) for dim in (32, 48, 64) for end in (0.1, 1)} <= set(mean)  # the ends of what waits, too


def test_one_faulty_combination_of_many_is_found() -> None:
    dims = list(range(24, 1024, 24))
    heads = {"choice": [1, 2, 3, 4, 8]}
    check(space_of(model__encoder__dim={"choice": dims}, model__pool__heads=heads), BASE, {}, "x.yaml")
    with pytest.raises(ConfigError, match=r"3 heads .* width of 128"):
        check(space_of(model__encoder__dim={"choice": [*dims, 128]}, model__pool__heads=heads), BASE, {}, "x.yaml")


def test_every_value_is_looked_at_where_combinations_are_too_many() -> None:
    space = space_of(
        optim__batch_size={"choice": list(range(2, 202))},
        model__embedding_dim={"int": [2, 301]},
        optim__decay_epochs={"int": [0, 99]},
    )
    looked = list(space_points(space, tree_of(BASE)))
    assert {point["optim.batch_size"] for point in looked} == set(range(2, 202))
    assert {point["model.embedding_dim"] for point in looked} == set(range(2, 302))
    assert {point["optim.decay_epochs"] for point in looked} == set(range(100))


def test_weights_of_a_loss_that_is_always_off_are_refused() -> None:
    space = space_of(losses__center__weight={"loguniform": [1e-4, 1e-2]}, optim__lr={"uniform": [0.1, 1]})
    with pytest.raises(ConfigError, match=r"losses\.center\.weight would never be chosen"):
        check(space, {**BASE, "losses": {"center": None}}, {}, "x.yaml")


def test_words_say_what_is_chosen_from() -> None:
    space = json.loads(
        '{"a": {"loguniform": [0.05, 2]}, "b": {"range": [-15, 20]}, "c": {"choice": [null, {}, "x", 3]}, '
        '"d": {"int": [1, 4], "when": {"a": 1}}, "e": {"simplex": ["a", "b"]}}'
    )
    words = [Choice.model_validate(entry).words() for entry in space.values()]
    assert words == ["log 0.05 to 2", "range within -15 to 20", "off, on, x, 3", "1 to 4, with a=1", "weights of sum 1"]
