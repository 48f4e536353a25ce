"""Fine-tuning WavLM-Large on one GPU beside Hugging Face's plain loop and SpeechBrain's, and what it leaves unused.

    python benchmarks/gpu.py            # writes benchmarks/results/<date>-<gpu>.json and its Markdown twin
    python benchmarks/gpu.py --tiny     # everything on a model of toy size, on the CPU too, to see that it runs

About five minutes on an H100. All ways fine-tune the same random weights of WavLM-Large's shape, with the convolutions
frozen, on 16 utterances of 6.25 s: forward, loss, backward, clipping, a fused optimizer. Ours trains FLAM and all four
losses besides. The peers' layer drop and SpecAugment are off, as ours are, so that all do the same work, under the same
bf16 autocast; float32 is left out, in which an H100, by its data sheet, would need 0.15 s for a step's products alone.
Before anything is timed, our frames and gradients are compared with transformers' own.

torch and transformers are all that is needed; only the rows about waiting for data and the way to the first step need
sermll's other packages, and say so where Ray is missing. Rows are told as they come. What fails leaves a row that says
why, and exit status 1.

Batches have as many lengths as the plan has, so that both are timed once more at lengths that change from step to step.
The result file is written anew with every row: what was measured is not lost if the rest is.

Model FLOP/s utilisation (MFU) is the multiplications and additions in a second that the model needs, 3 x forward where
it is trained (once forward, twice backward), 1 x forward where it is frozen, over what the GPU's data sheet gives for
dense bf16. Forward, for every frame of every layer: 2 (4 d^2 + 2 d f) + 4 T d, of d dimensions, f of the feed-forward
part, T frames; the convolutions' products beside. Recomputation, norms, softmax and losses count nothing.
"""

import argparse
import gc
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import losses
import torch
from side_by_side import (
    Row,
    Target,
    as_far_as_it_goes,
    compared,
    failure,
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

from sermll.model import System
from sermll.optimizer import Step, make_optimizer
from sermll.pretrained import PretrainedEncoder

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
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
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "4090": 165,
}
"""Dense bf16 by data sheet, by words of the GPU's name; the first whose words are all there."""
CLASSES, RATE_HZ = 4, 16_000
FITS_GB = 24
Way = Callable[[], Any]
"""Takes one training step."""


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


def settings(folder: Path, tiny: bool, checkpointing: bool = False) -> Any:
    """Those of an experiment that the model and the optimizer read, without the packages that check an experiment."""
    return SimpleNamespace(
        model=SimpleNamespace(
            encoder=SimpleNamespace(
                kind="pretrained",
                name=str(folder),
                tune="transformer",
                layer="last",
                gradient_checkpointing=checkpointing,
            ),
            pool=SimpleNamespace(kind="flam", heads=2 if tiny else 16),
            embedding_dim=64,
        ),
        losses=SimpleNamespace(
            kl=SimpleNamespace(weight="auto"),
            focal=SimpleNamespace(weight="auto", gamma=2.0),
            center=SimpleNamespace(weight=0.002),
            supcon=SimpleNamespace(weight="auto", temperature=0.1, normalize=True, projection="shared"),
            gather=True,
        ),
        optim=SimpleNamespace(lr=1e-5, center_lr=5e-3, weight_decay=0.0, clip_norm=5.0, precision="bf16"),
    )


def ours(setting: Setting, folder: Path, checkpointing: bool = False) -> Way:
    """The system with all losses, and a step as in the loop: non-finite ones are skipped, and read of a batch later."""
    told = settings(folder, setting.tiny, checkpointing)
    system = System(told, CLASSES).to(setting.device).train()
    optimizer = make_optimizer(system, told.optim)
    targets = functional.one_hot(setting.labels, CLASSES).float()
    unread: list[Step] = []

    def step() -> None:
        waveform, _ = setting.inputs()
        lengths = torch.full((setting.batch,), waveform.shape[1])
        batch = (it.to(setting.device, non_blocking=True) for it in (lengths, targets))
        loss = system(waveform, *batch)["loss"]
        loss.backward()
        assert not unread or unread.pop().taken()
        unread.append(Step(optimizer, told.optim.clip_norm))

    return step


