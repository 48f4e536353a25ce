"""What a feature bank holds: which entries, how each is cropped and mixed, and where its frames will lie.

A pure function of utterances, settings and seed, as the epoch plan is: a build that was killed, or that runs elsewhere,
goes on with the same mixes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sermll import config
from sermll.audio import SAMPLE_RATE_HZ
from sermll.errors import ConfigError
from sermll.mixup import draw_eam

SCORED, UNMIXED = -1, -2
"""Entries that are no mix: the utterance as it is scored, and, where that is another crop, as it is trained on."""
BATCH_SAMPLES = 64 * SAMPLE_RATE_HZ
"""Samples, padding included, that are encoded at once: what bounds the memory."""
SHARD_BYTES = 128 * 2**20
"""Frames of a shard: what a build that is killed loses at most, and few enough files to hold all of them open."""

# Parts of a generator's key, which keep its numbers apart from the epoch plans' and from each other's.
_MIX_DRAWS, _CROP_DRAWS = 1, 2
_WINDOW_SAMPLES, _HOP_SAMPLES = 400, 320
_ENTRY_BYTES, _BATCH_BYTES, _SHARD_BYTES = 80, 700, 1200
"""What entries, record batches and files take beside the frames, roughly."""
Entries = Mapping[str, np.ndarray]
"""A table in numpy, one value per entry, ordered as encoded: shortest first.

