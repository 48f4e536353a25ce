"""Pooling against one utterance at a time without padding, and against torch's own attention."""

import pytest
import torch
from torch import Tensor, nn

from sermll.errors import ConfigError
from sermll.pooling import POOLS, FirstFrame, FrameLevelAttention, MaskedMax, MaskedMean

BATCH, FRAMES, DIM, HEADS = 5, 11, 12, 3
LENGTHS = [11, 1, 7, 4, 2]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def frames(generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, FRAMES, DIM, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(FRAMES) < torch.tensor(LENGTHS)[:, None]


def flam(
    generator: torch.Generator, dim: int = DIM, heads: int = HEADS, dtype: torch.dtype = torch.float64
) -> FrameLevelAttention:
    """A FLAM whose every parameter, biases too, is drawn and of some size."""
    module = FrameLevelAttention(dim, heads).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5, generator=generator)
    return module


def slow_flam(module: FrameLevelAttention, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F' = F + MSA(F) and equation 5 for one utterance [frames, dim] without padding, head by head."""
    weight, bias = module.in_projection.weight, module.in_projection.bias
    queries, keys, values = (frames @ weight.T + bias).chunk(3, dim=-1)
    width = frames.shape[-1] // module.heads
    heads = []
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        scores = queries[:, part] @ keys[:, part].T / width**0.5
        heads.append(torch.softmax(scores, dim=-1) @ values[:, part])
    refined = frames + torch.cat(heads, dim=-1) @ module.out_projection.weight.T + module.out_projection.bias
    alpha = torch.softmax(refined @ module.score.weight[0], dim=0)
    pooled = torch.stack([a * f for a, f in zip(alpha, refined, strict=True)]).sum(dim=0)
    return pooled, refined, alpha


def test_flam_equals_a_slow_loop_without_padding(generator: torch.Generator, frames: Tensor, mask: Tensor) -> None:
    module = flam(generator)
    pooled, refined = module(frames, mask)
    alpha = module.attention(frames, mask)
    assert pooled.shape == (BATCH, DIM)
    assert refined.shape == (BATCH, FRAMES, DIM)
    for row, length in enumerate(LENGTHS):
        expected = slow_flam(module, frames[row, :length])
        torch.testing.assert_close(pooled[row], expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(refined[row, :length], expected[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alpha[row, :length], expected[2], rtol=1e-10, atol=1e-10)
        assert (refined[row, length:] == 0).all()
        assert (alpha[row, length:] == 0).all()
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(BATCH, dtype=torch.float64))


def test_flam_equals_torch_multihead_attention(generator: torch.Generator, frames: Tensor, mask: Tensor) -> None:
    module = flam(generator)
    reference = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64)
    reference.load_state_dict(
        {
            "in_proj_weight": module.in_projection.weight,
            "in_proj_bias": module.in_projection.bias,
            "out_proj.weight": module.out_projection.weight,
            "out_proj.bias": module.out_projection.bias,
        }
    )
    attended, _ = reference(frames, frames, frames, key_padding_mask=~mask)
    _, refined = module(frames, mask)
    torch.testing.assert_close(refined[mask], (frames + attended)[mask], rtol=1e-10, atol=1e-10)


def test_flam_starts_as_torch_multihead_attention() -> None:
    torch.manual_seed(0)
    module, reference = FrameLevelAttention(64, 4), nn.MultiheadAttention(64, 4)
    for ours, theirs in (
        (module.in_projection.weight, reference.in_proj_weight),
        (module.out_projection.weight, reference.out_proj.weight),
    ):
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)  # both are uniform
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    torch.testing.assert_close(module.in_projection.bias, reference.in_proj_bias)
    torch.testing.assert_close(module.out_projection.bias, reference.out_proj.bias)


def test_flam_weights_without_attention_by_hand(frames: Tensor, mask: Tensor) -> None:
    module = FrameLevelAttention(DIM, HEADS).double()
    nn.init.zeros_(module.out_projection.weight)
    nn.init.zeros_(module.score.weight)
    pooled, refined = module(frames, mask)  # no attention, equal scores: the mean of the frames as they are
    torch.testing.assert_close(refined[mask], frames[mask])
    torch.testing.assert_close(pooled, MaskedMean()(frames, mask)[0])


def test_flam_has_no_parameters_but_the_papers() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in FrameLevelAttention(8, 2).named_parameters()}
    assert shapes == {
        "in_projection.weight": (24, 8),
        "in_projection.bias": (24,),
        "out_projection.weight": (8, 8),
        "out_projection.bias": (8,),
        "score.weight": (1, 8),
    }


def test_flam_names_heads_and_width_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"16 heads.*100"):
        FrameLevelAttention(100, 16)


@pytest.mark.parametrize("name", POOLS)
def test_batched_equals_alone(name: str, generator: torch.Generator) -> None:
    lengths = [1, 40, *range(2, 16)]
    frames = torch.randn(16, 40, 32, generator=generator)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    module = flam(generator, 32, 4, torch.float32) if name == "flam" else POOLS[name]()
    pooled, refined = module(frames, mask)
    for row, length in enumerate(lengths):
        alone, alone_refined = module(frames[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(pooled[row], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(refined[row, :length], alone_refined[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POOLS)
def test_padding_has_no_influence_and_no_gradient(
    name: str, generator: torch.Generator, frames: Tensor, mask: Tensor
) -> None:
    module = flam(generator) if name == "flam" else POOLS[name]()
    expected, _ = module(frames, mask)
    spoiled = frames.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    pooled, _ = module(spoiled, mask)
    torch.testing.assert_close(pooled, expected)
    pooled.square().sum().backward()
    assert spoiled.grad is not None
    assert (spoiled.grad[~mask] == 0).all()
    assert spoiled.grad[mask].isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_simple_pools_equal_a_loop(frames: Tensor, mask: Tensor) -> None:
    for pool, reference in (
        (MaskedMean, lambda valid: valid.mean(dim=0)),
        (MaskedMax, lambda valid: valid.max(dim=0).values),
        (FirstFrame, lambda valid: valid[0]),
    ):
        pooled, unchanged = pool()(frames, mask)
        expected = torch.stack([reference(frames[row, :length]) for row, length in enumerate(LENGTHS)])
        torch.testing.assert_close(pooled, expected)
        assert unchanged is frames


def test_flam_gradient(generator: torch.Generator) -> None:
    module = flam(generator, 4, 2)
    frames = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert torch.autograd.gradcheck(lambda frames: module(frames, mask), frames)


def test_flam_under_bf16_autocast(generator: torch.Generator) -> None:
    module = flam(generator, dtype=torch.float32)
    frames = torch.randn(BATCH, FRAMES, DIM, generator=generator) / 3
    mask = torch.arange(FRAMES) < torch.tensor(LENGTHS)[:, None]
    expected, _ = module(frames, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, _ = module(frames, mask)
    torch.testing.assert_close(pooled.float(), expected, rtol=0.1, atol=0.1)


def test_silent_frames_give_equal_weights() -> None:
    module = FrameLevelAttention(DIM, HEADS)
    mask = torch.arange(FRAMES) < torch.tensor(LENGTHS)[:, None]
    alpha = module.attention(torch.zeros(BATCH, FRAMES, DIM), mask)
    torch.testing.assert_close(alpha, mask / mask.sum(dim=1, keepdim=True))
