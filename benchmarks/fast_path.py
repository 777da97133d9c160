"""The fast path on CUDA: the same result as the plain layers, and how fast.

    python benchmarks/fast_path.py check lengths.txt
    python benchmarks/fast_path.py speed lengths.txt 16384,profile 16384,float8 2048,cuda_graphs
    python benchmarks/fast_path.py speed lengths.txt 16384,dropout=0.05,per=row 1024,layers 8192,mlp

A random Gemma-2B (18 layers, width 2048, random weights: speed and memory are real, loss means
nothing), NF4 with double quantisation, LoRA r=16 on the seven linears, float32 adapter weights,
loss on the four letters, AdamW (fused). `lengths.txt` holds one question length in tokens a line.
Rows are filled in random order until the next question does not fit; the first 3 tokens of every
question are shared (`prefix=0`: each has its own). Each line `RESULT {json}` is the mean of 20
steps after 4. With `optimizer=paged_adamw_8bit,clip` an update is the one of `train`'s defaults, so
that what else a whole command takes is Lightning, logging and loading.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training import PROFILED, device_events, device_time
from transformers import GemmaConfig, GemmaForCausalLM

from medqlora.acceleration import last_hidden, one_stream, use_packed_attention
from medqlora.acceleration.folding import LINEARS, why_not_fused
from medqlora.acceleration.fused import FusedBackbone
from medqlora.finetuning import optimizers
from medqlora.schema import PackedBatch

MAX_LENGTH = 256
WARMUP = 4
CHECKPOINTING = {"none": False, "mlp": "mlp", "layers": True, "offload": "offload"}


def make_model(num_layers: int, vocab_size: int) -> nn.Module:
    """A random Gemma of 2B's widths, its linears in NF4, with an adapter that is not zero."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GemmaForCausalLM(
            GemmaConfig(
                vocab_size=vocab_size,
                hidden_size=2048,
                num_hidden_layers=num_layers,
                num_attention_heads=8,
                num_key_value_heads=1,
                head_dim=256,
                intermediate_size=16_384,
            )
        )
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False).eval()
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                layer = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                layer.weight = bnb.nn.Params4bit(
                    child.weight.data.cpu(),
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=True,
                    blocksize=64,
                    module=layer,
                )
                setattr(module, name, layer.cuda())
    use_packed_attention(model)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEARS))
    adapted = get_peft_model(model, lora).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1e-3)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return adapted


def make_rows(
    lengths: np.ndarray, token_budget: int, count: int, seed: int, prefix: int = 0
) -> list[PackedBatch]:
    """Packed rows of random tokens on the GPU, whose questions share `prefix` tokens."""
    generator = np.random.default_rng(seed)
    lengths = generator.permutation(lengths) - prefix
    places, taken, rows = int(token_budget / lengths.mean() * 1.3) + 8, 0, []
    for _ in range(count):
        row: list[int] = []
        while prefix + sum(row) + lengths[taken % len(lengths)] <= token_budget:
            row.append(int(lengths[taken % len(lengths)]))
            taken += 1
        number, total = len(row), prefix + sum(row)
        boundaries = np.full(places + 1, total, dtype=np.int32)
        boundaries[: number + 1] = prefix + np.concatenate([[0], np.cumsum(row)])
        last, answer = np.zeros(places, dtype=np.int64), np.full(places, -100)
        last[:number] = boundaries[1 : number + 1] - 1
        answer[:number] = generator.integers(0, 4, number)
        positions = [np.arange(prefix), *(prefix + np.arange(n) for n in row)]
        positions += [np.zeros(token_budget - total, dtype=np.int64)]
        batch = PackedBatch(
            input_ids=torch.from_numpy(generator.integers(5, 5000, token_budget)),
            position_ids=torch.from_numpy(np.concatenate(positions)),
            cu_seqlens=torch.from_numpy(boundaries),
            last=torch.from_numpy(last),
            answer=torch.from_numpy(answer),
            index=torch.from_numpy(np.where(answer >= 0, 0, -1)),
            labels=None,
            num_questions=number,
            num_tokens=total,
            max_length=MAX_LENGTH,
            prefix_length=prefix,
        )
        rows.append(batch.to("cuda"))
    return rows


