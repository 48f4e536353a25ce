"""Can a model's confidence be believed? Of the utterances labelled at 80 %, 80 % should be right.

Confidence is the probability of the predicted class. Utterances are grouped by it into ranges of equal width; the
expected calibration error (ECE) is how far confidence lies from the share that is right, on average over utterances.
A temperature mends what is wrong with all confidences alike: it divides the logits and leaves every decision as it is.
Both are those of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sermll.errors import DataError
from sermll.metrics import Estimate

Array = NDArray[np.float64]

BINS = 15
"""Ranges of confidence, as many as Guo et al. take."""
TEMPERATURES = (0.1, 10.0)
"""The lowest and the highest that are tried. Where every utterance is right, the best would be 0: sure of anything."""
FLOOR = 1e-30
"""Smaller probabilities count as this, as in the loss on dev, so that one zero does not outweigh all else."""
_NORMAL_975 = 1.959963984540054


@dataclass(frozen=True)
class Reliability:
    """Utterances grouped by confidence into B ranges of equal width, 0 to 1; NaN in a range without any."""

    confidence: Array
    """[B] mean confidence, 0 to 1."""
    accuracy: Array
    """[B] share that is right, 0 to 1."""
    low: Array
    """[B] 95 % interval of the share (Wilson, JASA 1927), as `high`; it takes utterances to be independent."""
    high: Array
    count: NDArray[np.int64]
    """[B] utterances."""


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> Reliability:
    """Confidence and accuracy by range of confidence; the upper end of a range belongs to it.

    Args:
        probabilities: [n, C], rows sum to 1.
        labels: [n] true classes, 0 to C - 1.
        bins: B, how many ranges.

    Raises:
        DataError: there are no utterances, or these are no probabilities of their labels.
    """
    confidence, right, place = _judged(probabilities, labels, bins)
    count = np.bincount(place, minlength=bins)
    correct, square = np.bincount(place, right, bins), _NORMAL_975**2
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing is known of an empty range
        mean, share = np.bincount(place, confidence, bins) / count, correct / count
        half = np.sqrt(square * correct * (1 - share) + square**2 / 4) / (count + square)
    centre = (correct + square / 2) / (count + square)
    return Reliability(mean, share, centre - half, centre + half, count)


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """How far confidence lies from accuracy, on average: sum over ranges of n_b / n |accuracy_b - confidence_b|.

    Guo et al., ICML 2017, equation 3. It is never below 0, and of few utterances it is above 0 by chance alone.

    Args:
        probabilities: [n, C], rows sum to 1.
        labels: [n] true classes, 0 to C - 1.
        bins: ranges of confidence, of equal width.

    Returns:
        0 (perfect) to 1.

    Raises:
        DataError: there are no utterances, or these are no probabilities of their labels.
    """
    confidence, right, place = _judged(probabilities, labels, bins)
    return float(np.abs(np.bincount(place, right - confidence, bins)).sum() / len(place))


def speaker_bootstrap(
    probabilities: ArrayLike,
    labels: ArrayLike,
    speakers: ArrayLike,
    seed: int,
    bins: int = BINS,
    draws: int = 1000,
) -> Estimate:
    """Expected calibration error with the 95 % interval that resampling speakers gives it.

    Chance widens gaps, and resampling adds chance to chance: drawn errors lie above the one observed, which lies above
    the true one. So the interval is the basic one, which turns the draws around the value. It begins at 0 where the
    value is no higher than 95 of 100 draws around perfect calibration, and it never leaves out the value.

    Args:
        probabilities: [n, C], rows sum to 1.
        labels: [n] true classes, 0 to C - 1.
        speakers: [n] numbers of the speakers, 0 and up; each is drawn as a whole.
        seed: of the draws.
        bins: ranges of confidence, of equal width.
        draws: how many.

    Raises:
        DataError: there are no utterances, or these are no probabilities of their labels.
    """
    confidence, right, place = _judged(probabilities, labels, bins)
    _, owner = np.unique(np.asarray(speakers), return_inverse=True)
    count = np.bincount(owner)
    gaps = np.bincount(owner * bins + place, right - confidence, len(count) * bins).reshape(len(count), bins)
    value = float(np.abs(gaps.sum(axis=0)).sum() / count.sum())
    if len(count) < 2:
        return Estimate(value, None, None)
    weights = np.random.default_rng(seed).multinomial(len(count), np.full(len(count), 1 / len(count)), draws)
    summed, total = weights @ gaps, weights @ count
    lowest, highest = np.quantile(np.abs(summed).sum(axis=1) / total, [0.025, 0.975])
    by_chance = np.quantile(np.abs(summed - gaps.sum(axis=0)).sum(axis=1) / total, 0.95)
    low = 0.0 if value <= by_chance else max(0.0, 2 * value - highest)
    return Estimate(value, float(low), float(max(value, 2 * value - lowest)))


def negative_log_likelihood(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of -ln(probability of the true class), in nats.

    Args:
        probabilities: [n, C], rows sum to 1.
        labels: [n] true classes, 0 to C - 1.

    Raises:
        DataError: there are no utterances, or these are no probabilities of their labels.
    """
    probabilities, labels = _checked(probabilities, labels)
    return float(-logits(probabilities)[np.arange(len(labels)), labels].mean())


