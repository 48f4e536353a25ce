"""Run folders as training leaves them, campaigns of them, and pages as a browser reads them."""

import base64
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sermll import metrics
from sermll.config import resolve, to_yaml


def write_run(
    folder: Path,
    classes: Sequence[str] = ("angry", "neutral", "sad"),
    groups: Sequence[Sequence[str]] = (("a", "b"), ("c", "d"), ("e", "f")),
    corpus: str = "synthetic",
    title: str = "Synthetic",
    protocol: str = "pairs",
    finished: int | None = None,
    epochs: int = 5,
    per_class: int = 4,
    skill: float = 0.7,
    absent: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A run as training leaves it: `finished` folds are done, the next is half way, the rest not begun."""
    generator = np.random.default_rng(seed)
    finished = len(groups) if finished is None else finished
    size = len(classes)
    experiment = resolve(
        {"name": "demo", "data": {"path": "/data/demo"}}, {"optim.epochs": epochs, **(overrides or {})}
    )
    select = experiment.protocol.select
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
            "paths": ["/data/demo"],
            "data_hash": "feedc0dedeadbeef",
            "corpus": corpus,
            "title": title,
            "classes": list(classes),
            "utterances": len(everyone) * size * per_class,
            "hours": 1.25,
            "counts": {name: len(everyone) * per_class for name in classes},
            "targets": "hard",
            "space": "native",
            "members": {name: [name] for name in classes},
            "dropped": {},
            "ties": 0,
        },
        "protocol": {"name": protocol, "hash": "abcdef", "select": select, "leaks": [], "folds": folds},
    }
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")

    rows, scored, matrices, places, names = [], [], [], [], []
    for number, test in enumerate(groups[: finished + 1]):
        place = folder / f"fold-{number}"
        place.mkdir()
        reached = epochs if number < finished else max(1, epochs // 2)
        best = reached - 1 if select == "last" else reached // 2
        epochs_done = history(generator, reached, size, skill)
        held = experiment.resources
        for row in epochs_done:
            gpus = 0.0 if held.gpus_per_worker == "auto" else held.gpus_per_worker
            row |= {"train_s": 15.0, "eval_s": 3.0, "workers": held.most, "device": "cpu"}
            row |= {"cpus_per_worker": held.cpus_per_worker, "gpus_per_worker": gpus}
        (place / "history.json").write_text(json.dumps(epochs_done), encoding="utf-8")
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
            names.append(speaker)
        counts = metrics.confusion(labels, predicted, size)
        scored.append(
            {
                "fold": number,
                **{name: float(metric(counts)) for name, metric in metrics.METRICS.items()},
                "recalls": [None if np.isnan(value) else value for value in metrics.recalls(counts)],
                "confusion": counts.tolist(),
                "epochs": reached,
                "best_epoch": best,
                "last": {name: float(metric(counts)) for name, metric in metrics.METRICS.items()},
                "seconds": 90.0,
            }
        )
        own = [row for row in rows if row["fold"] == number]
        more = 0.0 if select == "last" else 0.3  # is learned between the chosen epoch and the last
        learned = np.random.default_rng([seed, number]).random(len(own)) < more
        said = np.where(learned, labels, predicted).tolist()
        last = [row | {"predicted": classes[answer]} for row, answer in zip(own, said, strict=True)]
        pq.write_table(pa.Table.from_pylist(own), place / "predictions.parquet")
        pq.write_table(pa.Table.from_pylist(last), place / "predictions_last.parquet")
        for row in epochs_done:
            row["test_confusion"] = counts.tolist()
        epochs_done[-1]["test_confusion"] = metrics.confusion(labels, said, size).tolist()
        (place / "history.json").write_text(json.dumps(epochs_done), encoding="utf-8")
        result = {"fold": number, "best_epoch": best, "epochs": reached, "seconds": 90.0, "wall_s": 100.0}
        (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if scored:
        estimates = {
            name: vars(estimate)
            for name, estimate in metrics.speaker_bootstrap(matrices, places, names, seed=0, draws=200).items()
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


def with_models(run: Path) -> Path:
    """Give the finished folds of a run what stands for their models; returns the run."""
    for fold in run.glob("fold-*/result.json"):
        best = fold.parent / "checkpoints" / "epoch-3"
        best.mkdir(parents=True)
        (best / "model.safetensors").write_bytes(f"weights of {run.name} {fold.parent.name}".encode() * 5000)
        change(fold, best_checkpoint="checkpoints/epoch-3")
    (run / "predictions_last.parquet").write_bytes((run / "predictions.parquet").read_bytes())
    return run


def write_campaign(
    folder: Path,
    axes: Mapping[str, Sequence[str]],
    settings: Callable[[dict[str, str]], dict[str, Any] | None],
    failed: Mapping[int, str] | None = None,
) -> Path:
    """A campaign in `folder`/campaign-demo: a run for each cell, with what `settings` says of its labels.

    Args:
        folder: of the runs.
        axes: names of the values of each axis.
        settings: arguments of `write_run` for a cell's labels; None: the run has not begun.
        failed: for every cell whose run has begun, folds and why they failed.
    """
    cells, runs = [], {}
    for values in itertools.product(*axes.values()):
        labels = dict(zip(axes, values, strict=True))
        own = tuple(value for axis, value in labels.items() if axis != "fold")
        begun = own in runs
        run = runs.setdefault(own, folder / f"demo-{len(runs):012d}")
        asked = settings(labels)
        if asked is not None and not begun:
            write_run(run, **asked)
            for fold, why in (failed or {}).items():
                fail(run, fold, why)
        every = list(range(len((asked or {}).get("groups", range(3)))))
        cells.append(
            {
                "labels": labels,
                "overrides": {"optim.epochs": 5, **{f"x.{axis}": value for axis, value in labels.items()}},
                "run_dir": str(run),
                "run_id": run.name[-12:],
                "folds": [int(labels["fold"])] if "fold" in labels else every,
            }
        )
    campaign = folder / "campaign-demo"
    campaign.mkdir(parents=True)
    facts = {
        "kind": "campaign",
        "name": "demo",
        "created": "2026-03-01T12:00:00+00:00",
        "code": {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": False},
        "axes": {axis: list(values) for axis, values in axes.items()},
        "cells": cells,
    }
    (campaign / "campaign.json").write_text(json.dumps(facts), encoding="utf-8")
    return campaign


def history(generator: np.random.Generator, epochs: int, size: int, skill: float) -> list[dict[str, Any]]:
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


class Page(HTMLParser):
    """What a browser would make of a page; refuses tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    @property
    def images(self) -> list[bytes]:
        """The SVG files that the page holds."""
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")) for source in sources]


def fail(run: Path, fold: int, why: str) -> None:
    """Say of a fold that it could not be trained."""
    (run / f"fold-{fold}").mkdir(exist_ok=True)
    (run / f"fold-{fold}" / "failed.json").write_text(json.dumps({"why": why}), encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
