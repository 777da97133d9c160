"""No accuracy without baseline, n and interval."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from medqlora.evaluation import compare_family, empty_metrics, summarise
from medqlora.evaluation.results import RunResult
from medqlora.evaluation.tables import (
    ResultRow,
    accuracy_text,
    breakdown_markdown,
    breakdown_table,
    comparison_markdown,
    comparison_table,
    result_markdown,
    result_row,
    result_table,
)

from .conftest import make_predictions, make_questions


def _render(table, width=100, colour=False):
    console = Console(
        width=width,
        file=StringIO(),
        force_terminal=colour,
        color_system="standard" if colour else None,
    )
    console.print(table)
    return console.file.getvalue()


@pytest.fixture
def section(predictions, questions):
    return summarise(predictions, questions)


def test_accuracy_comes_with_interval_baseline_and_n():
    section = {
        "accuracy": 0.613,
        "ci_low": 0.574,
        "ci_high": 0.651,
        "majority_accuracy": 0.27,
        "n": 600,
    }
    assert accuracy_text(section) == "61.3 % [57.4, 65.1]  majority 27.0 %  n=600"


@pytest.mark.parametrize("key", ["ci_low", "ci_high", "majority_accuracy", "n"])
def test_an_accuracy_that_lacks_one_of_them_is_not_shown(section, key):
    for show in (
        accuracy_text,
        lambda s: result_table([ResultRow("x", s)]),
        lambda s: result_markdown([ResultRow("x", s)]),
        lambda s: breakdown_table(s),
    ):
        with pytest.raises(ValueError, match=key):
            show({**section, key: None})


def test_both_renderings_say_the_same(section):
    rows = [ResultRow("base", section, 5.014, 12.34), ResultRow("tuned", section, 2.07, 9.0)]
    wanted = [f"{100 * section['accuracy']:.1f} %", f"{100 * section['majority_accuracy']:.1f} %"]
    for text in (_render(result_table(rows, title="test")), result_markdown(rows)):
        for piece in [*wanted, "120", "5.01", "12.3", "base", "tuned"]:
            assert piece in text


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_loses_no_digit(section, width):
    text = _render(result_table([ResultRow("NF4 + LoRA", section, 12.3, 4567.8)]), width)
    assert "4567.8" in text
    assert f"{100 * section['accuracy']:.1f} %" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_failed_unlabelled_and_unscored_claim_no_accuracy():
    unlabelled = make_questions(5, labelled=False)
    run = RunResult(
        run_dir=Path("runs/7"),
        metrics=empty_metrics() | {"status": "failed", "error": "CUDA out of memory"},
        config=None,
    )
    rows = [
        ResultRow("hidden", summarise(make_predictions(unlabelled), unlabelled)),
        result_row(run),
        ResultRow("later", None),
    ]
    for text in (_render(result_table(rows)), result_markdown(rows)):
        assert "no labels" in text
        assert "CUDA out of memory" in text
        assert "failed" in text
        assert "not scored" in text
        assert " %" not in text.replace("95 %", "")
    assert accuracy_text(empty_metrics()["test"]) == "not scored"


@pytest.mark.parametrize("error", ["stopped by a signal", None])
def test_an_interrupted_run_did_not_fail(error):
    metrics = empty_metrics() | {"status": "interrupted", "error": error}
    rows = [result_row(RunResult(Path("runs/7"), metrics, None))]
    for text in (_render(result_table(rows)), result_markdown(rows)):
        assert "interrupted" in text
        assert "failed" not in text
        assert "not scored" not in text


def test_markup_in_a_name_is_shown_as_it_is(section):
    assert "[red]r=4[/red]" in _render(result_table([ResultRow("[red]r=4[/red]", section)]))


def test_small_groups_are_dim(section):
    lines = _render(breakdown_table(section), colour=True).splitlines()
    small = [name for name, group in section["by"]["subject_name"].items() if group["n"] < 30]
    assert small
    for name in section["by"]["subject_name"]:
        (line,) = [line for line in lines if name in line]
        assert ("\x1b[2m" in line) == (name in small)
    assert f"*{small[0]}*" in breakdown_markdown(section)


def test_breakdown_ends_with_the_whole_split(section):
    text = breakdown_markdown(section, "length")
    assert [line.split()[1] for line in text.splitlines()[2:6]] == [
        "short",
        "medium",
        "long",
        "all",
    ]
    assert "majority" in text


def test_comparisons_show_interval_and_corrected_p(questions):
    family = compare_family(
        {
            "base": [make_predictions(questions, 0.2, 1)],
            "tuned": [make_predictions(questions, 2.0, seed) for seed in (2, 3, 4, 5)],
        }
    )
    for text in (_render(comparison_table(family), 160), comparison_markdown(family)):
        assert "tuned (4 seeds) vs base (1 seed)" in text
        assert "< 0.001" in text
        assert "Satterthwaite" in text
        assert "120" in text


def test_a_reference_that_all_are_compared_with_stands_in_the_heading(questions):
    runs = {name: [make_predictions(questions, skill, 1)] for name, skill in SKILLS.items()}
    family = compare_family(runs, "base")
    for text in (_render(comparison_table(family), 160), comparison_markdown(family)):
        assert text.count("against base") == 1
        assert " vs base" not in text
        assert all(name in text for name in SKILLS)


SKILLS = {"base": 0.2, "low rank": 1.0, "high rank": 2.0}
