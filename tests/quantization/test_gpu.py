"""The same laws on a CUDA device: kernels differ, so equality is within rounding."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model

from medqlora.quantization import (
    QuantConfig,
    dequantize,
    footprint,
    letter_rows,
    load_base,
    rounding_error,
)
from tests.quantization.conftest import save_gemma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIGS = {
    "int8": QuantConfig("int8", embedding="int8"),
    "fp4": QuantConfig("fp4", double_quant=True),
    "nf4_single": QuantConfig("nf4"),
    "nf4_block256": QuantConfig("nf4", double_quant=True, block_size=256),
    "nf4_full": QuantConfig("nf4", double_quant=True, embedding="nf4"),
    "nf4_fsdp": QuantConfig("nf4", double_quant=True, quant_storage="bfloat16"),
    "hqq_4bit": QuantConfig("hqq_4bit"),
    "hqq_3bit": QuantConfig("hqq_3bit"),
    "hqq_2bit": QuantConfig("hqq_2bit"),
    "torchao_int4": QuantConfig("torchao_int4"),
    "torchao_int8": QuantConfig("torchao_int8"),
}
BOUNDS = {"int8": 0.01, "fp4": 0.14, "nf4": 0.11, "hqq_4bit": 0.12, "hqq_3bit": 0.25}
BOUNDS |= {"hqq_2bit": 0.55, "torchao_int4": 0.12, "torchao_int8": 0.01}


@pytest.fixture(scope="module")
def wide_gemma(tmp_path_factory) -> str:
    """Wide enough for blocks of 256 and the tiles of tinygemm."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"vocab_size": 20_000, "hidden_size": 1024, "intermediate_size": 1024}
    return str(save_gemma(folder, num_attention_heads=4, **sizes))


@pytest.fixture
def ids(token_ids) -> torch.Tensor:
    return token_ids.cuda()


def skip_without_extra(data_type):
    extra = data_type.split("_")[0]
    if extra in ("hqq", "torchao") and importlib.util.find_spec(extra) is None:
        pytest.skip(f"the optional extra {extra} is not installed")


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_round_as_promised_and_let_gradients_through(wide_gemma, ids, name):
    quant = CONFIGS[name]
    skip_without_extra(quant.data_type)
    model = load_base(wide_gemma, quant, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    errors = rounding_error(model, wide_gemma)
    assert 0 < errors["model.layers.0.mlp.up_proj"] < BOUNDS[quant.data_type]
    layer = footprint(model).layers["model.layers.0.mlp.up_proj"]
    assert layer.bits_per_weight == pytest.approx(quant.bits, abs=0.05)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        assert model.eval()(ids).logits.isfinite().all()
    model.train()(ids).logits.float().square().mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", ["nf4_full", "nf4_block256", "hqq_4bit", "torchao_int4"])
def test_logits_and_gradients_are_those_of_the_rounded_weights(wide_gemma, ids, name):
    quant = CONFIGS[name]
    skip_without_extra(quant.data_type)

    def run(model):
        hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=hidden).logits.float()
        logits.logsumexp(-1).sum().backward()
        return logits.detach(), hidden.grad.float()

    logits, gradient = run(load_base(wide_gemma, quant, device="cuda"))
    plain = run(dequantize(load_base(wide_gemma, quant, device="cuda")))
    for have, want in zip((logits, gradient), plain, strict=True):
        assert (have - want).norm() < 0.03 * want.norm()


def test_cpu_and_gpu_store_the_same_codes(wide_gemma):
    quant = CONFIGS["nf4_full"]
    here, there = (load_base(wide_gemma, quant, device=d).state_dict() for d in ("cpu", "cuda"))
    for name in ("model.embed_tokens.packed", "model.layers.0.mlp.up_proj.weight"):
        differing = (here[name] != there[name].cpu()).float().mean()
        assert differing < 1e-3


def test_compiled_lookup_equals_the_eager_one(wide_gemma, ids):
    embedding = load_base(wide_gemma, CONFIGS["nf4_full"], device="cuda").model.embed_tokens
    compiled = torch.compile(embedding, fullgraph=True, mode="reduce-overhead")
    # The compiler may leave out the rounding to 16 bit between dequantising and scaling.
    torch.testing.assert_close(compiled(ids).clone(), embedding(ids), rtol=2**-7, atol=0)


def test_chunked_head_agrees_with_the_letter_rows(wide_gemma, ids):
    model = load_base(wide_gemma, CONFIGS["nf4_full"], device="cuda")
    rows = letter_rows(model, (250, 19_999))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    have = output.hidden_states[-1] @ rows.T
    torch.testing.assert_close(have, output.logits[..., [250, 19_999]], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["int8", "nf4_full", "nf4_fsdp"])
def test_copy_gives_the_same_model(wide_gemma, ids, tmp_path, name):
    first = load_base(wide_gemma, CONFIGS[name], device="cuda", cache_dir=tmp_path)
    second = load_base(wide_gemma, CONFIGS[name], device="cuda", cache_dir=tmp_path)
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_peak_while_loading_stays_below_the_bound(tmp_path):
    """The final size and one layer: no 16-bit copy of the model or its embedding is ever there."""
    path = str(save_gemma(tmp_path, vocab_size=100_000, hidden_size=1024, intermediate_size=4096))
    load_base(path, CONFIGS["nf4_full"], device="cuda")  # the first call allocates workspaces
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_base(path, CONFIGS["nf4_full"], device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.3 * footprint(model).num_bytes
