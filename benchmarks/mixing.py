"""Energy-adaptive mixup of one pair of utterances beside audiomentations' background noise at the same length.

    python benchmarks/mixing.py

Half a minute of one core. Signals are 6.25 s of speech-like noise at 16 kHz. audiomentations reads its noise from a
file, which it keeps decoded between calls; it mixes over the whole length and so does `eam` here, though in training
it mixes less than half. Both draw an SNR and scale the added signal to it; what they call an SNR differs (energy of
the segment, RMS of the whole), which changes the cost of neither.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from side_by_side import Row, Target, alone, compared, in_turns, missing, optional, seconds_of

from sermll.mixup import eam

SAMPLES = 100_000


def rows() -> Iterator[Row]:
    """One pair, in memory; and the memory traffic that no way of mixing can do without."""
    rng = np.random.default_rng(0)
    signal, partner = (rng.normal(0, 0.1, SAMPLES).astype(np.float32) for _ in range(2))
    about: dict[str, Any] = {
        "name": "EAM, one pair of 6.25 s",
        "unit": "us",
        "against": "audiomentations AddBackgroundNoise",
        "target": Target(">=", 3),
    }
    peer = optional("audiomentations")
    if peer is None:
        yield Row(**about, note=missing("audiomentations"))
        return
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(Path(folder) / "noise.wav", partner, 16_000)
        add = peer.AddBackgroundNoise(sounds_path=folder, min_snr_db=-5.0, max_snr_db=10.0, p=1.0)
        snr = iter(np.resize(rng.uniform(-5, 10, 1000), 10**7))
        found = in_turns(
            {
                "ours": seconds_of(lambda: eam(signal, partner, SAMPLES, 0, 0, next(snr))),
                "half": seconds_of(lambda: eam(signal, partner, SAMPLES // 2 - 1, 10, 20, next(snr))),
                "peer": seconds_of(lambda: add(signal, 16_000)),
                "plain": seconds_of(lambda: signal + partner),
            },
            rounds=15,
        )
    floor = 1e6 * float(np.median(found["plain"]))
    limit = f"Adding the two signals unscaled, into a new array, takes {floor:.0f} us."
    yield replace(compared(found, "ours", "peer", scale=1e6, **about), limit=limit)
    most = about | {"name": "EAM, the most that training mixes of one pair (half)", "target": None}
    yield compared(found, "half", "peer", scale=1e6, **most)


if __name__ == "__main__":
    alone(rows)
