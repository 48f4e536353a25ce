"""Near-duplicates: every alteration is found, other takes of the same sentence are not, and the search misses none."""

import io
import os
from collections.abc import Callable
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from sermll.audio import SAMPLE_RATE_HZ, read_recording, to_int16
from sermll.corpora import CORPORA
from sermll.corpora.synthetic import render
from sermll.fingerprint import LEAST_FRAMES, THRESHOLD, fingerprint, near_duplicates
from sermll.rows import Utterance

CORPORA_DIR = Path(os.environ.get("SERMLL_CORPORA", Path(__file__).parents[3] / "shared" / "corpora"))


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """24 clips of 1 to 2 s: three takes of one sentence by four voices in two emotions. Read-only."""
    names = product(("f1", "f2", "m1", "m2"), ("angry", "sad"), (1, 2, 3))
    return [to_int16(render(speaker, emotion, "s1", take)) for speaker, emotion, take in names]


@pytest.fixture(scope="module")
def prints(clips: list[np.ndarray]) -> list[np.ndarray]:
    return [fingerprint(samples) for samples in clips]


def through_file(samples: np.ndarray, kind: str, subtype: str, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    file.seek(0)
    return soundfile.read(file, dtype="int16")[0]


def telephone(samples: np.ndarray) -> np.ndarray:
    narrow = through_file(to_int16(resample_poly(samples / 32_768, 1, 2)), "WAV", "ULAW", 8_000)
    return to_int16(resample_poly(narrow / 32_768, 2, 1))


def with_noise(samples: np.ndarray, snr_db: float) -> np.ndarray:
    signal = samples / 32_768
    noise = np.random.default_rng(0).standard_normal(len(signal))
    return to_int16(signal + noise * np.sqrt(np.mean(signal**2) / 10 ** (snr_db / 10)))


ALTERATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda samples: samples,
    "inverted": lambda samples: to_int16(samples / -32_768),
    "gain -12 dB": lambda samples: to_int16(samples / 32_768 / 4),
    "clipped at half the peak": lambda samples: np.clip(samples, -abs(samples.min()) // 2, samples.max() // 2),
    "MP3": lambda samples: through_file(samples, "MP3", "MPEG_LAYER_III"),
    "Vorbis": lambda samples: through_file(samples, "OGG", "VORBIS"),
    "8 bits": lambda samples: through_file(samples, "WAV", "PCM_U8"),
    "mu-law at 8 kHz": telephone,
    "noise": lambda samples: with_noise(samples, 30),
    "start cut": lambda samples: samples[4_567:],
    "end cut": lambda samples: samples[:-4_567],
    "both cut": lambda samples: samples[2_345:-3_333],
    "silence before": lambda samples: np.concatenate([np.zeros(4_800, np.int16), samples]),
    "start cut, MP3": lambda samples: through_file(samples[4_567:], "MP3", "MPEG_LAYER_III"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_altered_copies_are_found_and_nothing_else(
    clips: list[np.ndarray], prints: list[np.ndarray], alteration: str
) -> None:
    chosen = range(0, len(clips), 3)
    copies = [fingerprint(ALTERATIONS[alteration](clips[i])) for i in chosen]
    pairs = near_duplicates([*prints, *copies])
    assert [(i, j) for i, j, _ in pairs] == [(i, len(prints) + copy) for copy, i in enumerate(chosen)]
    assert all(THRESHOLD <= similarity <= 1 for *_, similarity in pairs)


def test_takes_of_one_sentence_by_one_voice_stay_well_apart(prints: list[np.ndarray]) -> None:
    assert near_duplicates(prints) == []
    assert all(similarity < 0.45 for *_, similarity in near_duplicates(prints, threshold=0.0))


def test_a_recording_against_itself_and_at_twice_the_gain(clips: list[np.ndarray]) -> None:
    samples = clips[0] // 4
    once, twice = fingerprint(samples), fingerprint(2 * samples)
    assert (once.dtype, once.shape) == (np.uint32, ((len(samples) - 512) // 80 + 1 - 4,))
    np.testing.assert_array_equal(once, twice)
    assert near_duplicates([once, twice]) == [(0, 1, 1.0)]


def test_words_are_the_signs_of_changes_of_band_differences() -> None:
    """By plain loops and a discrete Fourier transform written out, on noise that has no ties."""
    samples = np.random.default_rng(0).integers(-9_000, 9_000, 512 + 6 * 80).astype(np.int16)
    edges_hz = [300 * 10 ** (k / 33) for k in range(34)]
    wave = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(512)) / 512)
    energies = []
    for frame in range(7):
        power = np.abs(wave @ (samples[80 * frame : 80 * frame + 512] * np.hanning(512))) ** 2
        bands = []
        for low_hz, high_hz in pairwise(edges_hz):
            centre_hz, width_hz = (low_hz * high_hz) ** 0.5, max(high_hz - low_hz, 31.25)
            bands.append(sum(power[k] * max(0.0, 1 - abs(31.25 * k - centre_hz) / width_hz) for k in range(257)))
        energies.append(bands)
    expected = []
    for then, now in zip(energies[:-4], energies[4:], strict=True):
        bits = [now[b + 1] - now[b] > then[b + 1] - then[b] for b in range(32)]
        expected.append(sum(bit << b for b, bit in enumerate(bits)))
    assert fingerprint(samples).tolist() == expected


@pytest.mark.parametrize("length", [0, 1, 511, 512, 831, 832, 16_000])
def test_silence_of_any_length_matches_nothing(length: int) -> None:
    silence = fingerprint(np.zeros(length, np.int16))
    assert len(silence) == max(0, (length - 512) // 80 - 3)
    assert not silence.any()
    assert near_duplicates([silence, silence]) == []


def test_steady_sounds_match_nothing() -> None:
    time_s = np.arange(16_000) / 16_000
    steady = [np.full(16_000, 3_000, np.int16)]
    steady += [to_int16(0.5 * np.sin(2 * np.pi * hz * time_s)) for hz in (1_000, 1_000, 2_000)]
    assert not any(fingerprint(samples).any() for samples in steady)


def test_humming_with_other_noise_is_another_recording() -> None:
    time_s = np.arange(32_000) / 16_000
    hum = sum(np.sin(2 * np.pi * 50 * k * time_s) / k for k in range(1, 30)) / 10
    noise = 1e-3 * np.random.default_rng(0).standard_normal((2, 32_000))
    assert near_duplicates([fingerprint(to_int16(hum + one)) for one in noise]) == []


def test_too_little_speech_to_decide_matches_nothing() -> None:
    samples = np.random.default_rng(0).integers(-9_000, 9_000, 16_000).astype(np.int16)
    enough, short = (fingerprint(samples[: 512 + (frames + 3) * 80]) for frames in (LEAST_FRAMES, LEAST_FRAMES - 1))
    assert near_duplicates([enough, enough]) == [(0, 1, 1.0)]
    assert near_duplicates([short, short]) == []


def test_a_part_is_found_in_the_whole_but_less_than_half_in_common_is_no_copy(prints: list[np.ndarray]) -> None:
    whole = np.concatenate([prints[3], prints[0], prints[6]])
    assert near_duplicates([prints[0], whole]) == [(0, 1, 1.0)]
    first, second = np.random.default_rng(0).integers(1, 2**32, (2, 300), dtype=np.uint32)
    for common, pairs in ((149, []), (150, [(0, 1, 1.0)])):
        assert near_duplicates([first, np.concatenate([first[-common:], second[common:]])]) == pairs


def test_no_fingerprints_one_and_empty_ones(prints: list[np.ndarray]) -> None:
    empty = np.zeros(0, np.uint32)
    assert near_duplicates([]) == []
    assert near_duplicates(prints[:1]) == []
    assert near_duplicates([empty, empty]) == []
    assert near_duplicates([empty, prints[0], empty, prints[0]]) == [(1, 3, 1.0)]


def slowly(prints: list[np.ndarray], threshold: float) -> list[tuple[int, int, float]]:
    """All pairs at all shifts, word by word."""
    pairs = []
    for (i, one), (j, other) in combinations(enumerate([words.tolist() for words in prints]), 2):
        best = -1.0
        for shift in range(-len(other) + 1, len(one)):
            both = [(a, b) for a, b in zip(one[max(shift, 0) :], other[max(-shift, 0) :], strict=False) if a and b]
            least = max(LEAST_FRAMES, 0.5 * min(sum(map(bool, one)), sum(map(bool, other))))
            if len(both) >= least and any(a == b for a, b in both):
                wrong = sum((a ^ b).bit_count() for a, b in both)
                best = max(best, 1 - 2 * wrong / (32 * len(both)))
        if best >= threshold:
            pairs.append((i, j, best))
    return pairs


def test_the_search_equals_a_slow_one_over_all_pairs_and_shifts() -> None:
    rng = np.random.default_rng(0)
    prints = []
    for _ in range(4):
        words = rng.integers(1, 2**32, rng.integers(105, 160), dtype=np.uint32)
        words[rng.random(len(words)) < 0.1] = 0
        prints.append(words)
        for errors in (0.0, 0.02, 0.1):  # a part of it, with some bits wrong
            flips = (rng.random((len(words), 32)) < errors) @ (1 << np.arange(32, dtype=np.uint32))
            silent = (words == 0) | (rng.random(len(words)) < 0.05)  # some frames in one of the two alone
            copy = np.where(silent, np.uint32(0), words ^ flips)
            prints.append(np.concatenate([rng.integers(1, 2**32, 9, dtype=np.uint32), copy[rng.integers(0, 15) :]]))
    prints = [prints[i] for i in rng.permutation(len(prints))]
    for threshold in (0.5, 0.9, 1.0):
        expected = slowly(prints, threshold)
        assert [pair[:2] for pair in near_duplicates(prints, threshold)] == [pair[:2] for pair in expected]
        assert near_duplicates(prints, threshold) == [(i, j, pytest.approx(s)) for i, j, s in expected]
    assert len(slowly(prints, 0.5)) > 12  # the test is about something


def test_many_recordings_take_no_time_and_planted_copies_are_found() -> None:
    rng = np.random.default_rng(0)
    prints = list(rng.integers(1, 2**32, (3_000, 200), dtype=np.uint32))
    prints += [prints[i][20:] for i in (5, 7, 2_999)]
    assert near_duplicates(prints) == [(5, 3_000, 1.0), (7, 3_001, 1.0), (2_999, 3_002, 1.0)]


def test_more_copies_than_are_compared_hang_together(prints: list[np.ndarray]) -> None:
    copies = 150
    pairs = near_duplicates([prints[0]] * copies)
    assert len(pairs) == len(set(pairs)) >= 100 * (copies - 100)
    assert [j for i, j, _ in pairs if j == i + 1] == list(range(1, copies))
    assert {similarity for *_, similarity in pairs} == {1.0}


@pytest.mark.audio
@pytest.mark.parametrize(
    ("name", "expected"), [("ravdess", [("03-01-03-01-02-01-07", "03-01-03-01-02-02-07", 1.0)]), ("emodb", [])]
)
def test_real_corpora_hold_no_copies_but_the_known_one(name: str, expected: list[tuple[str, str, float]]) -> None:
    root = CORPORA_DIR / name
    if not root.is_dir():
        pytest.skip(f"no recordings at {root}; set SERMLL_CORPORA to a folder with {name}/ in it")
    rows = [row for row in CORPORA[name].read(root) if isinstance(row, Utterance)]
    pairs = near_duplicates([fingerprint(read_recording(root / row.path).samples) for row in rows])
    assert [(rows[i].id, rows[j].id, similarity) for i, j, similarity in pairs] == expected
