"""Figures of a result, readable in grey and by colour-blind readers.

Drawn without pyplot, so no window system and no global state is touched. Colours are those of Okabe
and Ito (2008, "Color Universal Design"); every series also differs in marker, line or hatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MultipleLocator, PercentFormatter

from medqlora.evaluation.calibration import (
    CoverageCurve,
    ReliabilityBins,
    apply_temperature,
    confidence_and_correct,
    coverage_curve,
    reliability_bins,
)
from medqlora.evaluation.metrics import score_arrays
from medqlora.evaluation.statistics import wilson_interval
from medqlora.evaluation.tables import SMALL
from medqlora.schema import LETTERS, Prediction

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe-Ito colours in order of use."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

RIM = withStroke(linewidth=2, foreground="white")
"""Effect of text that lies over lines."""

_GREY = "#999999"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "medqlora",  # the same figure gives the same file
}


def save_figure(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Save a figure as PNG (150 dots an inch) and SVG.

    Args:
        figure: The figure.
        stem: Path without ending; its folder is made if missing.

    Returns:
        The two files, `stem`.png and `stem`.svg.
    """
    path = Path(stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg"))
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure.savefig(png, dpi=150)
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def reliability_figure(runs: Mapping[str, ReliabilityBins], title: str | None = None) -> Figure:
    """Accuracy against confidence of equal-mass bins; on the diagonal they agree.

    Args:
        runs: Bins by name, such as "as scored" and "temperature 1.7".
        title: Heading.

    Returns:
        The figure.

    Raises:
        ValueError: If there is nothing to draw, or more series than can be told apart.
    """
    _check_series(runs)
    figure, axes = _figure(4.8, 5.0, title or "Reliability")
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, label="calibrated")
    for index, (name, bins) in enumerate(runs.items()):
        error = [bins.accuracy - bins.ci_low, bins.ci_high - bins.accuracy]
        axes.errorbar(
            bins.confidence,
            bins.accuracy,
            yerr=np.maximum(error, 0),
            color=COLOURS[index],
            marker=MARKERS[index],
            linestyle=LINES[index],
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=f"{name}: ECE {100 * bins.ece:.1f} %, n={int(bins.count.sum())}",
        )
    lowest = min(min(bins.confidence.min(), bins.ci_low.min()) for bins in runs.values())
    lower = max(0.0, np.floor(lowest * 10) / 10)
    axes.set(xlim=(lower, 1.01), ylim=(lower, 1.01), aspect="equal")
    axes.set(xlabel="confidence (probability of the chosen letter)", ylabel="accuracy")
    _percent_axes(axes, "both")
    # Labels of a full axis would touch at every tenth.
    axes.xaxis.set_major_locator(MultipleLocator(0.1 if lower >= 0.4 else 0.2))
    axes.yaxis.set_major_locator(MultipleLocator(0.1))
    _legend_below(figure, axes)
    return figure


def coverage_figure(
    runs: Mapping[str, CoverageCurve], majority_accuracy: float, title: str | None = None
) -> Figure:
    """Accuracy when only the most confident fraction is answered, with a 95 % Wilson band.

    Args:
        runs: Curves by name.
        majority_accuracy: The baseline, drawn as a line.
        title: Heading.

    Returns:
        The figure; points of fewer than 30 questions are left out, for they only show noise.

    Raises:
        ValueError: If there is nothing to draw, or more series than can be told apart.
    """
    _check_series(runs)
    figure, axes = _figure(5.2, 4.0, title or "Accuracy of the most confident answers")
    lowest = majority_accuracy
    for index, (name, curve) in enumerate(runs.items()):
        n = int(curve.count[-1])
        shown = np.flatnonzero(curve.count >= min(SMALL, n))
        # More points than pixels would only make the SVG large.
        shown = shown[np.unique(np.linspace(0, len(shown) - 1, 200).astype(int))]
        coverage, accuracy, count = (
            values[shown] for values in (curve.coverage, curve.accuracy, curve.count)
        )
        num_correct = np.rint(accuracy * count).astype(int)
        band = np.array(
            [wilson_interval(int(k), int(m)) for k, m in zip(num_correct, count, strict=True)]
        )
        axes.fill_between(
            coverage, band[:, 0], band[:, 1], color=COLOURS[index], alpha=0.15, linewidth=0
        )
        axes.plot(
            coverage,
            accuracy,
            color=COLOURS[index],
            linestyle=LINES[index],
            marker=MARKERS[index],
            markevery=[len(coverage) - 1],
            markersize=5,
            linewidth=1.4,
            label=f"{name}: all {100 * accuracy[-1]:.1f} %, n={n}",
        )
        lowest = min(lowest, float(band[:, 0].min()))
    _baseline(axes, majority_accuracy, horizontal=True)
    axes.set(xlim=(0, 1.02), ylim=(max(0.0, np.floor(lowest * 10) / 10), 1.0))
    axes.set(xlabel="coverage (fraction of questions answered)", ylabel="accuracy")
    _percent_axes(axes, "both")
    _legend_below(figure, axes)
    return figure


