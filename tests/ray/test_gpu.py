"""On a GPU: the numbers are a CPU's, a fold that is left goes on where it was, workers and folds share a GPU."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared import in_process
from transformers import WavLMConfig, WavLMModel

from sermll import loop
from sermll.config import Experiment, Losses, Pretrained
from sermll.loop import train_fold
from sermll.losses import Objective
from sermll.model import System
from sermll.optimizer import Step, make_optimizer
from sermll.pretrained import PretrainedEncoder
from sermll.train import Designs, Run, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
Settings = Callable[..., Experiment]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TIMED = ("train_s", "eval_s", "utterances_per_s", "data_wait_share")
QUIET = ("model.encoder.dropout=0", "model.encoder.spec_augment=false", "fold=3", "protocol.dev_speakers=2")
"""Dropout and masks are drawn by the device, each worker its own."""
TERMS = ("loss", "loss_kl", "loss_focal", "loss_center", "loss_supcon", "grad_norm", "dev_loss")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, which torch computes in TF32 (10 bits) on a GPU otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def history(fold: Path) -> list[dict[str, Any]]:
    return json.loads((fold / "history.json").read_text())


def close(ones: list[dict[str, Any]], others: list[dict[str, Any]], rel: float) -> None:
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert {name: other[name] for name in TERMS} == pytest.approx({name: one[name] for name in TERMS}, rel=rel)


def save_wavlm(folder: Path) -> Path:
    """Random weights; frames of 32 dimensions, four heads, convolutions normed as in WavLM-Large."""
    torch.manual_seed(0)
    tiny = WavLMConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    WavLMModel(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lengths", [(16_000, 16_000), (16_000, 9_001, 400)], ids=["whole", "padded"])
def test_wavlms_frames_and_gradients_are_a_cpus(exact: None, tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """To 1e-3 of the largest: fused attention adds in another order."""
    config = Pretrained(name=str(save_wavlm(tmp_path / "wavlm")))
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
    found: list[dict[str, torch.Tensor]] = []
    for device in (CPU, GPU):
        encoder = PretrainedEncoder(config).eval().to(device)
        heard = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        frames, _ = encoder((waveform * heard).to(device), torch.tensor(lengths, device=device))
        frames.pow(3).mean().backward()
        gradients = {name: it.grad.cpu() for name, it in encoder.named_parameters() if it.grad is not None}
        found.append({"frames": frames.detach().cpu(), **gradients})
    on_cpu, on_gpu = found
    assert on_cpu.keys() == on_gpu.keys() and any("rel_attn_embed" in name for name in on_gpu)
    for name, wanted in on_cpu.items():
        if "k_proj.bias" in name:  # which softmax cancels: what it gets is rounding
            continue
        torch.testing.assert_close(on_gpu[name], wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()), msg=name)


def test_layers_that_are_computed_again_drop_the_same_values(exact: None, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        config = Pretrained(name=str(save_wavlm(tmp_path / "wavlm")), gradient_checkpointing=checkpointing)
        encoder = PretrainedEncoder(config).to(GPU)
        torch.manual_seed(0)
        waveform = 0.1 * torch.randn(2, 16_000, device=GPU)
        frames, _ = encoder(waveform, torch.full((2,), 16_000, device=GPU))
        frames.pow(3).mean().backward()
        found.append({name: it.grad for name, it in encoder.named_parameters() if it.grad is not None})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()), msg=name)


def test_losses_and_their_gradients_are_a_cpus() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"logits": (6, 4), "embedding": (6, 8), "frames": (6, 50, 8)}
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    mask = torch.arange(50) < torch.tensor([50, 40, 1, 50, 7, 30])[:, None]
    target = torch.softmax(3 * torch.randn(6, 4, generator=generator), dim=1)
    found = []
    for device in (CPU, GPU):
        torch.manual_seed(0)
        objective = Objective(Losses(), 4, 8).to(device)
        inputs = [it.clone().to(device).requires_grad_() for it in drawn.values()]
        terms = objective(*inputs, mask.to(device), target.to(device))
        terms["loss"].backward()
        gradients = [it.grad for it in inputs]
        assert all(it is not None for it in gradients)
        found.append([*(it.detach().cpu() for it in terms.values()), *(it.cpu() for it in gradients if it is not None)])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing(settings: Settings) -> None:
    torch.manual_seed(0)
    system = System(settings(), 7).to(GPU)
    optimizer = make_optimizer(system, settings().optim)

    def step(poison: float | None) -> Step:
        for parameter in system.parameters():
            parameter.grad = torch.randn_like(parameter)
        if poison is not None:
            gradient = next(system.parameters()).grad
            assert gradient is not None
            gradient[(0,) * gradient.dim()] = poison
        return Step(optimizer, 5.0)

    assert step(None).taken()
    weights, state = copy.deepcopy(system.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert not step(torch.nan).taken()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in system.state_dict().items())
    for key, held in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state["state"][key][name]) for name, tensor in held.items()), key
    assert step(None).taken()
    assert not all(torch.equal(tensor, weights[name]) for name, tensor in system.state_dict().items())


def trained(
    settings: Settings, runs: Path, device: torch.device, *words: str, leave: Callable[[], bool] = lambda: False
) -> Path:
    """Train a fold in this process; its folder."""
    run = Run.of(settings(f"tracking.runs={runs}", *words), Designs())
    run.open()
    ((job, data),) = run.unfinished
    assert train_fold(job, data, in_process, device, leave=leave) == []
    return Path(job.folder)


def test_a_fold_trains_as_on_a_cpu(exact: None, settings: Settings, tmp_path: Path) -> None:
    on_cpu = history(trained(settings, tmp_path / "cpu", CPU, *QUIET))
    on_gpu = history(trained(settings, tmp_path / "gpu", GPU, *QUIET))
    assert {row["device"] for row in on_gpu} == {"cuda"}
    close(on_cpu, on_gpu, rel=2e-3)


def test_a_fold_that_is_left_within_an_epoch_goes_on(
    exact: None, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is drawn on the GPU: other draws would change the loss by per cents."""
    monkeypatch.setattr(loop, "LOOK_EVERY", 4)
    looks = itertools.count()
    words = ("fold=0", "optim.average=0.9", "model.encoder.dropout=0.5")
    left = trained(settings, tmp_path / "left", GPU, *words, leave=lambda: next(looks) == 1)
    assert not (left / "result.json").exists()
    again = trained(settings, tmp_path / "left", GPU, *words)
    close(history(trained(settings, tmp_path / "calm", GPU, *words)), history(again), rel=1e-4)
    other = trained(settings, tmp_path / "other", GPU, *words, "seed=1")
    with pytest.raises(AssertionError):
        close(history(again), history(other), rel=1e-3)


