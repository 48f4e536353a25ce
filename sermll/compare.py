"""`sermll compare`: is one variant better than another, or was it chance?

Runs are paired by utterance and fold. Chance is that of the speakers: intervals resample them, and the permutation test
swaps, speaker by speaker, what the two runs said. Neither knows of seeds: a variant that was trained once may have been
lucky in its initial weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from sermll import metrics
from sermll.errors import DataError
from sermll.results import by_speaker, read_predictions, read_run
from sermll.tables import leak_notices

DRAWS = 10_000
EXACT_SPEAKERS = 12
"""Up to so many speakers every assignment is tried, 2 to their number, instead of drawing some."""
SEED = 0


@dataclass(frozen=True)
class Difference:
    """Mean UA over folds of one run minus that of another."""

    value: float
    low: float
    """95 % interval by bootstrap over speakers, as `high`."""
    high: float
    p: float
    """Of the paired permutation test over speakers, two-sided; not corrected for the number of comparisons."""


def paired_difference(
    first: ArrayLike, second: ArrayLike, folds: ArrayLike, speakers: ArrayLike, seed: int, draws: int = DRAWS
) -> Difference:
    """How much higher the UA of `second` is than that of `first`, on the same utterances.

    Args:
        first: [S, C, C] counts, one matrix for each fold and speaker.
        second: [S, C, C] counts of the same utterances.
        folds: [S] the fold of each matrix.
        speakers: [S] the speaker of each matrix; one of several folds is drawn, and swapped, in all of them at once.
        seed: of the draws.
        draws: how many, for the interval and for the test.

    Raises:
        DataError: fewer than two speakers, or the matrices are not of the same utterances.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    folds = np.asarray(folds)
    if not np.array_equal(first.sum(axis=2), second.sum(axis=2)):
        raise DataError("the two runs were not tested on the same utterances with the same labels")
    owner, count = metrics.numbered(speakers)
    if count < 2:
        raise DataError(f"{count} tested speakers are too few to compare runs; two at least are needed")
    generator = np.random.default_rng(seed)
    whole = np.ones((1, len(first)))
    value = float((metrics.weighted_ua(whole, second, folds) - metrics.weighted_ua(whole, first, folds))[0])
    weights = generator.multinomial(count, np.full(count, 1 / count), draws)[:, owner]
    resampled = metrics.weighted_ua(weights, second, folds) - metrics.weighted_ua(weights, first, folds)
    low, high = np.quantile(resampled, [0.025, 0.975])

    exact = count <= EXACT_SPEAKERS
    swapped = np.array(list(product((0, 1), repeat=count))) if exact else generator.integers(0, 2, (draws, count))
    permuted = _swapped_difference(swapped[:, owner].astype(np.float64), first, second, folds)
    as_far = np.count_nonzero(np.abs(permuted) >= abs(value) - 1e-12)
    # Of all assignments, the one observed is among them; of draws, it is counted as one more.
    p = as_far / len(swapped) if exact else (as_far + 1) / (draws + 1)
    return Difference(value, float(low), float(high), float(p))


def smallest_p(speakers: int) -> float:
    """What the permutation test over so many speakers gives at least, however large a difference."""
    return 2.0 ** (1 - speakers) if speakers <= EXACT_SPEAKERS else 1 / (DRAWS + 1)


def too_few(speakers: int) -> str:
    """What to say where so many tested speakers can show no difference; "" where they can."""
    least = smallest_p(speakers)
    if least < 0.05:
        return ""
    return f"{speakers} tested speakers show no difference, however large: p is {least:.3g} at least"


def _swapped_difference(swapped: NDArray, first: NDArray, second: NDArray, folds: NDArray) -> NDArray[np.float64]:
    """Difference of the mean UA, [draws], when the matrices with 1 in `swapped` [draws, S] change sides."""
    numbers = np.unique(folds)
    total = np.zeros(len(swapped))
    for fold in numbers:
        inside = folds == fold
        one, other = (counts[inside].reshape(inside.sum(), -1) for counts in (first, second))
        moved = swapped[:, inside] @ (other - one)
        shape = (len(swapped), *first.shape[1:])
        total += metrics.ua((other.sum(axis=0) - moved).reshape(shape)) - metrics.ua(
            (one.sum(axis=0) + moved).reshape(shape)
        )
    return total / len(numbers)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: each p as it stands when all of them are asked at once, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted.tolist()


