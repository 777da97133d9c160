"""A packed row gives what one question at a time gives through stock transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.oft.layer import MultiplicativeDropoutLayer

from medqlora.acceleration import (
    Acceleration,
    accelerate,
    find_backbone,
    graphs,
    hidden_states,
    last_hidden,
    prepare_for_training,
    use_packed_attention,
)
from medqlora.acceleration.backbone import RUN_AS, RecordedLayers, run_as
from medqlora.errors import ConfigError
from tests.acceleration import fast_path


def stock_last_hidden(model, questions):
    with torch.no_grad():
        return torch.stack([model.model(q[None]).last_hidden_state[0, -1] for q in questions])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_packed_hidden_states_equal_one_question_at_a_time(
    tiny_gemma, questions, pack, dtype, tolerance
):
    """Hidden states have variance 1 after the final norm, so the tolerance is relative to it."""
    tiny_gemma.to(dtype)
    expected = stock_last_hidden(tiny_gemma, questions)
    use_packed_attention(tiny_gemma)
    with torch.no_grad():
        hidden = last_hidden(tiny_gemma, pack(questions))
    assert hidden.dtype == dtype
    torch.testing.assert_close(hidden[: len(questions)], expected, rtol=0, atol=tolerance)


def test_scores_do_not_depend_on_neighbours_or_place(tiny_gemma, questions, pack):
    use_packed_attention(tiny_gemma)
    with torch.no_grad():
        forward = last_hidden(tiny_gemma, pack(questions))[: len(questions)]
        backward = last_hidden(tiny_gemma, pack(questions[::-1], budget=30))[: len(questions)]
    torch.testing.assert_close(forward, backward.flip(0), rtol=0, atol=1e-5)


PREFIX = torch.tensor([2, 7, 5])


@pytest.mark.parametrize("checkpointing", [False, "mlp", True])
def test_shared_tokens_in_front_of_a_row_change_nothing(tiny_gemma, questions, pack, checkpointing):
    """Neither hidden states nor gradients, beside the same tokens before every question."""
    whole = [torch.cat([PREFIX, question]) for question in questions]
    expected = stock_last_hidden(tiny_gemma, whole)
    use_packed_attention(tiny_gemma)
    prepare_for_training(tiny_gemma, checkpointing)
    found = []
    for row in (pack(whole, budget=40, max_length=12), pack(questions, prefix=PREFIX)):
        assert [row.question(i).tolist() for i in range(4)] == [q.tolist() for q in whole]
        tiny_gemma.zero_grad()
        hidden = last_hidden(tiny_gemma, row)[: len(questions)]
        hidden.square().sum().backward()
        grads = {n: p.grad for n, p in tiny_gemma.named_parameters() if p.grad is not None}
        found.append((hidden.detach(), grads))
    (apart, grads_apart), (shared, grads_shared) = found
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5)
    for name, grad in grads_apart.items():
        torch.testing.assert_close(grads_shared[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_virtual_tokens_and_shared_ones_go_together(tiny_gemma, questions, pack):
    from peft import PromptTuningConfig, get_peft_model

    use_packed_attention(tiny_gemma)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_gemma, config)
    whole = [torch.cat([PREFIX, question]) for question in questions]
    apart = last_hidden(model, pack(whole, budget=40, max_length=12))
    shared = last_hidden(model, pack(questions, prefix=PREFIX))
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5)


def test_the_output_head_is_never_run(tiny_gemma, questions, pack):
    use_packed_attention(tiny_gemma)
    tiny_gemma.lm_head.register_forward_hook(lambda *args: pytest.fail("the head ran"))
    last_hidden(tiny_gemma, pack(questions))


def gradients(model, batch):
    model.zero_grad()
    hidden_states(model, batch)[: batch.num_tokens].square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(tiny_gemma, questions, pack):
    """Also with a frozen embedding, where reentrant checkpoints lose every gradient."""
    tiny_gemma.model.embed_tokens.weight.requires_grad_(False)
    use_packed_attention(tiny_gemma)
    batch = pack(questions)
    prepare_for_training(tiny_gemma, gradient_checkpointing=False)
    plain = gradients(tiny_gemma, batch)
    calls = []
    layer = tiny_gemma.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    prepare_for_training(tiny_gemma, gradient_checkpointing=True)
    checkpointed = gradients(tiny_gemma, batch)
    assert len(calls) == 2, "the layer was not computed again in the backward pass"
    assert plain.keys() == checkpointed.keys()
    assert "model.layers.0.self_attn.q_proj.weight" in plain
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=0, atol=0, msg=name)


def test_preparing_upcasts_nothing(tiny_gemma):
    tiny_gemma.to(torch.bfloat16)
    before = {n: p.dtype for n, p in tiny_gemma.named_parameters()}
    prepare_for_training(tiny_gemma, gradient_checkpointing=True)
    assert {n: p.dtype for n, p in tiny_gemma.named_parameters()} == before
    assert tiny_gemma.training


def test_a_float32_adapter_computes_with_a_16_bit_base(tiny_gemma, questions, pack):
    from peft import LoraConfig, get_peft_model

    tiny_gemma.to(torch.bfloat16)
    use_packed_attention(tiny_gemma)
    batch = pack(questions)
    with torch.no_grad():
        expected = last_hidden(tiny_gemma, batch)
    model = get_peft_model(copy.deepcopy(tiny_gemma), LoraConfig(r=2, target_modules="all-linear"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(last_hidden(model, batch), expected, rtol=0, atol=0)


def test_the_backbone_is_found_inside_an_adapter(tiny_gemma):
    from peft import LoraConfig, get_peft_model

    backbone = tiny_gemma.model
    assert find_backbone(backbone) is backbone
    assert find_backbone(tiny_gemma) is backbone
    assert (
        find_backbone(get_peft_model(tiny_gemma, LoraConfig(target_modules="all-linear")))
        is backbone
    )


def test_the_compile_mode_follows_device_and_row_length():
    assert Acceleration().compile_mode("cpu", 2048) == "none"
    modes = [Acceleration().compile_mode("cuda", tokens) for tokens in (2048, 16_384, 32_768)]
    assert modes == ["cuda_graphs", "cuda_graphs", "default"]
    assert Acceleration(compile="default").compile_mode("cpu", 2048) == "default"
    offload = Acceleration(gradient_checkpointing="offload")
    assert offload.compile_mode("cuda", 2048) == "default"


@pytest.mark.parametrize(
    "options",
    [
        {"compile": "fast"},
        {"fused": "yes"},
        {"gradient_checkpointing": "attention"},
        {"gradient_checkpointing": "offload", "compile": "cuda_graphs"},
        {"num_threads": 0},
        {"float8": True, "fused": "off"},
        {"dropout_per": "row", "fused": "off"},
        {"dropout_per": "question"},
    ],
)
def test_unknown_or_contradicting_options_are_refused_by_name(options):
    with pytest.raises(ConfigError) as told:
        Acceleration(**options)
    for name in options:
        assert f"acceleration.{name}=" in str(told.value)


@pytest.mark.parametrize("options", [{"compile": "cuda_graphs"}, {"float8": True}])
def test_options_for_cuda_are_refused_on_the_cpu(options, tiny_gemma):
    with pytest.raises(ConfigError, match="no effect on cpu"):
        accelerate(tiny_gemma, Acceleration(**options), "cpu", 2048)


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_multiplying_in_8_bits_needs_a_gpu_that_can(capability, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if fits:
        Acceleration(float8=True).check_device("cuda")
        return
    with pytest.raises(ConfigError, match="Ada, Hopper and later") as told:
        Acceleration(float8=True).check_device("cuda")
    assert "acceleration.float8=false" in str(told.value)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"fused": "on"}, "fused=on"),
        ({"float8": True}, "float8=true"),
        ({"dropout_per": "row"}, "dropout_per=row"),
    ],
)
def test_a_fast_path_that_is_asked_for_and_cannot_be_taken_is_an_error(
    options, asked, tiny_gemma, monkeypatch
):
    """A GPU is there, and this model is none for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tiny_gemma.config, "hidden_act", "relu")
    with pytest.raises(ConfigError) as told:
        accelerate(tiny_gemma, Acceleration(compile="none", **options), "cuda", 2048)
    reason = "because the activation or the attention bias is not Gemma's"
    assert f"acceleration.{asked} cannot take effect {reason}" in str(told.value)


