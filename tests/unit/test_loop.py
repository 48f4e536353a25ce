"""The training loop's parts on one process: rates, NaN, scoring, and what a system computes."""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from prepared import in_process
from torch import nn

from sermll import checkpoint, config, loop
from sermll.errors import ConfigError, StorageError, TrainingError
from sermll.feed import Batch, FoldData
from sermll.job import FoldJob
from sermll.loop import (
    Average,
    Scores,
    Sums,
    score,
    selection_scores,
    to_device,
    train_epoch,
    train_fold,
)
from sermll.model import System
from sermll.optimizer import Step, make_optimizer
from sermll.pretrained import PretrainedEncoder
from sermll.train import Designs, Run

Settings = Callable[..., Any]
CPU = torch.device("cpu")


def batch_of(lengths: list[int], seed: int = 0, index: int = 0, num_classes: int = 7) -> Batch:
    rng = np.random.default_rng(seed)
    waveform = np.zeros((len(lengths), max(lengths)), np.float32)
    for place, length in enumerate(lengths):
        waveform[place, :length] = rng.normal(0, 0.1, length)
    labels = rng.integers(0, num_classes, len(lengths))
    targets = np.eye(num_classes, dtype=np.float32)[labels]
    return Batch(0, "train", index, np.arange(len(lengths)), waveform, np.array(lengths), labels, targets)


@pytest.fixture
def system(settings: Settings) -> System:
    torch.manual_seed(0)
    return System(settings(), 7)


def steps_of(system: System, experiment: Any) -> Callable[[], Step]:
    optimizer = make_optimizer(system, experiment.optim)
    return lambda: Step(optimizer, experiment.optim.clip_norm)


def test_training_lowers_the_loss(settings: Settings, system: System) -> None:
    step = steps_of(system, settings("optim.lr=3e-3"))
    batch = batch_of([6000, 5000, 7000, 4000])

    def once() -> dict[str, float]:
        return train_epoch(system, step, iter([(batch, 0.0)]), CPU, list("abcd")).means()

    first = once()
    last = [once() for _ in range(15)][-1]
    assert last["loss_kl"] < 0.7 * first["loss_kl"]
    terms = ("kl", "focal", "center", "supcon")
    assert first["loss"] == pytest.approx(sum(first[f"weight_{t}"] * first[f"loss_{t}"] for t in terms), rel=1e-5)


def test_batches_of_an_epoch_add_up(settings: Settings) -> None:
    torch.manual_seed(0)
    still = ("optim.lr=1e-12", "optim.center_lr=1e-12", "model.encoder.dropout=0", "model.encoder.spec_augment=false")
    system = System(settings(*still), 7)
    step = steps_of(system, settings(*still))  # which does not move it: the losses are those of each batch alone
    batches = [batch_of([4000] * 3, seed=1), batch_of([5000] * 2, seed=2, index=1)]
    alone = [train_epoch(system, step, iter([(batch, 0.0)]), CPU, list("abc")).means() for batch in batches]
    both = train_epoch(system, step, zip(batches, (0.25, 0.5), strict=True), CPU, list("abc"))
    assert (both.batches, both.rows, both.waited_s) == (2, 5, 0.75) and both.train_s > 0
    for name, value in both.means().items():
        if "loss" in name or name == "grad_norm":
            assert value == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-3), name


