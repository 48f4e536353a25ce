"""The MFCC baseline: coefficients as librosa's, the network as its paper draws it, on one utterance in plain torch."""

import librosa
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sermll.mfcc import MFCCEncoder

SECOND = 16_000


def noise(samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, samples, generator=generator) * torch.linspace(0.01, 0.5, samples)


def test_coefficients_are_librosas() -> None:
    waveform = noise(SECOND)
    mel = librosa.feature.melspectrogram(
        y=waveform[0].numpy(),
        sr=16_000,
        n_fft=1024,
        win_length=800,  # 50 ms
        hop_length=200,  # 12.5 ms
        window="hamming",
        pad_mode="constant",
        n_mels=80,
        htk=True,
        norm=None,
    )
    expected = librosa.feature.mfcc(S=np.log(mel + 1e-6), n_mfcc=39)
    found = MFCCEncoder().transform(waveform)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_coefficients_of_an_utterance_do_not_depend_on_a_louder_one() -> None:
    quiet = 1e-4 * noise(SECOND)
    transform = MFCCEncoder().transform
    together = transform(torch.cat([quiet, torch.ones(1, SECOND)]))
    torch.testing.assert_close(together[0], transform(quiet)[0])


def reference(encoder: MFCCEncoder, coefficients: Tensor) -> Tensor:
    """The paper's pooled feature of one utterance, [channels]; the second stack hears it turned round in time.

    A convolution of that stack has its two weights in the other order, since the encoder turns nothing round.
    """
    state = encoder.state_dict()

    def norm(maps: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_variance"]
        return functional.batch_norm(maps, mean, variance, state[f"{name}.gain"], state[f"{name}.bias"])

    features = []
    normalized = norm(coefficients, "norm")
    for stack, heard in enumerate((normalized, normalized.flip(2))):
        maps = functional.conv1d(heard, state[f"stacks.{stack}.project.weight"], state[f"stacks.{stack}.project.bias"])
        scales = []
        for block in range(len(encoder.shares)):
            gate, dilation = maps, 2**block
            for layer in range(2):
                name = f"stacks.{stack}.blocks.{block}"
                weight = state[f"{name}.convolutions.{layer}.weight"]
                weight = weight.flip(2) if stack else weight
                gate = functional.conv1d(functional.pad(gate, (dilation, 0)), weight, dilation=dilation)
                gate = norm(gate, f"{name}.norms.{layer}").relu()
            maps = maps * torch.sigmoid(gate)
            scales.append(maps.mean(2)[0])
        features.append(torch.stack(scales))
    return state["shares"] @ (features[0] + features[1])


@torch.no_grad()
@pytest.mark.parametrize("samples", [100, 4_000, 2 * SECOND])
def test_the_mean_of_the_frames_is_the_papers_feature(samples: int) -> None:
    torch.manual_seed(0)
    encoder = MFCCEncoder(channels=7, blocks=5).eval()
    for tensor in [*encoder.parameters(), *(value for name, value in encoder.named_buffers() if "running" in name)]:
        tensor.add_(0.2 * torch.rand(tensor.shape))
    waveform = noise(samples)
    frames, mask = encoder(functional.pad(waveform, (0, SECOND)), torch.tensor([samples]))
    assert mask.sum() == samples // 200 + 1
    expected = reference(encoder, encoder.transform(waveform))
    torch.testing.assert_close(frames[mask].mean(0), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_frame_hears_as_far_as_it_says() -> None:
    torch.manual_seed(0)
    encoder = MFCCEncoder(channels=8, blocks=3).eval()
    coefficients, valid = torch.randn(1, 39, 60), torch.ones(1, 1, 60)
    changed = coefficients.clone()
    changed[:, :, 30] += 1
    for stack, expected in zip(encoder.stacks, (range(30, 45), range(16, 31)), strict=True):
        differs = (stack(changed, valid)[-1] != stack(coefficients, valid)[-1]).any(1)[0]
        assert differs.nonzero().flatten().tolist() == list(expected)


def test_size_is_the_papers_but_for_its_biases() -> None:
    """0.1 million: 2 x (39 x 39 + 39 + 8 x 2 x (2 x 39 x 39 + 2 x 39)) + 8, and the input's normalisation."""
    count = sum(parameter.numel() for parameter in MFCCEncoder().parameters())
    assert count == 2 * (39 * 39 + 39 + 16 * (2 * 39 * 39 + 78)) + 8 + 78
