"""Active speech level against P.56 written out sample by sample, and noise that is where and as loud as was asked."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from sermll.audio import to_float
from sermll.corpora.synthetic import render
from sermll.errors import DataError
from sermll.noise import active_level_db, add_noise, draws, read_noises

RATE_HZ = 16_000


def p56(speech: NDArray[np.float64], rate_hz: int) -> float:
    """Method B as the Recommendation tells it: one sample after the other, a counter and a hangover per threshold."""
    g = math.exp(-1 / (rate_hz * 0.03))
    hangover = math.ceil(0.2 * rate_hz)
    thresholds = [2.0**-power for power in range(20, 0, -1)]
    active, held = [0] * 20, [hangover] * 20
    p = q = energy = 0.0
    for x in speech.tolist():
        energy += x * x
        p = g * p + (1 - g) * abs(x)
        q = g * q + (1 - g) * p
        for j, threshold in enumerate(thresholds):
            if q >= threshold:
                active[j] += 1
                held[j] = 0
            elif held[j] < hangover:
                active[j] += 1
                held[j] += 1
    points = [
        (20 * math.log10(threshold), 10 * math.log10(energy / count))
        for threshold, count in zip(thresholds, active, strict=True)
        if count
    ]
    for (low_c, low_a), (high_c, high_a) in pairwise(points):
        if low_a - low_c > 15.9 >= high_a - high_c:
            low, high = 0.0, 1.0  # halve until the place between the two thresholds is found
            for _ in range(60):
                middle = (low + high) / 2
                margin = low_a + middle * (high_a - low_a) - (low_c + middle * (high_c - low_c))
                low, high = (middle, high) if margin > 15.9 else (low, middle)
            return low_a + low * (high_a - low_a)
    return -math.inf


def tone(amplitude: float, duration_s: float, frequency_hz: float = 440.0) -> NDArray[np.float64]:
    return amplitude * np.sin(2 * np.pi * frequency_hz * np.arange(int(duration_s * RATE_HZ)) / RATE_HZ)


def level_db(signal: NDArray) -> float:
    return float(10 * np.log10(np.mean(np.asarray(signal, np.float64) ** 2)))


@pytest.fixture(scope="module")
def speech() -> NDArray[np.float32]:
    return render("f1", "angry", "s1", 1).astype(np.float32)


@pytest.fixture(scope="module")
def noise() -> NDArray[np.int16]:
    return (1000 * np.random.default_rng(5).standard_normal(90_000)).astype(np.int16)


@pytest.mark.parametrize("gain", [1.0, 0.03, 0.001])
@pytest.mark.parametrize("rate_hz", [16_000, 8_000])
def test_level_is_that_of_the_recommendation(speech: NDArray[np.float32], gain: float, rate_hz: int) -> None:
    samples = gain * speech[:24_000].astype(np.float64)
    assert active_level_db(samples, rate_hz) == pytest.approx(p56(samples, rate_hz), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_level_of_bursts_is_that_of_the_recommendation(seed: int) -> None:
    generator = np.random.default_rng(seed)
    loudness = np.repeat(10 ** generator.uniform(-4, -0.5, 12) * (generator.random(12) < 0.7), 1_500)
    bursts = loudness * generator.standard_normal(len(loudness))
    assert active_level_db(bursts) == pytest.approx(p56(bursts, RATE_HZ), abs=1e-9)


def test_level_of_a_steady_tone_is_its_level() -> None:
    steady = tone(0.3, 20.0)
    assert active_level_db(steady) == pytest.approx(level_db(steady), abs=0.01)
    assert active_level_db(steady) == pytest.approx(20 * math.log10(0.3) - 3.01, abs=0.02)


def test_pauses_do_not_lower_the_level() -> None:
    halves = np.concatenate([tone(0.3, 10.0), np.zeros(10 * RATE_HZ)] * 2)
    assert active_level_db(halves) == pytest.approx(level_db(halves) + 3.01, abs=0.2)
    assert active_level_db(halves) == pytest.approx(active_level_db(tone(0.3, 20.0)), abs=0.2)


def test_pauses_shorter_than_the_hangover_are_speech() -> None:
    spoken = np.concatenate([tone(0.3, 0.3), np.zeros(int(0.15 * RATE_HZ))] * 40)
    assert active_level_db(spoken) == pytest.approx(level_db(spoken), abs=0.05)


def test_level_follows_the_gain(speech: NDArray[np.float32]) -> None:
    for halvings in range(6):  # thresholds are halves of one another, so this is exact
        found = active_level_db(speech / 2**halvings)
        assert found == pytest.approx(active_level_db(speech) - halvings * 20 * math.log10(2), abs=1e-9)


@pytest.mark.parametrize(
    "signal",
    [np.zeros(0), np.zeros(1), np.zeros(16_000), np.eye(1, 16_000)[0], 1e-7 * tone(1.0, 1.0)],
    ids=["empty", "one sample", "silent", "click", "far below 16 bits"],
)
def test_what_is_no_speech_has_no_level(signal: NDArray[np.float64]) -> None:
    assert active_level_db(signal) == p56(signal, RATE_HZ) == -math.inf


@pytest.mark.parametrize("snr_db", [40.0, 10.0, 0.0, -5.0, -30.0])
def test_measured_snr_is_the_one_asked_for(
    speech: NDArray[np.float32], noise: NDArray[np.int16], snr_db: float
) -> None:
    noisy, speech_db = add_noise(speech, noise, snr_db, draws(0, "u", "n"))
    assert noisy.dtype == np.float32 and noisy.shape == speech.shape
    assert speech_db == active_level_db(speech)
    assert speech_db - level_db(noisy.astype(np.float64) - speech) == pytest.approx(snr_db, abs=1e-6)


def test_sums_are_not_clipped(speech: NDArray[np.float32], noise: NDArray[np.int16]) -> None:
    noisy, _ = add_noise(speech, noise, -30.0, draws(0, "u", "n"))
    assert np.abs(noisy).max() > 1.5


def test_every_snr_has_the_same_segment(speech: NDArray[np.float32], noise: NDArray[np.int16]) -> None:
    levels = [20.0, 5.0, -5.0]
    together, _ = add_noise(speech, noise, levels, draws(3, "u", "n"))
    added = together.astype(np.float64) - speech
    for snr_db, sum_, part in zip(levels, together, added, strict=True):
        alone, _ = add_noise(speech, noise, snr_db, draws(3, "u", "n"))
        np.testing.assert_array_equal(sum_, alone)
        np.testing.assert_allclose(part * 10 ** ((snr_db - 20) / 20), added[0], atol=1e-6)


def added_segment(speech: NDArray[np.float32], noise: NDArray[np.int16], generator: np.random.Generator) -> NDArray:
    """What was added, scaled to the noise's own level: integers again."""
    noisy, _ = add_noise(speech, noise, 0.0, generator)
    part = noisy.astype(np.float64) - speech
    return np.rint(part * np.abs(noise).max() / np.abs(part).max()).astype(np.int64)


