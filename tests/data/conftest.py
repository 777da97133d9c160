"""Fixtures of the data tests."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from medqlora.data import MedMCQADataModule, PromptTemplate
from tests.data.data_tools import HARNESS, SHARED, make_tokenizer, raw_row, write_jsonl


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def harness() -> PromptTemplate:
    return PromptTemplate(name="harness", text=HARNESS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def half_validation() -> str:
    """Path of half of the official validation set."""
    file = SHARED / "medmcqa_validation_half.jsonl.gz"
    if not file.is_file():
        pytest.skip("../shared is not here")
    return str(file)


@pytest.fixture
def make_data(tmp_path, tokenizer, harness):
    """Builds a data module over `num` generated training rows."""

    def make(num: int = 120, **options) -> MedMCQADataModule:
        file = write_jsonl(tmp_path / "train.jsonl", [raw_row(i) for i in range(num)])
        values = {
            "tokenizer": tokenizer,
            "prompt": harness,
            "seed": 0,
            "train_file": file,
            "token_budget": 256,
        }
        return MedMCQADataModule("generated", **(values | options))

    return make
