"""Decoding: every kind of file that should work, and every kind of damage, named."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from sermll.audio import read_recording, resample, to_float, to_int16
from sermll.errors import AudioError


def sine(rate_hz: int, duration_s: float = 0.5, frequency_hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency_hz * np.arange(int(rate_hz * duration_s)) / rate_hz)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_16_bit_files_at_16_khz_come_back_bit_exact(tmp_path: Path, suffix: str) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 8000).astype(np.int16)
    soundfile.write(tmp_path / f"a.{suffix}", samples, 16_000, subtype="PCM_16")
    recording = read_recording(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(recording.samples, samples)
    assert (recording.source_rate_hz, recording.source_channels) == (16_000, 1)


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "PCM_16"), ("flac", "PCM_16"), ("wav", "PCM_24")])
def test_what_is_decoded_is_libsndfiles_floats_to_the_bit(tmp_path: Path, suffix: str, subtype: str) -> None:
    every = np.random.default_rng(0).permutation(np.arange(-32_768, 32_768).repeat(2)).astype(np.int16).reshape(-1, 2)
    soundfile.write(tmp_path / f"a.{suffix}", every, 48_000, subtype=subtype)
    floats, rate_hz = soundfile.read(tmp_path / f"a.{suffix}", dtype="float32")
    expected = to_int16(resample(floats.mean(axis=1), rate_hz))
    np.testing.assert_array_equal(read_recording(tmp_path / f"a.{suffix}").samples, expected)


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = sine(16_000), sine(16_000, frequency_hz=700)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    recording = read_recording(tmp_path / "a.wav")
    np.testing.assert_array_equal(recording.samples, to_int16((left + right) / 2))
    assert recording.source_channels == 2


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_resampled_tones_are_the_same_tone(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", sine(rate_hz), rate_hz, subtype="FLOAT")
    samples = to_float(read_recording(tmp_path / "a.wav").samples)
    assert len(samples) == 8_000
    np.testing.assert_allclose(samples[500:-500], sine(16_000)[500:-500], atol=1e-3)


def test_resampling_agrees_with_a_polyphase_filter_and_removes_what_would_alias(tmp_path: Path) -> None:
    signal = sine(48_000) + sine(48_000, frequency_hz=12_000)  # the second lies above the new half rate
    soundfile.write(tmp_path / "a.wav", signal, 48_000, subtype="FLOAT")
    ours = to_float(read_recording(tmp_path / "a.wav").samples)
    theirs = resample_poly(signal.astype(np.float64), 1, 3, window=("kaiser", 12.0))
    np.testing.assert_allclose(ours[800:-800], theirs[800:-800], atol=2e-3)


@pytest.mark.parametrize("rate_hz", [8_000, 12_345, 44_100, 48_000])
@pytest.mark.parametrize("count", [1_235, 48_001])
def test_resampling_is_librosas_to_the_bit(rate_hz: int, count: int) -> None:
    import librosa

    signal = np.random.default_rng(0).normal(0, 0.1, count).astype(np.float32)
    expected = librosa.resample(signal, orig_sr=rate_hz, target_sr=16_000, res_type="soxr_hq")
    found = resample(signal, rate_hz)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_silent_ends_are_trimmed_on_request(tmp_path: Path) -> None:
    silence = np.zeros(8000, np.float32)
    soundfile.write(tmp_path / "a.wav", np.concatenate([silence, sine(16_000), silence]), 16_000)
    assert len(read_recording(tmp_path / "a.wav").samples) == 24_000
    assert 7_500 <= len(read_recording(tmp_path / "a.wav", trim_db=40).samples) <= 10_500


def write_bad(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("this is not audio")
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "missing":
        pass
    elif kind == "truncated":
        soundfile.write(path.with_suffix(".flac"), np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
        path.with_suffix(".flac").rename(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        signal = {
            "no samples": np.zeros(0),
            "silent": np.zeros(16_000),
            "nearly silent": np.full(16_000, 1e-5),
            "nan": np.where(np.arange(16_000) == 7, np.nan, 0.1),
            "infinite": np.where(np.arange(16_000) == 7, np.inf, 0.1),
            "short": sine(16_000, 0.05),
        }[kind]
        soundfile.write(path, signal, 16_000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "corrupt"),
        ("zero bytes", "empty"),
        ("missing", "missing"),
        ("truncated", "corrupt"),
        ("no samples", "empty"),
        ("silent", "silent"),
        ("nearly silent", "silent"),
        ("nan", "nan"),
        ("infinite", "nan"),
        ("short", "short"),
    ],
)
def test_damage_is_named(tmp_path: Path, kind: str, reason: str) -> None:
    path = tmp_path / "a.wav"
    write_bad(path, kind)
    with pytest.raises(AudioError) as caught:
        read_recording(path)
    assert caught.value.reason == reason and str(caught.value)


def test_int16_clips_and_inverts() -> None:
    np.testing.assert_array_equal(to_int16(np.array([1.5, -1.5, 0.0])), [32767, -32768, 0])
    every = np.arange(-32768, 32768).astype(np.int16)
    np.testing.assert_array_equal(to_int16(to_float(every)), every)


def test_a_wav_file_whose_end_is_missing_is_found_by_its_header(tmp_path: Path) -> None:
    whole = tmp_path / "whole.wav"
    soundfile.write(whole, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    content = whole.read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match="is cut off: 16022 bytes are missing"):
        read_recording(tmp_path / "cut.wav")
    at = content.index(b"data") + 4
    for unknown in (0xFFFF_FFFF, 0x7FFF_FFFF):  # as programs write that stream into a pipe
        (tmp_path / "piped.wav").write_bytes(content[:at] + unknown.to_bytes(4, "little") + content[at + 4 :])
        assert len(read_recording(tmp_path / "piped.wav").samples) == 16_000


def test_a_part_of_a_file(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 32_000)
    soundfile.write(tmp_path / "x.wav", sound, 16_000)
    whole = read_recording(tmp_path / "x.wav").samples
    part = read_recording(tmp_path / "x.wav", start_s=0.5, end_s=1.25).samples
    np.testing.assert_array_equal(part, whole[8000:20_000])
    for start_s, end_s in ((1.0, 2.5), (3.0, None), (1.0, 1.0)):
        with pytest.raises(AudioError, match=r"lasts 2\.000 s"):
            read_recording(tmp_path / "x.wav", start_s=start_s, end_s=end_s)


def test_what_is_too_long_is_not_decoded(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "hour.wav", np.zeros(301 * 1000), 1000)
    with pytest.raises(AudioError, match="lasts 301 s; 300 s is the most") as caught:
        read_recording(tmp_path / "hour.wav")
    assert caught.value.reason == "long"