def test_a_long_noise_is_cut_and_a_short_one_goes_round(speech: NDArray[np.float32]) -> None:
    spoken = speech[:8_000]
    loud = np.tile([1000, -1000], 6_000).astype(np.int16)  # every part has its largest sample, whatever is cut
    marked = loud.copy()
    marked[::7] = np.arange(len(marked[::7])) % 900
    for seed in range(5):
        segment = added_segment(spoken, marked, draws(seed, "u", "n"))
        starts = [
            start for start in range(len(marked) - 8_000 + 1) if np.array_equal(marked[start : start + 8_000], segment)
        ]
        assert len(starts) == 1
    short = marked[:3_001]
    for seed in range(5):
        segment = added_segment(spoken, short, draws(seed, "u", "n"))
        assert any(np.array_equal(np.tile(np.roll(short, -start), 3)[:8_000], segment) for start in range(3_001))


def test_starts_reach_from_the_first_to_the_last_place(speech: NDArray[np.float32]) -> None:
    spoken = speech[:8_000]
    exact = np.tile([1000, -900], 4_000).astype(np.int16)
    assert np.array_equal(added_segment(spoken, exact, draws(0, "u", "n")), exact)
    one_more = np.append(exact, np.int16(-999))
    ends = {int(added_segment(spoken, one_more, draws(seed, "u", "n"))[-1]) for seed in range(20)}
    assert ends == {-900, -999}


