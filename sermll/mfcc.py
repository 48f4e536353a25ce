"""MFCC and a small 1-D convolutional network, trained from scratch: a baseline.

The network is TIM-Net: Ye, Wen, Wei, Xu, Liu and Shan, "Temporal Modeling Matters: A Novel Temporal Emotional Modeling
Approach for Speech Emotion Recognition", ICASSP 2023, arXiv 2211.08233, written anew.

The same: 39 MFCC of 50 ms Hamming windows every 12.5 ms; two stacks of dilated causal blocks, one of which runs
backward in time; in each block two convolutions of width 2, batch normalisation, ReLU and dropout of whole channels,
then a sigmoid that gates the block's input; the sums of both stacks at every dilation, in learned shares. With
`model.pool.kind=mean` and cross-entropy (`losses.kl` alone) it is the whole published classifier but for its head.

What differs: utterances have their own length, and padding reaches nothing, where the source pads or cuts all of a
corpus to one length; the coefficients are batch-normalised first, where the source takes them raw; they come from 80
mel bands at 16 kHz and a natural logarithm instead of 128 at 22.05 kHz and decibels (the public code takes librosa's
default windows, 93 ms every 23 ms; these are the paper's); convolutions that normalisation follows have no bias; the
shares start equal instead of random; the head is sermll's two linear maps instead of one.
Training is sermll's: no label smoothing, and Adam's own moments.

Its published results do not compare with those of speaker-disjoint folds: they stem from ten random folds with the
same speakers on both sides, and an earlier public version kept the epoch that scored best on the test fold.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.transforms import MFCC

from sermll.logmel import SAMPLE_RATE_HZ, MaskedBatchNorm, valid_frames

MELS = 80
FFT = 1024
WINDOW = 800
HOP = 200


class MFCCEncoder(nn.Module):
    """MFCC, then gated dilated convolutions forward and backward in time, summed over dilations (TIM-Net).

    Frames hear as far as 2 ** (blocks + 1) - 2 others in each direction: of 8 blocks, 6.4 s.

    Attributes:
        dim: width of a frame, `channels`.

    Args:
        coefficients: MFCC of a frame, the zeroth included, 1 to 80.
        channels: channels of every convolution.
        blocks: blocks of each direction, dilated by 1, 2, 4, ... frames; the source has 8, on IEMOCAP 10.
        dropout: share of channels dropped in training, 0 to below 1.
    """

    def __init__(self, coefficients: int = 39, channels: int = 39, blocks: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = channels
        # Decibels would be floored below the loudest value of the whole batch.
        self.transform = MFCC(
            SAMPLE_RATE_HZ,
            n_mfcc=coefficients,
            log_mels=True,
            melkwargs={
                "n_fft": FFT,
                "win_length": WINDOW,
                "hop_length": HOP,
                "n_mels": MELS,
                "window_fn": torch.hamming_window,
                "pad_mode": "constant",
            },
        )
        self.norm = MaskedBatchNorm(coefficients)
        self.stacks = nn.ModuleList(Stack(coefficients, channels, blocks, dropout, back) for back in (False, True))
        self.shares = nn.Parameter(torch.full((blocks,), 1 / blocks))

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a padded batch of waveforms.

        Args:
            waveform: samples at 16 kHz, float32 [batch, samples], zero after each utterance's end.
            lengths: samples of each utterance, int64 [batch], at least 1.

        Returns:
            Frames, float32 [batch, frames, dim], one for each 12.5 ms and zero in padding, and their mask, bool
            [batch, frames], true where a frame belongs to the utterance.
        """
        with torch.autocast(waveform.device.type, enabled=False):  # 8 bits are too few for sums of squares
            coefficients = self.transform(waveform)
        mask = valid_frames(lengths // HOP + 1, coefficients.shape[2])
        valid = mask.unsqueeze(1).float()
        coefficients = _apply(self.norm, coefficients, valid)
        forward, backward = (stack(coefficients, valid) for stack in self.stacks)
        frames = torch.zeros((), device=waveform.device)
        for share, earlier, later in zip(self.shares, forward, backward, strict=True):
            frames = frames + share * (earlier + later)
        return frames.transpose(1, 2).float(), mask


class Stack(nn.Module):
    """Blocks in one direction of time, each dilated twice as much as the one before.

    Args:
        coefficients: channels that come in.
        channels: channels of the blocks.
        blocks: number of blocks.
        dropout: share of channels dropped in training.
        backward: hear later frames instead of earlier ones.
    """

    def __init__(self, coefficients: int, channels: int, blocks: int, dropout: float, backward: bool) -> None:
        super().__init__()
        self.project = nn.Conv1d(coefficients, channels, 1)
        self.blocks = nn.ModuleList(Block(channels, 2**index, dropout, backward) for index in range(blocks))

    def forward(self, coefficients: Tensor, valid: Tensor) -> list[Tensor]:
        """What each block gives, [batch, channels, frames], zero in padding."""
        maps = self.project(coefficients) * valid
        outputs = []
        for block in self.blocks:
            maps = block(maps, valid)
            outputs.append(maps)
        return outputs


class Block(nn.Module):
    """The temporal-aware block: its input, gated by the sigmoid of two dilated causal convolutions.

    Args:
        channels: channels that come in and go out.
        dilation: frames between the two that a convolution hears.
        dropout: share of channels dropped in training.
        backward: hear the frame and a later one instead of an earlier one.
    """

    def __init__(self, channels: int, dilation: int, dropout: float, backward: bool) -> None:
        super().__init__()
        self.padding = (0, dilation) if backward else (dilation, 0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels, channels, 2, dilation=dilation, bias=False) for _ in range(2)
        )
        self.norms = nn.ModuleList(MaskedBatchNorm(channels) for _ in range(2))
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, maps: Tensor, valid: Tensor) -> Tensor:
        """Gated maps.

        Args:
            maps: [batch, channels, frames], zero in padding.
            valid: float32 [batch, 1, frames], 1 where a frame is no padding, else 0.
        """
        gate = maps
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            gate = convolution(functional.pad(gate, self.padding))
            gate = self.dropout(_apply(norm, gate, valid).relu())
        return maps * gate.sigmoid()


def _apply(norm: nn.Module, maps: Tensor, valid: Tensor) -> Tensor:
    """`MaskedBatchNorm` of maps without bands, [batch, channels, frames]; padding becomes 0."""
    return norm(maps.unsqueeze(3), valid.unsqueeze(3)).squeeze(3) * valid
