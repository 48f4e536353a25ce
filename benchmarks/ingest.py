"""Mixed and padded batches: Ray Data on shards beside torch's DataLoader and Lhotse on recordings.

    python benchmarks/ingest.py

About three minutes on two cores. 1 200 utterances of noise with IEMOCAP's lengths, crops of 6.25 s, half of them mixed,
batches of 16, on a cluster of this machine that is already up. The DataLoader has two workers that decode 16-bit WAV
with soundfile and mix by the same `eam`; it is given our own plan, so that its batches hold the same utterances, mixed
alike, and are compared with ours value by value. Lhotse draws batches by its dynamic bucketing, otherwise the same.
Batches are taken as fast as they come. The first counts from the call until it is there, the rate from then on; CPU
seconds are those of all processes, Ray's own included. Taken so fast, all batches are such as the taking process makes
while Ray Data starts, which never gets ahead; what its workers alone give is told, too.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from noise import recordings, write_fold, write_wavs
from side_by_side import Row, Target, alone, compared, cpu_seconds, missing, optional, seconds_of
from torch.utils.data import DataLoader, Dataset

from sermll import feed as feeding
from sermll.cluster import QUIET, connected
from sermll.config import Experiment
from sermll.feed import Batch, Feed, make_batch, stream
from sermll.mixup import eam, mix_labels

UTTERANCES, EPOCHS, ROUNDS, CROP_S = 1200, 10, 4, 6.25
Item = tuple[np.ndarray, np.ndarray]
"""Samples, float32 (samples,), and label distribution."""


def pad(items: list[Item]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Waveforms, lengths and targets."""
    lengths = torch.tensor([len(signal) for signal, _ in items])
    waveform = torch.zeros(len(items), int(lengths.max()))
    for row, (signal, _) in zip(waveform, items, strict=True):
        row[: len(signal)] = torch.from_numpy(signal)
    return waveform, lengths, torch.from_numpy(np.stack([target for _, target in items])).float()


class Planned(Dataset[Item]):
    """Utterances as a plan says, decoded when they are asked for; indices are epoch and position."""

    def __init__(self, feed: Feed, paths: list[Path]) -> None:
        self.feed, self.paths = feed, paths

    def __getitem__(self, index: tuple[int, int]) -> Item:
        """Decode, crop, mix."""
        epoch, position = index
        plan, fold = self.feed.plan("train", epoch), self.feed.of
        assert plan.mix is not None

        def cropped(place: int) -> np.ndarray:
            start, length = int(plan.crop_start[place]), int(plan.crop_length[place])
            path = self.paths[int(plan.rows[place])]
            return soundfile.read(path, start=start, frames=length, dtype="float32")[0]

        signal, target = cropped(position), fold.targets[plan.rows[position]]
        partner = int(plan.mix.partner[position])
        if partner >= 0:
            drawn = (plan.mix.mix_length, plan.mix.start, plan.mix.partner_start)
            length, start, its = (int(values[position]) for values in drawn)
            signal, share = eam(
                signal, cropped(partner), length, start, its, float(plan.mix.snr_db[position]), out=signal
            )
            target = mix_labels(target, fold.targets[plan.rows[partner]], share)
        return signal, target


def data_loader(feed: Feed, paths: list[Path]) -> Iterable[Any]:
    """All epochs in one pass, so that nothing restarts between them."""
    batches = []
    for epoch in range(EPOCHS):
        plan = feed.plan("train", epoch)
        batches += [[(epoch, int(place)) for place in plan.batch(index)] for index in range(plan.num_batches)]
    return DataLoader(Planned(feed, paths), batch_sampler=batches, num_workers=2, collate_fn=pad)


