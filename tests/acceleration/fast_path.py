"""What the tests of the fast path share, on the CPU and on a GPU: a model it takes, rows, runs."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from medqlora.acceleration import Acceleration, accelerate, last_hidden, use_packed_attention
from medqlora.finetuning import attach_adapter
from medqlora.quantization import QuantConfig, load_base
from medqlora.schema import IGNORE, PackedBatch
from tests.quantization.conftest import save_gemma

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, PeftConfig] = {
    "dora": LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=LINEARS),
    "adalora": AdaLoraConfig(
        init_r=12, target_r=8, total_step=100, lora_alpha=32, target_modules=LINEARS
    ),
    "vera": VeraConfig(r=72, target_modules=LINEARS),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"),
}
"""Relatives of LoRA that the fast path takes; VeRA with a rank that its kernels do not."""

OTHERS: dict[str, PeftConfig] = {
    "oft": OFTConfig(r=0, oft_block_size=32, target_modules=LINEARS),
    "p_tuning": PromptEncoderConfig(
        num_virtual_tokens=16, encoder_hidden_size=64, task_type="CAUSAL_LM"
    ),
}
"""Methods that it does not take."""

BUDGET, VOCABULARY = 1024, 4096
LEARNING_RATE = 2e-3


def save_wide_gemma(folder) -> str:
    """A Gemma whose sizes the fast path takes."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    return str(save_gemma(folder, vocab_size=VOCABULARY, **sizes))


def adapt(
    folder: str,
    device: str,
    *,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    block_size: int = 64,
    data_type: str = "nf4",
    quant_storage: str | None = None,
    method: str = "lora",
    **lora,
) -> PeftModel:
    """A base with an adapter that is not at its start: LoRA, or another of the methods above."""
    quant = QuantConfig(data_type, compute_dtype=compute_dtype)
    if data_type == "nf4":
        quant = replace(quant, double_quant=double_quant, block_size=block_size)
        quant = replace(quant, quant_storage=quant_storage)
    base = load_base(folder, quant, device=device)
    use_packed_attention(base)
    torch.manual_seed(0)
    options = {"r": 16, "lora_alpha": 32, "target_modules": LINEARS} | lora
    if method != "lora":
        model = attach_adapter(base, (METHODS | OTHERS)[method])
    else:
        model = get_peft_model(base, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "lora_E", "vera_lambda_b", "oft_R")):
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.requires_grad and "lora_A" not in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
    assert isinstance(model, PeftModel)
    return model


def set_dropout(model, share: float) -> None:
    """Dropout in front of every adapter of a model, in place."""
    for module in model.modules():
        for kind in ("lora_dropout", "vera_dropout"):
            if hasattr(module, kind):
                getattr(module, kind)["default"] = (
                    torch.nn.Dropout(share) if share else torch.nn.Identity()
                )


def rows(
    count: int, *, seed: int = 0, prefix: int = 0, device: str = "cpu", times: int = 1
) -> list[PackedBatch]:
    """Full rows of questions of 20 to 100 tokens; the first one behind what they share tells."""
    budget = times * BUDGET
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        lengths = torch.randint(20, 100, (60 * times,), generator=generator)
        lengths = lengths[: int((prefix + lengths.cumsum(0) <= budget).sum())]
        number, ends = len(lengths), prefix + lengths.cumsum(0)
        ids = torch.randint(3, VOCABULARY, (budget,), generator=generator)
        places = 64 * times
        boundaries = torch.full((places + 1,), int(ends[-1]), dtype=torch.int32)
        boundaries[0], boundaries[1 : number + 1] = prefix, ends
        last = torch.zeros(places, dtype=torch.long)
        last[:number] = ends - 1
        answer = torch.full((places,), IGNORE)
        answer[:number] = ids[ends - lengths] % 4
        own = [prefix + torch.arange(n) for n in lengths.tolist()]
        rest = torch.arange(budget - int(ends[-1]))
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
            ).to(device)
        )
    return found


def loss_of(model, row):
    letters = model.get_base_model().lm_head.weight[:4].detach().float()
    return F.cross_entropy(last_hidden(model, row).float() @ letters.T, row.answer)


def run(model, row, read=last_hidden):
    """Hidden states of the questions, and the gradients."""
    model.zero_grad()
    hidden = read(model, row)
    weight = torch.linspace(-1, 1, hidden.shape[1], device=hidden.device)
    (hidden[: row.num_questions].float() @ weight).square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return hidden[: row.num_questions].detach(), gradients


def layer_twice(fast, row, boundaries):
    """What the first layer makes of random hidden states: in learning, and where nothing is."""
    torch.manual_seed(0)
    hidden = torch.randn(len(row.input_ids), fast.sizes.width, device=row.input_ids.device)
    hidden = hidden.to(fast.sizes.dtype)
    angles = fast._rotary(row.max_length, row.position_ids)
    sizes = replace(fast.sizes, prefix_length=row.prefix_length)
    fixed = (fast.layers[0], boundaries, *angles, None, sizes)
    learned = fast._run(hidden.clone().requires_grad_(), *fixed).detach()
    given = hidden.clone()
    with torch.no_grad():
        scored = fast._run(given, *fixed)
    assert torch.equal(given, hidden)
    return learned, scored


def relative(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def curve(model, steps: int = 40, device: str = "cpu") -> list[float]:
    """Losses of updates on one row again and again: there is something to learn by heart."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    [row] = rows(1, seed=1, device=device)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def distance(a: list[float], b: list[float]) -> float:
    """Mean distance of two loss curves, in nats."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def compare_compiled(folder: str, method: str, data_type: str) -> None:
    """Print how far compiled hidden states and the worst gradient are from those that are not."""
    row = rows(1, prefix=3)[0]
    model = adapt(folder, "cpu", compute_dtype="float32", method=method, data_type=data_type)
    expected, gradients = run(model, row)  # plain layers
    told = accelerate(model, Acceleration(compile="default"), "cpu", BUDGET)
    way = "plain layers (" if method in OTHERS else "fast path, "
    assert told.startswith(way), told
    assert told.endswith("compile=default"), told
    hidden, others = run(model, row)
    worst = max(relative(others[n], gradients[n]) for n in gradients)
    print(relative(hidden, expected), worst)
