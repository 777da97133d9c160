"""Every adapter starts at the base, trains, comes back from disk, merges; or is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file, save_file

from medqlora.acceleration import last_hidden
from medqlora.config import CONFIG_DIR
from medqlora.errors import CheckpointError, ConfigError
from medqlora.finetuning import (
    attach_adapter,
    count_trainable,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from medqlora.quantization import dequantize
from tests.finetuning.conftest import Rows, option

ON_NF4 = [
    "lora_r4",
    "lora_r8",
    "lora_r16",
    "lora_r32",
    "lora_r64",
    "lora_attention",
    "lora_mlp",
    "rslora_r16",
    "dora_r16",
    "loftq_r16",
    "adalora",
    "ia3",
    "vera",
    "oft",
    "norms",
]
CASES = (
    [("nf4", name) for name in ON_NF4]
    + [("none", name) for name in ("lora_r4", "pissa_r16", "olora_r16", "full")]
    + [("int8", "lora_r4"), ("int8", "dora_r16"), ("fp4", "lora_r4")]
)


@pytest.mark.parametrize(("quant", "peft"), CASES)
def test_each_method_trains_two_steps_and_comes_back_and_merges(
    quant, peft, base, make_module, make_trainer, rows, tmp_path
):
    with torch.no_grad():
        before = last_hidden(base(quant), rows[0])
    module = make_module(quant, peft, optimizer="adamw", steps=2)
    with torch.no_grad():
        start = last_hidden(module.model, rows[0])
    if peft == "loftq_r16":
        assert not torch.equal(start, before)
    else:
        torch.testing.assert_close(start, before, rtol=0, atol=2e-4)
    make_trainer(max_steps=2).fit(module, Rows(rows))
    module.eval()
    with torch.no_grad():
        trained = last_hidden(module.model, rows[0])
    assert not torch.allclose(trained, start, rtol=0, atol=1e-5), "training changed nothing"

    save_adapter(module.model, tmp_path / "adapter", base_name="google/gemma-2b", revision="abc")
    again = load_adapter(base(quant), tmp_path / "adapter")
    with torch.no_grad():
        loaded = last_hidden(again, rows[0])
    # PiSSA and OLoRA come back as another factorisation of the same difference.
    tolerance = 1e-4 if peft in ("pissa_r16", "olora_r16") else 0
    torch.testing.assert_close(loaded, trained, rtol=0, atol=tolerance)

    merged = merge_adapter(again, dequantize, dtype=torch.float32)
    assert not isinstance(merged, PeftModel)
    assert not any(
        "lora" in n or "Linear4bit" in type(m).__name__ for n, m in merged.named_modules()
    )
    merged.set_attn_implementation("medqlora_packed")
    with torch.no_grad():
        folded = last_hidden(merged, rows[0])
    # LLM.int8 rounds activations too, which a merged model does not.
    torch.testing.assert_close(folded, trained, rtol=0, atol=0.1 if quant == "int8" else 1e-3)


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ],
)
def test_a_rewritten_base_may_have_other_ranks_and_scales_for_some_layers(
    base, rows, tmp_path, patterns
):
    targets = {"target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", **targets, **patterns)
    model = attach_adapter(base("none"), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
        expected = last_hidden(model, rows[0])
        save_adapter(model, tmp_path / "adapter")
        loaded = last_hidden(load_adapter(base("none"), tmp_path / "adapter"), rows[0])
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-4)


def test_every_option_of_the_group_is_tried_here():
    tried = {name for _, name in CASES} | {"none", "prompt_tuning"}
    assert {path.stem for path in (CONFIG_DIR / "peft").glob("*.yaml")} == tried


def test_no_adapter_leaves_the_base_alone_and_nothing_to_save(base, tmp_path):
    model = base("nf4")
    assert attach_adapter(model, option("peft", "none")) is model
    assert count_trainable(model) == 0
    with pytest.raises(ConfigError, match="peft=none trained nothing"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_fresh_adapter_leaves_the_base_model_unchanged(base, rows):
    """LoRA starts at B = 0, so step zero is the base model (Hu et al. 2021, section 4.1)."""
    model = base("nf4")
    with torch.no_grad():
        expected = last_hidden(model, rows[0])
        adapted = attach_adapter(model, option("peft", "lora_r16"))
        torch.testing.assert_close(last_hidden(adapted, rows[0]), expected, rtol=0, atol=0)


def test_trainable_numbers_are_those_of_the_formula(base):
    """Each matrix gets r (d_in + d_out) of them."""
    model = attach_adapter(base("nf4"), option("peft", "lora_r8"))
    widths = [(64, 64), (64, 16), (64, 16), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert count_trainable(model) == 2 * 8 * sum(a + b for a, b in widths)


@pytest.mark.parametrize(
    ("adapter_dtype", "stored"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_the_adapter_has_the_dtype_asked_for_on_a_16_bit_base(base, rows, adapter_dtype, stored):
    model = attach_adapter(
        base("nf4", "bfloat16"), option("peft", "lora_r4"), adapter_dtype=adapter_dtype
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {stored}
    hidden = last_hidden(model, rows[0])
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    assert all(p.grad.dtype == stored for p in model.parameters() if p.requires_grad)


def test_prompt_tuning_equals_stock_peft_one_question_at_a_time(
    base, make_module, make_trainer, rows, gemma_folder, tmp_path
):
    """Virtual tokens go before every question of a row, trained, saved and in stock peft."""
    module = make_module("nf4", "prompt_tuning")
    make_trainer(max_steps=2).fit(module, Rows(rows))
    save_adapter(module.model, tmp_path / "adapter", base_name=str(gemma_folder))
    ours = load_adapter(base("nf4"), tmp_path / "adapter")
    stock_base = base("nf4")
    stock_base.set_attn_implementation("sdpa")
    stock = PeftModel.from_pretrained(stock_base, tmp_path / "adapter").eval()
    with torch.no_grad():
        for row in rows[:3]:
            hidden = last_hidden(ours, row)
            assert torch.equal(hidden, last_hidden(module.model.eval(), row))
            for i in range(row.num_questions):
                question = row.input_ids[row.cu_seqlens[i] : row.cu_seqlens[i + 1]]
                expected = stock(question[None]).logits[0, -1]
                logits = ours.get_base_model().lm_head(hidden[i])
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_prompt_tuning_has_nothing_to_merge(base):
    model = attach_adapter(base("nf4"), option("peft", "prompt_tuning"))
    with pytest.raises(ConfigError, match="peft=prompt_tuning cannot be merged"):
        merge_adapter(model, dequantize)


def test_prefix_tuning_is_refused_by_name(base):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ConfigError, match="peft=prefix_tuning puts its tokens into"):
        attach_adapter(base("nf4"), config)


@pytest.mark.parametrize(
    ("quant", "peft", "says"),
    [
        ("nf4", "full", "peft=full cannot work on quantised weights"),
        ("int8", "full", "peft=full cannot work on quantised weights"),
        ("nf4", "pissa_r16", "peft=pissa cannot work on quantised weights"),
        ("nf4", "olora_r16", "peft=olora cannot work on quantised weights"),
        ("none", "loftq_r16", "quant=none has none"),
    ],
)
def test_what_a_base_cannot_carry_is_refused_by_name_in_one_line(base, quant, peft, says):
    with pytest.raises(ConfigError, match=says) as error:
        attach_adapter(base(quant), option("peft", peft))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    "named",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
    ],
)
def test_the_tied_embedding_is_never_trained(base, quant, named):
    """Its rows are the letters' output rows: scores and the merged model would use others."""
    with pytest.raises(ConfigError, match="embedding is its output head"):
        attach_adapter(base(quant), LoraConfig(task_type="CAUSAL_LM", r=4, **named))


