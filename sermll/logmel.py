"""A compact encoder trained from scratch on log-mel spectrograms, for small corpora and machines without a GPU.

No layer here mixes utterances and none sees padding: an utterance gives the same frames alone and in any batch.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchaudio.transforms import MelSpectrogram

SAMPLE_RATE_HZ = 16_000
WINDOW = 400
HOP = 160
QUIETEST = 1e-7
"""Floor of mel power before the logarithm: below the quantisation noise of 16-bit audio."""


class LogMelEncoder(nn.Module):
    """Log-mel spectrogram, four convolutions over time and frequency, and a bidirectional GRU.

    Args:
        mels: mel bands, 16 to 128.
        dim: width of a frame, even.
        dropout: share of values dropped in training, 0 to below 1.
        spec_augment: mask bands of time and of frequency in training (Park et al., Interspeech 2019).
    """

    def __init__(
        self, mels: int = 80, dim: int = 128, dropout: float = 0.2, spec_augment: bool = True
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, one half for each direction of the GRU, got {dim}")
        self.dim = dim
        self.spec_augment = spec_augment
        self.spectrogram = MelSpectrogram(
            SAMPLE_RATE_HZ,
            n_fft=512,
            win_length=WINDOW,
            hop_length=HOP,
            n_mels=mels,
            f_min=50.0,
            pad_mode="constant",
        )
        blocks = [
            ConvBlock(1, 16, mels, time_stride=2),
            ConvBlock(16, 32, _halved(mels, 1), time_stride=2),
            ConvBlock(32, 64, _halved(mels, 2)),
            ConvBlock(64, 64, _halved(mels, 3)),
        ]
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(64 * _halved(mels, 4), dim)
        self.recurrent = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a padded batch of waveforms.

        Args:
            waveform: samples at 16 kHz, float32 [batch, samples], zero after each utterance's end.
            lengths: samples of each utterance, int64 [batch], at least 1.

        Returns:
            Frames, float32 [batch, frames, dim], one for each 40 ms and zero in padding, and their mask, bool
            [batch, frames], true where a frame belongs to the utterance.
        """
        counts = lengths // HOP + 1
        frames = self.spectrogram(waveform).clamp_min(QUIETEST).log().transpose(1, 2)
        mask = _valid(counts, frames.shape[1])
        frames = normalized(frames, mask)
        if self.training and self.spec_augment:
            frames = masked_bands(frames, counts)
        maps = frames.unsqueeze(1)
        for block in self.blocks:
            maps, counts = block(maps, counts)
        mask = _valid(counts, maps.shape[2])
        frames = self.project(self.dropout(maps.transpose(1, 2).flatten(2)))
        packed = pack_padded_sequence(
            self.dropout(frames), counts.cpu(), batch_first=True, enforce_sorted=False
        )
        context, _ = pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, total_length=frames.shape[1]
        )
        frames = self.norm(frames + self.dropout(context))
        return frames.masked_fill(~mask.unsqueeze(2), 0.0), mask


class ConvBlock(nn.Module):
    """A 3 x 3 convolution that halves frequency, normalised frame by frame.

    The normalisation is over channels and frequency of one frame, so neither padding nor other frames enter it.

    Args:
        channels_in: channels that come in.
        channels_out: channels that go out.
        bands: frequency bands that come in; half of them, rounded up, go out.
        time_stride: 2 halves the frames as well, 1 keeps them.
    """

    def __init__(self, channels_in: int, channels_out: int, bands: int, time_stride: int = 1) -> None:
        super().__init__()
        self.time_stride = time_stride
        self.convolution = nn.Conv2d(channels_in, channels_out, 3, stride=(time_stride, 2), padding=1)
        self.norm = nn.LayerNorm([channels_out, _halved(bands, 1)])

    def forward(self, maps: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [batch, channels, frames, bands] and valid frames [batch] to the same of the next resolution."""
        maps = maps.masked_fill(~_valid(counts, maps.shape[2])[:, None, :, None], 0.0)
        maps = self.convolution(maps)
        maps = self.norm(maps.transpose(1, 2)).transpose(1, 2)
        return nn.functional.gelu(maps), (counts + self.time_stride - 1) // self.time_stride


def normalized(frames: Tensor, mask: Tensor) -> Tensor:
    """Each utterance's valid frames to mean 0 per band and mean square 1 over all bands; padding becomes 0.

    One scale for all bands keeps how lively each band is relative to the others. A constant utterance becomes 0.

    Args:
        frames: float [batch, frames, bands].
        mask: bool [batch, frames], true where a frame is valid; at least one of each utterance is.
    """
    valid = mask.unsqueeze(2)
    count = valid.sum(1, keepdim=True)
    mean = frames.masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
    centered = (frames - mean).masked_fill(~valid, 0.0)
    variance = centered.square().sum((1, 2), keepdim=True) / (count * frames.shape[2])
    return centered / (variance + 1e-5).sqrt()


def masked_bands(frames: Tensor, counts: Tensor) -> Tensor:
    """SpecAugment: in each utterance, two bands of frequency and two of time set to 0, its mean.

    A band covers up to a fifth of the mel bands or of the utterance's valid frames.

    Args:
        frames: float [batch, frames, bands].
        counts: int64 [batch], valid frames of each utterance.
    """
    batch, length, bands = frames.shape
    time = torch.arange(length, device=frames.device)
    band = torch.arange(bands, device=frames.device)
    hidden = torch.zeros(batch, length, bands, dtype=torch.bool, device=frames.device)
    for _ in range(2):
        hidden |= _random_span(time, counts).unsqueeze(2)
        hidden |= _random_span(band, torch.full_like(counts, bands)).unsqueeze(1)
    return frames.masked_fill(hidden, 0.0)


def _random_span(position: Tensor, size: Tensor, share: float = 0.2) -> Tensor:
    """For each size, bool [batch, positions]: a random stretch of up to `share` of it, placed within it."""
    size = size.unsqueeze(1)
    width = torch.rand(size.shape, device=size.device) * share * size
    start = torch.rand(size.shape, device=size.device) * (size - width)
    return (position >= start) & (position < start + width)


def _valid(counts: Tensor, length: int) -> Tensor:
    """Bool [batch, length], true before each count."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)


def _halved(size: int, times: int) -> int:
    """The size after so many halvings, each rounded up."""
    for _ in range(times):
        size = (size + 1) // 2
    return size
