"""Losses against slow loops over the papers' formulas, hand values and numerical gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sermll.config import Losses
from sermll.errors import ConfigError
from sermll.losses import (
    Objective,
    center_distance,
    context_broadcast,
    focal,
    kl,
    log_sum_exp_of_others,
    supcon,
)

DOUBLE = torch.float64
LENGTHS = [5, 1, 3, 4]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def soft_labels(generator: torch.Generator, batch: int = 6, classes: int = 4) -> Tensor:
    """Distributions as mixup leaves them: some one-hot, some of two classes."""
    own = torch.randint(classes, (batch,), generator=generator)
    other = torch.randint(classes, (batch,), generator=generator)
    weight = torch.rand(batch, 1, generator=generator, dtype=DOUBLE) * 0.38
    weight[::2] = 0
    eye = torch.eye(classes, dtype=DOUBLE)
    return (1 - weight) * eye[own] + weight * eye[other]


def batch_of_frames(generator: torch.Generator, dim: int = 3, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    h = scale * torch.randn(len(LENGTHS), max(LENGTHS), dim, generator=generator, dtype=DOUBLE)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return h, mask


def objective_of(num_classes: int, embedding_dim: int, **losses: Any) -> Objective:
    return Objective(Losses.model_validate(losses), num_classes, embedding_dim)


def slow_kl(logits: Tensor, target: Tensor) -> float:
    total = 0.0
    for row, y in zip(logits.softmax(dim=-1).tolist(), target.tolist(), strict=True):
        total += sum(y_c * math.log(y_c / p_c) for y_c, p_c in zip(y, row, strict=True) if y_c > 0)
    return total / len(logits)


def slow_focal(logits: Tensor, target: Tensor, gamma: float) -> float:
    total = 0.0
    for row, y in zip(logits.softmax(dim=-1).tolist(), target.tolist(), strict=True):
        total -= sum(y_c * (1 - p_c) ** gamma * math.log(p_c) for y_c, p_c in zip(y, row, strict=True))
    return total / len(logits)


def slow_supcon(h: Tensor, mask: Tensor, labels: Tensor, temperature: float, normalize: bool) -> Tensor:
    """Equation 10, anchor by anchor and positive by positive."""
    frames, classes = [], []
    for utterance, valid, label in zip(h, mask, labels.tolist(), strict=True):
        frames += [f / f.norm() if normalize else f for f in utterance[valid]]
        classes += [label] * int(valid.sum())
    losses = []
    for i, anchor in enumerate(frames):
        others = [j for j in range(len(frames)) if j != i]
        positives = [j for j in others if classes[j] == classes[i]]
        if not positives:
            continue
        scores = {j: anchor @ frames[j] / temperature for j in others}
        contrast = torch.stack(list(scores.values())).logsumexp(dim=0)
        losses.append(-sum(scores[p] - contrast for p in positives) / len(positives))
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=h.dtype)


def test_kl_equals_a_slow_loop_and_torch(generator: torch.Generator) -> None:
    logits, target = torch.randn(6, 4, generator=generator, dtype=DOUBLE), soft_labels(generator)
    assert kl(logits, target).item() == pytest.approx(slow_kl(logits, target), abs=1e-12)
    reference = functional.kl_div(logits.log_softmax(dim=-1), target, reduction="batchmean")
    torch.testing.assert_close(kl(logits, target), reference)


def test_kl_by_hand() -> None:
    even = torch.zeros(1, 4)
    assert kl(even, torch.eye(4)[:1]).item() == pytest.approx(math.log(4))
    assert kl(even, torch.full((1, 4), 0.25)).item() == pytest.approx(0, abs=1e-7)
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert kl(even, half).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_equals_a_slow_loop(generator: torch.Generator, gamma: float) -> None:
    logits, target = torch.randn(6, 4, generator=generator, dtype=DOUBLE), soft_labels(generator)
    assert focal(logits, target, gamma).item() == pytest.approx(slow_focal(logits, target, gamma), abs=1e-12)


def test_focal_without_gamma_is_cross_entropy(generator: torch.Generator) -> None:
    logits, target = torch.randn(6, 4, generator=generator, dtype=DOUBLE), soft_labels(generator)
    torch.testing.assert_close(focal(logits, target, 0.0), functional.cross_entropy(logits, target))


def test_focal_by_hand() -> None:
    assert focal(torch.zeros(1, 2), torch.eye(2)[:1], 2.0).item() == pytest.approx(0.25 * math.log(2))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certain_predictions_stay_finite(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0], [-300.0, 300.0, 0.0]], dtype=dtype, requires_grad=True)
    target = torch.eye(3)[[0, 0]]  # once certain and right, once certain and wrong
    divergence, focused = kl(logits, target), focal(logits, target, gamma)
    assert divergence.item() == pytest.approx(300, rel=1e-2)
    assert focused.item() == pytest.approx(300, rel=1e-2)
    (divergence + focused).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_center_distance_by_hand() -> None:
    centers = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    distance = center_distance(z, centers, torch.tensor([1, 0, 1]))
    assert distance.item() == pytest.approx((25 + 2 + 18) / 3)
    distance.backward()
    torch.testing.assert_close(centers.grad, torch.tensor([[-2.0, -2.0], [12.0, 14.0]]) / 3)


def test_context_broadcast_equals_a_loop_without_padding(generator: torch.Generator) -> None:
    h, mask = batch_of_frames(generator)
    spoiled = h.masked_fill(~mask.unsqueeze(-1), torch.nan)
    result = context_broadcast(spoiled, mask)
    for row, length in enumerate(LENGTHS):
        valid = h[row, :length]
        torch.testing.assert_close(result[row, :length], (valid + valid.mean(dim=0)) / 2)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0, 1, 2, 3], [2, 2, 2, 2], [5, 0, 5, 1]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.005, 1.0])
def test_supcon_equals_a_slow_loop(
    generator: torch.Generator, labels: list[int], normalize: bool, temperature: float
) -> None:
    h, mask = batch_of_frames(generator)
    h.requires_grad_()
    classes = torch.tensor(labels)
    loss = supcon(h, mask, classes, 6, temperature, normalize)
    expected = slow_supcon(h, mask, classes, temperature, normalize)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(loss, h)
    (expected_gradient,) = torch.autograd.grad(expected, h)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-8)
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("frames", [2, 255, 256, 257, 513, 700])
@pytest.mark.parametrize("squared_length", [10.0, 300.0])
@pytest.mark.parametrize("block", [None, 4096])
def test_log_sum_exp_of_others_equals_the_whole_matrix(
    generator: torch.Generator, frames: int, squared_length: float, block: int | None
) -> None:
    """Blocks of every kind: one alone, full ones, and a last one of a single row; bounded products or not."""
    h = torch.randn(frames, 5, generator=generator, dtype=DOUBLE)
    h = (functional.normalize(h, dim=-1) * squared_length**0.5).requires_grad_()
    pull = torch.randn(frames, generator=generator, dtype=DOUBLE)
    products = (h @ h.T).masked_fill(torch.eye(frames, dtype=torch.bool), -torch.inf)
    expected = products.logsumexp(dim=-1)
    result = log_sum_exp_of_others(h, block=block)
    assert torch.equal(result, log_sum_exp_of_others(h, squared_length, block))  # told or found
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(result @ pull, h)
    (expected_gradient,) = torch.autograd.grad(expected @ pull, h)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("squared_length", [1e-6, 10.0, 24.9, 25.1, 1e4])
def test_log_sum_exp_of_others_in_float32(generator: torch.Generator, squared_length: float) -> None:
    """Opposite frames too: the sums of those that have no near neighbour are the hardest."""
    h = functional.normalize(torch.randn(300, 3, generator=generator), dim=-1)
    h[1:] = h[1:].abs()
    h[0] = -torch.ones(3) / 3**0.5
    h = (h * squared_length**0.5).requires_grad_()
    exact = h.detach().double().requires_grad_()
    products = (exact @ exact.T).masked_fill(torch.eye(300, dtype=torch.bool), -torch.inf)
    expected = products.logsumexp(dim=-1)
    result = log_sum_exp_of_others(h)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    result.mean().backward()
    expected.mean().backward()
    assert h.grad is not None
    assert exact.grad is not None
    scale = max(squared_length, 1) ** 0.5 / 300
    torch.testing.assert_close(h.grad.double(), exact.grad, rtol=0, atol=2e-5 * scale * max(squared_length, 1))


def test_gradients(generator: torch.Generator) -> None:
    logits = torch.randn(4, 3, generator=generator, dtype=DOUBLE, requires_grad=True)
    target = soft_labels(generator, 4, 3)
    z = torch.randn(4, 2, generator=generator, dtype=DOUBLE, requires_grad=True)
    centers = torch.randn(3, 2, generator=generator, dtype=DOUBLE, requires_grad=True)
    h, mask = batch_of_frames(generator)
    h.requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    check = torch.autograd.gradcheck
    assert check(lambda logits: kl(logits, target), logits)
    for gamma in (0.0, 0.5, 2.0):
        assert check(lambda logits, gamma=gamma: focal(logits, target, gamma), logits)
    assert check(lambda z, centers: center_distance(z, centers, labels), (z, centers))
    assert check(lambda h: context_broadcast(h, mask)[mask], h)
    for normalize in (True, False):
        assert check(lambda h, normalize=normalize: supcon(h, mask, labels, 2, 0.1, normalize), h)
        assert check(lambda h, normalize=normalize: supcon(h, mask, labels, 2, 0.01, normalize), h)


@pytest.mark.parametrize(
    ("valid", "labels"),
    [
        ([[0, 0], [0, 0]], [0, 0]),  # nothing
        ([[1, 0], [0, 0]], [0, 0]),  # one frame
        ([[1, 0], [1, 0]], [0, 1]),  # two frames, no positives
        ([[1, 0], [1, 0]], [1, 1]),  # two frames, certain
    ],
)
def test_supcon_is_exactly_zero_without_a_contrast(
    generator: torch.Generator, valid: list[list[int]], labels: list[int]
) -> None:
    h = torch.randn(2, 2, 3, generator=generator, requires_grad=True)
    loss = supcon(h, torch.tensor(valid, dtype=torch.bool), torch.tensor(labels), 2, 0.1, True)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    if labels == [0, 1] or sum(map(sum, valid)) < 2:
        assert loss.item() == 0
    loss.backward()
    assert h.grad is not None
    assert h.grad.abs().max() <= 1e-6


def test_supcon_bounds() -> None:
    """Frames of equal direction: each anchor's loss is ln(N - 1), which the automatic weight makes 1."""
    h = torch.ones(2, 10, 4)
    mask = torch.ones(2, 10, dtype=torch.bool)
    assert supcon(h, mask, torch.tensor([0, 1]), 2, 0.1, True).item() == pytest.approx(math.log(19), rel=1e-5)


