"""A random two-layer Gemma with one key/value head, and packed rows of random questions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from medqlora.schema import IGNORE, PackedBatch

LENGTHS = (5, 1, 9, 3)


def _pack(
    questions: list[torch.Tensor],
    budget: int = 24,
    places: int = 6,
    max_length: int = 10,
    prefix: torch.Tensor | None = None,
):
    """One row of `budget` tokens with `places` places; every question goes on from the prefix."""
    prefix = torch.zeros(0, dtype=torch.long) if prefix is None else prefix
    shared = len(prefix)
    ids = torch.zeros(budget, dtype=torch.long)
    positions = torch.zeros(budget, dtype=torch.long)
    ends = shared + torch.tensor([len(q) for q in questions]).cumsum(0)
    total = int(ends[-1])
    ids[:total] = torch.cat([prefix, *questions])
    own = [shared + torch.arange(len(q)) for q in questions]
    positions[:total] = torch.cat([torch.arange(shared), *own])
    cu = torch.full((places + 1,), total, dtype=torch.int32)
    cu[0] = shared
    cu[1 : len(questions) + 1] = ends
    last = torch.zeros(places, dtype=torch.long)
    last[: len(questions)] = ends - 1
    filled = torch.arange(places) < len(questions)
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        cu_seqlens=cu,
        last=last,
        answer=torch.where(filled, torch.arange(places) % 4, IGNORE),
        index=torch.where(filled, torch.arange(places), -1),
        labels=None,
        num_questions=len(questions),
        num_tokens=total,
        max_length=max_length + shared,
        prefix_length=shared,
    )


@pytest.fixture
def pack() -> Callable[..., PackedBatch]:
    return _pack


@pytest.fixture
def tiny_gemma() -> GemmaForCausalLM:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,  # sharp attention, so that a leak between questions shows
    )
    return GemmaForCausalLM(config).eval()


@pytest.fixture
def questions() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (n,), generator=generator) for n in LENGTHS]