def test_means_of_an_epoch_by_hand_and_after_a_break() -> None:
    terms = {"loss": 6.0, "kl": 3.0, "weight_kl": 1.5, "grad_norm": 9.0}
    sums = Sums({name: torch.tensor(total) for name, total in terms.items()}, 3, 40, waited_s=0.5, train_s=2.0)
    expected = {"loss": 2.0, "loss_kl": 1.0, "weight_kl": 0.5, "grad_norm": 3.0}
    expected |= {"train_s": 2.0, "utterances_per_s": 20.0, "data_wait_share": 0.25}
    assert sums.means() == expected
    assert Sums.of(json.loads(json.dumps(sums.notes())), CPU).means() == expected


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_loss_that_is_not_finite_stops_with_the_utterances_named(
    settings: Settings, system: System, after: int
) -> None:
    batch = batch_of([6000, 5000], index=4)
    batch.waveform[1, 100] = np.nan
    before = [parameter.clone() for parameter in system.parameters()]
    batches = iter([(it, 0.0) for it in (batch, *(batch_of([4000] * 2, index=5 + i) for i in range(after)))])
    with pytest.raises(TrainingError, match=r"epoch 1, batch 5: .*nan.* The batch holds first, second"):
        train_epoch(system, steps_of(system, settings()), batches, CPU, ["first", "second"])
    assert len(list(batches)) == max(0, after - 1)
    assert all(torch.equal(one, two) for one, two in zip(before, system.parameters(), strict=True))


@pytest.mark.parametrize("pool", ["flam", "mean", "max", "first"])
def test_an_output_does_not_depend_on_the_batch(settings: Settings, pool: str) -> None:
    torch.manual_seed(0)
    system = System(settings(f"model.pool.kind={pool}"), 7)
    lengths = [1600, 5000, 16_000, 9000, 3333, 12_001, *range(4000, 5000, 100)]
    batch = batch_of(lengths)
    together = score(system, iter([batch]), 7, CPU)
    for place, length in enumerate(lengths):
        alone = Batch(
            0, "dev", 0, batch.rows[place : place + 1], batch.waveform[place : place + 1, :length],
            batch.lengths[place : place + 1], batch.labels[place : place + 1], batch.targets[place : place + 1],
        )  # fmt: skip
        scores = score(system, iter([alone]), 7, CPU)
        np.testing.assert_allclose(scores.logits[0], together.logits[place], atol=1e-5)
        np.testing.assert_allclose(scores.embeddings[0], together.embeddings[place], atol=1e-5)


def test_scores_of_several_batches_keep_rows_together(system: System) -> None:
    def batches() -> Iterator[Batch]:
        for index in range(3):
            made = batch_of([3000 + 500 * index] * 2, seed=index)
            yield Batch(0, "dev", index, made.rows + 2 * index, made.waveform, made.lengths, made.labels, made.targets)
        yield Batch(
            0,
            "dev",
            3,
            np.zeros(0, np.int64),
            np.zeros((0, 0), np.float32),
            np.zeros(0),
            np.zeros(0, np.int64),
            np.zeros((0, 7)),
        )

    scores = score(system, batches(), 7, CPU).gathered()
    assert scores.rows.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1)
    assert (scores.probabilities.argmax(axis=1) == scores.predicted).all()


def test_dev_loss_is_cross_entropy() -> None:
    logits = np.array([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0]], np.float32)
    scores = Scores(np.arange(2), np.array([1, 2]), logits, np.zeros((2, 4), np.float32))
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor([1, 2]))
    assert scores.loss() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("off", ["kl", "focal", "center", "supcon"])
def test_any_loss_can_be_left_out(settings: Settings, off: str) -> None:
    torch.manual_seed(0)
    experiment = settings(f"losses.{off}=null")
    system = System(experiment, 7)
    row = train_epoch(
        system, steps_of(system, experiment), iter([(batch_of([4000, 5000]), 0.0)]), CPU, ["a", "b"]
    ).means()
    assert f"loss_{off}" not in row and np.isfinite(row["loss"])


def test_bf16_computes_losses_in_float32(settings: Settings) -> None:
    torch.manual_seed(0)
    plain, mixed = System(settings(), 7), System(settings("optim.precision=bf16"), 7)
    mixed.load_state_dict(plain.state_dict())
    batch = batch_of([6000, 5000, 7000, 4000])
    arguments = (
        torch.from_numpy(batch.waveform),
        torch.from_numpy(batch.lengths),
        torch.from_numpy(batch.targets),
    )
    one, two = plain.eval()(*arguments), mixed.eval()(*arguments)
    assert all(value.dtype == torch.float32 for value in two.values())
    assert float(two["loss"].detach()) == pytest.approx(float(one["loss"].detach()), rel=0.03)
    assert not torch.equal(two["loss"], one["loss"])


