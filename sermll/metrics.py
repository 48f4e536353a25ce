"""Scores from confusion matrices: WA, UA and macro F1, and how far they can be trusted.

Counts add up over batches, workers, speakers and folds; scores do not. So everything is kept as confusion
matrices [..., C, C], rows the true class and columns the predicted one, and a score is taken last, over the
two last axes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sermll.errors import DataError

Array = NDArray[np.float64]


def confusion(labels: ArrayLike, predicted: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Count utterances by true and predicted class, [C, C]; all zeros if there are none.

    Args:
        labels: [n] true classes, 0 to num_classes - 1.
        predicted: [n] predicted classes, likewise.
        num_classes: C.

    Raises:
        DataError: the two differ in length, or a class is out of range.
    """
    labels, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise DataError(
            f"confusion: {labels.shape} labels, {predicted.shape} predictions: need two lists of one length"
        )
    for name, classes in (("label", labels), ("prediction", predicted)):
        wrong = classes[(classes < 0) | (classes >= num_classes)]
        if len(wrong):
            raise DataError(f"confusion: {name} {wrong[0]} is outside 0 to {num_classes - 1}")
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def wa(confusion: ArrayLike) -> Array:
    """Weighted accuracy: the share of utterances classified correctly; NaN if there are none.

    Args:
        confusion: [..., C, C] counts.

    Returns:
        [...] from 0 to 1.
    """
    return _wa(_counts(confusion))


def recalls(confusion: ArrayLike) -> Array:
    """Recall of each class: the share of its utterances classified correctly; NaN for a class without any.

    Args:
        confusion: [..., C, C] counts.

    Returns:
        [..., C] from 0 to 1.
    """
    counts = _counts(confusion)
    return np.moveaxis(_ratio(counts[0], counts[1]), 0, -1)


def ua(confusion: ArrayLike) -> Array:
    """Unweighted accuracy (balanced accuracy, UAR): mean recall of the classes that occur; NaN if none does.

    Args:
        confusion: [..., C, C] counts.

    Returns:
        [...] from 0 to 1.
    """
    return _ua(_counts(confusion))


def macro_f1(confusion: ArrayLike) -> Array:
    """Mean F1 of the classes that occur among labels or predictions, as scikit-learn does; NaN if none does.

    Args:
        confusion: [..., C, C] counts.

    Returns:
        [...] from 0 to 1.
    """
    return _macro_f1(_counts(confusion))


