"""How well `sermll.fingerprint` finds altered copies on RAVDESS and EMO-DB, and what it costs.

    SERMLL_CORPORA=DIR python benchmarks/fingerprint.py

DIR holds ravdess/ and emodb/. Takes two minutes on one core. Each of 300 recordings drawn from both corpora is altered
and searched for among all recordings. `recall` is the share of copies found at the default threshold, `1 %` the
similarity that all but one in a hundred copies reach (0: no alignment was tried), `false` the number of pairs
that are no copies, and `highest` the similarity of the likest of those.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from sermll.audio import SAMPLE_RATE_HZ, read_recording, to_int16
from sermll.corpora import CORPORA
from sermll.fingerprint import THRESHOLD, fingerprint, near_duplicates
from sermll.rows import Utterance

COPIES = 300
LARGE = 10_000
SPEEDS = (1.0, 0.8, 0.9, 1.12, 1.25, 1.4)
"""Played at these speeds, recordings are others: this makes a large corpus of two small ones."""
TWINS = {"03-01-03-01-02-01-07", "03-01-03-01-02-02-07"}
"""The one recording that RAVDESS holds twice."""
MP3_LEVEL = {64: 0.632, 24: 0.895}
"""Compression level of libsndfile at which a 16 kHz MP3 has so many kbit/s."""


def gain(samples: np.ndarray, gain_db: float) -> np.ndarray:
    """Louder, clipped at full scale, or softer."""
    return to_int16(samples / 32_768 * 10 ** (gain_db / 20))


def coded(
    samples: np.ndarray,
    kind: str,
    subtype: str,
    rate_hz: int = SAMPLE_RATE_HZ,
    level: float | None = None,
    bitrate_mode: str | None = None,
) -> np.ndarray:
    """Written to a file in memory and read again."""
    file = io.BytesIO()
    soundfile.write(
        file, samples, rate_hz, format=kind, subtype=subtype, compression_level=level, bitrate_mode=bitrate_mode
    )
    file.seek(0)
    return soundfile.read(file, dtype="int16")[0]


def mp3(samples: np.ndarray, kbit_s: int) -> np.ndarray:
    """MP3 at a constant bit rate."""
    return coded(samples, "MP3", "MPEG_LAYER_III", level=MP3_LEVEL[kbit_s], bitrate_mode="CONSTANT")


def telephone(samples: np.ndarray) -> np.ndarray:
    """To 8 kHz, mu-law, and back."""
    narrow = coded(to_int16(resample_poly(samples / 32_768, 1, 2)), "WAV", "ULAW", rate_hz=8_000)
    return to_int16(resample_poly(narrow / 32_768, 2, 1))


def noisy(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """White noise added."""
    signal = samples / 32_768
    return to_int16(signal + rng.standard_normal(len(signal)) * np.sqrt(np.mean(signal**2) / 10 ** (snr_db / 10)))


def faster(samples: np.ndarray, speed: float) -> np.ndarray:
    """Played faster, so higher too."""
    return to_int16(resample_poly(samples / 32_768, 100, round(100 * speed)))


def draw(low_s: float, high_s: float, rng: np.random.Generator) -> int:
    """A number of samples."""
    return round(rng.uniform(low_s, high_s) * SAMPLE_RATE_HZ)


def cut_both(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Without 0.1 s to 15 % at either end."""
    most_s = 0.15 * len(samples) / SAMPLE_RATE_HZ
    return samples[draw(0.1, most_s, rng) : -draw(0.1, most_s, rng)]


ALTERATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "none": lambda samples, rng: samples,
    "gain -12 dB": lambda samples, rng: gain(samples, -12),
    "gain +6 dB, clipped": lambda samples, rng: gain(samples, 6),
    "MP3 64 kbit/s": lambda samples, rng: mp3(samples, 64),
    "MP3 24 kbit/s": lambda samples, rng: mp3(samples, 24),
    "Vorbis, quality 0.5": lambda samples, rng: coded(samples, "OGG", "VORBIS", level=0.5),
    "mu-law at 8 kHz": lambda samples, rng: telephone(samples),
    "8 bits": lambda samples, rng: coded(samples, "WAV", "PCM_U8"),
    "8 bits, after +12 dB": lambda samples, rng: coded(gain(samples, 12), "WAV", "PCM_U8"),
    "noise, SNR 30 dB": lambda samples, rng: noisy(samples, 30, rng),
    "noise, SNR 20 dB": lambda samples, rng: noisy(samples, 20, rng),
    "0.1-0.5 s off the start": lambda samples, rng: samples[draw(0.1, 0.5, rng) :],
    "0.1-0.5 s off the end": lambda samples, rng: samples[: -draw(0.1, 0.5, rng)],
    "to 15 % off both ends": cut_both,
    "30 % off the start": lambda samples, rng: samples[int(0.3 * len(samples)) :],
    "30 % off the end": lambda samples, rng: samples[: int(0.7 * len(samples))],
    "0.3 s silence before": lambda samples, rng: np.concatenate([np.zeros(4_800, np.int16), samples]),
    "both ends, -12 dB, MP3 64": lambda samples, rng: mp3(gain(cut_both(samples, rng), -12), 64),
    "speed +1 %": lambda samples, rng: faster(samples, 1.01),
}


def recordings() -> tuple[list[str], list[np.ndarray]]:
    """Ids and samples of both corpora."""
    folder = Path(os.environ["SERMLL_CORPORA"])
    found = [(folder / name, row) for name in ("ravdess", "emodb") for row in CORPORA[name].read(folder / name)]
    used = [(root, row) for root, row in found if isinstance(row, Utterance)]
    return [row.id for _, row in used], [read_recording(root / row.path).samples for root, row in used]


def table(ids: list[str], clips: list[np.ndarray]) -> Iterator[str]:
    """What is printed, line by line."""
    began = time.perf_counter()
    prints = [fingerprint(samples) for samples in clips]
    yield f"{len(clips)} recordings, {1000 * (time.perf_counter() - began) / len(clips):.1f} ms for a fingerprint"
    pairs = [f"{ids[i]} = {ids[j]} ({similarity:.2f})" for i, j, similarity in near_duplicates(prints)]
    yield f"pairs at {THRESHOLD}: {', '.join(pairs)}"

    chosen = np.random.default_rng(0).permutation(len(clips))[:COPIES].tolist()
    original = [*range(len(clips)), *chosen]
    yield f"{'alteration':28}{'recall':>8}{'1 %':>8}{'false':>8}{'highest':>9}"
    for name, alter in ALTERATIONS.items():
        rng = np.random.default_rng(1)
        copies = [fingerprint(alter(clips[i], rng)) for i in chosen]
        found = dict.fromkeys(chosen, 0.0)
        others = [0.0]
        for i, j, similarity in near_duplicates([*prints, *copies], threshold=0.2):
            one, other = original[i], original[j]
            if one == other:
                found[one] = similarity
            elif {ids[one], ids[other]} != TWINS:
                others.append(similarity)
        similarities = np.array(list(found.values()))
        recall, worst = np.mean(similarities >= THRESHOLD), np.quantile(similarities, 0.01, method="lower")
        false = int(np.sum(np.array(others) >= THRESHOLD))
        yield f"{name:28}{recall:8.3f}{worst:8.2f}{false:8}{max(others):9.2f}"

    many = [(name, fingerprint(faster(x, speed))) for speed in SPEEDS for name, x in zip(ids, clips, strict=True)]
    many = many[:LARGE]
    began = time.perf_counter()
    pairs = near_duplicates([words for _, words in many])
    took_s = time.perf_counter() - began
    false = sum({many[i][0], many[j][0]} != TWINS for i, j, _ in pairs)
    yield f"{len(many)} recordings (both corpora at {len(SPEEDS)} speeds): {false} false pairs, {took_s:.1f} s"


def main() -> None:
    """Print the table."""
    for line in table(*recordings()):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
