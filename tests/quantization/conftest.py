"""A random two-layer Gemma on disk; nothing here needs a GPU or the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def save_gemma(folder: Path, seed: int = 0, **changes: object) -> Path:
    torch.manual_seed(seed)
    config = GemmaConfig(**{**CONFIG, **changes})
    model = GemmaForCausalLM(config)
    # norms start at zero: other values show whether they are read at all
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="400KB")
    return folder


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory) -> str:
    """Folder of a random Gemma in bf16, in several shards."""
    return str(save_gemma(tmp_path_factory.mktemp("gemma")))


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
