"""Every switch of speed and memory gives the same answers and the same loss curve on a GPU."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from medqlora.acceleration import (
    Acceleration,
    accelerate,
    cover_padding,
    hidden_states,
    last_hidden,
    make_room,
    packed_attention,
    prepare_for_training,
)
from medqlora.acceleration.backbone import find_backbone
from medqlora.acceleration.folding import why_not_fused
from medqlora.acceleration.fused import FusedBackbone
from medqlora.acceleration.memory import scoring_bytes
from medqlora.errors import ConfigError
from tests.acceleration import fast_path
from tests.acceleration.fast_path import BUDGET, distance, relative, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PLAIN = {"fused": "off", "compile": "none"}
FAST = {
    "eager": {"fused": "on", "compile": "none"},
    "compiled": {"fused": "on", "compile": "default"},
    "cuda_graphs": {"fused": "on", "compile": "cuda_graphs"},
    "mlp": {"fused": "on", "compile": "default", "gradient_checkpointing": "mlp"},
    "layers": {"fused": "on", "compile": "default", "gradient_checkpointing": True},
    "layers_cuda_graphs": {
        "fused": "on",
        "compile": "cuda_graphs",
        "gradient_checkpointing": True,
    },
    "offload": {"fused": "on", "compile": "default", "gradient_checkpointing": "offload"},
    "plain_compiled": {"fused": "off", "compile": "default"},
    "plain_cuda_graphs": {"fused": "off", "compile": "cuda_graphs"},
    "plain_layers_compiled": {
        "fused": "off",
        "compile": "default",
        "gradient_checkpointing": True,
    },
    "plain_layers_cuda_graphs": {
        "fused": "off",
        "compile": "cuda_graphs",
        "gradient_checkpointing": True,
    },
    "plain_mlp_cuda_graphs": {
        "fused": "off",
        "compile": "cuda_graphs",
        "gradient_checkpointing": "mlp",
    },
    "plain_mlp": {**PLAIN, "gradient_checkpointing": "mlp"},
    "plain_offload": {**PLAIN, "gradient_checkpointing": "offload"},
}


rows, curve = partial(fast_path.rows, device="cuda"), partial(fast_path.curve, device="cuda")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return fast_path.adapt(fast_path.save_wide_gemma(tmp_path_factory.mktemp("gemma")), "cuda")


def set_up(model, options, dropout: float = 0.0):
    """A copy of the model that runs as the options say, ready to be trained."""
    model = copy.deepcopy(model)
    fast_path.set_dropout(model, dropout)
    prepare_for_training(model, options.get("gradient_checkpointing", False))
    accelerate(model, Acceleration(**options), "cuda", BUDGET)
    return model


def test_the_model_takes_the_fast_path(adapted):
    assert why_not_fused(adapted) is None


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        *((name, 0) for name in FAST),
        *((name, 3) for name in ("eager", "cuda_graphs", "mlp", "plain_compiled")),
        *((name, 40) for name in ("eager", "plain_cuda_graphs")),
    ],
)
def test_hidden_states_and_gradients_are_those_of_plain_layers(adapted, name, prefix):
    """Within bfloat16 rounding in another order: 3 % of the norm, 6 % for the worst gradient."""
    row = rows(1, prefix=prefix)[0]
    expected, gradients = run(set_up(adapted, PLAIN), row)
    model = set_up(adapted, FAST[name])
    for _ in range(2):  # a recorded pass must be as good as the pass it was recorded from
        hidden, others = run(model, row)
    assert relative(hidden, expected) < 0.03
    assert max(relative(others[n], gradients[n]) for n in gradients) < 0.06


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fast_path.save_wide_gemma(tmp_path_factory.mktemp("other"))


FOLDED = [("lora", "none"), *((method, "nf4") for method in fast_path.METHODS), ("dora", "none")]


@pytest.mark.parametrize(("method", "data_type"), FOLDED)
def test_other_adapters_and_whole_weights_are_those_of_plain_layers(folder, method, data_type):
    """Not compiled and recorded, likewise; and where nothing is learned."""
    row = rows(1, prefix=3)[0]
    model = fast_path.adapt(folder, "cuda", method=method, data_type=data_type)
    expected, gradients = run(set_up(model, PLAIN), row)
    for name in ("eager", "cuda_graphs", "layers"):
        fast = set_up(model, FAST[name])
        for _ in range(2):
            hidden, others = run(fast, row)
        assert relative(hidden, expected) < 0.03, name
        assert max(relative(others[n], gradients[n]) for n in gradients) < 0.06, name
        with torch.no_grad():
            scored = last_hidden(fast, row)[: row.num_questions]
        assert relative(scored, expected) < 0.03, name


@pytest.mark.parametrize(("method", "data_type"), FOLDED)
def test_other_adapters_and_whole_weights_in_8_bit_floats(folder, method, data_type):
    """As far from 16 bit as plain LoRA on 4 bits is: what was not folded would be all of it."""
    row = rows(1)[0]
    model = fast_path.adapt(folder, "cuda", method=method, data_type=data_type)
    expected, gradients = run(set_up(model, PLAIN), row)
    hidden, others = run(set_up(model, {**FAST["eager"], "float8": True}), row)
    assert relative(hidden, expected) < 0.15
    assert max(relative(others[n], gradients[n]) for n in gradients) < 0.4


@pytest.mark.parametrize(
    ("method", "data_type", "name"),
    [
        ("lora", "int8", "plain_compiled"),
        *((method, "nf4", "plain_compiled") for method in fast_path.OTHERS),
        *((method, "nf4", "plain_cuda_graphs") for method in fast_path.OTHERS),
    ],
)
def test_what_the_fast_path_does_not_take_is_compiled_to_the_same(folder, method, data_type, name):
    """Behind shared tokens, in learning and where nothing is learned."""
    row = rows(1, prefix=3)[0]
    model = fast_path.adapt(folder, "cuda", method=method, data_type=data_type)
    assert why_not_fused(model)
    expected, gradients = run(set_up(model, PLAIN), row)
    compiled = set_up(model, FAST[name])
    for _ in range(2):
        hidden, others = run(compiled, row)
    assert relative(hidden, expected) < 0.03
    assert max(relative(others[n], gradients[n]) for n in gradients) < 0.06
    with torch.no_grad():
        scored = last_hidden(compiled, row)[: row.num_questions]
    assert relative(scored, expected) < 0.03


@pytest.mark.parametrize("name", ["eager", "cuda_graphs", "layers", "plain_cuda_graphs"])
def test_of_every_token_they_are_those_of_plain_layers_as_well(adapted, name):
    """What the losses over tokens and explanations read."""
    row, model = rows(1, prefix=3)[0], set_up(adapted, FAST[name])
    expected, gradients = run(set_up(adapted, PLAIN), row)
    for _ in range(2):
        hidden, others = run(model, row, lambda m, r: hidden_states(m, r).index_select(0, r.last))
    assert relative(hidden, expected) < 0.03
    assert max(relative(others[n], gradients[n]) for n in gradients) < 0.06


@pytest.mark.parametrize("options", ["eager", "cuda_graphs"])
def test_codes_kept_in_the_type_of_other_weights_are_the_same_codes(folder, options):
    """As quant=nf4_fsdp keeps them."""
    row = rows(1)[0]
    found = []
    for storage in (None, "bfloat16"):
        model = fast_path.adapt(folder, "cuda", quant_storage=storage)
        found.append(run(set_up(model, FAST[options]), row))
    (hidden, gradients), (again, others) = found
    assert torch.equal(again, hidden)
    assert max(relative(others[n], gradients[n]) for n in gradients) < 1e-3


@pytest.mark.parametrize("rank", [4, 12, 128])
def test_any_rank_is_folded(folder, rank):
    row, model = rows(1)[0], fast_path.adapt(folder, "cuda", r=rank)
    expected, gradients = run(set_up(model, PLAIN), row)
    hidden, others = run(set_up(model, FAST["eager"]), row)
    assert relative(hidden, expected) < 0.03
    assert max(relative(others[n], gradients[n]) for n in gradients) < 0.06


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
def test_scoring_adds_in_place_and_leaves_the_input_of_a_layer(adapted, prefix, compile):
    row = rows(1, prefix=prefix)[0]
    boundaries = F.pad(cover_padding(row.cu_seqlens, BUDGET, row.max_length), (1, 0))
    fast = FusedBackbone(copy.deepcopy(adapted), compile=compile)
    learned, scored = fast_path.layer_twice(fast, row, boundaries)
    assert relative(scored, learned) < 0.01


@pytest.fixture(scope="module")
def plain_curve(adapted):
    return curve(set_up(adapted, PLAIN))


def test_there_is_something_to_learn(plain_curve):
    assert sum(plain_curve[-5:]) / 5 < 0.8 * sum(plain_curve[:5]) / 5
    assert plain_curve[0] > math.log(4) / 2


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (FAST["compiled"], 0.03),
        (FAST["cuda_graphs"], 0.03),
        (FAST["layers"], 0.03),
        ({**FAST["compiled"], "float8": True}, 0.10),
    ],
    ids=["compiled", "cuda_graphs", "layers", "float8"],
)
def test_the_loss_curve_is_that_of_plain_layers(adapted, plain_curve, options, tolerance):
    """Mean distance over 40 updates in nats; 8-bit floats may differ more, and are an option."""
    assert distance(curve(set_up(adapted, options)), plain_curve) < tolerance


@pytest.mark.parametrize(
    ("name", "per"),
    [
        *itertools.product(["eager", "compiled", "cuda_graphs", "layers"], ["token", "row"]),
        ("layers_cuda_graphs", "row"),
    ],
)
def test_dropout_keeps_the_fast_path_and_its_expectation(adapted, name, per):
    """Each pass drops other inputs; the mean over passes comes near the pass without dropout."""
    row = rows(1)[0]
    model = set_up(adapted, {**FAST[name], "dropout_per": per}, dropout=0.1)
    assert why_not_fused(model) is None
    passes = torch.stack([run(model, row)[0] for _ in range(24)]).float()
    assert relative(passes[0], passes[1]) > 1e-3, "the same inputs were dropped twice"
    model.eval()
    with torch.no_grad():
        still = last_hidden(model, row)[: row.num_questions]
    assert relative(still, run(set_up(adapted, FAST["eager"]), row)[0]) < 0.03
    spread = float((passes - still.float()).norm(dim=(1, 2)).mean())
    assert float((passes.mean(0) - still.float()).norm()) < 0.5 * spread


def test_a_recorded_pass_takes_no_more_memory_than_the_pass(adapted):
    """What the first passes took is given back before they are recorded.

    The row is long beside the workspace that cuBLAS takes for each stream.
    """
    row = rows(1, times=32)[0]

    def peak(options) -> int:
        model = set_up(adapted, options)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(model, row)
        return torch.cuda.max_memory_allocated() - before

    assert peak(FAST["cuda_graphs"]) < 1.3 * peak(FAST["compiled"])


@pytest.mark.parametrize("name", ["cuda_graphs", "plain_cuda_graphs"])
def test_recorded_gradients_add_up_and_stay(adapted, name):
    """They lie in the memory of the graph, where the next pass writes: it must not lose them."""
    window = [*rows(2), *rows(1)]
    model = set_up(adapted, FAST[name])
    separate = [run(model, row)[1] for row in window]
    model.zero_grad()
    for row in window:
        hidden = last_hidden(model, row)
        weight = torch.linspace(-1, 1, hidden.shape[1], device="cuda")
        (hidden[: row.num_questions].float() @ weight).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = sum(gradients[name].double() for gradients in separate)
            assert relative(p.grad, expected) < 1e-5, name


@pytest.mark.parametrize("name", ["cuda_graphs", "plain_cuda_graphs"])
def test_recorded_passes_make_room_for_scoring_where_there_is_none(adapted, name):
    def free() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    row, model, tokens = rows(1, times=32)[0], set_up(adapted, FAST[name]), 1 << 20
    config = find_backbone(model).config
    before = run(model, row)
    there, of_row = free(), 2 * len(row.input_ids) * config.hidden_size
    make_room(model, tokens)
    assert free() < there + of_row
    left = scoring_bytes(config, tokens) // 2
    taken = torch.empty(free() - left, dtype=torch.uint8, device="cuda")
    there = free()
    make_room(model, tokens)
    assert free() > there + 4 * of_row
    del taken
    after = run(model, row)
    assert torch.equal(after[0], before[0])
    for parameter, gradient in before[1].items():
        assert torch.equal(after[1][parameter], gradient), parameter


def test_what_cannot_be_recorded_is_told_in_a_line(adapted):
    """And it is found before it is recorded, which would leave torch's generator broken."""
    model = set_up(adapted, FAST["plain_cuda_graphs"])
    find_backbone(model).norm.register_forward_hook(lambda _, args, out: out * out.max().item())
    with pytest.raises(ConfigError, match=r"^acceleration.compile=cuda_graphs cannot record"):
        last_hidden(model, rows(1)[0])
    assert torch.isfinite(torch.randn(1, device="cuda")).all()
    other = set_up(adapted, FAST["plain_compiled"])
    assert torch.isfinite(last_hidden(other, rows(1)[0])).all()


