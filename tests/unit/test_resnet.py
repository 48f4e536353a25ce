"""The residual baseline: the network of one unpadded utterance in plain torch, He's size, SpecAugment in training."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sermll.resnet import ResidualBlock, ResNetEncoder

SECOND = 16_000


def conv_norm(state: dict[str, Tensor], name: str, maps: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
    weight, norm = state[f"{name}.convolution.weight"], f"{name}.norm"
    maps = functional.conv2d(maps, weight, stride=stride, padding=weight.shape[2] // 2)
    mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_variance"]
    return functional.batch_norm(maps, mean, variance, state[f"{norm}.gain"], state[f"{norm}.bias"])


@torch.no_grad()
@pytest.mark.parametrize("samples", [500, 3_000, SECOND, SECOND + 2_000])
def test_equals_plain_torch_on_the_utterance_alone(samples: int) -> None:
    torch.manual_seed(0)
    encoder = ResNetEncoder(channels=4).eval()
    state = encoder.state_dict()
    for name, tensor in state.items():
        if "norm" in name:
            tensor.add_(0.3 * torch.rand(tensor.shape))
    waveform = 0.1 * torch.randn(1, samples)
    maps = encoder.maps(waveform, torch.tensor([samples]))[0]
    maps = functional.max_pool2d(conv_norm(state, "stem", maps, (2, 2)).relu(), 3, stride=2, padding=1)
    for block in range(8):
        stride = (1, 2) if block in (2, 4, 6) else (1, 1)
        inner = conv_norm(state, f"blocks.{block}.first", maps, stride).relu()
        shortcut = conv_norm(state, f"blocks.{block}.shortcut", maps, stride) if block in (2, 4, 6) else maps
        maps = (conv_norm(state, f"blocks.{block}.second", inner) + shortcut).relu()
    frames, mask = encoder(functional.pad(waveform, (0, SECOND)), torch.tensor([samples]))
    torch.testing.assert_close(frames[mask], maps.mean(3)[0].T, atol=1e-5, rtol=1e-5)


def test_a_residual_block_by_hand() -> None:
    """One value alone in its channel: convolutions of width 3 see it and zeros."""
    block = ResidualBlock(1, 1, 1).eval()
    state = block.state_dict()
    for layer, middle in (("first", 3.0), ("second", -0.5)):
        state[f"{layer}.convolution.weight"].fill_(7.0)[0, 0, 1, 1] = middle
        state[f"{layer}.norm.running_variance"].fill_(4.0 - 1e-5)
        state[f"{layer}.norm.bias"].fill_(1.0)
    # first: 2 * 3 / 2 + 1 = 4; second: 4 * -0.5 / 2 + 1 = 0; added to what came in: 2
    found = block(torch.tensor([[[[2.0], [0.0]]]]), torch.tensor([1]))
    torch.testing.assert_close(found, torch.tensor([[[[2.0], [0.0]]]]))


def test_size_is_resnet_18s() -> None:
    """11 176 512 parameters below the classifier with three input channels; there are two here."""
    count = sum(parameter.numel() for parameter in ResNetEncoder(channels=64).parameters())
    assert count == 11_176_512 - 64 * 7 * 7
    assert ResNetEncoder(channels=64).dim == 512


@pytest.mark.parametrize("length", [1, 1_600, SECOND, 6 * SECOND + 7])
def test_a_frame_is_80_ms(length: int) -> None:
    _, mask = ResNetEncoder(mels=32, channels=4).eval()(torch.zeros(1, length), torch.tensor([length]))
    assert mask.shape[1] == mask.sum()
    assert 0 <= mask.sum() - length / 1280 <= 1


def test_spec_augment_acts_in_training_alone() -> None:
    torch.manual_seed(4)
    waveform, lengths = torch.randn(2, SECOND), torch.tensor([SECOND, 9_000])
    for spec_augment in (True, False):
        encoder = ResNetEncoder(mels=32, channels=4, spec_augment=spec_augment).train()
        same = encoder(waveform, lengths)[0].equal(encoder(waveform, lengths)[0])
        assert same != spec_augment
        encoder.eval()
        assert encoder(waveform, lengths)[0].equal(encoder(waveform, lengths)[0])
