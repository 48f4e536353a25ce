"""Calibration against slow loops, grids, scikit-learn and SciPy, and against models known to be calibrated."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import log_loss

from sermll.calibration import (
    TEMPERATURES,
    apply_temperature,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    speaker_bootstrap,
)
from sermll.errors import DataError

pytestmark = pytest.mark.filterwarnings("error")


def drawn(generator: np.random.Generator, count: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are drawn as their softmax says: calibrated at temperature 1."""
    logits = 1.7 * generator.normal(size=(count, classes))
    cumulated = softmax(logits, axis=1).cumsum(axis=1)
    labels = (generator.random((count, 1)) * cumulated[:, -1:] > cumulated).sum(axis=1)
    return logits, labels


def slow_error(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    total = 0.0
    for place in range(bins):
        inside = [
            row for row, said in enumerate(probabilities) if place / bins < max(said) <= (place + 1) / bins + 1e-15
        ]
        if inside:
            right = np.mean([np.argmax(probabilities[row]) == labels[row] for row in inside])
            said = np.mean([max(probabilities[row]) for row in inside])
            total += len(inside) / len(labels) * abs(right - said)
    return float(total)


@pytest.mark.parametrize(("count", "bins"), [(1, 15), (7, 15), (300, 15), (300, 4), (50, 1)])
def test_the_error_equals_a_slow_loop(count: int, bins: int) -> None:
    logits, labels = drawn(np.random.default_rng(count), count)
    probabilities = softmax(2 * logits, axis=1)
    found = expected_calibration_error(probabilities, labels, bins)
    assert found == pytest.approx(slow_error(probabilities, labels, bins))
    assert speaker_bootstrap(probabilities, labels, np.zeros(count), 0, bins).value == pytest.approx(found)


def test_the_error_by_hand() -> None:
    probabilities = [[0.75, 0.25], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0]]
    # Of two ranges the lower has the 0.5 with its upper end: wrong. In the upper, 2 of 3 are right at 2.5 / 3.
    assert expected_calibration_error(probabilities, [0, 1, 1, 1], bins=2) == pytest.approx((0.5 + 0.5) / 4)
    assert expected_calibration_error([[1.0], [1.0]], [0, 0]) == 0


def test_ranges_and_their_intervals_are_those_of_scipy() -> None:
    logits, labels = drawn(np.random.default_rng(0), 400)
    probabilities = softmax(logits, axis=1)
    found = reliability(probabilities, labels)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, 16)
    np.testing.assert_array_equal(found.count, np.histogram(confidence, edges)[0])
    for place, count in enumerate(found.count.tolist()):
        inside = (confidence > edges[place]) & (confidence <= edges[place + 1])
        values = (found.confidence[place], found.accuracy[place], found.low[place], found.high[place])
        if not count:
            assert np.isnan(values).all()
            continue
        interval = stats.binomtest(int(right[inside].sum()), count).proportion_ci(method="wilson")
        assert values == pytest.approx((confidence[inside].mean(), right[inside].mean(), interval.low, interval.high))
    assert (found.count == 0).any() and (found.count > 1).any()


def test_likelihood_is_that_of_scikit_learn() -> None:
    logits, labels = drawn(np.random.default_rng(1), 100)
    probabilities = softmax(logits, axis=1)
    expected = log_loss(labels, probabilities, labels=np.arange(5))
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(expected)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("count", [5, 60, 2000])
def test_the_temperature_is_that_of_a_grid(sharpness: float, count: int) -> None:
    logits, labels = drawn(np.random.default_rng(2), count)
    logits = sharpness * logits
    grid = np.geomspace(*TEMPERATURES, 1001)
    losses = [-np.log(softmax(logits / value, axis=1)[np.arange(count), labels]).mean() for value in grid]
    found = fit_temperature(softmax(logits, axis=1), labels)
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.005)
    if count == 2000:
        assert found == pytest.approx(sharpness, rel=0.1)  # the labels were drawn with 1


@pytest.mark.parametrize("temperature", [*TEMPERATURES, 0.5, 1.0, 3.0])
def test_a_temperature_changes_confidence_and_no_decision(temperature: float) -> None:
    logits, _ = drawn(np.random.default_rng(3), 1000)
    before = softmax(logits, axis=1)
    after = apply_temperature(before, temperature)
    np.testing.assert_allclose(after, softmax(logits / temperature, axis=1), atol=1e-12)
    np.testing.assert_array_equal(after.argmax(axis=1), before.argmax(axis=1))
    assert np.sign(after.max(axis=1).mean() - before.max(axis=1).mean()).round(9) in (0, np.sign(1 - temperature))


