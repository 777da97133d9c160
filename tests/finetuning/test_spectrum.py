"""What an adapter adds to a weight is what merging adds, and its singular values are its own."""

from __future__ import annotations

import pytest
import torch

from medqlora.errors import ConfigError
from medqlora.finetuning import (
    attach_adapter,
    effective_rank,
    low_rank_singular_values,
    merge_adapter,
    weight_changes,
)
from medqlora.quantization import dequantize, dequantized_weight
from tests.finetuning.conftest import option


@pytest.mark.parametrize("peft", ["lora_r4", "rslora_r16", "dora_r16", "adalora", "loftq_r16"])
def test_the_change_of_a_weight_is_the_one_that_merging_makes(base, peft):
    """Base in NF4; the adapter's numbers are random, so that no factor is zero."""
    if peft == "adalora":
        adapted = attach_adapter(base("nf4"), option("peft", peft), num_training_steps=100)
    else:
        adapted = attach_adapter(base("nf4"), option("peft", peft))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.rand_like(parameter) if "magnitude" in name else 0
                parameter.add_(0.1 * torch.randn_like(parameter) + noise)
    changes = {change.name: change for change in weight_changes(adapted, dequantized_weight)}
    assert len(changes) == 14  # seven matrices in each of two layers
    plain = dequantize(base("nf4"), torch.float32).state_dict()
    merged = merge_adapter(adapted, dequantize, dtype=torch.float32).state_dict()
    for name, change in changes.items():
        before, after = plain[f"{name}.weight"], merged[f"{name}.weight"]
        torch.testing.assert_close(change.stored, before, rtol=0, atol=1e-6)
        torch.testing.assert_close(change.change, after - before, rtol=0, atol=2e-5)
        expected = torch.linalg.svdvals(after - before)[: len(change.singular_values)]
        torch.testing.assert_close(change.singular_values, expected, rtol=1e-3, atol=1e-4)
        norm = change.singular_values.square().sum().sqrt()
        torch.testing.assert_close(norm, change.change.norm(), rtol=1e-4, atol=0)


def test_a_fresh_adapter_has_changed_nothing_and_has_no_direction(base):
    """LoRA starts at B = 0 (Hu et al. 2021, section 4.1)."""
    adapted = attach_adapter(base("nf4"), option("peft", "lora_r8"))
    for change in weight_changes(adapted, dequantized_weight):
        assert change.rank == len(change.singular_values) == 8
        assert not change.change.any()
        assert effective_rank(change.singular_values) == 0


def test_singular_values_of_a_product_are_found_without_forming_it():
    torch.manual_seed(0)
    left, right = torch.randn(40, 5), torch.randn(5, 30)
    found = low_rank_singular_values(left, right)
    torch.testing.assert_close(found, torch.linalg.svdvals(left @ right)[:5])


@pytest.mark.parametrize(
    ("values", "rank"), [([2.0], 1), ([3.0, 3.0, 3.0], 3), ([5.0, 0.0], 1), ([0.0, 0.0], 0)]
)
def test_effective_rank_counts_equal_directions(values, rank):
    """Roy and Vetterli 2007, properties of section 3."""
    assert effective_rank(torch.tensor(values)) == pytest.approx(rank)


def test_effective_rank_falls_when_one_direction_dominates():
    assert 1 < effective_rank(torch.tensor([9.0, 1.0])) < effective_rank(torch.tensor([6.0, 4.0]))


@pytest.mark.parametrize(("peft", "says"), [("none", "no adapter"), ("ia3", "peft=ia3 adds no")])
def test_an_adapter_without_such_a_product_is_refused_by_name(base, peft, says):
    model = attach_adapter(base("nf4"), option("peft", peft))
    with pytest.raises(ConfigError, match=says) as error:
        list(weight_changes(model, dequantized_weight))
    assert "\n" not in str(error.value)