def test_draws_depend_on_seed_utterance_and_noise_alone() -> None:
    def drawn(seed: int, utterance: str, noise: str) -> int:
        return int(draws(seed, utterance, noise).integers(2**40))

    pairs = [(utterance, noise) for utterance in ("u1", "u2") for noise in ("rain", "street")]
    forward = {pair: drawn(0, *pair) for pair in pairs}
    assert {pair: drawn(0, *pair) for pair in reversed(pairs)} == forward
    assert len({*forward.values(), drawn(1, "u1", "rain")}) == 5
    assert drawn(0, "u1r", "ain") != forward["u1", "rain"]


@pytest.mark.parametrize("samples", [np.zeros(4_000, np.float32), np.zeros(0, np.float32)])
def test_silent_speech_is_left_as_it_is(samples: NDArray[np.float32], noise: NDArray[np.int16]) -> None:
    noisy, speech_db = add_noise(samples, noise, [10.0, 0.0], draws(0, "u", "n"))
    assert speech_db == -math.inf
    assert noisy.shape == (2, len(samples)) and not noisy.any()
    noisy += 1  # a copy, nobody else's
    assert not samples.any()


def test_a_segment_without_sound_is_drawn_again(speech: NDArray[np.float32]) -> None:
    mostly_silent = np.zeros(200_000, np.int16)
    mostly_silent[150_000:151_000] = 500
    spoken = speech[8_000:12_000]
    for seed in range(10):
        noisy, speech_db = add_noise(spoken, mostly_silent, 0.0, draws(seed, "u", "n"))
        assert -60 < speech_db == pytest.approx(level_db(noisy.astype(np.float64) - spoken), abs=1e-6)


def write(path: Path, samples: NDArray, rate_hz: int = RATE_HZ) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate_hz)
    return path


def test_noises_are_the_audio_files_of_a_folder_by_stem(tmp_path: Path) -> None:
    write(tmp_path / "street.wav", tone(0.1, 1.0))
    write(tmp_path / "home" / "dishes.FLAC", np.stack([tone(0.1, 2.0), tone(0.3, 2.0)], axis=1))
    write(tmp_path / "cafe.flac", tone(0.1, 1.0, 300.0)[:8_000], 8_000)
    (tmp_path / "LICENCE.txt").write_text("free")
    noises = read_noises(tmp_path)
    assert [(noise.name, len(noise.samples)) for noise in noises] == [
        ("cafe", 16_000),
        ("dishes", 32_000),
        ("street", 16_000),
    ]
    assert level_db(to_float(noises[1].samples)) == pytest.approx(20 * math.log10(0.2) - 3.01, abs=0.01)
    assert len({noise.sha256 for noise in noises}) == 3


def test_noises_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    write(tmp_path / "good.wav", tone(0.1, 1.0))
    write(tmp_path / "a" / "good.flac", tone(0.1, 1.0))
    write(tmp_path / "quiet.wav", np.zeros(16_000))
    (tmp_path / "words.wav").write_text("not audio")
    with pytest.raises(DataError) as caught:
        read_noises(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 of 4 noises cannot be used")
    assert "good.wav: has the name of" in lines[1] and "a/good.flac" in lines[1]
    assert "quiet.wav: silent" in lines[2] and "words.wav: corrupt" in lines[3]


def test_a_folder_without_noises_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_noises(tmp_path / "absent")
    (tmp_path / "notes.mp3").write_text("x")
    with pytest.raises(DataError, match="holds no WAV or FLAC file"):
        read_noises(tmp_path)
