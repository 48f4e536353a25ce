"""Layers of pre-trained encoders in fewer and larger steps than their library takes, to the same result.

On a GPU each step is a kernel that Python has to launch, often for longer than it runs. transformers' WavLM-Large
takes over four thousand for one batch of training, a good part of them to convert between precisions; here little more
than half as many are taken.

Outside autocast everything is computed in the precision of what is given. Under bf16 autocast it is computed in bf16,
with weights converted some layers at a time; sums within matrix products and norms are float32's, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the name every torch text uses
from torch.nn.attention import SDPBackend, sdpa_kernel


def precision(values: Tensor) -> torch.dtype:
    """What products are computed in: autocast's type where it is on, else that of the values."""
    device = values.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype


def plain(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: tensors have their types already."""
    return torch.autocast(device.type, enabled=False)


def attention_kernels() -> AbstractContextManager[Any]:
    """All of torch's kernels for attention but cuDNN's, which a GPU may be given otherwise.

    That one is compiled for every length it meets, for seconds each, and gives no gradient to a bias that is added.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def converted(modules: Iterable[nn.Module], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Each module's parameters by name, in another precision; all in one step, and their gradients in another."""
    named = [dict(module.named_parameters()) for module in modules]
    given = [parameter for names in named for parameter in names.values()]
    if all(parameter.dtype == dtype for parameter in given):
        return cast(list[dict[str, Tensor]], named)
    copies = iter(_Converted.apply(dtype, *given))
    return [dict(zip(names, copies, strict=False)) for names in named]


class _Converted(torch.autograd.Function):
    """Tensors in another precision."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:  # torch's context
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return _copies(tensors, [dtype] * len(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        found: list[Tensor | None] = [None] * len(gradients)
        given = [cast(Tensor, gradients[index]) for index in there]
        for index, copy in zip(there, _copies(given, [ctx.dtypes[index] for index in there]), strict=True):
            found[index] = copy
        return None, *found


def _copies(tensors: Iterable[Tensor], dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
    tensors = list(tensors)
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, tensors)  # pyright: ignore[reportPrivateImportUsage]
    return tuple(copies)


# --- convolutions


def windows(frames: Tensor, kernel: int, stride: int) -> Tensor:
    """What a convolution sees at each place.

    Args:
        frames: [batch, frames, channels].
        kernel: frames in a window.
        stride: frames from one window to the next.

    Returns:
        [batch, windows, kernel * channels]: the window's first frame first.
    """
    return frames.unfold(1, kernel, stride).transpose(2, 3).flatten(2)


def convolve(layer: nn.Module, frames: Tensor, kernel: int, stride: int) -> Tensor:
    """A convolution without padding, the norm of its channels and its activation, as one product of windows.

    Frames stay together in memory, where torch's convolution wants channels, and turns everything round for the norm.

    Args:
        layer: transformers' `WavLMLayerNormConvLayer` or its like: conv, layer_norm, activation.
        frames: [batch, frames, channels].
        kernel: of the convolution.
        stride: of the convolution.

    Returns:
        [batch, windows, channels of the convolution].
    """
    (weights,) = converted([layer], frames.dtype)
    weight = weights["conv.weight"].transpose(1, 2).flatten(1)
    seen = windows(frames, kernel, stride)
    aligned = -weight.shape[1] % 8  # products of rows that do not begin at multiples of 16 bytes are slow
    if aligned:
        seen, weight = F.pad(seen, (0, aligned)), F.pad(weight, (0, aligned))
    features = F.linear(seen, weight, weights.get("conv.bias"))
    norm = cast(nn.LayerNorm, layer.layer_norm)
    features = F.layer_norm(
        features, norm.normalized_shape, weights["layer_norm.weight"], weights["layer_norm.bias"], norm.eps
    )
    return cast(Any, layer).activation(features)


def positional_convolution(convolution: nn.Conv1d, frames: Tensor) -> Tensor:
    """A convolution in groups over many frames, as long as its input, by Fourier transforms in float32.

    With WavLM's 128 taps, 16 groups and 6 s of frames it takes a fraction of the direct sum's time.

    Args:
        convolution: stride 1, padded with half its kernel.
        frames: [batch, frames, channels].

    Returns:
        float32[batch, frames, channels]; of an even kernel's output, which has one frame more, all but the last.
    """
    batch, count, channels = frames.shape
    taps, groups = convolution.kernel_size[0], convolution.groups
    before = taps // 2
    with plain(frames.device):
        length = 1 << (count + taps - 2).bit_length()  # a power of 2 is fast, and no frame comes round to another
        heard = F.pad(frames.float(), (0, 0, before, 0))
        spectrum = torch.fft.rfft(heard, length, dim=1).view(batch, -1, groups, channels // groups)
        weight = cast(Tensor, convolution.weight).float().view(groups, channels // groups, -1, taps)
        response = torch.fft.rfft(weight, length, dim=3).conj()
        product = torch.einsum("bfgi,goif->bfgo", spectrum, response).flatten(2)
        output = torch.fft.irfft(product, length, dim=1)[:, :count]
        return output if convolution.bias is None else output + convolution.bias


# --- WavLM's transformer


@dataclass(frozen=True)
class WavLMShape:
    """What the layers of a WavLM have in common."""

    heads: int
    norms_within: bool
    """The norms stand before attention and feed-forward part (WavLM-Large), not after (WavLM-Base)."""
    eps: float
    activation: Callable[[Tensor], Tensor]
    dropout: float
    """After attention and after the feed-forward part."""
    attention_dropout: float
    inner_dropout: float
    """Within the feed-forward part."""

    @classmethod
    def of(cls, layer: Any) -> WavLMShape:
        """That of transformers' `WavLMEncoderLayer` or `WavLMEncoderLayerStableLayerNorm`."""
        part = layer.feed_forward
        assert layer.dropout.p == part.output_dropout.p
        return cls(
            heads=layer.attention.num_heads,
            norms_within="StableLayerNorm" in type(layer).__name__,
            eps=layer.layer_norm.eps,
            activation=part.intermediate_act_fn,
            dropout=layer.dropout.p,
            attention_dropout=layer.attention.dropout,
            inner_dropout=part.intermediate_dropout.p,
        )


def wavlm_layer(
    shape: WavLMShape, training: bool, weights: dict[str, Tensor], hidden: Tensor, padding: Tensor, bias: Tensor
) -> Tensor:
    """A layer of WavLM's transformer.

    Args:
        shape: of the layer.
        training: whether values are dropped.
        weights: the layer's parameters, by transformers' names, all of one precision, as what follows.
        hidden: [batch, frames, dim].
        padding: [batch, 1, 1, frames], 0 at valid frames and -inf at others.
        bias: [1, heads, frames, frames] by position, the scores of a frame side by side.

    Returns:
        [batch, frames, dim].
    """

    def dropped(values: Tensor, share: float) -> Tensor:
        return F.dropout(values, share, training) if training and share else values

    def linear(name: str, values: Tensor) -> Tensor:
        return F.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], shape.eps)

    def attend(values: Tensor) -> Tensor:
        scores = _gated_bias(shape.heads, linear, weights, values, padding, bias)
        together = (torch.cat([weights[f"attention.{part}_proj.{of}"] for part in "qkv"]) for of in ("weight", "bias"))
        parts = F.linear(values, *together).unflatten(-1, (3, shape.heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=scores, dropout_p=shape.attention_dropout if training else 0.0
        )
        return dropped(linear("attention.out_proj", attended.transpose(1, 2).flatten(2)), shape.dropout)

    def feed_forward(values: Tensor) -> Tensor:
        inner = shape.activation(linear("feed_forward.intermediate_dense", values))
        return dropped(linear("feed_forward.output_dense", dropped(inner, shape.inner_dropout)), shape.dropout)

    if shape.norms_within:
        hidden = hidden + attend(norm("layer_norm", hidden))
        return hidden + feed_forward(norm("final_layer_norm", hidden))
    hidden = norm("layer_norm", hidden + attend(hidden))
    return norm("final_layer_norm", hidden + feed_forward(hidden))


def _gated_bias(
    heads: int,
    linear: Callable[[str, Tensor], Tensor],
    weights: dict[str, Tensor],
    hidden: Tensor,
    padding: Tensor,
    bias: Tensor,
) -> Tensor:
    """[batch, heads, frames, frames]: what is added to the scores of attention.

    transformers' own repeats the bias for every utterance and gates it in float32. Under bf16 the gate's product is
    rounded to 8 bits here before, not after, it is added, which moves frames by less than bf16 itself does.
    """
    gates = linear("attention.gru_rel_pos_linear", hidden.unflatten(-1, (heads, -1))).unflatten(-1, (2, 4))
    first, second = gates.sum(dim=-1).sigmoid().transpose(1, 2).chunk(2, dim=-1)
    gate = first * (second * weights["attention.gru_rel_pos_const"] - 1.0) + 2.0
    return padding + bias * gate