def hugging_face(setting: Setting, folder: Path) -> Way:
    """The loop of the library's examples: model with a classification head, cross-entropy, fused AdamW."""
    model: Any = WavLMForSequenceClassification.from_pretrained(folder, num_labels=CLASSES, dtype=torch.float32)
    model.freeze_feature_encoder()
    model = model.to(setting.device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        waveform, labels = setting.inputs()
        with torch.autocast(setting.device.type, torch.bfloat16):
            loss = model(waveform, labels=labels).loss
        finish(parameters, loss, optimizer)

    return step


def speechbrain(setting: Setting, folder: Path) -> Way:
    """The parts of its recipe for emotion recognition: encoder, mean over time, a linear layer, Adam for both."""
    module = optional("speechbrain.integrations.huggingface.wavlm")
    encoder = module.WavLM(
        source=str(folder), save_path=str(folder / "saved"), freeze=False, freeze_feature_extractor=True
    ).to(setting.device)
    head = nn.Linear(setting.config.hidden_size, CLASSES).to(setting.device)
    parameters = [it for part in (encoder, head) for it in part.parameters() if it.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-5, fused=True)
    shares = torch.ones(setting.batch, device=setting.device)

    def step() -> None:
        waveform, labels = setting.inputs()
        with torch.autocast(setting.device.type, torch.bfloat16):
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
    found = next((key for key in PEAK_TFLOPS if set(key.split()) <= set(re.split(r"[\s-]", name))), None)
    return (1e12 * PEAK_TFLOPS[found], found) if found else None


def peak_gb(make: Callable[[], Way], most_gb: float | None = None) -> float | None:
    """GPU memory that a way takes at most, model and all; None without a GPU.

    What its tensors take; or, within `most_gb`, what it has of the device, CUDA's own part too, and torch may have no
    more: where that does not do, it runs out of memory.
    """
    if not torch.cuda.is_available():
        return begun(make)[1]
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    try:
        if most_gb is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (1e9 * most_gb - outside) / total))
        step, found = begun(make)
        del step
        reserved = torch.cuda.max_memory_reserved()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()
    return found if most_gb is None else (reserved + outside) / 1e9


def begun(make: Callable[[], Way]) -> tuple[Way, float | None]:
    """A way that has taken its first steps, and the GPU memory that its tensors took at most; None without a GPU."""
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = make()
    for _ in range(3 if on_gpu else 2):
        step()
    if not on_gpu:
        return step, None
    torch.cuda.synchronize()
    return step, (torch.cuda.max_memory_allocated() - before) / 1e9


def sameness(setting: Setting, folder: Path) -> Iterator[Row]:
    """Our frames and gradients beside those of transformers' model, in float32 and in bf16."""
    torch.backends.cudnn.allow_tf32 = False  # else theirs are convolved in 10 bits; all that is timed is in bf16
    waveform, lengths = setting.waveform[:4].to(setting.device), torch.full((4,), setting.waveform.shape[1])
    lengths = lengths.to(setting.device)
    mean, variance = waveform.mean(1, keepdim=True), waveform.var(1, correction=0, keepdim=True)
    normed = (waveform - mean) / (variance + 1e-7).sqrt()
    theirs = WavLMModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = theirs.to(setting.device).eval()  # pyright: ignore[reportArgumentType]
    encoder = PretrainedEncoder(settings(folder, setting.tiny).model.encoder).to(setting.device).eval()

    def ran(layers: nn.ModuleList, way: Callable[[], torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
        layers.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=precision == "bf16"):
            frames = way().float()
        frames.pow(3).mean().backward()  # squares of normed frames have no gradient but rounding
        found = {name: it.grad for name, it in layers.named_parameters() if re.search("rel_attn_embed|gru_rel", name)}
        lost = [name for name, gradient in found.items() if gradient is None]
        assert not lost, f"no gradient for {lost}"
        return {"frames": frames.detach()} | {name: it.float().clone() for name, it in found.items() if it is not None}

    def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], gradients: bool) -> float:
        """The largest difference, as a share of what is largest in the tensor."""
        names = [name for name in two if (name != "frames") == gradients]
        return max(float((one[name] - two[name]).abs().max() / two[name].abs().max()) for name in names)

    mine, own = encoder.backbone.layers, theirs.encoder.layers
    exact = ran(own, lambda: theirs(normed).last_hidden_state, "fp32")
    found = {
        "ours, fp32": ran(mine, lambda: encoder(waveform, lengths)[0], "fp32"),
        "ours, bf16": ran(mine, lambda: encoder(waveform, lengths)[0], "bf16"),
        "theirs, bf16": ran(own, lambda: theirs(normed).last_hidden_state, "bf16"),
    }
    for gradients, what in ((False, "frames"), (True, "gradients of the position bias and its gates")):
        about: dict[str, Any] = {"unit": "of the largest", "against": "transformers' WavLMModel in fp32"}
        yield Row(
            **about,
            name=f"{what}, ours in fp32",
            ours=apart(found["ours, fp32"], exact, gradients),
            target=Target("<=", 1e-3, of="ours"),
        )
        one, two = (apart(found[name], exact, gradients) for name in ("ours, bf16", "theirs, bf16"))
        about["against"] = "WavLMModel in bf16, both beside it in fp32"
        yield Row(
            **about, name=f"{what}, in bf16", ours=one, peer=two, ratio=one / two, ratio_is="ours / peer",
            target=Target("<=", 2),
        )  # fmt: skip
    short = lengths.clone()
    short[0] //= 2
    with torch.no_grad():
        padded = waveform * (torch.arange(waveform.shape[1], device=setting.device) < short[:, None])
        together, mask = encoder(padded, short)
        alone, _ = encoder(padded[:1, : int(short[0])], short[:1])
    difference = (together[0][mask[0]] - alone[0]).abs().max() / alone.abs().max()
    yield Row(
        name="frames of a padded utterance",
        unit="of the largest",
        against="the utterance alone",
        ours=float(difference),
        target=Target("<=", 1e-3, of="ours"),
    )


