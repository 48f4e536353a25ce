"""A compact encoder trained from scratch on log-mel spectrograms, for small corpora and no GPU.

No layer here mixes utterances and none sees padding: an utterance gives the same frames alone or batched.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchaudio.transforms import MelSpectrogram

SAMPLE_RATE_HZ = 16_000
WINDOW = 512
HOP = 320
TIME_STRIDES = (2, 2, 1, 1)
CHANNELS = (16, 32, 64, 64)
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

    def __init__(self, mels: int = 80, dim: int = 128, dropout: float = 0.2, spec_augment: bool = True) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, one half for each direction of the GRU, got {dim}")
        self.dim = dim
        self.spec_augment = spec_augment
        self.spectrogram = MelSpectrogram(
            SAMPLE_RATE_HZ, n_fft=WINDOW, hop_length=HOP, n_mels=mels, f_min=50.0, pad_mode="constant"
        )
        blocks = []
        channels, bands = 1, mels
        for wider, stride in zip(CHANNELS, TIME_STRIDES, strict=True):
            blocks.append(ConvBlock(channels, wider, stride))
            channels, bands = wider, (bands + 1) // 2
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(channels * bands, dim)
        self.recurrent = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a padded batch of waveforms.

        Args:
            waveform: samples at 16 kHz, float32 [batch, samples], zero after each utterance's end.
            lengths: samples of each utterance, int64 [batch], at least 1.

        Returns:
            Frames, float32 [batch, frames, dim], one for each 80 ms and zero in padding, and their mask, bool
            [batch, frames], true where a frame belongs to the utterance.
        """
        counts = lengths // HOP + 1
        frames = self.spectrogram(waveform).clamp_min(QUIETEST).log().transpose(1, 2)
        frames = normalized(frames, _valid(counts, frames.shape[1]))
        if self.training and self.spec_augment:
            frames = masked_bands(frames, counts)
        maps = frames.unsqueeze(1).contiguous(memory_format=torch.channels_last)  # half the time on a CPU
        for block in self.blocks:
            maps, counts = block(maps, counts)
        mask = _valid(counts, maps.shape[2])
        frames = self.dropout(self.project(self.dropout(maps.transpose(1, 2).flatten(2))))
        packed = pack_padded_sequence(frames, counts.cpu(), batch_first=True, enforce_sorted=False)
        context, _ = self.recurrent(packed)
        context, _ = pad_packed_sequence(context, batch_first=True, total_length=frames.shape[1])
        frames = self.norm(frames + self.dropout(context))
        return frames.masked_fill(~mask.unsqueeze(2), 0.0), mask


class ConvBlock(nn.Module):
    """A 3 x 3 convolution that halves frequency, normalised per utterance and channel, then ReLU.

    Means and variances are over the utterance's valid frames and all bands, so padding does not enter them.

    Args:
        channels_in: channels that come in.
        channels_out: channels that go out.
        time_stride: 2 halves the frames as well, 1 keeps them.
    """

    def __init__(self, channels_in: int, channels_out: int, time_stride: int) -> None:
        super().__init__()
        self.time_stride = time_stride
        self.convolution = nn.Conv2d(channels_in, channels_out, 3, stride=(time_stride, 2), padding=1, bias=False)
        weight = nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")
        self.convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.gain = nn.Parameter(torch.ones(channels_out, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels_out, 1, 1))

    def forward(self, maps: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [batch, channels, frames, bands], zero in padding, and valid frames [batch]: both after it."""
        maps = self.convolution(maps)
        counts = (counts + self.time_stride - 1) // self.time_stride
        valid = _valid(counts, maps.shape[2])[:, None, :, None]
        maps = maps * valid
        size = (counts * maps.shape[3])[:, None, None, None]
        mean = maps.sum((2, 3), keepdim=True) / size
        variance = (maps.square().sum((2, 3), keepdim=True) / size - mean.square()).clamp_min(0.0)
        scale = self.gain / (variance + 1e-3).sqrt()
        return (maps * scale + (self.bias - mean * scale)).relu() * valid, counts


def normalized(frames: Tensor, mask: Tensor) -> Tensor:
    """Each utterance's valid frames to mean 0 per band and mean square 1 over all; padding becomes 0.

    One scale for all bands keeps how much each varies relative to the others. Constant utterances become 0.

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

    A band covers up to a tenth of the mel bands or of the utterance's valid frames.

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


def _random_span(position: Tensor, size: Tensor, share: float = 0.1) -> Tensor:
    """For each size, bool [batch, positions]: a random stretch of up to `share` of it, placed within it."""
    size = size.unsqueeze(1)
    width = torch.rand(size.shape, device=size.device) * share * size
    start = torch.rand(size.shape, device=size.device) * (size - width)
    return (position >= start) & (position < start + width)


def _valid(counts: Tensor, length: int) -> Tensor:
    """Bool [batch, length], true before each count."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)
