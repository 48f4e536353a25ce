"""Layers of pre-trained encoders in fewer and larger steps than their library takes, to the same result.

On a GPU each step is a kernel that Python has to launch, often for longer than it runs. transformers' WavLM-Large
takes over four thousand for one batch of training, a good part of them to convert between precisions; here little more
than half as many are taken.

Outside autocast everything is computed in the precision of what is given. Under bf16 autocast it is computed in bf16,
with weights converted some layers at a time; sums within matrix products and norms are float32's, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
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


def converted(
    modules: Iterable[nn.Module], dtype: torch.dtype, joined: Mapping[str, tuple[str, ...]] | None = None
) -> list[dict[str, Tensor]]:
    """Each module's parameters by name, in another precision; all in one step, and their gradients in another.

    Args:
        modules: whose parameters.
        dtype: their precision afterwards.
        joined: parameters that are wanted as one tensor, one below the other, by its name.
    """
    names: list[list[str]] = []
    parts: list[list[Tensor]] = []
    for module in modules:
        named: dict[str, Tensor] = dict(module.named_parameters())
        grouped = {name: [named.pop(part) for part in of] for name, of in (joined or {}).items()}
        grouped |= {name: [parameter] for name, parameter in named.items()}
        names.append(list(grouped))
        parts += grouped.values()
    tensors = iter(
        [it[0] if len(it) == 1 else torch.cat(it) for it in parts]
        if all(it.dtype == dtype for group in parts for it in group)
        else _Converted.apply(dtype, [len(group) for group in parts], *(it for group in parts for it in group))
    )
    return [dict(zip(those, tensors, strict=False)) for those in names]


class _Converted(torch.autograd.Function):
    """Tensors in another precision, as many below each other as `sizes` says, one after the other."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:  # torch's
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.like = sizes, [(tensor.shape, tensor.dtype) for tensor in tensors]
        wholes, places, rest = [], [], iter(tensors)
        for size in sizes:
            group = list(islice(rest, size))
            rows = [len(tensor) for tensor in group]
            whole = torch.empty((sum(rows), *group[0].shape[1:]), dtype=dtype, device=group[0].device)
            wholes.append(whole)
            places += whole.split(rows) if size > 1 else [whole]
        torch._foreach_copy_(places, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
        return tuple(wholes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        like, found, given, copies = iter(ctx.like), [], [], []
        for size, gradient in zip(ctx.sizes, gradients, strict=True):
            group = list(islice(like, size))
            if gradient is None:
                found += [None] * size
                continue
            given += gradient.split([shape[0] for shape, _ in group]) if size > 1 else [gradient]
            copies += [torch.empty(shape, dtype=dtype, device=gradient.device) for shape, dtype in group]
            found += copies[-size:]
        torch._foreach_copy_(copies, given)  # pyright: ignore[reportPrivateImportUsage]
        return None, None, *found


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


def position_bias(attention: Any, frames: int) -> Tensor:
    """What WavLM adds to its attention, before it is gated: it depends on how far key and query are apart.

    As transformers' `compute_bias`, of one value for each distance, and on the weights' device: some of its versions
    look the distances up on the CPU, for which a GPU then has to wait.

    Args:
        attention: transformers' `WavLMAttention` of the first layer.
        frames: of queries and keys.

    Returns:
        [heads, frames (queries), frames (keys)].
    """
    weight = attention.rel_attn_embed.weight
    apart = torch.arange(1 - frames, frames, device=weight.device)
    values = attention.rel_attn_embed(attention._relative_positions_bucket(apart))
    return values.T.unfold(1, frames, 1).flip(1)


QKV = {f"attention.qkv.{name}": tuple(f"attention.{part}_proj.{name}" for part in "qkv") for name in ("weight", "bias")}
"""Parameters of a layer that `wavlm_layer` wants joined."""


def wavlm_layer(
    shape: WavLMShape, training: bool, weights: dict[str, Tensor], hidden: Tensor, padding: Tensor, bias: Tensor
) -> Tensor:
    """A layer of WavLM's transformer.

    Args:
        shape: of the layer.
        training: whether values are dropped.
        weights: the layer's parameters, by transformers' names but for `QKV`, all of one precision, as what follows.
        hidden: [batch * frames, dim].
        padding: [batch, 1, 1, frames], 0 at valid frames and -inf at others.
        bias: [1, heads, frames, frames] by position, the scores of a frame side by side.

    Returns:
        [batch * frames, dim].
    """
    batch, frames, heads = len(padding), padding.shape[-1], shape.heads

    def dropped(values: Tensor, share: float) -> Tensor:
        return F.dropout(values, share, training) if training and share else values

    def linear(name: str, values: Tensor) -> Tensor:
        return F.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], shape.eps)

    def gated_bias(values: Tensor) -> Tensor:
        # transformers' own repeats the bias for every utterance and gates it in float32. Under bf16 the product is
        # rounded to 8 bits here before, not after, the sum, which moves frames by less than bf16 itself does.
        gates = linear("attention.gru_rel_pos_linear", values.view(batch * frames * heads, -1))
        gates = gates.view(batch, frames, heads, 2, 4).sum(dim=-1).sigmoid()
        first, second = gates.transpose(1, 2).split(1, dim=-1)
        return padding + bias * (first * (second * weights["attention.gru_rel_pos_const"] - 1.0) + 2.0)

    def attend(values: Tensor) -> Tensor:
        parts = linear("attention.qkv", values).view(batch, frames, 3, heads, -1).unbind(2)
        attended = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in parts),
            attn_mask=gated_bias(values),
            dropout_p=shape.attention_dropout if training else 0.0,
        )
        attended = attended.transpose(1, 2).reshape(values.shape)
        return dropped(linear("attention.out_proj", attended), shape.dropout)

    def feed_forward(values: Tensor) -> Tensor:
        inner = shape.activation(linear("feed_forward.intermediate_dense", values))
        return dropped(linear("feed_forward.output_dense", dropped(inner, shape.inner_dropout)), shape.dropout)

    if shape.norms_within:
        hidden = hidden + attend(norm("layer_norm", hidden))
        return hidden + feed_forward(norm("final_layer_norm", hidden))
    hidden = norm("layer_norm", hidden + attend(hidden))
    return norm("final_layer_norm", hidden + feed_forward(hidden))
