"""`sermll prepare` beside a process pool that decodes, resamples and writes the same bytes.

    python benchmarks/preparing.py

About two minutes on two cores. 4 096 recordings of noise, 16-bit WAV at 48 kHz, of RAVDESS's length (3.7 s), on a
cluster of this machine that is already up. The pool has a process for each core, which is up as well; it reads with
soundfile, resamples with soxr and writes the shards, hashes of every file among their columns. `prepare` does the
same and also checks headers and samples, notes what every shard holds, writes table and manifest, and reads them.
Shards are compared byte by byte. Nodes share nothing but the list of shards: their rates add up as long as the
storage that they read from keeps up.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import count
from math import ceil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import soxr
from side_by_side import Row, Target, alone, compared, in_turns

from sermll.audio import to_int16
from sermll.cluster import QUIET, connected
from sermll.prepare import UTTERANCES_PER_SHARD, prepare
from sermll.rows import Corpus, Utterance
from sermll.shards import file_sha256, shard_name, write_shard

RECORDINGS, RATE_HZ, DURATION_S, ROUNDS = 4096, 48_000, 3.7, 4


def read(root: Path) -> Iterator[Utterance]:
    """One utterance for each file."""
    for path in sorted(root.iterdir()):
        yield Utterance(id=path.stem, path=path.name, label="abcd"[int(path.stem) % 4], speaker=path.stem[:2])


NOISE = Corpus("noise", "Noise", tuple("abcd"), {}, {}, "none", "none", "none", read)


def write_wavs(folder: Path) -> None:
    """The recordings."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(RECORDINGS):
        samples = rng.normal(0, 3000, int(DURATION_S * RATE_HZ)).astype(np.int16)
        soundfile.write(folder / f"{number:05d}.wav", samples, RATE_HZ)


def plain_shard(root: Path, file: Path, utterances: Sequence[Utterance]) -> None:
    """One shard, without checks."""
    rows = []
    for utterance in utterances:
        path = root / utterance.path
        frames, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        signal = soxr.resample(frames.mean(axis=1), rate_hz, 16_000, quality="HQ")
        samples = to_int16(signal[: ceil(len(frames) * 16_000 / rate_hz)])
        facts = {
            "num_samples": len(samples),
            "duration_s": len(samples) / 16_000,
            "source_rate_hz": rate_hz,
            "source_channels": frames.shape[1],
            "source_encoding": "PCM_16",
            "source_sha256": file_sha256(path),
            "audio_sha256": hashlib.sha256(samples.tobytes()).hexdigest(),
            "audio": samples,
        }
        rows.append(asdict(utterance) | facts)
    write_shard(file, rows)


def by_pool(pool: ProcessPoolExecutor, root: Path, out: Path) -> None:
    """All shards."""
    out.mkdir()
    utterances = list(read(root))
    starts = range(0, len(utterances), UTTERANCES_PER_SHARD)
    jobs = [
        pool.submit(plain_shard, root, out / shard_name(index), utterances[start : start + UTTERANCES_PER_SHARD])
        for index, start in enumerate(starts)
    ]
    for job in jobs:
        job.result()


def rows() -> Iterator[Row]:
    """Hours of audio a minute."""
    os.environ.update(QUIET | {"RAY_worker_niceness": "0"})  # as the processes that it is compared with
    cores, hours = os.cpu_count() or 1, RECORDINGS * DURATION_S / 3600
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        folder = Path(name)
        root = folder / "wav"
        write_wavs(root)
        number = count()

        def rate(work: str) -> float:
            out = folder / f"{work}-{next(number)}"
            began = time.perf_counter()
            if work == "ours":
                prepare(NOISE, root, out)
            else:
                by_pool(pool, root, out)
            passed = time.perf_counter() - began
            if not (folder / work).exists():
                out.rename(folder / work)
            else:
                shutil.rmtree(out)
            return 60 * hours / passed

        with connected():
            found = in_turns({"ours": lambda: rate("ours"), "pool": lambda: rate("pool")}, ROUNDS)
        same = all(
            file.read_bytes() == (folder / "ours" / "shards" / file.name).read_bytes()
            for file in (folder / "pool").iterdir()
        )
        assert same, "the pool must write the same shards"
    began = time.process_time()
    signal = np.zeros(int(DURATION_S * RATE_HZ), np.float32)
    for _ in range(20):
        soxr.resample(signal, RATE_HZ, 16_000, quality="HQ")
    resampling = cores * 60 * (20 * DURATION_S / 3600) / (time.process_time() - began)
    yield replace(
        compared(
            found,
            "ours",
            "pool",
            "ours / peer",
            name="prepare, 48 kHz WAV to shards",
            unit="hours of audio a minute",
            against=f"{cores} processes of soundfile and soxr, the same bytes",
            target=Target(">=", 0.85),
        ),
        limit=f"Resampling alone, on all {cores} cores, would do {resampling:.1f} hours a minute.",
    )


if __name__ == "__main__":
    alone(rows)
