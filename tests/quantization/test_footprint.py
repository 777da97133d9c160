"""Bytes are counted from the tensors that are there, and agree with the theory of each format."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from medqlora.errors import ConfigError
from medqlora.quantization import (
    QuantConfig,
    code_levels,
    dequantized_weight,
    footprint,
    load_base,
    rounding_error,
    within_blocks,
)

NF4 = QuantConfig("nf4", double_quant=True)
FULL = QuantConfig("nf4", double_quant=True, embedding="nf4")


@pytest.mark.parametrize(
    ("quant", "bits"),
    [
        (QuantConfig("nf4", double_quant=True), 4.127),
        (QuantConfig("fp4", double_quant=True), 4.127),
        (QuantConfig("nf4", double_quant=False), 4.5),
        (QuantConfig("nf4", double_quant=False, block_size=128), 4.25),
        (QuantConfig("nf4", double_quant=True, block_size=128), 4.0635),
        (QuantConfig("int8"), 8 + 32 / 128),
        (QuantConfig("none"), 16),
        (QuantConfig("none", compute_dtype="float32"), 32),
    ],
)
def test_bits_per_weight_are_those_of_the_theory(gemma_path, quant, bits):
    """Dettmers et al. 2023, section 3; a mean of the block constants is 32 bits a layer more."""
    layer = footprint(load_base(gemma_path, quant)).layers["model.layers.1.mlp.up_proj"]
    assert layer.bits_per_weight == pytest.approx(bits, abs=2e-3)
    if quant.data_type != "int8":
        assert layer.bits_per_weight == pytest.approx(quant.bits, abs=2e-3)


@pytest.mark.parametrize(("embedding", "bits"), [("bf16", 16), ("int8", 8.25), ("nf4", 4.127)])
def test_embedding_is_counted_once_with_its_head(gemma_path, embedding, bits):
    measured = footprint(
        load_base(gemma_path, QuantConfig("nf4", embedding=embedding, double_quant=True))
    )
    assert measured.parts["embedding"]["num_parameters"] == 300 * 128
    layer = measured.layers["model.embed_tokens"]
    assert layer.bits_per_weight == pytest.approx(bits, abs=6e-3)


def test_parameters_are_those_of_the_16_bit_model_and_parts_add_up(gemma_path):
    reference = AutoModelForCausalLM.from_pretrained(gemma_path, dtype=torch.bfloat16)
    count = sum(p.numel() for p in reference.parameters())
    for quant in (QuantConfig("none"), QuantConfig("int8"), NF4, FULL):
        measured = footprint(load_base(gemma_path, quant))
        assert measured.num_parameters == count
        assert measured.num_bytes == sum(p["num_bytes"] for p in measured.parts.values())
        layers = sum(layer.num_bytes for layer in measured.layers.values())
        assert layers == measured.num_bytes - measured.parts["other"]["num_bytes"]
        assert measured.weight_gb_16bit == 2 * count / 1e9
    assert footprint(reference).num_bytes >= 2 * count


def test_forward_passes_do_not_change_the_footprint(gemma_path, token_ids):
    for quant in (QuantConfig("int8"), FULL):
        model = load_base(gemma_path, quant)
        before = footprint(model)
        with torch.no_grad():
            model(token_ids)
        assert footprint(model) == before


def test_adapter_is_a_part_of_its_own(gemma_path):
    base = footprint(load_base(gemma_path, NF4))
    model = get_peft_model(load_base(gemma_path, NF4), LoraConfig(r=4, target_modules=["q_proj"]))
    measured = footprint(model)
    assert measured.parts["adapter"]["num_parameters"] == 2 * 4 * (128 + 128)
    for part in ("embedding", "attention", "mlp", "norms"):
        assert measured.parts[part] == base.parts[part]
    assert measured.layers["model.layers.0.self_attn.q_proj"].part == "attention"


def test_rounding_error_is_what_the_formats_promise_for_normal_weights(gemma_path):
    """For normal weights NF4 errs less than FP4, 8 bits far less (arXiv:2305.14314, section 3)."""
    errors = {
        kind: rounding_error(
            load_base(gemma_path, QuantConfig(kind, embedding=embedding)), gemma_path
        )
        for kind, embedding in (("nf4", "nf4"), ("fp4", "bf16"), ("int8", "int8"))
    }
    name = "model.layers.0.mlp.up_proj"
    assert 0.08 < errors["nf4"][name] < 0.10 < errors["fp4"][name] < 0.14
    assert errors["int8"][name] < 0.01
    assert 0.08 < errors["nf4"]["model.embed_tokens"] < 0.10
    assert "model.embed_tokens" not in errors["fp4"]
    assert len(errors["nf4"]) == 15


def test_rounding_error_is_found_below_an_adapter(gemma_path):
    base = rounding_error(load_base(gemma_path, FULL), gemma_path)
    model = get_peft_model(load_base(gemma_path, FULL), LoraConfig(r=4, target_modules=["q_proj"]))
    assert rounding_error(model, gemma_path) == base


def test_wider_blocks_err_more(gemma_path):
    errors = [
        sum(
            rounding_error(
                load_base(gemma_path, QuantConfig("nf4", block_size=b)), gemma_path
            ).values()
        )
        for b in (64, 128)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
def test_stored_weights_take_only_the_values_of_their_code(gemma_path, data_type):
    """Dettmers et al. 2023, appendix E: within a block there is a value of the code, no other."""
    levels = torch.tensor(code_levels(data_type))
    assert len(levels) == 16
    assert levels.diff().min() >= 0
    assert levels.abs().max() == 1
    base = load_base(gemma_path, QuantConfig(data_type, compute_dtype="float32"))
    layer = base.model.layers[0].mlp.up_proj
    scaled = within_blocks(dequantized_weight(layer))
    distance = (scaled[:, None] - levels).abs().min(dim=1).values
    # The largest of a block is stored as 1 in NF4; in FP4 as well, for its values are normalised.
    assert distance.max() < 1e-5


def test_within_blocks_each_block_has_its_own_largest():
    weight = torch.tensor([[1.0, -2.0, 0.5, 4.0], [0.0, 0.0, 3.0, -6.0], [5.0, 1.0, 0.0, 0.0]])
    found = within_blocks(weight[:, :3].reshape(1, -1), block_size=4)
    torch.testing.assert_close(found, torch.tensor([0.5, -1.0, 0.25, 0.0, 0.0, 0.6, 1.0, 0.2, 0.0]))
    assert not within_blocks(torch.zeros(70)).any()


def test_a_code_without_a_table_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="evenly spaced"):
        code_levels("int8")
