"""A compact encoder trained from scratch on log-mel spectrograms, for small corpora and no GPU.

No layer sees padding, and none mixes utterances in scoring: an utterance gives the same frames alone or batched. In
training, the convolutions are normalised by statistics of the global batch, those of all workers.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchaudio.functional import melscale_fbanks
from torchaudio.transforms import Spectrogram

SAMPLE_RATE_HZ = 16_000
WINDOW = 1024
HOP = 320
TIME_STRIDES = (2, 2, 1, 1)
WIDTHS = (1, 2, 4, 4)
"""Channels of the convolutions, in multiples of the first one's."""
QUIETEST = 1e-7
"""Floor of mel power before the logarithm: below the quantisation noise of 16-bit audio."""


class LogMelMaps(nn.Module):
    """Log-mel spectrograms in two normalisations, augmented in training: what encoders of such maps are built on.

    Args:
        mels: mel bands, 16 to 128.
        spec_augment: mask bands of time and of frequency in training (Park et al., Interspeech 2019).
        warp: in training, each utterance's frequencies are scaled by up to this share up or down, as if another vocal
            tract spoke (Jaitly and Hinton, ICML workshop 2013); 0 to below 1.
    """

    filters: Tensor

    def __init__(self, mels: int, spec_augment: bool, warp: float) -> None:
        super().__init__()
        self.spec_augment = spec_augment
        self.warp = warp
        # torchaudio's MelSpectrogram with power=2 does the same, by way of square roots that cost a tenth of training.
        self.spectrum = Spectrogram(n_fft=WINDOW, hop_length=HOP, power=None, pad_mode="constant")
        filters = melscale_fbanks(WINDOW // 2 + 1, 50.0, SAMPLE_RATE_HZ / 2, mels, SAMPLE_RATE_HZ)
        self.register_buffer("filters", filters)

    def maps(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Maps, float32 [batch, 2, frames, mels], a frame for each 20 ms, zero in padding, and valid frames [batch].

        Args:
            waveform: samples at 16 kHz, float32 [batch, samples], zero after each utterance's end.
            lengths: samples of each utterance, int64 [batch], at least 1.
        """
        counts = lengths // HOP + 1
        with torch.autocast(waveform.device.type, enabled=False):  # 8 bits are too few for sums of squares
            filters = self.filters
            if self.training and self.warp:
                filters = warped(filters, 1 + self.warp * (2 * torch.rand(len(waveform), device=waveform.device) - 1))
            spectrum = self.spectrum(waveform).transpose(1, 2)
            power = spectrum.real.square() + spectrum.imag.square()
            frames = (power @ filters).clamp_min(QUIETEST).log()
            mask = valid_frames(counts, frames.shape[1])
            # How each band changes, and, beside it, how the bands differ, which tells pitch and voice quality.
            views = [normalized(frames, mask, per_band=True), normalized(frames, mask, per_band=False)]
        maps = torch.stack(views, dim=1)
        if self.training and self.spec_augment:
            maps = masked_bands(maps, counts)
        return maps.contiguous(memory_format=torch.channels_last), counts  # half the time on a CPU


class LogMelEncoder(LogMelMaps):
    """Log-mel spectrogram, four convolutions over time and frequency, and a bidirectional GRU.

    Args:
        mels: mel bands, 16 to 128.
        dim: width of a frame, even.
        dropout: share of values dropped in training, 0 to below 1.
        spec_augment: see `LogMelMaps`.
        channels: channels of the first convolution; the others have twice and four times as many.
        warp: see `LogMelMaps`.
    """

    def __init__(
        self,
        mels: int = 80,
        dim: int = 128,
        dropout: float = 0.2,
        spec_augment: bool = True,
        channels: int = 16,
        warp: float = 0.0,
    ) -> None:
        super().__init__(mels, spec_augment, warp)
        if dim % 2:
            raise ValueError(f"dim must be even, one half for each direction of the GRU, got {dim}")
        self.dim = dim
        blocks = []
        before, bands = 2, mels
        for width, stride in zip(WIDTHS, TIME_STRIDES, strict=True):
            blocks.append(ConvNorm(before, width * channels, stride=(stride, 2)))
            before, bands = width * channels, (bands + 1) // 2
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(before * bands, dim)
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
        maps, counts = self.maps(waveform, lengths)
        for block in self.blocks:
            maps, counts = block(maps, counts)
            maps = maps.relu()
        mask = valid_frames(counts, maps.shape[2])
        frames = self.dropout(self.project(self.dropout(maps.transpose(1, 2).flatten(2))))
        with torch.autocast(frames.device.type, enabled=False):  # a GPU's would be in float16, too narrow for gradients
            packed = pack_padded_sequence(frames.float(), counts.cpu(), batch_first=True, enforce_sorted=False)
            context, _ = self.recurrent(packed)
        context, _ = pad_packed_sequence(context, batch_first=True, total_length=frames.shape[1])
        frames = self.norm(frames + self.dropout(context))
        return frames.masked_fill(~mask.unsqueeze(2), 0.0), mask


class ConvNorm(nn.Module):
    """A convolution and batch normalisation over what is not padding; it starts as He et al. (ICCV 2015) for ReLUs.

    Args:
        channels_in: channels that come in.
        channels_out: channels that go out.
        kernel: its width in time and frequency, odd.
        stride: steps in time and in frequency; each divides the length, rounded up.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3, stride: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.time_stride = stride[0]
        self.convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
        weight = nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")
        self.convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.norm = MaskedBatchNorm(channels_out)

    def forward(self, maps: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [batch, channels, frames, bands], zero in padding, and valid frames [batch]: both after it."""
        counts = (counts + self.time_stride - 1) // self.time_stride
        maps = self.convolution(maps)
        # As numbers: to multiply by truth values takes several times as long.
        valid = valid_frames(counts, maps.shape[2])[:, None, :, None].float()
        return self.norm(maps, valid) * valid, counts


class MaskedBatchNorm(nn.Module):
    """Batch normalisation whose statistics leave padding out and are those of all workers' utterances together.

    As `torch.nn.BatchNorm2d` in everything else: running averages take the place of the batch's in scoring.

    Args:
        channels: channels of the maps.
    """

    MOMENTUM = 0.05
    """Weight of the newest batch in the running averages: of small batches, more are needed."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    def forward(self, maps: Tensor, valid: Tensor) -> Tensor:
        """Normalised maps [batch, channels, frames, bands]; padding holds any value.

        Args:
            maps: [batch, channels, frames, bands].
            valid: float32 [batch, 1, frames, 1], 1 where a frame is no padding, else 0.
        """
        maps = maps.float()  # bf16 has too few bits for the sums
        mean, variance = self.running_mean, self.running_variance
        if self.training:
            heard = maps * valid
            size = (valid.sum() * maps.shape[3])[None]
            sums = torch.cat([heard.sum((0, 2, 3)), heard.square().sum((0, 2, 3)), size])
            if dist.is_initialized() and dist.get_world_size() > 1:
                sums = all_reduce(sums)
            mean, square = (sums[:-1] / sums[-1]).chunk(2)
            variance = (square - mean.square()).clamp_min(0.0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.MOMENTUM)
                self.running_variance.lerp_(variance, self.MOMENTUM)
        scale = self.gain * (variance + 1e-5).rsqrt()
        return maps * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def warped(filters: Tensor, factor: Tensor) -> Tensor:
    """Filters for a spectrum whose frequencies are scaled, one bank for each utterance.

    Args:
        filters: [frequencies, bands].
        factor: [batch] of what is heard at a frequency, times its factor, the filters hear.

    Returns:
        [batch, frequencies, bands], interpolated between neighbouring frequencies.
    """
    last = len(filters) - 1
    place = (torch.arange(last + 1, device=filters.device) * factor.unsqueeze(1)).clamp(max=last)
    below = place.floor().long().clamp(max=last - 1)
    return torch.lerp(filters[below], filters[below + 1], (place - below).unsqueeze(2))


def normalized(frames: Tensor, mask: Tensor, *, per_band: bool) -> Tensor:
    """Each utterance's valid frames to mean 0 and mean square 1; padding becomes 0.

    The scale is one for all bands, which keeps how much each varies. Constant utterances become 0.

    Args:
        frames: float [batch, frames, bands].
        mask: bool [batch, frames], true where a frame is valid; at least one of each utterance is.
        per_band: take the mean of each band, which removes what does not change; else one mean of all bands.
    """
    valid = mask.unsqueeze(2)
    count = valid.sum(1, keepdim=True)
    mean = frames.masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
    if not per_band:
        mean = mean.mean(2, keepdim=True)
    centered = (frames - mean).masked_fill(~valid, 0.0)
    variance = centered.square().sum((1, 2), keepdim=True) / (count * frames.shape[2])
    return centered / (variance + 1e-5).sqrt()


def masked_bands(maps: Tensor, counts: Tensor) -> Tensor:
    """SpecAugment: in each utterance, two bands of frequency and two of time set to 0, its mean.

    A band covers up to a tenth of the mel bands or of the utterance's valid frames, in all channels.

    Args:
        maps: float [batch, channels, frames, bands].
        counts: int64 [batch], valid frames of each utterance.
    """
    batch, _, length, bands = maps.shape
    time = torch.arange(length, device=maps.device)
    band = torch.arange(bands, device=maps.device)
    hidden = torch.zeros(batch, length, bands, dtype=torch.bool, device=maps.device)
    for _ in range(2):
        hidden |= _random_span(time, counts).unsqueeze(2)
        hidden |= _random_span(band, torch.full_like(counts, bands)).unsqueeze(1)
    return maps.masked_fill(hidden.unsqueeze(1), 0.0)


def _random_span(position: Tensor, size: Tensor, share: float = 0.1) -> Tensor:
    """For each size, bool [batch, positions]: a random stretch of up to `share` of it, placed within it."""
    size = size.unsqueeze(1)
    width = torch.rand(size.shape, device=size.device) * share * size
    start = torch.rand(size.shape, device=size.device) * (size - width)
    return (position >= start) & (position < start + width)


def valid_frames(counts: Tensor, length: int) -> Tensor:
    """Bool [batch, length], true before each count."""
    return torch.arange(length, device=counts.device) < counts.unsqueeze(1)
