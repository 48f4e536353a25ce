"""The epoch plan: which utterances make up each batch, how each is cropped and with what it is mixed.

A plan is a pure function of (training set, settings, seed, epoch). Whoever computes it - one worker or forty, now or
after a restart - gets the same batches and the same mixes, so scheduling cannot change a batch.
"""

from dataclasses import dataclass

import numpy as np

from sermll import config
from sermll.audio import SAMPLE_RATE_HZ
from sermll.mixup import MixDraws, draw_eam, draw_lam

LENGTH_JITTER = 0.06
"""Relative spread put on lengths before sorting: batches differ from epoch to epoch and stay equal in length."""


@dataclass(frozen=True)
class Plan:
    """One pass over some utterances. Vectors are by position in `rows`."""

    rows: np.ndarray
    """int64 (utterances,): row numbers in the prepared table, ascending."""
    crop_start: np.ndarray
    """int64 (utterances,): first sample heard."""
    crop_length: np.ndarray
    """int64 (utterances,): samples heard."""
    mix: MixDraws | None
    """Partners are positions in `rows`; None: nothing is mixed."""
    length: np.ndarray
    """int64 (utterances,): samples after mixing."""
    order: np.ndarray
    """int64 (utterances,): positions, batch after batch."""
    bounds: np.ndarray
    """int64 (batches + 1,): where each batch begins in `order`."""

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self.bounds) - 1

    def batch(self, index: int, rank: int = 0, workers: int = 1) -> np.ndarray:
        """Positions in batch `index` that fall to worker `rank`: every `workers`-th, so that shares match in length."""
        return self.order[self.bounds[index] : self.bounds[index + 1]][rank::workers]

    def padding_share(self) -> float:
        """Share of padded samples among all samples of the batches."""
        longest = np.maximum.reduceat(self.length[self.order], self.bounds[:-1])
        return float(1 - self.length.sum() / (longest * np.diff(self.bounds)).sum())


def train_plan(
    rows: np.ndarray,
    num_samples: np.ndarray,
    data: config.Data,
    mixup: config.EAM | config.LAM | config.NoMixup,
    batch_size: int,
    seed: int,
    epoch: int,
) -> Plan:
    """Plan one training epoch: every utterance once, cropped at random, mixed, in batches of like length.

    Args:
        rows: int64 (utterances,) ascending row numbers of the training set.
        num_samples: int64 (utterances,) their lengths in samples.
        data: crop lengths.
        mixup: how to mix.
        batch_size: utterances of the global batch; batches differ by one at most.
        seed: the experiment's seed.
        epoch: 0-based.
    """
    # One row of numbers per utterance, in the order of the training set: what happens to an utterance does not
    # depend on the batch or the worker it falls to.
    uniforms = np.random.default_rng([seed, epoch]).random((len(rows), 8))
    crop_length = np.minimum(num_samples, int(data.crop_s * SAMPLE_RATE_HZ))
    crop_start = np.floor(uniforms[:, 0] * (num_samples - crop_length + 1)).astype(np.int64)
    length = crop_length
    mix = None
    if isinstance(mixup, config.EAM):
        mix = draw_eam(uniforms[:, 2:], crop_length, mixup.probability, mixup.snr_db)
    elif isinstance(mixup, config.LAM):
        mix = draw_lam(uniforms[:, 2:], crop_length, mixup.probability)
        length = np.where(mix.partner >= 0, np.maximum(crop_length, crop_length[mix.partner]), crop_length)
    sort_key = length * (1 + LENGTH_JITTER * (uniforms[:, 1] - 0.5))
    bounds = _bounds(len(rows), batch_size)
    batches = np.split(np.argsort(sort_key, kind="stable"), bounds[1:-1])
    shuffled = np.random.default_rng([seed, epoch, 1]).permutation(len(batches))
    order = np.concatenate([batches[index] for index in shuffled])
    sizes = np.array([len(batches[index]) for index in shuffled])
    return Plan(rows, crop_start, crop_length, mix, length, order, np.concatenate([[0], np.cumsum(sizes)]))


def eval_plan(rows: np.ndarray, num_samples: np.ndarray, data: config.Data, batch_size: int) -> Plan:
    """Plan scoring: every utterance once, unmixed, its middle if it is longer than the crop, sorted by length."""
    length = np.minimum(num_samples, int(data.eval_crop_s * SAMPLE_RATE_HZ))
    order = np.argsort(length, kind="stable")
    return Plan(rows, (num_samples - length) // 2, length, None, length, order, _bounds(len(rows), batch_size))


def _bounds(count: int, batch_size: int) -> np.ndarray:
    """Cut `count` into as few batches as possible, their sizes as equal as possible."""
    num_batches = max(1, -(-count // batch_size))
    return np.round(np.linspace(0, count, num_batches + 1)).astype(np.int64)
