"""Figures are drawn, saved twice, and can be told apart without colour."""

import numpy as np
import pytest

from medqlora.evaluation import (
    confidence_and_correct,
    coverage_curve,
    reliability_bins,
    score_arrays,
    summarise,
)
from medqlora.evaluation.figures import (
    confusion_figure,
    coverage_figure,
    reliability_figure,
    save_figure,
    subject_figure,
)

from .conftest import make_predictions, make_questions


@pytest.fixture
def runs(questions):
    """Confidence and correctness of two runs."""
    return {
        f"skill {skill}": confidence_and_correct(
            *score_arrays(make_predictions(questions, skill, seed))
        )
        for seed, skill in enumerate((0.2, 1.5))
    }


@pytest.fixture
def section(predictions, questions):
    return summarise(predictions, questions)


def test_every_figure_is_saved_as_png_and_svg_the_same_each_time(tmp_path, runs, section):
    figures = {
        "reliability": lambda: reliability_figure(
            {name: reliability_bins(*run) for name, run in runs.items()}
        ),
        "coverage": lambda: coverage_figure(
            {name: coverage_curve(*run) for name, run in runs.items()}, 0.3
        ),
        "confusion": lambda: confusion_figure(section["confusion"]),
        "subject.name": lambda: subject_figure(section),
    }
    for name, draw in figures.items():
        png, svg = save_figure(draw(), tmp_path / "figures" / name)
        assert png.read_bytes().startswith(b"\x89PNG")
        assert (png.name, svg.name) == (f"{name}.png", f"{name}.svg")
        first = svg.read_text()
        assert "<text" in first
        save_figure(draw(), tmp_path / "figures" / name)
        assert svg.read_text() == first


def test_series_differ_in_line_and_marker_not_only_in_colour(runs):
    figure = reliability_figure({name: reliability_bins(*run) for name, run in runs.items()})
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({line.get_linestyle() for line in lines}) == len(lines) == 2
    assert len({line.get_marker() for line in lines}) == 2


def test_subjects_are_sorted_and_small_ones_last_and_hatched(section):
    axes = subject_figure(section).axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    groups = section["by"]["subject_name"]
    assert sorted(shown) == sorted(groups)
    bars = axes.patches
    hatched = [bar.get_hatch() is not None for bar in bars]
    assert hatched == [groups[name]["n"] < 30 for name in shown]
    assert hatched == sorted(hatched)
    assert [bar.get_width() for bar in bars] == [groups[name]["accuracy"] for name in shown]
    assert axes.get_legend_handles_labels()[1].count("fewer than 30 questions") == 1


def test_majority_baseline_is_drawn(section):
    axes = subject_figure(section, "length").axes[0]
    labels = {line.get_label(): line for line in axes.lines}
    (name,) = [label for label in labels if str(label).startswith("majority")]
    assert labels[name].get_xdata()[0] == section["majority_accuracy"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["short", "medium", "long"]


def test_confusion_prints_every_count():
    texts = {text.get_text() for text in confusion_figure([[3, 1], [0, 4]]).axes[0].texts}
    assert texts == {"3\n75 %", "1\n25 %", "0\n0 %", "4\n100 %"}


def test_a_handful_of_all_equal_predictions_can_be_drawn():
    questions = make_questions(3)
    confidence = np.full(len(questions), 0.25)
    correct = np.zeros(len(questions), dtype=bool)
    reliability_figure({"constant": reliability_bins(confidence, correct)})
    coverage_figure({"constant": coverage_curve(confidence, correct)}, 0.5)


def test_nothing_to_draw_is_refused(section):
    for draw in (
        lambda: reliability_figure({}),
        lambda: coverage_figure({}, 0.3),
        lambda: confusion_figure([[0, 0], [0, 0]]),
        lambda: subject_figure({**section, "by": {"subject_name": {}}}),
    ):
        with pytest.raises(ValueError, match=r"shows|square|No group"):
            draw()
