"""Storage formats of optional packages; each test runs where its package is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model

from medqlora.errors import ConfigError
from medqlora.finetuning import merge_adapter
from medqlora.quantization import QuantConfig, dequantize, footprint, load_base, rounding_error
from medqlora.quantization.linear import is_quantized

needs = {
    extra: pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in packages),
        reason=f"the optional extra {extra} is not installed",
    )
    for extra, packages in {"hqq": ("hqq", "termcolor"), "torchao": ("torchao",)}.items()
}
TRAINABLE = [
    pytest.param("hqq_4bit", 0.12, marks=needs["hqq"]),
    pytest.param("hqq_3bit", 0.25, marks=needs["hqq"]),
    pytest.param("hqq_2bit", 0.55, marks=needs["hqq"]),
    pytest.param("torchao_int8", 0.01, marks=needs["torchao"]),
]


@pytest.mark.parametrize(("data_type", "error"), TRAINABLE)
def test_layers_are_rounded_counted_and_let_gradients_through(
    gemma_path, token_ids, data_type, error
):
    model = load_base(gemma_path, QuantConfig(data_type, embedding="nf4"))
    errors = rounding_error(model, gemma_path)
    assert len(errors) == 15
    assert 0 < errors["model.layers.0.mlp.up_proj"] < error
    layer = footprint(model).layers["model.layers.0.mlp.up_proj"]
    row_constants = 32 / 128 if data_type == "torchao_int8" else 0
    # hqq packs ten 3-bit codes to a word, so a small layer has some padding
    assert layer.bits_per_weight == pytest.approx(model.quant_config.bits + row_constants, rel=0.03)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model.eval()(token_ids)
    model.train()(token_ids).logits.float().square().mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize(
    "data_type", [pytest.param(*p.values[:1], marks=p.marks) for p in TRAINABLE]
)
def test_an_adapter_merges_into_the_dequantised_base(gemma_path, token_ids, data_type):
    quant = QuantConfig(data_type, compute_dtype="float32")
    model = get_peft_model(load_base(gemma_path, quant), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = model.eval()(token_ids).logits
        merged = merge_adapter(model, dequantize, dtype=torch.float32)
        assert not any(is_quantized(module) for module in merged.modules())
        torch.testing.assert_close(merged(token_ids).logits, expected, rtol=1e-3, atol=1e-3)


@needs["hqq"]
@pytest.mark.parametrize("data_type", ["hqq_4bit", "hqq_3bit", "hqq_2bit"])
def test_hqq_copy_gives_the_same_model(gemma_path, token_ids, tmp_path, data_type):
    first = load_base(gemma_path, QuantConfig(data_type), cache_dir=tmp_path)
    second = load_base(gemma_path, QuantConfig(data_type), cache_dir=tmp_path)
    with torch.no_grad():
        expected = first(token_ids).logits
        torch.testing.assert_close(second(token_ids).logits, expected, rtol=0, atol=0)


@needs["torchao"]
def test_torchao_int4_on_a_cpu_is_refused(gemma_path):
    with pytest.raises(ConfigError, match="CUDA"):
        load_base(gemma_path, QuantConfig("torchao_int4"))


@pytest.mark.parametrize("data_type", ["hqq_4bit", "torchao_int8"])
def test_missing_extra_is_refused_before_the_model_is_looked_for(monkeypatch, data_type):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        load_base("google/gemma-not-here", QuantConfig(data_type))
