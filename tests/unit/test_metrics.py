"""Scores against scikit-learn and hand values, intervals against a slow loop and SciPy."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    recall_score,
)

from sermll.errors import DataError
from sermll.metrics import Estimate, confusion, macro_f1, recalls, speaker_bootstrap, ua, wa

HAND = np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
"""Four utterances of each of two classes; the third class neither occurs nor is predicted."""

pytestmark = pytest.mark.filterwarnings("error")


def speakers_of(
    generator: np.random.Generator, folds: int = 3, per_fold: int = 4, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Confusions of speakers who differ in how well they are recognised, and their folds."""
    fold = np.repeat(np.arange(folds), per_fold)
    confusions = generator.poisson(2, size=(len(fold), classes, classes))
    skill = generator.poisson(6, size=len(fold))
    confusions[:, np.arange(classes), np.arange(classes)] += skill[:, None]
    return confusions, fold


def slow_scores(confusions: np.ndarray, folds: list[int], weights: list[int]) -> dict[str, float]:
    """All six scores of one draw, with the speakers repeated one by one."""
    repeated = [speaker for speaker, times in enumerate(weights) for _ in range(times)]
    values = {}
    for name, metric in (("ua", ua), ("wa", wa), ("macro_f1", macro_f1)):
        total = share = 0.0
        for fold in sorted(set(folds)):
            drawn = [s for s in repeated if folds[s] == fold]
            if drawn:
                represented = len(drawn) / sum(f == fold for f in folds)
                total += represented * float(metric(sum(confusions[s] for s in drawn)))
                share += represented
        values[name] = total / share
        values[f"pooled_{name}"] = float(metric(sum(confusions[s] for s in repeated)))
    return values


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_sklearn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    classes = int(generator.integers(2, 6))
    n = int(generator.integers(1, 30))  # few enough that classes are absent at times
    labels, predicted = generator.integers(classes, size=(2, n))
    counts = confusion(labels, predicted, classes)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, confusion_matrix(labels, predicted, labels=np.arange(classes)))
    assert wa(counts) == pytest.approx(accuracy_score(labels, predicted))
    assert macro_f1(counts) == pytest.approx(f1_score(labels, predicted, average="macro"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn: predicted classes that do not occur
        assert ua(counts) == pytest.approx(balanced_accuracy_score(labels, predicted))
    present = np.unique(labels)
    expected = [recall_score(labels == c, predicted == c) for c in present]
    np.testing.assert_allclose(recalls(counts)[present], expected)
    assert np.isnan(np.delete(recalls(counts), present)).all()


def test_scores_by_hand() -> None:
    np.testing.assert_array_equal(recalls(HAND), [0.75, 0.5, np.nan])
    assert wa(HAND) == pytest.approx(5 / 8)
    assert ua(HAND) == pytest.approx(0.625)
    assert macro_f1(HAND) == pytest.approx((6 / 9 + 4 / 7) / 2)


def test_imbalance_separates_wa_from_ua() -> None:
    counts = np.array([[90, 0], [10, 0]])  # everything called the frequent class
    assert wa(counts) == pytest.approx(0.9)
    assert ua(counts) == pytest.approx(0.5)


def test_one_class() -> None:
    counts = confusion([1, 1, 1], [1, 1, 0], 3)
    assert ua(counts) == wa(counts) == pytest.approx(2 / 3)
    assert macro_f1(counts) == pytest.approx((0.8 + 0) / 2)  # class 0 was predicted, so it counts, as in sklearn


def test_empty() -> None:
    counts = confusion([], [], 3)
    np.testing.assert_array_equal(counts, np.zeros((3, 3)))
    for metric in (wa, ua, macro_f1):
        assert np.isnan(metric(counts))
    assert np.isnan(recalls(counts)).all()


def test_leading_axes() -> None:
    counts = np.random.default_rng(0).integers(0, 3, size=(5, 2, 4, 4))
    counts[0, 0] = 0
    counts[1, 1, 2] = 0
    for metric in (wa, ua, macro_f1, recalls):
        expected = [[metric(one) for one in row] for row in counts]
        np.testing.assert_array_equal(metric(counts), expected)


def test_confusions_add_up() -> None:
    labels, predicted = np.random.default_rng(1).integers(3, size=(2, 50))
    parts = confusion(labels[:20], predicted[:20], 3) + confusion(labels[20:], predicted[20:], 3)
    np.testing.assert_array_equal(parts, confusion(labels, predicted, 3))


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([0, 3], [0, 1], "label 3"),
        ([0, -1], [0, 1], "label -1"),
        ([0, 1], [0, 7], "prediction 7"),
        ([0, 1], [0], "one length"),
        ([[0, 1]], [[0, 1]], "one length"),
    ],
)
def test_confusion_refuses(labels: list, predicted: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        confusion(labels, predicted, 3)


def test_bootstrap_equals_a_slow_loop() -> None:
    confusions, folds = speakers_of(np.random.default_rng(2))
    folds[0] = 1  # folds of unequal size
    estimates = speaker_bootstrap(confusions, folds, range(len(folds)), seed=5, draws=1300)
    weights = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=1300)
    slow = [slow_scores(confusions, folds.tolist(), drawn) for drawn in weights.tolist()]
    for name, estimate in estimates.items():
        low, high = np.percentile([one[name] for one in slow], [2.5, 97.5])
        assert estimate.low == pytest.approx(low, abs=1e-12)
        assert estimate.high == pytest.approx(high, abs=1e-12)
    assert set(estimates) == {"ua", "wa", "macro_f1", "pooled_ua", "pooled_wa", "pooled_macro_f1"}


