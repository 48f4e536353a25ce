"""How much a cluster trains at once."""

import pytest

from sermll.cluster import lanes_here, room
from sermll.config import Resources
from sermll.errors import ConfigError


@pytest.mark.parametrize(
    ("cpus", "needs", "lanes"),
    [
        (2, {}, 2),
        (2, {"workers": 2}, 1),
        (7, {"workers": 2, "cpus_per_worker": 1.5}, 2),
        (1, {"workers": 2}, 0),
        (6, {"workers": [1, 3]}, 2),
        (5, {"workers": [2, 3]}, 1),
        (2, {"workers": [2, 3]}, 1),  # one of fewer workers
        (4, {"workers": [2, 5]}, 1),  # but not two of them
        (1, {"workers": [2, 3]}, 0),
    ],
)
def test_lanes_take_whole_shares_of_the_cpus(
    cpus: int, needs: dict[str, float], lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cpus, gpus=0)
    assert lanes_here(Resources.model_validate(needs)) == lanes


def machine(monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("needs", "lanes"),
    [
        ({}, 1),
        ({"gpus_per_worker": 0.25}, 4),
        ({"gpus_per_worker": 0.2}, 5),
        ({"gpus_per_worker": 0.05}, 20),
        ({"gpus_per_worker": 0.34}, 2),
        ({"gpus_per_worker": 0}, 64),
        ({"gpus_per_worker": 0, "parallel_folds": 3}, 3),
        ({"gpus_per_worker": 2}, 0),
        ({"memory_gb": 4}, None),
    ],
)
def test_lanes_here_are_told_by_the_scarcest_resource_or_not_at_all(
    needs: dict[str, float], lanes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cpus=64, gpus=1)
    assert lanes_here(Resources.model_validate(needs)) == lanes
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert lanes_here(Resources.model_validate(needs)) is None


@pytest.mark.parametrize(
    ("have", "needs", "found"),
    [
        ({"CPU": 8.0}, {}, (0.0, 8)),
        ({"CPU": 8.0, "GPU": 2.0}, {}, (1.0, 2)),
        ({"CPU": 8.0, "GPU": 2.0}, {"gpus_per_worker": 0.25}, (0.25, 8)),
        ({"CPU": 8.0, "GPU": 2.0}, {"gpus_per_worker": 0}, (0.0, 8)),
        ({"CPU": 8.0}, {"parallel_folds": 3}, (0.0, 3)),
        ({"CPU": 8.0, "memory": 20e9}, {"memory_gb": 3}, (0.0, 6)),
        ({"CPU": 8.0, "memory": 20e9}, {"memory_gb": 3, "workers": 2}, (0.0, 3)),
        ({"CPU": 2.0}, {"parallel_folds": 3, "wait_s": 60}, (0.0, 2)),  # the others when machines have come
        ({"CPU": 8.0, "GPU": 2.0}, {"workers": [1, 4]}, (1.0, 1)),
        ({"CPU": 4.0}, {"workers": [1, 2], "parallel_folds": 3}, (0.0, 2)),
    ],
)
def test_room_is_what_fits_and_no_more_than_was_asked_for(
    have: dict[str, float], needs: dict[str, float], found: tuple[float, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: have)
    assert room(Resources.model_validate(needs)) == found


@pytest.mark.parametrize(
    ("have", "needs", "message"),
    [
        (
            {},
            {},
            r"1 trial\(s\) at once need 1 CPUs, 0 GPUs and 0 GB, the cluster has 0, 0 and 0; .*resources.wait_s=900",
        ),
        ({"CPU": 2.0}, {"parallel_folds": 3}, "3 trial.* need 3 CPUs, .* has 2, 0 and 0"),
        ({"CPU": 8.0}, {"gpus_per_worker": 1}, "1 CPUs, 1 GPUs and 0 GB, the cluster has 8, 0 and 0"),
        ({"CPU": 8.0, "memory": 2e9}, {"memory_gb": 3}, "and 3 GB, the cluster has 8, 0 and 2"),
        ({}, {"wait_s": 60}, "has 0, 0 and 0; lower [^;]*$"),
        ({"CPU": 1.0}, {"workers": [2, 4]}, "need 2 CPUs"),
    ],
)
def test_no_room_is_told_with_what_is_there(
    have: dict[str, float], needs: dict[str, float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: have)
    with pytest.raises(ConfigError, match=message):
        room(Resources.model_validate(needs), "trial")
