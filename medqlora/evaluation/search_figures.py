"""A search seen from its run folders: which values were tried, what came out, what mattered."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from medqlora.evaluation.ablation import Ablation, Entry
from medqlora.evaluation.figures import COLOURS, RIM, _figure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Attributes:
        entry: Its run.
        number: Its number.
        params: What was tried.
        distributions: Where each value was drawn from, as Optuna writes it.
        metric: What was searched for.
        value: Its value, where it ended early the last; None of a failed trial.
        pruned: Whether it was ended early.
    """

    entry: Entry
    number: int
    params: Mapping[str, Any]
    distributions: Mapping[str, str]
    metric: str
    value: float | None
    pruned: bool


@dataclass(frozen=True)
class Scale:
    """One axis of the parallel coordinates.

    Attributes:
        name: The key.
        places: Where each value of a trial lies, in [0, 1].
        ticks: Places and what is written there.
    """

    name: str
    places: list[float]
    ticks: list[tuple[float, str]]


def trials_of(ablation: Ablation) -> list[Trial]:
    """The trials among the runs of an ablation, by number; none where nothing was searched."""
    trials = []
    for entry in ablation.entries:
        metrics = entry.run.metrics
        search, pruned = metrics.get("search"), metrics.get("pruned")
        if not search:
            continue
        split, key = search["metric"].split("/")
        value = pruned["value"] if pruned else metrics[split][key]
        if entry.run.status != "completed" and not pruned:
            value = None
        trials.append(
            Trial(
                entry,
                search["trial"],
                search["params"],
                search["distributions"],
                search["metric"],
                value,
                bool(pruned),
            )
        )
    return sorted(trials, key=lambda trial: trial.number)


def importances(trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the metric's variance that each searched key explains, by fANOVA.

    Args:
        trials: Of one search; those that completed count.

    Returns:
        Shares by key, the largest first; empty where fewer than four trials completed, all came out
        alike, or optuna is not installed.

    References:
        Hutter, Hoos, Leyton-Brown 2014, "An Efficient Approach for Assessing Hyperparameter
        Importance".
    """
    done = [trial for trial in trials if trial.value is not None and not trial.pruned]
    if len(done) < 4 or len({trial.value for trial in done}) < 2:
        return {}
    try:
        import optuna
        from optuna.distributions import json_to_distribution
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        evaluator = FanovaImportanceEvaluator(seed=0)
    except ImportError as error:
        log.info("no importance of what was searched: %s (pip install 'medqlora[optuna]')", error)
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for trial in done:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.params),
                distributions={k: json_to_distribution(v) for k, v in trial.distributions.items()},
                value=trial.value,
            )
        )
    return get_param_importances(study, evaluator=evaluator)


def scales(trials: Sequence[Trial]) -> list[Scale]:
    """The axes of the parallel coordinates: each searched key, and last what came out.

    Numbers over more than a factor of 30 lie on a log scale, words at equal distances.
    """
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    axes = [_scale(key, [trial.params.get(key) for trial in trials]) for key in keys]
    return [*axes, _scale(trials[0].metric, [trial.value for trial in trials])]


def _scale(name: str, values: Sequence[Any]) -> Scale:
    levels = list(dict.fromkeys(values))
    if all(_number(level) is not None for level in levels):
        numbers = [_number(value) or 0.0 for value in values]
        low, high = min(numbers), max(numbers)
        log_scale = low > 0 and high / low > 30
        start, end = (math.log(low), math.log(high)) if log_scale else (low, high)

        def place(number: float) -> float:
            return ((math.log(number) if log_scale else number) - start) / ((end - start) or 1)

        if isinstance(values[0], str):  # a choice among numbers: each is written
            shown = sorted(set(numbers))
        else:
            middle = math.exp((start + end) / 2) if log_scale else (start + end) / 2
            shown = sorted({low, middle, high})
        return Scale(name, [place(n) for n in numbers], [(place(n), f"{n:.3g}") for n in shown])
    levels = sorted(map(str, levels))
    step = 1 / max(1, len(levels) - 1)
    places = {level: i * step for i, level in enumerate(levels)}
    return Scale(name, [places[str(v)] for v in values], [(p, t) for t, p in places.items()])


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def goodness(trials: Sequence[Trial]) -> list[float]:
    """Rank of each trial among all, from 0 for the worst to 1 for the best."""
    sign = 1 if trials[0].metric.endswith("accuracy") else -1
    values = np.array([sign * (trial.value or 0.0) for trial in trials])
    ranks = (values[:, None] > values[None, :]).sum(axis=1)
    return (ranks / max(1, len(trials) - 1)).tolist()


def parallel_figure(trials: Sequence[Trial]) -> Figure:
    """Parallel coordinates: a line a trial through its values to what came out.

    Args:
        trials: Of one search; those that failed are left out.

    Raises:
        ValueError: If there are fewer than two.
    """
    shown = [trial for trial in trials if trial.value is not None]
    if len(shown) < 2:
        raise ValueError("Fewer than two trials came out.")
    axes = scales(shown)
    figure, plot = _figure(1.6 + 1.3 * len(axes), 3.8, "Every trial of the search")
    colours = colormaps["viridis_r"]
    for i, rank in sorted(enumerate(goodness(shown)), key=lambda pair: pair[1]):
        plot.plot(
            range(len(axes)),
            [axis.places[i] for axis in axes],
            color=colours(rank),
            alpha=0.9,
            linewidth=1.0 + rank,
            linestyle=":" if shown[i].pruned else "-",
        )
    for x, axis in enumerate(axes):
        plot.axvline(x, color="black", linewidth=0.8)
        for place, text in axis.ticks:
            plot.annotate(
                text,
                (x, place),
                (3, 0),
                textcoords="offset points",
                fontsize=7,
                path_effects=[RIM],
            )
    plot.set_xticks(range(len(axes)), [axis.name for axis in axes], fontsize=8)
    plot.set_yticks([])
    plot.set_xlim(-0.1, len(axes) - 0.6)
    plot.spines[["left", "bottom"]].set_visible(False)
    plot.set_xlabel("dark: best; dotted: ended early, with the value it had then", fontsize=8)
    return figure


def importance_figure(shares: Mapping[str, float], metric: str) -> Figure:
    """Bars of what each searched key explains.

    Args:
        shares: What `importances` returned.
        metric: What was searched for.

    Raises:
        ValueError: If there are none.
    """
    if not shares:
        raise ValueError("Too few trials for an importance.")
    figure, plot = _figure(5.2, 1.1 + 0.32 * len(shares), f"What mattered for {metric}")
    names = list(shares)[::-1]
    bars = plot.barh(names, [shares[name] for name in names], color=COLOURS[0])
    plot.bar_label(bars, [f"{100 * shares[name]:.0f} %" for name in names], padding=3, fontsize=8)
    plot.set_xlim(0, 1.08)
    plot.set_xlabel("share of the variance over completed trials (fANOVA)")
    return figure
