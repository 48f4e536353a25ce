"""The losses of one training step, forward and backward, and the memory that supervised contrast over frames takes.

    python benchmarks/losses.py

About three minutes on one core. Frames of 64 dimensions (the default) stand for batches of 16 utterances: 5 000 are
16 x 6.25 s at 20 ms a frame. The naive matrix is what one writes first; pytorch-metric-learning's SupConLoss is the
library's. Both are given unit vectors and the labels of all frames. Times are of one thread, in turns. Memory is the
peak of a process of its own, less what it held before the step; where a peer's 20 000 frames would not fit beside
what else is on the machine, its peak at 10 000 is taken four times, as it grows with the square, and the row says so.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from side_by_side import Row, Target, alone, compared, in_turns, missing, optional, seconds_of
from torch import Tensor
from torch.nn import functional

from sermll.losses import Objective, supcon

DIM, CLASSES, UTTERANCES, TEMPERATURE = 64, 4, 16, 0.1
OURS, NAIVE, LIBRARY = "ours", "the naive matrix", "pytorch-metric-learning"
Step = Callable[[Tensor, Tensor], Tensor]
"""Frames (frames, DIM) and a label for each to a loss."""


def ours(frames: Tensor, labels: Tensor) -> Tensor:
    """As in training: utterances of equal length."""
    shaped = frames.view(UTTERANCES, -1, DIM)
    mask = torch.ones(shaped.shape[:2], dtype=torch.bool, device=frames.device)
    return supcon(shaped, mask, labels.view(UTTERANCES, -1)[:, 0], CLASSES, TEMPERATURE, normalize=True)


def naive(frames: Tensor, labels: Tensor) -> Tensor:
    """All products at once."""
    unit = functional.normalize(frames, dim=-1)
    scores = unit @ unit.T / TEMPERATURE
    scores = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -torch.inf)
    log_p = scores - scores.logsumexp(dim=1, keepdim=True)
    positive = (labels[:, None] == labels[None]).fill_diagonal_(False)
    return -(log_p.where(positive, 0).sum(dim=1) / positive.sum(dim=1)).mean()


def library() -> Step | None:
    """pytorch-metric-learning's loss, None where it is not installed."""
    losses = optional("pytorch_metric_learning.losses")
    return None if losses is None else losses.SupConLoss(temperature=TEMPERATURE)


def ways() -> dict[str, Step]:
    """Those that can be measured here."""
    found: dict[str, Step] = {OURS: ours, NAIVE: naive}
    other = library()
    return found if other is None else found | {LIBRARY: other}


