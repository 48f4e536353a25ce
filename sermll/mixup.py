"""Energy-adaptive mixup (EAM, equations 1 to 4) and its baseline, label-adaptive mixup (LAM).

Drawing and mixing are apart: `draw_eam` and `draw_lam` turn given uniform numbers into a plan for a whole
epoch, and `eam` and `lam` carry out one line of it. The same uniforms give the same partners under both, so
the two can be compared pair by pair.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class MixDraws:
    """What was drawn for each of n utterances; one that is not mixed has partner -1, zeros and NaN."""

    partner: NDArray[np.int64]
    """Row of the partner in the training set, -1: not mixed."""
    mix_length: NDArray[np.int64]
    """Samples of the partner that are added."""
    start: NDArray[np.int64]
    """First sample that is mixed, counted from the start of the utterance's crop."""
    partner_start: NDArray[np.int64]
    """First sample that is taken, counted from the start of the partner's crop."""
    snr_db: NDArray[np.float64]
    """Energy of the utterance's segment over that of the partner's, in dB; NaN where it has no meaning."""


def draw_eam(
    uniforms: NDArray[np.float64], lengths: NDArray[np.int64], probability: float, snr_db: tuple[float, float]
) -> MixDraws:
    """Draw energy-adaptive mixup for every utterance of the training set.

    The partner is uniform over all other utterances; the mixed length is a uniform integer from 1 to
    floor((length - 1) / 2), so strictly less than half, cut to the partner's length; both starts are uniform
    over all places where the segment fits; the SNR is uniform. Utterances of fewer than 3 samples have no
    such length and are not mixed, nor is anyone in a training set of one.

    Args:
        uniforms: [n, 6] in [0, 1): mix or not, partner, length, start, partner's start, SNR.
        lengths: [n] samples of each utterance after cropping, at least 1.
        probability: chance that an utterance is mixed, 0 to 1.
        snr_db: lowest and highest SNR in dB.
    """
    choice, _, length, start, partner_start, snr = uniforms.T
    partner = _draw_partners(uniforms)
    mixed = (choice < probability) & (partner >= 0) & (lengths >= 3)

    # Rows that are not mixed are drawn for too and blanked at the end: `partner` -1 then reads any row.
    partner_lengths = lengths[partner]
    mix_length = np.minimum(1 + _below((lengths - 1) // 2, length), partner_lengths)
    low, high = snr_db
    return MixDraws(
        partner=np.where(mixed, partner, -1),
        mix_length=np.where(mixed, mix_length, 0),
        start=np.where(mixed, _below(lengths - mix_length + 1, start), 0),
        partner_start=np.where(mixed, _below(partner_lengths - mix_length + 1, partner_start), 0),
        snr_db=np.where(mixed, low + (high - low) * snr, np.nan),
    )


def draw_lam(uniforms: NDArray[np.float64], lengths: NDArray[np.int64], probability: float) -> MixDraws:
    """Draw label-adaptive mixup: a partner, added whole, for every utterance that is mixed.

    Args:
        uniforms: [n, 2 or more] in [0, 1): mix or not, partner; further columns are not read.
        lengths: [n] samples of each utterance after cropping, at least 1.
        probability: chance that an utterance is mixed, 0 to 1.
    """
    partner = _draw_partners(uniforms)
    mixed = (uniforms[:, 0] < probability) & (partner >= 0)
    nowhere = np.zeros(len(lengths), dtype=np.int64)
    return MixDraws(
        partner=np.where(mixed, partner, -1),
        mix_length=np.where(mixed, lengths[partner], 0),
        start=nowhere,
        partner_start=nowhere,
        snr_db=np.full(len(lengths), np.nan),
    )


def eam(
    signal: NDArray[np.float32],
    partner: NDArray[np.float32],
    mix_length: int,
    start: int,
    partner_start: int,
    snr_db: float,
    out: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], float]:
    """Add a segment of the partner, scaled to the drawn SNR, to a segment of the signal (equations 1 to 4).

    The label weight is the partner's share of the segment's energy times the segment's share of the
    utterance. The former is 1 / (1 + 10^(SNR/10)) whatever the two signals are, because the scale makes it
    so.

    Args:
        signal: [samples] the utterance's crop; not changed, unless it is `out`.
        partner: [partner's samples] the partner's crop.
        mix_length: samples to mix, at least 1.
        start: first sample of the signal's segment.
        partner_start: first sample of the partner's segment.
        snr_db: energy of the signal's segment over that of the scaled partner's, in dB.
        out: [samples] where the mix is written; `signal` itself is mixed in place. None: a new array.

    Returns:
        The mix, [samples], not clipped; and the weight lambda of the partner's label, 0 to 0.5. If either
        segment is silent no scale exists: nothing is added and lambda is 0.
    """
    segment = signal[start : start + mix_length]
    added = partner[partner_start : partner_start + mix_length]
    assert len(segment) == len(added) == mix_length > 0, "segments must lie inside the crops"

    energy, added_energy = _energy(segment), _energy(added)
    if out is None:
        out = signal.copy()
    elif out is not signal:
        out[:] = signal
    if energy == 0 or added_energy == 0:
        return out, 0.0
    snr = 10 ** (snr_db / 10)
    scale = np.float32(np.sqrt(energy / (snr * added_energy)))
    # Piece by piece, so that what is scaled stays in the cache and needs no fresh memory.
    scaled = np.empty(min(mix_length, _PIECE), np.float32)
    for first in range(0, mix_length, _PIECE):
        piece = added[first : first + _PIECE]
        mixed = out[start + first : start + first + len(piece)]
        mixed += np.multiply(piece, scale, out=scaled[: len(piece)])
    return out, float(1 / (1 + snr) * mix_length / len(signal))


_PIECE = 16_384
_SUMMED = 256
"""Squares added up in float32, before their sums are in float64: an error of some 1e-8 of the energy."""


def _energy(segment: NDArray[np.float32]) -> float:
    """Sum of squares; not by a product of the linear algebra library, whose last digits depend on its threads."""
    whole = len(segment) // _SUMMED * _SUMMED
    rows, rest = segment[:whole].reshape(-1, _SUMMED), segment[whole:].astype(np.float64)
    sums = np.einsum("ij,ij->i", rows, rows)
    return float(sums.sum(dtype=np.float64) + np.einsum("i,i->", rest, rest))


def lam(signal: NDArray[np.float32], partner: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Half of each signal, added from the first sample: label-adaptive mixup (Kang et al., ICASSP 2023).

    Args:
        signal: [samples] the utterance's crop, not empty; not changed.
        partner: [partner's samples] the partner's crop, not empty.

    Returns:
        The mixed signal, as long as the longer of the two (the shorter is followed by silence), so that no
        part of what the labels stand for is cut off; and the weight of the partner's label, its share of both
        lengths.
    """
    mixed = np.zeros(max(len(signal), len(partner)), dtype=np.float32)
    mixed[: len(signal)] += 0.5 * signal
    mixed[: len(partner)] += 0.5 * partner
    return mixed, len(partner) / (len(signal) + len(partner))


def mix_labels(labels: ArrayLike, partner_labels: ArrayLike, weight: ArrayLike) -> NDArray[np.float64]:
    """Label distributions (1 - lambda) y_i + lambda y_j (equation 4).

    Written as y_i + lambda (y_j - y_i), which leaves equal labels exactly as they are.

    Args:
        labels: [..., classes] distributions of the utterances.
        partner_labels: [..., classes] distributions of their partners.
        weight: [...] lambda, 0 to 1.
    """
    labels = np.asarray(labels, dtype=np.float64)
    return labels + np.asarray(weight, dtype=np.float64)[..., None] * (np.asarray(partner_labels) - labels)


def _draw_partners(uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """A uniform row other than one's own, from the second column; -1 for all if there is no other."""
    n = len(uniforms)
    if n < 2:
        return np.full(n, -1)
    others = _below(n - 1, uniforms[:, 1])
    return others + (others >= np.arange(n))


def _below(count: int | NDArray[np.int64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """A uniform integer from 0 to count - 1; float64 numbers below 1 never round up to `count`."""
    return np.floor(uniform * count).astype(np.int64)
