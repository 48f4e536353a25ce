"""How much of a batch is padding: the epoch plan beside batches drawn at random.

    python benchmarks/padding.py

A few seconds. Lengths are drawn as IEMOCAP's are published (5 531 utterances, mean 4.55 s, 95th percentile 11.1 s, at
most 34.1 s); batches hold 16. Nothing is timed: shares of padded samples are counted over ten epochs of two seeds.
"""

from collections.abc import Iterator

import numpy as np
from side_by_side import Row, Target, alone

from sermll.config import EAM, LAM, Data
from sermll.plan import train_plan

BATCH = 16
UTTERANCES = 5531


def lengths() -> np.ndarray:
    """int64 (utterances,): samples at 16 kHz."""
    seconds = np.clip(np.random.default_rng(0).lognormal(mean=1.23, sigma=0.72, size=UTTERANCES), 0.6, 34.1)
    return (seconds * 16_000).astype(np.int64)


def random_share(heard: np.ndarray, rng: np.random.Generator) -> float:
    """Share of padding when batches are drawn at random."""
    order = rng.permutation(len(heard))
    longest = sum(heard[order[start : start + BATCH]].max() * BATCH for start in range(0, len(order), BATCH))
    return float(1 - heard.sum() / longest)


def rows() -> Iterator[Row]:
    """Whole utterances, and the paper's crops of 6.25 s, under both kinds of mixup."""
    num_samples = lengths()
    cases = {
        "padding, whole utterances": (Data(path="x", crop_s=35), EAM()),
        "padding, crops of 6.25 s": (Data(path="x"), EAM()),
        "padding, crops of 6.25 s, label-adaptive mixup": (Data(path="x"), LAM()),
    }
    for name, (data, mixup) in cases.items():
        plans = [
            train_plan(np.arange(UTTERANCES), num_samples, data, mixup, BATCH, seed, epoch)
            for seed in (0, 1)
            for epoch in range(10)
        ]
        ours = [plan.padding_share() for plan in plans]
        theirs = [random_share(plan.length, np.random.default_rng(index)) for index, plan in enumerate(plans)]
        sorted_share = _sorted_share(num_samples if data.crop_s == 35 else plans[0].length)
        yield Row(
            name=name,
            unit="%",
            against="random batches",
            ours=100 * float(np.mean(ours)),
            peer=100 * float(np.mean(theirs)),
            ratio=float(np.mean(ours) / np.mean(theirs)),
            ratio_is="ours / peer",
            target=Target("<=", 7, of="ours"),
            limit=f"Sorted by length, the same batches in every epoch, it would be {100 * sorted_share:.2f} %; the "
            "rest is the price of batches that differ from epoch to epoch.",
            note=f"Worst of {len(plans)} epochs: {100 * max(ours):.2f} %.",
        )


def _sorted_share(heard: np.ndarray) -> float:
    ordered = np.sort(heard)
    longest = sum(part[-1] * len(part) for part in np.array_split(ordered, -(-len(ordered) // BATCH)))
    return float(1 - heard.sum() / longest)


if __name__ == "__main__":
    alone(rows)