def test_a_batch_reaches_the_device_as_it_is() -> None:
    batch = batch_of([600, 500])
    batch.waveform.flags.writeable = False  # as Ray's memory is
    waveform, lengths, targets = to_device(batch, CPU)
    for tensor, values in ((waveform, batch.waveform), (lengths, batch.lengths), (targets, batch.targets)):
        assert tensor.dtype == torch.from_numpy(values.copy()).dtype
        np.testing.assert_array_equal(tensor.numpy(), values)
    assert not np.shares_memory(waveform.numpy(), batch.waveform)


def test_averaged_weights_follow_the_trained_ones_by_hand() -> None:
    held, trained = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    expected = held.weight.detach().double().numpy().copy()
    average = Average(held, trained, 0.9)
    for step in range(5):
        with torch.no_grad():
            trained.weight.copy_(torch.tensor([float(step), -1.0]))
            trained.get_buffer("num_batches_tracked").fill_(step)
        average.move()
        expected = 0.9 * expected + 0.1 * np.array([step, -1.0])
    np.testing.assert_allclose(held.weight.detach().numpy(), expected, rtol=1e-6)
    assert held.num_batches_tracked == 4  # counts are copied: an average of whole numbers is none


def test_the_rule_decides_which_epoch_is_the_result() -> None:
    history = [
        {"epoch": e, "dev_ua": ua, "dev_loss": loss}
        for e, (ua, loss) in enumerate([(0.5, 1.0), (0.7, 2.0), (0.6, 3.0)])
    ]
    chosen = {rule: int(np.argmax(selection_scores(rule, history))) for rule in ("dev_ua", "dev_loss", "last")}
    assert chosen == {"dev_ua": 1, "dev_loss": 0, "last": 2}


TIMED = ("train_s", "eval_s", "utterances_per_s", "data_wait_share")


def unfinished(settings: Settings, runs: Path, *more: str) -> tuple[FoldJob, FoldData]:
    """Fold 0 with dropout, masks and averaged weights."""
    words = ["fold=0", "optim.batch_size=8", "optim.average=0.9", f"tracking.runs={runs}"]
    run = Run.of(settings(*words, *more), Designs())
    run.open()
    ((job, data),) = run.unfinished
    return job, data


def trained(settings: Settings, runs: Path, leave: Callable[[], bool] = lambda: False) -> Path:
    """Train that fold in this process; its folder."""
    job, data = unfinished(settings, runs)
    assert train_fold(job, data, in_process, CPU, leave=leave) == []
    return Path(job.folder)


def contents(fold: Path) -> list[Any]:
    """What a fold's training gave, without what the clock decides."""
    history = [
        {key: value for key, value in row.items() if key not in TIMED}
        for row in json.loads((fold / "history.json").read_text())
    ]
    files = ["checkpoints/checkpoint_00001/model.safetensors", "checkpoints/checkpoint_00001/trained.safetensors"]
    return [history, *((fold / name).read_bytes() for name in [*files, "predictions.parquet"])]


def at(look: int) -> Callable[[], bool]:
    """Whether to leave: at that look, counted from 0."""
    looks = itertools.count()
    return lambda: next(looks) == look


