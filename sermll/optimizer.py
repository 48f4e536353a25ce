"""Adam with the paper's two groups and rates, and its step, which changes nothing where a gradient is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sermll import config
    from sermll.model import System


def make_optimizer(system: System, optim: config.Optim) -> torch.optim.Optimizer:
    """Adam with the paper's two groups: the model, and the class centers at their own rate."""
    model = [parameter for parameter in system.recognizer.parameters() if parameter.requires_grad]
    centers = list(system.objective.parameters())
    groups: list[dict[str, Any]] = [{"params": model, "lr": optim.lr, "weight_decay": optim.weight_decay}]
    if centers:
        groups.append({"params": centers, "lr": optim.center_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, optim: config.Optim, epoch: int) -> dict[str, float]:
    """Set the learning rates of an epoch: each epoch multiplies them by `decay`, until `decay_epochs`."""
    factor = optim.decay ** min(epoch, optim.decay_epochs)
    rates = {"lr": optim.lr * factor, "center_lr": optim.center_lr * factor}
    for group, rate in zip(optimizer.param_groups, rates.values(), strict=False):  # no center group: one rate less
        group["lr"] = rate
    return dict(list(rates.items())[: len(optimizer.param_groups)])


class Step:
    """A step of the optimizer along the clipped gradient; where that is not finite, weights and moments stay.

    The device finds out by itself. To ask it at once would have it wait for Python between any two steps; asked when
    the next batch's work has been handed to it, it has long known.

    Attributes:
        norm: of the gradient before clipping, on the device.

    Args:
        optimizer: of `make_optimizer`; its parameters have gradients, which are gone afterwards.
        clip_norm: largest norm of the gradient.
    """

    def __init__(self, optimizer: Any, clip_norm: float) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.norm: Tensor = nn.utils.get_total_norm(gradients)
        # What a gradient scaler tells a fused optimizer, which divides by the one on its way through the gradients, and
        # leaves everything as it is where the other is 1.
        optimizer.grad_scale = ((self.norm + 1e-6) / clip_norm).clamp(min=1.0)
        optimizer.found_inf = (~torch.isfinite(self.norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._skipped = optimizer.found_inf.to("cpu", non_blocking=True)
        self._told = torch.cuda.Event() if self.norm.is_cuda else None
        if self._told is not None:
            self._told.record()

    def taken(self) -> bool:
        """Whether the gradient was finite; waits for this step, and not for what the device was given after it."""
        if self._told is not None:
            self._told.synchronize()
        return not self._skipped