def steps(setting: Setting, folder: Path) -> Iterator[Row]:
    """Utterances a second, memory, MFU."""
    made: dict[str, Callable[[], Way]] = {
        "ours": lambda: ours(setting, folder),
        "ours, checkpointing": lambda: ours(setting, folder, checkpointing=True),
        "Hugging Face": lambda: hugging_face(setting, folder),
    }
    absent = ""
    if optional("speechbrain.integrations.huggingface.wavlm"):
        made["SpeechBrain"] = lambda: speechbrain(setting, folder)
    else:
        absent = f"SpeechBrain's recipe was {missing('speechbrain')}"
    yield fit(made["ours"])
    ways: dict[str, Way] = {}
    memory: dict[str, float | None] = {}
    for name, make in made.items():
        try:
            ways[name], memory[name] = begun(make)
        except Exception as error:  # the others go on without it
            if name == "ours":
                raise
            yield failure(f"fine-tuning, {name}", error)

    def rate(step: Way, waveforms: Sequence[torch.Tensor]) -> Callable[[], float]:
        def measure() -> float:
            setting.settle()
            began = time.perf_counter()
            for setting.waveform in waveforms:
                step()
            setting.settle()
            return len(waveforms) * setting.batch / (time.perf_counter() - began)

        return measure

    whole = setting.waveform
    found = in_turns({name: rate(step, [whole] * setting.steps) for name, step in ways.items()}, setting.rounds)
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    leaner = max((name for name in middle if not name.startswith("ours")), key=lambda name: middle[name])
    peak, each = peak_flops(), flops(setting.config, setting.batch, whole.shape[1]) / setting.batch

    def mfu(name: str) -> str:
        achieved = middle[name] * each
        if peak is None:
            return f"{achieved / 1e12:.3g} TFLOP/s; no data sheet to compare it with."
        return (
            f"MFU {100 * achieved / peak[0]:.1f} % ({achieved / 1e12:.0f} of {peak[0] / 1e12:.0f} TFLOP/s, {peak[1]})."
        )

    about: dict[str, Any] = {
        "against": f"{leaner}, the faster of the peers",
        "target": Target(">=", 1.5),
        "unit": "utterances/s",
    }
    title = "fine-tuning WavLM-Large, 16 x 6.25 s"
    row = compared(found, "ours", leaner, "ours / peer", name=title, **about)
    yield replace(row, limit=mfu("ours"), note=absent)
    for name in ways:
        if name not in ("ours", leaner):
            told = {"name": f"{title}, beside {name}", "against": name, "unit": about["unit"]}
            yield replace(compared(found, "ours", name, "ours / peer", **told), limit=f"{name}: {mfu(name)}")
    shorter = [whole[:, : int(share * whole.shape[1])].contiguous() for share in (1.0, 0.4, 0.61, 0.78, 0.9, 0.52)]
    if setting.device.type == "cuda":
        shorter = [waveform.pin_memory() for waveform in shorter]
    changing = in_turns({name: rate(ways[name], shorter) for name in ("ours", leaner)}, setting.rounds)
    setting.waveform = whole
    yield compared(changing, "ours", leaner, "ours / peer", name="fine-tuning WavLM-Large, 2.5 to 6.25 s", **about)
    for name in (name for name in ("ours", "ours, checkpointing") if name in memory):
        mine, theirs = memory[name], memory[leaner]
        yield Row(
            name=f"fine-tuning, GPU memory: {name}",
            unit="GB",
            against=leaner,
            ours=mine,
            peer=theirs,
            ratio=mine / theirs if mine and theirs else None,
            ratio_is="ours / peer",
            note="" if mine else "not measured: no GPU",
        )