@pytest.mark.parametrize(("look", "batches"), [(0, [4]), (1, [8]), (3, [14]), (4, [14, 4]), (6, [14, 12])])
def test_a_fold_that_is_left_within_an_epoch_goes_on_bit_for_bit(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: int, batches: list[int]
) -> None:
    monkeypatch.setattr(loop, "LOOK_EVERY", 4)  # of 14 batches: the fourth look is that at the end of the epoch
    left = trained(settings, tmp_path / "left", at(look))
    assert not (left / "result.json").exists()
    saved = [json.loads(path.read_text()) for path in sorted(left.glob("checkpoints/*/checkpoint.json"))]
    assert [notes.get("begun", {}).get("batches", 14) for notes in saved] == batches
    assert contents(trained(settings, tmp_path / "left")) == contents(trained(settings, tmp_path / "calm"))


def save_wavlm(folder: Path, seed: int) -> Path:
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(seed)
    tiny = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    WavLMModel(tiny).save_pretrained(folder)
    return folder


def test_folds_of_a_run_begin_with_the_same_weights_of_the_encoder(settings: Settings, tmp_path: Path) -> None:
    wavlm = save_wavlm(tmp_path / "wavlm", seed=0)
    words = ["model.encoder.kind=pretrained", f"model.encoder.name={wavlm}", "model.pool.heads=2"]
    (tmp_path / "folds.yaml").write_text("[{test: ['03'], dev: ['08']}, {test: ['09'], dev: ['10']}]")
    words += [f"protocol.folds={tmp_path / 'folds.yaml'}", "optim.epochs=2", f"tracking.runs={tmp_path / 'runs'}"]
    run = Run.of(settings(*words), Designs())
    run.open()
    (first, data), (second, others) = run.unfinished
    train_fold(first, data, in_process, CPU)
    encoder = json.loads((Path(first.folder) / "result.json").read_text())["encoder"]
    assert encoder == PretrainedEncoder(config.Pretrained(name=str(wavlm))).fingerprint

    save_wavlm(wavlm, seed=1)
    with pytest.raises(
        TrainingError, match=rf"fold-0/result\.json: began with other weights of {wavlm} .*{encoder[:12]}"
    ):
        train_fold(second, others, in_process, CPU)
    assert not list(Path(second.folder).glob("checkpoints/*"))
    save_wavlm(wavlm, seed=0)
    train_fold(second, others, in_process, CPU, leave=lambda: True)  # after the first epoch
    assert len(second.history()) == 1 and not second.finished
    shutil.rmtree(first.folder)
    save_wavlm(wavlm, seed=1)
    with pytest.raises(TrainingError, match=r"checkpoint_00000: began with other weights"):
        train_fold(second, others, in_process, CPU)


def test_the_time_of_a_fold_is_that_of_all_attempts(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 1000.0)  # an attempt takes thousands of seconds, by its clock
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(loop, "LOOK_EVERY", 4)
    fold = trained(settings, tmp_path / "left", leave=at(1))  # within the first epoch
    (kept,) = (fold / "checkpoints").glob("*/checkpoint.json")
    before_s = json.loads(kept.read_text())["wall_s"]
    assert before_s >= 1000
    trained(settings, tmp_path / "left")
    assert json.loads((fold / "result.json").read_text())["wall_s"] >= before_s + 1000


def test_what_workers_hold_is_told_with_every_epoch(settings: Settings, tmp_path: Path) -> None:
    for row in json.loads((trained(settings, tmp_path) / "history.json").read_text()):
        held = [row[name] for name in ("workers", "device", "cpus_per_worker", "gpus_per_worker")]
        assert held == [1, "cpu", 1.0, 0.0]
    resources = config.Resources(cpus_per_worker=2)
    on_gpu = {"device": "cuda", "cpus_per_worker": 2.0, "gpus_per_worker": 1.0}
    assert loop.held_by_worker(resources, torch.device("cuda")) == on_gpu
    shared = config.Resources(gpus_per_worker=0.25)
    assert loop.held_by_worker(shared, torch.device("cuda"))["gpus_per_worker"] == 0.25