def verdict(difference: Difference, corrected_p: float) -> str:
    """'higher' or 'lower' where the interval leaves out 0 and p, corrected, is below 0.05; or 'no difference shown'."""
    shown = (difference.low > 0 or difference.high < 0) and corrected_p < 0.05
    return ("higher" if difference.value > 0 else "lower") if shown else "no difference shown"


def tested(table: pa.Table) -> list[tuple[int, str, str]]:
    """What predictions must share to be compared: fold, utterance and label of each, in order."""
    return sorted(zip(*(table[name].to_pylist() for name in ("fold", "utterance", "label")), strict=True))


@dataclass(frozen=True)
class Comparison:
    """Runs beside the first of them."""

    runs: tuple[Path, ...]
    ua: tuple[float, ...]
    differences: tuple[Difference, ...]
    """Of every run but the first, to the first."""
    corrected_p: tuple[float, ...]
    """By Holm, over these differences."""
    leaks: tuple[list[str], ...]
    """Of the folds of every run."""

    def as_json(self) -> list[dict[str, Any]]:
        """For programs; the first run has no difference."""
        rows: list[dict[str, Any]] = [
            {"run_dir": str(run), "ua": ua, "difference": None, "leaks": leaks}
            for run, ua, leaks in zip(self.runs, self.ua, self.leaks, strict=True)
        ]
        for row, difference, p in zip(rows[1:], self.differences, self.corrected_p, strict=True):
            row["difference"] = vars(difference) | {"p_holm": p}
        return rows


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare finished runs with the first of them.

    Raises:
        DataError: a folder is no run with results, or the runs were not tested on the same utterances.
    """
    tables = [read_predictions(run) for run in runs]
    keys = [tested(table) for table in tables]
    for run, key in zip(runs[1:], keys[1:], strict=True):
        if key != keys[0]:
            missing = len(set(keys[0]) ^ set(key))
            raise DataError(
                f"{run} and {runs[0]} were not tested on the same utterances in the same folds with the same labels "
                f"({missing} differ); compare runs of one protocol, with the same folds finished"
            )
    classes = sorted(set(tables[0]["label"].to_pylist()).union(*(table["predicted"].to_pylist() for table in tables)))
    counted = [by_speaker(table, classes) for table in tables]
    _, folds, speakers = counted[0]
    whole = np.ones((1, len(folds)))
    ua = [float(metrics.weighted_ua(whole, counts, folds)[0]) for counts, *_ in counted]
    differences = [paired_difference(counted[0][0], counts, folds, speakers, SEED) for counts, *_ in counted[1:]]
    corrected = holm([one.p for one in differences])
    leaks = tuple(read_run(run)["protocol"]["leaks"] for run in runs)
    return Comparison(tuple(runs), tuple(ua), tuple(differences), tuple(corrected), leaks)


def text(found: Comparison) -> str:
    """The comparison for the terminal."""
    names = [run.name for run in found.runs]
    width = max(map(len, names))
    lines = [
        *leak_notices({str(run): leaks for run, leaks in zip(found.runs, found.leaks, strict=True)}),
        f"{'run':<{width}}  {'UA':>6}  {'difference':>10}  {'95 % interval':<16}{'p':>8}{'p (Holm)':>10}",
        f"{names[0]:<{width}}  {100 * found.ua[0]:>6.1f}",
    ]
    for name, ua, difference, p in zip(names[1:], found.ua[1:], found.differences, found.corrected_p, strict=True):
        interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
        scores = f"{100 * ua:>6.1f}  {100 * difference.value:>+10.1f}  {interval:<16}"
        lines.append(f"{name:<{width}}  {scores}{difference.p:>8.4f}{p:>10.4f}  {verdict(difference, p)}")
    return "\n".join(lines)
