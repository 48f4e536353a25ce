"""Batches: equal to mixing by hand from the source files, whoever makes them."""

import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from sermll import feed as feed_module
from sermll.feed import SPLITS, Batch, Feed, FoldData, make_batch, stream
from sermll.labels import apply_labels, label_space
from sermll.shards import Prepared

Settings = Callable[..., Any]


@pytest.fixture
def prepared(tiny_data: Path) -> Prepared:
    return Prepared.open(tiny_data)


def feed_of(
    experiment: Any, prepared: Prepared, votes: list[Any] | None = None, kind: Literal["hard", "soft"] = "hard"
) -> Feed:
    rows = np.arange(prepared.table.num_rows)
    splits = {"train": rows[:100], "dev": rows[100:121], "test": rows[121:]}
    space = label_space("native", prepared.classes)
    labelled = apply_labels(space, prepared.table["label"].to_pylist(), votes or [None] * len(rows), kind)
    key = f"key-{id(experiment)}-{kind}"
    return Feed.for_run(key, experiment, FoldData.of(key, prepared, labelled, splits))


def slow_eam(x: np.ndarray, partner: np.ndarray, mix: Any, place: int) -> tuple[np.ndarray, float]:
    """Equations 1 to 4, sample by sample."""
    length, start, other = (int(getattr(mix, name)[place]) for name in ("mix_length", "start", "partner_start"))
    energy = sum(float(value) ** 2 for value in x[start : start + length])
    other_energy = sum(float(value) ** 2 for value in partner[other : other + length])
    scale = np.sqrt(energy / (10 ** (mix.snr_db[place] / 10) * other_energy))
    mixed = x.astype(np.float64).copy()
    for step in range(length):
        mixed[start + step] += scale * partner[other + step]
    share = scale**2 * other_energy / (energy + scale**2 * other_energy) * length / len(x)
    return mixed, share


def test_training_batches_equal_mixing_by_hand(settings: Settings, prepared: Prepared, tiny_corpus: Path) -> None:
    feed = feed_of(settings("mixup.probability=1.0", "data.crop_s=0.5"), prepared)
    plan = feed.plan("train", 2)
    assert plan.mix is not None
    paths = prepared.table["path"].to_pylist()

    def crop(position: int) -> np.ndarray:
        signal, _ = soundfile.read(tiny_corpus / paths[plan.rows[position]], dtype="float64")
        start = plan.crop_start[position]
        return signal[start : start + plan.crop_length[position]]

    for index in (0, 5):
        batch = make_batch(feed, "train", 2, index)
        for place, position in enumerate(plan.batch(index).tolist()):
            partner = int(plan.mix.partner[position])
            expected, share = slow_eam(crop(position), crop(partner), plan.mix, position)
            length = batch.lengths[place]
            np.testing.assert_allclose(batch.waveform[place, :length], expected, atol=1e-6)
            assert not batch.waveform[place, length:].any()
            target = np.zeros(7)
            target[feed.of.labels[plan.rows[position]]] += 1 - share
            target[feed.of.labels[plan.rows[partner]]] += share
            np.testing.assert_allclose(batch.targets[place], target, atol=1e-6)


@pytest.mark.parametrize("kind", ["eam", "lam", "none"])
def test_shares_of_workers_hold_the_same_mixes_as_one_worker(settings: Settings, prepared: Prepared, kind: str) -> None:
    feed = feed_of(settings(f"mixup.kind={kind}"), prepared)
    for index in range(3):
        whole = make_batch(feed, "train", 1, index)
        by_row = {row: (whole.waveform[i, : whole.lengths[i]], whole.targets[i]) for i, row in enumerate(whole.rows)}
        for workers in (2, 4):
            shares = [make_batch(feed, "train", 1, index, rank, workers) for rank in range(workers)]
            assert sorted(row for share in shares for row in share.rows) == sorted(whole.rows)
            for share in shares:
                for i, row in enumerate(share.rows):
                    np.testing.assert_array_equal(share.waveform[i, : share.lengths[i]], by_row[row][0])
                    np.testing.assert_array_equal(share.targets[i], by_row[row][1])


def test_mixes_are_fresh_every_epoch_and_scoring_never_mixes(settings: Settings, prepared: Prepared) -> None:
    feed = feed_of(settings(), prepared)
    drawn = [feed.plan("train", epoch).mix for epoch in (0, 1)]
    assert drawn[0] is not None and drawn[1] is not None
    assert not np.array_equal(drawn[0].partner, drawn[1].partner)
    for split in ("dev", "test"):
        for epoch in (0, 7):
            batch = make_batch(feed, split, epoch, 0)
            assert set(np.unique(batch.targets)) == {0.0, 1.0}
            assert np.array_equal(batch.waveform, make_batch(feed, split, 0, 0).waveform)


def test_partners_come_from_the_training_set_alone(settings: Settings, prepared: Prepared) -> None:
    feed = feed_of(settings("mixup.probability=1.0"), prepared)
    plan = feed.plan("train", 0)
    assert plan.mix is not None
    assert set(plan.rows[plan.mix.partner]) <= set(feed.of.rows["train"])
    assert (plan.mix.partner != np.arange(100)).all()


