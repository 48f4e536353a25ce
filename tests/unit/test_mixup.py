"""Mixing against the equations taken sample by sample, and the properties any implementation has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sermll.mixup import draw_eam, draw_lam, eam, lam, mix_labels

Mix = tuple[np.ndarray, np.ndarray, int, int, int, float]
"""Signal, partner, mixed length, start, partner's start, SNR in dB."""

SNR_DB = (-5.0, 10.0)
LAST = np.nextafter(1.0, 0.0)  # the largest number a generator of [0, 1) returns

settings.register_profile("any machine", deadline=None)  # a loaded one is slow, which is no fault of what is tested
settings.load_profile("any machine")


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    """Two signals, with a segment of each and an SNR, as `draw_eam` could have drawn them."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples, partner_samples = draw(st.integers(3, 400)), draw(st.integers(1, 400))
    signal = generator.normal(size=samples) * 10.0 ** draw(st.integers(-4, 1))
    partner = generator.normal(size=partner_samples) * 10.0 ** draw(st.integers(-4, 1))
    mix_length = draw(st.integers(1, min((samples - 1) // 2, partner_samples)))
    start = draw(st.integers(0, samples - mix_length))
    partner_start = draw(st.integers(0, partner_samples - mix_length))
    snr_db = draw(st.floats(*SNR_DB))
    return signal.astype(np.float32), partner.astype(np.float32), mix_length, start, partner_start, snr_db


def floats(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def energy(segment: np.ndarray) -> float:
    return np.square(segment, dtype=np.float64).sum()


def slow_eam(
    signal: np.ndarray, partner: np.ndarray, mix_length: int, start: int, partner_start: int, snr_db: float
) -> tuple[list[float], float]:
    """Equations 1 to 4 sample by sample."""
    a = [float(signal[start + k]) for k in range(mix_length)]
    b = [float(partner[partner_start + k]) for k in range(mix_length)]
    p_a, p_b = sum(x * x for x in a), sum(x * x for x in b)
    scale = (p_a / (10 ** (snr_db / 10) * p_b)) ** 0.5
    mixed = [float(x) for x in signal]
    for k in range(mix_length):
        mixed[start + k] = a[k] + scale * b[k]
    p_scaled = sum((scale * x) ** 2 for x in b)
    return mixed, p_scaled / (p_a + p_scaled) * mix_length / len(signal)


@given(mixes())
def test_eam_equals_the_equations(mix: Mix) -> None:
    mixed, weight = eam(*mix)
    expected, expected_weight = slow_eam(*mix)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert weight == pytest.approx(expected_weight, rel=1e-9)


@given(mixes())
def test_eam_changes_only_its_segment_and_neither_input(mix: Mix) -> None:
    signal, partner, mix_length, start, *_ = mix
    before, partner_before = signal.copy(), partner.copy()
    mixed, _ = eam(*mix)
    np.testing.assert_array_equal(signal, before)
    np.testing.assert_array_equal(partner, partner_before)
    assert mixed.shape == signal.shape
    np.testing.assert_array_equal(mixed[:start], signal[:start])
    np.testing.assert_array_equal(mixed[start + mix_length :], signal[start + mix_length :])


@given(mixes())
def test_eam_measured_snr_is_the_drawn_one(mix: Mix) -> None:
    signal, _, mix_length, start, _, snr_db = mix
    segment = slice(start, start + mix_length)
    added = eam(*mix)[0][segment].astype(np.float64) - signal[segment]
    measured_db = 10 * np.log10(energy(signal[segment]) / energy(added))
    # a + b' is rounded to float32 next to |a|: where b' is small, that is the error of what is measured here.
    assert measured_db == pytest.approx(snr_db, abs=2e-5)


def test_eam_of_segments_longer_than_its_pieces_and_in_place() -> None:
    generator = np.random.default_rng(3)
    signal, partner = (generator.normal(size=n).astype(np.float32) for n in (90_011, 50_007))
    place = (44_999, 20_001, 5_003, 2.5)
    mixed, weight = eam(signal, partner, *place)
    segment, added = signal[20_001:65_000].astype(np.float64), partner[5_003:50_002].astype(np.float64)
    scale = np.sqrt(energy(segment) / (10**0.25 * energy(added)))
    np.testing.assert_allclose(mixed[20_001:65_000], segment + scale * added, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(mixed[:20_001], signal[:20_001])
    np.testing.assert_array_equal(mixed[65_000:], signal[65_000:])

    elsewhere = np.empty_like(signal)
    written, same_weight = eam(signal, partner, *place, out=elsewhere)
    assert written is elsewhere and same_weight == weight
    np.testing.assert_array_equal(elsewhere, mixed)
    assert eam(signal, partner, *place, out=signal)[0] is signal
    np.testing.assert_array_equal(signal, mixed)


@given(mixes(), st.integers(2, 8), st.integers(0, 7), st.integers(0, 7))
def test_eam_label_keeps_mass_and_winner(mix: Mix, classes: int, own: int, other: int) -> None:
    own, other = own % classes, other % classes
    y_i, y_j = np.eye(classes)[own], np.eye(classes)[other]
    _, weight = eam(*mix)
    label = mix_labels(y_i, y_j, weight)
    assert 0 < weight < 0.380
    assert label.sum() == pytest.approx(1, abs=1e-15)
    assert label.argmax() == own
    if own == other:
        np.testing.assert_array_equal(label, y_i)


@given(mixes(), st.integers(-8, 8), st.integers(-8, 8))
def test_eam_partner_gain_cancels_and_own_gain_factors_out(mix: Mix, own_log2: int, partner_log2: int) -> None:
    signal, partner, mix_length, start, partner_start, snr_db = mix
    place = (mix_length, start, partner_start, snr_db)
    own_gain, partner_gain = (
        np.float32(2.0**own_log2),
        np.float32(2.0**partner_log2),
    )  # exact in floating point
    mixed, weight = eam(signal, partner, *place)
    scaled, scaled_weight = eam(own_gain * signal, partner_gain * partner, *place)
    np.testing.assert_allclose(scaled, own_gain * mixed, rtol=1e-6, atol=1e-6 * own_gain * np.abs(mixed).max())
    assert scaled_weight == weight


@pytest.mark.parametrize(("snr_db", "share"), [(-5, 0.7597469), (0, 0.5), (10, 0.0909091)])
def test_eam_weight_by_hand(snr_db: float, share: float) -> None:
    generator = np.random.default_rng(1)
    signal, partner = generator.normal(size=(2, 100)).astype(np.float32)
    assert eam(signal, partner, 40, 10, 60, snr_db)[1] == pytest.approx(share * 40 / 100, abs=1e-7)


def test_eam_by_hand() -> None:
    signal, partner = floats([3, 4, 0, 0, 1]), floats([9, 0, 1])
    mixed, weight = eam(signal, partner, mix_length=2, start=0, partner_start=1, snr_db=0)
    np.testing.assert_allclose(mixed, [3, 9, 0, 0, 1])  # the segment's energy is 25, the partner's 1: scale 5
    assert weight == pytest.approx(0.5 * 2 / 5)


@pytest.mark.parametrize("silent", ["signal", "partner", "both"])
def test_eam_leaves_silence_alone(silent: str) -> None:
    noise = np.random.default_rng(2).normal(size=50).astype(np.float32)
    signal, partner = noise.copy(), noise.copy()
    if silent != "partner":
        signal[10:20] = 0
    if silent != "signal":
        partner[30:40] = 0
    mixed, weight = eam(signal, partner, 10, 10, 30, 3.0)
    np.testing.assert_array_equal(mixed, signal)
    assert mixed is not signal
    assert weight == 0.0


def test_eam_refuses_a_segment_outside_the_crop() -> None:
    signal = np.ones(10, dtype=np.float32)
    with pytest.raises(AssertionError, match="inside"):
        eam(signal, signal, 4, 8, 8, 0.0)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_draws_are_legal(lengths_drawn: list[int], seed: int, probability: float) -> None:
    lengths = np.array(lengths_drawn)
    n = len(lengths)
    uniforms = np.random.default_rng(seed).random((n, 6))
    draws = draw_eam(uniforms, lengths, probability, SNR_DB)
    mixed = draws.partner >= 0
    np.testing.assert_array_equal(mixed, (uniforms[:, 0] < probability) & (lengths >= 3) & (n > 1))

    rows = np.arange(n)[mixed]
    partner, mix_length = draws.partner[mixed], draws.mix_length[mixed]
    assert (partner != rows).all()
    assert (partner < n).all()
    assert (mix_length >= 1).all()
    assert (2 * mix_length < lengths[mixed]).all()
    assert (mix_length <= lengths[partner]).all()
    assert (draws.start[mixed] >= 0).all()
    assert (draws.start[mixed] + mix_length <= lengths[mixed]).all()
    assert (draws.partner_start[mixed] >= 0).all()
    assert (draws.partner_start[mixed] + mix_length <= lengths[partner]).all()
    assert ((draws.snr_db[mixed] >= SNR_DB[0]) & (draws.snr_db[mixed] <= SNR_DB[1])).all()

    for values in (draws.mix_length, draws.start, draws.partner_start):
        assert values.dtype == np.int64
        assert (values[~mixed] == 0).all()
    assert np.isnan(draws.snr_db[~mixed]).all()


def test_draw_by_hand_at_both_ends() -> None:
    lengths = np.array([11, 100, 4])
    lowest = draw_eam(np.zeros((3, 6)), lengths, 1.0, SNR_DB)
    np.testing.assert_array_equal(lowest.partner, [1, 0, 0])
    np.testing.assert_array_equal(lowest.mix_length, [1, 1, 1])
    np.testing.assert_array_equal(lowest.start, [0, 0, 0])
    np.testing.assert_array_equal(lowest.snr_db, [-5, -5, -5])

    highest = np.full((3, 6), LAST)
    highest[:, 0] = 0
    drawn = draw_eam(highest, lengths, 1.0, SNR_DB)
    np.testing.assert_array_equal(drawn.partner, [2, 2, 1])
    np.testing.assert_array_equal(drawn.mix_length, [4, 4, 1])  # floor(10 / 2) = 5 and 49, cut to the partner's 4
    np.testing.assert_array_equal(drawn.start, [7, 96, 3])
    np.testing.assert_array_equal(drawn.partner_start, [0, 0, 99])
    np.testing.assert_allclose(drawn.snr_db, 10)


def test_every_column_draws_one_thing() -> None:
    lengths = np.array([11, 100, 40])
    lowest = draw_eam(np.zeros((3, 6)), lengths, 1.0, SNR_DB)
    columns = {1: "partner", 2: "mix_length", 3: "start", 4: "partner_start", 5: "snr_db"}
    for column, name in columns.items():
        uniforms = np.zeros((3, 6))
        uniforms[:, column] = LAST
        drawn = draw_eam(uniforms, lengths, 1.0, SNR_DB)
        moved = {other for other in columns.values() if (getattr(drawn, other) != getattr(lowest, other)).any()}
        assert moved == {name}


def test_nobody_is_mixed_at_probability_zero() -> None:
    for draws in (
        draw_eam(np.zeros((3, 6)), np.full(3, 9), 0.0, SNR_DB),
        draw_lam(np.zeros((3, 6)), np.full(3, 9), 0.0),
    ):
        np.testing.assert_array_equal(draws.partner, [-1, -1, -1])


def test_draws_are_uniform() -> None:
    n = 60_000
    uniforms = np.random.default_rng(3).random((n, 6))
    draws = draw_eam(uniforms, np.full(n, 9), 0.5, SNR_DB)
    mixed = draws.partner >= 0
    assert mixed.mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(np.bincount(draws.mix_length[mixed])[1:] / mixed.sum(), 0.25, atol=0.01)
    for length in (1, 4):  # every legal start, the last one included, equally often
        for starts in (draws.start, draws.partner_start):
            share = np.bincount(starts[draws.mix_length == length], minlength=10 - length)
            np.testing.assert_allclose(share / share.sum(), 1 / (10 - length), atol=0.012)
    assert draws.snr_db[mixed].mean() == pytest.approx(2.5, abs=0.1)
    assert draws.snr_db[mixed].std() == pytest.approx(15 / 12**0.5, abs=0.05)

    few = draw_eam(np.tile(uniforms[:20_000], (3, 1)), np.full(3 * 20_000, 9), 1.0, SNR_DB)
    assert np.abs(few.partner.mean() / (3 * 20_000) - 0.5) < 0.01


def test_partners_are_uniform_over_the_others() -> None:
    grid = (np.arange(400) + 0.5) / 400
    lengths = np.full(5, 9)
    counts = np.zeros((5, 5), dtype=int)
    for u in grid:
        uniforms = np.full((5, 6), u)
        uniforms[:, 0] = 0
        counts[np.arange(5), draw_eam(uniforms, lengths, 1.0, SNR_DB).partner] += 1
    np.testing.assert_array_equal(counts, 100 * (1 - np.eye(5, dtype=int)))


def test_shortest_utterance_that_can_be_mixed() -> None:
    draws = draw_eam(np.zeros((4, 6)), np.array([1, 2, 3, 4]), 1.0, SNR_DB)
    np.testing.assert_array_equal(draws.partner, [-1, -1, 0, 0])
    np.testing.assert_array_equal(draws.mix_length, [0, 0, 1, 1])


@pytest.mark.parametrize("n", [0, 1])
def test_nobody_to_mix_with(n: int) -> None:
    uniforms, lengths = np.zeros((n, 6)), np.full(n, 100)
    for draws in (draw_eam(uniforms, lengths, 1.0, SNR_DB), draw_lam(uniforms, lengths, 1.0)):
        assert (draws.partner == -1).all()
        assert len(draws.partner) == len(draws.snr_db) == n


def test_draw_lam_takes_the_same_partners_whole() -> None:
    n = 4  # so few that the first utterance is a partner too
    lengths = np.arange(3, 3 + n)
    uniforms = np.random.default_rng(2).random((n, 6))
    energy_adaptive, label_adaptive = (
        draw_eam(uniforms, lengths, 0.5, SNR_DB),
        draw_lam(uniforms, lengths, 0.5),
    )
    np.testing.assert_array_equal(label_adaptive.partner, energy_adaptive.partner)
    mixed = label_adaptive.partner >= 0
    assert 0 in label_adaptive.partner
    np.testing.assert_array_equal(label_adaptive.mix_length[mixed], lengths[label_adaptive.partner[mixed]])
    assert (label_adaptive.mix_length[~mixed] == 0).all()
    assert (label_adaptive.start == 0).all()
    assert (label_adaptive.partner_start == 0).all()
    assert np.isnan(label_adaptive.snr_db).all()


def test_lam_by_hand() -> None:
    short, long = floats([2, 4]), floats([1, 1, 6])
    mixed, weight = lam(short, long)
    np.testing.assert_array_equal(mixed, floats([1.5, 2.5, 3]))
    assert weight == pytest.approx(3 / 5)
    swapped, swapped_weight = lam(long, short)
    np.testing.assert_array_equal(swapped, mixed)
    assert swapped_weight == pytest.approx(2 / 5)
    np.testing.assert_array_equal(short, floats([2, 4]))


@given(st.floats(0, 1), st.integers(0, 3), st.integers(0, 3))
def test_labels_keep_their_mass(weight: float, own: int, other: int) -> None:
    label = mix_labels(np.eye(4)[own], np.eye(4)[other], weight)
    expected = (1 - weight) * np.eye(4)[own] + weight * np.eye(4)[other]
    np.testing.assert_allclose(label, expected, atol=1e-15)
    assert label.sum() == pytest.approx(1, abs=1e-15)
    if own == other:
        np.testing.assert_array_equal(label, np.eye(4)[own])


def test_labels_of_many_at_once() -> None:
    y_i, y_j, weights = np.eye(3), np.eye(3)[[1, 1, 0]], np.array([0.25, 0.5, 0.0])
    expected = [mix_labels(*one) for one in zip(y_i, y_j, weights, strict=True)]
    np.testing.assert_array_equal(mix_labels(y_i, y_j, weights), expected)
