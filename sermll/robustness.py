"""`sermll robustness`: how the models of a finished run bear noise on the utterances they were tested on.

    RUN/robustness/
      robustness.json      scores with intervals: clean, for each noise and SNR, mean over noises
      predictions.parquet  one row per test utterance, noise and SNR
      table.csv curves.png curves.svg index.html
      pieces/              predictions of one fold under one noise, named by a hash of all that decides them

Each piece is a Ray task. A piece that is there is not scored again, so a command that was cut off goes on, and one with
another noise more scores that alone.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from sermll import __version__, metrics
from sermll.audio import SAMPLE_RATE_HZ, to_float
from sermll.checkpoint import Checkpoint
from sermll.cluster import connected
from sermll.config import Experiment
from sermll.design import Design
from sermll.errors import ConfigError, DataError, SermllError
from sermll.files import whole, write_json
from sermll.model import System
from sermll.noise import Noise, active_level_db, add_noise, draws, read_noises
from sermll.plan import eval_plan
from sermll.progress import Progress
from sermll.results import PREDICTIONS, by_speaker, estimate, finished_folds, read_model_settings, read_run
from sermll.robustness_page import SCORES, build
from sermll.shards import Waveforms
from sermll.storage import fetch

MOST_SNR_DB = 100.0
BATCH_SIZE = 8
"""Utterances recognised at a time; each is held with noise at every level."""
PROBABILITY_TOLERANCE = 0.05
"""How far clean probabilities may lie from the run's own: other hardware and 16-bit floats round otherwise."""


@dataclass(frozen=True)
class Robustness:
    """What the command leaves behind."""

    folder: Path
    page: Path
    found: dict[str, Any]
    """Content of robustness.json."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "path": str(self.folder),
            "clean_ua": self.found["clean"]["ua"]["value"],
            "conditions": [
                {
                    **{name: row[name] for name in ("noise", "snr_db")},
                    "ua": row["ua"]["value"],
                    "ua_low": row["ua"]["low"],
                    "ua_high": row["ua"]["high"],
                }
                for row in self.found["conditions"]
            ],
            "leaks": self.found["leaks"],
        }


@dataclass(frozen=True)
class FoldModel:
    """The chosen model of a fold and the utterances it is tested on. Arrays are by utterance."""

    number: int
    settings: Experiment
    classes: tuple[str, ...]
    checkpoint: Checkpoint
    """Found whole when the command started."""
    waveforms: Waveforms
    num_samples: np.ndarray
    names: pa.Table
    """Columns utterance, speaker, corpus, fold, label."""


@dataclass(frozen=True)
class Piece:
    """One task: a fold's test utterances under one noise at every level, or clean."""

    fold: FoldModel
    noise: Noise | None
    path: Path
    """Where its predictions are kept."""

    def __str__(self) -> str:
        """For progress and messages."""
        return f"fold {self.fold.number}, {_title(self.noise)}"