def test_a_speaker_of_several_folds_is_drawn_in_all_of_them_at_once() -> None:
    confusions, folds = speakers_of(np.random.default_rng(8))
    names = list("dcbadcbaxyzw")  # of the folds 0 and 1 the same four
    estimates = speaker_bootstrap(confusions, folds, names, seed=5, draws=1300)
    order = list(dict.fromkeys(names))
    drawn = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=1300)
    slow = [
        slow_scores(confusions, folds.tolist(), [times[order.index(name)] for name in names])
        for times in drawn.tolist()
    ]
    for name, estimate in estimates.items():
        assert (estimate.low, estimate.high) == pytest.approx(np.percentile([one[name] for one in slow], [2.5, 97.5]))
    alone = speaker_bootstrap(confusions, folds, range(12), seed=5, draws=1300)
    assert estimates["ua"].value == alone["ua"].value
    assert speaker_bootstrap(confusions[[0, 4]], [0, 1], ["a", "a"], seed=0)["ua"].low is None  # one speaker


def test_draws_do_not_depend_on_what_speakers_are_called() -> None:
    confusions, folds = speakers_of(np.random.default_rng(9))
    found = [
        speaker_bootstrap(confusions, folds, names, seed=1, draws=100) for names in (range(12), list("lkjihgfedcba"))
    ]
    assert found[0] == found[1]


def test_bootstrap_values_are_the_plain_scores() -> None:
    confusions, folds = speakers_of(np.random.default_rng(3))
    estimates = speaker_bootstrap(confusions, folds, range(len(folds)), seed=0, draws=200)
    for name, metric in (("ua", ua), ("wa", wa), ("macro_f1", macro_f1)):
        of_folds = [float(metric(confusions[folds == fold].sum(axis=0))) for fold in range(3)]
        assert estimates[name].value == pytest.approx(np.mean(of_folds))
        assert estimates[f"pooled_{name}"].value == pytest.approx(float(metric(confusions.sum(axis=0))))
    for estimate in estimates.values():
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize(("name", "metric"), [("ua", ua), ("wa", wa), ("macro_f1", macro_f1)])
def test_bootstrap_agrees_with_scipy(name: str, metric: Callable[..., np.ndarray]) -> None:
    confusions, folds = speakers_of(np.random.default_rng(4), folds=4, per_fold=6)
    estimate = speaker_bootstrap(confusions, folds, range(len(folds)), seed=1)[f"pooled_{name}"]

    def statistic(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        return metric(confusions[rows].sum(axis=axis - 2 if axis < 0 else axis))

    expected = stats.bootstrap(
        (np.arange(24),), statistic, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert estimate.low is not None
    assert estimate.high is not None
    width = expected.high - expected.low
    assert estimate.low == pytest.approx(expected.low, abs=0.05 * width)
    assert estimate.high == pytest.approx(expected.high, abs=0.05 * width)


def test_bootstrap_is_repeatable_and_seeded() -> None:
    confusions, folds = speakers_of(np.random.default_rng(5))
    first = speaker_bootstrap(confusions, folds, range(len(folds)), seed=1, draws=500)
    assert speaker_bootstrap(confusions, folds, range(len(folds)), seed=1, draws=500) == first
    assert speaker_bootstrap(confusions, folds, range(len(folds)), seed=2, draws=500) != first


def test_bootstrap_leaving_one_speaker_out() -> None:
    """One speaker in each fold: the mean over folds is the mean over the speakers drawn."""
    generator = np.random.default_rng(6)
    confusions, _ = speakers_of(generator, folds=1, per_fold=8)
    estimate = speaker_bootstrap(confusions, np.arange(8), np.arange(8), seed=3, draws=1000)["ua"]
    weights = np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), size=1000)
    low, high = np.percentile(weights @ ua(confusions) / 8, [2.5, 97.5])
    assert estimate.value == pytest.approx(ua(confusions).mean())
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))


def test_equal_speakers_leave_no_doubt() -> None:
    estimates = speaker_bootstrap(np.tile(HAND, (6, 1, 1)), [0, 0, 1, 1, 2, 2], range(6), seed=0, draws=100)
    for name in ("ua", "pooled_ua"):
        value = pytest.approx(0.625)
        assert (estimates[name].value, estimates[name].low, estimates[name].high) == (value, value, value)


def test_one_speaker_has_no_interval() -> None:
    estimates = speaker_bootstrap(HAND[None], [0], ["a"], seed=0)
    assert estimates["ua"] == Estimate(0.625, None, None)
    assert estimates["pooled_wa"] == Estimate(0.625, None, None)


def test_speakers_without_utterances_are_left_out() -> None:
    confusions, folds = speakers_of(np.random.default_rng(7))
    silent = np.concatenate([confusions, np.zeros((2, 4, 4), dtype=int)])
    expected = speaker_bootstrap(confusions, folds, range(len(folds)), seed=0, draws=300)
    assert speaker_bootstrap(silent, np.append(folds, [0, 9]), range(len(silent)), seed=0, draws=300) == expected


def test_bootstrap_of_nothing() -> None:
    for confusions in (np.zeros((0, 3, 3)), np.zeros((4, 3, 3))):
        for estimate in speaker_bootstrap(
            confusions, np.zeros(len(confusions)), range(len(confusions)), seed=0
        ).values():
            assert math.isnan(estimate.value)
            assert estimate.low is estimate.high is None