@pytest.mark.parametrize(
    ("compile", "tokens", "chosen"),
    [("default", 2048, "default"), ("auto", 2048, "cuda_graphs"), ("auto", 32768, "default")],
)
def test_plain_layers_are_compiled_as_the_length_of_rows_asks(
    compile, tokens, chosen, tiny_gemma, monkeypatch
):
    """Shapes are fixed, names of parameters stay, and the jobs of a sweep find room for theirs."""
    import torch._dynamo

    asked: list[tuple[object, dict]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append((self, how)))
    tiny_gemma.bfloat16()
    names = list(tiny_gemma.state_dict())
    told = accelerate(tiny_gemma, Acceleration(compile=compile, fused="off"), "cuda", tokens)
    assert told == f"plain layers (acceleration.fused=off), compile={chosen}"
    assert asked == [(layer, {"dynamic": False}) for layer in tiny_gemma.model.layers]
    assert len(asked) > 1
    assert isinstance(getattr(tiny_gemma.model, RUN_AS), RecordedLayers) == (
        chosen == "cuda_graphs"
    )
    assert list(tiny_gemma.state_dict()) == names
    assert torch._dynamo.config.recompile_limit >= 64


def float32(model):
    """Where attention lays its questions out as their lengths ask."""


def int8(model):
    model.bfloat16().model.layers[0].mlp.up_proj = Linear8bitLt(32, 64, has_fp16_weights=False)


