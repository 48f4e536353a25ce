"""What every encoder that is trained from scratch keeps: alone as in a batch, finite on silence, trained throughout."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sermll import config
from sermll.model import Recognizer, from_scratch

SECOND = 16_000
SMALL = {
    "logmel": config.LogMel(mels=16, dim=16, channels=4),
    "mfcc": config.MFCC(coefficients=13, channels=12, blocks=4),
    "resnet": config.ResNet(mels=32, channels=4),
}


@pytest.fixture(params=sorted(from_scratch()))
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    """A small encoder, random to the last bias and running average, as after training."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder = from_scratch()[request.param](**SMALL[request.param].model_dump(exclude={"kind"}))
    with torch.no_grad():
        for tensor in encoder.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in encoder.named_buffers():
            if "running" in name:
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return encoder


def utterances(*durations_s: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    waves = []
    for duration_s in durations_s:
        length = round(duration_s * SECOND)
        loudness = torch.rand(1, generator=generator) * torch.sin(torch.arange(length) / 900.0).abs()
        waves.append(loudness * torch.randn(length, generator=generator))
    return waves


def batched(waves: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(waves, batch_first=True), torch.tensor([len(wave) for wave in waves])


def test_every_kind_of_the_settings_is_built() -> None:
    assert set(SMALL) == set(from_scratch())
    for section in SMALL.values():
        model = Recognizer(config.Model(encoder=section, pool=config.MeanPool()), num_classes=3)
        output = model(*batched(utterances(0.3, 0.2)))
        assert output.logits.shape == (2, 3)


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_the_settings_know_the_width_of_a_frame(kind: str) -> None:
    section = SMALL[kind]
    assert from_scratch()[kind](**section.model_dump(exclude={"kind"})).dim == section.width[0]
    defaults = type(section)()
    assert from_scratch()[kind]().dim == defaults.width[0]


@torch.no_grad()
def test_frames_do_not_depend_on_the_batch(encoder: nn.Module) -> None:
    encoder.eval()
    # Every remainder of the strides: padding may reach the last frame of one length and not that of the next.
    waves = utterances(*(0.1 + 0.0125 * step for step in range(8)), 0.5, 1.3)
    waveform, lengths = batched(waves)
    together, mask = encoder(nn.functional.pad(waveform, (0, SECOND)), lengths)
    for index, wave in enumerate(waves):
        alone, alone_mask = encoder(*batched([wave]))
        assert alone_mask.all()
        assert alone.shape[2] == encoder.dim
        torch.testing.assert_close(together[index][mask[index]], alone[0], atol=1e-5, rtol=1e-5)
        assert together[index][~mask[index]].eq(0).all()


def test_no_gradient_reaches_the_other_utterances(encoder: nn.Module) -> None:
    waveform, lengths = batched(utterances(0.3, 0.2, 0.4))
    waveform.requires_grad_()
    encoder.eval()(waveform, lengths)[0][1].square().sum().backward()
    gradient = waveform.grad
    assert gradient is not None
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].eq(0).all()


def test_training_statistics_leave_padding_out(encoder: nn.Module) -> None:
    waveform, lengths = batched(utterances(0.3, 0.2, 0.4))
    learned = []
    for padding in (0, SECOND):
        trained = copy.deepcopy(encoder).train()
        torch.manual_seed(0)  # dropout and masks are drawn for utterances and channels, however long the batch
        trained(nn.functional.pad(waveform, (0, padding)), lengths)
        learned.append({name: value for name, value in trained.named_buffers() if "running" in name})
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_short_and_silent_utterances_train_every_parameter(encoder: nn.Module, precision: torch.dtype) -> None:
    waveform, lengths = batched([*utterances(0.5, 0.1), torch.zeros(SECOND), torch.full((900,), 0.5), torch.zeros(1)])
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        frames, mask = encoder.train()(waveform, lengths)
    assert mask.sum(1).ge(1).all()
    assert frames.isfinite().all()
    (frames.float() * torch.linspace(-1, 1, frames.shape[2])).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_bf16_stays_close(encoder: nn.Module) -> None:
    inputs = batched(utterances(0.5, 0.3))
    exact, mask = encoder.eval()(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = encoder(*inputs)
    assert (rough.float() - exact)[mask].abs().mean() < 0.05 * exact[mask].abs().mean()