def fit(make: Callable[[], Way]) -> Row:
    """Whether a GPU of `FITS_GB` would do: torch is given no more than that, less what CUDA itself takes."""
    about: dict[str, Any] = {
        "name": f"fine-tuning within {FITS_GB} GB",
        "unit": "GB",
        "against": f"a GPU of {FITS_GB} GB",
        "target": Target("<=", FITS_GB, of="ours"),
    }
    try:
        found = peak_gb(make, FITS_GB)
    except torch.OutOfMemoryError as error:
        return Row(**about, ours=peak_gb(make, math.inf), note=f"It did not fit: {str(error).splitlines()[0]}")
    return Row(**about, ours=found, note="All that it had of the device." if found else "not measured: no GPU")


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
    """How long the training step waits for Ray Data's batches, once they flow."""
    about: dict[str, Any] = {
        "name": "ingest, waiting for data while WavLM-Large is fine-tuned",
        "unit": "% of step time",
        "against": "no waiting",
        "target": Target("<=", 2, of="ours"),
    }
    if find_spec("ray") is None:  # looked for, not imported: it reads what QUIET sets when it is
        yield Row(**about, note=missing("ray"))
        return
    from noise import recordings, write_fold

    from sermll.cluster import QUIET, connected
    from sermll.config import Experiment
    from sermll.feed import Feed, stream
    from sermll.loop import to_device

    os.environ.update(QUIET)
    crop_s = 1.0 if setting.tiny else 6.25
    experiment = Experiment.model_validate(
        {"name": "bench", "data": {"path": "none", "crop_s": crop_s}, "optim": {"batch_size": setting.batch}}
    )
    told = settings(folder, setting.tiny)
    system = System(told, CLASSES).to(setting.device).train()
    optimizer = make_optimizer(system, told.optim)
    fold = write_fold(folder / "shards", recordings(400 if setting.tiny else 1602))
    waits: dict[int, list[float]] = {0: [], 1: [], 2: []}
    steady_s = 0.0
    with connected():
        batches = stream(Feed.for_run("gpu", experiment, fold), 0, len(waits))
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            if batch.split != "train":
                continue
            waits[batch.epoch].append(time.perf_counter() - asked)
            system(*to_device(batch, setting.device))["loss"].backward()
            assert Step(optimizer, told.optim.clip_norm).taken()
            setting.settle()  # a wait is one of the GPU's, not of a queue of kernels
            if batch.epoch:
                steady_s += time.perf_counter() - asked
    steady = [*waits[1], *waits[2]]
    note = (
        f"{len(steady)} steps of the second and third epoch, the longest wait {1e3 * max(steady):.0f} ms. Before: "
        f"{waits[0][0]:.1f} s for the first batch, {sum(waits[0][1:]):.1f} s for the others of the first epoch."
    )
    yield Row(**about, ours=100 * sum(steady) / steady_s, note=note)


def start_up(folder: Path) -> Iterator[Row]:
    """The way to the first step on a cluster that is up, on the CPUs beside the GPU, of which clusters have many."""
    if find_spec("ray") is None:
        yield Row(name="start-up to first step", unit="s", against="a bare script", note=missing("ray"))
        return
    import training

    yield from training.start_up(folder, {"warm": 5})


def rows(setting: Setting) -> Iterator[Row]:
    """Sameness, steps, losses, data, start-up; what fails takes nothing else with it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        torch.manual_seed(0)
        WavLMModel(setting.config).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
        exactness = losses.exactness(320 if setting.tiny else 4800, setting.device.type)
        yield from as_far_as_it_goes("sameness", sameness(setting, folder))
        yield from as_far_as_it_goes("SupCon's exactness", exactness)
        yield from as_far_as_it_goes("fine-tuning", steps(setting, folder))
        yield from as_far_as_it_goes("SupCon", supcon(setting))
        yield from as_far_as_it_goes("ingest", ingest(setting, folder))
        yield from as_far_as_it_goes("start-up", start_up(folder))


def main() -> int:
    """Measure and write, or only show that everything runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on the CPU if need be; nothing is written")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --tiny shows on a CPU that everything runs")
    load, began, found = other_load(), time.monotonic(), list[Row]()
    slug = "" if arguments.tiny else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path, whole = None, False
    with suppress(KeyboardInterrupt):
        for row in rows(Setting(arguments.tiny)):
            found.append(row)
            if slug:
                path = write(found, slug, "make bench-gpu, broken off", time.monotonic() - began, load)
        whole = True
    say(table(found))
    say(remarks(found))
    if slug and whole:
        path = write(found, slug, "make bench-gpu", time.monotonic() - began, load)
    if path:
        say(f"written: {path}")
    return int(not whole or any(row.failed for row in found))


if __name__ == "__main__":
    sys.exit(main())
