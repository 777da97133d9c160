"""Time the attention kernels for several tile sizes, on Gemma-2B's shapes and MedMCQA's lengths.

    python benchmarks/tune_attention.py lengths.txt

The fastest become `FORWARD`, `BACKWARD_QUERY`, `BACKWARD_KEY` of medqlora/acceleration/kernels.py.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import triton

from medqlora.acceleration import kernels

TOKENS, HEADS, WIDTH = 16_384, 8, 256
TILES = ((16, 32), (16, 64), (32, 32), (32, 64), (64, 16), (64, 32), (64, 64))


def main() -> None:
    """Print the three fastest settings of each kernel."""
    lengths = np.random.default_rng(0).permutation(np.loadtxt(Path(sys.argv[1]), dtype=int))
    ends = np.cumsum(lengths)
    ends = ends[ends <= TOKENS]
    boundaries = torch.tensor([0, *ends, TOKENS], dtype=torch.int32, device="cuda")
    q, o, d = (
        torch.randn(TOKENS, HEADS * WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    k, v = (torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lse = torch.full((TOKENS, HEADS), 5.0, device="cuda")
    delta, dq = torch.zeros_like(lse), torch.empty_like(q)
    n = boundaries.numel() - 1
    fixed = {"HEADS": HEADS, "GROUP": HEADS, "WIDTH": WIDTH}

    def forward(tile):
        kernels._attention_forward[(n, HEADS)](q, k, v, o, lse, boundaries, 0.0625, **fixed, **tile)

    def backward_query(tile):
        kernels._attention_backward_query[(n, HEADS)](
            q, k, v, o, d, lse, delta, dq, boundaries, 0.0625, **fixed, **tile
        )

    def backward_key(tile):
        parts = tile.pop("PARTS")
        dk = torch.empty(parts, TOKENS, WIDTH, device="cuda")
        dv = torch.empty_like(dk)
        kernels._attention_backward_key[(n, 1, parts)](
            q, k, v, d, lse, delta, dk, dv, boundaries, 0.0625, TOKENS, PARTS=parts, **fixed, **tile
        )
        return dk.sum(0), dv.sum(0)

    for run in (forward, backward_query, backward_key):
        found = []
        for (block_q, block_k), warps, parts in itertools.product(
            TILES, (4, 8), (2, 4, 8) if run is backward_key else (0,)
        ):
            tile = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 1}
            if parts:
                tile["PARTS"] = parts
            try:
                ms = triton.testing.do_bench(lambda t=tile, r=run: r(dict(t)), warmup=3, rep=12)
            except Exception as error:
                print("failed", run.__name__, tile, type(error).__name__, flush=True)
                continue
            found.append((ms, tile))
        for ms, tile in sorted(found, key=lambda item: item[0])[:4]:
            print(f"{run.__name__:16s} {ms:.3f} ms {tile}", flush=True)


if __name__ == "__main__":
    main()
