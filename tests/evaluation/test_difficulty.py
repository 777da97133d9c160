"""Rules of the difficulty proxies."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.evaluation.difficulty import (
    LENGTHS,
    base_nll_difficulty,
    length_groups,
    negated,
    stem_difficulty,
    tertile_groups,
)
from medqlora.schema import Question

HALF = Path(__file__).parents[2].parent / "shared" / "data" / "medmcqa_validation_half.jsonl.gz"


def _ask(stem, options=("Iron", "Zinc", "Lead", "Gold")):
    return Question("1", stem, options, 0)


@pytest.mark.parametrize(
    "stem",
    [
        "Which of the following is not a cause of clubfoot?",
        "All of the following are true EXCEPT:",
        "Scammon's growth curve. False is",
        "True about the larynx are A/E",
        "Which of these doesn't affect secretion?",
        "Endocarditis is least common in:",
        "Which of the following is not. true regarding myelopathy?",
    ],
)
def test_stems_that_ask_for_the_misfit_are_negated(stem):
    assert negated(_ask(stem))
    assert stem_difficulty(_ask(stem)) == "intermediate"


@pytest.mark.parametrize(
    "stem",
    [
        "Which enzyme is the target of digoxin?",
        "The clot is not stable unless linked. This linking is done by:",
        "Deciduous teeth do not show fluorosis because:",
        "The false negative rate is the complement of",
        "The dose is to be given for at least",
        "Whatever notices nothing is called",
    ],
)
def test_a_negation_outside_the_question_asked_does_not_count(stem):
    assert not negated(_ask(stem))


@pytest.mark.parametrize(
    ("stem", "options", "level"),
    [
        ("Base pairs in DNA", None, "basic"),
        ("True about bicuspidization:", None, "intermediate"),
        ("Asseion - A is so. Reason- B is so.", None, "intermediate"),
        ("Order of waves: 1. a wave 2. c wave", None, "intermediate"),
        ("Which are seen?", ("1,2", "1 and 3", "2, 3 & 4", "all"), "intermediate"),
        (
            "A 35 year old man presents with chest pain and breathlessness since three hours. "
            "What is the most likely diagnosis?",
            None,
            "advanced",
        ),
        (
            "A smoker presents with recent breathlessness and ECG was done. Which is not done?",
            None,
            "advanced",
        ),
        ("A patient has gout. Treat with?", None, "basic"),
    ],
)
def test_level_follows_the_stated_rules(stem, options, level):
    question = _ask(stem) if options is None else _ask(stem, options)
    assert stem_difficulty(question) == level


def test_difficulty_never_reads_the_answer_or_explanation():
    first = Question("1", "True about iron:", ("a", "b", "c", "d"), 0, explanation="not")
    second = Question("1", "True about iron:", ("a", "b", "c", "d"), None)
    assert stem_difficulty(first) == stem_difficulty(second)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.randoms())
def test_tertiles_depend_on_values_alone_and_keep_ties_together(values, random):
    groups, bounds = tertile_groups(values, LENGTHS)
    of_value = dict(zip(values, groups, strict=True))
    assert [of_value[value] for value in values] == groups
    shuffled = random.sample(values, len(values))
    assert tertile_groups(shuffled, LENGTHS)[0] == [of_value[value] for value in shuffled]
    rank = [LENGTHS.index(of_value[value]) for value in sorted(values)]
    assert rank == sorted(rank)
    assert bounds == sorted(bounds)
    assert bounds[-1] == max(values)


def test_distinct_values_split_into_three_equal_groups():
    assert Counter(base_nll_difficulty(np.arange(300.0))) == {
        "basic": 100,
        "intermediate": 100,
        "advanced": 100,
    }
    assert base_nll_difficulty(np.array([3.0, 0.1, 1.4])) == ["advanced", "basic", "intermediate"]


def test_equal_values_make_one_group():
    assert set(tertile_groups([2.0] * 9, LENGTHS)[0]) == {"short"}


def test_not_a_number_has_no_tertile():
    with pytest.raises(ValueError, match="NaN"):
        base_nll_difficulty(np.array([1.0, np.nan]))


def test_counts_on_real_questions_are_the_documented_ones():
    if not HALF.exists():
        pytest.skip("../shared is not here")
    with gzip.open(HALF, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    questions = [
        Question(row["id"], row["question"], tuple(row[f"op{c}"] for c in "abcd"), row["cop"] - 1)
        for row in rows
    ]
    counts = Counter(map(stem_difficulty, questions))
    text = " ".join((stem_difficulty.__doc__ or "").split())
    assert sum(counts.values()) == 2078
    assert f"{counts['basic']:,} are basic" in text
    assert f"{counts['intermediate']} intermediate" in text
    assert f"{counts['advanced']} advanced" in text
    assert f"{sum(map(negated, questions))} stems are negated" in text
    lengths = Counter(length_groups(questions)[0])
    assert min(lengths.values()) > 0.3 * len(questions)