def robustness(
    run_dir: Path, noise_dir: Path, snr_db: Sequence[float], out: Path | None = None, seed: int = 0
) -> Robustness:
    """Score the finished folds of a run clean and with noise.

    Args:
        run_dir: the folder printed by `sermll train`.
        noise_dir: folder of WAV and FLAC files, each of them one noise.
        snr_db: signal-to-noise ratios in dB.
        out: folder for the results; None: `run_dir`/robustness.
        seed: of the segments of noise, 0 or more.

    Raises:
        ConfigError: an SNR or the seed makes no sense.
        DataError: a folder is no run with results, its data or folds are not those it was trained on, a noise cannot be
            used, or the models do not say of clean utterances what the run says they did.
        CheckpointError: a model is missing or damaged.
    """
    levels = _levels(snr_db)
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")
    noises = read_noises(noise_dir)
    run_dir = run_dir.expanduser().resolve()  # tasks may run in another folder
    run, folds = _open(run_dir)
    out = (run_dir / "robustness" if out is None else out).expanduser().absolute()
    try:
        fetch(out / "pieces")
        (out / "pieces").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); give another --out") from None
    pieces = _pieces(out / "pieces", run, folds, noises, levels, seed)
    clean, noisy = pieces[: len(folds)], pieces[len(folds) :]
    with Progress(f"scoring {run_dir.name}", len(pieces), sum(piece.path.exists() for piece in pieces)) as progress:
        _score_missing(clean, levels, seed, progress)
        for piece in clean:
            _check_clean(pq.read_table(piece.path), run_dir, piece.fold)
        _score_missing(noisy, levels, seed, progress)
    table = pa.concat_tables(pq.read_table(piece.path) for piece in pieces)
    with whole(out / PREDICTIONS) as partial:
        pq.write_table(table, partial)
    found = {
        "run": run_dir.name,
        "version": __version__,
        **{name: run["data"][name] for name in ("title", "data_hash")},
        "protocol": run["protocol"]["name"],
        "protocol_hash": run["protocol"]["hash"],
        "select": run["protocol"]["select"],
        "leaks": run["protocol"]["leaks"],
        "folds": [fold.number for fold in folds],
        "folds_of_protocol": len(run["protocol"]["folds"]),
        "chance": 1 / len(run["data"]["classes"]),
        "noise_dir": str(noise_dir),
        "noises": [
            {"name": noise.name, "sha256": noise.sha256, "duration_s": len(noise.samples) / SAMPLE_RATE_HZ}
            for noise in noises
        ],
        "snr_db": levels,
        "seed": seed,
        **_scores(table, run["data"]["classes"], [noise.name for noise in noises], levels),
    }
    page = build(found, out)
    write_json(out / "robustness.json", found)
    return Robustness(out, page, found)


def _levels(snr_db: Sequence[float]) -> list[float]:
    """The levels from little noise to much, each once."""
    for level in snr_db:
        if not abs(level) <= MOST_SNR_DB:  # nor is NaN
            raise ConfigError(f"--snr {level:g}: give levels from {-MOST_SNR_DB:g} to {MOST_SNR_DB:g} dB")
    if not snr_db:
        raise ConfigError("--snr: give at least one level in dB")
    return sorted({float(level) for level in snr_db}, reverse=True)


def _open(run_dir: Path) -> tuple[dict[str, Any], list[FoldModel]]:
    """What run.json says, and the model of every finished fold with the utterances it is tested on."""
    run, settings, results = read_run(run_dir), read_model_settings(run_dir), finished_folds(run_dir)
    if not results:
        raise DataError(f"{run_dir}: no finished fold; go on with `sermll train`, or give a member of this ensemble")
    # The folders of the settings may be relative to where training was started; the record's are not.
    data = settings.data.model_copy(update={"path": tuple(run["data"]["paths"])})
    design = Design.of(data, settings.protocol)
    _check_design(design, run, run_dir)
    design.prepared.verify()
    table, prepared = design.prepared.table, design.prepared
    folds = []
    for result in results:
        number = result["fold"]
        rows = design.folds.folds[number].rows["test"]
        names = {
            "utterance": table["id"].take(rows),
            "speaker": table["speaker"].take(rows),
            "corpus": table["corpus"].take(rows),
            "fold": pa.array([number] * len(rows), pa.int32()),
            "label": pa.array([design.classes[label] for label in design.labelled.labels[rows]]),
        }
        folds.append(
            FoldModel(
                number=number,
                settings=settings,
                classes=design.classes,
                checkpoint=Checkpoint.open(run_dir / f"fold-{number}" / result["best_checkpoint"]),
                waveforms=Waveforms(prepared.files, table["shard"].to_numpy()[rows], table["row"].to_numpy()[rows]),
                num_samples=prepared.num_samples[rows],
                names=pa.table(names),
            )
        )
    return run, folds


