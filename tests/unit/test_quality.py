"""Measures of recordings: hand values of sines and ramps, what filters and clipping do, and the faults of a corpus."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import firwin, lfilter, resample_poly

from sermll.audio import to_int16
from sermll.corpora.synthetic import render
from sermll.quality import (
    Quality,
    is_band_limited,
    is_clipped,
    is_nearly_silent,
    is_offset,
    measure,
    narrow_band,
)

DECISIONS = (is_clipped, is_nearly_silent, is_offset, is_band_limited)

GOOD = Quality(
    peak_db=-3.0,
    level_db=-20.0,
    clipped_share=0.0,
    silent_share=0.2,
    dc_offset=0.0,
    bandwidth_hz=8_000.0,
    source_rate_hz=48_000,
)


def sine(amplitude: float, frequency_hz: float = 437.0, duration_s: float = 1.0) -> np.ndarray:
    return to_int16(amplitude * np.sin(2 * np.pi * frequency_hz * np.arange(int(16_000 * duration_s)) / 16_000))


def decided(quality: Quality) -> list[str]:
    return [decide.__name__ for decide in DECISIONS if decide(quality)]


def noise(level: float = 0.1, length: int = 32_000, seed: int = 0) -> np.ndarray:
    return level * np.random.default_rng(seed).standard_normal(length)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return to_int16(render("f1", "angry", "s1", 1))


@pytest.mark.parametrize("amplitude", [0.9, 0.1, 0.001])
def test_levels_of_a_sine(amplitude: float) -> None:
    quality = measure(sine(amplitude), 16_000)
    assert quality.peak_db == pytest.approx(20 * math.log10(amplitude), abs=0.1)
    assert quality.level_db == pytest.approx(20 * math.log10(amplitude) - 3.01, abs=0.1)
    assert (quality.silent_share, quality.clipped_share) == (0.0, 0.0)
    assert quality.dc_offset == pytest.approx(0.0, abs=1e-4)


def test_level_is_that_of_the_speech_and_not_of_the_pauses() -> None:
    loud, pause = sine(0.5), np.zeros(48_000, np.int16)
    alone, paused = measure(loud, 16_000), measure(np.concatenate([pause, loud, pause]), 16_000)
    assert paused.level_db == pytest.approx(alone.level_db, abs=0.2)  # frames at the edges are half full
    assert paused.silent_share == pytest.approx(6 / 7, abs=0.01)


@pytest.mark.parametrize(("below_db", "silent"), [(30, 0.0), (39, 0.0), (41, 0.5), (60, 0.5)])
def test_silence_is_40_db_below_the_loudest_frame(below_db: float, silent: float) -> None:
    samples = np.concatenate([sine(0.5), sine(0.5 * 10 ** (-below_db / 20))])
    assert measure(samples, 16_000).silent_share == pytest.approx(silent, abs=0.02)


def test_offset_is_measured_and_is_no_level() -> None:
    quality = measure(sine(0.1) + np.int16(3_277), 16_000)
    assert quality.dc_offset == pytest.approx(0.1, abs=1e-3)
    assert quality.level_db == pytest.approx(-23.01, abs=0.1)
    assert quality.peak_db == pytest.approx(20 * math.log10(0.2), abs=0.1)


@pytest.mark.parametrize(
    ("values", "clipped"),
    [
        ([0, 32_767, 0, -32_768, 5], 2),  # at full scale a single sample counts
        ([9_000, 9_000, 9_000, 0, -5_000, -5_000, -5_000, -5_000], 7),
        ([9_000, 9_000, 8_999, 9_000, 9_000, -9_000], 0),  # two in a row are a peak
        ([8_000, 8_000, 8_000, 9_000, -9_000], 0),  # not at the extreme
        ([3_000, 3_000, 3_000, -3_000], 0),  # below -20 dB
        ([9_000] * 5, 5),
    ],
)
def test_clipped_samples_by_hand(values: list[int], clipped: int) -> None:
    assert measure(np.array(values, np.int16), 16_000).clipped_share == pytest.approx(clipped / len(values))


def test_clipping_is_measured_at_any_ceiling_and_half_of_it_after_resampling(speech: np.ndarray) -> None:
    signal = speech / np.abs(speech).max() * 4
    share = float(np.mean(np.abs(signal) >= 1))
    assert share > 0.01
    assert measure(speech, 16_000).clipped_share < 0.0001
    assert measure(to_int16(signal), 16_000).clipped_share == pytest.approx(share, abs=1e-3)
    assert measure(to_int16(0.3 * np.clip(signal, -1, 1)), 16_000).clipped_share > 0.7 * share
    source = np.clip(resample_poly(signal, 3, 1), -1, 1)
    assert measure(to_int16(resample_poly(source, 1, 3)), 48_000).clipped_share > 0.3 * share


def test_coarse_rounding_of_a_soft_recording_is_no_clipping(speech: np.ndarray) -> None:
    soft = to_int16(0.02 * speech / np.abs(speech).max())
    assert measure(np.round(soft / 256).astype(np.int16) * np.int16(256), 16_000).clipped_share == 0


@pytest.mark.parametrize("edge_hz", [1_000, 3_400, 5_500, 7_000])
@pytest.mark.parametrize("level", [0.1, 0.003, 0.0003])
def test_bandwidth_of_filtered_noise(edge_hz: float, level: float) -> None:
    low_pass = firwin(501, edge_hz, fs=16_000, window="blackman")
    quality = measure(to_int16(np.asarray(lfilter(low_pass, 1.0, noise(level)))), 16_000)
    assert edge_hz <= quality.bandwidth_hz <= edge_hz + 400


def test_bandwidth_of_white_noise_and_of_a_tone() -> None:
    assert measure(to_int16(noise()), 16_000).bandwidth_hz == 8_000
    assert measure(sine(0.5, 440.0), 16_000).bandwidth_hz == 500
    assert measure(to_int16(noise()), 8_000).bandwidth_hz == 4_000  # no file holds more than half its rate


@pytest.mark.parametrize(("below_db", "expected_hz"), [(48.0, 6_000), (52.0, 500)])
def test_bands_far_below_the_loudest_hold_no_sound(below_db: float, expected_hz: float) -> None:
    low, high = sine(0.5, 437.5) / 32_768, sine(0.5, 5_906.25) / 32_768  # each in the midst of its band
    assert measure(to_int16(low + 10 ** (-below_db / 20) * high), 16_000).bandwidth_hz == expected_hz


@pytest.mark.parametrize("dither", [0.0, 1.0])
@pytest.mark.parametrize("rate_hz", [8_000, 11_025])
def test_speech_brought_up_from_a_lower_rate_is_found(speech: np.ndarray, rate_hz: int, dither: float) -> None:
    assert measure(speech, 48_000).bandwidth_hz >= 7_000
    up = resample_poly(resample_poly(speech / 32_768, rate_hz // 25, 640), 640, rate_hz // 25)
    triangle = np.random.default_rng(0).random((2, len(up))).sum(axis=0) - 1
    quality = measure(to_int16(up + dither * triangle / 32_768), 48_000)
    assert rate_hz / 2 - 500 <= quality.bandwidth_hz <= rate_hz / 2 + 750
    assert decided(quality) == ["is_band_limited"]


@pytest.mark.parametrize("length", [0, 1, 2, 511, 512, 513, 16_000])
def test_silence_of_any_length(length: int) -> None:
    quality = measure(np.zeros(length, np.int16), 16_000)
    assert quality == Quality(-math.inf, -math.inf, 0.0, 1.0, 0.0, 0.0, 16_000)
    assert decided(quality) == ["is_nearly_silent"]


def test_less_than_a_frame() -> None:
    one = measure(np.array([16_384], np.int16), 16_000)
    assert (one.peak_db, one.dc_offset) == (pytest.approx(-6.02, abs=0.01), 0.5)
    assert (one.level_db, one.silent_share, one.bandwidth_hz) == (-math.inf, 1.0, 0.0)
    part = measure(sine(0.5)[:511], 16_000)
    assert part.level_db == pytest.approx(-9.03, abs=0.1)
    assert (part.silent_share, part.bandwidth_hz) == (0.0, 500.0)


def test_nothing_but_an_offset_is_silence() -> None:
    quality = measure(np.full(16_000, 1_000, np.int16), 16_000)
    assert (quality.level_db, quality.silent_share, quality.bandwidth_hz) == (-math.inf, 1.0, 0.0)
    assert decided(quality) == ["is_nearly_silent", "is_offset"]


@pytest.mark.parametrize(
    ("field", "fair", "bad", "decision"),
    [
        ("clipped_share", 0.001, 0.0011, "is_clipped"),
        ("level_db", -65.0, -65.1, "is_nearly_silent"),
        ("level_db", -60.0, -math.inf, "is_nearly_silent"),
        ("silent_share", 0.9, 0.91, "is_nearly_silent"),
        ("dc_offset", 0.01, 0.011, "is_offset"),
        ("dc_offset", -0.01, -0.011, "is_offset"),
        ("bandwidth_hz", 6_500.0, 6_250.0, "is_band_limited"),
    ],
)
def test_default_limits(field: str, fair: float, bad: float, decision: str) -> None:
    assert decided(replace(GOOD, **{field: fair})) == []
    assert decided(replace(GOOD, **{field: bad})) == [decision]


def test_limits_can_be_moved() -> None:
    assert is_clipped(replace(GOOD, clipped_share=0.0005), share=0.0001)
    assert is_nearly_silent(GOOD, level_db=-10.0)
    assert is_nearly_silent(GOOD, share=0.1)
    assert is_offset(replace(GOOD, dc_offset=-0.005), share=0.001)
    assert not is_band_limited(replace(GOOD, bandwidth_hz=4_000.0), share=0.5)
    assert narrow_band([GOOD, GOOD, replace(GOOD, bandwidth_hz=7_500.0)], share=0.95) == [False, False, True]


def test_narrow_recordings_stand_out_of_a_wide_corpus_only() -> None:
    narrow = replace(GOOD, bandwidth_hz=4_000.0, source_rate_hz=8_000)
    silent = replace(GOOD, bandwidth_hz=0.0)
    assert narrow_band([GOOD, narrow, GOOD, silent, GOOD]) == [False, True, False, False, False]
    assert narrow_band([narrow] * 3) == [False] * 3
    assert narrow_band([]) == []
    assert not is_band_limited(narrow)  # all that its rate can hold
    assert is_band_limited(replace(narrow, source_rate_hz=48_000))
