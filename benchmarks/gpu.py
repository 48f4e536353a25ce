"""Fine-tuning WavLM-Large on one GPU beside Hugging Face's plain loop and SpeechBrain's, and what it leaves unused.

    python benchmarks/gpu.py            # writes benchmarks/results/<date>-<gpu>.json and its Markdown twin
    python benchmarks/gpu.py --tiny     # everything on a model of toy size, on the CPU too, to see that it runs

About five minutes on an H100. All ways fine-tune the same random weights of WavLM-Large's shape, with the convolutions
frozen, on 16 utterances of 6.25 s: forward, loss, backward, clipping, optimizer. Ours trains FLAM and all four losses
besides. The peers' layer drop is off, as ours is, so that all do the same work; their SpecAugment is on, as published.
In bf16 they run under the same autocast. The steps need torch, transformers and what sermll's model imports, neither
Ray nor MLflow; only the row about waiting for data needs Ray, and says so where there is none.

Model FLOP/s utilisation (MFU) is the multiplications and additions in a second that the model needs, 3 x forward where
it is trained (once forward, twice backward), 1 x forward where it is frozen, over what the GPU's data sheet gives for
dense bf16. Forward, for every frame of every layer: 2 (4 d^2 + 2 d f) + 4 T d, of d dimensions, f of the feed-forward
part, T frames; the convolutions' products beside. Recomputation, norms, softmax and losses count nothing.
"""

import argparse
import gc
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import losses
import torch
from side_by_side import (
    Row,
    Target,
    compared,
    in_turns,
    missing,
    optional,
    other_load,
    remarks,
    say,
    table,
    write,
)
from torch import nn
from torch.nn import functional
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForSequenceClassification, WavLMModel
from transformers.utils import logging

from sermll.config import Experiment
from sermll.model import System

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.0,
    "num_labels": 4,
}
TOY = LARGE | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}
"""Dense bf16 by data sheet; the first name that the GPU's contains."""
CLASSES, RATE_HZ = 4, 16_000
Step = Callable[[], Any]


