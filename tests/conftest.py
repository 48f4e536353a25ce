"""Fixtures shared by unit and Ray tests: a tiny corpus in the real EMO-DB grammar, and its prepared form."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from prepared import finish, prepare_without_ray, tiny_settings

from sermll.cluster import QUIET

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Ray reads these when it is imported, by whichever test comes first.
os.environ.update({**QUIET, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_worker_niceness": "0"})

SPEAKERS = ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16")
# One pitch for each emotion of EMO-DB, so that the emotions can be learned.
PITCH_HZ = {"W": 150.0, "L": 220.0, "E": 330.0, "A": 480.0, "F": 700.0, "T": 1000.0, "N": 1500.0}


def tone(frequency_hz: float, duration_s: float, rng: np.random.Generator, rate_hz: int = 16_000) -> np.ndarray:
    """A noisy harmonic tone, float32."""
    time_s = np.arange(int(duration_s * rate_hz)) / rate_hz
    wave = sum(np.sin(2 * np.pi * frequency_hz * k * time_s) / k for k in (1, 2, 3))
    return (0.1 * wave + 0.02 * rng.standard_normal(len(time_s))).astype(np.float32)


def write_corpus(root: Path, speakers: tuple[str, ...] = SPEAKERS, takes: int = 2, seed: int = 0) -> Path:
    """An EMO-DB folder of short tones: `takes` recordings per speaker and emotion."""
    (root / "wav").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for speaker in speakers:
        for letter, frequency_hz in PITCH_HZ.items():
            for take in range(takes):
                sound = tone(frequency_hz * rng.uniform(0.9, 1.1), rng.uniform(0.3, 0.8), rng)
                soundfile.write(root / "wav" / f"{speaker}a0{take + 1}{letter}a.wav", sound, 16_000)
    return root


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten speakers, seven emotions, two takes: 140 clips of 0.3 to 0.8 s. Read-only."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "emodb")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for all tests of a session."""
    import ray

    ray.init(
        address="local",
        num_cpus=5,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=300 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_data(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus as prepared data, made without Ray. Read-only."""
    return prepare_without_ray(tiny_corpus, tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def settings(tiny_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """Build a small experiment on the tiny data: `settings("optim.epochs=1")`."""
    from sermll.config import Experiment, parse_overrides, resolve

    def build(*overrides: str) -> Experiment:
        return resolve(tiny_settings(tiny_data, tmp_path / "runs"), parse_overrides(overrides))

    return build


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Campaigns without Ray and without training; the titles of the folds that were finished."""
    from sermll import campaign

    finished: list[str] = []

    def train_jobs(work: Sequence[tuple[Any, Any]], *_: Any) -> dict[Any, str]:
        for job, data in work:
            finish(job, data)
            finished.append(job.title)
        return {}

    monkeypatch.setattr(campaign, "train_jobs", train_jobs)
    monkeypatch.setattr(campaign, "connected", nullcontext)
    return finished


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, for tests of what a page says."""
    from sermll import pictures

    monkeypatch.setattr(pictures, "save", lambda stem, draw: b"<svg/>")


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen]]:
    """Start `sermll` commands as processes of their own; whatever still runs is killed at the end."""
    started: list[subprocess.Popen] = []

    def start(arguments: list[str]) -> subprocess.Popen:
        log = (tmp_path / f"command-{len(started)}.log").open("wb")
        command = [sys.executable, "-m", "sermll", *arguments]
        started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