METRICS: dict[str, Callable[[ArrayLike], Array]] = {"ua": ua, "wa": wa, "macro_f1": macro_f1}


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % interval."""

    value: float
    low: float | None
    """None, as `high`, where an interval does not exist: with fewer than two speakers."""
    high: float | None


def speaker_bootstrap(
    confusions: ArrayLike, folds: ArrayLike, speakers: ArrayLike, seed: int, draws: int = 10_000
) -> dict[str, Estimate]:
    """Each score with the interval that resampling speakers gives it.

    Utterances of a speaker are not independent of one another, speakers are: so whole speakers are drawn with
    replacement, as many as there are, and the interval runs from the 2.5th to the 97.5th percentile over the
    draws. A speaker who is tested in several folds is drawn in all of them at once. In the mean over folds, a drawn
    fold counts as much as it is represented: with r_f its speakers drawn over its speakers, the mean is
    sum_f r_f M_f / sum_f r_f, the plain mean over folds for the speakers as they are. Speakers without utterances are
    left out. The interval tells how the score varies with the speakers tested, not with the speakers or the seed
    trained on.

    Args:
        confusions: [S, C, C] counts, one matrix for each fold and speaker.
        folds: [S] the fold of each matrix.
        speakers: [S] the speaker of each matrix, by name or number.
        seed: of the draws.
        draws: how many; memory does not grow with S times `draws`.

    Returns:
        "ua", "wa", "macro_f1": means over folds; "pooled_ua", "pooled_wa", "pooled_macro_f1": from the sum of
        all matrices. Values are NaN if there are no utterances at all.
    """
    confusions, folds = np.asarray(confusions, dtype=np.float64), np.asarray(folds)
    heard = confusions.sum(axis=(1, 2)) > 0
    confusions, folds = confusions[heard], folds[heard]
    owner, count = numbered(np.asarray(speakers)[heard])
    once = _scores(np.ones((1, len(confusions))), confusions, folds)
    values = {name: float(score[0]) for name, score in once.items()}
    if count < 2:
        return {name: Estimate(value, None, None) for name, value in values.items()}

    generator = np.random.default_rng(seed)
    sizes = [min(1000, draws - done) for done in range(0, draws, 1000)]
    parts = [
        _scores(generator.multinomial(count, np.full(count, 1 / count), size)[:, owner], confusions, folds)
        for size in sizes
    ]
    estimates = {}
    for name, value in values.items():
        low, high = np.quantile(np.concatenate([part[name] for part in parts]), [0.025, 0.975])
        estimates[name] = Estimate(value, float(low), float(high))
    return estimates


def numbered(speakers: ArrayLike) -> tuple[NDArray[np.int64], int]:
    """For each of some names its number, counted in the order in which they first appear; and how many there are."""
    _, first, inverse = np.unique(np.asarray(speakers), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse], len(first)


def weighted_ua(weights: ArrayLike, confusions: Array, folds: NDArray) -> Array:
    """Mean UA over folds, [draws], when each matrix counts as often as `weights` [draws, S] say."""
    return _scores(np.asarray(weights), confusions, folds)["ua"]


def _scores(weights: NDArray, confusions: Array, folds: NDArray) -> dict[str, Array]:
    """Every score, [draws], when each matrix counts as often as `weights` [draws, S] say."""
    weights = weights.astype(np.float64).T
    # All that scores need of a matrix, [3, C, S]; draws come last, so that numpy's loops are long.
    parts = _counts(confusions)
    num_classes, numbers = confusions.shape[-1], np.unique(folds)
    counts = np.empty((3, num_classes, len(numbers), weights.shape[1]))
    share = np.empty(counts.shape[2:])
    for place, fold in enumerate(numbers):
        inside = folds == fold
        share[place] = weights[inside].sum(axis=0) / inside.sum()
        product = parts[..., inside].reshape(3 * num_classes, -1) @ weights[inside]  # all draws at once
        counts[:, :, place] = product.reshape(3, num_classes, -1)
    means = {
        name: _ratio(np.where(share > 0, share * score(counts), 0).sum(axis=0), share.sum(axis=0))
        for name, score in _SCORES.items()
    }
    return means | {f"pooled_{name}": score(counts.sum(axis=2)) for name, score in _SCORES.items()}


def _counts(confusions: ArrayLike) -> Array:
    """Of matrices [..., C, C] what scores are made of, [3, C, ...]: utterances right, true and predicted by class."""
    counts = np.asarray(confusions, dtype=np.float64)
    parts = [np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1), counts.sum(axis=-2)]
    return np.moveaxis(np.stack(parts), -1, 1)


def _wa(counts: Array) -> Array:
    return _ratio(counts[0].sum(axis=0), counts[1].sum(axis=0))


def _ua(counts: Array) -> Array:
    return _mean_of_known(_ratio(counts[0], counts[1]))


def _macro_f1(counts: Array) -> Array:
    return _mean_of_known(_ratio(2 * counts[0], counts[1] + counts[2]))


_SCORES: dict[str, Callable[[Array], Array]] = {"ua": _ua, "wa": _wa, "macro_f1": _macro_f1}


def _ratio(part: Array, whole: Array) -> Array:
    """Quotient, NaN where `whole` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean_of_known(values: Array) -> Array:
    """Mean over the first axis of what is not NaN; NaN if nothing is."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=0), known.sum(axis=0).astype(np.float64))
