"""Figures of a sweep: what accuracy costs, how it was learned, what each choice did."""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from medqlora.evaluation.ablation import Effect, Setting, pareto_front
from medqlora.evaluation.figures import (
    _STYLE,
    COLOURS,
    LINES,
    MARKERS,
    RIM,
    _baseline,
    _figure,
    _legend_below,
    _percent_axes,
)
from medqlora.evaluation.results import RunResult
from medqlora.evaluation.statistics import Comparison, Interval, wilson_interval
from medqlora.evaluation.tables import SMALL

KINDS = {"trained": 0, "base": 1, "evaluated": 2}
"""Colour and marker of each kind of run."""

MAX_COLUMNS = 16
"""Settings a heat map or a labelled scatter shows; more would not be readable."""

Value = Callable[[RunResult], float | None]


def weight_gb(run: RunResult) -> float | None:
    """Weights with the adapter, in 10^9 bytes."""
    return run.metrics["model"]["weight_gb"]


def num_trainable(run: RunResult) -> float | None:
    """Trainable numbers."""
    return run.metrics["model"]["num_trainable"]


def milliseconds(split: str) -> Value:
    """Milliseconds a question of scoring a split, packed into rows."""

    def value(run: RunResult) -> float | None:
        timing = (run.metrics.get("scoring") or {}).get(split) or {}
        section = run.metrics[split]
        # Those without a label take time as well.
        n = (section["n"] or 0) + (section.get("num_unlabelled") or 0)
        return 1000 * timing["seconds"] / n if timing.get("seconds") and n else None

    return value


def curves(run: RunResult) -> dict[str, list[tuple[float, float]]]:
    """The logged curves of a run: (update, value) by key of metrics.csv.

    Args:
        run: A run; one without metrics.csv, or with a damaged one, has no curves.
    """
    path = run.run_dir / "metrics.csv"
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key, text in row.items():
                    if key in ("epoch", "step", None) or not text:
                        continue
                    value = float(text)
                    if math.isfinite(value):
                        found.setdefault(key, []).append((float(row["step"]), value))
    except (OSError, ValueError, KeyError, TypeError):
        return found
    return found


def is_scored(section: Mapping[str, Any]) -> bool:
    """Whether a section of metrics.json has what must stand beside an accuracy."""
    return bool(section["n"]) and section["majority_accuracy"] is not None


def num_options(section: Mapping[str, Any]) -> int:
    """Letters of a section's questions; knowing nothing about k of them is a loss of ln k nats."""
    return round(1 / (section.get("random_accuracy") or 0.25))


def curve_sizes(
    table: Mapping[str, Sequence[tuple[float, float]]], section: Mapping[str, Any]
) -> list[int]:
    """Questions behind each point of ``val/accuracy``: as logged, else those of val at the end.

    Args:
        table: Curves of a run (`curves`).
        section: `val` of its metrics.json.
    """
    logged = dict(table.get("val/n", ()))
    return [int(logged.get(step, float(section["n"]))) for step, _ in table["val/accuracy"]]


def curve_interval(accuracy: float, n: int) -> Interval:
    """95 % interval of an accuracy that was logged during training.

    Args:
        accuracy: As logged, a fraction.
        n: Questions that were scored.
    """
    return wilson_interval(round(accuracy * n), n)


def label_lines(name: str) -> list[str]:
    """A name in lines of at most 45 letters: names of one sweep often differ in their end alone."""
    return textwrap.wrap(name, 45, break_on_hyphens=False)


