"""A residual network on log-mel spectrograms, trained from scratch with SpecAugment: a baseline.

The network is ResNet-18 of He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016: a 7 x 7
convolution and a maximum of 3 x 3, then four stages of two blocks of two 3 x 3 convolutions. SpecAugment is that of
Park et al., Interspeech 2019, without its warping of time: two bands of frequency and two of time, hidden within each
utterance's own frames.

What differs: the input is the two log-mel maps of the `logmel` encoder; the later stages halve frequency alone, so
that a frame is 80 ms as there; the first stage has 16 channels instead of 64, by default, for small corpora and no
GPU; the mean over bands is taken here, that over time is the pooling's, so that with `model.pool.kind=mean` the two
are He's; batch normalisation leaves padding out.
"""

from torch import Tensor, nn

from sermll.logmel import ConvNorm, LogMelMaps, valid_frames

BANDS_STRIDES = (1, 2, 2, 2)
BLOCKS = 2
"""Blocks of a stage."""


class ResNetEncoder(LogMelMaps):
    """Log-mel spectrogram and an 18-layer residual network over time and frequency.

    Attributes:
        dim: width of a frame, eight times `channels`.

    Args:
        mels: mel bands, 32 to 128: of 16, the last stage would have a single one, where bf16 on a CPU gives wrong
            gradients.
        channels: channels of the first stage; each later one has twice as many. He et al. have 64.
        spec_augment: see `LogMelMaps`.
        warp: see `LogMelMaps`.
    """

    def __init__(self, mels: int = 80, channels: int = 16, spec_augment: bool = True, warp: float = 0.0) -> None:
        super().__init__(mels, spec_augment, warp)
        self.stem = ConvNorm(2, channels, kernel=7, stride=(2, 2))
        # Maps are not negative here, so that the zeros of padding are never the largest.
        self.largest = nn.MaxPool2d(3, stride=2, padding=1)
        blocks, before = [], channels
        for stage, stride in enumerate(BANDS_STRIDES):
            for block in range(BLOCKS):
                width = channels * 2**stage
                blocks.append(ResidualBlock(before, width, stride if block == 0 else 1))
                before = width
        self.blocks = nn.ModuleList(blocks)
        self.dim = before

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a padded batch of waveforms: frames of 80 ms and their mask, as `LogMelEncoder.forward` gives them."""
        maps, counts = self.maps(waveform, lengths)
        maps, counts = self.stem(maps, counts)
        maps, counts = self.largest(maps.relu()), (counts + 1) // 2
        valid = valid_frames(counts, maps.shape[2])
        maps = maps * valid[:, None, :, None].float()  # beside the last frame, the largest is of what is heard
        for block in self.blocks:
            maps = block(maps, counts)
        return maps.mean(3).transpose(1, 2), valid


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions added to what came in, which a 1 x 1 convolution fits where shapes differ.

    Args:
        channels_in: channels that come in.
        channels_out: channels that go out.
        bands_stride: 2 halves frequency, 1 keeps it.
    """

    def __init__(self, channels_in: int, channels_out: int, bands_stride: int) -> None:
        super().__init__()
        self.bands_stride = bands_stride
        self.first = ConvNorm(channels_in, channels_out, stride=(1, bands_stride))
        self.second = ConvNorm(channels_out, channels_out)
        same = channels_in == channels_out and bands_stride == 1
        self.shortcut = None if same else ConvNorm(channels_in, channels_out, kernel=1)

    def forward(self, maps: Tensor, counts: Tensor) -> Tensor:
        """Maps [batch, channels, frames, bands], zero in padding, with valid frames [batch]: as many after it."""
        residual, _ = self.second(self.first(maps, counts)[0].relu(), counts)
        if self.shortcut is not None:
            # Bands are left out here, not by the stride: oneDNN corrupts memory in strided 1 x 1 convolutions of
            # fewer than 16 channels in the channels-last layout (its issue 6035).
            maps, _ = self.shortcut(maps[..., :: self.bands_stride], counts)
        return (residual + maps).relu()
