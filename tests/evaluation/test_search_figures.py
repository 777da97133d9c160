"""What a search tried, what came out, and which key it depended on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from medqlora.evaluation import empty_metrics
from medqlora.evaluation.ablation import Ablation, Entry
from medqlora.evaluation.results import RunResult
from medqlora.evaluation.search_figures import (
    Trial,
    goodness,
    importance_figure,
    importances,
    parallel_figure,
    scales,
    trials_of,
)

SPACE = {
    "lr": {
        "name": "FloatDistribution",
        "attributes": {"low": 1e-4, "high": 1e-2, "log": True, "step": None},
    },
    "r": {"name": "CategoricalDistribution", "attributes": {"choices": ["4", "16", "64"]}},
    "loss": {"name": "CategoricalDistribution", "attributes": {"choices": ["choice", "token"]}},
}


def entry(number: int, *, status: str = "completed", loss: float | None = None, **more) -> Entry:
    metrics: dict[str, Any] = empty_metrics() | {"status": status} | more
    metrics["val"]["loss"] = loss
    return Entry(RunResult(Path(str(number)), metrics, {}), "trained", {}, str(number), "")


def trial(number: int, value: float | None, *, pruned: bool = False, **params: Any) -> Trial:
    distributions = {key: json.dumps(SPACE[key]) for key in params}
    return Trial(entry(number), number, params, distributions, "val/loss", value, pruned)


@pytest.fixture
def trials() -> list[Trial]:
    """The rate alone decides; the rank does nothing."""
    rates = [1e-4 * 10 ** (i / 8) for i in range(17)]
    return [
        trial(i, abs(math.log10(rate) + 3), lr=rate, r=("4", "16", "64")[i % 3])
        for i, rate in enumerate(rates)
    ]


def test_what_decides_explains_the_variance_and_the_shares_are_of_one_whole(trials):
    shares = importances(trials)
    assert list(shares) == ["lr", "r"], "the largest first"
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["lr"] > 0.9
    bars = importance_figure(shares, "val/loss").axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["r", "lr"]
    assert f"{100 * shares['lr']:.0f} %" in [text.get_text() for text in bars.texts]


def test_nothing_is_said_of_too_few_trials_or_of_equal_ones(trials):
    ended_early = [trial(i, 0.1 * i, pruned=True, lr=1e-3, r="4") for i in range(9)]
    assert importances([*trials[:3], *ended_early, trial(40, None, lr=1e-3, r="4")]) == {}
    assert importances([trial(i, 0.5, lr=1e-4 * (i + 1), r="4") for i in range(9)]) == {}
    with pytest.raises(ValueError, match="Too few"):
        importance_figure({}, "val/loss")


def test_without_optuna_a_report_has_no_importances_and_is_made(trials, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert importances(trials) == {}


def test_numbers_over_a_wide_range_lie_on_a_log_scale_and_words_at_equal_distances():
    found = [
        trial(0, 0.2, lr=1e-4, r="64", loss="token"),
        trial(1, 0.3, lr=1e-3, r="4", loss="choice"),
        trial(2, 0.4, lr=1e-2, r="16", loss="token"),
    ]
    rate, rank, loss, value = scales(found)
    assert rate.places == pytest.approx([0, 0.5, 1])
    assert [text for _, text in rate.ticks] == ["0.0001", "0.001", "0.01"]
    # A choice among numbers: in their order, each of them written.
    assert rank.places == pytest.approx([1, 0, 0.2])
    assert [text for _, text in rank.ticks] == ["4", "16", "64"]
    assert (loss.places, loss.ticks) == ([1, 0, 1], [(0, "choice"), (1, "token")])
    assert value.name == "val/loss"
    assert value.places == pytest.approx([0, 0.5, 1])
    assert goodness(found) == [1, 0.5, 0], "of a loss the smallest is best"


def test_failed_trials_are_kept_and_drawn_nowhere():
    search = {"metric": "val/loss", "params": {"lr": 1e-3}, "distributions": {}}
    runs = [
        entry(0, loss=0.5, search=search | {"trial": 2}),
        entry(1, status="failed", loss=0.1, search=search | {"trial": 0}),
        entry(2, status="interrupted", search=search | {"trial": 1}, pruned={"value": 0.7}),
        entry(3, loss=0.2),
    ]
    found = trials_of(Ablation("test", runs, [], {}))
    assert [(t.number, t.value, t.pruned) for t in found] == [
        (0, None, False),
        (1, 0.7, True),
        (2, 0.5, False),
    ]
    lines = parallel_figure(found).axes[0].get_lines()
    assert [line.get_linestyle() for line in lines].count(":") == 1, "of the one that was pruned"
    with pytest.raises(ValueError, match="Fewer than two"):
        parallel_figure(found[:2])
