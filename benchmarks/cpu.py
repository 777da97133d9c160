"""The tiny model on two CPU cores, beside the plain way: padded batches and the whole head.

    python benchmarks/cpu.py --output cpu.json
    python benchmarks/cpu.py quant.compute_dtype=bfloat16 acceleration.compile=default
    python benchmarks/cpu.py --vocabulary 256000 --questions 32

The plain way is what a script around transformers, bitsandbytes and peft does: questions of the
bundled sample in batches of 8, padded to the longest, `model(input_ids, attention_mask, labels)`
with the logits of every token, LoRA r=16 on the seven linears of the same NF4 weights, AdamW; for
scoring, lm-evaluation-harness's way, one row for each of the four continuations. Ours is the module
and the packed rows of `train experiment=quickstart`, 2,048 tokens each, 4,096 in scoring, without
Lightning's loop around them. Both compute in float32, or in what `quant.compute_dtype` says, and
see the same questions. Each rate is the best of three passes behind a warm-up, in which all take
turns; both run with one thread and with two, the better one counts for each. "products" is the
base's matrix products over the same rows and nothing else, forward for scoring, forward and the
gradient of the input for training; "bound" with those of the adapter's gradients and of attention,
without norms, GELU, rotation, residuals, unpacking, layout and optimiser; "roof" with the same
operations at the rate of a product of large square matrices, attention without padding: near the
most that the processor can do in this arithmetic. Overrides of Hydra are for ours and the types
of all.
`--vocabulary` gives the bundled model as many words as it says, the new ones random: Gemma has
256,000.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqlora import instantiation, pipeline
from medqlora.acceleration import find_backbone
from medqlora.acceleration.attention import BATCHES
from medqlora.acceleration.operators import matmul
from medqlora.budget import optimizer_of
from medqlora.config import compose
from medqlora.data import MedMCQADataModule
from medqlora.data.tokenization import TextEncoder
from medqlora.hub import resolve_path
from medqlora.quantization import load_base
from medqlora.schema import LETTERS, PackedBatch, Question

BATCH, PASSES, SCORED_TOKENS = 8, 3, 4096
SQUARES, SIDE = 8, 1024
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def padded(rows: list[list[int]], supervised: int = 1) -> dict[str, Tensor]:
    """A batch as a collator makes it: padded on the right, labels on the last tokens."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, len(tokens) - supervised : len(tokens)] = torch.tensor(tokens[-supervised:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(rows: list[list[int]]) -> list[dict[str, Tensor]]:
    """Rows in their order, `BATCH` at a time."""
    return [padded(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def learn(optimizer: torch.optim.Optimizer, losses: Iterable[Tensor]) -> None:
    """An update for each loss; the next is computed with what was learned."""
    for loss in losses:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(cfg: Any, questions: list[Question], data: MedMCQADataModule) -> dict[str, Callable]:
    """Training and scoring through stock transformers and peft, on the same NF4 weights."""
    base = load_base(cfg.model.path, instantiation.make(cfg.quant), device="cpu")
    base.set_attn_implementation("sdpa")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    encoder, letters = TextEncoder(data.tokenizer), data.letter_ids
    prompts = encoder.encode_prompts([data.prompt.render(question) for question in questions])
    learned = batches(
        [[*p, letters[q.answer or 0]] for p, q in zip(prompts, questions, strict=True)]
    )
    asked = batches([[*p, letter] for p in prompts for letter in letters[: len(LETTERS) - 1]])

    def train() -> None:
        model.train()
        learn(optimizer, (model(**batch).loss for batch in learned))

    @torch.no_grad()
    def score() -> None:
        model.eval()
        for batch in asked:
            ids = batch["input_ids"]
            scores = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
            told = batch["labels"][:, 1:]
            chosen = scores[:, :-1].log_softmax(-1).gather(2, told.clamp(min=0)[..., None])
            (chosen[..., 0] * (told >= 0)).sum(1)

    return {"training": train, "scoring": score}


def ours(cfg: Any, questions: list[Question], data: MedMCQADataModule) -> dict[str, Callable]:
    """Training and scoring of packed rows by the module that `train` uses."""
    module = pipeline.build_training_module(cfg, pipeline.build_base(cfg), data, 100)
    optimizer = optimizer_of(module)
    rows = rows_of(data, questions)

    def losses() -> Iterator[Tensor]:
        assert module.loss is not None
        for row in rows["training"]:
            total, count = module.loss(module.model, row, module.letter_rows, module.letter_ids)
            yield total / count

    def train() -> None:
        module.train()
        learn(optimizer, losses())

    @torch.no_grad()
    def score() -> None:
        module.eval()
        for row in rows["scoring"]:
            module(row)

    return {"training": train, "scoring": score}


def rows_of(data: MedMCQADataModule, questions: list[Question]) -> dict[str, list[PackedBatch]]:
    """The questions in rows of training and in the longer ones of scoring."""
    rows = {}
    for kind, tokens in (("training", data.token_budget), ("scoring", SCORED_TOKENS)):
        data.eval_token_budget = tokens
        rows[kind] = list(data.pack(questions))
    return rows


def bound(
    backbone: Any, rows: dict[str, list[PackedBatch]], rank: int, dtype: torch.dtype
) -> dict[str, Callable]:
    """The products that ours is made of, on random numbers that lie as the products want them.

    Those of the base, its weights already unpacked; then with those of the adapter's gradients and
    attention as products and softmax of padded questions.
    """

    def acted(kind: str, *, all_of_it: bool) -> Callable[[], None]:
        backward = kind == "training"
        multiplied = [numbers(dtype, *sizes) for sizes in linears(backbone, rows[kind][0], rank)]
        attended = [padded_questions(backbone, row, dtype) for row in rows[kind]]

        @torch.no_grad()
        def act() -> None:
            for batches in attended:
                multiply(multiplied, backward=backward, adapter=all_of_it)
                for _ in range(backbone.config.num_hidden_layers if all_of_it else 0):
                    attend(batches, backward=backward)

        return act

    return {
        f"{name} {kind}": acted(kind, all_of_it=name == "bound")
        for name in ("products", "bound")
        for kind in rows
    }


def operations(backbone: Any, rows: list[PackedBatch], rank: int, *, backward: bool) -> float:
    """Multiplications and additions of all that `bound` multiplies, attention without padding."""
    total, config = 0.0, backbone.config
    for row in rows:
        for (tokens, inner), (out, _), *_ in linears(backbone, row, rank):
            product = 2 * tokens * inner * out
            adapter = 4 * tokens * rank * (inner + out)
            total += 2 * product + adapter if backward else product
        lengths = (row.cu_seqlens.diff() + row.prefix_length)[: row.num_questions].double()
        pairs = float((lengths * (lengths + 1) / 2).sum()) * config.num_attention_heads
        products = 6 if backward else 2
        total += 2 * products * pairs * config.head_dim * config.num_hidden_layers
    return total


def square_products(dtype: torch.dtype) -> Callable[[], None]:
    """`SQUARES` products of matrices of `SIDE` by `SIDE`: what the processor reaches at best."""
    a, b = numbers(dtype, (SIDE, SIDE), (SIDE, SIDE))

    def act() -> None:
        for _ in range(SQUARES):
            matmul(a, b.t())

    return act


def numbers(dtype: torch.dtype, *sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Random tensors."""
    return tuple(torch.randn(size).to(dtype) for size in sizes)


def linears(backbone: Any, row: PackedBatch, rank: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Of each linear layer: sizes of input, weight, output's gradient, and the adapter's factors.

    As in ours the last layer computes scored tokens only, once its keys and values are there.
    """
    for layer in backbone.layers:
        for name, module in layer.named_modules():
            if (kind := name.rpartition(".")[2]) in LINEARS:
                behind = layer is backbone.layers[-1] and kind[0] not in "qkv"
                tokens = len(row.last if behind else row.input_ids)
                out, inner = module.out_features, module.in_features
                yield (tokens, inner), (out, inner), (tokens, out), (rank, inner), (out, rank)


def padded_questions(
    backbone: Any, row: PackedBatch, dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """Of each batch of similar length: queries of all heads, key, value, the gradient."""
    lengths = (row.cu_seqlens.diff() + row.prefix_length)[: row.num_questions]
    batches = []
    for batch in lengths.sort().values.chunk(BATCHES):
        one = len(batch), int(batch.max()), backbone.config.head_dim
        all_heads = one[0], one[1] * backbone.config.num_attention_heads, one[2]
        batches.append(numbers(dtype, all_heads, one, one, all_heads))
    return batches


def multiply(linears: list[tuple[Tensor, ...]], *, backward: bool, adapter: bool) -> None:
    """The products of linear layers and, in training, of their adapters' gradients."""
    for x, weight, grad, lora_a, lora_b in linears:
        matmul(x, weight.t())
        if backward:
            matmul(grad, weight)
        if backward and adapter:
            matmul(matmul(grad, lora_b).t(), x)
            matmul(matmul(x, lora_a.t()).t(), grad)


def attend(batches: list[tuple[Tensor, ...]], *, backward: bool) -> None:
    """The products and softmax of attention."""
    for q, k, v, grad in batches:
        weights = torch.bmm(q, k.mT).softmax(-1)
        torch.bmm(weights, v)
        if backward:
            torch.bmm(weights.mT, grad)
            of_weights = torch.bmm(grad, v.mT)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.bmm(of_scores, k)
            torch.bmm(of_scores.mT, q)


def with_vocabulary(path: str, words: int, folder: Path) -> Path:
    """A copy of a model whose embedding, which is also its head, has so many words."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(words, mean_resizing=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


def best_rates(acts: dict[str, Callable[[], None]], count: int) -> dict[str, dict[str, float]]:
    """Questions a second of each, by the number of threads.

    All take turns, as the machine may be faster in one minute than in the next.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for number in range(1 + PASSES):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, act in acts.items():
                started = time.perf_counter()
                act()
                if number:  # behind a warm-up
                    taken = time.perf_counter() - started
                    seconds.setdefault((name, threads), []).append(taken)
    return {
        name: {f"{n} threads": round(count / min(seconds[name, n]), 1) for n in (1, 2)}
        for name in acts
    }


def show_profile(act: Callable[[], None]) -> None:
    """Print the operators of a pass behind two warm-ups, with two threads, the longest first."""
    torch.set_num_threads(2)
    act(), act()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        act()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", help="of Hydra, such as acceleration.compile=default"
    )
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, help="words of the head; the bundled ones else")
    parser.add_argument(
        "--profile", action="store_true", help="only show what a pass of our training does"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cfg = compose("train", ["experiment=quickstart", *arguments.overrides])
    data = pipeline.build_datamodule(cfg)
    data.setup()
    questions = data.questions["train"][: arguments.questions]
    if arguments.profile:
        return show_profile(ours(cfg, questions, data)["training"])
    result: dict[str, Any] = {
        "overrides": arguments.overrides,
        "questions": len(questions),
        "load": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        if arguments.vocabulary:
            path = resolve_path(str(cfg.model.path))
            cfg.model.path = str(with_vocabulary(path, arguments.vocabulary, Path(folder)))
        acts = {
            f"{name} {what}": act
            for name, make in (("plain", plain), ("ours", ours))
            for what, act in make(cfg, questions, data).items()
        }
        backbone, rows = find_backbone(pipeline.build_base(cfg)), rows_of(data, questions)
        rank, dtype = int(cfg.peft.r), getattr(torch, cfg.quant.compute_dtype)
        acts |= bound(backbone, rows, rank, dtype)
        acts["square products"] = square_products(dtype)
        result |= best_rates(acts, len(questions))
    passes = max(result.pop("square products").values()) / len(questions)
    result["GFLOP/s of square products"] = round(passes * SQUARES * 2 * SIDE**3 / 1e9)
    for what in rows:
        count = operations(backbone, rows[what], rank, backward=what == "training")
        count /= len(questions)
        best = 1e9 * result["GFLOP/s of square products"] / count
        result[f"roof {what}"] = {"any threads": round(best, 1)}
    for what in ("training", "scoring"):
        names = ("plain", "ours", "products", "bound", "roof")
        rates = {name: max(result[f"{name} {what}"].values()) for name in names}
        for name in names[1:]:
            result[f"{what} ratio of {name}"] = round(rates[name] / rates["plain"], 1)
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
