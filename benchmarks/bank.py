"""What a feature bank saves a search: trials with a frozen encoder, on the bank beside re-encoding every epoch.

    python benchmarks/bank.py

Takes about one minute of one core. The encoder has the size of WavLM-Base and random weights; 40 utterances of noise
are trained on and 20 are dev, of 0.3 to 0.8 s each. Trials are two epochs of the same loop with everything it writes:
re-encoding, with the encoder in place and waveforms mixed anew in each epoch; and on a bank of three mixes. The time
to build the bank is told apart, and spread over 20 trials. Rates are of one core that does nothing else: they count
the seconds that it was used, which other work on the machine changes little, and stand beside those that passed.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel
from transformers.utils import logging

from sermll.bank import Bank, estimate_bytes
from sermll.bank_plan import Recipe
from sermll.config import Experiment
from sermll.feed import SPLITS, Batch, Feed, FoldData, make_batch
from sermll.job import FoldJob
from sermll.loop import Batches, train_fold
from sermll.shards import UTTERANCE_FIELDS, ShardFile, write_shard

TRAIN, DEV, CLASSES = 40, 20, 4
EPOCHS, MIXES, TRIALS = 2, 3, 20
CPU = torch.device("cpu")


def write_fold(folder: Path) -> FoldData:
    """Noise as the prepared data of a fold."""
    rng = np.random.default_rng(0)
    audio = [rng.normal(0, 3000, rng.integers(4800, 12_800)).astype(np.int16) for _ in range(TRAIN + DEV)]
    rows: list[dict[str, Any]] = [
        dict.fromkeys(field.name for field in UTTERANCE_FIELDS if field.nullable)
        | {field.name: "" for field in UTTERANCE_FIELDS if pa.types.is_string(field.type)}
        | {"num_samples": len(samples), "duration_s": 0.0, "source_rate_hz": 0, "source_channels": 1, "audio": samples}
        for samples in audio
    ]
    write_shard(folder / "noise.arrow", rows)
    numbers = np.arange(len(audio))
    ids = [str(number) for number in numbers]
    return FoldData(
        key="bench",
        files=(ShardFile(folder / "noise.arrow", ""),),
        names=pa.table(dict.fromkeys(("id", "speaker", "corpus", "audio_sha256"), ids)),
        shard=np.zeros(len(audio), np.int64),
        row=numbers,
        num_samples=np.array([len(samples) for samples in audio]),
        classes=tuple("abcd"),
        labels=numbers % CLASSES,
        targets=np.eye(CLASSES, dtype=np.float32)[numbers % CLASSES],
        rows={"train": numbers[:TRAIN], "dev": numbers[TRAIN:], "test": numbers[:0]},
    )


def in_process(feed: Feed, first_epoch: int, epochs: int, rank: int, workers: int) -> Generator[Batch, None, None]:
    """Waveforms mixed anew in each epoch, by the process that trains."""
    for epoch in range(first_epoch, epochs):
        for split in SPLITS:
            for index in range(feed.plan(split, epoch).num_batches):
                yield make_batch(feed, split, epoch, index, rank, workers)


def train(folder: Path, experiment: Experiment, fold: FoldData, batches: Batches, encoder: nn.Module | None) -> None:
    """Train one trial."""
    folder.mkdir()
    job = FoldJob(folder.name, folder.name, experiment.model_dump(mode="json"), 0, str(folder))
    train_fold(job, fold, batches, CPU, encoder=encoder)


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What the work returns, the seconds of a core that it used, and those that passed."""
    began, began_core = time.perf_counter(), time.process_time()
    result = work()
    return result, time.process_time() - began_core, time.perf_counter() - began


def main() -> None:
    """Print what was measured."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        WavLMModel(WavLMConfig()).save_pretrained(folder / "wavlm")
        encoder = {"kind": "pretrained", "name": str(folder / "wavlm"), "tune": "none"}
        experiment = Experiment.model_validate(
            {"name": "bench", "data": {"path": name}, "model": {"encoder": encoder}, "optim": {"epochs": EPOCHS}}
        )
        fold = write_fold(folder)
        recipe = Recipe.of(experiment, MIXES, (-5.0, 10.0))

        bank, build_s, passed_s = measured(lambda: Bank.build(folder / "banks", fold, recipe, CPU))
        size = sum(path.stat().st_size for path in bank.folder.rglob("*") if path.is_file())
        estimate = estimate_bytes(fold, recipe, bank.dim)
        sys.stdout.write(
            f"bank: {len(bank.entries['row'])} entries of {len(bank.rows)} utterances, {size / 1e6:.1f} MB (estimate "
            f"{estimate / size - 1:+.2%}), built in {build_s:.1f} s ({passed_s:.0f} passed)\n"
        )
        sys.stdout.flush()
        stand_in = bank.stand_in(experiment)
        _, fast_s, fast_passed_s = measured(lambda: train(folder / "fast", experiment, fold, bank.batches, stand_in))
        _, slow_s, slow_passed_s = measured(lambda: train(folder / "slow", experiment, fold, in_process, None))
        for title, seconds, passed_s in (
            ("re-encoding", slow_s, slow_passed_s),
            ("on the bank", fast_s, fast_passed_s),
            (f"and its build spread over {TRIALS} trials", fast_s + build_s / TRIALS, None),
        ):
            passed = "" if passed_s is None else f", {passed_s:.0f} passed"
            sys.stdout.write(
                f"{title}: {3600 / seconds:.0f} trials of {EPOCHS} epochs an hour ({seconds:.1f} s each{passed}), "
                f"ratio {slow_s / seconds:.1f}\n"
            )


if __name__ == "__main__":
    main()
