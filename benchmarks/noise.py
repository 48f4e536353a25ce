"""Noise of the lengths of speech as recordings and as prepared data, for benchmarks that do not care what is said."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from sermll.audio import SAMPLE_RATE_HZ
from sermll.feed import FoldData
from sermll.shards import UTTERANCE_FIELDS, ShardFile, file_sha256, write_shard

PER_SHARD = 128
CLASSES = tuple("abcd")


def lengths(count: int, seed: int = 0) -> np.ndarray:
    """int64 (count,): samples at 16 kHz, distributed as IEMOCAP's are published.

    Mean 4.55 s, 95th percentile 11.1 s, at most 34.1 s.
    """
    seconds = np.clip(np.random.default_rng(seed).lognormal(mean=1.23, sigma=0.72, size=count), 0.6, 34.1)
    return (seconds * SAMPLE_RATE_HZ).astype(np.int64)


def recordings(count: int) -> list[np.ndarray]:
    """int16 samples of each."""
    rng = np.random.default_rng(1)
    return [rng.normal(0, 3000, length).astype(np.int16) for length in lengths(count).tolist()]


def write_wavs(folder: Path, audio: list[np.ndarray]) -> list[Path]:
    """One file for each."""
    folder.mkdir()
    paths = [folder / f"{number:05d}.wav" for number in range(len(audio))]
    for path, samples in zip(paths, audio, strict=True):
        soundfile.write(path, samples, SAMPLE_RATE_HZ)
    return paths


def write_fold(folder: Path, audio: list[np.ndarray], scored: int = 2) -> FoldData:
    """The same as shards: a fold that trains on all but the last `scored`, half of which are dev and half test."""
    empty = dict.fromkeys(field.name for field in UTTERANCE_FIELDS if field.nullable)
    empty |= {field.name: "" for field in UTTERANCE_FIELDS if pa.types.is_string(field.type) and not field.nullable}
    facts = {"duration_s": 0.0, "source_rate_hz": SAMPLE_RATE_HZ, "source_channels": 1}
    files = []
    for start in range(0, len(audio), PER_SHARD):
        rows = [empty | facts | {"num_samples": len(x), "audio": x} for x in audio[start : start + PER_SHARD]]
        path = folder / f"{len(files):05d}.arrow"
        write_shard(path, rows)
        files.append(ShardFile(path, file_sha256(path)))
    numbers = np.arange(len(audio))
    ids = [str(number) for number in numbers]
    first_dev, first_test = len(audio) - scored, len(audio) - scored // 2
    return FoldData(
        key=str(folder),
        files=tuple(files),
        names=pa.table(dict.fromkeys(("id", "speaker", "corpus", "audio_sha256"), ids)),
        shard=numbers // PER_SHARD,
        row=numbers % PER_SHARD,
        num_samples=np.array([len(samples) for samples in audio]),
        classes=CLASSES,
        labels=numbers % len(CLASSES),
        targets=np.eye(len(CLASSES), dtype=np.float32)[numbers % len(CLASSES)],
        rows={"train": numbers[:first_dev], "dev": numbers[first_dev:first_test], "test": numbers[first_test:]},
    )