def test_extremes_stay_within_bounds() -> None:
    sure, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])
    lowest, highest = TEMPERATURES
    assert fit_temperature(sure, labels) == pytest.approx(lowest, rel=1e-3)  # all right: 0 would be best
    assert fit_temperature(sure, 1 - labels) == pytest.approx(highest, rel=1e-3)  # all wrong
    assert fit_temperature(sure[:1], labels[:1]) == pytest.approx(lowest, rel=1e-3)  # one utterance
    assert fit_temperature(np.ones((4, 1)), np.zeros(4)) == 1  # one class
    assert fit_temperature(np.full((4, 3), 1 / 3), [0, 1, 2, 0]) == 1  # nothing said
    assert fit_temperature(np.repeat(sure, 10, axis=0), np.zeros(20)) > 0  # utterances of one class alone


def test_probabilities_of_exactly_zero() -> None:
    probabilities = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    labels = np.array([0, 2, 1])
    assert negative_log_likelihood(probabilities, labels) == pytest.approx((30 * np.log(10) + np.log(2)) / 3)
    found = fit_temperature(probabilities, labels)
    assert found == pytest.approx(TEMPERATURES[1], rel=1e-3)
    scaled = apply_temperature(probabilities, found)
    assert np.isfinite(scaled).all()
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    np.testing.assert_array_equal(scaled.argmax(axis=1), probabilities.argmax(axis=1))
    np.testing.assert_allclose(apply_temperature(probabilities, 1), probabilities, atol=1e-12)


def test_the_interval_of_calibrated_models_begins_at_zero() -> None:
    """And that of overconfident ones does not; both have the value and, mostly, the truth in them."""
    generator = np.random.default_rng(4)
    speakers = np.repeat(np.arange(20), 50)
    logits, labels = drawn(generator, 200_000)
    truth = expected_calibration_error(softmax(2 * logits, axis=1), labels)
    at_zero = covered = 0
    for _ in range(40):
        logits, labels = drawn(generator, len(speakers))
        for sharpness in (1, 2):
            found = speaker_bootstrap(softmax(sharpness * logits, axis=1), labels, speakers, 0)
            assert found.low is not None and found.high is not None
            assert found.low <= found.value <= found.high
            if sharpness == 1:
                assert found.value < 0.06
                at_zero += found.low == 0
            else:
                covered += 0 < found.low <= truth <= found.high
    assert at_zero >= 36
    assert covered >= 33


def test_the_interval_agrees_with_a_slow_bootstrap() -> None:
    generator = np.random.default_rng(5)
    speakers = generator.integers(0, 9, 400)  # of different numbers of utterances
    logits, labels = drawn(generator, 400)
    probabilities = softmax(2 * logits, axis=1)
    found = speaker_bootstrap(probabilities, labels, speakers, 0, draws=4000)
    members = [np.flatnonzero(speakers == speaker) for speaker in range(9)]
    errors = []
    for _ in range(1500):
        rows = np.concatenate([members[speaker] for speaker in generator.integers(0, 9, 9)])
        errors.append(expected_calibration_error(probabilities[rows], labels[rows]))
    lowest, highest = np.quantile(errors, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((2 * found.value - highest, 2 * found.value - lowest), abs=0.008)
    assert speaker_bootstrap(probabilities, labels, speakers + 70, 0, draws=4000) == found


def test_one_speaker_has_no_interval() -> None:
    found = speaker_bootstrap([[0.8, 0.2], [0.8, 0.2]], [0, 0], [3, 3], 0)
    assert (found.value, found.low, found.high) == (pytest.approx(0.2), None, None)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.zeros((0, 3)), [], r"\(0, 3\) probabilities, \(0,\) labels"),
        (np.ones(3) / 3, [0], r"\(3,\) probabilities"),
        ([[0.5, 0.5]], [0, 1], r"\(1, 2\) probabilities, \(2,\) labels"),
        ([[0.5, 0.5], [3.0, -2.0]], [0, 1], "1 rows are no probabilities, the first is 3, -2"),
        ([[np.nan, 1.0]], [0], "1 rows are no probabilities, the first is nan, 1"),
        ([[2.0, 1.0]], [0], "1 rows are no probabilities, the first is 2, 1"),
        ([[0.5, 0.5]], [2], "label 2 is outside 0 to 1"),
        ([[0.5, 0.5]], [-1], "label -1 is outside 0 to 1"),
    ],
)
def test_what_are_no_probabilities_is_refused(probabilities: np.ndarray, labels: list[int], message: str) -> None:
    for function in (expected_calibration_error, reliability, negative_log_likelihood, fit_temperature):
        with pytest.raises(DataError, match=message):
            function(probabilities, labels)
