"""The objective: KL, focal, center and supervised contrastive loss, weighted and summed (equations 6 to 11).

Each loss is a function of tensors that returns a mean scalar, computed in float32 (float64 stays) whatever
the precision of the model. B utterances, T frames, C classes, E embedding dimensions; masks are true on valid
frames.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sermll.errors import ConfigError

if TYPE_CHECKING:
    from sermll.config import Losses

BOUND = 25.0
"""No product of frames is larger than their largest squared length.

Up to this one every exponential, and every sum of them, is far from the ends of float32 without subtracting a maximum
first: a block is then raised to exponentials once for its rows and its columns. Unit frames are there from temperature
0.04 upwards.
"""


def kl(logits: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence sum_c y_c log(y_c / p_c), mean over utterances (equation 6).

    Args:
        logits: [B, C]; p is their softmax.
        target: [B, C] label distributions y; 0 log 0 counts as 0.
    """
    logits, target = _full(logits), _full(target)
    return (torch.xlogy(target, target) - target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Focal loss - sum_c y_c (1 - p_c)^gamma log p_c on soft labels, mean over utterances (equation 7).

    Args:
        logits: [B, C]; p is their softmax.
        target: [B, C] label distributions y.
        gamma: focusing exponent, 0 or more; 0 is cross entropy.
    """
    log_p = _full(logits).log_softmax(dim=-1)
    # 1 - p without cancellation near p = 1, and never 0, where the power's slope is infinite if gamma < 1.
    missing = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -(_full(target) * missing**gamma * log_p).sum(dim=-1).mean()


def center_distance(z: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Squared distance || z_b - c_{y_b} ||^2 to the center of one's class, mean over utterances (equation 8).

    Args:
        z: [B, E] embeddings.
        centers: [C, E] class centers.
        labels: [B] classes, 0 to C - 1.
    """
    return (_full(z) - _full(centers)[labels]).square().sum(dim=-1).mean()


def context_broadcast(h: Tensor, mask: Tensor) -> Tensor:
    """Half of each frame, half of its utterance's mean over valid frames (equation 9).

    Args:
        h: [B, T, E] frame projections.
        mask: [B, T]; each utterance needs a valid frame.

    Returns:
        [B, T, E]; what stands on padding has no meaning.
    """
    h, valid = _full(h), mask.unsqueeze(-1)
    mean = h.masked_fill(~valid, 0).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
    return (h + mean) / 2


def supcon(h: Tensor, mask: Tensor, labels: Tensor, num_classes: int, temperature: float, normalize: bool) -> Tensor:
    """Supervised contrastive loss over all valid frames (equation 10; L_out of Khosla et al., 2020).

    Every valid frame is an anchor; its positives are all other frames of its class, in any utterance, and its
    contrast is all other frames. The loss is exact. Its memory grows with the number N of valid frames and
    not with N^2: positives of a class enter through their sum, and the contrast is computed block by block
    (see `log_sum_exp_of_others`). An anchor without positives does not count in the mean; if none has any,
    the loss is 0.

    Args:
        h: [B, T, E] frame projections, after `context_broadcast`.
        mask: [B, T].
        labels: [B] classes, 0 to C - 1.
        num_classes: C.
        temperature: divisor of the dot products, positive.
        normalize: scale each frame to unit length first.
    """
    valid = mask.flatten().nonzero().squeeze(-1)  # the one place where the host waits for the device, for N
    frames = _full(h.flatten(0, 1)[valid])
    if len(frames) < 2:
        return frames.sum() * 0
    if normalize:
        frames = functional.normalize(frames, dim=-1)
    with torch.autocast(frames.device.type, enabled=False):
        frames = frames / math.sqrt(temperature)  # dot products are then divided by the temperature
        classes = torch.arange(num_classes, device=labels.device)
        member = (labels[valid // mask.shape[1], None] == classes).to(frames.dtype)  # [N, C]
        positives = member @ member.sum(dim=0) - 1
        attraction = (frames * (member @ (member.T @ frames) - frames)).sum(dim=-1) / positives.clamp(min=1)
        losses = log_sum_exp_of_others(frames, 1 / temperature if normalize else None) - attraction
        counted = (positives > 0).to(frames.dtype)
        return losses @ counted / counted.sum().clamp(min=1)


def log_sum_exp_of_others(frames: Tensor, largest: float | None = None, block: int | None = None) -> Tensor:
    """For each i, log sum_{j != i} exp(frames_i . frames_j), [N]; memory linear in N, differentiable once.

    Args:
        frames: [N, E], N at least 2.
        largest: the largest squared length of a frame where it is known; else the device is asked.
        block: frames whose products are taken at once; by default as many as suit the device.
    """
    if largest is None:
        largest = float(frames.detach().square().sum(dim=-1).max())
    # A block should stay in the cache of a CPU core. On a GPU a batch should be one block, unless it is large: a block
    # costs a dozen kernels, which take longer to launch than to run.
    size = block or (256 if frames.device.type == "cpu" else 8192)
    return _LogSumExpOfOthers.apply(frames, largest <= BOUND, size)


class _LogSumExpOfOthers(torch.autograd.Function):
    """The matrix of products is symmetric: blocks on and above its diagonal, made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, bounded: bool, block: int) -> Tensor:  # torch's context
        ctx.bounded, ctx.block = bounded, block
        if ctx.bounded:
            sums = frames.new_zeros(len(frames))
            for rows, columns in _upper_blocks(len(frames), block):
                exponentials = _products(frames, rows, columns).exp_()
                sums[rows] += exponentials.sum(dim=1)
                if rows != columns:
                    sums[columns] += exponentials.sum(dim=0)
            result = sums.log()
        else:
            result = frames.new_full((len(frames),), -torch.inf)
            for rows, columns in _upper_blocks(len(frames), block):
                products = _products(frames, rows, columns)
                result[rows] = torch.logaddexp(result[rows], _log_sum_exp(products, dim=1))
                if rows != columns:
                    result[columns] = torch.logaddexp(result[columns], _log_sum_exp(products, dim=0))
        ctx.save_for_backward(frames, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        # Frame i moves as an anchor, with g_i, and as one of the others of every j, with g_j:
        # dL/df_i = sum_j (g_i exp(f_i . f_j - result_i) + g_j exp(f_i . f_j - result_j)) f_j
        frames, result = ctx.saved_tensors
        pull = gradient * (-result).exp()  # used where it cannot overflow
        moved = torch.zeros_like(frames)
        with torch.autocast(frames.device.type, enabled=False):
            for rows, columns in _upper_blocks(len(frames), ctx.block):
                weights = _products(frames, rows, columns)
                if ctx.bounded:
                    weights.exp_().mul_(pull[rows, None] + pull[columns])
                else:
                    as_anchor = _exp(weights - result[rows, None]).mul_(gradient[rows, None])
                    _exp(weights.sub_(result[columns])).mul_(gradient[columns]).add_(as_anchor)
                moved[rows].addmm_(weights, frames[columns])
                if rows != columns:
                    moved[columns].addmm_(weights.T, frames[rows])
        return moved, None, None


def _products(frames: Tensor, rows: slice, columns: slice) -> Tensor:
    """One block of the products frames_i . frames_j, the lowest number there is where i = j."""
    block = frames[rows] @ frames[columns].T
    return block.fill_diagonal_(torch.finfo(block.dtype).min) if rows == columns else block


def _log_sum_exp(products: Tensor, dim: int) -> Tensor:
    top = products.amax(dim, keepdim=True)
    return _exp(products - top).sum(dim).log_().add_(top.squeeze(dim))


def _exp(values: Tensor) -> Tensor:
    """In place, of values up to 0, and e^-60 at least: less is lost next to 1, and denormals are slow."""
    return values.clamp_(min=-60).exp_()


def _upper_blocks(count: int, size: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the blocks on and above the diagonal."""
    parts = [slice(start, start + size) for start in range(0, count, size)]
    return [(rows, columns) for number, rows in enumerate(parts) for columns in parts[number:]]


class Objective(nn.Module):
    """The weighted sum of the losses that are on (equation 11), and the class centers if the center loss is.

    The paper scales each term to about [0, 1]. "auto" does so from what a term is worth without any
    knowledge: 1 / ln(C) for KL and focal, 1 / ln(N - 1) for SupCon with N valid frames.

    The centers start at zero: they meet their classes' embeddings, which a fresh linear layer puts near zero,
    without drawing a random number, and a random start would first pull the embeddings to places that mean
    nothing.

    Args:
        losses: which losses are on, their weights and settings.
        num_classes: C, 2 or more.
        embedding_dim: E.

    Raises:
        ConfigError: fewer than 2 classes.
    """

    centers: nn.Parameter | None

    def __init__(self, losses: Losses, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"losses: {num_classes} class is nothing to learn; the data need at least 2")
        self.losses = losses
        self.centers = nn.Parameter(torch.zeros(num_classes, embedding_dim)) if losses.center else None

    def forward(self, logits: Tensor, z: Tensor, h: Tensor, mask: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Each loss that is on, unweighted; its weight as "weight_<name>"; and "loss", the weighted sum.

        Args:
            logits: [B, C].
            z: [B, E] embeddings.
            h: [B, T, E] frame projections.
            mask: [B, T], true on valid frames.
            target: [B, C] label distributions; center and SupCon use the likeliest class.
        """
        losses = self.losses
        labels = target.argmax(dim=-1)
        auto = auto_weight(logits.shape[-1])
        terms: dict[str, Tensor] = {}
        weights: dict[str, float | Tensor] = {}
        if losses.kl:
            terms["kl"] = kl(logits, target)
            weights["kl"] = _weight(losses.kl.weight, auto)
        if losses.focal:
            terms["focal"] = focal(logits, target, losses.focal.gamma)
            weights["focal"] = _weight(losses.focal.weight, auto)
        if losses.center and self.centers is not None:
            terms["center"] = center_distance(z, self.centers, labels)
            weights["center"] = losses.center.weight
        if losses.supcon:
            section = losses.supcon
            frames, num_classes = context_broadcast(h, mask), logits.shape[-1]
            terms["supcon"] = supcon(frames, mask, labels, num_classes, section.temperature, section.normalize)
            # Two frames or fewer make a loss of 0, for which any finite weight will do.
            weights["supcon"] = _weight(section.weight, 1 / (mask.sum() - 1).clamp(min=2).log())
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        used = {
            f"weight_{name}": weight.to(total.dtype) if isinstance(weight, Tensor) else total.new_full((), weight)
            for name, weight in weights.items()
        }
        return {**terms, **used, "loss": total}


def auto_weight(num_classes: int) -> float:
    """The weight of KL and focal loss at "auto": one over the KL of a one-hot label to the uniform distribution."""
    return 1 / math.log(num_classes)


def _weight(setting: float | Literal["auto"], auto: float | Tensor) -> float | Tensor:
    return auto if setting == "auto" else setting


def _full(values: Tensor) -> Tensor:
    """At least float32: bf16 keeps 8 bits, too few for logarithms and long sums."""
    return values if values.dtype == torch.float64 else values.float()