def test_targets_that_do_not_exist_are_refused_in_one_line(base):
    with pytest.raises(ConfigError, match="does not work on this base") as error:
        attach_adapter(base("nf4"), LoraConfig(target_modules=["c_attn"]))
    assert "\n" not in str(error.value)


def test_a_plan_over_the_updates_needs_their_number(base):
    with pytest.raises(ConfigError, match="number is not known"):
        attach_adapter(base("nf4"), option("peft", "adalora"))


def test_loftq_starts_closer_to_the_original_than_plain_lora(base, rows):
    """Li et al. 2023: the adapter makes up for the rounding error, in part."""
    with torch.no_grad():
        original = last_hidden(base("none"), rows[0])
        quantised = last_hidden(base("fp4"), rows[0])
        loftq = last_hidden(attach_adapter(base("fp4"), option("peft", "loftq_r16")), rows[0])
    assert (loftq - original).norm() < 0.9 * (quantised - original).norm()


def test_the_folder_loads_in_stock_peft(
    base, make_module, make_trainer, rows, gemma_folder, tmp_path
):
    module = make_module("none", "lora_r4")
    make_trainer(max_steps=2).fit(module, Rows(rows))
    save_adapter(module.model, tmp_path / "adapter", base_name=str(gemma_folder))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    start, end = rows[0].cu_seqlens[1].item(), rows[0].cu_seqlens[2].item()
    with torch.no_grad():
        expected = stock.base_model.model.model(rows[0].input_ids[None, start:end])
        ours = last_hidden(module.model.eval(), rows[0])[1]
    torch.testing.assert_close(ours, expected.last_hidden_state[0, -1], rtol=0, atol=1e-4)


