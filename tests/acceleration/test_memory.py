"""The estimate of training memory: sums that must hold, and the peaks it was fitted to."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from transformers import GemmaConfig

from medqlora.acceleration.memory import (
    KNOWN_SHAPES,
    MOST_SCORING_TOKENS,
    estimate_training_memory,
    scoring_tokens,
)

GEMMA_2B = KNOWN_SHAPES["gemma-2b"]


BUDGETS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
PEAKS_GB = {
    False: (7.32, 8.44, 10.62, 14.98, 23.70, 41.37, 76.55),
    "mlp": (2.52, 2.71, 3.12, 3.98, 5.65, 9.14, 15.82),
    True: (2.45, 2.47, 2.66, 3.01, 3.78, 5.23, 8.35),
    "offload": (2.55, 2.56, 2.60, 2.68, 2.91, 3.25, 4.05),
}
"""Peaks by what is computed again, a row of each budget: the table in `benchmarks/README.md`."""


@pytest.mark.parametrize("again", PEAKS_GB)
def test_measured_peaks_of_every_budget_are_met(again):
    """Gemma-2B, LoRA r=16 and AdamW in float32; peaks of torch's allocator on an H100.

    By `benchmarks/fast_path.py`, 2026-11-27.
    """
    for token_budget, measured_gb in zip(BUDGETS, PEAKS_GB[again], strict=True):
        estimate = estimate_training_memory(
            GEMMA_2B, token_budget=token_budget, optimizer_bytes=8, gradient_checkpointing=again
        )
        assert estimate.total_gb == pytest.approx(measured_gb, rel=0.07), token_budget


@pytest.mark.parametrize(
    ("token_budget", "options", "measured_gb"),
    [
        (16_384, {}, 41.21),
        (16_384, {"float8": True}, 38.0),
        (16_384, {"token_dropout": True, "optimizer_bytes": 8}, 54.92),
        (2048, {}, 10.64),
        (2048, {"embedding_bits": 4.127}, 9.86),
        (1024, {"embedding_bits": 4.127, "gradient_checkpointing": True}, 1.70),
        (2048, {"weight_bits": 16, "fused": False}, 12.49),
        (2048, {"weight_bits": 8.06, "fused": False}, 9.99),
    ],
)
def test_measured_peaks_of_other_options_are_met(token_budget, options, measured_gb):
    """By `benchmarks/training.py` and `matrix.py` with the paged 8-bit AdamW of the defaults.

    That of dropout is by `fast_path.py`.
    """
    estimate = estimate_training_memory(GEMMA_2B, token_budget=token_budget, **options)
    assert estimate.total_gb == pytest.approx(measured_gb, rel=0.05)


def test_the_measured_peak_of_full_finetuning_is_met():
    """By `benchmarks/matrix.py --quant none --peft full`, not compiled and compiled, H200.

    The paged states of the optimiser are outside the allocator.
    """
    estimate = estimate_training_memory(GEMMA_2B, token_budget=2048, trains_base=True, fused=False)
    assert estimate.optimizer_gb == pytest.approx(2 * 1.98, rel=0.01)
    for measured_gb in (20.25, 18.06):
        peak_gb = measured_gb + estimate.optimizer_gb
        assert estimate.total_gb == pytest.approx(peak_gb, rel=0.1)


NO_LORA = {"r": 0, "targets": ()}
ATTENTION = {"targets": ("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("options", "in_4_bit_gb", "in_16_bit_gb"),
    [
        ({}, 10.54, 13.54),
        ({}, 10.88, 13.88),
        ({"r": 24}, 10.63, 13.63),
        ({"r": 1}, 11.02, 13.94),
        (NO_LORA, 9.03, 8.25),
        (NO_LORA, 9.0, 8.14),
        (ATTENTION, 9.16, 8.4),
    ],
    ids=["lora_r16", "dora_r16", "adalora", "vera", "ia3", "norms", "lora_attention"],
)
def test_measured_peaks_of_other_adapters_are_met(options, in_4_bit_gb, in_16_bit_gb):
    """2,048 tokens, by `benchmarks/matrix.py` on an H200, 2026-11-30."""
    for bits, measured_gb in ((4.127, in_4_bit_gb), (16, in_16_bit_gb)):
        estimate = estimate_training_memory(
            GEMMA_2B, token_budget=2048, weight_bits=bits, **options
        )
        assert estimate.total_gb == pytest.approx(measured_gb, rel=0.07)


@pytest.mark.parametrize("fused", [True, False])
def test_each_way_of_computing_again_takes_less_than_the_one_before(fused):
    peaks = [
        estimate_training_memory(
            GEMMA_2B, token_budget=8192, gradient_checkpointing=again, fused=fused
        ).total_gb
        for again in (False, "mlp", True, "offload")
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_weights_are_those_of_the_footprint():
    """2.07 GB in NF4 with a 16-bit embedding, 1.29 with an NF4 one, 5.01 in 16 bit."""
    for bits, embedding, expected in ((4.127, 16, 2.07), (4.127, 4.127, 1.29), (16, 16, 5.01)):
        estimate = estimate_training_memory(
            GEMMA_2B, token_budget=1, weight_bits=bits, embedding_bits=embedding
        )
        assert estimate.weights_gb == pytest.approx(expected, abs=0.006)


def test_an_adapter_is_counted_as_peft_counts_it():
    """LoRA r=16 on the seven linears of Gemma-2B has 19,611,648 weights."""
    estimate = estimate_training_memory(GEMMA_2B, token_budget=1, r=16, adapter_bytes=4)
    assert estimate.adapter_gb * 1e9 == pytest.approx(4 * 19_611_648)
    assert estimate.optimizer_gb * 1e9 == pytest.approx(2 * 19_611_648)
    assert estimate_training_memory(GEMMA_2B, token_budget=1, r=0).adapter_gb == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", KNOWN_SHAPES)
def test_more_tokens_take_more_and_checkpointing_takes_less(shape, fused):
    budgets = (1024, 2048, 16_384)
    without, light = (
        [
            estimate_training_memory(
                KNOWN_SHAPES[shape], token_budget=b, gradient_checkpointing=c, fused=fused
            )
            for b in budgets
        ]
        for c in (False, True)
    )
    for small, large in itertools.chain(itertools.pairwise(without), itertools.pairwise(light)):
        assert small.total_gb < large.total_gb
        assert small.weights_gb == large.weights_gb
    for kept, recomputed in zip(without, light, strict=True):
        assert recomputed.activations_gb < kept.activations_gb / 4
        assert min(dataclasses.astuple(kept)) > 0
        assert min(dataclasses.astuple(recomputed)) > 0


def test_a_config_and_a_mapping_say_the_same():
    config = GemmaConfig(**GEMMA_2B)
    assert estimate_training_memory(config, token_budget=64) == estimate_training_memory(
        GEMMA_2B, token_budget=64
    )


def test_a_row_has_tokens():
    with pytest.raises(ValueError, match="at least one token"):
        estimate_training_memory(GEMMA_2B, token_budget=0)


@pytest.mark.parametrize(
    ("memory_gb", "tokens"), [(80, 65_536), (16, 32_768), (8, 16_384), (1, 2048)]
)
def test_rows_of_scoring_take_at_most_a_quarter_of_the_device(memory_gb, tokens):
    assert scoring_tokens(GEMMA_2B, memory_gb * 1e9) == tokens
    assert MOST_SCORING_TOKENS == 65_536


def test_wider_numbers_and_layers_leave_room_for_fewer_tokens():
    plain = scoring_tokens(GEMMA_2B, 8e9)
    assert scoring_tokens(GEMMA_2B, 8e9, compute_bytes=4) == plain / 2
    assert scoring_tokens(KNOWN_SHAPES["gemma-7b"], 8e9) == plain / 2
    assert scoring_tokens(GEMMA_2B, 1.0) == 256
