"""`sermll predict`: labels with probabilities for recordings, by the models of a finished run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sermll.audio import SAMPLE_RATE_HZ, read_recording, to_float
from sermll.checkpoint import Checkpoint
from sermll.errors import AudioError, DataError
from sermll.model import System
from sermll.progress import Progress
from sermll.results import finished_folds, read_model_settings, read_run
from sermll.tables import leak_notices


@dataclass(frozen=True)
class Prediction:
    """What a run's models say of one recording."""

    file: str
    label: str
    probabilities: dict[str, float]
    """By class, in class order."""


@dataclass(frozen=True)
class Answers:
    """What `predict` found."""

    predictions: list[Prediction]
    faults: list[str]
    """What is wrong with the other recordings."""
    leaks: list[str]
    """What the folds of the models have on two sides, each in words."""
    notices: list[str]
    """What a reader must know before trusting the predictions."""

    def as_json(self) -> list[dict[str, Any]]:
        """For programs."""
        return [vars(prediction) | {"leaks": self.leaks} for prediction in self.predictions]


@dataclass(frozen=True)
class Predictor:
    """The models of a run's folds; their probabilities are averaged."""

    systems: tuple[System, ...]
    classes: tuple[str, ...]
    crop_samples: int
    leaks: list[str]
    """As in `Answers`."""

    @classmethod
    def load(cls, run_dir: Path, fold: int | None = None) -> "Predictor":
        """Load the dev-selected model of every finished fold, or of one.

        Raises:
            DataError: the folder is not a run, or the fold is not finished.
            CheckpointError: a model's file is damaged.
        """
        run, settings, results = read_run(run_dir), read_model_settings(run_dir), finished_folds(run_dir)
        chosen = [result for result in results if fold is None or result["fold"] == fold]
        if not chosen:
            finished = ", ".join(str(result["fold"]) for result in results) or "none"
            wanted = "no fold is finished" if fold is None else f"fold {fold} is not finished"
            raise DataError(f"{run_dir}: {wanted} (finished: {finished})")
        classes = tuple(run["data"]["classes"])
        systems = []
        for result in chosen:
            system = System(settings, len(classes))
            Checkpoint.open(run_dir / f"fold-{result['fold']}" / result["best_checkpoint"]).load_into(system)
            systems.append(system.eval())
        crop_samples = int(settings.data.eval_crop_s * SAMPLE_RATE_HZ)
        return cls(tuple(systems), classes, crop_samples, run["protocol"]["leaks"])

    @torch.no_grad()
    def predict(self, path: Path) -> Prediction:
        """Predict one recording; of a very long one, its middle is heard, as in scoring.

        Raises:
            AudioError: the file cannot be used.
        """
        samples = read_recording(path).samples
        start = max(0, len(samples) - self.crop_samples) // 2
        signal = to_float(samples[start : start + self.crop_samples])
        waveform, lengths = torch.from_numpy(signal)[None], torch.tensor([len(signal)])
        each = [system.recognize(waveform, lengths).logits.softmax(dim=1)[0].numpy() for system in self.systems]
        mean = np.stack(each).astype(np.float64).mean(axis=0)
        probabilities = {name: round(value, 6) for name, value in zip(self.classes, mean.tolist(), strict=True)}
        return Prediction(str(path), self.classes[int(mean.argmax())], probabilities)


def predict(run_dir: Path, files: Sequence[Path], fold: int | None) -> Answers:
    """Predictions for the recordings that can be used, and what is wrong with the others."""
    predictor = Predictor.load(run_dir, fold)
    predictions, faults = [], []
    with Progress("predicting", len(files)) as progress:
        for path in files:
            try:
                predictions.append(predictor.predict(path))
            except AudioError as error:
                faults.append(f"{path}: {error.reason}: {error}")
            progress.advance()
    return Answers(predictions, faults, predictor.leaks, leak_notices({run_dir.name: predictor.leaks}))
