"""What is loaded is stock Gemma, rounded exactly as bitsandbytes rounds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from medqlora.errors import ConfigError, ModelError
from medqlora.quantization import QuantConfig, checkpoint, dequantize, load_base, local_device
from medqlora.quantization.checkpoint import Checkpoint
from tests.quantization.conftest import save_gemma

PLAIN = QuantConfig("none", skip_modules=())
FULL = QuantConfig("nf4", double_quant=True, embedding="nf4")


def stock(path, **bnb):
    quant = BitsAndBytesConfig(**bnb) if bnb else None
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=quant
    )
    for module in model.modules():  # see test_eval_mode_does_not_cost_the_gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize(
    ("quant", "bnb"),
    [
        (PLAIN, {}),
        (QuantConfig("int8"), {"load_in_8bit": True}),
        *(
            (
                QuantConfig(kind, double_quant=double),
                {
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": kind,
                    "bnb_4bit_use_double_quant": double,
                    "bnb_4bit_compute_dtype": torch.bfloat16,
                },
            )
            for kind in ("nf4", "fp4")
            for double in (True, False)
        ),
    ],
    ids=["none", "int8", "nf4 double", "nf4 single", "fp4 double", "fp4 single"],
)
def test_logits_equal_those_of_stock_transformers(gemma_path, token_ids, quant, bnb):
    expected = logits(stock(gemma_path, **bnb), token_ids)
    loaded = logits(load_base(gemma_path, quant), token_ids)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("data_type", ["none", "int8", "fp4", "nf4"])
@pytest.mark.parametrize("embedding", ["bf16", "int8", "nf4"])
def test_base_is_frozen_in_eval_mode_and_nothing_is_upcast(
    gemma_path, token_ids, compute_dtype, data_type, embedding
):
    quant = QuantConfig(data_type, compute_dtype=compute_dtype, embedding=embedding)
    model = load_base(gemma_path, quant)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    norms = [p.dtype for name, p in model.named_parameters() if "norm" in name]
    assert set(norms) == {quant.torch_dtype}
    assert model.get_input_embeddings()(token_ids).dtype == quant.torch_dtype
    assert logits(model, token_ids).dtype == quant.torch_dtype
    assert logits(model, token_ids).isfinite().all()


def test_head_is_the_embedding(gemma_path):
    model = load_base(gemma_path, QuantConfig("nf4"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("block_size", [64, 128])
def test_block_size_reaches_the_layers(gemma_path, block_size):
    layer = load_base(gemma_path, QuantConfig("nf4", block_size=block_size)).model.layers[0]
    state = layer.mlp.up_proj.weight.quant_state
    assert state.blocksize == block_size
    assert state.absmax.numel() == 128 * 256 // block_size


def test_quant_storage_has_the_dtype_that_fsdp_flattens(gemma_path, token_ids):
    plain = load_base(gemma_path, QuantConfig("nf4", double_quant=True))
    model = load_base(gemma_path, QuantConfig("nf4", double_quant=True, quant_storage="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model, token_ids), logits(plain, token_ids))


def test_skipped_modules_keep_their_weight(gemma_path):
    model = load_base(
        gemma_path, QuantConfig("nf4", skip_modules=["lm_head", "layers.0", "v_proj"])
    )
    reference = stock(gemma_path)
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight, reference.model.layers[0].mlp.up_proj.weight
    )
    assert type(model.model.layers[1].self_attn.v_proj) is torch.nn.Linear
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.uint8


def adapted(path, quant):
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(load_base(path, quant), LoraConfig(r=4, target_modules=names))


@pytest.mark.parametrize("data_type", ["none", "int8", "nf4"])
def test_eval_mode_does_not_cost_the_gradient(gemma_path, token_ids, data_type):
    """With AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward in eval mode.

    After that its layers let no gradient through: a validation would end the training of the
    layers below.
    """
    model = adapted(gemma_path, QuantConfig(data_type, embedding="nf4"))
    logits(model.eval(), token_ids)
    model.train()(token_ids).logits.float().square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert len(gradients) == 14
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize(
    "quant", [QuantConfig("nf4", double_quant=True), FULL], ids=["nf4", "full"]
)
def test_train_and_eval_mode_give_the_same_logits(gemma_path, token_ids, quant):
    model = load_base(gemma_path, quant)
    before = logits(model.train(), token_ids)
    torch.testing.assert_close(logits(model.eval(), token_ids), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(model.train(), token_ids), before, rtol=0, atol=0)


def test_int8_in_train_mode_differs_by_the_rounding_of_activations_only(gemma_path, token_ids):
    """On a CPU bitsandbytes rounds the input in eval mode only (MatMul8bitLt, MatMul8bitFp)."""
    model = load_base(gemma_path, QuantConfig("int8"))
    trained, scored = logits(model.train(), token_ids), logits(model.eval(), token_ids)
    assert (trained - scored).norm() < 0.03 * scored.norm()


@pytest.mark.parametrize("data_type", ["int8", "nf4"])
@pytest.mark.parametrize("embedding", ["bf16", "int8", "nf4"])
def test_dequantised_model_is_plain_and_says_the_same(
    gemma_path, token_ids, data_type, embedding, tmp_path
):
    model = load_base(
        gemma_path, QuantConfig(data_type, compute_dtype="float32", embedding=embedding)
    )
    expected = logits(model.train(), token_ids)  # in train mode int8 does not round its input
    plain = dequantize(model, torch.float32)
    torch.testing.assert_close(logits(plain, token_ids), expected, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, token_ids), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def no_weight_is_read(monkeypatch):
    def refuse(self, *args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(Checkpoint, "chunks", refuse)


@pytest.mark.parametrize(
    ("quant", "named"),
    [
        (QuantConfig("nf4", skip_modules=["embed_token"]), "embed_token"),
        (QuantConfig("nf4", skip_modules=["proj"]), "q_proj"),
        (QuantConfig("nf4", skip_modules=["layers"]), "no layer"),
        (QuantConfig("nf4", block_size=256), "quant.block_size=64 or 128"),
        (QuantConfig("none", embedding="nf4", block_size=256), "embed_tokens"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_a_weight_is_read(
    gemma_path, no_weight_is_read, quant, named
):
    with pytest.raises(ConfigError) as caught:
        load_base(gemma_path, quant)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def edited(gemma_path, folder, **changes):
    shutil.copytree(gemma_path, folder, dirs_exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised already"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type=llama"),
        ({"model_type": "gemma2"}, "model_type=gemma2"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_other_models_are_refused_before_a_weight_is_read(
    gemma_path, tmp_path, no_weight_is_read, changes, named
):
    with pytest.raises(ModelError, match=named) as caught:
        load_base(edited(gemma_path, tmp_path, **changes), QuantConfig("nf4"))
    assert "\n" not in str(caught.value)


def test_models_code_never_runs(gemma_path, tmp_path):
    code = "raise SystemExit('the code of the model ran')"
    folder = edited(gemma_path, tmp_path, auto_map={"AutoConfig": "own.Config"})
    Path(folder, "own.py").write_text(code)
    load_base(folder, QuantConfig("nf4"))


def test_folder_without_weights_config_or_existence_is_one_line(gemma_path, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(gemma_path, "config.json"), bare)
    for path, named in [
        (empty, "no config.json"),
        (bare, "no safetensors weights"),
        (tmp_path / "nowhere", "no folder"),
    ]:
        with pytest.raises(ModelError, match=named) as caught:
            load_base(str(path), QuantConfig("nf4"))
        assert "\n" not in str(caught.value)


def test_missing_hub_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="google/gemma-not-here") as caught:
        load_base("google/gemma-not-here", QuantConfig("nf4"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def fake_hub(gemma_path, tmp_path, monkeypatch):
    """A hub that has `me/gemma` at commit abc; lists the files it was asked for."""
    asked = []
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)

    def download(path, name, revision=None):
        assert (path, revision) == ("me/gemma", "abc")
        asked.append(name)
        if not Path(gemma_path, name).exists():
            raise EntryNotFoundError(name)
        return str(shutil.copy(Path(gemma_path, name), snapshot / name))

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    return asked


def test_hub_model_is_read_at_its_revision(gemma_path, fake_hub, token_ids):
    model = load_base("me/gemma", PLAIN, revision="abc")
    expected = logits(load_base(gemma_path, PLAIN), token_ids)
    assert torch.equal(logits(model, token_ids), expected)
    assert (model.name_or_path, model.config._commit_hash) == ("me/gemma", "abc")


def test_options_that_do_not_fit_cost_no_download_of_weights(fake_hub):
    with pytest.raises(ConfigError):
        load_base("me/gemma", QuantConfig("nf4", skip_modules=["nothing"]), revision="abc")
    assert fake_hub == ["config.json"]


def test_second_load_of_a_hub_model_needs_its_copy_only(fake_hub, tmp_path):
    load_base("me/gemma", FULL, revision="abc", cache_dir=tmp_path / "copies")
    fake_hub.clear()
    load_base("me/gemma", FULL, revision="abc", cache_dir=tmp_path / "copies")
    assert fake_hub == ["config.json"]


def test_damaged_missing_and_foreign_weights_are_one_line(gemma_path, tmp_path):
    def copy(name):
        shutil.copytree(gemma_path, tmp_path / name)
        return tmp_path / name, sorted((tmp_path / name).glob("*.safetensors"))

    torn, shards = copy("torn")
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    lost, shards = copy("lost")
    shards[0].unlink()
    short, shards = copy("short")
    index = next(short.glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    narrow, shards = copy("narrow")
    tensors = load_file(shards[-1])
    name = next(name for name in tensors if name.endswith("proj.weight"))
    save_file(tensors | {name: tensors[name][:, :-2].contiguous()}, shards[-1])
    for folder, named in [
        (torn, "damaged"),
        (lost, "lacks"),
        (short, "no weight model.norm.weight"),
        (narrow, "has shape"),
    ]:
        with pytest.raises(ModelError, match=named) as caught:
            load_base(str(folder), QuantConfig("nf4"))
        assert "\n" not in str(caught.value)


def test_one_file_is_read_like_several(tmp_path, token_ids, gemma_path):
    one = load_base(str(save_gemma(tmp_path)), PLAIN)
    torch.testing.assert_close(
        logits(one, token_ids), logits(load_base(gemma_path, PLAIN), token_ids)
    )


def test_rank_gets_its_own_gpu_and_no_other(monkeypatch):
    assert local_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK=2"):
        local_device()


def test_cuda_without_a_gpu_is_refused(monkeypatch, gemma_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="trainer=cpu"):
        load_base(gemma_path, QuantConfig("nf4"), device="cuda")


@pytest.mark.parametrize("quant", [QuantConfig("int8"), FULL], ids=["int8", "full"])
def test_adapter_saved_by_peft_reloads_onto_a_fresh_base(gemma_path, token_ids, tmp_path, quant):
    model = adapted(gemma_path, quant).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(gemma_path, quant), tmp_path).eval()
    expected = logits(model, token_ids)
    torch.testing.assert_close(logits(again, token_ids), expected, rtol=0, atol=0)
    assert not torch.equal(logits(load_base(gemma_path, quant), token_ids), expected)


def test_adapter_merges_into_the_dequantised_base(gemma_path, token_ids, tmp_path):
    """What was trained is rounded base + adapter; merging it changes rounding only."""
    quant = QuantConfig("nf4", double_quant=True, compute_dtype="float32", embedding="nf4")
    model = adapted(gemma_path, quant).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path / "adapter")
    plain = dequantize(load_base(gemma_path, quant), torch.float32)
    merged = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, token_ids), expected, rtol=1e-3, atol=1e-3)
