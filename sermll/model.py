"""The recogniser: encoder, pooling over frames, two linear heads; and recogniser with objective, for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from sermll.gather import Gathered
from sermll.losses import Objective
from sermll.pooling import POOLS
from sermll.pretrained import PretrainedEncoder

if TYPE_CHECKING:
    from sermll import config


def from_scratch() -> dict[str, type[nn.Module]]:
    """Encoders without pre-training, by `kind`; their arguments are the settings of the section."""
    # Imported when one is asked for: only they need torchaudio.
    from sermll.logmel import LogMelEncoder
    from sermll.mfcc import MFCCEncoder
    from sermll.resnet import ResNetEncoder

    return {"logmel": LogMelEncoder, "mfcc": MFCCEncoder, "resnet": ResNetEncoder}


class Output(NamedTuple):
    """What the recogniser says of a batch."""

    logits: Tensor
    """(batch, classes)"""
    embedding: Tensor
    """z, (batch, embedding_dim)"""
    frames: Tensor
    """h, (batch, frames, embedding_dim): the frame projections that SupCon compares."""
    mask: Tensor
    """bool (batch, frames): True where a frame is heard, not padded."""


class Recognizer(nn.Module):
    """Waveforms to logits: encoder, pooling (FLAM by default), projection to z, classification."""

    def __init__(
        self,
        settings: config.Model,
        num_classes: int,
        separate_frames: bool = False,
        encoder: nn.Module | None = None,
    ) -> None:
        """Parameters are drawn from torch's default generator.

        Args:
            settings: the section of the experiment.
            num_classes: width of the logits.
            separate_frames: project frames by a linear map of their own instead of the embedding's.
            encoder: takes the place of the configured one, which is then not made; its `dim` is the width of a frame.
        """
        super().__init__()
        self.encoder = _encoder(settings.encoder) if encoder is None else encoder
        dim = cast(int, self.encoder.dim)
        sizes = (dim, settings.pool.heads) if settings.pool.kind == "flam" else ()
        self.pool = POOLS[settings.pool.kind](*sizes)
        self.project = nn.Linear(dim, settings.embedding_dim)
        self.project_frames = nn.Linear(dim, settings.embedding_dim) if separate_frames else None
        self.classify = nn.Linear(settings.embedding_dim, num_classes)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Output:
        """Recognise a batch.

        Args:
            waveform: float32 (batch, samples) at 16 kHz, zero-padded; or what the given encoder reads.
            lengths: int64 (batch,) valid samples of each utterance.
        """
        frames, mask = self.encoder(waveform, lengths)
        pooled, frames = self.pool(frames, mask)
        embedding = self.project(pooled)
        return Output(self.classify(embedding), embedding, (self.project_frames or self.project)(frames), mask)


def _encoder(settings: config.Pretrained | config.LogMel | config.MFCC | config.ResNet) -> nn.Module:
    if settings.kind == "pretrained":
        return PretrainedEncoder(settings)
    return from_scratch()[settings.kind](**settings.model_dump(exclude={"kind"}))


class System(nn.Module):
    """Recogniser and objective in one module, so that data-parallel training keeps all parameters equal.

    With `losses.gather` every worker computes the objective of the whole global batch from all workers' outputs, so
    that N workers compute what one would, but for dropout and masks, which each draws for itself. Without it, SupCon
    compares the frames of each worker's share alone, and the shares are averaged by their number of utterances.
    """

    def __init__(self, settings: config.Experiment, num_classes: int, encoder: nn.Module | None = None) -> None:
        """Parameters are drawn from torch's default generator, which the caller seeds; `encoder` as in `Recognizer`."""
        super().__init__()
        supcon = settings.losses.supcon
        self.recognizer = Recognizer(
            settings.model,
            num_classes,
            separate_frames=supcon is not None and supcon.projection == "separate",
            encoder=encoder,
        )
        self.objective = Objective(settings.losses, num_classes, settings.model.embedding_dim)
        self._gathers = settings.losses.gather
        self._precision = settings.optim.precision

    def forward(self, waveform: Tensor, lengths: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss terms of the global batch; "loss" is their weighted sum, the one to differentiate.

        Args:
            waveform: float32 (batch, samples): this worker's share.
            lengths: int64 (batch,).
            target: float32 (batch, classes) label distributions.
        """
        output = self.recognize(waveform, lengths)
        shares = Gathered(output.frames)
        if not self._gathers:
            terms = self.objective(output.logits, output.embedding, output.frames, output.mask, target)
            return {name: shares.weigh(term) for name, term in terms.items()}
        return self.objective(
            shares.rows(output.logits),
            shares.rows(output.embedding),
            shares.frames(output.frames),
            shares.frames(output.mask),
            shares.rows(target),
        )

    def recognize(self, waveform: Tensor, lengths: Tensor) -> Output:
        """The recogniser at the configured precision; losses are always computed in float32."""
        enabled = self._precision == "bf16"
        with torch.autocast(waveform.device.type, dtype=torch.bfloat16, enabled=enabled):
            output = self.recognizer(waveform, lengths)
        return Output(output.logits.float(), output.embedding.float(), output.frames.float(), output.mask)
