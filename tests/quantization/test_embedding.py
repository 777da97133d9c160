"""The quantised embedding has bitsandbytes' format, is read row by row, and serves the head."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model

from medqlora.errors import ModelError
from medqlora.quantization import (
    QuantConfig,
    QuantizedEmbedding,
    TiedHead,
    chunked_logits,
    letter_rows,
    load_base,
)
from tests.conftest import ROOT

VOCABULARY, WIDTH = 300, 128


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


def filled(table, chunk=77, **options) -> QuantizedEmbedding:
    embedding = QuantizedEmbedding(*table.shape, **options)
    starts = range(0, len(table), chunk)
    return embedding.fill((start, table[start : start + chunk]) for start in starts)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
def test_nf4_equals_bitsandbytes_on_the_whole_table(table, double_quant, block_size):
    options = {"block_size": block_size, "double_quant": double_quant}
    embedding = filled(table, data_type="nf4", **options)
    packed, state = quantize_4bit(
        table, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    expected = dequantize_4bit(packed, state)
    torch.testing.assert_close(embedding.dequantize(), expected, rtol=0, atol=0)
    torch.testing.assert_close(embedding.rows(torch.arange(300)), expected, rtol=0, atol=0)


def test_int8_error_is_at_most_half_a_step_of_each_row(table):
    embedding = filled(table, data_type="int8", dtype=torch.float32)
    step = table.float().abs().amax(dim=1, keepdim=True) / 127
    assert ((embedding.dequantize() - table.float()).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("data_type", ["int8", "nf4"])
def test_row_of_zeros_stays_zero(table, data_type):
    table[3] = 0
    embedding = filled(table, data_type=data_type, double_quant=False)
    assert not embedding.rows(torch.tensor([3])).any()


@pytest.mark.parametrize("data_type", ["int8", "nf4"])
def test_lookup_reads_the_rows_it_is_asked_for_in_any_shape(table, data_type):
    embedding = filled(table, data_type=data_type, embed_scale=3.0)
    ids = torch.tensor([[5, 299, 5], [0, 7, 64]])
    torch.testing.assert_close(embedding(ids), embedding.dequantize()[ids] * 3, rtol=0, atol=0)


COMPILED = """
import torch
from medqlora.quantization import QuantizedEmbedding
table, ids = torch.randn(300, 128).bfloat16(), torch.tensor([5, 299, 0])
for data_type in ("int8", "nf4"):
    embedding = QuantizedEmbedding(300, 128, data_type=data_type).fill([(0, table)])
    compiled = torch.compile(embedding, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), embedding(ids), rtol=0, atol=0)
    print(data_type)
"""


def test_lookup_compiles_as_one_graph():
    """Elsewhere: the compiler can look into neither shape checks nor what counts lines here."""
    ended = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stdout.split() == ["int8", "nf4"], ended.stderr[-2000:]


@pytest.mark.parametrize("chunk_size", [1, 77, 300, 1000])
def test_chunked_logits_and_their_gradient_are_those_of_one_product(table, chunk_size):
    embedding = filled(table, data_type="nf4", dtype=torch.float32)
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    plain = hidden.detach().clone().requires_grad_()
    expected = plain @ embedding.dequantize().T
    logits = chunked_logits(hidden, embedding, chunk_size)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    # Sums of 300 terms of order one in float32, in another order.
    torch.testing.assert_close(hidden.grad, plain.grad, rtol=1e-4, atol=1e-4)


def test_chunked_logits_of_a_plain_embedding_are_the_same_product(table):
    embedding = torch.nn.Embedding.from_pretrained(table.float())
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(chunked_logits(hidden, embedding, 50), hidden @ table.float().T)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_model_with_a_quantised_embedding_is_stock_gemma_with_the_rounded_table(
    gemma_path, token_ids, storage
):
    """Gemma multiplies embeddings by sqrt(width) on the way in, and not on the way out."""
    quant = QuantConfig("none", compute_dtype="float32", embedding=storage)
    model = load_base(gemma_path, quant)
    plain = load_base(gemma_path, QuantConfig("none", compute_dtype="float32"))
    plain.model.embed_tokens.weight.copy_(model.model.embed_tokens.dequantize())
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids).logits, plain(token_ids).logits)


def test_tied_head_stores_nothing_of_its_own(gemma_path):
    model = load_base(gemma_path, QuantConfig("nf4", embedding="nf4"))
    assert isinstance(model.lm_head, TiedHead)
    assert not list(model.lm_head.parameters())
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    assert model.lm_head.embedding is model.model.embed_tokens


@pytest.mark.parametrize("embedding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_letter_rows_give_the_letters_logits_of_the_full_head(
    gemma_path, token_ids, embedding, with_adapter
):
    model = load_base(gemma_path, QuantConfig("nf4", compute_dtype="float32", embedding=embedding))
    if with_adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    rows = letter_rows(model, (250, 7, 9, 11))
    assert not rows.requires_grad
    with torch.no_grad():
        output = model(token_ids, output_hidden_states=True)
    expected = output.logits[..., [250, 7, 9, 11]]
    torch.testing.assert_close(output.hidden_states[-1] @ rows.T, expected, rtol=1e-4, atol=1e-4)


def test_letter_rows_of_a_trained_head_are_refused(gemma_path):
    model = load_base(gemma_path, QuantConfig("nf4"))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match="lm_head"):
        letter_rows(model, (4, 5))


def test_head_follows_its_embedding_in_a_deep_copy(gemma_path):
    import copy

    twin = copy.deepcopy(load_base(gemma_path, QuantConfig("nf4", embedding="nf4")))
    assert twin.lm_head.embedding is twin.model.embed_tokens
