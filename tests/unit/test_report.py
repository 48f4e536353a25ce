"""Reports on run folders written here: what they say, what they refuse, and that every picture can be drawn."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score

from sermll import metrics, pictures, report
from sermll.config import resolve, to_yaml
from sermll.errors import DataError

RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


def write_run(
    folder: Path,
    classes=("angry", "neutral", "sad"),
    groups=(("a", "b"), ("c", "d"), ("e", "f")),
    corpus="synthetic",
    title="Synthetic",
    protocol="pairs",
    finished=None,
    epochs=5,
    per_class=4,
    skill=0.7,
    absent=(),
    overrides=None,
    seed=0,
):
    """A run folder as training leaves it; `finished` folds are done, the next one is half way, the others unborn."""
    generator = np.random.default_rng(seed)
    finished = len(groups) if finished is None else finished
    size = len(classes)
    experiment = resolve(
        {"name": "demo", "data": {"path": "/data/demo"}}, {"optim.epochs": epochs} | (overrides or {})
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    everyone = [speaker for group in groups for speaker in group]
    folds = []
    for number, test in enumerate(groups):
        dev = groups[(number + 1) % len(groups)][:1] if len(groups) > 1 else ["dev"]
        train = [speaker for speaker in everyone if speaker not in test and speaker not in dev] or ["train"]
        folds.append({"fold": number, "test": list(test), "dev": list(dev), "train": train})
    facts = {
        "run_id": folder.name[-12:],
        "name": "demo",
        "created": "2026-03-01T12:00:00+00:00",
        "code": {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": False},
        "versions": {"torch": "2.12.1", "ray": "2.60.0"},
        "data": {
            "path": "/data/demo",
            "data_hash": "feedc0dedeadbeef",
            "corpus": corpus,
            "title": title,
            "classes": list(classes),
            "utterances": len(everyone) * size * per_class,
            "hours": 1.25,
            "counts": {name: len(everyone) * per_class for name in classes},
        },
        "protocol": {"name": protocol, "dev_speakers": 1, "hash": "abcdef", "folds": folds},
    }
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")

    rows, scored, matrices, places = [], [], [], []
    for number, test in enumerate(groups[: finished + 1]):
        place = folder / f"fold-{number}"
        place.mkdir()
        reached = epochs if number < finished else max(1, epochs // 2)
        (place / "history.json").write_text(
            json.dumps(history(generator, reached, size, skill)), encoding="utf-8"
        )
        if number >= finished:
            break
        centers = generator.normal(size=(size, 8)) * 3 * skill
        labels, predicted = [], []
        for speaker in test:
            ability = np.clip(skill + generator.normal() * 0.1, 0.05, 1)
            confusion = np.zeros((size, size), dtype=int)
            for label in (label for label in range(size) if label not in absent for _ in range(per_class)):
                guess = label if generator.random() < ability else int(generator.integers(size))
                confusion[label, guess] += 1
                labels.append(label)
                predicted.append(guess)
                rows.append(
                    {
                        "utterance": f"u{len(rows)}",
                        "speaker": speaker,
                        "fold": number,
                        "label": classes[label],
                        "predicted": classes[guess],
                        "probabilities": np.full(size, 1 / size, dtype=np.float32),
                        "embedding": (centers[label] + generator.normal(size=8)).astype(np.float32),
                    }
                )
            matrices.append(confusion)
            places.append(number)
        counts = metrics.confusion(labels, predicted, size)
        scored.append(
            {
                "fold": number,
                **{name: float(metric(counts)) for name, metric in metrics.METRICS.items()},
                "recalls": [None if np.isnan(value) else value for value in metrics.recalls(counts)],
                "confusion": counts.tolist(),
                "epochs": reached,
                "best_epoch": reached // 2,
                "last": {name: float(metric(counts)) for name, metric in metrics.METRICS.items()},
                "seconds": 90.0,
            }
        )
        (place / "result.json").write_text(
            json.dumps({"fold": number, "best_epoch": reached // 2, "epochs": reached}), encoding="utf-8"
        )
    if scored:
        estimates = {
            name: vars(estimate)
            for name, estimate in metrics.speaker_bootstrap(matrices, places, seed=0, draws=200).items()
        }
        scores = {
            "folds": scored,
            "selected": estimates,
            "last": estimates,
            "complete": finished == len(groups),
        }
        (folder / "metrics.json").write_text(json.dumps(scores), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(rows), folder / "predictions.parquet")
    return folder


def history(generator, epochs, size, skill):
    """Plausible curves: losses that fall, a dev UA that rises."""
    rows = []
    for epoch in range(epochs):
        left = np.exp(-3 * skill * (epoch + 1) / max(epochs, 8))
        raw = {
            "kl": np.log(size) * left * generator.uniform(0.9, 1.1),
            "focal": 0.7 * np.log(size) * left * generator.uniform(0.9, 1.1),
            "center": 60 * left * generator.uniform(0.9, 1.1),
            "supcon": 7.5 - 2 * (1 - left) * generator.uniform(0.9, 1.1),
        }
        weight = {"kl": 1 / np.log(size), "focal": 1 / np.log(size), "center": 0.002, "supcon": 0.12}
        rows.append(
            {
                "epoch": epoch,
                "loss": sum(weight[name] * raw[name] for name in raw),
                **{f"loss_{name}": value for name, value in raw.items()},
                **{f"weight_{name}": value for name, value in weight.items()},
                "lr": 1e-4,
                "dev_loss": np.log(size) * (0.3 + 0.7 * left) * generator.uniform(0.95, 1.05),
                "dev_ua": float(np.clip((1 - left) * skill + left / size + generator.normal() * 0.03, 0, 1)),
                "dev_wa": 0.5,
            }
        )
    return rows