def test_objective_is_the_weighted_sum(generator: torch.Generator) -> None:
    target = soft_labels(generator, 4, 4)
    logits = torch.randn(4, 4, generator=generator, dtype=DOUBLE)
    z = torch.randn(4, 3, generator=generator, dtype=DOUBLE)
    h, mask = batch_of_frames(generator)
    objective = objective_of(4, 3)
    terms = objective(logits, z, h, mask, target)
    names = ["kl", "focal", "center", "supcon"]
    assert list(terms) == [*names, *(f"weight_{name}" for name in names), "loss"]
    assert all(term.shape == () for term in terms.values())
    context = torch.stack([(u + u[m].mean(dim=0)) / 2 for u, m in zip(h, mask, strict=True)])
    expected = {
        "kl": slow_kl(logits, target),
        "focal": slow_focal(logits, target, 2.0),
        "center": z.square().sum(dim=1).mean().item(),
        "supcon": slow_supcon(context, mask, target.argmax(dim=1), 0.1, normalize=True).item(),
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6)
    expected_weights = {
        "kl": 1 / math.log(4),
        "focal": 1 / math.log(4),
        "center": 0.002,
        "supcon": 1 / math.log(sum(LENGTHS) - 1),
    }
    for name, weight in expected_weights.items():
        assert terms[f"weight_{name}"].item() == pytest.approx(weight, rel=1e-6)
    total = sum(expected_weights[name] * value for name, value in expected.items())
    assert terms["loss"].item() == pytest.approx(total, rel=1e-6)


