"""What changed between two runs is told by question, with its texts, whatever stands in them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medqlora.errors import ConfigError
from medqlora.evaluation import compare_runs, flips, flips_markdown, mean_divergence
from medqlora.schema import Prediction, Question

from .conftest import make_predictions, make_questions


def prediction(name: str, answer: int | None, *probabilities: float) -> Prediction:
    scores = tuple(math.log(p) for p in probabilities)
    return Prediction(name, "test", "Anatomy", "single", answer, scores)


def test_flips_are_the_discordant_pairs_of_mcnemar_in_the_order_of_their_change():
    questions = make_questions(200)
    before, after = make_predictions(questions, 0.3, 1), make_predictions(questions, 0.9, 2)
    found = flips(before, list(reversed(after)), questions)
    comparison = compare_runs(before, after)
    assert sum(flip.to_right for flip in found) == comparison.only_b
    assert sum(not flip.to_right for flip in found) == comparison.only_a
    gains = [abs(flip.gain) for flip in found]
    assert gains == sorted(gains, reverse=True)
    texts = {question.id: question for question in questions}
    for flip in found:
        assert flip.before.id == flip.after.id == flip.question.id
        assert flip.question is texts[flip.question.id]
        # What turned right gained belief in the right letter, but for the choice of others.
        assert flip.before.correct != flip.after.correct


def test_a_question_without_a_label_cannot_flip():
    question = Question("q", "?", ("a", "b"), None)
    run = prediction("q", None, 0.9, 0.1), prediction("q", None, 0.1, 0.9)
    assert flips([run[0]], [run[1]], [question]) == []


def test_divergence_is_that_of_the_formula_and_zero_for_equal_runs():
    """Sum p ln(p / q), averaged over the questions."""
    before = [prediction("a", 0, 0.5, 0.5), prediction("b", 0, 0.9, 0.1)]
    after = [prediction("b", 0, 0.9, 0.1), prediction("a", 0, 0.8, 0.2)]
    expected = (0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)) / 2
    assert mean_divergence(before, after) == pytest.approx(expected)
    assert mean_divergence(before, before) == 0
    many = make_predictions(make_questions(100), 0.5, 1)
    assert mean_divergence(many, many) < 1e-15


@pytest.mark.parametrize(
    ("names", "texts"),
    [(["a"], ["a", "b"]), (["a", "c"], ["a", "b", "c"]), (["a", "a"], ["a"]), (["a", "b"], ["a"])],
)
def test_other_questions_or_missing_texts_are_refused_in_one_line(names, texts):
    before = [prediction(name, 0, 0.5, 0.5) for name in ("a", "b")]
    after = [prediction(name, 0, 0.5, 0.5) for name in names]
    questions = [Question(name, "?", ("a", "b"), 0) for name in texts]
    with pytest.raises(ConfigError) as error:
        flips(before, after, questions)
    assert "\n" not in str(error.value)


def test_nothing_answered_has_no_divergence():
    with pytest.raises(ConfigError, match="no question was answered"):
        mean_divergence([], [])


def test_a_flip_in_markdown_marks_the_answer_and_both_choices():
    question = Question("q", "Which | of *these*\n<b>?", ("one", "t_wo", "$3$", "-"), 1)
    text = flips_markdown(
        flips(
            [prediction("q", 1, 0.7, 0.1, 0.1, 0.1)],
            [prediction("q", 1, 0.2, 0.6, 0.1, 0.1)],
            [question],
        ),
        "base",
        "run",
    )
    lines = text.splitlines()
    assert lines[0].startswith(r"**Which \| of \*these\* \<b\>?**")
    assert "wrong → right" in lines[1]
    assert r"| A | one | 70.0 % \* | 20.0 % |" in lines
    assert r"| B | **t\_wo** | 10.0 % | 60.0 % \* |" in lines
    assert r"| C | \$3\$ | 10.0 % | 10.0 % |" in lines
    assert np.all([line.count("|") - line.count(r"\|") in (0, 5) for line in lines])
    assert flips_markdown([], "base", "run") == "No question flipped.\n"