@pytest.mark.ray
def test_ray_train_uses_the_gpu_and_two_workers_share_it(ray_cluster: None, settings: Settings, tmp_path: Path) -> None:
    rows = []
    for workers, gpus in ((1, "auto"), (2, 0.5)):
        shared = (f"resources.workers={workers}", f"resources.gpus_per_worker={gpus}")
        outcome = train(settings(*QUIET, *shared, f"tracking.runs={tmp_path / str(workers)}"))
        rows.append(history(outcome.run_dir / "fold-3"))
        assert {(row["device"], row["workers"], row["gpus_per_worker"]) for row in rows[-1]} == {
            ("cuda", workers, 1.0 if gpus == "auto" else gpus)
        }
    close(*rows, rel=5e-3)  # in TF32, in which another size of batch is another sum


@pytest.mark.ray
def test_wavlm_is_fine_tuned_in_bf16_by_folds_that_share_the_gpu(
    ray_cluster: None, settings: Settings, tmp_path: Path
) -> None:
    encoder = ("model.encoder.kind=pretrained", f"model.encoder.name={save_wavlm(tmp_path / 'wavlm')}")
    (tmp_path / "folds.yaml").write_text("[{test: ['03'], dev: ['08']}, {test: ['09'], dev: ['10']}]")
    words = ("resources.gpus_per_worker=0.5", "optim.precision=bf16", "optim.epochs=1")
    outcome = train(settings(*encoder, *words, f"protocol.folds={tmp_path / 'folds.yaml'}"))
    folds = sorted(outcome.run_dir.glob("fold-*"))
    assert len(folds) == 2
    for fold in folds:
        (row,) = history(fold)
        assert row["device"] == "cuda" and np.isfinite(row["loss"])
