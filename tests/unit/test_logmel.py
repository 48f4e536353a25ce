"""The from-scratch encoder: the same frames alone and in a batch, finite on silence, one frame at least."""

import librosa
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sermll.logmel import LogMelEncoder, MaskedBatchNorm, masked_bands, normalized, warped

SECOND = 16_000


def utterances(count: int, seed: int = 0) -> list[Tensor]:
    """Amplitude-modulated noise of 0.1 to 2 s, of very different loudness."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(0.1 * SECOND, 2 * SECOND, count).long().tolist()
    waves = []
    for length in lengths:
        envelope = torch.rand(1, generator=generator) * torch.sin(torch.arange(length) / 900.0).abs()
        waves.append(envelope * torch.randn(length, generator=generator))
    return waves


def batched(waves: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(waves, batch_first=True), torch.tensor([len(wave) for wave in waves])


@pytest.fixture(scope="module")
def encoder() -> LogMelEncoder:
    torch.manual_seed(0)
    return LogMelEncoder(dim=32).eval()


def test_frames_do_not_depend_on_the_batch(encoder: LogMelEncoder) -> None:
    waves = utterances(16)
    together, mask = encoder(*batched(waves))
    for index, wave in enumerate(waves):
        alone, alone_mask = encoder(*batched([wave]))
        assert alone_mask.all()
        torch.testing.assert_close(together[index][mask[index]], alone[0], atol=1e-5, rtol=0)
        assert together[index][~mask[index]].eq(0).all()


def test_more_padding_changes_nothing(encoder: LogMelEncoder) -> None:
    waveform, lengths = batched(utterances(3))
    frames, mask = encoder(waveform, lengths)
    wider, wider_mask = encoder(torch.nn.functional.pad(waveform, (0, SECOND)), lengths)
    torch.testing.assert_close(wider[wider_mask], frames[mask], atol=1e-5, rtol=0)


def test_no_gradient_reaches_the_other_utterances(encoder: LogMelEncoder) -> None:
    waveform, lengths = batched(utterances(3))
    waveform.requires_grad_()
    encoder(waveform, lengths)[0][1].sum().backward()
    gradient = waveform.grad
    assert gradient is not None
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("length", [1, 400, SECOND // 10, SECOND, 6 * SECOND + 7])
def test_a_frame_is_80_ms(encoder: LogMelEncoder, length: int) -> None:
    waveform, lengths = batched([torch.randn(length, generator=torch.Generator().manual_seed(1))])
    frames, mask = encoder(waveform, lengths)
    assert frames.shape == (1, mask.shape[1], encoder.dim)
    assert mask.dtype == torch.bool
    assert abs(int(mask.sum()) - length / (0.08 * SECOND)) <= 1
    assert mask.sum() >= 1
    assert frames.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_silence_is_finite_forward_and_backward(training: bool) -> None:
    torch.manual_seed(0)
    encoder = LogMelEncoder(dim=32).train(training)
    waveform = torch.stack([torch.zeros(SECOND), torch.full((SECOND,), 0.5), torch.zeros(SECOND)])
    frames, _ = encoder(waveform, torch.tensor([SECOND, SECOND, 50]))
    frames.square().sum().backward()
    assert frames.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("per_band", [True, False])
def test_normalized_matches_numpy_on_each_utterance(per_band: bool) -> None:
    frames = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(2)) * 4 + 3
    counts = torch.tensor([9, 4, 1])
    mask = torch.arange(9) < counts[:, None]
    result = normalized(frames, mask, per_band=per_band)
    for index, count in enumerate(counts.tolist()):
        one = frames[index, :count].numpy().astype(np.float64)
        centered = one - (one.mean(0) if per_band else one.mean())
        expected = centered / np.sqrt((centered**2).mean() + 1e-5)
        np.testing.assert_allclose(result[index, :count].numpy(), expected, atol=1e-5)
        assert result[index, count:].eq(0).all()


def test_batch_norm_equals_torchs_on_what_is_heard() -> None:
    generator = torch.Generator().manual_seed(5)
    maps, lengths = torch.randn(3, 4, 6, 5, generator=generator) * 3 + 1, (6, 2, 1)
    valid = (torch.arange(6) < torch.tensor(lengths)[:, None])[:, None, :, None]
    ours, theirs = MaskedBatchNorm(4), torch.nn.BatchNorm1d(4, momentum=MaskedBatchNorm.MOMENTUM)
    for _ in range(3):
        heard = torch.cat([maps[row, :, :length].flatten(1).T for row, length in enumerate(lengths)])
        expected = theirs(heard)
        result = ours(maps.masked_fill(~valid, torch.finfo().max / 1e30), valid)
        found = torch.cat([result[row, :, :length].flatten(1).T for row, length in enumerate(lengths)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        maps = maps + 1
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(maps, valid), torch.nn.functional.batch_norm(
        maps, ours.running_mean, ours.running_variance, ours.gain, ours.bias
    ), atol=1e-5, rtol=1e-5)  # fmt: skip


def test_gain_does_not_matter(encoder: LogMelEncoder) -> None:
    waveform, lengths = batched(utterances(3))
    loud, mask = encoder(waveform, lengths)
    quiet, _ = encoder(waveform / 3, lengths)
    torch.testing.assert_close(quiet[mask], loud[mask], atol=1e-2, rtol=0)


def test_masked_bands_stay_within_the_utterance_and_differ_between_utterances() -> None:
    torch.manual_seed(3)
    counts = torch.tensor([100, 50, 1] * 20)
    masked = masked_bands(torch.ones(60, 2, 100, 40), counts)
    assert masked[:, 0].equal(masked[:, 1])
    hidden = masked[:, 0].eq(0)
    columns = hidden.all(1)  # a band hidden at every time, padding included, is a frequency mask
    rows = hidden.all(2)
    assert 0 < columns.float().mean() < 0.2
    assert rows.sum(1).le(0.2 * counts + 2).all()
    assert not rows[torch.arange(100) >= counts[:, None]].any()
    assert hidden.unique(dim=0).shape[0] > 50


def test_spec_augment_and_dropout_act_in_training_alone() -> None:
    torch.manual_seed(4)
    waveform, lengths = batched(utterances(2))
    still = LogMelEncoder(dim=32, dropout=0.0, spec_augment=False).train()
    first, _ = still(waveform, lengths)
    assert first.equal(still(waveform, lengths)[0])
    moving = LogMelEncoder(dim=32, dropout=0.0).train()
    first, _ = moving(waveform, lengths)
    assert not first.equal(moving(waveform, lengths)[0])
    moving.eval()
    first, _ = moving(waveform, lengths)
    assert first.equal(moving(waveform, lengths)[0])


def test_odd_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        LogMelEncoder(dim=33)


def test_warped_filters_hear_a_tone_as_if_it_were_higher() -> None:
    filters = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=1024, n_mels=80, htk=True, norm=None).T)
    for factor in (0.85, 1.0, 1.1):
        banks = warped(filters, torch.tensor([factor, 1.0]))
        torch.testing.assert_close(banks[1], filters)
        for place in (50, 123, 300):
            spectrum, moved = torch.zeros(513), torch.zeros(513)
            spectrum[place] = 1.0
            # Between two frequencies, a tone is heard at both in shares.
            moved[int(place * factor)] = 1 - place * factor % 1
            moved[int(place * factor) + 1] = place * factor % 1
            torch.testing.assert_close(spectrum @ banks[0], moved @ filters, atol=1e-4, rtol=1e-4)


def test_warping_is_for_training_alone_and_is_another_one_each_time() -> None:
    torch.manual_seed(0)
    encoder = LogMelEncoder(mels=16, dim=16, dropout=0.0, spec_augment=False, warp=0.1)
    waveform, lengths = torch.randn(2, 8000), torch.tensor([8000, 8000])
    encoder.eval()
    torch.testing.assert_close(encoder(waveform, lengths)[0], encoder(waveform, lengths)[0])
    encoder.train()
    assert not torch.allclose(encoder(waveform, lengths)[0], encoder(waveform, lengths)[0])


def test_bf16_trains_like_float32() -> None:
    waves = utterances(8)
    gradients = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        encoder = LogMelEncoder(mels=16, dim=16, dropout=0.0, spec_augment=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            frames, mask = encoder(*batched(waves))
        (frames.float()[mask] * torch.linspace(-1, 1, 16)).sum().backward()
        gradients[enabled] = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    assert torch.nn.functional.cosine_similarity(gradients[True], gradients[False], dim=0) > 0.99