def lhotse_loader(feed: Feed, paths: list[Path]) -> Iterable[Any]:
    """Dynamic bucketing over crops, each mixed with probability a half with a partner drawn from all."""
    lhotse, sampling = optional("lhotse"), optional("lhotse.dataset")
    crop_s = feed.data.crop_s
    recordings = [lhotse.Recording.from_file(paths[row]) for row in feed.of.rows["train"]]
    cuts = [recording.to_cut().truncate(duration=min(recording.duration, crop_s)) for recording in recordings]

    class Mixed(Dataset[Any]):
        def __getitem__(self, members: Any) -> Any:  # a batch of cuts
            rng = np.random.default_rng()
            items = []
            for cut in members:
                signal, target = cut.load_audio()[0], feed.of.targets[0]
                if rng.random() < 0.5:
                    other = cuts[rng.integers(len(cuts))].load_audio()[0]
                    length = min(1 + int(rng.integers((len(signal) - 1) // 2)), len(other))
                    start, its = rng.integers(len(signal) - length + 1), rng.integers(len(other) - length + 1)
                    signal, share = eam(signal, other, length, int(start), int(its), rng.uniform(-5, 10), out=signal)
                    target = mix_labels(target, feed.of.targets[1], share)
                items.append((signal, target))
            return pad(items)

    sampler = sampling.DynamicBucketingSampler(
        lhotse.CutSet.from_cuts(cuts), max_cuts=feed.batch_size, num_buckets=30, shuffle=True
    )
    loader = DataLoader(Mixed(), sampler=sampler, batch_size=None, num_workers=2, persistent_workers=True)

    def epochs() -> Iterator[Any]:
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            yield from loader

    return epochs()


def measure(start: Callable[[], Iterable[Any]], size: Callable[[Any], int]) -> dict[str, float]:
    """Seconds to the first batch, and utterances and CPU seconds of those after it."""
    began = time.perf_counter()
    batches = iter(start())
    next(batches)
    first = time.perf_counter()
    before, count, each = cpu_seconds(), 0, float("nan")
    for number, batch in enumerate(batches):
        count += size(batch)
        if number % 100 == 99:  # not after the last batch: a loader's processes may have ended by then
            each = (cpu_seconds() - before) / count
    return {"first_s": first - began, "rate": count / (time.perf_counter() - first), "cpu_s": each}


def same(feed: Feed, paths: list[Path]) -> float:
    """Largest difference between the DataLoader's batches and ours, over an epoch."""
    largest = 0.0
    found = iter(data_loader(feed, paths))
    for index in range(feed.plan("train", 0).num_batches):
        (waveform, lengths, targets), batch = next(found), make_batch(feed, "train", 0, index)
        assert np.array_equal(lengths.numpy(), batch.lengths) and np.allclose(targets.numpy(), batch.targets, atol=1e-6)
        largest = max(largest, float(np.abs(waveform.numpy() - batch.waveform).max()))
    return largest


def rows() -> Iterator[Row]:
    """Rate, CPU and first batch, beside both."""
    os.environ.update(QUIET | {"RAY_worker_niceness": "0"})  # as the processes that it is compared with
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio = recordings(UTTERANCES)
        fold, paths = write_fold(folder, audio), write_wavs(folder / "wav", audio)
        experiment = Experiment.model_validate({"name": "x", "data": {"path": name, "crop_s": CROP_S}})
        feed = Feed.for_run("ingest", experiment, fold)
        apart = same(feed, paths)
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "ours": lambda: measure(lambda: _training(feed), lambda batch: len(batch.rows)),
            "DataLoader": lambda: measure(lambda: data_loader(feed, paths), lambda batch: len(batch[1])),
        }
        ways["Ray Data"] = lambda: measure(lambda: _by_ray_data_alone(feed), lambda batch: len(batch.rows))
        if optional("lhotse"):
            ways["Lhotse"] = lambda: measure(lambda: lhotse_loader(feed, paths), lambda batch: len(batch[1]))
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        with connected():
            for index in range(ROUNDS + 1):
                for way in reversed(ways) if index % 2 else ways:
                    values = ways[way]()
                    if index:
                        found[way].append(values)
        yield from _table(found, feed, apart)


def _training(feed: Feed) -> Iterator[Batch]:
    return (batch for batch in stream(feed, 0, EPOCHS) if batch.split == "train")


def _by_ray_data_alone(feed: Feed) -> Iterator[Batch]:
    """The same batches, none made in this process; as `stream`, once Ray Data is ahead."""
    jobs = [
        {"epoch": epoch, "first": first, "last": last}
        for epoch in range(EPOCHS)
        for first, last in feeding._blocks(feed.plan("train", 0), 1)
    ]

    def make(job: dict[str, Any]) -> Iterator[Batch]:
        return (make_batch(feed, "train", job["epoch"], index) for index in range(job["first"], job["last"]))

    for table in feeding._Rest.while_waiting(feeding._tables(jobs, make, lambda: None)):
        for row in range(len(table)):
            yield feeding._from_table(table, row, len(feed.of.classes))


def _table(found: dict[str, list[dict[str, float]]], feed: Feed, apart: float) -> Iterator[Row]:
    in_place = feed.plan("train", 0).num_batches
    alone_s = seconds_of(lambda: [make_batch(feed, "train", 0, index) for index in range(in_place)])()
    floor = (
        f"Made in one process and handed to nobody, an utterance takes {1e3 * alone_s / UTTERANCES:.3f} ms of a core."
    )
    for peer, against in (
        ("DataLoader", "torch DataLoader, 2 workers, soundfile, the same EAM"),
        ("Lhotse", "Lhotse dynamic bucketing, 2 workers, the same EAM"),
    ):
        if peer not in found:
            yield Row(name=f"ingest beside {peer}", unit="", against=against, note=missing("lhotse"))
            continue
        judged = peer == "DataLoader"
        faster = Target(">=", 1.5) if judged else None

        def beside(key: str, ours: str, what: str, peer: str = peer, **about: Any) -> Row:
            columns = {way: [values[key] for values in found[way]] for way in (ours, peer)}
            return compared(columns, ours, peer, name=f"ingest, {what} beside {peer}", **about)

        about: dict[str, Any] = {"against": against, "unit": "utterances/s", "ratio_is": "ours / peer"}
        row = beside("rate", "ours", "rate", target=faster, **about)
        yield replace(row, note=f"Batches are the same to {apart:.1g} of full scale." if judged else "")
        yield beside("rate", "Ray Data", "rate of Ray Data's workers alone", target=faster, **about)
        about |= {"unit": "ms of a core", "ratio_is": "peer / ours", "limit": floor}
        yield beside("cpu_s", "Ray Data", "CPU of Ray Data's workers alone", scale=1000, target=faster, **about)
        about = {"against": against, "unit": "ms", "ratio_is": "ours / peer"}
        soon = Target("<=", 1.5) if judged else None
        yield beside("first_s", "ours", "first batch", scale=1000, target=soon, **about)


if __name__ == "__main__":
    alone(rows)