def test_a_damaged_checkpoint_within_an_epoch_costs_that_epoch_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_EVERY", 4)
    left = trained(settings, tmp_path / "left", at(5))
    (left / "checkpoints" / "checkpoint_00001" / "random.safetensors").write_bytes(b"cut off")
    job, data = unfinished(settings, tmp_path / "left")
    (fault,) = train_fold(job, data, in_process, CPU)
    assert "random.safetensors: truncated or changed" in fault
    assert contents(left) == contents(trained(settings, tmp_path / "calm"))


def several(rank: int, folder: str, job: FoldJob, data: FoldData, looks: int, hidden: bool) -> None:
    """One of two processes that train a fold, and leave it at a look; `hidden`: the second sees an older checkpoint."""
    from sermll.group import _leave  # loads Ray, which other tests here do without

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{looks}-{hidden}", rank=rank, world_size=2)
    loop.LOOK_EVERY, checkpoint.SETTLE_S = 4, 0.0
    opened = checkpoint.Checkpoint.open

    def older(path: Path) -> checkpoint.Checkpoint:
        return opened(path.with_name("checkpoint_00000"))

    if hidden and rank == 1:
        checkpoint.Checkpoint.open = older
    said = ""
    try:
        train_fold(job, data, in_process, CPU, rank, 2, leave=at(looks))
    except StorageError as error:
        said = str(error)
    Path(folder, f"said-{rank}.txt").write_text(said)
    _leave()


@pytest.mark.ray  # several processes take their time
def test_two_processes_leave_and_go_on_from_what_the_first_has_chosen(settings: Settings, tmp_path: Path) -> None:
    def run(name: str, looks: int = -1, hidden: bool = False) -> Path:
        job, data = unfinished(settings, tmp_path / name)
        multiprocessing.spawn(several, (str(tmp_path), job, data, looks, hidden), nprocs=2)  # type: ignore[attr-defined]
        return Path(job.folder)

    left = run("left", 4)  # within the second epoch
    assert sorted(path.name for path in left.glob("checkpoints/*")) == ["checkpoint_00000", "checkpoint_00001"]
    assert run("left", hidden=True) == left
    said = [(tmp_path / f"said-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "does not see the checkpoint that the first worker goes on from" in said[0]
    assert not (left / "result.json").exists()
    assert contents(run("left")) == contents(run("calm"))


def one_without_the_encoder(rank: int, folder: str, job: FoldJob, data: FoldData) -> None:
    """One of two processes that train a fold; the second does not have the encoder's folder."""
    from sermll.group import _leave

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    if rank == 1:
        job.settings["model"]["encoder"]["name"] = f"{folder}/elsewhere"
    try:
        train_fold(job, data, in_process, CPU, rank, 2)
    except ConfigError as error:
        Path(folder, f"said-{rank}.txt").write_text(str(error))
    _leave()


@pytest.mark.ray
def test_an_encoder_that_one_machine_lacks_is_named_by_all_workers_at_once(settings: Settings, tmp_path: Path) -> None:
    words = ["kind=pretrained", f"name={save_wavlm(tmp_path / 'wavlm', seed=0)}"]
    job, data = unfinished(settings, tmp_path, "model.pool.heads=2", *(f"model.encoder.{word}" for word in words))
    multiprocessing.spawn(one_without_the_encoder, (str(tmp_path), job, data), nprocs=2)  # type: ignore[attr-defined]
    said = [(tmp_path / f"said-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and str(tmp_path / "elsewhere") in said[0]


def test_a_disk_that_is_full_is_named_and_nothing_is_lost(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # torch's words

    left = trained(settings, tmp_path / "left", at(0))
    assert len(json.loads((left / "history.json").read_text())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(StorageError, match=r"partial_00001_\w+: .*enforce fail.*; make room"):
            trained(settings, tmp_path / "left")
    assert contents(trained(settings, tmp_path / "left")) == contents(trained(settings, tmp_path / "calm"))
    assert not list(left.glob("checkpoints/partial_*"))
