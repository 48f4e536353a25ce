"""`sermll predict`: labels with probabilities for recordings, by the models of a finished run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sermll.audio import SAMPLE_RATE_HZ, read_recording, to_float
from sermll.checkpoint import Checkpoint
from sermll.errors import AudioError, ConfigError, DataError, StorageError
from sermll.model import System
from sermll.progress import Progress
from sermll.results import finished_folds, read_model_settings, read_run
from sermll.shards import Prepared
from sermll.tables import leak_notices

_UNTOLD = (
    "The run does not tell whether the ends of its recordings were cut (`sermll prepare --trim-db`), nor do its data "
    "any more: these recordings are heard whole, which its models may not be used to."
)


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
    trim_db: float | None
    """As of `read_recording`: what the models were trained and tested on."""
    leaks: list[str]
    """As in `Answers`."""
    notices: list[str]
    """As in `Answers`."""

    @classmethod
    def load(cls, run_dir: Path, fold: int | None = None, like: str | None = None) -> "Predictor":
        """Load the model of every finished fold, or of one, by the epoch that `protocol.select` chose.

        Args:
            run_dir: the folder printed by `sermll train`.
            fold: which fold's model; None: all.
            like: of joined corpora that were trimmed differently, the one whose recordings those to come are like.

        Raises:
            ConfigError: `like` is needed, unknown, or has no effect.
            DataError: the folder is not a run, or the fold is not finished.
            CheckpointError: a model's file is damaged.
        """
        run, settings, results = read_run(run_dir), read_model_settings(run_dir), finished_folds(run_dir)
        last = len(run["protocol"]["folds"]) - 1
        if fold is not None and not 0 <= fold <= last:
            raise DataError(f"{run_dir}: fold {fold}: protocol {run['protocol']['name']!r} has the folds 0 to {last}")
        chosen = [result for result in results if fold is None or result["fold"] == fold]
        if not chosen:
            finished = ", ".join(str(result["fold"]) for result in results) or "none"
            if fold is None:
                missing = "an ensemble has no models; give one of its members"
                raise DataError(
                    f"{run_dir}: {missing if 'members' in run else 'no fold is finished; go on with `sermll train`'}"
                )
            raise DataError(f"{run_dir}: fold {fold} is not finished (finished: {finished})")
        classes = tuple(run["data"]["classes"])
        trim_db, untold = _trim_db(run["data"], like)
        systems = []
        for result in chosen:
            system = System(settings, len(classes))
            Checkpoint.open(run_dir / f"fold-{result['fold']}" / result["best_checkpoint"]).load_into(system)
            systems.append(system.eval())
        crop_samples = int(settings.data.eval_crop_s * SAMPLE_RATE_HZ)
        leaks = run["protocol"]["leaks"]
        notices = [*leak_notices({run_dir.name: leaks}), *untold]
        return cls(tuple(systems), classes, crop_samples, trim_db, leaks, notices)

    @torch.no_grad()
    def predict(self, path: Path) -> Prediction:
        """Predict one recording; of a very long one, its middle is heard, as in scoring.

        Raises:
            AudioError: the file cannot be used.
        """
        samples = read_recording(path, self.trim_db).samples
        start = max(0, len(samples) - self.crop_samples) // 2
        signal = to_float(samples[start : start + self.crop_samples])
        waveform, lengths = torch.from_numpy(signal)[None], torch.tensor([len(signal)])
        each = [system.recognize(waveform, lengths).logits.softmax(dim=1)[0].numpy() for system in self.systems]
        mean = np.stack(each).astype(np.float64).mean(axis=0)
        probabilities = {name: round(value, 6) for name, value in zip(self.classes, mean.tolist(), strict=True)}
        return Prediction(str(path), self.classes[int(mean.argmax())], probabilities)


def _trim_db(data: dict[str, Any], like: str | None) -> tuple[float | None, list[str]]:
    """How a run's data were trimmed by `sermll prepare`, and what a reader must know where nothing tells it.

    Args:
        data: of run.json; earlier versions did not note it, but the data themselves do while they are there.
        like: as in `Predictor.load`.

    Raises:
        ConfigError: `like` is needed, unknown, or has no effect.
    """
    told = data.get("trim_db") or _trim_db_of(data)
    differ = len(set(told.values())) > 1
    if like is not None and not differ:
        raise ConfigError(f"--like {like}: has no effect; the run tells of no corpora that were trimmed differently")
    if like is not None and like in told:
        return told[like], []
    if differ:
        named = ", ".join(f"{corpus}: {'no' if db is None else f'{db:g} dB'}" for corpus, db in told.items())
        what = "say which of them these recordings are like" if like is None else f"{like} is none of them"
        raise ConfigError(f"the run's corpora were trimmed differently ({named}); {what}, with --like CORPUS")
    return next(iter(told.values()), None), [] if told else [_UNTOLD]


def _trim_db_of(data: dict[str, Any]) -> Mapping[str, float | None]:
    """The same by the prepared data; empty if they are gone, or others by now."""
    try:
        prepared = Prepared.open(data["paths"]) if data.get("paths") else None
    except (DataError, StorageError):
        return {}
    return prepared.trim_db if prepared and prepared.data_hash == data["data_hash"] else {}


def predict(run_dir: Path, files: Sequence[Path], fold: int | None, like: str | None) -> Answers:
    """Predictions for the recordings that can be used, and what is wrong with the others; see `Predictor.load`."""
    predictor = Predictor.load(run_dir, fold, like)
    predictions, faults = [], []
    with Progress("predicting", len(files)) as progress:
        for path in files:
            try:
                predictions.append(predictor.predict(path))
            except AudioError as error:
                faults.append(f"{path}: {error.reason}: {error}")
            progress.advance()
    return Answers(predictions, faults, predictor.leaks, predictor.notices)