def test_computing_again_takes_less_memory(adapted):
    row = rows(1)[0]
    peaks = {}
    for name in ("compiled", "mlp", "layers"):
        model = set_up(adapted, FAST[name])
        run(model, row)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(model, row)
        peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks["layers"] < peaks["mlp"] < peaks["compiled"]


@pytest.mark.parametrize("prefix", [0, 3, 40])
def test_the_kernels_agree_with_plain_torch(prefix):
    """To what bfloat16 holds: 1 % of the norm."""
    row, heads = fast_path.rows(1, prefix=prefix)[0], 4
    boundaries = F.pad(cover_padding(row.cu_seqlens, BUDGET, row.max_length), (1, 0))
    torch.manual_seed(0)
    query, grad = torch.randn(2, BUDGET, heads * 64, dtype=torch.bfloat16)
    key, value = torch.randn(2, BUDGET, 64, dtype=torch.bfloat16)
    down, lora_b = (torch.randn(n, 16, dtype=torch.bfloat16) for n in (BUDGET, heads * 64))
    operators, results = torch.ops.medqlora, []
    for device in ("cuda", "cpu"):
        q, k, v = (t.to(device).requires_grad_() for t in (query, key, value))
        g = grad.to(device)
        out = operators.question_attention(q, k, v, boundaries.to(device), heads, 0.125, prefix)
        back = torch.autograd.grad(out[0], (q, k, v), g)
        of_adapter = operators.lora_gradient(g, down.to(device), lora_b.to(device))
        sums = (parts.sum(0) for parts in of_adapter)
        results.append([t.detach().cpu() for t in (*out, *back, *sums)])
    for first, second in zip(*results, strict=True):
        assert relative(first, second) < 0.01