def loss_of(hidden: torch.Tensor, letter_rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Mean cross-entropy over four rows of the embedding."""
    return F.cross_entropy(hidden.float() @ letter_rows.float().T, batch.answer)


def letter_rows_of(model: nn.Module) -> torch.Tensor:
    """Four rows that stand for the letters."""
    return model.get_base_model().lm_head.weight[[1000, 1001, 1002, 1003]].detach()


def check(lengths: np.ndarray) -> None:
    """Print relative differences of hidden states and gradients to the plain layers, 3 layers."""
    model = make_model(num_layers=3, vocab_size=8000)
    assert why_not_fused(model) is None, why_not_fused(model)
    letters, batch = letter_rows_of(model), make_rows(lengths, 2048, 1, 0, prefix=3)[0]
    count = batch.num_questions

    def run(hidden_of) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        hidden = hidden_of(batch)
        loss_of(hidden, letters, batch).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return hidden[:count].detach().double(), gradients

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    hidden, gradients = run(lambda b: last_hidden(model, b))
    for options in (
        {"compile": False},
        {},
        {"gradient_checkpointing": "mlp"},
        {"gradient_checkpointing": True},
        {"cuda_graphs": True},
        {"float8": True},
    ):
        fast = FusedBackbone(model, **options)
        other, others = run(lambda b, fast=fast: fast(b, b.last))
        worst = max(relative(others[name], gradients[name]) for name in gradients)
        result = {"options": options, "hidden": relative(other, hidden), "worst_gradient": worst}
        print("RESULT", json.dumps(result), flush=True)


@dataclass(frozen=True)
class Run:
    """One thing to measure, as the command line names it: `16384,float8` or `2048,cuda_graphs`."""

    tokens: int
    float8: bool = False
    cuda_graphs: bool = False
    checkpointing: str = "none"
    dropout: float = 0.0
    per: Literal["token", "row"] = "token"
    optimizer: str = "adamw"
    clip: bool = False
    profile: bool = False
    score: bool = False
    steps: int = 20
    prefix: int = 3

    @classmethod
    def parse(cls, text: str) -> Run:
        """Read `TOKENS[,float8][,cuda_graphs][,mlp|layers|offload][,dropout=P][,per=row]...`.

        `optimizer=NAME` is one of `medqlora.finetuning.optimizers`, `clip` clips the gradient's
        norm, `profile` adds what the device does in some steps, `score` leaves training out.
        """
        tokens, *words = text.split(",")
        options: dict[str, Any] = {}
        for word in words:
            if word in CHECKPOINTING:
                options["checkpointing"] = word
            elif word.startswith("dropout="):
                options["dropout"] = float(word.removeprefix("dropout="))
            elif word.startswith(("steps=", "prefix=")):
                name, value = word.split("=")
                options[name] = int(value)
            elif word in ("per=token", "per=row"):
                options["per"] = word.removeprefix("per=")
            elif word.startswith("optimizer="):
                options["optimizer"] = word.removeprefix("optimizer=")
            elif word in ("float8", "cuda_graphs", "clip", "profile", "score"):
                options[word] = True
            else:
                raise argparse.ArgumentTypeError(f"{word} is unknown")
        return cls(int(tokens), **options)


def speed(lengths: np.ndarray, runs: list[Run]) -> None:
    """Print questions a second of training and of scoring, and the peak of torch's allocator."""
    model = make_model(num_layers=18, vocab_size=256_000)
    letters = letter_rows_of(model)
    for run in runs:
        try:
            measure(model, letters, lengths, run)
        except torch.OutOfMemoryError as error:
            print("FAILED", run, str(error).splitlines()[0], flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def measure(model: nn.Module, letters: torch.Tensor, lengths: np.ndarray, run: Run) -> None:
    """Train and score for some steps; print one line `RESULT {json}`."""
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(run.dropout)
    weights = torch.cuda.memory_allocated() / 1e9
    rows = make_rows(lengths, run.tokens, WARMUP + run.steps, 1, run.prefix)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = getattr(optimizers, run.optimizer)(named, lr=1e-5)
    gather = getattr(optimizer, "gather_gradients", lambda: None)
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    fast = FusedBackbone(
        model,
        float8=run.float8,
        gradient_checkpointing=CHECKPOINTING[run.checkpointing],
        cuda_graphs=run.cuda_graphs,
        dropout_per=run.per,
    )

    def step(batch: PackedBatch) -> None:
        loss_of(fast(batch, batch.last), letters, batch).backward()
        gather()
        if run.clip:
            nn.utils.clip_grad_norm_(updated, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def score(batch: PackedBatch) -> None:
        with torch.no_grad():
            fast(batch, batch.last)

    result: dict[str, Any] = asdict(run)
    if not run.score:
        with one_stream(rows[0].input_ids.device):
            seconds, first, peak = timed(step, rows)
        result |= {
            "training_questions_per_second": round(count_of(rows) / seconds, 1),
            "ms_per_step": round(1000 * seconds / run.steps, 2),
            "first_step_seconds": round(first, 1),
            "peak_gb": round(peak, 2),
            "peak_beyond_weights_gb": round(peak - weights, 2),
        }
    seconds, first, peak = timed(score, rows)
    result |= {
        "scoring_questions_per_second": round(count_of(rows) / seconds, 1),
        "scoring_peak_gb": round(peak, 2),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    if run.profile:
        acts = {"scoring": score} if run.score else {"training": step, "scoring": score}
        result["profile_ms"] = {name: profiled(name, act, rows) for name, act in acts.items()}
    print("RESULT", json.dumps(result), flush=True)


def timed(
    act: Callable[[PackedBatch], None], rows: list[PackedBatch]
) -> tuple[float, float, float]:
    """Seconds of the rows behind the warm-up, seconds of the first, peak GB of the allocator."""
    torch.cuda.reset_peak_memory_stats()
    started, first = time.perf_counter(), 0.0
    for number, batch in enumerate(rows):
        if number in (1, WARMUP):
            torch.cuda.synchronize()
            first = first or time.perf_counter() - started
            started = time.perf_counter()
        act(batch)
    torch.cuda.synchronize()
    return time.perf_counter() - started, first, torch.cuda.max_memory_allocated() / 1e9


def count_of(rows: list[PackedBatch]) -> int:
    """Questions of the rows that are timed."""
    return sum(batch.num_questions for batch in rows[WARMUP:])


def profiled(
    title: str, act: Callable[[PackedBatch], None], rows: list[PackedBatch]
) -> dict[str, Any]:
    """What the device does in ms a row, by kind; prints its longest kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for number in range(len(PROFILED)):
            act(rows[number % len(rows)])
        torch.cuda.synchronize()
    for event in sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)[:20]:
        milliseconds = event.self_device_time_total / 1e3 / len(PROFILED)
        count = event.count / len(PROFILED)
        print(f"{title} {milliseconds:8.2f} ms {count:5.0f} {event.key[:90]}")
    return device_time(device_events(profiler))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["check", "speed"])
    parser.add_argument("lengths", type=Path, help="one question length in tokens a line")
    parser.add_argument(
        "runs", nargs="*", type=Run.parse, help="TOKENS and options, such as 2048,cuda_graphs"
    )
    arguments = parser.parse_args()
    lengths = np.loadtxt(arguments.lengths, dtype=int)
    check(lengths) if arguments.what == "check" else speed(lengths, arguments.runs)


if __name__ == "__main__":
    main()
