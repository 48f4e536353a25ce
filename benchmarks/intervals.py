"""Bootstrap intervals of 8 000 predictions over 10 000 draws beside scipy.stats.bootstrap.

    python benchmarks/intervals.py

Half a minute of one core. 8 000 utterances of 12 speakers in six folds and four classes, speakers drawn with
replacement. scipy is asked for the same: its statistic is given the speakers drawn, and counts their predictions. The
second row gives scipy the speakers' confusion matrices and a statistic for all draws at once, which is our own idea
in its hands. Ours gives six scores and counts the predictions too; scipy gives one. Intervals are compared: they must
agree within what 10 000 draws leave to chance.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from side_by_side import Row, Target, alone, compared, in_turns, seconds_of

from sermll import metrics

UTTERANCES, SPEAKERS, CLASSES, DRAWS = 8000, 12, 4, 10_000


def predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Speaker, label and predicted class of each utterance; speakers differ in how well they are recognised."""
    rng = np.random.default_rng(0)
    speaker = np.sort(rng.integers(0, SPEAKERS, UTTERANCES))
    labels = rng.integers(0, CLASSES, UTTERANCES)
    right = rng.random(UTTERANCES) < rng.uniform(0.5, 0.8, SPEAKERS)[speaker]
    return speaker, labels, np.where(right, labels, rng.integers(0, CLASSES, UTTERANCES))


def count(speaker: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Confusion matrix of each speaker, (speakers, classes, classes)."""
    cells = np.bincount((speaker * CLASSES + labels) * CLASSES + predicted, minlength=SPEAKERS * CLASSES**2)
    return cells.reshape(SPEAKERS, CLASSES, CLASSES)


def rows() -> Iterator[Row]:
    """The pooled UA, by scipy in two ways."""
    speaker, labels, predicted = predictions()
    folds = np.arange(SPEAKERS) // 2
    members = [np.flatnonzero(speaker == number) for number in range(SPEAKERS)]
    counts = count(speaker, labels, predicted).astype(np.float64)
    ends: dict[str, tuple[float, float]] = {}

    def ours() -> None:
        cells = count(speaker, labels, predicted)
        found = metrics.speaker_bootstrap(cells, folds, np.arange(SPEAKERS), seed=0, draws=DRAWS)["pooled_ua"]
        assert found.low is not None and found.high is not None
        ends["ours"] = (found.low, found.high)

    def by_prediction(drawn: np.ndarray) -> float:
        rows = np.concatenate([members[number] for number in drawn])
        cells = np.bincount(labels[rows] * CLASSES + predicted[rows], minlength=CLASSES**2)
        return float(metrics.ua(cells.reshape(CLASSES, CLASSES)))

    def by_counts(drawn: np.ndarray, axis: int) -> np.ndarray:
        return metrics.ua(counts[np.moveaxis(drawn, axis, -1)].sum(axis=-3))

    def scipys(statistic: Callable[..., Any], name: str, draws: int = DRAWS, **options: Any) -> Callable[[], None]:
        def run() -> None:
            found = bootstrap(
                (np.arange(SPEAKERS),), statistic, n_resamples=draws, method="percentile", rng=1, **options
            ).confidence_interval
            ends[name] = (float(found.low), float(found.high))

        return run

    found = in_turns(
        {
            "ours": seconds_of(ours),
            "by prediction": seconds_of(scipys(by_prediction, "by prediction", vectorized=False), least_s=0),
            "by counts": seconds_of(scipys(by_counts, "by counts", batch=1000), least_s=0),
        },
        rounds=5,
    )
    apart = max(abs(mine - theirs) for name in ends for mine, theirs in zip(ends["ours"], ends[name], strict=True))
    even = np.full(SPEAKERS, 1 / SPEAKERS)
    drawing_ms = 1000 * seconds_of(lambda: np.random.default_rng(0).multinomial(SPEAKERS, even, DRAWS))()
    note = f"Ends of the intervals differ by {100 * apart:.2f} points of UA at most."
    yield replace(
        compared(
            found,
            "ours",
            "by prediction",
            scale=1000,
            name="bootstrap, 10 000 draws of 8 000 predictions",
            unit="ms",
            against="scipy.stats.bootstrap, the drawn speakers' predictions counted",
            target=Target(">=", 20),
        ),
        limit=f"Drawing the speakers alone takes {drawing_ms:.1f} ms.",
        note=note,
    )
    yield compared(
        found,
        "ours",
        "by counts",
        scale=1000,
        name="bootstrap, the same, scipy given each speaker's matrix",
        unit="ms",
        against="scipy.stats.bootstrap, vectorized over matrices",
    )


if __name__ == "__main__":
    alone(rows)
