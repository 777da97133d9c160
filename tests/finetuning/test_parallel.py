"""Several devices for one run, as far as one process can tell: test_distributed.py runs two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig

from medqlora.errors import ConfigError
from medqlora.finetuning import attach_adapter
from medqlora.finetuning.parallel import AdapterParallel, shard_frozen_layers


def test_gradients_become_their_means_in_one_transfer_a_dtype(monkeypatch):
    """The other process has three times the gradients of this one."""
    transfers: list[torch.dtype] = []

    def add_the_other(flat: torch.Tensor) -> None:
        transfers.append(flat.dtype)
        flat += 3 * flat

    monkeypatch.setattr(dist, "all_reduce", add_the_other)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    gradients = [
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([5.0], dtype=torch.bfloat16),
        torch.tensor([6.0, 7.0]),
    ]
    expected = [2 * gradient for gradient in gradients]
    AdapterParallel().average_gradients(gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert sorted(map(str, transfers)) == ["torch.bfloat16", "torch.float32"]


@pytest.mark.parametrize("data_type", ["nf4", "int8"])
def test_a_quantised_base_cannot_be_cut_into_parts(base, data_type):
    model = attach_adapter(base(data_type), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="this base is quantised") as told:
        shard_frozen_layers(model, "cpu")
    assert "trainer=ddp" in str(told.value)
