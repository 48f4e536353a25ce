"""Feature banks: equal to the encoder on mixes made by hand, whoever builds them, and trials on them to those without.

The slow path mixes sample by sample, looks for SNRs in a loop, and encodes each utterance alone.
"""

import multiprocessing
import os
import pickle
import shutil
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from prepared import tiny_settings, write_prepared
from safetensors.torch import load_file

from sermll import bank as bank_module
from sermll import bank_plan, config
from sermll.bank import Bank, estimate_bytes
from sermll.bank_plan import SCORED, UNMIXED, Recipe
from sermll.errors import ConfigError, DataError, StorageError
from sermll.feed import SPLITS, Batch, Feed, FoldData
from sermll.job import FoldJob
from sermll.labels import apply_labels, label_space
from sermll.loop import train_fold
from sermll.mixup import mix_labels
from sermll.pretrained import PretrainedEncoder
from sermll.shards import Prepared

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
UTTERANCES, POOL, MIXES = 28, 24, 5
SILENT, TINY = 3, 4
"""An utterance that no scale brings to an SNR, and one that is too short to be mixed."""
CROP, EVAL_CROP = 4800, 6400
Settings = Callable[..., config.Experiment]


def save_wavlm(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random WavLM of two layers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    model = transformers.WavLMModel(transformers.WavLMConfig(**(sizes | convolutions | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_wavlm(tmp_path_factory.mktemp("wavlm") / "model")


def write_data(path: Path, seed: int = 0) -> Prepared:
    """Noise of 0.1 to 0.5 s by seven speakers."""
    rng = np.random.default_rng(seed)
    audio = [rng.normal(0, 2000, rng.integers(1600, 8000)).astype(np.int16) for _ in range(UTTERANCES)]
    audio[SILENT][:] = 0
    audio[TINY] = audio[TINY][:2]
    names = [(f"u{index:02}", "abc"[index % 3], f"s{index // 4}") for index in range(UTTERANCES)]
    return Prepared.open(write_prepared(path, "noise", names, audio=audio))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return write_data(tmp_path_factory.mktemp("bank") / "data")


def fold_of(prepared: Prepared, key: str, **rows: Sequence[int]) -> FoldData:
    labelled = apply_labels(
        label_space("native", prepared.classes), prepared.table["label"].to_pylist(), [None] * UTTERANCES, "hard"
    )
    return FoldData.of(key, prepared, labelled, {split: np.array(rows.get(split, []), np.int64) for split in SPLITS})


def build_settings(wavlm: Path, runs: Path) -> Settings:
    def build(*overrides: str) -> config.Experiment:
        encoder = ["model.encoder.kind=pretrained", f"model.encoder.name={wavlm}", "model.encoder.tune=none"]
        crops = [f"data.crop_s={CROP / 16_000}", f"data.eval_crop_s={EVAL_CROP / 16_000}"]
        words = config.parse_overrides([*encoder, *crops, "optim.batch_size=5"])
        return config.resolve(tiny_settings(Path("nowhere"), runs), words | config.parse_overrides(overrides))

    return build


@pytest.fixture
def settings(wavlm: Path, tmp_path: Path) -> Settings:
    return build_settings(wavlm, tmp_path / "runs")


def pool_of(prepared: Prepared) -> FoldData:
    return fold_of(prepared, "pool", train=range(POOL), test=range(POOL, UTTERANCES))


def inner_of(prepared: Prepared) -> FoldData:
    """A division of the pool: two of its speakers are dev, nobody is test."""
    return fold_of(prepared, "inner", train=range(16), dev=range(16, POOL))


@pytest.fixture(scope="module")
def bank(prepared: Prepared, wavlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    root = tmp_path_factory.mktemp("banks")
    recipe = Recipe.of(build_settings(wavlm, root)(), MIXES, (-10.0, 20.0))
    return Bank.build(root, pool_of(prepared), recipe, CPU)


# --- the slow path


def samples_of(prepared: Prepared, row: int) -> np.ndarray:
    table = prepared.table
    with_audio = bank_module.Waveforms(prepared.files, table["shard"].to_numpy(), table["row"].to_numpy())
    return with_audio[row].astype(np.float64) / 32_768


def slow_sound(prepared: Prepared, bank: Bank, entry: int) -> tuple[np.ndarray, float]:
    """Equations 1 to 4, sample by sample."""
    of = {name: values[entry].item() for name, values in bank.entries.items()}
    crop = samples_of(prepared, of["row"])[of["crop_start"] :][: of["length"]].copy()
    assert len(crop) == of["length"]
    if of["partner"] < 0:
        return crop, 0.0
    other = samples_of(prepared, of["partner"])[of["partner_crop_start"] :][: of["partner_length"]]
    places = range(of["mix_length"])
    energy = sum(crop[of["start"] + at] ** 2 for at in places)
    added = sum(other[of["partner_start"] + at] ** 2 for at in places)
    if energy == 0 or added == 0:
        return crop, 0.0
    snr = 10 ** (of["snr_db"] / 10)
    for at in places:
        crop[of["start"] + at] += np.sqrt(energy / snr / added) * other[of["partner_start"] + at]
    return crop, 1 / (1 + snr) * of["mix_length"] / len(crop)


def slow_entry(bank: Bank, row: int, mix: int) -> int | None:
    for entry, key in enumerate(zip(bank.entries["row"], bank.entries["mix"], strict=True)):
        if key == (row, mix):
            return entry
    return None


def slow_choice(bank: Bank, feed: Feed, split: str, epoch: int, position: int) -> int:
    """The entry that stands in a batch at a position of the plan."""
    plan = feed.plan(split, epoch)
    row = int(plan.rows[position])
    found = None
    if plan.mix is not None and plan.mix.partner[position] >= 0 and isinstance(feed.mixup, config.EAM):
        ranked = []
        for mix in range(MIXES):
            entry = slow_entry(bank, row, mix)
            if entry is not None and bank.entries["partner"][entry] in feed.of.rows["train"]:
                snr_db = bank.entries["snr_db"][entry]
                outside = not feed.mixup.snr_db[0] <= snr_db <= feed.mixup.snr_db[1]
                ranked.append((outside, abs(snr_db - plan.mix.snr_db[position]), entry))
        found = min(ranked)[2] if ranked else None
    if found is None and split == "train":
        found = slow_entry(bank, row, UNMIXED)
    if found is None:
        found = slow_entry(bank, row, SCORED)
    assert found is not None
    return found


def slow_batches(prepared: Prepared, bank: Bank) -> Callable[..., Generator[Batch, None, None]]:
    """Waveforms of the mixes that the bank has the features of."""

    def batches(feed: Feed, first_epoch: int, epochs: int, rank: int, workers: int) -> Generator[Batch, None, None]:
        for epoch in range(first_epoch, epochs):
            for split in SPLITS:
                plan = feed.plan(split, epoch)
                for index in range(plan.num_batches):
                    positions = plan.batch(index, rank, workers).tolist()
                    chosen = [slow_choice(bank, feed, split, epoch, position) for position in positions]
                    sounds = [slow_sound(prepared, bank, entry)[0] for entry in chosen]
                    lengths = np.array([len(signal) for signal in sounds], np.int64)
                    waveform = np.zeros((len(sounds), max(lengths, default=0)), np.float32)
                    for place, signal in enumerate(sounds):
                        waveform[place, : len(signal)] = signal
                    rows = plan.rows[positions]
                    targets = [slow_target(prepared, bank, feed.of, entry) for entry in chosen]
                    targets = np.array(targets, np.float32).reshape(-1, 3)
                    yield Batch(epoch, split, index, rows, waveform, lengths, feed.of.labels[rows], targets)

    return batches


def slow_target(prepared: Prepared, bank: Bank, fold: FoldData, entry: int) -> np.ndarray:
    row, partner = (int(bank.entries[name][entry]) for name in ("row", "partner"))
    if partner < 0:
        return fold.targets[row]
    return mix_labels(fold.targets[row], fold.targets[partner], slow_sound(prepared, bank, entry)[1])


def encoded(encoder: PretrainedEncoder, signal: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        frames, mask = encoder(torch.from_numpy(signal.astype(np.float32))[None], torch.tensor([len(signal)]))
    assert mask.all()
    return frames[0].numpy()


# --- what it holds


def test_every_entry_equals_the_encoder_on_a_mix_made_by_hand(prepared: Prepared, wavlm: Path, bank: Bank) -> None:
    encoder = PretrainedEncoder(config.Pretrained(name=str(wavlm), tune="none")).eval()
    assert len(np.unique(bank.entries["batch"])) < len(bank.entries["row"]) / 5  # batches that need padding
    for entry in range(len(bank.entries["row"])):
        signal, share = slow_sound(prepared, bank, entry)
        frames, found = bank.read(entry)
        assert frames.dtype == np.float32
        np.testing.assert_allclose(frames, encoded(encoder, signal), atol=1e-4)
        assert found == pytest.approx(share, abs=1e-12)


def test_entries_are_crops_and_mixes_of_the_utterances_asked_for(prepared: Prepared, bank: Bank) -> None:
    of, num_samples = bank.entries, prepared.num_samples
    mixes = [(row, mix) for row in range(POOL) if row != TINY for mix in range(MIXES)]
    unmixed = [(row, UNMIXED) for row in range(POOL) if num_samples[row] > CROP]
    scored = [(row, SCORED) for row in range(UTTERANCES)]
    assert Counter(zip(of["row"].tolist(), of["mix"].tolist(), strict=True)) == Counter([*mixes, *unmixed, *scored])
    longest = np.where(of["mix"] == SCORED, EVAL_CROP, CROP)
    np.testing.assert_array_equal(of["length"], np.minimum(num_samples[of["row"]], longest))
    middle = (num_samples[of["row"]] - of["length"]) // 2
    np.testing.assert_array_equal(of["crop_start"][of["mix"] == SCORED], middle[of["mix"] == SCORED])
    drawn = (of["mix"] != SCORED) & (num_samples[of["row"]] > CROP)
    assert len(set(of["crop_start"][drawn])) > 0.9 * drawn.sum() > 20

    mixed = of["mix"] >= 0
    lowest = -10 + 30 / MIXES * of["mix"][mixed]
    assert ((lowest <= of["snr_db"][mixed]) & (of["snr_db"][mixed] < lowest + 30 / MIXES)).all()
    assert (of["partner"][mixed] < POOL).all() and (of["partner"][mixed] != of["row"][mixed]).all()
    assert len(set(of["partner"][mixed])) == POOL
    assert (of["mix_length"][mixed] <= np.maximum(1, (of["length"][mixed] - 1) // 2)).all()


def test_a_mix_does_not_depend_on_how_many_there_are(settings: Settings, prepared: Prepared, bank: Bank) -> None:
    few = bank_plan.plan_entries(*bank_module._pool(pool_of(prepared)), prepared.num_samples, recipe_of(settings), 16)
    for row in range(POOL):
        one, two = (
            {name: values[np.flatnonzero((of["row"] == row) & (of["mix"] == 0))] for name, values in of.items()}
            for of in (few, bank.entries)
        )
        for name in ("crop_start", "partner", "partner_crop_start", "mix_length", "start", "partner_start"):
            np.testing.assert_array_equal(one[name], two[name])


def recipe_of(settings: Settings, mixes: int = 2, **changes: Any) -> Recipe:
    return replace(Recipe.of(settings(), mixes, (-10.0, 20.0)), **changes)


# --- batches


@pytest.mark.parametrize(("batch_size", "workers"), [(5, 1), (2, 1), (16, 3)])
@pytest.mark.parametrize("mixup", [["mixup.snr_db=[-10, 20]"], ["mixup.snr_db=[3.1, 3.2]"], ["mixup.kind=none"]])
def test_batches_of_any_composition_hold_what_the_plan_asks_for(
    settings: Settings, prepared: Prepared, bank: Bank, batch_size: int, workers: int, mixup: list[str]
) -> None:
    experiment = settings(f"optim.batch_size={batch_size}", *mixup)
    feed = Feed.for_run(f"{batch_size} {mixup}", experiment, inner_of(prepared))
    seen = Counter()
    for rank in range(workers):
        for batch in bank.batches(feed, 1, 3, rank, workers):
            positions = feed.plan(batch.split, batch.epoch).batch(batch.index, rank, workers)
            np.testing.assert_array_equal(batch.rows, feed.plan(batch.split, batch.epoch).rows[positions])
            np.testing.assert_array_equal(batch.labels, feed.of.labels[batch.rows])
            assert batch.waveform.shape == (len(positions), max(batch.lengths, default=0), bank.dim)
            assert batch.waveform.dtype == batch.targets.dtype == np.float32
            for place, position in enumerate(positions.tolist()):
                entry = slow_choice(bank, feed, batch.split, batch.epoch, position)
                frames, length = bank.read(entry)[0], batch.lengths[place]
                np.testing.assert_array_equal(batch.waveform[place, :length], frames)
                assert not batch.waveform[place, length:].any()
                expected = slow_target(prepared, bank, feed.of, entry)
                np.testing.assert_allclose(batch.targets[place], expected, atol=1e-6)
                seen[batch.split] += 1
    assert seen == {"train": 32, "dev": 16}  # two epochs, and no test


def test_snr_choice_equals_a_slow_loop(prepared: Prepared, bank: Bank) -> None:
    fold, rng = inner_of(prepared), np.random.default_rng(0)
    of = bank.entries
    for _ in range(200):
        row, drawn = int(rng.integers(16)), float(rng.uniform(-12, 22))
        low, high = sorted(rng.uniform(-10, 20, 2))
        best = -1
        for entry in np.flatnonzero((of["row"] == row) & (of["mix"] >= 0) & (of["partner"] < 16)).tolist():
            inside, nearer = low <= of["snr_db"][entry] <= high, False
            if best >= 0:
                best_inside = low <= of["snr_db"][best] <= high
                nearer = abs(of["snr_db"][entry] - drawn) < abs(of["snr_db"][best] - drawn)
                nearer = inside if inside != best_inside else nearer
            best = entry if best < 0 or nearer else best
        assert bank.nearest(fold, row, drawn, (low, high)) == best
        assert best >= 0 or row == TINY


def test_partners_are_trained_on_in_every_division_of_the_pool(
    settings: Settings, prepared: Prepared, bank: Bank
) -> None:
    for first in range(0, POOL, 8):
        dev = range(first, first + 8)
        train = [row for row in range(POOL) if row not in dev]
        fold = fold_of(prepared, f"division {first}", train=train, dev=dev)
        mixed = 0
        for row in train:
            for drawn in np.linspace(-10, 20, 7):
                entry = bank.nearest(fold, row, drawn, (-10, 20))
                assert entry < 0 or bank.entries["partner"][entry] in train
                mixed += entry >= 0
        assert mixed >= 7 * (len(train) - 2)  # all but the utterance that is never mixed, and one by bad luck


# --- trials


def run_trial(folder: Path, experiment: config.Experiment, fold: FoldData, *peer: Any) -> FoldJob:
    batches, encoder = peer
    job = FoldJob(f"{folder.name}/fold-0", "fold 0", experiment.model_dump(mode="json"), 0, str(folder))
    folder.mkdir()
    assert train_fold(job, fold, batches, CPU, encoder=encoder) == []
    return job


def test_a_trial_equals_one_with_the_encoder_on_waveforms(
    settings: Settings, prepared: Prepared, bank: Bank, tmp_path: Path
) -> None:
    experiment = settings("mixup.snr_db=[-5, 15]", "mixup.probability=0.8")
    fold = inner_of(prepared)
    fast = run_trial(tmp_path / "fast", experiment, fold, bank.batches, bank.stand_in(experiment))
    slow = run_trial(tmp_path / "slow", experiment, fold, slow_batches(prepared, bank), None)
    assert len(fast.history()) == 2
    for one, two in zip(fast.history(), slow.history(), strict=True):
        untimed = one.keys() - {"train_s", "eval_s", "utterances_per_s", "data_wait_share"}
        assert one.keys() == two.keys() and one["loss"] > 0
        assert one["device"] == two["device"] == "cpu"
        for name in untimed - {"device"}:
            np.testing.assert_allclose(one[name], two[name], atol=1e-4, rtol=1e-4, err_msg=name)
    for name in ("predictions_dev.parquet", "predictions.parquet"):
        one, two = (pq.read_table(Path(job.folder) / name) for job in (fast, slow))
        assert one["utterance"].to_pylist() == two["utterance"].to_pylist()
        assert len(one) == (8 if "dev" in name else 0)
        for column in ("probabilities", "embedding"):
            np.testing.assert_allclose(one[column].to_pylist(), two[column].to_pylist(), atol=1e-4)
    weights = load_file(sorted(fast.checkpoints.iterdir())[-1] / "model.safetensors")
    assert weights and not any("encoder" in name for name in weights)


def test_the_encoder_is_not_loaded_in_a_trial(
    settings: Settings, prepared: Prepared, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sermll.pretrained._load", lambda name: pytest.fail("the encoder was loaded"))
    experiment = settings("optim.epochs=1", "optim.average=0.9")
    bank = pickle.loads(pickle.dumps(bank))
    job = run_trial(tmp_path / "trial", experiment, inner_of(prepared), bank.batches, bank.stand_in(experiment))
    assert job.finished


# --- building


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_plan, "SHARD_BYTES", 8_000)
    monkeypatch.setattr(bank_plan, "BATCH_SAMPLES", 20_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("small_shards")
def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    settings: Settings, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, pool = recipe_of(settings), pool_of(prepared)
    at_once = Bank.build(tmp_path / "at once", pool, recipe, CPU)
    batches = len(np.unique(at_once.entries["batch"]))
    encode, calls = bank_module._encode, []

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return encode(*arguments)

    def die(*arguments: Any) -> Any:
        if len(calls) == batches // 2:
            raise KeyboardInterrupt
        return count(*arguments)

    monkeypatch.setattr(bank_module, "_encode", die)
    with pytest.raises(KeyboardInterrupt):
        Bank.build(tmp_path / "killed", pool, recipe, CPU)
    [folder] = (tmp_path / "killed").iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").iterdir()}
    assert 1 < len(kept) < len(at_once.facts["shards"])
    with pytest.raises(DataError, match=r"bank\.json: not there"):
        Bank.open(folder)

    monkeypatch.setattr(bank_module, "_encode", count)
    resumed = Bank.build(tmp_path / "killed", pool, recipe, CPU)
    largest = max(len(np.unique(resumed.entries["batch"][resumed.entries["shard"] == shard])) for shard in range(3))
    assert batches <= len(calls) < batches + largest  # nothing but a part of one shard was encoded twice
    assert {name: (folder / "shards" / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(folder) == contents(at_once.folder)
    calls.clear()
    again = Bank.build(tmp_path / "killed", pool, recipe, CPU)
    assert not calls and again.facts == resumed.facts


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("killed", [False, True])
def test_processes_that_build_a_bank_at_once_encode_it_once_and_a_killed_one_leaves_nothing(
    killed: bool, settings: Settings, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, pool = recipe_of(settings), pool_of(prepared)
    alone = Bank.build(tmp_path / "alone", pool, recipe, CPU)
    batches = len(np.unique(alone.entries["batch"]))
    encode, log = bank_module._encode, tmp_path / "encoded"

    def count(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.02)  # so that the others come while one builds
        if killed and len(log.read_text().split()) == batches // 2:
            os.kill(os.getpid(), SIGKILL)
        return encode(*arguments)

    monkeypatch.setattr(bank_module, "_encode", count)
    fork = multiprocessing.get_context("fork")  # a new interpreter takes seconds to load torch
    builders = [fork.Process(target=Bank.build, args=(tmp_path / "banks", pool, recipe, CPU)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert Counter(builder.exitcode for builder in builders) == ({-SIGKILL: 1, 0: 2} if killed else {0: 3})
    by_process = Counter(log.read_text().split())
    largest = max(
        Counter(shard for shard, _ in {*zip(alone.entries["shard"], alone.entries["batch"], strict=True)}).values()
    )
    assert len(by_process) == 1 + killed
    assert batches <= by_process.total() <= batches + killed * largest  # of the shard that was broken off
    monkeypatch.setattr(bank_module, "_encode", pytest.fail)
    again = Bank.build(tmp_path / "banks", pool, recipe, CPU)
    built, expected = contents(again.folder), contents(alone.folder)
    assert built.pop(".building") and expected.pop(".building")  # who built it, and when
    assert built == expected


def test_the_key_names_weights_audio_and_settings_but_no_names(
    settings: Settings, prepared: Prepared, wavlm: Path, bank: Bank, tmp_path: Path
) -> None:
    def key(recipe: Recipe, data: FoldData | None = None) -> str:
        encoder = PretrainedEncoder(recipe.encoder)
        return bank_module._facts(data or pool_of(prepared), recipe, encoder.fingerprint, encoder.dim)["key"]

    recipe = recipe_of(settings, MIXES)
    assert key(recipe)[:16] == bank.folder.name and key(recipe) == bank.facts["key"]
    moved = shutil.copytree(wavlm, tmp_path / "moved")
    named = recipe.encoder.model_copy(update={"name": str(moved)})
    assert key(replace(recipe, encoder=named)) == key(recipe)

    model = transformers.WavLMModel.from_pretrained(wavlm)
    with torch.no_grad():
        model.encoder.layers[1].final_layer_norm.bias[0] += 1e-4
    model.save_pretrained(moved)
    others = [
        key(replace(recipe, encoder=named)),
        key(recipe, pool_of(write_data(tmp_path / "data", seed=1))),
        key(recipe, fold_of(prepared, "fewer are mixed", train=range(20), test=range(20, UTTERANCES))),
        key(recipe, fold_of(prepared, "fewer are kept", train=range(POOL))),
        key(replace(recipe, encoder=recipe.encoder.model_copy(update={"layer": 2}))),
        key(replace(recipe, encoder=recipe.encoder.model_copy(update={"layer": 1}))),
        *(
            key(replace(recipe, **change))
            for change in ({"mixes": 6}, {"snr_db": (-10.0, 19.0)}, {"crop_s": 0.31}, {"eval_crop_s": 0.5}, {"seed": 1})
        ),
    ]
    assert len({key(recipe), *others}) == 1 + len(others)


def test_trials_go_on_while_another_search_builds_the_same_bank_under_another_name_of_the_encoder(
    settings: Settings, prepared: Prepared, wavlm: Path, tmp_path: Path
) -> None:
    recipe, fold = recipe_of(settings, 1), fold_of(prepared, "shared", train=range(4))
    first = Bank.build(tmp_path / "banks", fold, recipe, CPU)
    moved = recipe.encoder.model_copy(update={"name": str(shutil.copytree(wavlm, tmp_path / "moved"))})
    second = Bank.build(tmp_path / "banks", fold, replace(recipe, encoder=moved), CPU)
    assert second.folder == first.folder
    named = settings(f"model.encoder.name={moved.name}")
    for bank in (first, second, Bank.open(first.folder)):
        assert bank.stand_in(settings()).dim == bank.stand_in(named).dim == bank.dim


def test_the_estimate_comes_within_two_percent(prepared: Prepared, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "num_hidden_layers": 1}
    experiment = build_settings(save_wavlm(tmp_path / "wide", **wide), tmp_path)()
    pool = fold_of(prepared, "estimated", train=range(POOL), dev=range(POOL, UTTERANCES))
    recipe = Recipe.of(experiment, 8, (-5.0, 5.0))
    built = Bank.build(tmp_path / "banks", pool, recipe, CPU)
    taken = sum(map(len, contents(built.folder).values()))
    assert estimate_bytes(pool, recipe, 128) == pytest.approx(taken, rel=0.02)


def test_empty_splits_and_lone_utterances_are_kept_clean(
    settings: Settings, prepared: Prepared, tmp_path: Path
) -> None:
    recipe = recipe_of(settings)
    unseen = Bank.build(tmp_path, fold_of(prepared, "no train", test=range(5)), recipe, CPU)
    assert sorted(unseen.entries["row"]) == list(range(5)) and (unseen.entries["mix"] == SCORED).all()
    fold = fold_of(prepared, "one", train=range(5, 6), dev=range(6, 8))
    alone = Bank.build(tmp_path, fold, recipe, CPU)
    experiment = settings("mixup.probability=1.0")
    shapes = [batch.waveform.shape[0] for batch in alone.batches(Feed.for_run("one", experiment, fold), 0, 1)]
    assert shapes == [1, 2, 0]
    with pytest.raises(DataError, match="all splits are empty"):
        Bank.build(tmp_path, fold_of(prepared, "none"), recipe, CPU)


# --- what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.tune=all", r"model\.encoder\.tune=all: the features change"),
        ("model.encoder.tune=transformer", r"model\.encoder\.tune=transformer: the features change"),
        ("model.encoder.layer=weighted", r"model\.encoder\.layer=weighted: the weights of the layers are trained"),
    ],
)
def test_trained_encoders_are_refused(settings: Settings, bank: Bank, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.of(settings(override), MIXES, (-5.0, 10.0))
    with pytest.raises(ConfigError, match=r"another encoder than the trial's: .*model\.encoder\."):
        bank.stand_in(settings(override))


def test_encoders_from_scratch_are_refused(bank: Bank, tmp_path: Path) -> None:
    scratch = config.resolve(tiny_settings(tmp_path, tmp_path), {})
    with pytest.raises(ConfigError, match=r"model\.encoder\.kind=logmel: this encoder is trained"):
        Recipe.of(scratch, MIXES, (-5.0, 10.0))
    with pytest.raises(ConfigError, match=r"another encoder than the trial's: model\.encoder\.kind=logmel"):
        bank.stand_in(scratch)


@pytest.mark.parametrize(
    ("mixes", "snr_db", "message"), [(0, (-5.0, 5.0), "one mix"), (3, (5.0, -5.0), r"SNR range.*\n.*low <= high")]
)
def test_recipes_without_mixes_are_refused(
    settings: Settings, mixes: int, snr_db: tuple[float, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.of(settings(), mixes, snr_db)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixup.kind=lam", r"mixup\.kind=lam: not supported with a feature bank"),
        ("mixup.snr_db=[-11, 0]", r"mixup\.snr_db=\[-11\.0, 0\.0\]: the feature bank has mixes from -10 to 20 dB"),
        ("data.crop_s=0.4", r"data\.crop_s=0\.4: the feature bank has 0\.3"),
        ("data.eval_crop_s=1", r"data\.eval_crop_s=1: the feature bank has 0\.4"),
    ],
)
def test_trials_that_a_bank_cannot_serve_are_refused(
    settings: Settings, prepared: Prepared, bank: Bank, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bank.stand_in(settings(override))
    with pytest.raises(ConfigError, match=message):
        bank.batches(Feed.for_run(override, settings(override), inner_of(prepared)), 0, 1)


def test_utterances_that_a_bank_has_not_are_refused(
    settings: Settings, prepared: Prepared, bank: Bank, tmp_path: Path
) -> None:
    def refused(fold: FoldData, message: str) -> None:
        with pytest.raises(DataError, match=message):
            bank.batches(Feed.for_run(fold.key, settings(), fold), 0, 1)

    refused(fold_of(prepared, "held out", train=range(20, 26)), "2 train utterances are not .*, as u24")
    other = write_data(tmp_path / "data", seed=1)
    refused(fold_of(other, "other", train=range(16)), "of other recordings")


def test_damaged_banks_are_named(settings: Settings, prepared: Prepared, tmp_path: Path) -> None:
    recipe, fold = recipe_of(settings, 1), fold_of(prepared, "damaged", train=range(4))
    folder = Bank.build(tmp_path, fold, recipe, CPU).folder
    shard = folder / "shards" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-9])
    for opened in (lambda: Bank.open(folder), lambda: Bank.build(tmp_path, fold, recipe, CPU)):
        with pytest.raises(DataError, match=r"00000\.arrow: \d+ bytes, bank\.json says \d+ bytes; delete"):
            opened()
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.arrow: missing"):
        Bank.open(folder)


def test_a_disk_without_room_is_told_before_anything_is_encoded(
    settings: Settings, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, pool = recipe_of(settings), pool_of(prepared)
    usage, needed = namedtuple("usage", "total used free"), estimate_bytes(pool, recipe, 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(StorageError, match=r"needs .* GB more, and the disk has .* GB free"):
        Bank.build(tmp_path, pool, recipe, CPU)
    assert not list(tmp_path.rglob("*.arrow"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    Bank.build(tmp_path, pool, recipe, CPU)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        Bank.build(tmp_path / "file", pool, recipe, CPU)
