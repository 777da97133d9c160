"""Draws `roofline.png`: questions a second by tokens a step, below what the card allows.

    python benchmarks/roofline.py

The points are rows of `training.json` and `budgets.json`, chosen below by their call: one call of
whole commands beside the peers, and loops without Lightning. The roof is that of a step of Gemma-2B
with a frozen base: 4 x 1.98e9 floating-point operations a token (forward, and
the gradient of every layer's input) at 790 TFLOP/s, what a large bfloat16 product reaches on an
H100 and an H200 alike. The slope is the least that must move a step: the NF4 weights twice, at
4.3 TB/s. Where both lie far above, nothing but the products is left to wait for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
MEAN_TOKENS = 56.6
"""Tokens of a question, mean of the 4,183 of MedMCQA's validation set."""

FLOPS_PER_TOKEN, FLOPS = 4 * 1.98e9, 790e12
WEIGHT_BYTES, BANDWIDTH = 2 * 1.02e9, 4.3e12
NAMES = {"trl": "TRL", "unsloth": "Unsloth"}

BESIDE_PEERS, SMALLEST, SMALL_PEERS = 25, 29, 1
"""Calls of `training.json`: the whole comparison, the least memory, and peers at 16 questions."""

COMMANDS = {
    BESIDE_PEERS: [
        "16384,logger=csv,steps=90", "16384,float8,logger=csv,steps=80", "2048,logger=csv,steps=400"
    ],
    SMALLEST: ["1024,nf4_full,layers,logger=csv,optimizer=adamw_8bit,steps=100"],
}  # fmt: skip
"""Runs of `training.json` by their call."""

LOOPS = 3, 4, 29
"""Calls of `budgets.json`."""

MARKS = {
    "loop": ("o", "#0072b2", "bare loop"),
    "float8": ("s", "#cc79a7", "bare loop, 8-bit floats"),
    "command": ("D", "#009e73", "python -m medqlora.train"),
    "peer": ("^", "#d55e00", "peers: questions a step"),
}


class Point(NamedTuple):
    """A rate in questions a second at so many tokens a step, and on which card."""

    kind: str
    card: str
    tokens: float
    rate: float
    label: str = ""


def points() -> Iterator[Point]:
    """What is drawn, read from the two files."""
    runs = json.loads((HERE / "training.json").read_text())
    cards = {run["call"]: card_of(run) for run in runs if "device" in run}
    for run in runs:
        call, rate = run["call"], run["questions_per_second"]
        if run["run"] in COMMANDS.get(call, ()):
            yield Point("command", cards[call], run["tokens"], rate)
        elif run["kind"] == "peer" and (
            call == BESIDE_PEERS or (call == SMALL_PEERS and run["batch"] == 16)
        ):
            label = f"{NAMES[run['mode']]}, {run['batch']}"
            yield Point("peer", cards[call], run["batch"] * MEAN_TOKENS, rate, label)
    for row in json.loads((HERE / "budgets.json").read_text()):
        stored = row["checkpointing"] == "none" and not row["dropout"]
        if row["call"] in LOOPS and stored and not row["score"]:
            kind = "float8" if row["float8"] else "loop"
            rate = row["training_questions_per_second"]
            yield Point(kind, card_of(row), row["tokens"], rate)


def card_of(row: dict[str, Any]) -> str:
    """Name of a card without its maker and memory."""
    return row["device"].split()[1]


def draw(points: list[Point], path: Path) -> None:
    """Write the figure.

    Args:
        points: What to draw.
        path: A PNG.
    """
    figure, axes = plt.subplots(figsize=(8.0, 4.6), layout="constrained")
    tokens = np.geomspace(24, 65_536, 200)
    compute = FLOPS / FLOPS_PER_TOKEN / MEAN_TOKENS
    memory = tokens / MEAN_TOKENS / (WEIGHT_BYTES / BANDWIDTH)
    axes.plot(tokens, np.minimum(compute, memory), color="#444", linewidth=1.6)
    axes.text(9_000, compute * 1.06, f"{compute:,.0f}: products in bfloat16", ha="right")
    axes.text(56, 1150, "weights read twice in NF4", color="#444")
    for kind, (mark, colour, name) in MARKS.items():
        for card, face in (("H200", colour), ("H100", "white")):
            some = [point for point in points if (point.kind, point.card) == (kind, card)]
            if some:
                axes.scatter(
                    [point.tokens for point in some],
                    [point.rate for point in some],
                    marker=mark, s=52, color=face, edgecolors=colour, linewidths=1.6, zorder=3,
                    label=f"{name}, {card}",
                )  # fmt: skip
    for point in points:
        if point.kind in ("peer", "command"):
            label = f"{point.label}: " if point.label else ""
            left = point.label == "TRL, 128"  # Unsloth's mark is to the right
            place = point.tokens * (1 / 1.16 if left else 1.16), min(point.rate, 0.88 * compute)
            axes.text(
                *place, f"{label}{point.rate:,.0f}", color=MARKS[point.kind][1], fontsize=9,
                ha="right" if left else "left", va="center",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(24, 90_000), ylim=(15, 4000))
    ticks = [64, 256, 1024, 2048, 4096, 16_384, 65_536]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    rates = [20, 50, 100, 200, 500, 1000, 2000, 4000]
    axes.set_yticks(rates, [f"{rate:,}" for rate in rates])
    axes.minorticks_off()
    axes.grid(color="#ddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set(xlabel="tokens a step", ylabel="questions a second")
    axes.set_title("Training Gemma-2B in NF4 with LoRA r=16, MedMCQA's lengths", loc="left")
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    matplotlib.use("Agg")
    draw(list(points()), HERE / "roofline.png")
