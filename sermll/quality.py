"""Measures of one recording, and which recordings of a corpus are faulty: clipped, silent, offset, short of treble.

All are taken from 16-bit samples at 16 kHz, in frames of 32 ms every 16 ms, so nothing above 8 kHz is seen. The
default limits accuse none of the 1440 recordings of RAVDESS and none of the 535 of EMO-DB. What is found there:

| | RAVDESS | EMO-DB |
|---|---|---|
| level of speech, dB of full scale | -60 to -13 | -25 to -11 |
| share of silent frames | 0.15 to 0.63 | 0 to 0.25 |
| share of clipped samples, at most | 0.002 % | 0.011 % |
| offset, at most | 0.1 % | 0.6 % |
| bandwidth | 7.5 to 8 kHz | 7.5 to 8 kHz |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import rfft

from sermll.audio import SAMPLE_RATE_HZ

_FULL_SCALE = 32_768
_FRAME = 512
_HOP = 256
_ACTIVE_DB = 25.0
_SILENT_DB = 40.0
_LEAST_RUN = 3
_LOWEST_CEILING = 3_277  # -20 dB of full scale: below it rounding to 8 bits makes flat tops too
_BAND_BINS = 8
_OVER_ROUNDING_DB = 10.0
_UNDER_LOUDEST_DB = 50.0


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured of one recording."""

    peak_db: float
    """Largest absolute sample, dB of full scale; -inf for digital silence."""
    level_db: float
    """Root mean square of the active frames, those no more than 25 dB below the loudest, without the offset; dB of
    full scale. A sine from -1 to 1 has -3.01. -inf where nothing moves."""
    clipped_share: float
    """Share of samples, 0 to 1, that are at full scale, or stand in a row of three or more at the largest or
    smallest value of the recording: a ceiling, if it is not below -20 dB. Clipping before a change of the sampling
    rate is seen by half where it was at full scale, because the new peaks overshoot, and not at all below."""
    silent_share: float
    """Share of frames, 0 to 1, that are 40 dB or more below the loudest; 1 where nothing moves."""
    dc_offset: float
    """Mean of the samples as a share of full scale, -1 to 1."""
    bandwidth_hz: float
    """Upper edge of the highest band of 250 Hz that holds sound, no more than half the source's sampling rate. A
    band holds sound if its level, passed by one frame in twenty, is more than 10 dB above the noise of rounding to 16
    bits and less than 50 dB below the loudest band. Resampling without a filter fills the upper bands with images
    of the lower ones, which pass for sound. 0 for silence."""
    source_rate_hz: int


def measure(samples: NDArray[np.int16], source_rate_hz: int) -> Quality:
    """Measure a recording of any length; an empty one is silent.

    Args:
        samples: [n] at 16 kHz.
        source_rate_hz: sampling rate of the file they come from.
    """
    if len(samples) == 0:
        return Quality(-np.inf, -np.inf, 0.0, 1.0, 0.0, 0.0, source_rate_hz)
    signal = samples / _FULL_SCALE
    dc_offset = float(signal.mean())
    frames = np.lib.stride_tricks.sliding_window_view(signal - dc_offset, min(_FRAME, len(signal)))[::_HOP]
    power = np.mean(frames**2, axis=1)
    active = power >= power.max() * 10 ** (-_ACTIVE_DB / 10)
    silent = power <= power.max() * 10 ** (-_SILENT_DB / 10)
    return Quality(
        peak_db=_decibels(np.abs(signal).max() ** 2),
        level_db=_decibels(power[active].mean()),
        clipped_share=_clipped_share(samples),
        silent_share=float(silent.mean()),
        dc_offset=dc_offset,
        bandwidth_hz=min(_bandwidth_hz(frames), source_rate_hz / 2),
        source_rate_hz=source_rate_hz,
    )


def is_clipped(quality: Quality, share: float = 0.001) -> bool:
    """Whether more than `share` of the samples are clipped; normalised recordings have up to 0.0001."""
    return quality.clipped_share > share


def is_nearly_silent(quality: Quality, level_db: float = -65.0, share: float = 0.9) -> bool:
    """Whether the level is below `level_db`, 35 dB above the rounding to 16 bits, or more than `share` is silence."""
    return quality.level_db < level_db or quality.silent_share > share


def is_offset(quality: Quality, share: float = 0.01) -> bool:
    """Whether the mean is further than `share` of full scale from zero."""
    return abs(quality.dc_offset) > share


def is_band_limited(quality: Quality, share: float = 0.8) -> bool:
    """Whether sound ends below `share` of what the source's sampling rate can hold, or of 8 kHz.

    Then the file was brought up from a lower rate, or a codec or filter took the treble. Silence has no band.
    """
    return 0 < quality.bandwidth_hz < share * min(quality.source_rate_hz, SAMPLE_RATE_HZ) / 2


def narrow_band(qualities: Sequence[Quality], share: float = 0.8) -> list[bool]:
    """Whether each recording has less than `share` of the corpus's median bandwidth; silence has no band."""
    if not qualities:
        return []
    bandwidths_hz = np.array([one.bandwidth_hz for one in qualities])
    return ((bandwidths_hz > 0) & (bandwidths_hz < share * np.median(bandwidths_hz))).tolist()


def _decibels(power: float) -> float:
    return float(10 * np.log10(power)) if power > 0 else -np.inf


def _clipped_share(samples: NDArray[np.int16]) -> float:
    clipped = (samples == _FULL_SCALE - 1) | (samples == -_FULL_SCALE)
    for extreme in (samples.max(), samples.min()):
        if abs(int(extreme)) >= _LOWEST_CEILING:
            edges = np.flatnonzero(np.diff(samples == extreme, prepend=False, append=False))
            for begin, end in edges.reshape(-1, 2):
                if end - begin >= _LEAST_RUN:
                    clipped[begin:end] = True
    return float(clipped.mean())


def _bandwidth_hz(frames: NDArray[np.float64]) -> float:
    """Upper edge of the highest band with sound; frames [frames, samples] of less than 32 ms are zero-padded."""
    window = np.hanning(frames.shape[1] + 2)[1:-1]  # without the zeros at its ends
    power = np.abs(np.asarray(rfft(frames * window, _FRAME, axis=1))) ** 2 / np.sum(window**2)
    bands = power[:, 1:].reshape(len(power), -1, _BAND_BINS).mean(axis=2)
    level = np.quantile(bands, 0.95, axis=0)
    rounding = 1 / (12 * _FULL_SCALE**2)
    least = max(rounding * 10 ** (_OVER_ROUNDING_DB / 10), level.max() * 10 ** (-_UNDER_LOUDEST_DB / 10))
    sounding = np.flatnonzero(level > least)
    return float((sounding[-1] + 1) * _BAND_BINS * SAMPLE_RATE_HZ / _FRAME) if len(sounding) else 0.0
