"""Bring the shares of a global batch together on every worker, so that losses see the batch that the config names."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


class Gathered:
    """The global batch whose shares have these sizes; with one worker every method returns its argument."""

    def __init__(self, share: Tensor) -> None:
        """`share`: (batch, frames, ...) of this worker. Every worker must construct at the same time."""
        self.workers = dist.get_world_size() if dist.is_initialized() else 1
        self.sizes, self.longest = [len(share)], share.shape[1]
        if self.workers > 1:
            # All sizes at once: to read them, a GPU is waited for.
            shapes = torch.empty((self.workers, 2), dtype=torch.int64, device=share.device)
            dist.all_gather(list(shapes), torch.tensor(share.shape[:2], device=share.device))
            self.sizes, frames = shapes.T.tolist()
            self.longest = max(frames)

    def rows(self, share: Tensor) -> Tensor:
        """(batch, ...) of the share to (global batch, ...), ordered by worker."""
        if self.workers == 1:
            return share
        return _GatherRows.apply(share, self.sizes)

    def frames(self, share: Tensor) -> Tensor:
        """As `rows` for (batch, frames, ...): shares are first padded to the longest with zeros."""
        if self.workers == 1:
            return share
        padding = [0, 0] * (share.dim() - 2) + [0, self.longest - share.shape[1]]
        return self.rows(functional.pad(share, padding))

    def weigh(self, mean: Tensor) -> Tensor:
        """A mean over this share, scaled so that the workers' average is the mean over the global batch."""
        return mean * (self.sizes[dist.get_rank()] * self.workers / sum(self.sizes)) if self.workers > 1 else mean


class _GatherRows(torch.autograd.Function):
    """All workers' rows. Each worker then computes the same loss, so its gradient by its own rows is the whole one.

    Data-parallel training averages gradients over workers, each of which carries only its own rows: the factor of
    the number of workers makes that average the sum it should be.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, sizes: list[int]) -> Tensor:  # autograd's context
        ctx.sizes = sizes
        most = max(sizes)
        padded = functional.pad(share.to(torch.uint8) if share.dtype == torch.bool else share, _last_row(share, most))
        shares = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shares, padded.contiguous())
        whole = torch.cat([part[:size] for part, size in zip(shares, sizes, strict=True)])
        return whole.bool() if share.dtype == torch.bool else whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rank = dist.get_rank()
        start = sum(ctx.sizes[:rank])
        return gradients[0][start : start + ctx.sizes[rank]] * len(ctx.sizes), None


def _last_row(share: Tensor, num_rows: int) -> list[int]:
    """Padding that brings the first axis to `num_rows`."""
    return [0, 0] * (share.dim() - 1) + [0, num_rows - share.shape[0]]