def test_the_base_is_recorded_as_the_user_named_it(base, tmp_path):
    model = attach_adapter(base("nf4"), option("peft", "lora_r4"))
    save_adapter(model, tmp_path / "adapter", base_name="google/gemma-2b", revision="9cf48e5")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/gemma-2b"
    assert config["revision"] == "9cf48e5"
    assert config["inference_mode"] is True
    assert str(tmp_path) not in json.dumps(config)


def test_saving_again_replaces_the_folder_whole(base, tmp_path):
    model = attach_adapter(base("nf4"), option("peft", "lora_r4"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old.txt").write_text("old")
    save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"], "a temporary folder was left"


@pytest.mark.parametrize(
    "damage", ["missing_key", "extra_key", "shape", "truncated", "absent", "config"]
)
def test_an_adapter_that_does_not_load_whole_is_refused(base, tmp_path, damage):
    save_adapter(attach_adapter(base("nf4"), option("peft", "lora_r4")), tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(iter(state))
    if damage == "missing_key":
        del state[name]
    elif damage == "extra_key":
        state[name.replace("layers.0", "layers.7")] = state[name].clone()
    elif damage == "shape":
        state[name] = torch.zeros(3, 3)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "absent":
        weights.unlink()
    elif damage == "config":
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": ')
    else:
        save_file(state, weights)
    with pytest.raises(CheckpointError) as error:
        load_adapter(base("nf4"), tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"layer_replication": [[0, 2]] * 1000}, "layer_replication"),
        ({"peft_type": "XLORA", "hidden_size": 8, "adapters": {"0": "/etc"}}, "XLORA"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}, "token"),
        ({"r": 10**12}, "r=1000000000000"),
        ({"r": -1}, "r=-1"),
        ({"r": "16"}, "r=16"),
        ({"rank_pattern": {"q_proj": 10**12}}, "rank_pattern"),
        ({"lora_alpha": "x"}, "does not make an adapter"),
        ({"target_modules": ["../../etc/passwd"]}, "does not make an adapter"),
        ({"target_modules": 3}, "adapter"),
        ({"target_modules": "("}, "adapter"),
        ({"peft_type": ["LORA"]}, "no config"),
        ({"peft_type": "../LORA"}, "no config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_hostile_adapter_config_is_refused_in_one_line(base, tmp_path, changes, says):
    """Of a module to import, a folder to read, or memory without end; nothing of it is tried."""
    save_adapter(attach_adapter(base("none"), option("peft", "lora_r4")), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=says) as error:
        load_adapter(base("none"), tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["none", "integers"])
def test_weights_that_are_none_are_refused(base, tmp_path, weights):
    save_adapter(attach_adapter(base("none"), option("peft", "lora_r4")), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = {name: tensor.int() for name, tensor in load_file(file).items()}
    save_file(state if weights == "integers" else {}, file)
    with pytest.raises(CheckpointError, match="no adapter"):
        load_adapter(base("none"), tmp_path / "adapter")


def test_names_of_weights_are_names_and_no_paths(base, tmp_path):
    save_adapter(attach_adapter(base("none"), option("peft", "lora_r4")), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {"../../../mark": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="mark"):
        load_adapter(base("none"), tmp_path / "adapter")
    assert [path.name for path in tmp_path.rglob("*mark*")] == []


def test_a_loaded_adapter_is_frozen_unless_asked(base, tmp_path):
    save_adapter(attach_adapter(base("nf4"), option("peft", "lora_r4")), tmp_path / "adapter")
    assert count_trainable(load_adapter(base("nf4"), tmp_path / "adapter")) == 0
    assert count_trainable(load_adapter(base("nf4"), tmp_path / "adapter", trainable=True)) > 0


def test_merging_never_rounds_to_4_bits(base, rows):
    """PEFT's own merge into a 4-bit layer rounds the sum again (peft issue 2321)."""
    model = attach_adapter(base("nf4"), option("peft", "lora_r4"))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    with torch.no_grad():
        expected = last_hidden(model, rows[0])
        merged = merge_adapter(model, dequantize, dtype=torch.float32)
        merged.set_attn_implementation("medqlora_packed")
        torch.testing.assert_close(last_hidden(merged, rows[0]), expected, rtol=0, atol=1e-3)


def test_a_merged_model_is_16_bit_and_loads_in_stock_transformers(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = attach_adapter(base("nf4", "bfloat16"), option("peft", "lora_r4"))
    merged = merge_adapter(model, dequantize)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.config._attn_implementation != "medqlora_packed"
    for (name, p), (_, q) in zip(merged.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(p, q), name