def test_a_worker_without_a_share_gets_an_empty_batch(settings: Settings, prepared: Prepared) -> None:
    feed = feed_of(settings("optim.batch_size=2"), prepared)
    last = feed.plan("dev", 0).num_batches - 1
    shares = [make_batch(feed, "dev", 0, last, rank, 4) for rank in range(4)]
    assert [len(share.rows) for share in shares][2:] == [0, 0]
    assert shares[3].waveform.shape == (0, 0) and shares[3].targets.shape == (0, 7)


def test_eam_mixes_soft_labels_and_metrics_count_the_majority(settings: Settings, prepared: Prepared) -> None:
    rng = np.random.default_rng(0)
    votes = [((label, 3.0), (str(rng.choice(prepared.classes)), 2.0)) for label in prepared.table["label"].to_pylist()]
    feed = feed_of(settings("mixup.probability=1.0"), prepared, votes, "soft")
    plan = feed.plan("train", 0)
    assert plan.mix is not None
    hard = feed_of(settings("mixup.probability=1.0"), prepared)
    batch, one_hot = make_batch(feed, "train", 0, 0), make_batch(hard, "train", 0, 0)
    np.testing.assert_array_equal(batch.labels, one_hot.labels)
    np.testing.assert_array_equal(batch.waveform, one_hot.waveform)
    for place, position in enumerate(plan.batch(0).tolist()):
        own, other = (int(plan.rows[at]) for at in (position, plan.mix.partner[position]))
        same_class = hard.of.labels[own] == hard.of.labels[other]
        share = (
            0.5 if same_class else one_hot.targets[place, hard.of.labels[other]]
        )  # of equal classes it cannot be seen
        expected = np.zeros(7)
        for row, weight in ((own, 1 - share), (other, share)):
            for label, count in votes[row]:
                expected[prepared.classes.index(label)] += weight * count / 5
        if not same_class:
            np.testing.assert_allclose(batch.targets[place], expected, atol=1e-6)
    test = make_batch(feed, "test", 0, 0)
    assert (test.labels == test.targets.argmax(1)).all()


def test_blocks_hold_every_batch_once_and_no_more_than_they_may(
    settings: Settings, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = feed_of(settings("optim.batch_size=2"), prepared).plan("train", 0)
    longest = [4 * plan.length[plan.batch(index)].max() * len(plan.batch(index)) for index in range(plan.num_batches)]
    for most in (1, max(longest), 4 * max(longest)):
        monkeypatch.setattr(feed_module, "BLOCK_BYTES", most)
        blocks = feed_module._blocks(plan, 1)
        assert [index for first, last in blocks for index in range(first, last)] == list(range(plan.num_batches))
        sizes = [sum(longest[first:last]) for first, last in blocks]
        assert all(size < most + max(longest) for size in sizes)
    monkeypatch.setattr(feed_module, "BLOCK_BYTES", 10**12)
    assert feed_module._blocks(plan, 1) == [(0, plan.num_batches)]


def test_batches_come_out_of_a_table_as_they_went_in(settings: Settings, prepared: Prepared) -> None:
    feed = feed_of(settings("optim.batch_size=2"), prepared)
    last = feed.plan("dev", 0).num_batches - 1
    batches = [make_batch(feed, "train", 0, 0), make_batch(feed, "dev", 0, last, 3, 4), make_batch(feed, "test", 0, 0)]
    table = feed_module._to_table(batches)
    for row, batch in enumerate(batches):  # the second is empty
        found = feed_module._from_table(table, row, 7)
        for name, value in vars(batch).items():
            np.testing.assert_array_equal(getattr(found, name), value)
            assert not isinstance(value, np.ndarray) or getattr(found, name).shape == value.shape


@pytest.mark.parametrize(
    ("table_s", "batch_s"),
    [(0.0, 0.02), (0.03, 0.0), (0.03, 0.005), (30.0, 0.0)],
    ids=["fast", "slow", "even", "never"],
)
def test_batches_are_the_plans_whoever_is_ahead(
    settings: Settings, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, table_s: float, batch_s: float
) -> None:
    """Each once and in order, by Ray Data's workers, here played by a thread, as soon as they are ahead."""
    received, ended = [], threading.Event()
    from_table = feed_module._from_table

    def tables(
        jobs: list[dict[str, Any]], make: Callable[..., Any], lost: Callable[[], Any]
    ) -> Generator[pa.Table, None, None]:
        for job in jobs:
            if ended.wait(table_s):
                return
            yield feed_module._to_table(make(job))

    def receive(table: pa.Table, row: int, num_classes: int) -> Batch:
        received.append((table, row))
        return from_table(table, row, num_classes)

    monkeypatch.setattr(feed_module, "BLOCK_BYTES", 200_000)  # some batches a table
    monkeypatch.setattr(feed_module, "_tables", tables)
    monkeypatch.setattr(feed_module, "_from_table", receive)
    feed = feed_of(settings("optim.batch_size=4"), prepared)
    wanted = [
        make_batch(feed, split, epoch, index)
        for epoch in range(3)
        for split in SPLITS
        for index in range(feed.plan(split, epoch).num_batches)
    ]
    found = []
    for batch in stream(feed, 0, 3):
        found.append(batch)
        time.sleep(batch_s)
    ended.set()
    assert [(it.epoch, it.split, it.index) for it in found] == [(it.epoch, it.split, it.index) for it in wanted]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.waveform, other.waveform)
        np.testing.assert_array_equal(one.rows, other.rows)
    if table_s == 0.0:
        assert len(received) > len(wanted) / 2
    if table_s > 1:
        assert not received