def _check_design(design: Design, run: dict[str, Any], run_dir: Path) -> None:
    """Refuse other data, labels or folds than those of the run, saying where they differ."""
    if (design.prepared.data_hash, design.hash) == (run["data"]["data_hash"], run["protocol"]["hash"]):
        return
    now = json.loads(json.dumps(design.describe()))
    differing = [
        f"{part}.{key}"
        for part in ("data", "protocol")
        for key, value in now[part].items()
        if key != "paths" and key in run[part] and value != run[part][key]
    ]
    raise DataError(
        f"{design.prepared.path}: not the data and folds that {run_dir} was trained on; they differ in "
        f"{', '.join(differing)}. Put back the data, or the fold list, that the run's run.json names"
    )


def _pieces(
    folder: Path,
    run: dict[str, Any],
    folds: Sequence[FoldModel],
    noises: Sequence[Noise],
    levels: Sequence[float],
    seed: int,
) -> list[Piece]:
    """Every piece, the clean ones first; its file is named by a hash of all that decides what it holds."""
    pieces = []
    for noise in (None, *noises):
        for fold in folds:
            decides = [__version__, run["run_id"], run["data"]["data_hash"], run["protocol"]["hash"], fold.number]
            decides.append(fold.checkpoint.notes["files"]["model.safetensors"])
            if noise is not None:
                decides += [noise.name, noise.sha256, levels, seed]
            key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
            pieces.append(Piece(fold, noise, folder / f"fold-{fold.number}-{_title(noise)}-{key}.parquet"))
    return pieces


def _title(noise: Noise | None) -> str:
    return "clean" if noise is None else noise.name


def _score_missing(pieces: Sequence[Piece], levels: Sequence[float], seed: int, progress: Progress) -> None:
    """Score the pieces that are not there, as many at a time as the cluster holds."""
    missing = [piece for piece in pieces if not piece.path.exists()]
    if not missing:
        return
    with connected():
        import ray  # only now: it reads its settings from the environment when it is imported

        task = ray.remote(num_cpus=1, num_gpus=1 if ray.cluster_resources().get("GPU") else 0)(score)
        # What several tasks need is sent once.
        folds = {fold.number: ray.put(fold) for fold in {piece.fold.number: piece.fold for piece in missing}.values()}
        noises = {
            name: ray.put(noise) for name, noise in {_title(piece.noise): piece.noise for piece in missing}.items()
        }
        waiting: dict[Any, Piece] = {
            task.remote(folds[piece.fold.number], noises[_title(piece.noise)], levels, seed): piece for piece in missing
        }
        try:
            while waiting:
                (done, *_), _ = ray.wait(list(waiting))
                piece = waiting.pop(done)
                table = _result(done, piece)
                with whole(piece.path) as partial:
                    pq.write_table(table, partial)
                progress.advance(note=str(piece))
        finally:
            for unfinished in waiting:
                ray.cancel(unfinished)


def _result(reference: Any, piece: Piece) -> pa.Table:  # Ray's reference to what a task returns
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, SermllError):
            raise cause from None
        raise SermllError(f"{piece}: {error}\nWhat was scored is kept; the same command goes on from here") from None


