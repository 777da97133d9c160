"""Time the kernels of the fast path for several tile sizes, on Gemma-2B's shapes.

    python benchmarks/tune_kernels.py lengths.txt
    python benchmarks/tune_kernels.py lengths.txt forward weight

`lengths.txt` holds one question length in tokens a line. Each call is recorded as a CUDA graph,
with the sums that it leaves to others, and timed for rows of 2,048 and 16,384 tokens. The fastest
become the constants of medqlora/acceleration/kernels.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor
from triton.testing import do_bench_cudagraph

from medqlora.acceleration import kernels

HEADS, HEAD_DIM, WIDTH, INNER, RANK, PREFIX = 8, 256, 2048, 16_384, 16, 3
ROWS = (2048, 16_384)
Settings = dict[str, Any]


def tiles(names: tuple[str, ...], *values: tuple[int, ...]) -> list[Settings]:
    """Settings of a kernel, named in order."""
    return [dict(zip(names, value, strict=True)) for value in values]


ATTENTION = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
FORWARD = tiles(ATTENTION, (64, 32, 4, 1), (32, 32, 4, 1), (64, 32, 4, 2), (32, 32, 4, 2))
KEYS = tiles(ATTENTION, (32, 32, 4, 1), (32, 32, 4, 2), (64, 32, 8, 1), (32, 32, 8, 1))
PREFIXES = tiles(ATTENTION, (32, 16, 4, 1), (32, 16, 4, 2), (64, 16, 4, 1), (64, 16, 8, 2))
LORA = tiles(
    ("BLOCK_T", "BLOCK_N", "num_warps", "num_stages"),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 3),
    (256, 64, 8, 3),
    (256, 128, 8, 2),
    (512, 64, 8, 2),
)
WEIGHTS = tiles(
    ("BLOCK_N", "BLOCK_K", "num_warps"),
    *itertools.product((16, 32, 64), (128, 256), (2, 4, 8)),
)


def settings(kind: str) -> Iterator[Settings]:
    """Constants of the module `kernels` to try for a kind of kernel, for rows of any length."""
    if kind in ("forward", "backward_query"):
        for tile, splits in itertools.product(FORWARD, (1, 2, 4)):
            yield {kind.upper(): tile, "QUERY_SPLITS": splits, "QUERY_SPLITS_LONG": splits}
    elif kind == "backward_key":
        for tile, splits, parts in itertools.product(KEYS, (1, 2, 4, 8), (2, 4, 8)):
            yield {
                "BACKWARD_KEY": tile,
                "KEY_SPLITS": splits,
                "PARTS": parts,
                "PARTS_LONG": parts,
            }
    elif kind == "backward_prefix":
        for tile, chunk, parts in itertools.product(PREFIXES, (64, 128, 256), (4, 8)):
            yield {"BACKWARD_PREFIX": {**tile, "CHUNK": chunk}, "PREFIX_PARTS": parts}
    elif kind == "weight":
        yield from ({"WEIGHT": tile} for tile in WEIGHTS)
    else:
        for tile, programs in itertools.product(LORA, (132, 264, 528)):
            yield {"LORA": tile, "PROGRAMS": programs}


def numbers(*size: int) -> Tensor:
    """Random numbers in bfloat16 on the GPU."""
    return torch.randn(size, device="cuda").bfloat16()


def attention_of(lengths: np.ndarray, tokens: int) -> dict[str, Callable[[], Any]]:
    """Attention of one row, forward and back."""
    ends = PREFIX + np.cumsum(np.random.default_rng(0).permutation(lengths - PREFIX))
    ends = ends[ends <= tokens]
    boundaries = torch.tensor([0, PREFIX, *ends, tokens], dtype=torch.int32, device="cuda")
    query, grad = numbers(tokens, HEADS * HEAD_DIM), numbers(tokens, HEADS * HEAD_DIM)
    row = (query, numbers(tokens, HEAD_DIM), numbers(tokens, HEAD_DIM))
    fixed = (boundaries, HEADS, HEAD_DIM**-0.5, PREFIX)
    out = kernels.question_attention(*row, *fixed)

    def back() -> tuple[Tensor, ...]:
        parts = kernels.question_attention_backward(grad, *row, *out, *fixed)[1:]
        return tuple(part.sum(1) for part in parts)

    return {
        "forward": lambda: kernels.question_attention(*row, *fixed),
        "backward_query": back,
        "backward_key": back,
        "backward_prefix": back,
    }


def gradient_of(tokens: int, features: int) -> Callable[[], Any]:
    """The adapter's gradients of one layer, and the sums that are left."""
    given = numbers(tokens, features), numbers(tokens, RANK), numbers(features, RANK)
    return lambda: [part.sum(0) for part in kernels.lora_gradient(*given)]


def weight_of(out_features: int, in_features: int) -> Callable[[], Any]:
    """An effective weight in NF4 with double quantisation."""
    packed, state = quantize_4bit(
        numbers(out_features, in_features), compress_statistics=True, quant_type="nf4"
    )
    stored = (packed, state.absmax, state.state2.absmax, state.state2.code, state.offset)
    adapter = numbers(RANK, in_features), numbers(out_features, RANK)
    sizes = (out_features, in_features, 64)
    return lambda: kernels.effective_weight(
        *stored, state.code, *adapter, 2.0, *sizes, 1.0, torch.bfloat16, False, False
    )


def main() -> None:
    """Print the fastest settings of each kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lengths", type=Path, help="one question length in tokens a line")
    parser.add_argument(
        "kinds", nargs="*", help="forward, backward_query, ...; all if none is given"
    )
    arguments = parser.parse_args()
    lengths = np.loadtxt(arguments.lengths, dtype=int)
    acts: dict[str, dict[str, Callable[[], Any]]] = {}
    for tokens in ROWS:
        for kind, act in attention_of(lengths, tokens).items():
            acts.setdefault(kind, {})[f"{tokens}"] = act
        for features in (WIDTH, INNER):
            name = f"{tokens} x {features}"
            acts.setdefault("lora_gradient", {})[name] = gradient_of(tokens, features)
    acts["weight"] = {
        f"{a} x {b}": weight_of(a, b) for a, b in ((INNER, WIDTH), (WIDTH, INNER), (WIDTH, WIDTH))
    }
    for kind in arguments.kinds or acts:
        tune(kind, acts[kind])


def tune(kind: str, acts: dict[str, Callable[[], Any]]) -> None:
    """Print microseconds of the best settings of one kind, and of those in force, first."""
    before = dict(vars(kernels))
    found: list[tuple[dict[str, float], Settings]] = []
    for chosen in [{}, *settings(kind)]:
        vars(kernels).update({**before, **chosen})
        try:
            times = {
                name: round(1e3 * do_bench_cudagraph(act, rep=10, return_mode="median"), 1)
                for name, act in acts.items()
            }
        except Exception as error:
            print("failed", kind, chosen, type(error).__name__, flush=True)
            continue
        if not chosen:
            print(f"{kind} {times} now", flush=True)
            continue
        found.append((times | {"all": sum(times.values())}, chosen))
    for name in (*acts, "all"):
        for times, chosen in sorted(found, key=lambda one: one[0][name])[:3]:
            print(f"{kind}, {name}: {times} {chosen}", flush=True)
    vars(kernels).update(before)


if __name__ == "__main__":
    main()
