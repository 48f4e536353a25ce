"""From frames to one vector: the frame-level attention module (FLAM) and the pools it is compared with.

Every pool maps frames [batch, frames, dim] and a mask [batch, frames]
(true: valid) to the pooled vectors [batch, dim] and the frames that later parts see [batch, frames, dim].
Padding never reaches the result. Each utterance needs a valid frame.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sermll.errors import ConfigError
from sermll.layers import attention_kernels


class FrameLevelAttention(nn.Module):
    """F' = F + MSA(F), then f = sum_t alpha_t f'_t with alpha = softmax over t of f'_t . w (equation 5).

    No layer norm, feed-forward part or dropout: the paper names none. The attention starts as
    `torch.nn.MultiheadAttention` does.

    Args:
        dim: width of a frame.
        heads: attention heads.

    Raises:
        ConfigError: `dim` is not a multiple of `heads`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"model.pool.heads: {heads} heads do not divide the encoder's width {dim} evenly")
        self.heads = heads
        self.in_projection = nn.Linear(dim, 3 * dim)
        self.out_projection = nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1, bias=False)
        nn.init.xavier_uniform_(self.in_projection.weight)
        nn.init.zeros_(self.in_projection.bias)
        nn.init.zeros_(self.out_projection.bias)

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vectors [batch, dim] and the refined frames F' [batch, frames, dim], zero where padded."""
        refined = self._refine(frames, mask)
        weights = self._weigh(refined, mask)
        return (weights.unsqueeze(1) @ refined).squeeze(1), refined

    def attention(self, frames: Tensor, mask: Tensor) -> Tensor:
        """The weights alpha [batch, frames] of equation 5: 0 on padding, 1 in sum."""
        return self._weigh(self._refine(frames, mask), mask)

    def _refine(self, frames: Tensor, mask: Tensor) -> Tensor:
        # What stands on padding may be anything, NaN too, and 0 * NaN in the weighted sums would be NaN.
        frames = frames.masked_fill(~mask.unsqueeze(-1), 0)
        projected = self.in_projection(frames).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)  # each [batch, heads, frames, dim / heads]
        with attention_kernels():
            attended = functional.scaled_dot_product_attention(queries, keys, values, mask[:, None, None, :])
        attended = self.out_projection(attended.transpose(1, 2).flatten(2))
        return (frames + attended).masked_fill(~mask.unsqueeze(-1), 0)

    def _weigh(self, refined: Tensor, mask: Tensor) -> Tensor:
        return self.score(refined).squeeze(-1).masked_fill(~mask, -torch.inf).softmax(dim=-1)


class MaskedMean(nn.Module):
    """Mean over valid frames."""

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vectors [batch, dim] and the frames unchanged."""
        valid = mask.unsqueeze(-1)
        return frames.masked_fill(~valid, 0).sum(dim=1) / valid.sum(dim=1), frames


class MaskedMax(nn.Module):
    """Largest value over valid frames, in each dimension."""

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vectors [batch, dim] and the frames unchanged."""
        return frames.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1), frames


class FirstFrame(nn.Module):
    """The first frame alone."""

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vectors [batch, dim] and the frames unchanged."""
        return frames[:, 0], frames


POOLS: dict[str, type[nn.Module]] = {  # FLAM alone has parameters, its width and heads
    "flam": FrameLevelAttention,
    "mean": MaskedMean,
    "max": MaskedMax,
    "first": FirstFrame,
}