def test_objective_with_weights_and_losses_off(generator: torch.Generator) -> None:
    target = soft_labels(generator, 4, 4)
    logits = torch.randn(4, 4, generator=generator)
    z = torch.randn(4, 3, generator=generator)
    h, mask = batch_of_frames(generator)
    supcon_section = {"weight": 0.25, "normalize": False}
    objective = objective_of(4, 3, kl=None, focal={"weight": 0.5, "gamma": 1.0}, center=None, supcon=supcon_section)
    assert objective.centers is None
    assert list(objective.parameters()) == []
    terms = objective(logits, z, h, mask, target)
    assert list(terms) == ["focal", "supcon", "weight_focal", "weight_supcon", "loss"]
    assert terms["loss"].item() == pytest.approx(0.5 * terms["focal"].item() + 0.25 * terms["supcon"].item())
    alone = objective_of(4, 3, kl={"weight": 2.0}, focal=None, center=None, supcon=None)
    terms = alone(logits, z, h, mask, target)
    assert terms["loss"].item() == pytest.approx(2 * terms["kl"].item())


def test_objective_learns_centers() -> None:
    objective = objective_of(2, 2, center={"weight": 1.0}, supcon=None)
    z = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])
    target = torch.eye(2)[[0, 0, 1]]
    h, mask = torch.zeros(3, 1, 2), torch.ones(3, 1, dtype=torch.bool)
    centers = objective.centers
    assert centers is not None
    assert (centers == 0).all()
    for _ in range(200):
        loss = objective(torch.zeros(3, 2), z, h, mask, target)["loss"]
        (gradient,) = torch.autograd.grad(loss, centers)
        with torch.no_grad():
            centers -= 0.3 * gradient
    torch.testing.assert_close(centers.detach(), torch.tensor([[1.0, 0.1], [0.0, 1.0]]))


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_objective_of_very_few_frames_is_finite(frames: int) -> None:
    objective = objective_of(2, 2)
    h = torch.randn(1, frames, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.ones(1, frames, dtype=torch.bool)
    terms = objective(torch.zeros(1, 2), h[:, 0], h, mask, torch.eye(2)[:1])
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert h.grad is not None
    assert h.grad.isfinite().all()


def test_objective_is_computed_in_float32_under_bf16(generator: torch.Generator) -> None:
    target = soft_labels(generator, 4, 4).float()
    logits = torch.randn(4, 4, generator=generator).bfloat16()
    h, mask = batch_of_frames(generator)
    h = h.bfloat16()
    objective = objective_of(4, 3)
    expected = objective(logits.float(), h[:, 0].float(), h.float(), mask, target)
    halves = [logits.requires_grad_(), h.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = objective(logits, h[:, 0], h, mask, target)
        terms["loss"].backward()
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[name])
    assert all(half.grad is not None and half.grad.isfinite().all() for half in halves)


def test_objective_does_not_depend_on_padding(generator: torch.Generator) -> None:
    target = soft_labels(generator, 4, 4)
    logits = torch.randn(4, 4, generator=generator, dtype=DOUBLE)
    h, mask = batch_of_frames(generator)
    objective = objective_of(4, 3)
    expected = objective(logits, h[:, 0], h, mask, target)
    longer = functional.pad(h.masked_fill(~mask.unsqueeze(-1), torch.nan), (0, 0, 0, 7), value=torch.nan)
    longer.requires_grad_()
    terms = objective(logits, h[:, 0], longer, functional.pad(mask, (0, 7)), target)
    torch.testing.assert_close(terms, expected)
    terms["loss"].backward()
    assert longer.grad is not None
    assert longer.grad.isfinite().all()


def test_objective_refuses_one_class() -> None:
    with pytest.raises(ConfigError, match="1 class"):
        objective_of(1, 4)
