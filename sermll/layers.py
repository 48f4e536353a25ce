"""Layers of pre-trained encoders in fewer and larger steps than their library takes, to the same result.

On a GPU each step is a kernel that Python has to launch. WavLM-Large by transformers takes over three thousand for one
batch of training, most of them to convert between precisions, and many GPUs wait for Python; here half as many.

Outside autocast everything is computed in the precision of what is given. Under bf16 autocast it is computed in bf16,
with weights converted a layer at a time; sums within matrix products and norms are float32's, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
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


def converted(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's parameters by name, in another precision; all in one step, and their gradients in another."""
    named = dict(module.named_parameters())
    if all(parameter.dtype == dtype for parameter in named.values()):
        return cast(dict[str, Tensor], named)
    return dict(zip(named, _Converted.apply(dtype, *named.values()), strict=True))


class _Converted(torch.autograd.Function):
    """Tensors in another precision."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:  # torch's context
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
    weights = converted(layer, frames.dtype)
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


# --- WavLM's transformer layer


def wavlm_layer(layer: Any, hidden: Tensor, padding: Tensor, position_bias: Tensor) -> Tensor:
    """A layer of WavLM's transformer, with the norms inside (WavLM-Large) or after (WavLM-Base).

    Args:
        layer: transformers' `WavLMEncoderLayer` or `WavLMEncoderLayerStableLayerNorm`.
        hidden: float[batch, frames, dim].
        padding: float[batch, 1, 1, frames], 0 at valid frames and -inf at others.
        position_bias: float[1, heads, frames, frames], one frame's scores in a row.

    Returns:
        float[batch, frames, dim].
    """
    weights = converted(layer, hidden.dtype)
    training = layer.training

    def norm(name: str, values: Tensor) -> Tensor:
        shape, eps = getattr(layer, name).normalized_shape, getattr(layer, name).eps
        return F.layer_norm(values, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def feed_forward(values: Tensor) -> Tensor:
        part = layer.feed_forward
        inner = part.intermediate_act_fn(_linear(weights, "feed_forward.intermediate_dense", values))
        inner = F.dropout(inner, part.intermediate_dropout.p, training)
        return F.dropout(_linear(weights, "feed_forward.output_dense", inner), part.output_dropout.p, training)

    def attend(values: Tensor) -> Tensor:
        attended = _attended(layer.attention, weights, values, padding, position_bias)
        return F.dropout(_linear(weights, "attention.out_proj", attended), layer.dropout.p, training)

    if "StableLayerNorm" in type(layer).__name__:
        hidden = hidden + attend(norm("layer_norm", hidden))
        return hidden + feed_forward(norm("final_layer_norm", hidden))
    hidden = norm("layer_norm", hidden + attend(hidden))
    return norm("final_layer_norm", hidden + feed_forward(hidden))


def _attended(
    attention: Any, weights: dict[str, Tensor], hidden: Tensor, padding: Tensor, position_bias: Tensor
) -> Tensor:
    """Attention with the gated bias by position, before the output's projection.

    transformers' own repeats the bias for every utterance, gates it in float32, and keeps the averaged weights. Under
    bf16 the gate's product is rounded to 8 bits before, not after, which moves frames by less than bf16 itself does.
    """
    heads, size = attention.num_heads, attention.head_dim
    gates = _linear(weights, "attention.gru_rel_pos_linear", hidden.unflatten(-1, (heads, size)))
    first, second = gates.unflatten(-1, (2, 4)).sum(dim=-1).sigmoid().transpose(1, 2).chunk(2, dim=-1)
    gate = first * (second * weights["attention.gru_rel_pos_const"] - 1.0) + 2.0
    weight, bias = (torch.cat([weights[f"attention.{part}_proj.{name}"] for part in "qkv"]) for name in _WEIGHT_BIAS)
    parts = F.linear(hidden, weight, bias).unflatten(-1, (3, heads, size)).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in parts)
    scores = cast(Tensor, _GatedBias.apply(padding, position_bias, gate))
    dropout = attention.dropout if attention.training else 0.0
    with _kernels_that_train_a_bias(scores):
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=scores, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


_WEIGHT_BIAS = ("weight", "bias")


def _linear(weights: dict[str, Tensor], name: str, values: Tensor) -> Tensor:
    return F.linear(values, *(weights[f"{name}.{part}"] for part in _WEIGHT_BIAS))


class _GatedBias(torch.autograd.Function):
    """padding + position_bias * gate; its gradients are sums of products, which are matrix products."""

    @staticmethod
    def forward(ctx: Any, padding: Tensor, position_bias: Tensor, gate: Tensor) -> Tensor:  # torch's context
        ctx.save_for_backward(position_bias, gate)
        return torch.addcmul(padding, position_bias, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:  # pyright: ignore
        position_bias, gate = ctx.saved_tensors
        by_place = gradient.permute(1, 2, 0, 3)  # heads, frames, batch, frames
        for_bias = gate.permute(1, 2, 3, 0) @ by_place
        for_gate = by_place @ position_bias[0, ..., None]
        return None, for_bias.permute(2, 0, 1, 3), for_gate.permute(2, 0, 1, 3)


def _kernels_that_train_a_bias(bias: Tensor) -> AbstractContextManager[Any]:
    """On a GPU torch may choose cuDNN's attention, whose backward pass has no gradient for the bias."""
    if bias.is_cuda and bias.requires_grad:
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return nullcontext()