@pytest.mark.parametrize("prefix", [0, 3])
def test_in_long_rows_the_kernels_agree_with_each_question_by_itself(prefix):
    """Rows of more than 8,192 tokens are shared out in another way; to 1 % of the norm."""
    times, heads = 9, 4
    row, tokens = rows(1, prefix=prefix, times=times)[0], times * BUDGET
    boundaries = F.pad(cover_padding(row.cu_seqlens, tokens, row.max_length), (1, 0))
    torch.manual_seed(0)
    query, grad = torch.randn(2, tokens, heads * 64).bfloat16()
    key, value = torch.randn(2, tokens, 64).bfloat16()
    grad[row.num_tokens :] = 0  # what is behind the questions nobody asks for
    q, k, v = (t.to(row.input_ids.device).requires_grad_() for t in (query, key, value))
    out, _ = torch.ops.medqlora.question_attention(q, k, v, boundaries, heads, 0.125, prefix)
    gradients = torch.autograd.grad(out, (q, k, v), grad.to(out.device))
    leaves = [t.float().requires_grad_() for t in (query, key, value)]
    split = [t.unflatten(1, (-1, 64)) for t in leaves]
    cu_seqlens = row.cu_seqlens.cpu()
    expected = packed_attention(*split, cu_seqlens, row.max_length, 0.125, prefix).flatten(1)
    others = torch.autograd.grad(expected, leaves, grad.float())
    ends = slice(row.num_tokens)
    for first, second in zip((out, *gradients), (expected, *others), strict=True):
        assert relative(first[ends].detach().cpu(), second[ends].detach()) < 0.01


@pytest.mark.parametrize("tokens", [50, 3000])
def test_the_gradients_of_an_adapter_are_its_products(tokens):
    """In both tiles, with rows that do not fill them."""
    torch.manual_seed(0)
    grad, down, lora_b = (
        torch.randn(size, device="cuda").bfloat16()
        for size in ((tokens, 512), (tokens, 16), (512, 16))
    )
    of_down, of_b = (t.sum(0) for t in torch.ops.medqlora.lora_gradient(grad, down, lora_b))
    assert relative(of_down, grad.double() @ lora_b.double()) < 1e-5
    assert relative(of_b, grad.double().t() @ down.double()) < 1e-5
