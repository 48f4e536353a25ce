"""What a trial's failure is put down to."""

import pytest
import torch

from sermll.trials import out_of_memory


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert out_of_memory(refused.value)
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as other:
        _ = torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value)
