"""Several workers compute what one would: losses and gradients of the global batch, on real process groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from sermll.config import Experiment
from sermll.model import System

LENGTHS = [7000, 6500, 6000, 5500, 5000]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(LENGTHS)
    waveform = 0.1 * torch.randn(5, 7000, generator=generator)
    waveform *= torch.arange(7000)[None] < lengths[:, None]
    target = 0.8 * torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 2, 1]), 7) + 0.2 / 7
    return waveform, lengths, target.float()


def step(settings: dict[str, Any], rank: int, workers: int) -> dict[str, torch.Tensor]:
    """Losses and gradients of a worker's share of the batch."""
    torch.manual_seed(0)
    system = System(Experiment.model_validate(settings), 7).train()
    model = DistributedDataParallel(system) if workers > 1 else system
    waveform, lengths, target = (part[rank::workers] for part in batch())
    terms = model(waveform[:, : int(lengths.max())], lengths, target)
    terms["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in system.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return {**{f"term {name}": value.detach() for name, value in terms.items()}, **gradients}  # type: ignore[dict-item]


def worker(rank: int, workers: int, folder: str, variants: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    torch.save([step(settings, rank, workers) for settings in variants], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ray  # several processes take their time
def test_three_workers_with_uneven_shares_equal_one(settings: Callable[..., Any], tmp_path: Path) -> None:
    quiet = (
        "model.encoder.dropout=0",
        "model.encoder.spec_augment=false",
        "losses.supcon.projection=separate",
        "resources.workers=3",
    )
    gathered, apart = (
        settings(*quiet, f"losses.gather={gather}").model_dump(mode="json") for gather in ("true", "false")
    )
    multiprocessing.spawn(worker, (3, str(tmp_path), [gathered, apart]), nprocs=3)  # type: ignore[attr-defined]
    alone = step(gathered, 0, 1)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for shared, _ in ranks:
        assert set(shared) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(shared[name], value, atol=1e-5, rtol=1e-4, msg=name)

    def mean(name: str) -> torch.Tensor:
        return torch.stack([shares[f"term {name}"] for _, shares in ranks]).mean()

    for name in ("kl", "focal", "center"):  # means over utterances do not care who computes them
        torch.testing.assert_close(mean(name), alone[f"term {name}"], atol=1e-5, rtol=1e-4)
    assert float(mean("supcon") - alone["term supcon"]) < -0.05  # fewer frames to tell apart: a smaller loss