@torch.no_grad()
def score(fold: FoldModel, noise: Noise | None, levels: Sequence[float], seed: int) -> pa.Table:
    """Recognise a fold's test utterances under a noise at every level, or clean.

    Returns:
        For each level, a row for each utterance: noise, snr_db (both null: clean), utterance, speaker, corpus, fold,
        label, predicted, probabilities, active_level_db (of the speech; null: it has none, so no noise was added).
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    system = System(fold.settings, len(fold.classes))
    fold.checkpoint.load_into(system)
    system.to(device).eval()

    shown = [None] if noise is None else levels
    ids = fold.names["utterance"].to_pylist()
    probabilities = np.zeros((len(shown), len(ids), len(fold.classes)))
    level_db = np.zeros(len(ids))
    plan = eval_plan(np.arange(len(ids)), fold.num_samples, fold.settings.data, BATCH_SIZE)
    for index in range(plan.num_batches):
        positions = plan.batch(index)
        lengths = plan.length[positions]
        waveform = np.zeros((len(shown), len(positions), lengths.max()), np.float32)
        for place, position in enumerate(positions.tolist()):
            start, length = plan.crop_start[position], plan.crop_length[position]
            speech = to_float(fold.waveforms[position][start : start + length])
            if noise is None:
                waveform[:, place, :length], level_db[position] = speech, active_level_db(speech)
            else:
                waveform[:, place, :length], level_db[position] = add_noise(
                    speech, noise.samples, levels, draws(seed, ids[position], noise.name)
                )
        for level, sounds in enumerate(waveform):
            output = system.recognize(torch.from_numpy(sounds).to(device), torch.from_numpy(lengths).to(device))
            probabilities[level, positions] = output.logits.double().softmax(dim=1).cpu().numpy()
    return pa.concat_tables(
        pa.table(
            {
                "noise": pa.array([None if noise is None else noise.name] * len(ids), pa.string()),
                "snr_db": pa.array([snr_db] * len(ids), pa.float64()),
                **{name: fold.names[name] for name in fold.names.column_names},
                "predicted": [fold.classes[index] for index in values.argmax(axis=1)],
                "probabilities": pa.array(list(values), pa.list_(pa.float64())),
                "active_level_db": pa.array(level_db, mask=np.isneginf(level_db)),
            }
        )
        for snr_db, values in zip(shown, probabilities, strict=True)
    )


def _check_clean(table: pa.Table, run_dir: Path, fold: FoldModel) -> None:
    """Refuse models that do not say of clean utterances what the run says they did."""
    stored = pq.read_table(run_dir / f"fold-{fold.number}" / PREDICTIONS)
    said = [
        {row["utterance"]: row for row in rows.select(["utterance", "label", "probabilities"]).to_pylist()}
        for rows in (table, stored)
    ]
    if {name: row["label"] for name, row in said[0].items()} != {name: row["label"] for name, row in said[1].items()}:
        raise DataError(f"{run_dir}: fold {fold.number} was tested on other utterances, or with other labels, than now")
    gap = max(
        np.abs(np.subtract(row["probabilities"], said[1][name]["probabilities"])).max() for name, row in said[0].items()
    )
    if gap > PROBABILITY_TOLERANCE:
        now, then = (metrics.ua(by_speaker(rows, fold.classes)[0].sum(axis=0)) for rows in (table, stored))
        raise DataError(
            f"{run_dir}: fold {fold.number} has a clean UA of {100 * now:.1f} here, the run says {100 * then:.1f} "
            f"(probabilities differ by up to {gap:.2f}): its model or data are not those that gave its results"
        )


def _scores(table: pa.Table, classes: Sequence[str], noises: Sequence[str], levels: Sequence[float]) -> dict[str, Any]:
    """Scores of all folds with intervals over speakers: clean, for each noise and level, and of all noises together.

    All noises have the same utterances, so the recalls of all together, and with them UA and WA, are means over noises.
    """

    def scores(rows: pc.Expression) -> dict[str, Any]:
        found, _ = estimate(table.filter(rows), classes)
        return {name: found[name] for name in SCORES}

    noise, snr_db = pc.field("noise"), pc.field("snr_db")
    quiet = table.filter(noise.is_null() & pc.field("active_level_db").is_null())
    return {
        "clean": scores(noise.is_null()),
        "conditions": [
            {"noise": name, "snr_db": level, **scores((noise == name) & (snr_db == level))}
            for name in noises
            for level in levels
        ],
        "mean": [{"snr_db": level, **scores(snr_db == level)} for level in levels],
        "without_level": quiet["utterance"].to_pylist(),
    }
