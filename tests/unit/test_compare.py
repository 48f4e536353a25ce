"""Comparing runs: against scipy's permutation test, a slow bootstrap, and statements one can check by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from sermll import compare as comparing
from sermll.cli import main
from sermll.compare import Difference, compare, holm, paired_difference, smallest_p, text, too_few, verdict
from sermll.errors import DataError

CLASSES = ("x", "y", "z")


def answers(rng: np.random.Generator, labels: np.ndarray, skill: np.ndarray) -> np.ndarray:
    """Right with the chance `skill`, else any class."""
    return np.where(rng.random(len(labels)) < skill, labels, rng.integers(0, 3, len(labels)))


def counts_of(labels: np.ndarray, predicted: np.ndarray, speakers: np.ndarray) -> np.ndarray:
    counts = np.zeros((speakers.max() + 1, 3, 3))
    for label, answer, speaker in zip(labels, predicted, speakers, strict=True):
        counts[speaker, label, answer] += 1
    return counts


@pytest.fixture
def made() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, speakers, and what two runs said; ten speakers in two folds."""
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(10), 30)
    labels = np.tile(np.arange(3), 100)
    hard = rng.uniform(0.2, 0.7, 10)[speakers]
    return labels, speakers, answers(rng, labels, hard), answers(rng, labels, hard + 0.15)


FOLDS = np.repeat([0, 1], 5)


def mean_ua(labels: np.ndarray, predicted: np.ndarray, speakers: np.ndarray) -> float:
    folds = FOLDS[speakers]
    return float(np.mean([balanced_accuracy_score(labels[folds == f], predicted[folds == f]) for f in (0, 1)]))


def test_the_difference_is_that_of_the_scores(made: tuple[np.ndarray, ...]) -> None:
    labels, speakers, first, second = made
    found = paired_difference(
        counts_of(labels, first, speakers), counts_of(labels, second, speakers), FOLDS, range(10), 0, 100
    )
    assert found.value == pytest.approx(mean_ua(labels, second, speakers) - mean_ua(labels, first, speakers))


