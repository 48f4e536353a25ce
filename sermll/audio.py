"""One audio file in, one clean 16 kHz mono signal out, or a named reason why not."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from sermll.errors import AudioError

SAMPLE_RATE_HZ = 16_000
SHORTEST_S = 0.1
LONGEST_S = 300.0
"""What lasts longer is no utterance, but a recording to be cut into some."""
LENGTH_UNKNOWN = 0x7FFF_0000
"""From here on the length in a WAV header is what programs write that could not know it, as into a pipe."""
SILENT_PEAK = 4
"""Largest absolute 16-bit sample value that still counts as silence (about -78 dB of full scale)."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A decoded recording."""

    samples: np.ndarray
    """int16, shape (samples,), 16 kHz mono."""
    source_rate_hz: int
    source_channels: int
    source_encoding: str
    """As libsndfile calls it, such as PCM_16."""


def read_recording(
    path: str | Path, trim_db: float | None = None, start_s: float | None = None, end_s: float | None = None
) -> Recording:
    """Decode a WAV or FLAC file, average its channels, resample to 16 kHz, optionally trim silent ends.

    Args:
        path: the file.
        trim_db: ends more than this many decibels below the loudest part are cut; None keeps them.
        start_s: where to start in the file; None: at its start.
        end_s: where to end; None: at its end.

    Raises:
        AudioError: with reason 'missing', 'corrupt', 'empty', 'nan', 'short' (under 0.1 s), 'long' (over 300 s),
            'segment' (beyond the file's end) or 'silent'.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError("missing", "is a folder" if path.is_dir() else "no such file")
    if path.stat().st_size == 0:
        raise AudioError("empty", "holds no samples")
    try:
        with soundfile.SoundFile(path) as file:
            rate_hz, encoding = file.samplerate, file.subtype
            missing = _missing_bytes(file.extra_info)
            if missing:
                raise AudioError("corrupt", f"is cut off: {missing} bytes are missing at its end")
            start = 0 if start_s is None else round(start_s * rate_hz)
            stop = file.frames if end_s is None else round(end_s * rate_hz)
            if not 0 <= start < max(stop, 1) or stop > file.frames:
                lasts_s = file.frames / rate_hz
                raise AudioError("segment", f"lasts {lasts_s:.3f} s; {start_s} to {end_s} s is not within it")
            if stop - start > LONGEST_S * rate_hz:
                raise AudioError("long", f"lasts {(stop - start) / rate_hz:.0f} s; {LONGEST_S:g} s is the most")
            if start:
                file.seek(start)
            frames = _read(file, stop - start)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise AudioError("corrupt", f"cannot be decoded: {error}") from None
    if len(frames) < stop - start:
        raise AudioError("corrupt", f"ends after {len(frames)} of {stop - start} sample frames")
    if len(frames) == 0:
        raise AudioError("empty", "holds no samples")
    signal = frames.mean(axis=1) if frames.shape[1] > 1 else frames[:, 0]
    if not np.isfinite(signal).all():
        raise AudioError("nan", f"holds {np.count_nonzero(~np.isfinite(signal))} samples that are not finite")
    if len(signal) < SHORTEST_S * rate_hz:
        raise AudioError("short", f"lasts {len(signal) / rate_hz:.3f} s; {SHORTEST_S} s is the least")
    signal = resample(signal, rate_hz)
    if trim_db is not None:
        signal = _trim(signal, trim_db)
    samples = to_int16(signal)
    if max(int(samples.max(initial=0)), -int(samples.min(initial=0))) <= SILENT_PEAK:
        raise AudioError("silent", "is silent")
    if len(samples) < SHORTEST_S * SAMPLE_RATE_HZ:
        raise AudioError("short", f"lasts {len(samples) / SAMPLE_RATE_HZ:.3f} s once trimmed")
    return Recording(samples, rate_hz, frames.shape[1], encoding)


def _read(file: soundfile.SoundFile, count: int) -> np.ndarray:
    """The next float32 (frames, channels) in [-1, 1) of a file, at most `count`."""
    if file.subtype == "PCM_16":  # the same numbers in a third of the time that libsndfile takes to make floats
        return to_float(file.read(count, dtype="int16", always_2d=True))
    return file.read(count, dtype="float32", always_2d=True)


def _missing_bytes(log: str) -> int:
    """How much of a WAV file is missing; libsndfile plays what is there and tells it in its log alone."""
    told = re.search(r"^data\s*:\s*(\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if told is None or int(told[1]) >= LENGTH_UNKNOWN:
        return 0
    return max(0, int(told[1]) - int(told[2]))


def resample(signal: np.ndarray, rate_hz: int) -> np.ndarray:
    """Bring a float32 signal (samples,) to 16 kHz with soxr's high-quality filter."""
    if rate_hz == SAMPLE_RATE_HZ:
        return signal
    import soxr

    # As librosa.resample with res_type="soxr_hq", without the seconds that librosa takes to load.
    resampled = soxr.resample(signal, rate_hz, SAMPLE_RATE_HZ, quality="soxr_hq")
    length = math.ceil(len(signal) * (float(SAMPLE_RATE_HZ) / rate_hz))
    if len(resampled) < length:
        return np.pad(resampled, (0, length - len(resampled)))
    return resampled[:length]


def to_int16(signal: np.ndarray) -> np.ndarray:
    """Round a float signal in [-1, 1) to 16-bit samples; the exact inverse of decoding a 16-bit file."""
    return np.clip(np.rint(signal * 32_768.0), -32_768, 32_767).astype(np.int16)


def to_float(samples: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """16-bit samples as float32 in [-1, 1), written to `out` if it is given."""
    return np.multiply(samples, np.float32(1 / 32_768), out=out, dtype=np.float32)


def _trim(signal: np.ndarray, trim_db: float) -> np.ndarray:
    import librosa

    return librosa.effects.trim(signal, top_db=trim_db)[0]