row, mix: utterance, and which of its mixes, SCORED or UNMIXED. crop_start, length: its crop, in samples. partner (row,
-1: none), partner_crop_start, partner_length: the partner's crop. mix_length, start, partner_start, snr_db: as in
`MixDraws`. batch, shard, place: which batch, the shard that holds it, and the place in the batch.
"""


@dataclass(frozen=True)
class Recipe:
    """What a bank holds of each utterance. Audio and weights decide the rest."""

    encoder: config.Pretrained
    crop_s: float
    """Longest training crop."""
    eval_crop_s: float
    """Longest crop that is scored."""
    mixes: int
    """Mixes of each training utterance."""
    snr_db: tuple[float, float]
    """The widest range a trial may draw from; cut into as many equal strata as there are mixes."""
    seed: int

    @classmethod
    def of(cls, experiment: config.Experiment, mixes: int, snr_db: tuple[float, float]) -> "Recipe":
        """The recipe for trials that are variants of `experiment`.

        Raises:
            ConfigError: the encoder is trained, its layers are weighted, or there are no mixes or no such range.
        """
        encoder = experiment.model.encoder
        if not isinstance(encoder, config.Pretrained):
            raise ConfigError(
                f"model.encoder.kind={encoder.kind}: this encoder is trained; a feature bank holds what a frozen one "
                "gives (kind=pretrained, tune=none)"
            )
        if encoder.tune != "none":
            raise ConfigError(
                f"model.encoder.tune={encoder.tune}: the features change in training; a feature bank needs tune=none"
            )
        if encoder.layer == "weighted":
            raise ConfigError(
                "model.encoder.layer=weighted: the weights of the layers are trained; a feature bank needs "
                "layer=last or an index"
            )
        if experiment.optim.precision != "fp32":
            raise ConfigError(
                f"optim.precision={experiment.optim.precision}: a feature bank is encoded in 32 bits, and the final "
                "runs would hear others; give optim.precision=fp32"
            )
        if mixes < 1:
            raise ConfigError(f"a feature bank needs one mix of each utterance at least, got {mixes}")
        config.validate(config.EAM, {"snr_db": snr_db}, "the SNR range of a feature bank")
        low, high = snr_db
        crops = experiment.data
        return cls(encoder, crops.crop_s, crops.eval_crop_s, mixes, (low, high), experiment.seed)

    def check(self, experiment: config.Experiment) -> None:
        """Refuse settings that a bank of this recipe does not serve.

        Raises:
            ConfigError: the encoder, its precision, the crops or the mixup is another one.
        """
        own = Recipe.of(experiment, self.mixes, self.snr_db)
        if own.encoder != self.encoder:
            raise ConfigError("model.encoder: a trial with another encoder needs other features than the bank holds")
        check_crops(experiment.data, {"crop_s": self.crop_s, "eval_crop_s": self.eval_crop_s})
        check_mixup(experiment.mixup, self.snr_db)

    def stratum(self, mix: int) -> tuple[float, float]:
        """SNR range of a mix, in dB."""
        low, high = self.snr_db
        return low + (high - low) * mix / self.mixes, low + (high - low) * (mix + 1) / self.mixes


def check_mixup(mixup: config.EAM | config.LAM | config.NoMixup, snr_db: tuple[float, float]) -> None:
    """Refuse what a bank with mixes of this range cannot give.

    Raises:
        ConfigError: mixes of another kind, or outside the range.
    """
    if isinstance(mixup, config.LAM):
        raise ConfigError("mixup.kind=lam: not supported with a feature bank, whose mixes are of kind eam")
    low, high = snr_db
    slack = 1e-6  # a search may compute the end of a range, and miss it by a rounding
    if isinstance(mixup, config.EAM) and not low - slack <= mixup.snr_db[0] <= mixup.snr_db[1] <= high + slack:
        raise ConfigError(
            f"mixup.snr_db={list(mixup.snr_db)}: the feature bank has mixes from {low:g} to {high:g} dB alone"
        )


def check_crops(data: config.Data, held: Mapping[str, float]) -> None:
    """Refuse crops that are not those a bank holds.

    Raises:
        ConfigError: naming the first that differs.
    """
    for name in ("crop_s", "eval_crop_s"):
        if getattr(data, name) != held[name]:
            raise ConfigError(f"data.{name}={getattr(data, name):g}: the feature bank has {held[name]:g}")


def plan_entries(
    rows: np.ndarray, trained: np.ndarray, num_samples: np.ndarray, recipe: Recipe, dim: int
) -> dict[str, np.ndarray]:
    """Plan the entries of a bank.

    Each utterance and mix has a generator of its own, so that neither workers nor order can change a mix.

    Args:
        rows: int64 (utterances,) ascending row numbers of all utterances.
        trained: int64 (trained,) ascending, those of `rows` that are mixed, and mixed with.
        num_samples: int64, length of each utterance by row number.
        recipe: what to keep of each utterance.
        dim: width of a frame.
    """
    eval_samples, crop_samples = (int(crop_s * SAMPLE_RATE_HZ) for crop_s in (recipe.eval_crop_s, recipe.crop_s))

    heard = np.minimum(num_samples[rows], eval_samples)
    parts = [_entries(rows, SCORED, (num_samples[rows] - heard) // 2, heard)]

    shortened = trained[num_samples[trained] > min(crop_samples, eval_samples)]
    heard = np.minimum(num_samples[shortened], crop_samples)
    uniforms = _uniforms(recipe.seed, shortened, 0, _CROP_DRAWS)
    parts.append(_entries(shortened, UNMIXED, _crop_start(uniforms[:, 0], num_samples[shortened], heard), heard))

    samples = num_samples[trained]
    heard = np.minimum(samples, crop_samples)
    for mix in range(recipe.mixes):
        # The first two place the crops of the utterance and of its partner; the others are as in the epoch plan.
        uniforms = _uniforms(recipe.seed, trained, mix, _MIX_DRAWS)
        draws = draw_eam(uniforms[:, 2:], heard, 1.0, recipe.stratum(mix))
        mixed = draws.partner >= 0
        partner = draws.partner[mixed]
        parts.append(
            _entries(
                trained[mixed],
                mix,
                _crop_start(uniforms[mixed, 0], samples[mixed], heard[mixed]),
                heard[mixed],
                partner=trained[partner],
                partner_crop_start=_crop_start(uniforms[mixed, 1], samples[partner], heard[partner]),
                partner_length=heard[partner],
                mix_length=draws.mix_length[mixed],
                start=draws.start[mixed],
                partner_start=draws.partner_start[mixed],
                snr_db=draws.snr_db[mixed],
            )
        )
    entries = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((entries["mix"], entries["row"], entries["length"]))
    return _laid_out({name: values[order] for name, values in entries.items()}, dim)


def _entries(
    rows: np.ndarray, mix: int, crop_start: np.ndarray, length: np.ndarray, **mixed: np.ndarray
) -> dict[str, np.ndarray]:
    nothing = np.zeros(len(rows), np.int64)
    unmixed = {"partner": nothing - 1, "partner_crop_start": nothing, "partner_length": nothing}
    unmixed |= {"mix_length": nothing, "start": nothing, "partner_start": nothing, "snr_db": nothing + np.nan}
    return {"row": rows, "mix": nothing + mix, "crop_start": crop_start, "length": length, **unmixed, **mixed}


def _uniforms(seed: int, rows: np.ndarray, mix: int, kind: int) -> np.ndarray:
    """float64 (utterances, 8) in [0, 1)."""
    drawn = [np.random.default_rng([seed, row, mix, kind]).random(8) for row in rows.tolist()]
    return np.array(drawn).reshape(len(rows), 8)


def _crop_start(uniform: np.ndarray, num_samples: np.ndarray, length: np.ndarray) -> np.ndarray:
    return np.floor(uniform * (num_samples - length + 1)).astype(np.int64)


def size_bytes(entries: Entries, dim: int) -> int:
    """Bytes that entries take on disk, within 2 %: frames are 20 ms long, and of 32 bits a value."""
    batches, shards = (len(np.unique(entries[name])) for name in ("batch", "shard"))
    return int(_entry_bytes(entries, dim).sum()) + batches * _BATCH_BYTES + shards * _SHARD_BYTES


def _entry_bytes(entries: Entries, dim: int) -> np.ndarray:
    """int64 (entries,); as many frames as convolutions without padding give."""
    frames = np.maximum(entries["length"] - _WINDOW_SAMPLES, 0) // _HOP_SAMPLES + 1
    return frames * dim * 4 + _ENTRY_BYTES


def _laid_out(entries: Entries, dim: int) -> dict[str, np.ndarray]:
    """The entries with `batch`, `shard` and `place`: as many in a batch, and in a shard, as its limit allows."""
    length, size = entries["length"], _entry_bytes(entries, dim)
    batch, shard, place = (np.zeros(len(length), np.int64) for _ in range(3))
    held = 0
    for entry in range(1, len(length)):
        place[entry] = place[entry - 1] + 1
        batch[entry], shard[entry] = batch[entry - 1], shard[entry - 1]
        held += size[entry - 1]
        if (place[entry] + 1) * length[entry] > BATCH_SAMPLES or held + size[entry] > SHARD_BYTES:
            place[entry], batch[entry] = 0, batch[entry] + 1
            if held + size[entry] > SHARD_BYTES:
                shard[entry], held = shard[entry] + 1, 0
    return {**entries, "batch": batch, "shard": shard, "place": place}
