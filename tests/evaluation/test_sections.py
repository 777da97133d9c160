"""Parts of metrics.json that need a base, labels or a temperature, and what is said without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medqlora.errors import ConfigError
from medqlora.evaluation.sections import (
    base_nll_groups,
    fit_on,
    paired_section,
    permutation_section,
)
from medqlora.evaluation.statistics import wilson_interval
from medqlora.schema import Prediction


def predictions(count: int = 9, sharpness: float = 2.0) -> list[Prediction]:
    """Question i is the harder for the model the larger i is."""
    found = []
    for i in range(count):
        logits = np.array([sharpness * (count - i) / count, 0.0, 0.1, 0.2])
        scores = tuple((logits - np.logaddexp.reduce(logits)).tolist())
        found.append(Prediction(f"q{i}", "test", "Anatomy", "single", 0, scores))
    return found


def unlabelled(given: list[Prediction]) -> list[Prediction]:
    return [replace(prediction, answer=None) for prediction in given]


def test_difficulty_is_the_tertile_of_the_bases_loss_whatever_its_order():
    ours = [*predictions(), replace(predictions()[0], id="open", answer=None)]
    base = [replace(predictions()[8], id="open", answer=None), *predictions()[::-1]]
    [(_, groups)] = base_nll_groups(ours, base).items()
    easy, middle, hard = groups[0], groups[4], groups[8]
    assert len({easy, middle, hard, groups[9]}) == 4, "the one without a label is in no tertile"
    assert groups[:9] == [easy] * 3 + [middle] * 3 + [hard] * 3


def test_a_base_that_scored_other_questions_is_refused_with_one_of_them():
    with pytest.raises(ConfigError, match=r"2 are missing, such as q7"):
        base_nll_groups(predictions(), predictions()[:7])


def test_without_a_label_there_is_no_difficulty_no_test_and_no_temperature():
    ours, base = unlabelled(predictions()), predictions(sharpness=1.0)
    assert base_nll_groups(ours, base) == {}
    names = {"name": "ours", "base_name": "base", "sha256": "0", "base_sha256": "0"}
    assert paired_section(ours, base, **names) is None
    assert fit_on(ours) is None


def test_a_temperature_is_fitted_on_the_labelled_questions_alone():
    """Scores that are three times too sure of what is right half of the time."""
    sure = (float(np.log(0.97)), *[float(np.log(0.01))] * 3)
    given = [
        Prediction(f"q{i}", "val", "Anatomy", "single", answer, sure)
        for i, answer in enumerate([0, 1] * 20)
    ]
    alone, with_others = fit_on(given), fit_on(given + unlabelled(given))
    assert alone == with_others
    assert alone is not None
    assert alone[0] > 1
    assert alone[1] == 40


@pytest.mark.parametrize("count", [1, 9])
def test_orders_that_all_agree_are_no_more_certain_than_their_questions(count):
    given = predictions(count, sharpness=9.0)
    shown = np.full((4, count, 4), -9.0)
    for order in range(4):
        shown[order, :, -order % 4] = 0.0  # option A, wherever it stands
    section, _ = permutation_section(given, shown)
    assert section["mean_accuracy"] == 1
    assert (section["ci_low"], section["ci_high"]) == wilson_interval(count, count)
