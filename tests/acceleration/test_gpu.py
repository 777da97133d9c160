"""Every switch of speed and memory gives the same answers and the same loss curve on a GPU."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from medqlora.acceleration import (
    Acceleration,
    accelerate,
    last_hidden,
    prepare_for_training,
    use_packed_attention,
)
from medqlora.acceleration.fused import why_not_fused
from medqlora.quantization import QuantConfig, load_base
from medqlora.schema import IGNORE, PackedBatch
from tests.quantization.conftest import save_gemma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BUDGET, VOCABULARY = 1024, 4096
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
    "plain_mlp": {**PLAIN, "gradient_checkpointing": "mlp"},
    "plain_offload": {**PLAIN, "gradient_checkpointing": "offload"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Gemma whose sizes the fast path takes."""
    return str(
        save_gemma(
            tmp_path_factory.mktemp("gemma"),
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_attention_heads=4,
        )
    )


@pytest.fixture(scope="module")
def adapted(folder):
    """NF4 with an adapter that is not zero."""
    base = load_base(folder, QuantConfig("nf4", double_quant=True), device="cuda")
    use_packed_attention(base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def rows(count: int, *, seed: int = 0, prefix: int = 0) -> list[PackedBatch]:
    """Full rows of questions of 20 to 100 tokens; the first one behind what they share tells."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        lengths = torch.randint(20, 100, (60,), generator=generator)
        lengths = lengths[: int((prefix + lengths.cumsum(0) <= BUDGET).sum())]
        number, ends = len(lengths), prefix + lengths.cumsum(0)
        ids = torch.randint(3, VOCABULARY, (BUDGET,), generator=generator)
        places = 64
        boundaries = torch.full((places + 1,), int(ends[-1]), dtype=torch.int32)
        boundaries[0], boundaries[1 : number + 1] = prefix, ends
        last = torch.zeros(places, dtype=torch.long)
        last[:number] = ends - 1
        answer = torch.full((places,), IGNORE)
        answer[:number] = ids[ends - lengths] % 4
        own = [prefix + torch.arange(n) for n in lengths.tolist()]
        rest = torch.arange(BUDGET - int(ends[-1]))
        positions = torch.cat([torch.arange(prefix), *own, rest])
        found.append(
            PackedBatch(
                input_ids=ids,
                position_ids=positions,
                cu_seqlens=boundaries,
                last=last,
                answer=answer,
                index=torch.where(answer >= 0, torch.arange(places), -1),
                labels=None,
                num_questions=number,
                num_tokens=int(ends[-1]),
                max_length=128 + prefix,
                prefix_length=prefix,
            ).to("cuda")
        )
    return found


def set_up(model, options, dropout: float = 0.0):
    """A copy of the model that runs as the options say, ready to be trained."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = (
                torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
            )
    prepare_for_training(model, options.get("gradient_checkpointing", False))
    accelerate(model, Acceleration(**options), "cuda", BUDGET)
    return model


def loss_of(model, row):
    letters = model.get_base_model().lm_head.weight[:4].detach().float()
    return F.cross_entropy(last_hidden(model, row).float() @ letters.T, row.answer)


def run(model, row):
    """Hidden states of the questions, and the gradients."""
    model.zero_grad()
    hidden = last_hidden(model, row)
    weight = torch.linspace(-1, 1, hidden.shape[1], device="cuda")
    (hidden[: row.num_questions].float() @ weight).square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return hidden[: row.num_questions].detach(), gradients


def relative(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_model_takes_the_fast_path(adapted):
    assert why_not_fused(adapted) is None


@pytest.mark.parametrize(
    ("name", "prefix"),
    [*((name, 0) for name in FAST), ("eager", 3), ("eager", 40), ("cuda_graphs", 3), ("mlp", 3)],
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


def curve(model, steps: int = 40) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for row in rows(steps, seed=1):
        loss = loss_of(model, row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def distance(a: list[float], b: list[float]) -> float:
    """Mean distance of two loss curves, in nats."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


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


@pytest.mark.parametrize("name", ["eager", "compiled", "cuda_graphs", "layers"])
def test_dropout_keeps_the_fast_path_and_its_expectation(adapted, name):
    """Each pass drops other inputs; the mean over passes comes near the pass without dropout."""
    row = rows(1)[0]
    model = set_up(adapted, FAST[name], dropout=0.1)
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
    """What the first passes took is given back before they are recorded."""
    row = rows(1)[0]

    def peak(options) -> int:
        model = set_up(adapted, options)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(model, row)
        return torch.cuda.max_memory_allocated() - before

    assert peak(FAST["cuda_graphs"]) < 1.3 * peak(FAST["compiled"])


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