def large(model):
    model.bfloat16().model.layers[0].mlp.extra = torch.nn.Parameter(
        torch.empty(1 << 30, dtype=torch.bfloat16, device="meta")
    )


def drawn_on_the_cpu(model):
    model.bfloat16().model.layers[0].mlp.dropout = MultiplicativeDropoutLayer(0.1)


def dropped_again(model):
    model.bfloat16().model.layers[0].mlp.dropout = torch.nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (float32, "attention in float32, which waits for the lengths of questions"),
        (int8, "Linear8bitLt, only weights of 16 bit and 4 bits of bitsandbytes"),
        (large, r"gradients of 2.\d GB, which it would keep twice"),
        (drawn_on_the_cpu, "MultiplicativeDropoutLayer, which draws on the CPU"),
        (dropped_again, "layers that are computed again and drop other inputs for each token"),
    ],
)
def test_plain_layers_that_cannot_be_recorded_are_not(change, reason, tiny_gemma, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    change(tiny_gemma)
    options = {"fused": "off", "gradient_checkpointing": change is dropped_again}
    told = accelerate(tiny_gemma, Acceleration(**options), "cuda", 2048)
    chosen = "none" if change is int8 else "default"  # it is slower compiled
    assert told == f"plain layers (acceleration.fused=off), compile={chosen}"
    assert getattr(tiny_gemma.model, RUN_AS) is None
    with pytest.raises(ConfigError, match=reason) as refused:
        accelerate(tiny_gemma, Acceleration(compile="cuda_graphs", **options), "cuda", 2048)
    assert "Set acceleration.compile=auto." in str(refused.value)
    tiny_gemma.requires_grad_(False)  # nothing to record
    accelerate(tiny_gemma, Acceleration(compile="cuda_graphs", **options), "cuda", 2048)


@pytest.mark.parametrize("method", ["lora", "p_tuning"])
def test_plain_layers_are_recorded_for_each_shape_while_they_learn(method, tmp_path, monkeypatch):
    """And run as they are where nothing is learned, or the adapter is switched off."""
    recorded = []

    class Played:
        def __init__(self, forward, row, parameters):
            recorded.append(len(parameters))
            self.forward = forward

        def __call__(self, row):
            return self.forward(row)

    monkeypatch.setattr(graphs, "RecordedPass", Played)
    model = fast_path.adapt(
        fast_path.save_wide_gemma(tmp_path), "cpu", compute_dtype="float32", method=method
    )
    prepare_for_training(model)
    row, other = fast_path.rows(1, prefix=3)[0], fast_path.rows(1)[0]
    expected, gradients = fast_path.run(model, row)
    run_as(model, RecordedLayers(model, demanded=True))
    for _ in range(2):
        hidden, others = fast_path.run(model, row)
    assert torch.equal(hidden, expected)
    assert all(torch.equal(others[name], gradients[name]) for name in gradients)
    assert recorded == [len(gradients)]
    with torch.no_grad():
        last_hidden(model, other)
    assert len(recorded) == 1
    every = hidden_states(model, row)
    assert len(recorded) == 2
    torch.testing.assert_close(every[row.last[: row.num_questions]], expected)
    last_hidden(model, other)
    last_hidden(model.eval(), other)
    assert len(recorded) == 4, "dropout, if there were some, is off"
    with model.disable_adapter():
        bare = last_hidden(model, row)[: row.num_questions]
    assert len(recorded) == 4
    run_as(model, None)
    assert torch.equal(bare, last_hidden(model.get_base_model(), row)[: row.num_questions]) == (
        method == "p_tuning"
    )
    assert not torch.allclose(bare, expected)


def test_threads_are_those_that_were_asked_for(tiny_gemma):
    before = torch.get_num_threads()
    try:
        accelerate(tiny_gemma, Acceleration(num_threads=3), "cpu", 2048)
        assert torch.get_num_threads() == 3
        accelerate(tiny_gemma, Acceleration(), "cpu", 2048)
        assert torch.get_num_threads() == 3, "null changes nothing"
    finally:
        torch.set_num_threads(before)


def test_on_the_cpu_a_model_of_another_kind_runs_as_it_is(tiny_gemma, monkeypatch):
    monkeypatch.setattr(tiny_gemma.config, "model_type", "gemma2")
    told = accelerate(tiny_gemma, Acceleration(), "cpu", 2048)
    assert told == "plain layers (it is made for Gemma 1, not for gemma2), compile=none"