def confusion_figure(confusion: Sequence[Sequence[int]], title: str | None = None) -> Figure:
    """Which letter was chosen for which answer: counts, shaded by the share of each answer.

    Args:
        confusion: Rows are answers, columns predictions (`metrics.summarise`'s "confusion").
        title: Heading.

    Returns:
        The figure; margins give the totals, whose columns show a preference for letters.

    Raises:
        ValueError: If the matrix is not square or empty.
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.sum() == 0:
        raise ValueError(f"A confusion matrix is square and not empty, not {counts.shape}.")
    k = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    figure, axes = _figure(4.6, 4.4, title or "Answers and predictions")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    for row in range(k):
        for column in range(k):
            axes.text(
                column,
                row,
                f"{counts[row, column]}\n{100 * share[row, column]:.0f} %",
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.6 else "black",
                fontweight="bold" if row == column else "normal",
            )
    n = int(counts.sum())
    chosen = [f"{LETTERS[i]}\n{100 * counts[:, i].sum() / n:.0f} %" for i in range(k)]
    right = [f"{LETTERS[i]}  {100 * totals[i, 0] / n:.0f} %" for i in range(k)]
    axes.set_xticks(range(k), chosen)
    axes.set_yticks(range(k), right)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=f"predicted letter (share of n={n})", ylabel="answer (share)")
    return figure


def subject_figure(
    section: Mapping[str, Any], name: str = "subject_name", title: str | None = None
) -> Figure:
    """Accuracy of each group with its 95 % interval, n, and the majority baseline.

    Args:
        section: `val` or `test` of metrics.json.
        name: Key of `by`.
        title: Heading.

    Returns:
        The figure; groups below 30 questions are grey and hatched. Subjects are sorted by accuracy,
        small ones last; other groups keep their order.

    Raises:
        ValueError: If there is no group.
    """
    groups = section["by"].get(name) or {}
    if not groups:
        raise ValueError(f"No group of {name} to draw.")
    ordered = list(groups.items())
    if name == "subject_name":
        ordered.sort(key=lambda item: (item[1]["n"] < SMALL, -item[1]["accuracy"], item[0]))
    height = 1.5 + 0.24 * len(ordered)
    heading = title or f"Accuracy by {name.removesuffix('_name').replace('_', ' ')}"
    figure, axes = _figure(6.4, height, heading)
    first_small = next((name for name, values in ordered if values["n"] < SMALL), None)
    for place, (group, values) in enumerate(ordered):
        small = values["n"] < SMALL
        accuracy = values["accuracy"]
        axes.barh(
            place,
            accuracy,
            height=0.72,
            color="#E5E5E5" if small else COLOURS[5],
            edgecolor="#BBBBBB" if small else COLOURS[0],
            hatch="////" if small else None,
            linewidth=0.6,
            label=f"fewer than {SMALL} questions" if group == first_small else None,
        )
        axes.errorbar(
            accuracy,
            place,
            xerr=[[max(accuracy - values["ci_low"], 0)], [max(values["ci_high"] - accuracy, 0)]],
            color="#666666" if small else "black",
            elinewidth=1,
            capsize=2,
        )
        axes.text(
            1.02,
            place,
            f"{100 * accuracy:.0f} %  n={values['n']}",
            va="center",
            fontsize=8,
            color="#666666" if small else "black",
            transform=axes.get_yaxis_transform(),
        )
    _baseline(axes, section["majority_accuracy"], horizontal=False)
    axes.axvline(
        section["accuracy"],
        color="black",
        linewidth=1.2,
        linestyle=":",
        label=f"all {100 * section['accuracy']:.1f} % (n={section['n']})",
    )
    axes.set_yticks(range(len(ordered)), [group for group, _ in ordered])
    axes.set(xlim=(0, 1), ylim=(len(ordered) - 0.4, -0.6), xlabel="accuracy, 95 % Wilson interval")
    axes.tick_params(axis="y", length=0)
    _percent_axes(axes, "x")
    _legend_below(figure, axes)
    return figure


def split_figures(
    section: Mapping[str, Any],
    predictions: Sequence[Prediction],
    *,
    temperature: float | None = None,
    title: str | None = None,
) -> dict[str, Figure]:
    """The figures of one split.

    Args:
        section: `val` or `test` of metrics.json.
        predictions: Its predictions.
        temperature: Shown beside the scores as they are, where one was fitted.
        title: What was measured; stands in front of each heading.

    Returns:
        `reliability`, `coverage`, `confusion` and `subjects`; none without labelled questions, for
        each shows accuracy.
    """
    scores, answer = score_arrays(predictions)
    scores, answer = scores[answer >= 0], answer[answer >= 0]
    if not len(answer):
        return {}
    as_scored = confidence_and_correct(scores, answer)
    bins = {"as scored": reliability_bins(*as_scored)}
    if temperature is not None:
        scaled = confidence_and_correct(apply_temperature(scores, temperature), answer)
        bins[f"temperature {temperature:.2f}"] = reliability_bins(*scaled)

    def heading(text: str) -> str:
        return text if title is None else f"{title}: {text}"

    return {
        "reliability": reliability_figure(bins, heading("reliability")),
        "coverage": coverage_figure(
            {"most confident first": coverage_curve(*as_scored)},
            section["majority_accuracy"],
            heading("selective accuracy"),
        ),
        "confusion": confusion_figure(section["confusion"], heading("answers and predictions")),
        "subjects": subject_figure(section, title=heading("accuracy by subject")),
    }


def benchmark_figure(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Figure:
    """Size, accuracy and latency of the states of one model, one line each.

    Args:
        rows: From `benchmark.json`: `label`, `weight_gb`, `weight_gb_on_disk`, `section` and
            `latency`; what a row lacks is left out of its panel.
        title: Heading of the figure.

    Returns:
        Three panels side by side that share their lines.
    """
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(10, 1.3 + 0.5 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        sizes, accuracies, times = figure.subplots(1, 3, sharey=True)
        if title is not None:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        for line, row in enumerate(rows):
            _size_bars(sizes, line, row)
            _accuracy_point(accuracies, line, row.get("section") or {})
            _latency_bar(times, line, row.get("latency"))
        sizes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        sizes.invert_yaxis()
        sizes.set_title("weights, GB", loc="left")
        accuracies.set_title("accuracy, 95 % interval", loc="left")
        times.set_title("ms a question alone, p50 to p95", loc="left")
        baseline = [
            section["majority_accuracy"]
            for row in rows
            if (section := row.get("section") or {}).get("majority_accuracy") is not None
        ]
        if baseline:
            _baseline(accuracies, baseline[0], horizontal=False)
        accuracies.margins(x=0.2)
        _percent_axes(accuracies, "x")
        for axes in (sizes, accuracies, times):
            axes.tick_params(axis="y", length=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="upper left", bbox_to_anchor=(0, -0.22), fontsize=8, ncols=2)
    return figure


def _size_bars(axes: Axes, line: int, row: Mapping[str, Any]) -> None:
    device, disk = row.get("weight_gb"), row.get("weight_gb_on_disk")
    if device is None or disk is None:
        return
    names = ("on the device", "on disk") if not axes.containers else (None, None)
    bars = (
        axes.barh(line - 0.19, device, 0.34, label=names[0], color=COLOURS[0]),
        axes.barh(
            line + 0.19, disk, 0.34, label=names[1], color="white", edgecolor="black", hatch="////"
        ),
    )
    for bar, value in zip(bars, (device, disk), strict=True):
        axes.bar_label(bar, [f"{value:.3g}"], padding=3, fontsize=8)
    axes.margins(x=0.18)


def _accuracy_point(axes: Axes, line: int, section: Mapping[str, Any]) -> None:
    accuracy = section.get("accuracy")
    if accuracy is None:
        note = "no labels" if section.get("num_unlabelled") else "not scored"
        axes.text(0.5, line, note, transform=axes.get_yaxis_transform(), va="center", ha="center")
        return
    spread = [[accuracy - section["ci_low"]], [section["ci_high"] - accuracy]]
    axes.errorbar(accuracy, line, xerr=spread, fmt="o", color=COLOURS[0], capsize=4, linewidth=1.5)
    label = f"{100 * accuracy:.1f} %  n={section['n']}"
    axes.annotate(
        label, (accuracy, line), (0, 7), textcoords="offset points", ha="center", fontsize=8
    )


def _latency_bar(axes: Axes, line: int, latency: Mapping[str, Any] | None) -> None:
    if latency is None:
        return
    p50, p95 = 1000 * latency["p50_seconds"], 1000 * latency["p95_seconds"]
    axes.barh(line, p50, 0.5, color=COLOURS[5])
    axes.errorbar(p50, line, xerr=[[0], [p95 - p50]], color="black", capsize=4, linewidth=1.2)
    axes.annotate(
        f"{p50:.1f}", (p95, line), (6, 0), textcoords="offset points", va="center", fontsize=8
    )
    axes.margins(x=0.18)


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
    return figure, axes


def _baseline(axes: Axes, majority_accuracy: float, horizontal: bool) -> None:
    draw = axes.axhline if horizontal else axes.axvline
    draw(
        majority_accuracy,
        color="black",
        linewidth=1.2,
        label=f"majority letter {100 * majority_accuracy:.1f} %",
    )


def _percent_axes(axes: Axes, which: str) -> None:
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which in (name, "both"):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
            axis.grid(True, color="#E5E5E5", linewidth=0.6)


def _legend_below(figure: Figure, axes: Axes) -> None:
    """A legend outside the axes, where it cannot hide a point."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(len(label) for label in labels) < 32 else 1
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def _check_series(runs: Mapping[str, object]) -> None:
    if not 1 <= len(runs) <= len(COLOURS):
        raise ValueError(f"A figure shows 1 to {len(COLOURS)} series, not {len(runs)}.")
