"""Liger's kernels beside what `torch.compile` makes of the same lines, on Gemma-2B's shapes.

    python benchmarks/liger.py pieces
    python benchmarks/liger.py steps lengths.txt

Needs CUDA and `pip install liger-kernel`. `pieces` times Gemma's norm, a residual with the norm
behind it, GEGLU and the rotation of queries and keys, forward and with the way back, at 2,048 and
16,384 tokens, each recorded as a CUDA graph, so that nobody waits for launches; GB/s count what
must be read and written, each tensor once. `steps` trains the random Gemma-2B of fast_path.py with
one of Liger's in the place of ours, and with neighbouring kernels joined by Inductor ("combo").
Each line `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import fast_path
import numpy as np
import torch
from liger_kernel.ops import (  # pyright: ignore[reportMissingImports]
    LigerFusedAddRMSNormFunction,
    LigerGELUMulFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
)
from torch import Tensor
from triton.testing import do_bench_cudagraph

from medqlora.acceleration import fused

WIDTH, HEADS, HEAD_DIM, INNER, EPS = 2048, 8, 256, 16_384, 1e-6


def liger_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`fused.rms_norm` by Liger; in a tensor of its own, as the residual needs the gradient too."""
    return LigerRMSNormFunction.apply(hidden, weight, eps, 1.0, "gemma", False)


def liger_geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """`fused.geglu` by Liger, which knows one approximation; gradients replace its inputs."""
    assert approximate == "tanh"
    return LigerGELUMulFunction.apply(gate, up)


def liger_rotation(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor]:
    """`fused.rotate` by Liger, which turns both in their place."""
    tokens = len(query)
    heads = (t.view(1, tokens, -1, HEAD_DIM).transpose(1, 2) for t in (query, key))
    query, key = LigerRopeFunction.apply(*heads, cosine, sine, None, 1, HEAD_DIM)
    return query.transpose(1, 2).view(tokens, -1), key.transpose(1, 2).view(tokens, -1)


class Piece(NamedTuple):
    """A part of a layer, by both, and the elements that must be read and written."""

    name: str
    liger: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    forward: int
    backward: int


def pieces(tokens: int) -> Iterator[Piece]:
    """All parts at one length of a row."""
    positions = torch.arange(tokens, device="cuda") % 57
    frequencies = 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
    angles = positions[:, None].float() * frequencies
    cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
    weight = numbers(WIDTH)[0]
    hidden, inner = tokens * WIDTH, tokens * INNER

    def norm(x: Tensor) -> Tensor:
        return fused.rms_norm(x, weight, EPS)

    def liger_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 1.0, "gemma", False)

    def norm_of_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total), total

    x, residual = numbers((tokens, WIDTH), (tokens, WIDTH))
    yield Piece("norm", lambda x: liger_norm(x, weight, EPS), norm, (x,), 2 * hidden, 3 * hidden)
    yield Piece("residual and norm", liger_sum, norm_of_sum, (x, residual), 4 * hidden, 4 * hidden)
    gate, up = numbers((tokens, INNER), (tokens, INNER))
    yield Piece(
        "GEGLU",
        lambda gate, up: liger_geglu(gate, up, "tanh"),
        lambda gate, up: fused.geglu(gate, up, "tanh"),
        (gate, up),
        3 * inner,
        5 * inner,
    )
    query, key = numbers((tokens, HEADS * HEAD_DIM), (tokens, HEAD_DIM))
    turned = 2 * tokens * (HEADS + 1) * HEAD_DIM
    yield Piece(
        "rotation",
        lambda query, key: liger_rotation(query, key, cosine, sine),
        lambda query, key: (
            fused.rotate(query, cosine, sine),
            fused.rotate(key, cosine, sine),
        ),
        (query, key),
        turned,
        turned,
    )


def numbers(*sizes: Any) -> tuple[Tensor, ...]:
    """Random tensors in bfloat16 on the GPU."""
    return tuple(torch.randn(size, device="cuda").bfloat16() for size in sizes)


def time_piece(piece: Piece, tokens: int) -> dict[str, Any]:
    """Microseconds of both, their bandwidth, and how far the results lie apart."""
    torch._dynamo.reset()
    result: dict[str, Any] = {"piece": piece.name, "tokens": tokens}
    outcomes = []
    for name, function in (
        ("liger", piece.liger),
        ("ours", torch.compile(piece.ours, dynamic=False)),
    ):
        grads = tuple(torch.full_like(t, 0.5) for t in as_tuple(piece.ours(*piece.inputs)))
        inputs = copies(piece.inputs)

        def forward(function=function, inputs=inputs) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return as_tuple(function(*inputs))

        def both(function=function, inputs=inputs, grads=grads) -> tuple[Tensor, ...]:
            return torch.autograd.grad(as_tuple(function(*inputs)), inputs, grads)

        # Liger writes into what it is given, so what is compared is computed from fresh copies.
        outcomes.append(
            [
                *forward(inputs=copies(piece.inputs)),
                *both(inputs=copies(piece.inputs), grads=tuple(t.clone() for t in grads)),
            ]
        )
        for what, act, elements in (
            ("forward", forward, piece.forward),
            ("both", both, piece.forward + piece.backward),
        ):
            seconds = do_bench_cudagraph(act, rep=100, return_mode="median") / 1e3
            result[f"{name} {what} us"] = round(1e6 * seconds, 1)
            result[f"{name} {what} GB/s"] = round(2 * elements / seconds / 1e9)
    result["worst difference"] = max(
        round(
            float(
                (a - b).detach().norm(dtype=torch.float32) / b.detach().norm(dtype=torch.float32)
            ),
            5,
        )
        for a, b in zip(*outcomes, strict=True)
    )
    return result


def copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Leaves to compute gradients of."""
    return tuple(t.clone().requires_grad_() for t in inputs)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """One tensor or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def steps(lengths: np.ndarray) -> None:
    """Train with ours and with each of Liger's in the place of ours, one after the other."""
    model = fast_path.make_model(num_layers=18, vocab_size=256_000)
    letters = fast_path.letter_rows_of(model)
    own: dict[str, Any] = {
        "rms_norm": fused.rms_norm,
        "geglu": fused.geglu,
        "rotate": fused.rotate,
    }
    ways: dict[str, dict[str, Any]] = {
        "ours": {},
        "Liger's norm": {"rms_norm": liger_norm},
        "Liger's GEGLU": {"geglu": liger_geglu},
        "Liger's rotation": {"rotate": liger_rotation},
        "ours, combo kernels": {},
        "ours again": {},
    }
    for run in (fast_path.Run(2048, cuda_graphs=True, steps=200), fast_path.Run(16_384)):
        for name, replaced in ways.items():
            vars(fused).update(own | replaced)
            torch._dynamo.reset()
            print(name, flush=True)
            with torch._inductor.config.patch(combo_kernels="combo" in name):
                fast_path.measure(model, letters, lengths, run)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["pieces", "steps"])
    parser.add_argument("lengths", nargs="?", type=Path, help="for steps: one length a line")
    arguments = parser.parse_args()
    print("liger-kernel", version("liger-kernel"), torch.cuda.get_device_name())
    if arguments.what == "steps":
        steps(np.loadtxt(arguments.lengths, dtype=int))
        return
    for tokens in (2048, 16_384):
        for piece in pieces(tokens):
            print("RESULT", json.dumps(time_piece(piece, tokens)), flush=True)


if __name__ == "__main__":
    main()