def test_the_exact_test_agrees_with_scipy(made: tuple[np.ndarray, ...]) -> None:
    labels, speakers, first, second = made

    right = np.stack([first == labels, second == labels])

    def statistic(one: np.ndarray, other: np.ndarray) -> float:
        """Of speakers' numbers: s means speaker s's first answers, 10 + s the second ones."""

        def score(chosen: np.ndarray) -> float:  # every fold has as many utterances of every class
            return float(right[(np.asarray(chosen) // 10)[speakers], np.arange(len(labels))].mean())

        return score(other) - score(one)

    numbers = np.arange(10)
    theirs = stats.permutation_test(
        (numbers, numbers + 10), statistic, permutation_type="samples", n_resamples=2**12, alternative="two-sided"
    )
    ours = paired_difference(
        counts_of(labels, first, speakers), counts_of(labels, second, speakers), FOLDS, range(10), 0, 100
    )
    # scipy doubles the smaller tail; for a statistic whose sign swapping reverses, that is both tails.
    assert ours.p == pytest.approx(theirs.pvalue)


def test_speakers_of_several_folds_are_swapped_and_drawn_in_all_of_them_at_once(made: tuple[np.ndarray, ...]) -> None:
    labels, places, first, second = made
    one, other = (counts_of(labels, said, places) for said in (first, second))
    names = list("vwxyzzyxwv")  # five speakers, each in both folds
    found = paired_difference(one, other, FOLDS, names, 0)
    both = np.stack([one, other])

    def mean(chosen: np.ndarray) -> float:
        """UA when the speakers' numbers below 5 are their first answers, those from 5 their second."""
        of = dict(zip("vwxyz", np.asarray(chosen) // 5, strict=True))
        cells = np.array([both[of[name], row] for row, name in enumerate(names)])
        return float(np.mean([np.diag(c := cells[f == FOLDS].sum(axis=0)) / c.sum(axis=1) for f in (0, 1)]))

    numbers = np.arange(5)
    theirs = stats.permutation_test(
        (numbers, numbers + 5),
        lambda mine, others: mean(others) - mean(mine),
        permutation_type="samples",
        n_resamples=2**5,
        alternative="two-sided",
    )
    assert found.value == pytest.approx(theirs.statistic)
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.p >= 2 / 2**5  # of five speakers, whatever the number of folds

    def drawn(rows: np.ndarray) -> float:  # every speaker is in both folds, so folds weigh the same in every draw
        members = [np.concatenate([np.flatnonzero(np.array(names) == "vwxyz"[row]) for row in rows])]
        cells = [[part[rows][FOLDS[rows] == f].sum(axis=0) for f in (0, 1)] for part in both for rows in members]
        scores = [np.mean([np.diag(c) / c.sum(axis=1) for c in folds]) for folds in cells]
        return float(scores[1] - scores[0])

    interval = stats.bootstrap(
        (numbers,), drawn, n_resamples=2000, vectorized=False, method="percentile", rng=1
    ).confidence_interval
    np.testing.assert_allclose([found.low, found.high], interval, atol=0.012)


def test_the_drawn_test_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    speakers = np.repeat(np.arange(14), 30)  # more than are enumerated
    labels = np.tile(np.arange(3), 140)
    runs = [counts_of(labels, answers(rng, labels, np.full(420, skill)), speakers) for skill in (0.5, 0.6)]
    folds = np.repeat([0, 1], 7)
    drawn = [paired_difference(runs[0], runs[1], folds, range(14), seed).p for seed in (0, 1)]
    monkeypatch.setattr(comparing, "EXACT_SPEAKERS", 14)
    exact = paired_difference(runs[0], runs[1], folds, range(14), 0).p
    assert 0.02 < exact < 0.9
    assert drawn == pytest.approx([exact, exact], abs=0.02)


def test_the_test_is_two_sided(made: tuple[np.ndarray, ...]) -> None:
    labels, speakers, first, second = made
    one, other = (counts_of(labels, said, speakers) for said in (first, second))
    better, worse = (paired_difference(*pair, FOLDS, range(10), 0, 100) for pair in ((one, other), (other, one)))
    assert worse.value == pytest.approx(-better.value) and better.value > 0
    assert worse.p == better.p < 0.05


@pytest.mark.parametrize(("speakers", "expected"), [(2, 1 / 2), (5, 1 / 16), (6, 1 / 32), (12, 1 / 2048), (40, 1e-4)])
def test_the_smallest_p_is_that_of_a_run_that_is_always_right(speakers: int, expected: float) -> None:
    right, wrong = (np.tile(counts, (speakers, 1, 1)) for counts in (10 * np.eye(2), 10 * np.eye(2)[::-1]))
    found = paired_difference(wrong, right, np.zeros(speakers), range(speakers), 0)
    assert found.value == 1
    assert found.p == smallest_p(speakers) == pytest.approx(expected, rel=1e-3)
    assert bool(too_few(speakers)) == (expected >= 0.05)


def test_verdicts_by_hand() -> None:
    assert verdict(Difference(0.1, 0.01, 0.2, 0.01), 0.04) == "higher"
    assert verdict(Difference(-0.1, -0.2, -0.01, 0.01), 0.04) == "lower"
    for low, high, p in ((-0.01, 0.2, 0.04), (0.01, 0.2, 0.05), (0.0, 0.2, 0.01), (-0.2, 0.0, 0.01)):
        assert verdict(Difference(0.1, low, high, 0.01), p) == "no difference shown"


def test_the_interval_agrees_with_a_slow_bootstrap(made: tuple[np.ndarray, ...]) -> None:
    labels, speakers, first, second = made
    one, other = (counts_of(labels, said, speakers) for said in (first, second))
    folds = np.zeros(10, int)  # of one fold, its weight is 1 in every draw
    found = paired_difference(one, other, folds, range(10), 0)

    def score(counts: np.ndarray) -> float:
        return float(np.mean(np.diag(counts) / counts.sum(axis=1)))

    rng = np.random.default_rng(5)
    slow = []
    for _ in range(4000):
        drawn = rng.integers(0, 10, 10)
        slow.append(score(other[drawn].sum(axis=0)) - score(one[drawn].sum(axis=0)))
    np.testing.assert_allclose([found.low, found.high], np.quantile(slow, [0.025, 0.975]), atol=0.006)


def test_a_run_and_itself_do_not_differ(made: tuple[np.ndarray, ...]) -> None:
    labels, speakers, first, _ = made
    counts = counts_of(labels, first, speakers)
    found = paired_difference(counts, counts, FOLDS, range(10), 0)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_other_utterances_and_one_speaker_are_refused(made: tuple[np.ndarray, ...]) -> None:
    labels, speakers, first, _ = made
    counts = counts_of(labels, first, speakers)
    with pytest.raises(DataError, match="not tested on the same utterances"):
        paired_difference(counts, counts[::-1] + np.eye(3), FOLDS, range(10), 0)
    with pytest.raises(DataError, match="1 tested speakers are too few"):
        paired_difference(counts, counts, FOLDS, ["a"] * 10, 0)
    with pytest.raises(DataError, match="1 tested speakers are too few"):
        paired_difference(counts[:1], counts[:1], FOLDS[:1], ["a"], 0)


def test_holm_by_hand() -> None:
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.5 x 1; none may be smaller than one before it.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def write_run(folder: Path, predicted: np.ndarray, made: tuple[np.ndarray, ...]) -> Path:
    labels, speakers = made[:2]
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"name": folder.name, "protocol": {"leaks": []}}))
    table = {
        "utterance": [f"u{row}" for row in range(len(labels))],
        "speaker": [f"s{speaker}" for speaker in speakers],
        "fold": pa.array(FOLDS[speakers], pa.int32()),
        "label": [CLASSES[label] for label in labels],
        "predicted": [CLASSES[answer] for answer in predicted],
    }
    pq.write_table(pa.table(table), folder / "predictions.parquet")
    return folder


def test_runs_are_compared_by_their_predictions(
    made: tuple[np.ndarray, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, said, made) for name, said in (("base", made[2]), ("better", made[3]))]
    again = write_run(tmp_path / "same", made[2], made)
    assert main(["compare", *map(str, [*runs, again]), "--json"]) == 0
    first, better, same = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["difference"] is None and first["ua"] == pytest.approx(mean_ua(made[0], made[2], made[1]))
    assert better["difference"]["value"] > 0 and same["difference"]["value"] == 0
    assert better["difference"]["p_holm"] == pytest.approx(min(1, 2 * better["difference"]["p"]))
    shown = text(compare([*runs, again])).splitlines()
    assert shown[2].endswith("higher") and shown[3].endswith("no difference shown")


def test_runs_on_other_utterances_are_refused(made: tuple[np.ndarray, ...], tmp_path: Path) -> None:
    one, other = (write_run(tmp_path / name, made[2], made) for name in ("one", "other"))
    pq.write_table(pq.read_table(other / "predictions.parquet").slice(1), other / "predictions.parquet")
    with pytest.raises(DataError, match=r"were not tested on the same utterances .* \(1 differ\)"):
        compare([one, other])