def batch(count: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Frames that ask for a gradient, and their labels: one for each utterance."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(count, DIM, generator=generator).to(device, dtype)
    labels = (torch.arange(UTTERANCES) % CLASSES).repeat_interleave(count // UTTERANCES).to(device)
    return frames.requires_grad_(), labels


def step(way: Step, frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    frames.grad = None
    loss = way(frames, labels)
    loss.backward()
    assert frames.grad is not None
    return loss.detach(), frames.grad


def peak_bytes(name: str, count: int) -> int | None:
    """Peak memory of a step in a process of its own; None if it was ended for want of memory."""
    done = subprocess.run([sys.executable, __file__, "--peak", name, str(count)], capture_output=True, text=True)
    if done.returncode:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _peak(name: str, count: int) -> int:
    way = ways()[name]
    step(way, *batch(160))  # what a first call loads is not the step's
    frames, labels = batch(count)
    before = _bytes("/proc/self/status", "VmRSS")
    step(way, frames, labels)
    return _bytes("/proc/self/status", "VmHWM") - before


def _bytes(path: str, name: str) -> int:
    """One of the amounts of memory that Linux tells."""
    return 1024 * int(Path(path).read_text(encoding="ascii").split(f"{name}:")[1].split()[0])


def memory(count: int) -> Iterator[Row]:
    """What a step takes at `count` frames."""
    mine = peak_bytes(OURS, count)
    assert mine is not None, "our own step must fit"
    for name in (NAIVE, LIBRARY):
        about: dict[str, Any] = {
            "name": f"SupCon, memory at {count} frames, beside {name}",
            "unit": "MB",
            "against": name,
            "target": Target("<=", 0.2),
            "ratio_is": "ours / peer",
            "ours": mine / 1e6,
            "limit": f"Frames, gradient and what is kept of each frame are {3 * 4 * count * DIM / 1e6:.0f} MB.",
        }
        if name == LIBRARY and library() is None:
            yield Row(**about, note=missing(LIBRARY))
            continue
        half = peak_bytes(name, count // 2)
        theirs = (
            peak_bytes(name, count)
            if half is not None and 4.4 * half < 0.8 * _bytes("/proc/meminfo", "MemAvailable")
            else None
        )
        if theirs is not None:
            yield Row(**about, peer=theirs / 1e6, ratio=mine / theirs)
        elif half is not None:
            note = f"The peer's peak at {count // 2} frames, {half / 1e6:.0f} MB, four times: the whole would not fit."
            yield Row(**about, peer=4 * half / 1e6, ratio=mine / (4 * half), note=note)
        else:
            yield Row(**about, note=f"not measured: not even {count // 2} frames fit into memory")


def exactness(count: int = 4800, device: str = "cpu") -> Iterator[Row]:
    """How far loss and gradient in float32 are from the naive matrix in float64; 4800 frames: two blocks on a GPU."""
    true_loss, true_gradient = step(naive, *batch(count, torch.float64, device))
    found = {}
    for name, way in ways().items():
        loss, gradient = step(way, *batch(count, device=device))
        found[name] = float(
            max(
                (loss.double() - true_loss).abs() / true_loss,
                (gradient.double() - true_gradient).abs().max() / true_gradient.abs().max(),
            )
        )
    yield Row(
        name=f"SupCon{' on the GPU' if device == 'cuda' else ''}, error at {count} frames",
        unit="of the value",
        against="the naive matrix, both in float32 beside it in float64",
        ours=found[OURS],
        peer=found[NAIVE],
        ratio=found[OURS] / found[NAIVE],
        ratio_is="ours / peer",
        target=Target("<=", 1e-5, of="ours"),
        note="The larger of the errors of loss and gradient; no approximation is made, what is left is rounding.",
    )


def speed(count: int, rounds: int) -> Iterator[Row]:
    """Seconds of forward and backward."""
    batches = {name: (way, *batch(count)) for name, way in ways().items()}
    found = in_turns({name: seconds_of(lambda it=it: step(*it), least_s=0) for name, it in batches.items()}, rounds)
    # Forward one triangle of products, backward the triangle again and twice as much for the gradient's two sides.
    operations = 2 * DIM * count**2 * (0.5 + 0.5 + 1.0)
    rate = operations / min(found[OURS]) / 1e9
    for name in (NAIVE, LIBRARY):
        about: dict[str, Any] = {"name": f"SupCon, {count} frames, beside {name}", "unit": "ms", "against": name}
        if name not in found:
            yield Row(**about, target=Target(">=", 1), note=missing(LIBRARY))
            continue
        yield replace(
            compared(found, OURS, name, scale=1000, target=Target(">=", 1), **about),
            limit=f"Products alone run at {rate:.0f} of the {_peak_rate():.0f} GFLOP/s that a matrix product reaches "
            f"here; the rest are {count**2 / 1e6:.0f} million exponentials.",
        )


def _peak_rate() -> float:
    """GFLOP/s of a square matrix product."""
    one = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(seconds_of(lambda: one @ one)() for _ in range(3)) / 1e9


def all_four() -> Iterator[Row]:
    """KL, focal, center and SupCon beside the library's SupCon with KL, focal and center as torch gives them."""
    from sermll.config import Losses  # where the others need torch alone

    generator = torch.Generator().manual_seed(0)
    frames, mask = 312, torch.ones(UTTERANCES, 312, dtype=torch.bool)
    logits, z, h = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((UTTERANCES, CLASSES), (UTTERANCES, DIM), (UTTERANCES, frames, DIM))
    )
    labels = torch.arange(UTTERANCES) % CLASSES
    target = functional.one_hot(labels, CLASSES).float()
    objective = Objective(Losses(), CLASSES, DIM)
    centers = torch.zeros(CLASSES, DIM, requires_grad=True)
    other = library()

    def mine() -> None:
        objective(logits, z, h, mask, target)["loss"].backward()

    def theirs() -> None:
        assert other is not None
        log_p = logits.log_softmax(dim=-1)
        own = log_p[torch.arange(UTTERANCES), labels]
        broadcast = (h + h.mean(dim=1, keepdim=True)) / 2
        loss = functional.kl_div(log_p, target, reduction="batchmean") - ((1 - own.exp()) ** 2 * own).mean()
        loss = loss + 0.002 * (z - centers[labels]).square().sum(dim=-1).mean()
        (loss + other(broadcast.flatten(0, 1), labels.repeat_interleave(frames))).backward()

    about: dict[str, Any] = {
        "name": "all four losses, one step of 16 x 312 frames",
        "unit": "ms",
        "against": "pytorch-metric-learning's SupCon with torch's KL, focal and center loss",
        "target": Target(">=", 1),
    }
    if other is None:
        yield Row(**about, note=missing(LIBRARY))
        return
    found = in_turns({OURS: seconds_of(mine, 0), LIBRARY: seconds_of(theirs, 0)}, 5)
    note = "The library has neither a focal nor a center loss; those are written out here."
    yield replace(compared(found, OURS, LIBRARY, scale=1000, **about), note=note)


def rows() -> Iterator[Row]:
    """Exactness, speed, memory, and all losses together."""
    yield from exactness()
    yield from speed(5008, rounds=5)
    yield from all_four()
    yield from memory(20_000)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        sys.stdout.write(json.dumps(_peak(sys.argv[2], int(sys.argv[3]))) + "\n")
    else:
        alone(rows)
