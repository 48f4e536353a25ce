"""Rates, groups, and a step that a gradient which is not finite does not take."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sermll.model import System
from sermll.optimizer import Step, make_optimizer, set_rates

Settings = Callable[..., Any]


@pytest.fixture
def system(settings: Settings) -> System:
    torch.manual_seed(0)
    return System(settings(), 7)


def test_rates_follow_the_papers_schedule(settings: Settings, system: System) -> None:
    optim = settings("optim.lr=1e-4", "optim.epochs=30").optim
    optimizer = make_optimizer(system, optim)
    for epoch, factor in ((0, 1), (1, 7 / 8), (20, (7 / 8) ** 20), (29, (7 / 8) ** 20)):
        assert set_rates(optimizer, optim, epoch) == pytest.approx({"lr": 1e-4 * factor, "center_lr": 5e-3 * factor})
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4 * factor, 5e-3 * factor])


def test_without_centers_there_is_one_group_and_one_rate(settings: Settings) -> None:
    experiment = settings("losses.center=null")
    optimizer = make_optimizer(System(experiment, 7), experiment.optim)
    assert set(set_rates(optimizer, experiment.optim, 0)) == {"lr"}


def test_every_parameter_is_in_one_group(settings: Settings, system: System) -> None:
    grouped = [p for group in make_optimizer(system, settings().optim).param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in system.parameters() if p.requires_grad)


def gradients_of(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        # In the parameter's own layout, as autograd gives them: fused kernels go through memory as it lies.
        parameter.grad = torch.empty_like(parameter).normal_(generator=generator).detach()


def test_fused_steps_equal_plain_ones(settings: Settings, system: System) -> None:
    """To 1e-6 after three steps, clipped, with weight decay."""
    optim = settings("optim.lr=1e-2", "optim.weight_decay=0.1").optim
    plain = copy.deepcopy(system)
    fused, by_hand = make_optimizer(system, optim), make_optimizer(plain, optim)
    for group in by_hand.param_groups:
        group["fused"] = False
    for seed in range(3):
        gradients_of(system, seed)
        gradients_of(plain, seed)
        step = Step(fused, optim.clip_norm)
        assert step.taken()
        torch.testing.assert_close(step.norm, nn.utils.clip_grad_norm_(plain.parameters(), optim.clip_norm))
        by_hand.step()
    for one, two in zip(system.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(settings: Settings, system: System, value: float) -> None:
    optimizer = make_optimizer(system, settings().optim)
    gradients_of(system, 0)
    assert Step(optimizer, 5.0).taken()
    weights, state = copy.deepcopy(system.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients_of(system, 1)
    gradient = next(system.parameters()).grad
    assert gradient is not None
    gradient[(0,) * gradient.dim()] = value
    step = Step(optimizer, 5.0)
    assert not step.taken() and not step.norm.isfinite()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in system.state_dict().items())
    for key, held in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state["state"][key][name]) for name, tensor in held.items()), key
    gradients_of(system, 2)
    assert Step(optimizer, 5.0).taken()
