"""Adam with the paper's two groups and rates, and its step, which changes nothing where a gradient is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sermll import config
    from sermll.model import System


class Adam:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019), by torch's fused kernel.

    As torch.optim.AdamW(fused=True), to the bit, whose state it reads. That class loads torch's compiler, only to tell
    it to keep away, which is a second of every training process's start.

    Attributes:
        param_groups: each with its `params`, `lr` and `weight_decay`.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """`groups`: of parameters on one device, float32."""
        self.param_groups = groups
        self._state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, divisor: Tensor, skipped: Tensor) -> None:
        """Move all parameters that have a gradient.

        Args:
            divisor: of the gradients, float32 ().
            skipped: 1 to leave everything as it is, else 0; float32 ().
        """
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self._state.get(parameter) or self._begin(parameter) for parameter in parameters]
            steps = [state["step"] for state in states]
            # With alpha it is added as a tensor; without, as a number, for which the device would be waited for.
            torch._foreach_add_(steps, 1 - skipped, alpha=1)  # pyright: ignore[reportPrivateImportUsage]
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=self.BETAS[0],
                beta2=self.BETAS[1],
                weight_decay=group["weight_decay"],
                eps=self.EPS,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
                found_inf=skipped,
            )

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        # Moments lie in memory as the parameter does: the kernel takes that for granted.
        self._state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
        return self._state[parameter]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """State and groups, parameters by their number."""
        number = {parameter: index for index, parameter in enumerate(self._parameters())}
        groups = [
            group | {"params": [number[parameter] for parameter in group["params"]]} for group in self.param_groups
        ]
        return {
            "state": {number[parameter]: dict(state) for parameter, state in self._state.items()},
            "param_groups": groups,
        }

    def load_state_dict(self, told: dict[str, Any]) -> None:
        """Take up the state that `state_dict` gave, from whatever device; rates are those of this optimizer's groups.

        Raises:
            ValueError: it is of other parameters.
        """
        parameters = self._parameters()
        sizes = [len(group["params"]) for group in told["param_groups"]]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(f"the state of an optimizer with groups of {sizes} parameters")
        for number, state in told["state"].items():
            parameter = parameters[number]
            if state["exp_avg"].shape != parameter.shape:
                raise ValueError(f"the state of a parameter of shape {tuple(state['exp_avg'].shape)}")
            for name, held in self._begin(parameter).items():
                held.copy_(state[name])


def make_optimizer(system: System, optim: config.Optim) -> Adam:
    """Adam with the paper's two groups: the model, and the class centers at their own rate."""
    model = [parameter for parameter in system.recognizer.parameters() if parameter.requires_grad]
    centers = list(system.objective.parameters())
    groups: list[dict[str, Any]] = [{"params": model, "lr": optim.lr, "weight_decay": optim.weight_decay}]
    if centers:
        groups.append({"params": centers, "lr": optim.center_lr, "weight_decay": 0.0})
    return Adam(groups)


def set_rates(groups: list[dict[str, Any]], optim: config.Optim, epoch: int) -> dict[str, float]:
    """Set the learning rates of an epoch: each epoch multiplies them by `decay`, until `decay_epochs`."""
    factor = optim.decay ** min(epoch, optim.decay_epochs)
    rates = {"lr": optim.lr * factor, "center_lr": optim.center_lr * factor}
    for group, rate in zip(groups, rates.values(), strict=False):  # no center group: one rate less
        group["lr"] = rate
    return dict(list(rates.items())[: len(groups)])


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

    def __init__(self, optimizer: Adam, clip_norm: float) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.norm: Tensor = nn.utils.get_total_norm(gradients)
        skipped = (~torch.isfinite(self.norm)).float()
        optimizer.step(divisor=((self.norm + 1e-6) / clip_norm).clamp(min=1.0), skipped=skipped)
        optimizer.zero_grad()
        self._skipped = skipped.to("cpu", non_blocking=True)
        self._told = torch.cuda.Event() if self.norm.is_cuda else None
        if self._told is not None:
            self._told.record()

    def taken(self) -> bool:
        """Whether the gradient was finite; waits for this step, and not for what the device was given after it."""
        if self._told is not None:
            self._told.synchronize()
        return not self._skipped