def fit_temperature(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The temperature of least negative log-likelihood, within TEMPERATURES; above 1 it lowers confidence.

    1 where no other is better, as with a single class.

    Args:
        probabilities: [n, C] of utterances that are neither trained on nor tested, rows sum to 1.
        labels: [n] true classes, 0 to C - 1.

    Raises:
        DataError: there are no utterances, or these are no probabilities of their labels.
    """
    from scipy.optimize import minimize_scalar  # half a second to load, which every command would wait for
    from scipy.special import log_softmax

    probabilities, labels = _checked(probabilities, labels)
    told, rows = logits(probabilities), np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(told / np.exp(log_temperature), axis=1)[rows, labels].mean())

    # It has no second minimum: it is convex in 1 / temperature.
    found: Any = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)) if loss(found.x) < loss(0.0) - 1e-12 else 1.0


def apply_temperature(probabilities: ArrayLike, temperature: float) -> Array:
    """Probabilities after dividing the logits by a temperature; the order of the classes stays.

    Args:
        probabilities: [..., C], rows sum to 1.
        temperature: above 0; 1 changes nothing.

    Returns:
        [..., C], rows sum to 1.
    """
    from scipy.special import softmax  # as above

    return softmax(logits(probabilities) / temperature, axis=-1)


def logits(probabilities: ArrayLike) -> Array:
    """Logarithms of probabilities: the logits but for a constant of each utterance, which a softmax takes out again."""
    return np.log(np.maximum(np.asarray(probabilities, np.float64), FLOOR))


def _judged(probabilities: ArrayLike, labels: ArrayLike, bins: int) -> tuple[Array, Array, NDArray[np.int64]]:
    """Of each utterance [n]: confidence, 1 if it is right else 0, and the range of its confidence."""
    probabilities, labels = _checked(probabilities, labels)
    confidence = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    return confidence, right, np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels, np.int64)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise DataError(
            f"calibration: {probabilities.shape} probabilities, {labels.shape} labels: need [n, C] and [n] of at least "
            "one utterance"
        )
    wrong = np.flatnonzero(~((probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) < 1e-3)))
    if len(wrong):
        row = ", ".join(f"{value:.3g}" for value in probabilities[wrong[0]])
        raise DataError(f"calibration: {len(wrong)} rows are no probabilities, the first is {row}")
    outside = labels[(labels < 0) | (labels >= probabilities.shape[1])]
    if len(outside):
        raise DataError(f"calibration: label {outside[0]} is outside 0 to {probabilities.shape[1] - 1}")
    return probabilities, labels
