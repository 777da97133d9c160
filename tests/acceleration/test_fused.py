"""The fast path over its operators in plain torch, and those operators by themselves.

On a GPU tests/acceleration/test_gpu.py says the same of the kernels, compiled and recorded.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, OFTConfig
from torch import Tensor

from medqlora.acceleration import (
    Acceleration,
    accelerate,
    find_backbone,
    fused,
    hidden_states,
    last_hidden,
    packed_attention,
    prepare_for_training,
    use_packed_attention,
)
from medqlora.acceleration.folding import (
    read_layer,
    why_no_kernels,
    why_not_fused,
    why_other_layers,
)
from medqlora.acceleration.fused import FusedBackbone, enable_fused, geglu
from medqlora.acceleration.operators import matmul
from medqlora.errors import ConfigError
from medqlora.finetuning import attach_adapter, load_adapter, save_adapter
from medqlora.quantization import QuantConfig, load_base
from medqlora.quantization.embedding import QuantizedEmbedding
from tests.acceleration.fast_path import (
    LINEARS,
    METHODS,
    OTHERS,
    VOCABULARY,
    adapt,
    curve,
    distance,
    layer_twice,
    relative,
    rows,
    run,
    save_wide_gemma,
    set_dropout,
)
from tests.quantization.conftest import save_gemma

operators: Any = torch.ops.medqlora


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_wide_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def adapted(folder):
    return adapt(folder, "cpu")


def set_up(model, *, fused: bool = True, again: Any = False, dropout: float = 0.0, **options):
    """A copy of the model, ready to be trained, on the fast path or on its plain layers."""
    model = copy.deepcopy(model)
    set_dropout(model, dropout)
    prepare_for_training(model, again)
    if fused:
        enable_fused(model, compile=False, gradient_checkpointing=again, **options)
    return model


# --- the whole path -------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "double_quant"), [(0, True), (3, True), (40, True), (3, False)])
def test_hidden_states_and_gradients_are_those_of_plain_layers(folder, prefix, double_quant):
    """Within bfloat16 rounding in another order: 3 % of the norm, 6 % for the worst gradient."""
    row, adapted = rows(1, prefix=prefix)[0], adapt(folder, "cpu", double_quant=double_quant)
    expected, gradients = run(set_up(adapted, fused=False), row)
    hidden, others = run(set_up(adapted), row)
    assert relative(hidden, expected) < 0.03
    assert max(relative(others[n], gradients[n]) for n in gradients) < 0.06


@pytest.mark.parametrize(("prefix", "rank"), [(0, 16), (3, 12)])
def test_in_float32_on_the_cpu_nothing_is_lost(tmp_path, prefix, rank):
    """Any size, any rank: hidden states within 1e-5 of the norm, every gradient within 1e-4."""
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 320}
    path = str(save_gemma(tmp_path, vocab_size=VOCABULARY, **sizes))
    row, model = rows(1, prefix=prefix)[0], adapt(path, "cpu", compute_dtype="float32", r=rank)
    expected, gradients = run(set_up(model, fused=False), row)
    hidden, others = run(set_up(model), row)
    assert hidden.dtype == torch.float32
    assert relative(hidden, expected) < 1e-5
    assert max(relative(others[n], gradients[n]) for n in gradients) < 1e-4


FOLDED = [("lora", "none"), *((method, "nf4") for method in METHODS), ("dora", "none")]


@pytest.mark.parametrize(("method", "data_type"), [*FOLDED, ("ia3", "none"), ("norms", "none")])
@pytest.mark.parametrize(
    ("dtype", "hidden", "gradient"), [("float32", 1e-5, 1e-4), ("bfloat16", 0.03, 0.06)]
)
def test_other_adapters_and_whole_weights_are_those_of_plain_layers(
    folder, method, data_type, dtype, hidden, gradient
):
    """In bfloat16 within its rounding in another order."""
    options = {"method": method, "data_type": data_type, "compute_dtype": dtype}
    row, model = rows(1, prefix=3)[0], adapt(folder, "cpu", **options)
    states, gradients = run(set_up(model, fused=False), row)
    others, their_gradients = run(set_up(model), row)
    assert relative(others, states) < hidden
    assert max(relative(their_gradients[n], gradients[n]) for n in gradients) < gradient


@pytest.mark.parametrize("method", METHODS)
def test_other_adapters_learn_what_they_learn_in_plain_layers(folder, method):
    """The mean distance over 6 updates, in nats, of losses that fall."""
    model = adapt(folder, "cpu", method=method, compute_dtype="float32")
    plain = curve(set_up(model, fused=False), steps=6)
    assert plain[-1] < plain[0]
    assert distance(curve(set_up(model), steps=6), plain) < 1e-4


@pytest.mark.parametrize("method", ["lora", *METHODS, *OTHERS])
def test_an_adapter_that_is_loaded_scores_as_it_was_trained(folder, method, tmp_path):
    """Frozen, so that nothing that is trained tells that it is there."""
    row = rows(1, prefix=3)[0]
    model = set_up(adapt(folder, "cpu", method=method, compute_dtype="float32"), fused=False).eval()
    save_adapter(model, tmp_path / "adapter")
    quant = QuantConfig("nf4", double_quant=True, compute_dtype="float32")
    base = load_base(folder, quant, device="cpu")
    use_packed_attention(base)
    accelerate(base, Acceleration(), "cpu", 1024)
    with torch.no_grad():
        expected, bare = last_hidden(model, row), last_hidden(base, row)
        loaded = load_adapter(base, tmp_path / "adapter")
        assert relative(last_hidden(loaded, row), expected) < 1e-5, "set up for the bare base"
        accelerate(loaded, Acceleration(), "cpu", 1024)
        assert relative(last_hidden(loaded, row), expected) < 1e-5
    assert relative(bare, expected) > 1e-3


@pytest.mark.parametrize("method", ["adalora", "vera"])
def test_dropout_of_other_adapters_keeps_its_expectation(folder, method):
    row = rows(1)[0]
    model = adapt(folder, "cpu", method=method, compute_dtype="float32")
    still, _ = run(set_up(model), row)
    for per in ("token", "row"):
        dropping = set_up(model, dropout=0.1, dropout_per=per)
        torch.manual_seed(0)
        passes = torch.stack([run(dropping, row)[0] for _ in range(8)])
        spread = float((passes - still).norm(dim=(1, 2)).mean())
        assert spread > 0
        assert float((passes.mean(0) - still).norm()) < 0.5 * spread


@pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch compiles for the CPU with a C++ compiler, and there is none",
)
@pytest.mark.parametrize(
    ("method", "data_type"), [("lora", "nf4"), ("dora", "none"), ("oft", "nf4")]
)
def test_compiled_on_the_cpu_it_gives_the_same(folder, method, data_type):
    """And plain layers, of OFT. The compiler cannot look into checks of shapes, hence a process."""
    arguments = f"{folder!r}, {method!r}, {data_type!r}"
    code = f"from tests.acceleration import fast_path; fast_path.compare_compiled({arguments})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    hidden, gradient = map(float, out.stdout.split()[-2:])
    assert hidden < 1e-5
    assert gradient < 1e-4


def test_what_is_computed_again_is_the_same(adapted):
    row = rows(1, prefix=3)[0]
    expected, gradients = run(set_up(adapted), row)
    for again in ("mlp", True, "offload"):
        hidden, others = run(set_up(adapted, again=again), row)
        assert relative(hidden, expected) < 1e-6, again
        assert max(relative(others[n], gradients[n]) for n in gradients) < 0.01, again


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_codes_that_are_kept_in_another_type_are_read_as_bytes(folder, storage):
    """As FSDP wants them; the kernels index bytes."""
    (plain, _), (kept, model) = (
        (read_layer(find_backbone(base).layers[0]), base)
        for base in (
            load_base(folder, QuantConfig("nf4", quant_storage=each), device="cpu")
            for each in (None, storage)
        )
    )
    for one, other in zip(plain[2:], kept[2:], strict=True):
        assert other.stored.packed.dtype == torch.uint8
        assert torch.equal(other.stored.packed.flatten(), one.stored.packed.flatten())
    weight = find_backbone(model).layers[0].mlp.up_proj.weight
    assert weight.dtype == getattr(torch, storage)
    assert weight.data_ptr() == kept.up.stored.packed.data_ptr()


def test_longer_angles_drop_what_was_recorded_with_shorter_ones(adapted):
    fast = FusedBackbone(adapted, compile=False, cuda_graphs=True)
    fast._rotary(8, torch.arange(8))
    assert fast._recorded is not None
    recorded: dict = {"shorter": None}
    fast._recorded._recorded = recorded
    fast._rotary(8, torch.arange(8))
    assert recorded
    fast._rotary(9, torch.arange(9))
    assert not recorded


def test_all_hidden_states_are_those_of_plain_layers(adapted):
    row = rows(1, prefix=3)[0]
    with torch.no_grad():
        plain, fast = (
            FusedBackbone(adapted, compile=False)(row, None),
            set_up(adapted).eval(),
        )
        assert relative(plain[row.last], last_hidden(fast, row)) < 0.01


def test_the_loss_curve_is_that_of_plain_layers(adapted):
    """Mean distance over 10 updates, in nats, of losses that fall."""
    plain = curve(set_up(adapted, fused=False), steps=10)
    assert plain[-1] < 0.5 * plain[0]
    assert distance(curve(set_up(adapted), steps=10), plain) < 0.01


@pytest.mark.parametrize("per", ["token", "row"])
def test_dropout_keeps_its_expectation_and_ends_with_training(adapted, per):
    row = rows(1)[0]
    model = set_up(adapted, dropout=0.1, dropout_per=per)
    torch.manual_seed(0)
    passes = torch.stack([run(model, row)[0] for _ in range(8)]).float()
    assert relative(passes[0], passes[1]) > 1e-3, "the same inputs were dropped twice"
    model.eval()
    with torch.no_grad():
        still = last_hidden(model, row)[: row.num_questions]
    assert relative(still, run(set_up(adapted), row)[0]) < 1e-6
    spread = float((passes - still.float()).norm(dim=(1, 2)).mean())
    assert float((passes.mean(0) - still.float()).norm()) < 0.5 * spread


@pytest.mark.parametrize("again", [False, True])
def test_dropout_of_a_row_drops_the_same_inputs_of_all_its_tokens(adapted, again):
    """They are columns of A without gradient; those that the forward pass drew, computed again."""
    torch.manual_seed(7)
    _, gradients = run(set_up(adapted, dropout=0.5, dropout_per="row", again=again), rows(1)[0])
    first = next(g for n, g in gradients.items() if "layers.0.self_attn.q_proj.lora_A" in n)
    torch.manual_seed(7)
    kept = F.dropout(torch.ones(first.shape[1]), 0.5) > 0
    assert torch.equal((first != 0).any(0), kept)


def test_where_it_can_be_taken_it_is_and_everything_runs_on_it(adapted, monkeypatch):
    row, model = rows(1, prefix=3)[0], set_up(adapted, fused=False).eval()
    told = accelerate(model, Acceleration(fused="on"), "cpu", 2048)
    assert told == "fast path, compile=none"
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(find_backbone(model), "forward", None)  # plain layers would call it
        assert relative(hidden_states(model, row)[row.last], last_hidden(model, row)) < 0.01
    assert accelerate(model, Acceleration(fused="off"), "cpu", 2048).startswith("plain layers")
    monkeypatch.setattr(FusedBackbone, "__call__", None)
    with torch.no_grad():
        last_hidden(model, row)


def test_a_base_without_adapter_scores_on_it(folder):
    row = rows(1)[0]
    model = adapt(folder, "cpu")
    with torch.no_grad(), model.disable_adapter():
        expected = last_hidden(model, row)
    base = model.unload()
    enable_fused(base, compile=False)
    with torch.no_grad():
        hidden = last_hidden(base, row)
    assert relative(hidden[: row.num_questions], expected[: row.num_questions]) < 0.03


# --- which models take it -------------------------------------------------------------------------


@pytest.mark.parametrize("float8", [False, True])
def test_setting_it_up_dequantises_no_embedding(folder, monkeypatch, float8):
    """That of Gemma-2B would take a GB, more than all of the base."""
    base = load_base(folder, QuantConfig("nf4", embedding="nf4"), device="cpu")

    def dequantize(self):
        raise AssertionError("the whole table was dequantised")

    monkeypatch.setattr(QuantizedEmbedding, "dequantize", dequantize)
    assert why_other_layers(base) is None
    enable_fused(base, compile=False, float8=float8)


def test_a_model_takes_it_on_the_cpu_and_on_cuda_only(adapted, monkeypatch):
    assert why_not_fused(adapted) is None
    assert why_no_kernels(adapted) is None
    monkeypatch.setattr(Tensor, "device", torch.device("mps"))
    assert why_not_fused(adapted) == "the model is on mps, not on CUDA or the CPU"


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, None),
        ({"use_dora": True, "lora_dropout": 0.1}, "DoRA with dropout drops what the base reads"),
        ({"lora_bias": True}, "the adapter is a variant of LoRA"),
        ({"alpha_pattern": {"q_proj": 8}}, "the adapter's scaling or dropout differs"),
        ({"modules_to_save": ["lm_head"]}, "is trained, which is no part of an adapter that it"),
        ({"target_modules": ["q_proj", "v_proj"]}, None),
    ],
)
def test_adapters_that_cannot_be_folded_are_told(folder, lora, reason):
    told = why_other_layers(adapt(folder, "cpu", **lora))
    assert (told is None) if reason is None else (reason in str(told)), told


@pytest.mark.parametrize(
    ("method", "data_type"),
    [("lora", "nf4"), *((method, "none") for method in ("lora", "dora", "vera", "ia3", "norms"))],
)
def test_an_adapter_that_is_switched_off_merged_or_taken_away_is_not_added(
    folder, method, data_type
):
    """After the fast path was set up; each time it is as plain layers have it."""
    row = rows(1, prefix=3)[0]
    options = {"method": method, "data_type": data_type, "compute_dtype": "float32"}
    plain, fast = (adapt(folder, "cpu", **options) for _ in range(2))
    enable_fused(fast, compile=False)

    def same(one, other) -> bool:
        with torch.no_grad():
            return relative(last_hidden(one, row), last_hidden(other, row)) < 1e-5

    assert same(fast, plain)
    with fast.disable_adapter():
        assert not same(fast, plain)
        with plain.disable_adapter():
            assert same(fast, plain)
    assert same(fast, plain)
    for model in (fast, plain):
        model.merge_adapter()
    assert same(fast, plain)
    for model in (fast, plain):
        model.unmerge_adapter()
    assert same(fast.unload(), plain.unload())


def test_adapters_that_are_off_merged_or_two_are_told(folder):
    model = adapt(folder, "cpu")
    with model.disable_adapter():
        assert why_other_layers(model) == "the adapter is switched off or merged"
    model.add_adapter("second", LoraConfig(r=16, target_modules=LINEARS))
    assert why_other_layers(model) == "there is more than one adapter"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data_type": "int8"}, "q_proj is stored neither in 4 bits nor in 16 or 32"),
    ],
)
def test_storages_that_it_does_not_read_are_told(folder, options, reason):
    assert reason in str(why_other_layers(load_base(folder, QuantConfig(**options), device="cpu")))


def test_layers_that_compute_in_different_types_are_told(folder):
    base = load_base(folder, QuantConfig("nf4"), device="cpu")
    base.model.layers[0].mlp.up_proj.compute_dtype = torch.float32
    assert why_other_layers(base) == "it computes all layers in bfloat16 or all in float32"


def test_a_pass_that_draws_again_what_it_drops_is_not_recorded(adapted):
    """A recorded pass cannot go back to what its generator drew, and stops the run if it must."""
    model = set_up(adapted, fused=False, dropout=0.1)

    def chosen(**options) -> str:
        options = {"gradient_checkpointing": True} | options
        return accelerate(model, Acceleration(**options), "cuda", 2048)

    assert chosen() == "fast path, compile=default"
    with pytest.raises(ConfigError, match="dropout_per=row"):
        chosen(compile="cuda_graphs")
    for recorded in ({"dropout_per": "row"}, {"gradient_checkpointing": False}):
        assert chosen(compile="cuda_graphs", **recorded) == "fast path, compile=cuda_graphs"
    set_dropout(model, 0.0)
    assert chosen() == "fast path, compile=cuda_graphs"


@pytest.mark.parametrize("fused", [True, False])
def test_without_its_adapter_a_model_with_learned_tokens_is_its_base(folder, fused):
    row = rows(1, prefix=3)[0]
    model = adapt(folder, "cpu", compute_dtype="float32", method="prompt_tuning")
    model = set_up(model, fused=fused)
    with torch.no_grad():
        learned = last_hidden(model, row)
        with model.disable_adapter():
            bare = last_hidden(model, row)
        disable = last_hidden(model.get_base_model(), row)
    assert torch.equal(bare, disable)
    assert relative(learned, bare) > 0.01


def test_sizes_that_its_kernels_do_not_take_are_told(tmp_path):
    narrow = save_gemma(tmp_path / "narrow", hidden_size=128, head_dim=96)
    base = load_base(str(narrow), QuantConfig("nf4"), device="cpu")
    assert why_no_kernels(base) == "its heads are 96 wide, not a power of two from 16 to 256"
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 256}
    base = load_base(str(save_gemma(tmp_path, **sizes)), QuantConfig("nf4"), device="cpu")
    assert why_no_kernels(base) == "q_proj is 192 x 192, not a multiple of 64 x 128"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compute_dtype": "float32"}, "it computes in bfloat16 with blocks of at most"),
        ({"block_size": 256}, "it computes in bfloat16 with blocks of at most 128 weights"),
    ],
)
def test_what_its_kernels_do_not_take_runs_on_the_cpu_all_the_same(folder, options, reason):
    model = adapt(folder, "cpu", **options)
    assert reason in str(why_no_kernels(model))
    assert why_not_fused(model) is None


def test_models_that_are_no_gemma_are_told(folder):
    for name, value, reason in (
        ("model_type", "gemma2", "it is made for Gemma 1, not for gemma2"),
        ("hidden_act", "relu", "the activation or the attention bias is not Gemma's"),
        ("attention_bias", True, "the activation or the attention bias is not Gemma's"),
    ):
        base = load_base(folder, QuantConfig("nf4"), device="cpu")
        setattr(base.config, name, value)
        assert why_other_layers(base) == reason


def test_an_adapter_of_another_kind_is_told(folder):
    base = load_base(folder, QuantConfig("nf4"), device="cpu")
    model = attach_adapter(base, OFTConfig(r=0, oft_block_size=32, target_modules=LINEARS))
    assert why_other_layers(model) == "it folds no adapters of the kind oft"


# --- the operators --------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("block_size", "quant_type"), [(64, "nf4"), (128, "nf4"), (64, "fp4")])
def test_the_effective_weight_is_what_bitsandbytes_reads_plus_the_adapter(
    double_quant, block_size, quant_type
):
    torch.manual_seed(0)
    packed, state = bnb.quantize_4bit(
        torch.randn(192, 256),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type=quant_type,
    )
    read = bnb.dequantize_4bit(packed, state)
    nested = state.state2 if double_quant else None
    stored = (
        packed,
        state.absmax,
        nested and nested.absmax,
        nested and nested.code,
        state.offset if double_quant else None,
        state.code,
    )
    a, b = torch.randn(16, 256), torch.randn(192, 16)
    fixed = (2.0, 192, 256, block_size)
    half, none = torch.bfloat16, (None, None)
    plain = operators.effective_weight(*stored, *none, *fixed, 1.0, half, False, False)
    assert torch.equal(plain, read.bfloat16())
    folded = operators.effective_weight(*stored, a, b, *fixed, 1.0, half, True, True)
    assert relative(folded, (read + 2 * b @ a).t()) < 3e-3
    assert folded.is_contiguous()
    float8 = torch.float8_e4m3fn
    small = operators.effective_weight(*stored, a, b, *fixed, 4.0, float8, False, False)
    assert small.dtype == float8
    assert relative(small.float() / 4, read + 2 * b @ a) < 0.04
    torch.library.opcheck(
        operators.effective_weight, (*stored, a, b, *fixed, 1.0, half, True, False)
    )


def test_the_gradients_of_the_adapter_are_its_products():
    torch.manual_seed(0)
    grad, down, b = torch.randn(50, 128), torch.randn(50, 16), torch.randn(128, 16)
    grad_down, grad_b = (parts.sum(0) for parts in operators.lora_gradient(grad, down, b))
    assert relative(grad_down, grad.double() @ b.double()) < 1e-5
    assert relative(grad_b, grad.double().t() @ down.double()) < 1e-5
    torch.library.opcheck(operators.lora_gradient, (grad.bfloat16(), down.bfloat16(), b.bfloat16()))


def test_a_product_is_added_in_place():
    torch.manual_seed(0)
    total, x, weight = torch.randn(9, 8), torch.randn(9, 16), torch.randn(8, 16)
    expected = total + x @ weight.t()
    operators.add_product_(total, x, weight)
    assert relative(total, expected) < 1e-6
    torch.library.opcheck(operators.add_product_, (total, x, weight))


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_layer_that_adds_in_place_gives_the_same_and_leaves_its_input(
    adapted, monkeypatch, prefix
):
    """What CUDA does where nothing is learned; compiled it is tested in `test_gpu.py`."""
    row = rows(1, prefix=prefix)[0]
    expected, _ = layer_twice(FusedBackbone(adapted, compile=False), row, row.cu_seqlens)
    monkeypatch.setattr(fused, "_adds_in_place", lambda *_: not torch.is_grad_enabled())
    learned, scored = layer_twice(FusedBackbone(adapted, compile=False), row, row.cu_seqlens)
    assert torch.equal(learned, expected)
    assert relative(scored, expected) < 0.01


def test_geglu_is_the_same_where_nothing_is_learned():
    torch.manual_seed(0)
    gate, up = 3 * torch.randn(2, 37, 64)
    with torch.no_grad():
        scored = geglu(gate.clone(), up.clone(), "tanh")
    for exact, tolerance in (
        (geglu(gate.double(), up.double(), "tanh"), 1e-6),
        (geglu(gate, up, "tanh"), 1e-5),
    ):
        torch.testing.assert_close(scored.double(), exact.double(), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("one_dnn", [False, torch.backends.mkldnn.is_available()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_their_definition_whoever_computes_them(monkeypatch, dtype, one_dnn):
    monkeypatch.setattr("medqlora.acceleration.operators.ONEDNN", one_dnn)
    a, b = torch.randn(37, 16).to(dtype), torch.randn(16, 21).to(dtype)
    for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
        product = matmul(left, right)
        assert product.dtype == dtype
        precise = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(product, (a.double() @ b.double()).to(dtype), **precise)


@pytest.mark.parametrize(("prefix", "ends"), [(0, [5, 12, 20, 20]), (3, [8, 9, 20, 20])])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_of_questions_is_that_of_a_padded_batch(prefix, ends, kv_heads):
    torch.manual_seed(0)
    boundaries = torch.tensor([0, *([prefix] if prefix else []), *ends], dtype=torch.int32)
    query, key, value = (
        torch.randn(20, heads * 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)
    )
    split = [t.unflatten(1, (-1, 8)) for t in (query, key, value)]
    cu_seqlens = boundaries[1:] if prefix else boundaries
    padded = packed_attention(*split, cu_seqlens, 20, 0.3, prefix).flatten(1)
    out, log_sum = operators.question_attention(query, key, value, boundaries, 4, 0.3, prefix)
    assert log_sum.shape == (20, 4)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad((padded * weight).sum(), (query, key, value))
    gradients = torch.autograd.grad((out * weight).sum(), (query, key, value))
    assert relative(out, padded) < 1e-5
    for gradient, other in zip(gradients, expected, strict=True):
        assert relative(gradient, other) < 1e-5
    torch.library.opcheck(
        operators.question_attention, (query, key, value, boundaries, 4, 0.3, prefix)
    )
