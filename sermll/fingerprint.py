"""Finds recordings that are one recording, altered: gain, clipping, codecs, telephone, noise, ends cut off.

A fingerprint has 32 bits for every 5 ms: whether the difference between two neighbouring frequency bands grows or
shrinks. Two fingerprints that share one whole word of 32 bits are laid over each other there and compared bit by
bit. After J. Haitsma, T. Kalker, "A Highly Robust Audio Fingerprinting System", ISMIR 2002; the frames here are
much shorter than theirs, because two takes of one sentence by one actor must stay apart.

In RAVDESS and EMO-DB together, two million pairs, it finds the one recording that RAVDESS holds twice and no other.
The likest two takes of an actor reach a similarity of 0.32 where they are compared, and 0.41 at the best of all
shifts; stretches of half a second reach 0.53. Altered copies of 300 recordings, searched for among all 1975, give no
false pair (`benchmarks/fingerprint.py`; the similarity is what all but one in a hundred copies reach):

| alteration | found | similarity |
|---|---|---|
| gain -12 dB; +6 dB and clipped | 100 % | 0.87; 0.77 |
| MP3 64, 24 kbit/s; Vorbis | 100 % | 0.91, 0.67; 0.79 |
| mu-law at 8 kHz | 100 % | 0.72 |
| white noise, SNR 30 dB; 20 dB | 100 %; 99 % | 0.78; 0.52 |
| 0.1 to 0.5 s off the start or end, 15 % off both | 100 % | 0.80 |
| 30 % off the start; end | 100 %; 99.7 % | 0.81 |
| 0.3 s silence before | 100 % | 1.00 |
| 15 % off both ends, then -12 dB, then MP3 64 kbit/s | 100 % | 0.75 |
| 8 bits; 8 bits after +12 dB | 72 %; 92 % | 0: soft recordings keep 2 or 3 bits |
| 1 % faster and higher | 83 % | 0.34 |
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.fft import rfft

from sermll.audio import SAMPLE_RATE_HZ

THRESHOLD = 0.55
"""Similarity from which on two recordings are one."""
LEAST_FRAMES = 80
"""Overlap that is needed to decide, in frames of 5 ms with sound: 0.4 s of speech."""

_WINDOW = 512
_HOP = 80
_LAG = 4  # frames between the two that are compared
_ROUNDING = 1e-6  # of the energies: a smaller change may be the matrix product's, which rounds equal rows differently
_BITS = 32
_LOW_HZ, _HIGH_HZ = 300.0, 3000.0  # what a telephone lets through
_QUIET_DB = 30.0  # below the loudest frame: not compared
_LEAST_SHARE = 0.5  # of the sound of the recording that has less, in the overlap
_NEIGHBOURS = 100  # equal words that a word is compared with
_CHUNK = 1024  # alignments compared at once

Words = NDArray[np.uint32]


def fingerprint(samples: NDArray[np.int16]) -> Words:
    """Words of 32 bits, one for each 5 ms; 0 where there is nothing to compare. Takes 1 to 3 ms.

    Nothing to compare is what lies more than 30 dB below the loudest frame, and sound that does not change at all.
    So silence matches nothing, nor does a recording with less than 0.4 s of speech.

    Args:
        samples: [n] at 16 kHz, of any gain and length.

    Returns:
        [frames]; none for less than 52 ms.
    """
    if len(samples) < _WINDOW + _LAG * _HOP:
        return np.zeros(0, np.uint32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[::_HOP]
    spectrum: NDArray[np.complex64] = np.asarray(rfft(frames * np.hanning(_WINDOW).astype(np.float32)))
    energy = (spectrum.real**2 + spectrum.imag**2) @ _bands()  # single precision throughout, for speed
    difference = np.diff(energy, axis=1)
    pairs = energy[:, 1:] + energy[:, :-1]
    grows = difference[_LAG:] - difference[:-_LAG] > _ROUNDING * (pairs[_LAG:] + pairs[:-_LAG])
    level = energy.sum(axis=1)
    loud = level > level.max() * 10 ** (-_QUIET_DB / 10)
    words = grows @ (1 << np.arange(_BITS, dtype=np.uint32))
    return np.where(loud[_LAG:] & loud[:-_LAG], words, np.uint32(0))


def near_duplicates(fingerprints: Sequence[Words], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """Pairs (i, j, similarity) with i < j, each once, sorted by i and j.

    The similarity is 1 - 2 b, b being the share of bits that differ where both have sound: 1 if none does, about 0
    for unrelated recordings. Copies need not have the same samples to reach 1. The overlap must hold 0.4 s and half
    of the sound of the one that has less.

    The time is that of sorting all words, plus the few alignments at which a word is shared: 16 000 for the 2
    million pairs of 1975 recordings, less than a second; 10 000 recordings take 2 to 7 s and 0.3 GB. A word is
    compared with its next 100 equals only, so of more than 100 copies of a recording each is paired with some of
    the others, not with all; they still hang together.

    Args:
        fingerprints: one for each recording.
        threshold: least similarity, 0 to 1.
    """
    if not fingerprints:
        return []
    words = np.concatenate(fingerprints)
    lengths = np.array([len(one) for one in fingerprints])
    starts = np.cumsum(lengths) - lengths
    sounding = np.array([np.count_nonzero(one) for one in fingerprints])
    best: dict[tuple[int, int], float] = {}
    alignments = _alignments(words, lengths)
    for begin in range(0, len(alignments), _CHUNK):
        i, j, shift = alignments[begin : begin + _CHUNK].T
        into_i, into_j = np.maximum(shift, 0), np.maximum(-shift, 0)
        overlap = np.minimum(lengths[i] - into_i, lengths[j] - into_j)
        compared, wrong = _compare(words, starts[i] + into_i, starts[j] + into_j, overlap)
        similarity = 1 - 2 * wrong / (_BITS * compared)
        least = np.maximum(LEAST_FRAMES, _LEAST_SHARE * np.minimum(sounding[i], sounding[j]))
        for row in np.flatnonzero((compared >= least) & (similarity >= threshold)):
            pair = int(i[row]), int(j[row])
            best[pair] = max(best.get(pair, 0.0), float(similarity[row]))
    return [(i, j, similarity) for (i, j), similarity in sorted(best.items())]


def _alignments(words: Words, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows (i, j, frames that j starts after i), i < j, of recordings that share a word there; each once."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.arange(len(words)) - (np.cumsum(lengths) - lengths)[owner]
    order = np.flatnonzero(words)
    order = order[np.argsort(words[order], kind="stable")]  # equal words: by recording
    ranked = words[order]
    count, span = len(lengths), 2 * int(lengths.max()) + 1
    found = [np.zeros(0, np.int64)]
    at = np.arange(len(order))
    for step in range(1, _NEIGHBOURS + 1):
        at = at[at + step < len(order)]
        at = at[ranked[at] == ranked[at + step]]
        if not len(at):
            break
        one, other = order[at], order[at + step]
        apart = owner[one] != owner[other]
        one, other = one[apart], other[apart]
        found.append(np.unique((owner[one] * count + owner[other]) * span + frame[one] - frame[other] + span // 2))
    pair, shift = np.divmod(np.unique(np.concatenate(found)), span)
    return np.stack([pair // count, pair % count, shift - span // 2], axis=1)


def _compare(
    words: Words, one: NDArray[np.int64], other: NDArray[np.int64], overlap: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each stretch of `overlap` words from `one` and from `other`: words with sound in both, bits that differ."""
    begins = np.cumsum(overlap) - overlap
    inside = np.arange(overlap.sum()) - np.repeat(begins, overlap)
    left, right = (words[np.repeat(side, overlap) + inside] for side in (one, other))
    both = (left != 0) & (right != 0)
    wrong = np.bitwise_count(left ^ right) * both
    return np.add.reduceat(both, begins, dtype=np.int64), np.add.reduceat(wrong, begins, dtype=np.int64)


def _bands() -> NDArray[np.float32]:
    """Weights [frequencies, bands] of 33 overlapping triangles, evenly spaced by ear: on a logarithmic scale."""
    edges_hz = np.geomspace(_LOW_HZ, _HIGH_HZ, _BITS + 2)
    centres_hz = np.sqrt(edges_hz[:-1] * edges_hz[1:])
    widths_hz = np.maximum(np.diff(edges_hz), SAMPLE_RATE_HZ / _WINDOW)
    frequencies_hz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE_HZ)[:, None]
    return np.maximum(0, 1 - np.abs(frequencies_hz - centres_hz) / widths_hz).astype(np.float32)
