"""Figures of what is inside: weights, their storage, what an adapter changed, and packed rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medqlora.evaluation.figures import (
    _GREY,
    _STYLE,
    COLOURS,
    LINES,
    MARKERS,
    _check_series,
    _figure,
    _legend_below,
)
from medqlora.schema import PackedBatch


def layer_figure(table: pd.DataFrame, title: str, digits: int = 2) -> Figure:
    """A number of every weight as a map: modules down, layers across.

    Args:
        table: Modules as index, layer numbers as columns; NaN where a layer has no such module.
        title: What the numbers are.
        digits: Significant digits that are written into the cells.

    Raises:
        ValueError: If the table is empty.
    """
    if table.empty:
        raise ValueError("No layer to draw.")
    values = table.to_numpy(dtype=float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    figure, axes = _figure(1.8 + 0.52 * values.shape[1], 1.1 + 0.3 * values.shape[0], title)
    axes.imshow(values, cmap="Blues", vmin=low, vmax=max(high, low + 1e-12), aspect="auto")
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        axes.text(
            column,
            row,
            f"{value:.{digits}g}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if value > low + 0.62 * (high - low) else "black",
        )
    axes.set_yticks(range(len(table.index)), [str(name) for name in table.index], fontsize=8)
    axes.set_xticks(range(len(table.columns)), [str(name) for name in table.columns], fontsize=8)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def spectrum_figure(
    spectra: Mapping[str, Sequence[Sequence[float]]], title: str | None = None
) -> Figure:
    """Singular values of what was added to each weight, a panel a module and a line a layer.

    Args:
        spectra: By module, the falling singular values of each layer.
        title: Heading.

    Returns:
        The figure; later layers are darker, and all panels share one logarithmic axis.

    Raises:
        ValueError: If there is no value above zero, as of a fresh adapter.
    """
    largest = max((v for lines in spectra.values() for line in lines for v in line), default=0.0)
    if not largest > 0:
        raise ValueError("No singular value is above zero: nothing was added.")
    columns = min(len(spectra), 4)
    rows = -(-len(spectra) // columns)
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(2.4 * columns, 0.6 + 2.0 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        figure.suptitle(title or "Singular values of what was added", x=0.01, ha="left")
        for axes, (module, lines) in zip(panels, spectra.items(), strict=False):
            for number, line in enumerate(lines):
                shade = mpl.colormaps["Blues"](0.35 + 0.65 * number / max(len(lines) - 1, 1))
                # Below float32's precision there is only noise of the decomposition.
                shown = [v if v > 1e-6 * largest else math.nan for v in line]
                axes.plot(range(1, len(line) + 1), shown, color=shade, linewidth=1.1)
            axes.set_title(module, loc="left", fontsize=9)
            axes.set_yscale("log")
            axes.grid(True, color="#E5E5E5", linewidth=0.6)
        for axes in panels[len(spectra) :]:
            axes.set_visible(False)
        figure.supxlabel("direction, by size (light: first layer, dark: last)", fontsize=8)
    return figure


def change_figure(changes: pd.DataFrame, title: str | None = None) -> Figure:
    """What an adapter added to each weight beside what quantisation had rounded away from it.

    Args:
        changes: `module`, `layer`, `relative_norm`, `rounding_error`, `largest` and
            `rounding_largest` of each weight, in the order of the model.
        title: Heading.

    Returns:
        Two panels over the weights: size (Frobenius norm over that of the weight), and strength in
        the strongest direction (largest singular value). A weight that is not rounded has no mark.
    """
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            title or "What the adapter added, and what rounding took", x=0.01, ha="left"
        )
        panels = figure.subplots(1, 2)
        for axes, told, names in zip(
            panels,
            ("size, relative to the weight", "largest singular value"),
            (("relative_norm", "rounding_error"), ("largest", "rounding_largest")),
            strict=True,
        ):
            for index, (column, label) in enumerate(
                zip(names, ("added by the adapter", "lost to rounding"), strict=True)
            ):
                values = changes[column].to_numpy(dtype=float)
                axes.plot(
                    range(len(values)),
                    np.where(values > 0, values, np.nan),
                    color=COLOURS[index],
                    marker=MARKERS[index],
                    linestyle="none",
                    markersize=4,
                    label=label,
                )
            axes.set_yscale("log")
            axes.set_title(told, loc="left", fontsize=9)
            _mark_layers(axes, changes["layer"].tolist())
        _legend_below(figure, panels[0])
    return figure


def rounding_figure(
    errors: Mapping[str, Mapping[str, float]], layers: Sequence[int], title: str | None = None
) -> Figure:
    """Relative rounding error of every weight under several storages, a series each.

    Args:
        errors: By storage, the error of each weight; the same weights in the same order.
        layers: Layer number of each weight.
        title: Heading.

    Raises:
        ValueError: If there is nothing to draw, or more series than can be told apart.
    """
    _check_series(errors)
    figure, axes = _figure(8.4, 3.6, title or "Rounding error of each weight")
    for index, (name, values) in enumerate(errors.items()):
        axes.plot(
            range(len(values)),
            [v or math.nan for v in values.values()],
            color=COLOURS[index],
            marker=MARKERS[index],
            linestyle=LINES[index],
            markersize=3,
            linewidth=0.8,
            label=name,
        )
    axes.set_ylabel("||stored - original|| / ||original||")
    axes.set_yscale("log")
    _mark_layers(axes, layers)
    _legend_below(figure, axes)
    return figure


def levels_figure(
    values: Float[np.ndarray, " weight"], levels: Mapping[str, Sequence[float]]
) -> Figure:
    """How weights lie within their blocks, and the values that a 4-bit code can take there.

    Args:
        values: Weights divided by the largest of their block, in [-1, 1].
        levels: By code, the values it can take.

    Returns:
        A histogram, and under it one row of ticks a code.
    """
    figure, axes = _figure(7.2, 3.4, "Weights within their blocks, and the values a code has")
    counts, _, _ = axes.hist(values, bins=120, range=(-1, 1), color=COLOURS[5], label="weights")
    top = float(np.max(np.asarray(counts)))
    for index, (name, points) in enumerate(levels.items()):
        place = -0.09 * top * (index + 1)
        axes.plot(
            points, [place] * len(points), "|", color=COLOURS[index], markersize=11, mew=1.6,
            label=f"{name}, {len(set(points))} values",
        )  # fmt: skip
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(-1.03, 1.03), xlabel="weight / largest of its block")
    _legend_below(figure, axes)
    return figure


def packing_figure(rows: Sequence[PackedBatch], title: str | None = None) -> Figure:
    """Rows of questions as bars: each question its length, the token that is scored, the rest.

    Args:
        rows: Packed rows of one length.
        title: Heading.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("No row to draw.")
    budget = len(rows[0].input_ids)
    used = sum(row.num_tokens for row in rows) / (budget * len(rows))
    heading = title or f"{len(rows)} rows of {budget:,} tokens, {100 * used:.1f} % filled"
    figure, axes = _figure(8.4, 1.1 + 0.34 * len(rows), heading)
    for line, row in enumerate(rows):
        starts = row.cu_seqlens[: row.num_questions + 1].tolist()
        lengths = np.diff(starts)
        colours = [COLOURS[5] if i % 2 else COLOURS[0] for i in range(len(lengths))]
        axes.barh(line, lengths, 0.72, left=starts[:-1], color=colours, linewidth=0)
        if row.prefix_length:
            label = "shared by all questions of the row" if line == 0 else None
            axes.barh(line, row.prefix_length, 0.72, color=COLOURS[1], linewidth=0, label=label)
        scored = row.last[: row.num_questions].tolist()
        label = "token whose next one is the answer" if line == 0 else None
        axes.plot(scored, [line] * len(scored), "|", color="black", markersize=7, label=label)
        axes.barh(
            line,
            budget - starts[-1],
            0.72,
            left=starts[-1],
            color="white",
            edgecolor=_GREY,
            hatch="////",
            linewidth=0.6,
            label="padding" if line == 0 else None,
        )
        axes.text(
            1.01,
            line,
            f"{row.num_questions} questions",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    axes.set(xlim=(0, budget), ylim=(len(rows) - 0.4, -0.6), xlabel="token of the row")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    _legend_below(figure, axes)
    return figure


def length_figure(lengths: Mapping[str, Int[np.ndarray, " question"]]) -> Figure:
    """How long the questions of each split are in tokens, as shares.

    Args:
        lengths: Tokens of each question, by split.

    Raises:
        ValueError: If there is nothing to draw, or more series than can be told apart.
    """
    _check_series(lengths)
    figure, axes = _figure(6.4, 3.4, "Length of the questions")
    longest = max(int(values.max()) for values in lengths.values())
    bins = np.arange(0, longest + 5, max(1, longest // 40)).tolist()
    for index, (name, values) in enumerate(lengths.items()):
        axes.hist(
            values,
            bins=bins,
            weights=np.full(len(values), 100 / len(values)),
            histtype="step",
            color=COLOURS[index],
            linestyle=LINES[index],
            linewidth=1.4,
            label=f"{name}: mean {values.mean():.1f}, n={len(values)}",
        )
    axes.set(xlabel="tokens, BOS included", ylabel="% of the questions")
    axes.grid(True, color="#E5E5E5", linewidth=0.6)
    _legend_below(figure, axes)
    return figure


def _mark_layers(axes: Axes, layers: Sequence[int]) -> None:
    """Thin lines between the layers, and their numbers under the middle of each."""
    numbers = np.asarray(layers)
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
    for start in starts[1:-1]:
        axes.axvline(start - 0.5, color="#E5E5E5", linewidth=0.8)
    middles = [(a + b - 1) / 2 for a, b in pairwise(starts)]
    axes.set_xticks(middles, [str(numbers[start]) for start in starts[:-1]], fontsize=7)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("layer; within it the weights in the order of the model")
