"""What a trial's failure is put down to."""

import pytest
import torch

from sermll.errors import CheckpointError, ConfigError, DataError, StorageError, TrainingError
from sermll.trials import of_the_trial, out_of_memory


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert out_of_memory(refused.value)
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as other:
        _ = torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value)


def test_what_a_trial_chose_is_told_from_what_no_other_is_spared() -> None:
    for error in (TrainingError("loss is nan"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert of_the_trial(error, 0) and of_the_trial(error, 5)
    heads = ConfigError("model.pool.heads: 7 heads do not divide the encoder's width")
    assert of_the_trial(heads, 5) and not of_the_trial(heads, 0)  # the experiment as it stands: of all of them
    for error in (StorageError("the disk is full"), DataError("a shard"), CheckpointError("cannot be read")):
        assert not of_the_trial(error, 5)
    assert not of_the_trial(RuntimeError("CUDA error: device-side assert triggered"), 5)
    assert not of_the_trial(OSError("no space left on device"), 5)
