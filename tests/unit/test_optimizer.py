"""Rates, groups, and a step that a gradient which is not finite does not take."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sermll.model import System
from sermll.optimizer import Adam, Step, make_optimizer, set_rates

Settings = Callable[..., Any]


@pytest.fixture
def system(settings: Settings) -> System:
    torch.manual_seed(0)
    return System(settings(), 7)


def test_rates_follow_the_papers_schedule(settings: Settings, system: System) -> None:
    optim = settings("optim.lr=1e-4", "optim.epochs=30").optim
    optimizer = make_optimizer(system, optim)
    for epoch, factor in ((0, 1), (1, 7 / 8), (20, (7 / 8) ** 20), (29, (7 / 8) ** 20)):
        assert set_rates(optimizer.param_groups, optim, epoch) == pytest.approx(
            {"lr": 1e-4 * factor, "center_lr": 5e-3 * factor}
        )
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4 * factor, 5e-3 * factor])


def test_without_centers_there_is_one_group_and_one_rate(settings: Settings) -> None:
    experiment = settings("losses.center=null")
    optimizer = make_optimizer(System(experiment, 7), experiment.optim)
    assert set(set_rates(optimizer.param_groups, experiment.optim, 0)) == {"lr"}


def test_every_parameter_is_in_one_group(optim: Any, system: System) -> None:
    groups = make_optimizer(system, optim).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]  # centers are not drawn to zero
    grouped = [p for group in groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in system.parameters() if p.requires_grad)


def gradients_of(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        # In the parameter's own layout, as autograd gives them: fused kernels go through memory as it lies.
        parameter.grad = torch.empty_like(parameter).normal_(generator=generator).detach()


@pytest.fixture
def optim(settings: Settings) -> Any:
    return settings("optim.lr=1e-2", "optim.weight_decay=0.1").optim


def torchs(system: System, optim: Any, fused: bool) -> torch.optim.Optimizer:
    """An optimizer of torch with the same groups."""
    groups = [dict(group) for group in make_optimizer(system, optim).param_groups]
    return torch.optim.AdamW(groups, fused=fused, foreach=False)


def test_steps_equal_plain_ones(system: System, optim: Any) -> None:
    """To 1e-6 after three steps, clipped, with weight decay."""
    plain = copy.deepcopy(system)
    ours, theirs = make_optimizer(system, optim), torchs(plain, optim, fused=False)
    for seed in range(3):
        gradients_of(system, seed)
        gradients_of(plain, seed)
        step = Step(ours, optim.clip_norm)
        assert step.taken()
        torch.testing.assert_close(step.norm, nn.utils.clip_grad_norm_(plain.parameters(), optim.clip_norm))
        theirs.step()
    for one, two in zip(system.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("clip_norm", "factor"), [(2.0, 2 / 5), (5.1, 1.0), (1e6, 1.0)])
def test_a_gradient_is_clipped_where_it_is_longer_and_never_stretched(clip_norm: float, factor: float) -> None:
    """Told by the moments: Adam's steps hardly know how long gradients are."""
    weight, still = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Adam([{"params": [one], "lr": 1.0, "weight_decay": 0.1} for one in (still, weight)])
    weight.grad = torch.tensor([3.0, -4.0])
    assert Step(optimizer, clip_norm).norm == 5
    (moments,) = optimizer.state_dict()["state"].values()
    torch.testing.assert_close(moments["exp_avg"], 0.1 * factor * torch.tensor([3.0, -4.0]))
    torch.testing.assert_close(moments["exp_avg_sq"], 0.001 * factor**2 * torch.tensor([9.0, 16.0]))
    assert torch.equal(still, torch.ones(2))  # a group without any gradient


def test_steps_and_states_equal_those_of_torchs_fused_optimizer_to_the_bit(system: System, optim: Any) -> None:
    """One parameter gets no gradient in the second step, and its own count goes on from there."""
    other = copy.deepcopy(system)
    ours, theirs = make_optimizer(system, optim), torchs(other, optim, fused=True)
    one, none = torch.ones(()), torch.zeros(())
    for seed in range(4):
        for module in (system, other):
            gradients_of(module, seed)
            if seed == 1:
                next(module.parameters()).grad = None
        ours.step(divisor=one, skipped=none)
        theirs.step()
    assert all(torch.equal(one, two) for one, two in zip(system.parameters(), other.parameters(), strict=True))
    torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0)
    assert {float(state["step"]) for state in ours.state_dict()["state"].values()} == {3.0, 4.0}


def test_a_state_is_taken_up_torchs_too(system: System, optim: Any) -> None:
    """Training goes on to the bit as without the break, at the rates of the optimizer that goes on."""
    other = copy.deepcopy(system)
    theirs, ours = torchs(other, optim, fused=True), make_optimizer(system, optim)
    for seed in range(2):
        gradients_of(other, seed)
        theirs.step()
    system.load_state_dict(other.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    again = make_optimizer(system, optim)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for module, optimizer in ((other, theirs), (system, again)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        gradients_of(module, 2)
    theirs.step()
    again.step(divisor=torch.ones(()), skipped=torch.zeros(()))
    assert all(torch.equal(one, two) for one, two in zip(system.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_model_is_refused(settings: Settings, system: System, optim: Any) -> None:
    gradients_of(system, 0)
    ours = make_optimizer(system, optim)
    ours.step(divisor=torch.ones(()), skipped=torch.zeros(()))
    other = settings("losses.center=null")
    with pytest.raises(ValueError, match="groups of"):
        make_optimizer(System(other, 7), other.optim).load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="shape"):
        make_optimizer(System(settings(), 5), optim).load_state_dict(ours.state_dict())


def test_no_step_loads_torchs_compiler() -> None:
    """It takes a second, which every training process would begin with."""
    script = """
import sys
import torch
from sermll.optimizer import Adam, Step
weight = torch.ones(3, requires_grad=True)
optimizer = Adam([{"params": [weight], "lr": 1.0, "weight_decay": 0.0}])
weight.sum().backward()
assert Step(optimizer, 1.0).taken()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_step_asks_a_gpu_for_nothing() -> None:
    """On tensors that only tell what device they would be on, to read a value is an error."""
    with FakeTensorMode():
        weights = [torch.ones(size, device="cuda").requires_grad_() for size in (3, 4)]
        optimizer = Adam([{"params": [weight], "lr": 1.0, "weight_decay": 0.1} for weight in weights])
        skipped = torch.zeros((), device="cuda")
        with pytest.raises(DataDependentOutputException):
            float(skipped)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step(divisor=torch.ones((), device="cuda"), skipped=skipped)


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
