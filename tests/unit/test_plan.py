"""The epoch plan: pure, complete, little padding."""

import numpy as np
import pytest

from sermll.config import EAM, LAM, Data, NoMixup
from sermll.plan import Plan, eval_plan, train_plan

DATA = Data(path="x")


def iemocap_like_lengths(count: int = 5531) -> np.ndarray:
    """Lengths with the published mean 4.55 s, 95th percentile 11.1 s, at most 34.1 s."""
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(mean=1.23, sigma=0.72, size=count), 0.6, 34.1)
    return (seconds * 16_000).astype(np.int64)


def plan(
    num_samples: np.ndarray,
    mixup: EAM | LAM | NoMixup | None = None,
    epoch: int = 0,
    *,
    batch_size: int = 16,
    seed: int = 0,
    data: Data = DATA,
) -> Plan:
    rows = np.arange(len(num_samples))
    return train_plan(rows, num_samples, data, EAM() if mixup is None else mixup, batch_size, seed, epoch)


def same(one: Plan, two: Plan) -> bool:
    fields = ("crop_start", "crop_length", "length", "order", "bounds")
    if one.mix is None or two.mix is None:
        return one.mix is two.mix and all(np.array_equal(getattr(one, f), getattr(two, f)) for f in fields)
    drawn = ("partner", "mix_length", "start", "partner_start", "snr_db")
    return all(np.array_equal(getattr(one, f), getattr(two, f)) for f in fields) and all(
        np.array_equal(getattr(one.mix, f), getattr(two.mix, f), equal_nan=True) for f in drawn
    )


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("mixup", [EAM(), LAM(), NoMixup()])
def test_every_utterance_is_in_one_batch_of_every_epoch(count: int, mixup: EAM | LAM | NoMixup) -> None:
    made = plan(iemocap_like_lengths(count), mixup)
    batches = [made.batch(index) for index in range(made.num_batches)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == -(-count // 16) and max(sizes) <= 16 and max(sizes) - min(sizes) <= 1


def test_the_plan_is_a_pure_function_and_fresh_every_epoch() -> None:
    lengths = iemocap_like_lengths(500)
    assert same(plan(lengths, epoch=3), plan(lengths, epoch=3))
    assert not same(plan(lengths, epoch=3), plan(lengths, epoch=4))
    assert not same(plan(lengths, epoch=3), plan(lengths, epoch=3, seed=1))


def test_shares_of_workers_make_up_the_batches_of_one() -> None:
    made = plan(iemocap_like_lengths(333))
    for index in range(made.num_batches):
        for workers in (2, 3, 4):
            shares = [made.batch(index, rank, workers) for rank in range(workers)]
            assert sorted(np.concatenate(shares)) == sorted(made.batch(index))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_happens_to_an_utterance_does_not_depend_on_its_batch() -> None:
    lengths = iemocap_like_lengths(200)
    small, large = plan(lengths, batch_size=4), plan(lengths, batch_size=32)
    assert small.mix is not None and large.mix is not None
    np.testing.assert_array_equal(small.mix.partner, large.mix.partner)
    np.testing.assert_array_equal(small.crop_start, large.crop_start)


def test_padding_by_hand() -> None:
    made = eval_plan(np.arange(4), np.array([400, 100, 200, 300]), DATA, 2)
    assert made.padding_share() == pytest.approx(2 * 100 / (2 * 200 + 2 * 400))  # 100 beside 200, 300 beside 400


def test_a_batch_of_like_lengths_is_none_of_like_crops_or_of_the_mixed() -> None:
    made = plan(np.full(1600, 16_000 * 7, np.int64), EAM(probability=0.5))
    assert made.mix is not None
    for index in range(made.num_batches):
        batch = made.batch(index)
        assert np.ptp(made.crop_start[batch]) > 6_000
        assert 0 < np.count_nonzero(made.mix.partner[batch] >= 0) < len(batch)


def test_padding_is_at_most_seven_percent_where_random_batches_pad_half() -> None:
    lengths = iemocap_like_lengths()
    assert 4.3 < lengths.mean() / 16_000 < 4.8 and 10 < np.quantile(lengths, 0.95) / 16_000 < 12.5
    whole = Data(path="x", crop_s=40)  # no crop: the hardest case
    shares = [plan(lengths, epoch=epoch, data=whole).padding_share() for epoch in range(5)]
    assert max(shares) <= 0.07
    shuffled = np.random.default_rng(0).permutation(lengths)[: 5531 // 16 * 16].reshape(-1, 16)
    assert 1 - shuffled.sum() / (shuffled.max(axis=1) * 16).sum() > 0.5


def test_batches_differ_from_epoch_to_epoch() -> None:
    lengths = iemocap_like_lengths(1600)
    groups = [
        {frozenset(made.batch(index).tolist()) for index in range(made.num_batches)}
        for made in (plan(lengths, epoch=epoch) for epoch in range(2))
    ]
    assert len(groups[0] & groups[1]) <= 2


def test_crops_lie_inside_and_reach_both_ends() -> None:
    lengths = np.full(2000, 16_000 * 7, np.int64)
    made = plan(lengths, NoMixup())
    assert (made.crop_length == 100_000).all()
    assert made.crop_start.min() >= 0 and (made.crop_start + made.crop_length <= lengths).all()
    assert made.crop_start.min() < 100 and made.crop_start.max() > 12_000 - 100


def test_lam_takes_the_longer_length() -> None:
    made = plan(iemocap_like_lengths(300), LAM(probability=1.0))
    assert made.mix is not None
    expected = np.maximum(made.crop_length, made.crop_length[made.mix.partner])
    np.testing.assert_array_equal(made.length, expected)


def test_scoring_takes_everyone_once_and_the_middle_of_the_long() -> None:
    lengths = np.array([16_000, 16_000 * 40, 8_000])
    made = eval_plan(np.arange(3), lengths, DATA, 2)
    assert sorted(np.concatenate([made.batch(index) for index in range(made.num_batches)])) == [0, 1, 2]
    assert made.crop_length.dtype == np.int64
    assert made.crop_length.tolist() == [16_000, 480_000, 8_000] and made.crop_start.tolist() == [
        0,
        80_000,
        0,
    ]
    assert made.mix is None
