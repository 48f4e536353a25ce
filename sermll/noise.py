"""Noise added to speech at a true signal-to-noise ratio: the level of active speech over that of the noise.

The level of a whole utterance falls with every pause in it, so that one SNR would mean less noise for a slow speaker
than for a fast one. Speech is therefore measured where it is active, by method B of ITU-T Recommendation P.56 (12/2011;
see also P. Kabal, Measuring Speech Activity, McGill University); noise is measured over all of the utterance.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter

from sermll.audio import SAMPLE_RATE_HZ, read_recording, to_float
from sermll.errors import AudioError, DataError

ENDINGS = (".wav", ".flac")
TIME_CONSTANT_S = 0.03
"""Of both stages of P.56's envelope."""
HANGOVER_S = 0.2
"""Speech stays active for so long after its envelope fell below the threshold: pauses within words count."""
MARGIN_DB = 15.9
"""How far the threshold of activity lies below the active level."""
THRESHOLDS = 2.0 ** np.arange(-20, 0)
"""Shares of full scale, each twice the one before, from far below 16-bit rounding to a half."""


@dataclass(frozen=True, slots=True)
class Noise:
    """A recording of noise."""

    name: str
    path: Path
    samples: NDArray[np.int16]
    """[samples] at 16 kHz, not silent."""

    @property
    def sha256(self) -> str:
        """Of the samples, in hex."""
        return hashlib.sha256(self.samples.tobytes()).hexdigest()


def read_noises(folder: Path) -> list[Noise]:
    """Every WAV and FLAC file in a folder and the folders in it, named by its stem, in the names' order.

    Raises:
        DataError: there is none, two have one name, or some cannot be used, as what is silent cannot; all are named.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one that holds recordings of noise, WAV or FLAC")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise DataError(f"{folder}: holds no WAV or FLAC file; each such file in it would be one noise")
    noises: dict[str, Noise] = {}
    faults = []
    for path in paths:
        if path.stem in noises:
            faults.append(f"{path}: has the name of {noises[path.stem].path}; rename one, results are told by name")
            continue
        try:
            noises[path.stem] = Noise(path.stem, path, read_recording(path).samples)
        except AudioError as error:
            faults.append(f"{path}: {error.reason}: {error}")
    if faults:
        raise DataError("\n".join([f"{len(faults)} of {len(paths)} noises cannot be used; mend or remove", *faults]))
    return [noises[name] for name in sorted(noises)]


def active_level_db(speech: ArrayLike, rate_hz: int = SAMPLE_RATE_HZ) -> float:
    """Active speech level by ITU-T P.56 method B, without a filter before it.

    The rectified signal is smoothed twice by an exponential of 30 ms. For each threshold, the time during which this
    envelope is above it, or was within the last 200 ms, is active, and all the signal's energy over this time is an
    active level. The one told is 15.9 dB above its threshold, by interpolation in dB between two thresholds.

    Args:
        speech: [samples] in shares of full scale.
        rate_hz: sampling rate.

    Returns:
        dB of full scale; a sine from -1 to 1 has -3.01. -inf where there is no such level: the signal is empty,
        silent, or but a click.
    """
    speech = np.asarray(speech, np.float64)
    decay = np.exp(-1 / (rate_hz * TIME_CONSTANT_S))
    envelope = np.abs(speech)
    for _ in range(2):
        envelope = np.asarray(lfilter([1 - decay], [1, -decay], envelope))
    hangover = int(np.ceil(HANGOVER_S * rate_hz))
    counts = np.array([_active_samples(envelope >= threshold, hangover) for threshold in THRESHOLDS])
    counts = counts[counts > 0]
    level_db = 10 * np.log10(speech @ speech / counts)
    over_margin_db = level_db - 20 * np.log10(THRESHOLDS[: len(counts)]) - MARGIN_DB
    under = np.flatnonzero(over_margin_db <= 0)
    if len(under) == 0 or under[0] == 0:
        return -np.inf
    low, high = under[0] - 1, under[0]
    share = over_margin_db[low] / (over_margin_db[low] - over_margin_db[high])
    return float(level_db[low] + share * (level_db[high] - level_db[low]))


def _active_samples(over: NDArray[np.bool_], hangover: int) -> int:
    """How many samples are over the threshold, or at most `hangover` behind one that is."""
    places = np.flatnonzero(over)
    return int(np.minimum(np.diff(places, append=len(over)), hangover + 1).sum())


def draws(seed: int, utterance: str, noise: str) -> np.random.Generator:
    """The random numbers of an utterance under a noise: the same in every run, fold and order of work.

    Args:
        seed: 0 or more.
        utterance: its id.
        noise: its name.
    """
    digest = hashlib.sha256(json.dumps([utterance, noise]).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest)])


def add_noise(
    speech: NDArray[np.float32], noise: NDArray[np.int16], snr_db: ArrayLike, generator: np.random.Generator
) -> tuple[NDArray[np.float32], float]:
    """Add one segment of a noise at every SNR asked for.

    The segment is as long as the speech and starts at random; a noise that is shorter than the speech goes on from its
    start. A segment without any sound is drawn again. It is scaled so that the active level of the speech is `snr_db`
    above the level (root mean square) of the segment.

    Args:
        speech: [samples] at 16 kHz in shares of full scale; not changed.
        noise: [noise's samples] at 16 kHz, not silent.
        snr_db: [...] active speech level minus noise level, in dB.
        generator: draws the segment.

    Returns:
        The sums, [..., samples], not clipped; and the active level of the speech in dB of full scale. If that is -inf
        no scale exists, and the sums are the speech as it is.
    """
    snr_db = np.asarray(snr_db, np.float64)
    level_db = active_level_db(speech)
    if level_db == -np.inf:
        return np.broadcast_to(speech, (*snr_db.shape, len(speech))).copy(), level_db
    segment = _draw_segment(noise, len(speech), generator)
    noise_db = 10 * np.log10(np.mean(segment**2))
    gain = 10 ** ((level_db - snr_db - noise_db) / 20)
    return (speech + gain[..., None] * segment).astype(np.float32), level_db


def _draw_segment(noise: NDArray[np.int16], length: int, generator: np.random.Generator) -> NDArray[np.float64]:
    assert noise.any(), "a silent noise has no segment with sound"
    wraps = len(noise) < length
    starts = len(noise) if wraps else len(noise) - length + 1
    segment = np.zeros(length)
    while not segment.any():
        start = int(generator.integers(starts))
        part = noise.take(np.arange(start, start + length), mode="wrap") if wraps else noise[start : start + length]
        segment = to_float(part).astype(np.float64)
    return segment