class Setting:
    """Device, shapes, and the batch that all ways are given."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = WavLMConfig(**(TOY if tiny else LARGE))
        self.batch, samples = (4, RATE_HZ) if tiny else (16, int(6.25 * RATE_HZ))
        self.rounds, self.steps = (2, 1) if tiny else (5, 6)
        generator = torch.Generator().manual_seed(0)
        self.waveform = 0.1 * torch.randn(self.batch, samples, generator=generator)
        self.labels = torch.arange(self.batch) % CLASSES
        if self.device.type == "cuda":  # as it comes from a loader that pins its memory
            self.waveform = self.waveform.pin_memory()

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveform and labels, brought to the device."""
        return self.waveform.to(self.device, non_blocking=True), self.labels.to(self.device, non_blocking=True)

    def settle(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def finish(parameters: list[nn.Parameter], loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward, clip, update."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()


def ours(setting: Setting, folder: Path, precision: str = "bf16", checkpointing: bool = False) -> Step:
    """The system with all losses, and the loop's optimizer, clipping and check of the gradient."""
    experiment = Experiment.model_validate(
        {
            "name": "bench",
            "data": {"path": "none"},
            "model": {
                "encoder": {"kind": "pretrained", "name": str(folder), "gradient_checkpointing": checkpointing},
                "pool": {"heads": 2 if setting.tiny else 16},
            },
            "optim": {"precision": precision, "batch_size": setting.batch},
        }
    )
    system = System(experiment, CLASSES).to(setting.device)
    parameters = [parameter for parameter in system.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    lengths = torch.full((setting.batch,), setting.waveform.shape[1])

    def step() -> None:
        waveform, labels = setting.inputs()
        target = functional.one_hot(labels, CLASSES).float()
        loss = system(waveform, lengths.to(setting.device), target)["loss"]
        finish(parameters, loss, optimizer)
        assert torch.isfinite(loss)

    return step


def hugging_face(setting: Setting, folder: Path, precision: str) -> Step:
    """The loop of the library's examples: model with a classification head, cross-entropy, AdamW."""
    model: Any = WavLMForSequenceClassification.from_pretrained(folder, num_labels=CLASSES, dtype=torch.float32)
    model.freeze_feature_encoder()
    model = model.to(setting.device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        waveform, labels = setting.inputs()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(waveform, labels=labels).loss
        finish(parameters, loss, optimizer)

    return step


def speechbrain(setting: Setting, folder: Path, precision: str) -> Step:
    """The parts of its recipe for emotion recognition: encoder, mean over time, a linear layer, Adam for both."""
    module = optional("speechbrain.integrations.huggingface.wavlm")
    encoder = module.WavLM(
        source=str(folder), save_path=str(folder / "saved"), freeze=False, freeze_feature_extractor=True
    ).to(setting.device)
    head = nn.Linear(setting.config.hidden_size, CLASSES).to(setting.device)
    parameters = [it for part in (encoder, head) for it in part.parameters() if it.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-5)
    shares = torch.ones(setting.batch, device=setting.device)

    def step() -> None:
        waveform, labels = setting.inputs()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = head(encoder(waveform, shares).mean(dim=1))
        finish(parameters, functional.cross_entropy(logits.float(), labels), optimizer)

    return step


def flops(config: WavLMConfig, batch: int, samples: int) -> float:
    """Of one training step, as told at the top."""
    frames, width, fixed = samples, 1, 0.0
    for dim, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        fixed += 2 * kernel * width * dim * frames
        width = dim
    d, f = config.hidden_size, config.intermediate_size
    per_frame = config.num_hidden_layers * (2 * (4 * d * d + 2 * d * f) + 4 * frames * d)
    per_frame += 2 * width * d + 2 * config.num_conv_pos_embeddings * d * d / config.num_conv_pos_embedding_groups
    return batch * (fixed + 3 * frames * per_frame)


def peak_flops() -> tuple[float, str] | None:
    """FLOP/s of the GPU's data sheet and the name it was found by; None without one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    found = next((key for key in PEAK_TFLOPS if all(re.search(word, name) for word in key.split())), None)
    return (1e12 * PEAK_TFLOPS[found], found) if found else None


def peak_gb(make: Callable[[], Step]) -> float | None:
    """GPU memory that a way takes at most, model and all; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    found = (torch.cuda.max_memory_allocated() - before) / 1e9
    del step
    gc.collect()
    torch.cuda.empty_cache()
    return found


def steps(setting: Setting, folder: Path) -> Iterator[Row]:
    """Utterances a second, memory, MFU."""
    made: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(setting, folder),
        "ours, fp32": lambda: ours(setting, folder, precision="fp32"),
        "ours, checkpointing": lambda: ours(setting, folder, checkpointing=True),
        "Hugging Face, bf16": lambda: hugging_face(setting, folder, "bf16"),
        "Hugging Face, fp32": lambda: hugging_face(setting, folder, "fp32"),
    }
    absent = ""
    if optional("speechbrain.integrations.huggingface.wavlm"):
        made["SpeechBrain, bf16"] = lambda: speechbrain(setting, folder, "bf16")
    else:
        absent = f"SpeechBrain's recipe was {missing('speechbrain')}"
    memory = {name: peak_gb(make) for name, make in made.items()}

    def rate(step: Step) -> Callable[[], float]:
        def measure() -> float:
            setting.settle()
            began = time.perf_counter()
            for _ in range(setting.steps):
                step()
            setting.settle()
            return setting.steps * setting.batch / (time.perf_counter() - began)

        return measure

    found = in_turns({name: rate(make()) for name, make in made.items()}, setting.rounds, warm_up=2)
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    leaner = max((name for name in middle if not name.startswith("ours")), key=lambda name: middle[name])
    model, samples = setting.config, setting.waveform.shape[1]
    achieved = {name: rate * flops(model, setting.batch, samples) / setting.batch for name, rate in middle.items()}
    peak = peak_flops()

    def mfu(name: str) -> str:
        if peak is None:
            return f"{achieved[name] / 1e12:.3g} TFLOP/s; no data sheet to compare it with."
        share = achieved[name] / peak[0]
        return f"MFU {100 * share:.1f} % ({achieved[name] / 1e12:.0f} of {peak[0] / 1e12:.0f} TFLOP/s, {peak[1]})."

    about: dict[str, Any] = {"unit": "utterances/s"}
    yield replace(
        compared(
            found,
            "ours",
            leaner,
            "ours / peer",
            name="fine-tuning WavLM-Large, 16 x 6.25 s",
            against=f"{leaner}, the faster of the peers",
            target=Target(">=", 1.5),
            **about,
        ),
        limit=mfu("ours"),
        note=absent,
    )
    for name in made:
        if name not in ("ours", leaner):
            told = f"fine-tuning, ours beside {name}"
            row = compared(found, "ours", name, "ours / peer", name=told, against=name, **about)
            yield replace(row, limit=mfu(name))
    for name, target in (("ours", Target("<=", 24, of="ours")), ("ours, checkpointing", None)):
        mine, theirs = memory[name], memory[leaner]
        yield Row(
            name=f"fine-tuning, GPU memory: {name}",
            unit="GB",
            against=leaner,
            ours=mine,
            peer=theirs,
            ratio=mine / theirs if mine and theirs else None,
            ratio_is="ours / peer",
            target=target,
            note="" if mine else "not measured: no GPU",
        )


def supcon(setting: Setting) -> Iterator[Row]:
    """The contrastive loss on the GPU: time and memory, forward and backward."""
    for count in (320, 640) if setting.tiny else (5008, 20_000):
        batch = losses.batch(count, device=setting.device.type)

        def seconds(way: losses.Step, batch: Any = batch) -> Callable[[], float]:
            def measure() -> float:
                setting.settle()
                began = time.perf_counter()
                for _ in range(5):
                    losses.step(way, *batch)
                setting.settle()
                return (time.perf_counter() - began) / 5

            return measure

        ways = losses.ways()
        memory = {name: peak_gb(partial(partial, losses.step, way, *batch)) for name, way in ways.items()}
        found = in_turns({name: seconds(way) for name, way in ways.items()}, setting.rounds, warm_up=1)
        for name in ways:
            if name == losses.OURS:
                continue
            target = Target(">=", 1) if count < 20_000 else None
            told = f"SupCon on the GPU, {count} frames, beside {name}"
            yield compared(found, losses.OURS, name, scale=1000, name=told, unit="ms", against=name, target=target)
            mine, theirs = memory[losses.OURS], memory[name]
            if mine and theirs:
                yield Row(
                    name=f"{told}, memory", unit="GB", against=name, ours=mine, peer=theirs, ratio=mine / theirs,
                    ratio_is="ours / peer", target=Target("<=", 0.2) if count == 20_000 else None,
                )  # fmt: skip


def ingest(setting: Setting, folder: Path) -> Iterator[Row]:
    """How long the training step waits for Ray Data's batches."""
    about: dict[str, Any] = {
        "name": "ingest, waiting for data while WavLM-Large is fine-tuned",
        "unit": "% of step time",
        "against": "no waiting",
        "target": Target("<=", 2, of="ours"),
    }
    if optional("ray") is None:
        yield Row(**about, note="not measured: Ray is not installed")
        return
    from noise import recordings, write_fold

    from sermll.cluster import QUIET, connected
    from sermll.feed import Feed, stream
    from sermll.loop import to_device

    os.environ.update(QUIET)
    experiment = Experiment.model_validate(
        {
            "name": "bench",
            "data": {"path": "none", "crop_s": 1.0 if setting.tiny else 6.25},
            "model": {
                "encoder": {"kind": "pretrained", "name": str(folder)},
                "pool": {"heads": 2 if setting.tiny else 16},
            },
            "optim": {"precision": "bf16", "batch_size": setting.batch},
        }
    )
    system = System(experiment, CLASSES).to(setting.device)
    parameters = [parameter for parameter in system.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    fold = write_fold(folder / "shards", recordings(100 if setting.tiny else 1602))
    waited, began, counted = 0.0, 0.0, 0
    with connected():
        batches = stream(Feed.for_run("gpu", experiment, fold), 0, 2)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            if counted:
                waited += time.perf_counter() - asked
            if batch.split != "train":
                continue
            finish(parameters, system(*to_device(batch, setting.device))["loss"], optimizer)
            setting.settle()  # a wait is one of the GPU's, not of a queue of kernels
            counted += 1
            if counted == 1:
                began = time.perf_counter()
    share = 100 * waited / (time.perf_counter() - began)
    yield Row(**about, ours=share, note=f"{counted} steps of two epochs, after the first one.")


def rows(setting: Setting) -> Iterator[Row]:
    """Steps, losses, data."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        torch.manual_seed(0)
        WavLMModel(setting.config).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
        yield from steps(setting, folder)
        yield from supcon(setting)
        yield from ingest(setting, folder)


def main() -> None:
    """Measure and write, or only show that everything runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on the CPU if need be; nothing is written")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --tiny shows on a CPU that everything runs")
    load, began = other_load(), time.monotonic()
    found = list(rows(Setting(arguments.tiny)))
    say(table(found))
    say(remarks(found))
    if not arguments.tiny:
        slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        say(f"written: {write(found, slug, 'make bench-gpu', time.monotonic() - began, load)}")


if __name__ == "__main__":
    main()
