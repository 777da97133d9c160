"""Draws `roofline.png`: questions a second by tokens a step, below what the card allows.

    python benchmarks/roofline.py

The points are in `speed.json`, each with its card and the command that gave it. The roof is that of
a step of Gemma-2B with a frozen base: 4 x 1.98e9 floating-point operations a token (forward, and
the gradient of every layer's input) at 790 TFLOP/s, what a large bfloat16 product reaches on an
H100 and an H200 alike. The slope is the least that must move a step: the NF4 weights twice, at
4.3 TB/s. Where both lie far above, nothing but the products is left to wait for.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
MEAN_TOKENS = 56.6
"""Tokens of a question, mean of the 4,183 of MedMCQA's validation set."""

FLOPS_PER_TOKEN, FLOPS = 4 * 1.98e9, 790e12
WEIGHT_BYTES, BANDWIDTH = 2 * 1.02e9, 4.3e12
MARKS = {
    "loop": ("o", "#0072b2", "bare loop"),
    "float8": ("s", "#cc79a7", "bare loop, 8-bit floats"),
    "command": ("D", "#009e73", "python -m medqlora.train"),
    "peer": ("^", "#d55e00", "peers: questions a step"),
}


def draw(points: list[dict], path: Path) -> None:
    """Write the figure.

    Args:
        points: Entries of `speed.json`.
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
        chosen = [point for point in points if point["kind"] == kind]
        for card, face in (("H200", colour), ("H100", "white")):
            some = [point for point in chosen if point["card"] == card]
            if some:
                axes.scatter(
                    [point["tokens"] for point in some],
                    [point["questions_per_second"] for point in some],
                    marker=mark, s=52, color=face, edgecolors=colour, linewidths=1.6, zorder=3,
                    label=f"{name}, {card}",
                )  # fmt: skip
    for point in points:
        rate = point["questions_per_second"]
        name = f"{point['label']}: " if point["kind"] == "peer" else ""
        if point["kind"] in ("peer", "command"):
            colour = MARKS[point["kind"]][1]
            left = point.get("label_left", False)  # where another mark is to the right
            place = (
                point["tokens"] * (1 / 1.16 if left else 1.16),
                min(rate, 0.88 * compute),  # clear of the roof
            )
            how = {"ha": "right" if left else "left", "va": "center", "fontsize": 9}
            axes.text(*place, f"{name}{rate:,.0f}", color=colour, **how)
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
    draw(json.loads((HERE / "speed.json").read_text()), HERE / "roofline.png")
