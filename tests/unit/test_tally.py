"""Tallies of campaigns written here: against scikit-learn, scipy, and what one can count by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import change, write_campaign
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from sermll.errors import DataError
from sermll.tally import Cost, tally

SKILL = {"base": 0.6, "better": 0.95, "same": 0.6}
GROUPS = (("a", "b"), ("c", "d"), ("e", "f"))


def settings(labels: dict[str, str], **more: Any) -> dict[str, Any]:
    """A run whose answers depend on variant and seed."""
    seed = int(labels.get("seed", 0)) + 10 * list(SKILL).index(labels.get("variant", "base"))
    held = {"resources.workers": 2, "resources.cpus_per_worker": 3, "resources.gpus_per_worker": 0.5}
    return {"skill": SKILL[labels.get("variant", "base")], "seed": seed, "overrides": held, **more}


def with_seeds(folder: Path, variants: tuple[str, ...] = ("base", "better"), **more: Any) -> Path:
    return write_campaign(folder, {"variant": variants, "seed": ("0", "1")}, lambda labels: settings(labels, **more))


def answers(
    campaign: Path, variant: str, name: str = "predictions", folds: tuple[int, ...] = (0, 1, 2)
) -> pd.DataFrame:
    """What the runs of a variant said, with the seed, read without our code."""
    parts = [
        pq.read_table(Path(cell["run_dir"]) / f"fold-{fold}" / f"{name}.parquet").to_pandas().assign(seed=seed)
        for cell in json.loads((campaign / "campaign.json").read_text())["cells"]
        if cell["labels"].get("variant", variant) == variant
        for seed, fold in ((cell["labels"].get("seed"), fold) for fold in folds)
    ]
    return pd.concat(parts, ignore_index=True)


def run_of(campaign: Path, cell: int) -> Path:
    return Path(json.loads((campaign / "campaign.json").read_text())["cells"][cell]["run_dir"])


def test_numbers_are_those_of_scikit_learn(tmp_path: Path) -> None:
    campaign = with_seeds(tmp_path)
    base, better = tally(campaign).groups[0].rows
    assert (base.asked, base.finished, base.seeds, base.folds) == (6, 6, 2, (0, 1, 2))
    for row, variant in ((base, "base"), (better, "better")):
        assert row.scores is not None
        for name, found in (("predictions", row.scores.selected), ("predictions_last", row.scores.last)):
            table = answers(campaign, variant, name)
            for metric, score in (("ua", balanced_accuracy_score), ("wa", accuracy_score)):
                of_seed = table.groupby(["seed", "fold"])[["label", "predicted"]].apply(
                    lambda part, score=score: score(part.label, part.predicted)
                )
                assert found[metric]["value"] == pytest.approx(of_seed.mean())
                assert found[metric]["low"] < found[metric]["value"] < found[metric]["high"]
                if (name, metric) == ("predictions", "ua"):
                    assert row.scores.seed_sd == pytest.approx(np.std(np.array(of_seed.groupby("seed").mean()), ddof=1))
                    assert row.scores.fold_sd == pytest.approx(of_seed.groupby("seed").std().mean())
            f1 = [f1_score(part.label, part.predicted, average="macro") for _, part in table.groupby("fold")]
            assert found["macro_f1"]["value"] == pytest.approx(np.mean(f1))
        assert row.scores.counts.sum() == len(answers(campaign, variant))
        histories = [
            json.loads((run_of(campaign, cell) / f"fold-{fold}" / "history.json").read_text())
            for cell in ((0, 1) if variant == "base" else (2, 3))
            for fold in row.folds
        ]
        curve = np.mean([[epoch["dev_ua"] for epoch in history] for history in histories], axis=0)
        np.testing.assert_allclose(row.scores.dev_ua, curve)
        best = [
            max(np.mean(np.diag(c := np.array(epoch["test_confusion"])) / c.sum(axis=1)) for epoch in history)
            for history in histories
        ]
        assert row.scores.chosen_on_test_ua == pytest.approx(np.mean(best))
        assert row.scores.chosen_on_test_ua > row.scores.selected["ua"]["value"]


def test_cost_is_counted(tmp_path: Path) -> None:
    row = tally(with_seeds(tmp_path, ("base",))).rows[0]
    hours = 6 * 90 / 3600
    assert vars(row.cost) == pytest.approx({"wall_h": 600 / 3600, "train_h": hours, "cpu_h": 6 * hours, "gpu_h": hours})
    unknown = Cost(1, 1, 2, None) + Cost(1, 1, 2, 3)
    assert unknown == Cost(2, 2, 4, None)


def test_cost_counts_what_each_epoch_had(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, {"seed": ("0",)}, lambda labels: {"overrides": {"resources.workers": [1, 3]}})
    for path in tmp_path.glob("demo-*/fold-*/history.json"):
        history = json.loads(path.read_text())
        for row, workers in zip(history, (1, 1, 3, 3, 2), strict=True):
            row |= {"train_s": 10.0 * workers, "eval_s": 2.0, "workers": workers}
            row |= {"device": "cuda", "cpus_per_worker": 1.5, "gpus_per_worker": 0.5}
        path.write_text(json.dumps(history))
    hours = 3 * (12 + 12 + 3 * 32 + 3 * 32 + 2 * 22) / 3600
    cost = tally(campaign).rows[0].cost
    assert (cost.cpu_h, cost.gpu_h) == pytest.approx((1.5 * hours, 0.5 * hours))


def test_what_an_earlier_version_did_not_tell_is_not_known(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, {"seed": ("0",)}, lambda labels: {})
    path = run_of(campaign, 0) / "fold-1" / "history.json"
    rows = [
        {key: value for key, value in row.items() if key != "gpus_per_worker"} for row in json.loads(path.read_text())
    ]
    path.write_text(json.dumps(rows))
    row = tally(campaign).rows[0]
    assert row.cost.cpu_h == pytest.approx(3 * 90 / 3600)
    assert row.cost.gpu_h is None


def counts_of(table: pd.DataFrame) -> np.ndarray:
    """[speakers, C, C], counted one by one."""
    classes = sorted(set(table.label) | set(table.predicted))
    speakers = sorted(set(table.speaker))
    counts = np.zeros((len(speakers), len(classes), len(classes)))
    for speaker, label, predicted in zip(table.speaker, table.label, table.predicted, strict=True):
        counts[speakers.index(speaker), classes.index(label), classes.index(predicted)] += 1
    return counts


def ua_of(counts: np.ndarray) -> float:
    return float(np.mean(np.diag(counts) / counts.sum(axis=1)))


def test_intervals_of_one_fold_are_those_of_scipy(tmp_path: Path) -> None:
    campaign = with_seeds(tmp_path, groups=[list("abcdefgh")], per_class=12)
    base, better = tally(campaign).groups[0].rows
    first, second = (counts_of(answers(campaign, name, folds=(0,))) for name in ("base", "better"))
    assert base.scores is not None
    assert better.versus is not None
    cases: list[tuple[Any, Callable[[np.ndarray], float]]] = [
        (base.scores.selected["ua"], lambda drawn: ua_of(first[drawn].sum(axis=0))),
        (
            vars(better.versus.difference),
            lambda drawn: ua_of(second[drawn].sum(axis=0)) - ua_of(first[drawn].sum(axis=0)),
        ),
    ]
    for ours, statistic in cases:
        theirs = stats.bootstrap(
            (np.arange(8),), statistic, n_resamples=10_000, vectorized=False, method="percentile", rng=1
        ).confidence_interval
        np.testing.assert_allclose([ours["low"], ours["high"]], theirs, atol=0.006)
        assert ours["value"] == pytest.approx(statistic(np.arange(8)))


def test_speakers_are_counted_once_whatever_the_number_of_folds(tmp_path: Path) -> None:
    found = tally(with_seeds(tmp_path, groups=[list("abc"), list("cab")]))
    (_, better) = found.groups[0].rows
    assert better.versus is not None
    assert (better.versus.speakers, better.versus.folds) == (3, (0, 1))
    assert found.groups[0].smallest_p == 2 / 2**3 <= better.versus.difference.p


def test_p_is_that_of_scipy_when_both_seeds_of_a_speaker_are_swapped(tmp_path: Path) -> None:
    campaign = with_seeds(tmp_path, ("base", "same"))
    versus = tally(campaign).groups[0].rows[1].versus
    assert versus is not None
    first, second = answers(campaign, "base"), answers(campaign, "same")
    right = np.stack([first.label == first.predicted, second.label == second.predicted])
    speaker = np.array([sorted(set(first.speaker)).index(name) for name in first.speaker])

    def statistic(one: np.ndarray, other: np.ndarray) -> float:
        """Of speakers' numbers: s is what speaker s answered in both seeds of the first row, 6 + s of the second."""

        def score(chosen: np.ndarray) -> float:  # seeds, folds and classes are all of one size
            return float(right[(np.asarray(chosen) // 6)[speaker], np.arange(len(first))].mean())

        return score(other) - score(one)

    numbers = np.arange(6)
    theirs = stats.permutation_test(
        (numbers, numbers + 6), statistic, permutation_type="samples", n_resamples=2**6, alternative="two-sided"
    )
    assert versus.difference.value == pytest.approx(theirs.statistic)
    assert versus.difference.p == pytest.approx(theirs.pvalue)


def test_only_folds_finished_with_every_seed_count(tmp_path: Path) -> None:
    done = {
        ("base", "0"): 3,
        ("base", "1"): 2,
        ("better", "0"): 1,
        ("better", "1"): 3,
        ("same", "0"): 0,
        ("same", "1"): 3,
    }
    campaign = write_campaign(
        tmp_path,
        {"variant": tuple(SKILL), "seed": ("0", "1")},
        lambda labels: settings(labels, finished=done[labels["variant"], labels["seed"]]),
        failed={2: "TrainingError: loss is not finite\nlong story"},
    )
    base, better, same = tally(campaign).groups[0].rows
    assert [(row.folds, row.finished) for row in (base, better, same)] == [((0, 1), 5), ((0,), 4), ((), 3)]
    assert base.scores is not None
    table = answers(campaign, "base", folds=(0, 1))
    parts = [balanced_accuracy_score(part.label, part.predicted) for _, part in table.groupby(["seed", "fold"])]
    assert base.scores.selected["ua"]["value"] == pytest.approx(np.mean(parts))
    # A fold that failed and was finished later is no failure; of a message the first line is kept.
    assert base.failures == ("seed 1, fold 2: TrainingError: loss is not finite",)
    # Compared on the fold that both have; without one there is no difference, nor one to correct for.
    assert better.versus is not None
    assert (better.versus.folds, better.versus.speakers) == ((0,), 2)
    assert better.versus.p_holm == better.versus.difference.p
    assert same.scores is same.versus is None


def test_a_single_row_and_no_seed_axis(tmp_path: Path) -> None:
    found = tally(write_campaign(tmp_path, {"seed": ("0",)}, lambda labels: {}))
    (row,) = found.rows
    assert row.scores is not None
    assert (row.scores.seed_sd, row.versus, row.labels, found.groups[0].names) == (None, None, {}, ["all"])
    found = tally(write_campaign(tmp_path / "again", {"mixup": ("none",)}, lambda labels: {"finished": 1}))
    assert found.rows[0].scores is not None
    assert found.rows[0].scores.fold_sd is None
    assert found.groups[0].names == ["mixup none"]


def test_nothing_finished_and_nothing_begun(tmp_path: Path) -> None:
    begun = lambda labels: {"finished": 0} if labels["variant"] == "base" else None  # noqa: E731
    found = tally(write_campaign(tmp_path, {"variant": ("base", "better")}, begun))
    assert [group.title for group in found.groups] == ["Synthetic, protocol pairs", "not started"]
    assert all(row.scores is None and row.cost == Cost() for row in found.rows)
    assert [record["ua"] for record in found.as_json()] == [None, None]


def two_corpora(labels: dict[str, str]) -> dict[str, Any]:
    if labels["corpus"] == "tiny":
        return settings(labels)
    classes = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
    return settings(labels, classes=classes, groups=[list("abcd"), list("efgh")], title="RAVDESS", protocol="hicmae")


def test_rows_of_two_corpora_are_compared_within_each_and_corrected_over_both(tmp_path: Path) -> None:
    axes = {"corpus": ("tiny", "large"), "variant": tuple(SKILL), "seed": ("0", "1")}
    found = tally(write_campaign(tmp_path, axes, two_corpora))
    assert [(group.title, group.names) for group in found.groups] == [
        ("Synthetic, protocol pairs", list(SKILL)),
        ("RAVDESS, protocol hicmae", list(SKILL)),
    ]
    versus = [row.versus for row in found.rows if row.versus]
    assert [row.versus is None for row in found.rows] == [True, False, False] * 2
    ordered = sorted(versus, key=lambda one: one.difference.p)
    assert ordered[0].p_holm == pytest.approx(min(1, 4 * ordered[0].difference.p))
    assert ordered[-1].p_holm == pytest.approx(max(ordered[-2].p_holm, ordered[-1].difference.p))
    assert found.groups[1].rows[1].versus is not None
    assert found.groups[1].rows[1].versus.verdict == "higher"
    # Six speakers: of 64 assignments two are as extreme as can be.
    assert found.groups[0].smallest_p == 2 / 64


def test_folds_as_an_axis_belong_to_one_run(tmp_path: Path) -> None:
    axes = {"fold": ("0", "2"), "variant": ("base", "better")}
    campaign = write_campaign(tmp_path, axes, settings)
    rows = tally(campaign).rows
    assert [(row.labels, row.folds, row.asked) for row in rows] == [
        ({"variant": "base"}, (0, 2), 2),
        ({"variant": "better"}, (0, 2), 2),
    ]
    assert rows[0].cost.wall_h == pytest.approx(200 / 3600)


def relabel(campaign: Path, *cells: int) -> None:
    """Give an utterance of fold 1 another label, as another label space would."""
    for cell in cells:
        for name in ("predictions", "predictions_last"):
            path = run_of(campaign, cell) / "fold-1" / f"{name}.parquet"
            lines = pq.read_table(path).to_pylist()
            lines[0]["label"] = lines[-1]["label"]
            pq.write_table(pa.Table.from_pylist(lines), path)


def test_groups_are_of_the_same_utterances_and_labels_whatever_the_rule_of_choice(tmp_path: Path) -> None:
    campaign = with_seeds(tmp_path, tuple(SKILL))
    facts = json.loads((run_of(campaign, 2) / "run.json").read_text())
    for cell in (2, 3):
        change(run_of(campaign, cell) / "run.json", protocol=facts["protocol"] | {"select": "last", "hash": "other"})
    assert [group.names for group in tally(campaign).groups] == [list(SKILL)]
    relabel(campaign, 4, 5)
    found = tally(campaign)
    assert [[row.labels["variant"] for row in group.rows] for group in found.groups] == [["base", "better"], ["same"]]
    assert [group.title for group in found.groups] == [
        "Synthetic, protocol pairs",
        "Synthetic, protocol pairs, variant same",
    ]


def test_seeds_that_differ_in_more_than_the_seed_are_refused(tmp_path: Path) -> None:
    campaign = with_seeds(tmp_path)
    relabel(campaign, 1)
    with pytest.raises(DataError, match="tested on other utterances than the first seed"):
        tally(campaign)
    facts = json.loads((run_of(campaign, 1) / "run.json").read_text())
    change(run_of(campaign, 1) / "run.json", data=facts["data"] | {"data_hash": "other"})
    with pytest.raises(DataError, match="are seeds of one row and differ in data or folds"):
        tally(campaign)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", r"run\.json: damaged"),
        ("run.json", "{}", r"run\.json: no 'data' in it"),
        ("fold-0/result.json", '{"fold": 0}', r"result\.json: no 'wall_s' in it"),
        ("fold-0/history.json", '[{"epoch": 0}]', r"history\.json: no 'dev_ua' in it"),
        ("fold-0/predictions.parquet", "PAR1", r"predictions\.parquet: damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    campaign = with_seeds(tmp_path, ("base",))
    (run_of(campaign, 0) / name).write_text(content)
    with pytest.raises(DataError, match=message):
        tally(campaign)


def test_folders_that_are_no_campaign_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no campaign \(no campaign\.json\)"):
        tally(tmp_path)
    (tmp_path / "campaign.json").write_text("{}")
    with pytest.raises(DataError, match=r"campaign\.json: no 'cells' in it"):
        tally(tmp_path)


def test_records_are_json(tmp_path: Path) -> None:
    records = json.loads(json.dumps(tally(with_seeds(tmp_path)).as_json()))
    assert len({tuple(record) for record in records}) == 1
    assert records[1]["axis_variant"] == "better"
    assert records[1]["difference"] == pytest.approx(records[1]["ua"] - records[0]["ua"])
    assert records[1]["folds"] == records[1]["compared_folds"] == [0, 1, 2] and records[0]["compared_folds"] == []