def label_places(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    bounds: tuple[float, float],
    height: float = 12,
) -> list[tuple[float, float, bool] | None]:
    """Where labels of points go so that none covers another or a point.

    Args:
        points: Places in pixels, y downwards.
        widths: Width of each label in pixels.
        bounds: Left and right end of the plot.
        height: Height of a label.

    Returns:
        For each point the label's start, its baseline and whether it ends there instead of
        starting; None where there is no room.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    places: list[tuple[float, float, bool] | None] = []
    for (x, y), width in zip(points, widths, strict=True):
        place = None
        for below, left in ((False, False), (False, True), (True, False), (True, True)):
            start = x - 7 - width if left else x + 7
            base = y + 5 + height if below else y - 5
            box = (start, base - height, start + width, base)
            free = bounds[0] <= box[0] and box[2] <= bounds[1]
            if free and not any(
                box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
            ):
                taken.append(box)
                place = (x - 7 if left else x + 7, base - 2, left)
                break
        places.append(place)
    return places


def cost_figure(
    settings: Sequence[Setting], value: Value, xlabel: str, split: str = "test"
) -> Figure:
    """Accuracy against a cost, with 95 % intervals and the Pareto front.

    Args:
        settings: Groups of seeds.
        value: The cost of a run, such as `weight_gb`.
        xlabel: What it is, with its unit.
        split: Name of the split.

    Raises:
        ValueError: If no setting has that cost.
    """
    shown = [(cost, s) for s in settings if (cost := s.mean(value)) is not None]
    if not shown:
        raise ValueError(f"No run knows its {xlabel}.")
    costs = [cost for cost, _ in shown]
    figure, axes = _figure(6.4, 4.4, f"Accuracy ({split}) against {xlabel.split(',')[0]}")
    for kind, style in KINDS.items():
        points = [(cost, s) for cost, s in shown if s.kind == kind]
        if points:
            accuracy = np.array([s.accuracy for _, s in points])
            low = np.array([s.interval.low for _, s in points])
            high = np.array([s.interval.high for _, s in points])
            axes.errorbar(
                [cost for cost, _ in points],
                accuracy,
                yerr=np.maximum([accuracy - low, high - accuracy], 0),
                color=COLOURS[style],
                marker=MARKERS[style],
                linestyle="none",
                markersize=5,
                elinewidth=0.8,
                capsize=2,
                label=f"{kind} (n={points[0][1].n})",
            )
    front = pareto_front(costs, [s.accuracy for _, s in shown])
    axes.plot(
        [costs[i] for i in front],
        [shown[i][1].accuracy for i in front],
        color="#666666",
        linewidth=1,
        linestyle="--",
        drawstyle="steps-post",
        label="Pareto front",
    )
    _baseline(axes, shown[0][1].majority_accuracy, horizontal=True)
    if min(costs) > 0 and max(costs) / min(costs) > 20:
        axes.set_xscale("log")
    if max(costs) >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.margins(x=0.12)
    axes.set(xlabel=xlabel, ylabel="accuracy, 95 % interval")
    _percent_axes(axes, "y")
    axes.grid(True, axis="x", color="#E5E5E5", linewidth=0.6)
    _legend_below(figure, axes)
    _label_points(figure, axes, shown)
    return figure


def _label_points(figure: Figure, axes: Axes, shown: Sequence[tuple[float, Setting]]) -> None:
    figure.draw_without_rendering()  # the layout settles where the points are
    height = figure.bbox.height
    pixels = axes.transData.transform([(cost, s.accuracy) for cost, s in shown])
    points = [(float(x), height - float(y)) for x, y in pixels]
    # 7 points at the screen's 100 dots an inch: a letter is about 5.4 pixels wide.
    widths = [5.4 * len(s.name) for _, s in shown]
    bounds = (float(axes.bbox.x0), float(axes.bbox.x1))
    for place, (_, setting) in zip(label_places(points, widths, bounds), shown, strict=True):
        if place is not None:
            x, y = axes.transData.inverted().transform((place[0], height - place[1]))
            ha = "right" if place[2] else "left"
            axes.text(x, y, setting.name, fontsize=7, ha=ha, path_effects=[RIM])


def learning_figure(
    runs: Mapping[str, Sequence[Mapping[str, Sequence[tuple[float, float]]]]],
    vals: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Training loss, validation loss and validation accuracy by update.

    Args:
        runs: For each setting, the curves of its runs (`curves`).
        vals: `val` of metrics.json of the runs. Without baseline and one n of all there is no
            validation accuracy. Where a validation logged its own n, as one of
            `trainer.limit_val_batches` has, that one counts.

    Raises:
        ValueError: If no run logged any of them.
    """
    keys = {"train/loss": "training loss", "val/loss": "val loss", "val/accuracy": "val accuracy"}
    letters = sorted({num_options(section) for section in vals}) or [4]
    vals = [section for section in vals if is_scored(section)]
    n = vals[0]["n"] if vals else 0
    if not n or any(section["n"] != n for section in vals):
        del keys["val/accuracy"]
    shown = [k for k in keys if any(table.get(k) for tables in runs.values() for table in tables)]
    if not shown:
        raise ValueError("No run logged a curve.")
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(3.6 * len(shown) + 0.4, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = np.atleast_1d(figure.subplots(1, len(shown)))
    sizes: set[int] = set()
    for axes, key in zip(panels, shown, strict=True):
        for index, (name, tables) in enumerate(runs.items()):
            colour = COLOURS[index % len(COLOURS)]
            line = LINES[index // len(COLOURS) % len(LINES)]
            for number, table in enumerate(tables):
                points = table.get(key)
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=colour,
                        linestyle=line,
                        linewidth=1.1,
                        alpha=0.9,
                        marker="." if len(points) < 30 else None,
                        label=name if number == 0 else None,
                    )
                if points and key == "val/accuracy":
                    own = curve_sizes(table, vals[0])
                    sizes.update(own)
                    ends = [curve_interval(y, k) for (_, y), k in zip(points, own, strict=True)]
                    axes.fill_between(
                        [x for x, _ in points],
                        [end.low for end in ends],
                        [end.high for end in ends],
                        color=colour,
                        alpha=max(0.3 / len(vals), 0.03),
                        linewidth=0,
                    )
        for k in letters if key.endswith("loss") else ():
            axes.axhline(
                math.log(k),
                color="black",
                linewidth=1,
                linestyle=":",
                label=f"knowing nothing: ln {k}",
            )
        title = keys[key]
        if key == "val/accuracy":
            title += f", n={', '.join(map(str, sorted(sizes)))}, 95 % intervals"
            for majority in dict.fromkeys(section["majority_accuracy"] for section in vals):
                _baseline(axes, majority, horizontal=True)
        axes.set_title(title, loc="left")
        axes.set_xlim(left=0)
        axes.set(xlabel="updates", ylabel="nats" if key.endswith("loss") else "accuracy")
        if key == "val/accuracy":
            _percent_axes(axes, "y")
        axes.grid(True, color="#E5E5E5", linewidth=0.6)
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    return figure


def subject_table(
    settings: Sequence[Setting], split: str, name: str = "subject_name"
) -> dict[str, dict[str, tuple[float, int]]]:
    """Accuracy and n of each group in each setting, seeds averaged; large groups first.

    Args:
        settings: Groups of seeds.
        split: "test" or "val".
        name: Key of `by`.

    Returns:
        group -> setting -> (accuracy, questions a run).
    """
    table: dict[str, dict[str, tuple[float, int]]] = {}
    for setting in settings:
        groups: dict[str, list[dict[str, float]]] = {}
        for entry in setting.entries:
            for group, values in entry.run.metrics[split]["by"].get(name, {}).items():
                groups.setdefault(group, []).append(values)
        for group, found in groups.items():
            accuracy = sum(v["accuracy"] for v in found) / len(found)
            table.setdefault(group, {})[setting.name] = (accuracy, int(found[0]["n"]))
    size = {group: max(n for _, n in cells.values()) for group, cells in table.items()}
    return {group: table[group] for group in sorted(table, key=lambda g: (-size[g], g))}


def heat_figure(settings: Sequence[Setting], split: str, name: str = "subject_name") -> Figure:
    """Accuracy of each setting in each subject, as a map with its numbers.

    Args:
        settings: Groups of seeds; of more than `MAX_COLUMNS` the most accurate are shown.
        split: "test" or "val".
        name: Key of `by`.

    Raises:
        ValueError: If there is no group.
    """
    shown = _readable(settings)
    table = subject_table(shown, split, name)
    if not table:
        raise ValueError(f"No group of {name} to draw.")
    columns = [setting.name for setting in shown]
    values = np.full((len(table) + 1, len(columns)), np.nan)
    values[0] = [setting.accuracy for setting in shown]
    for i, cells in enumerate(table.values(), start=1):
        for j, column in enumerate(columns):
            if column in cells:
                values[i, j] = cells[column][0]
    sizes = [shown[0].n, *(max(n for _, n in cells.values()) for cells in table.values())]
    figure, axes = _figure(
        2.6 + 0.55 * len(columns), 2.2 + 0.26 * len(sizes), f"Accuracy ({split}) in %"
    )
    low, high = np.nanmin(values), np.nanmax(values)
    axes.imshow(values, cmap="Blues", vmin=low, vmax=max(high, low + 0.01), aspect="auto")
    for i, n in enumerate(sizes):
        for j in range(len(columns)):
            if math.isfinite(values[i, j]):
                dark = values[i, j] > low + 0.62 * (high - low)
                axes.text(
                    j,
                    i,
                    f"{100 * values[i, j]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                    fontstyle="italic" if n < SMALL else "normal",
                    fontweight="bold" if i == 0 else "normal",
                )
    majority = 100 * shown[0].majority_accuracy
    names = [f"all (majority {majority:.0f} %)", *table]
    axes.set_yticks(
        range(len(sizes)),
        [f"{group}  n={n}" for group, n in zip(names, sizes, strict=True)],
        fontsize=7,
    )
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.axhline(0.5, color="white", linewidth=3)
    axes.set_xlabel(f"italics: fewer than {SMALL} questions", fontsize=7)
    return figure


def effects_figure(effects: Sequence[Effect], majority_accuracy: float) -> Figure:
    """Mean accuracy at each level of each factor, all else equal.

    Args:
        effects: What `main_effects` returned.
        majority_accuracy: The baseline, drawn as a line.

    Raises:
        ValueError: If there are none.
    """
    factors = list(dict.fromkeys(effect.factor for effect in effects))
    if not factors:
        raise ValueError("No factor was varied.")
    levels = {f: [e for e in effects if e.factor == f] for f in factors}
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        widths = [1 + len(levels[f]) for f in factors]
        figure = Figure(figsize=(1.4 + 0.6 * sum(widths), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = np.atleast_1d(figure.subplots(1, len(factors), sharey=True, width_ratios=widths))
    for axes, factor in zip(panels, factors, strict=True):
        shown = levels[factor]
        accuracy = np.array([e.accuracy for e in shown])
        error = [
            [max(e.accuracy - e.interval.low, 0) for e in shown],
            [max(e.interval.high - e.accuracy, 0) for e in shown],
        ]
        axes.errorbar(
            range(len(shown)),
            accuracy,
            yerr=error,
            color=COLOURS[0],
            marker="o",
            markersize=5,
            linestyle="-",
            linewidth=0.8,
            capsize=2,
        )
        blocks = shown[0].num_blocks
        balance = f"{blocks} matched blocks" if blocks else "not balanced"
        axes.set_title(f"{factor}\n{balance}", loc="left", fontsize=8)
        axes.set_xticks(
            range(len(shown)), [e.level for e in shown], rotation=40, ha="right", fontsize=7
        )
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.axhline(majority_accuracy, color="black", linewidth=1.2)
        axes.grid(True, axis="y", color="#E5E5E5", linewidth=0.6)
    panels[0].set_ylabel("accuracy, 95 % interval over questions")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    sizes = ", ".join(dict.fromkeys(str(effect.n) for effect in effects))
    figure.supxlabel(
        f"n={sizes}; line: majority letter {100 * majority_accuracy:.1f} %", fontsize=7
    )
    return figure


def forest_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Paired differences to the baseline with 95 % intervals and Holm-corrected p-values.

    Args:
        comparisons: What `compare_family` returned, all with the same first run.

    Raises:
        ValueError: If there are none.
    """
    if not comparisons:
        raise ValueError("Nothing was compared.")
    ordered = sorted(comparisons, key=lambda c: c.difference)
    first = ordered[0]
    names = ["\n".join(label_lines(c.name_b)) for c in ordered]
    lines = max(name.count("\n") for name in names)
    figure, axes = _figure(6.6, 1.5 + (0.28 + 0.15 * lines) * len(ordered), "")
    # Over the names too: over the plot alone it would have too little room.
    figure.suptitle(
        textwrap.fill(
            f"Difference to {first.name_a} ({100 * first.accuracy_a:.1f} %, n={first.n})", 70
        ),
        x=0.01,
        ha="left",
        fontsize=axes.title.get_fontsize(),
    )
    for place, c in enumerate(ordered):
        sure = c.p_holm is not None and c.p_holm < 0.05
        axes.errorbar(
            100 * c.difference,
            place,
            xerr=[
                [max(100 * (c.difference - c.ci_low), 0)],
                [max(100 * (c.ci_high - c.difference), 0)],
            ],
            color=COLOURS[0] if sure else "#777777",
            marker="s" if sure else "o",
            markerfacecolor=COLOURS[0] if sure else "white",
            markersize=5,
            elinewidth=1,
            capsize=2,
        )
        p = c.p_value if c.p_holm is None else c.p_holm
        axes.text(
            1.02,
            place,
            f"{100 * c.difference:+.1f}  p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}",
            va="center",
            fontsize=7,
            transform=axes.get_yaxis_transform(),
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(ordered)), names, fontsize=8)
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlabel(
        "percentage points, 95 % interval; filled: p < 0.05 after Holm's correction", fontsize=8
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color="#E5E5E5", linewidth=0.6)
    return figure


def _readable(settings: Sequence[Setting]) -> list[Setting]:
    if len(settings) <= MAX_COLUMNS:
        return list(settings)
    best = sorted(settings, key=lambda s: -s.accuracy)[:MAX_COLUMNS]
    return [setting for setting in settings if setting in best]
