"""Laws of calibration measures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.evaluation import (
    apply_temperature,
    brier_score,
    calibrate,
    confidence_and_correct,
    coverage_curve,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    reliability_bins,
)


def _draw(n, k=4, spread=1.5, seed=0):
    """Scores, and answers drawn from the very probabilities they state: perfectly calibrated."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(n, k))
    scores = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    cumulative = np.exp(scores).cumsum(axis=1)
    answer = (rng.random(n)[:, None] > cumulative).sum(axis=1).clip(max=k - 1)
    return scores, answer


def test_answers_drawn_from_the_scores_are_calibrated():
    scores, answer = _draw(20_000)
    assert expected_calibration_error(scores, answer) < 0.015
    assert fit_temperature(scores, answer) == pytest.approx(1, abs=0.05)


def test_overconfidence_is_found_and_mended_by_the_temperature():
    """Guo et al. 2017, section 4.2: the fitted temperature undoes a scaling of the logits."""
    scores, answer = _draw(6_000)
    hot = 2.5 * scores
    hot = hot - np.logaddexp.reduce(hot, axis=1, keepdims=True)
    result = calibrate(hot[:3000], answer[:3000], hot[3000:], answer[3000:])
    assert result.temperature == pytest.approx(2.5, rel=0.1)
    assert result.ece_scaled < result.ece
    assert result.loss_scaled < result.loss
    assert result.brier_scaled < result.brier
    assert (result.n, result.num_fitted) == (3000, 3000)
    assert set(result.to_dict()) >= {"temperature", "ece", "ece_scaled"}


def test_unlabelled_questions_are_left_out_of_calibration():
    scores, answer = _draw(300)
    partly = answer.copy()
    partly[::3] = -100
    known = partly >= 0
    result = calibrate(scores, partly, scores, partly)
    assert result.n == known.sum()
    assert result.loss == pytest.approx(negative_log_likelihood(scores[known], answer[known]))
    with pytest.raises(ValueError, match="need labels"):
        calibrate(scores, np.full(300, -100), scores, answer)


def test_scores_that_know_nothing_keep_temperature_one():
    uniform = np.full((20, 4), np.log(0.25))
    answer = np.arange(20) % 4
    assert fit_temperature(uniform, answer) == 1
    assert negative_log_likelihood(uniform, answer) == pytest.approx(np.log(4))
    assert brier_score(uniform, answer) == pytest.approx(0.75)


def test_all_equal_predictions_are_one_bin():
    """Constant confidence p with accuracy a has ECE |a - p|, whatever the number of bins."""
    scores = np.tile(np.log([0.7, 0.1, 0.1, 0.1]), (50, 1))
    answer = np.array([0] * 20 + [1] * 30)
    bins = reliability_bins(*confidence_and_correct(scores, answer))
    assert bins.count.tolist() == [50]
    assert bins.ece == pytest.approx(0.3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), k=st.sampled_from([4, 5]))
def test_measures_stay_in_their_bounds_and_ignore_the_order(seed, n, k):
    rng = np.random.default_rng(seed)
    scores, _ = _draw(n, k, seed=seed)
    scores = scores.round(1)  # ties
    answer = rng.integers(0, k, size=n)
    order = rng.permutation(n)
    for measure, upper in (
        (expected_calibration_error, 1),
        (brier_score, 2),
        (negative_log_likelihood, np.inf),
    ):
        value = measure(scores, answer)
        assert 0 <= value <= upper
        assert measure(scores[order], answer[order]) == pytest.approx(value, abs=1e-12)


def test_certain_answers_reach_the_bounds():
    sure = np.tile(np.log([1 - 3e-12, 1e-12, 1e-12, 1e-12]), (8, 1))
    assert brier_score(sure, np.zeros(8, int)) == pytest.approx(0, abs=1e-9)
    assert brier_score(sure, np.ones(8, int)) == pytest.approx(2, abs=1e-9)
    assert expected_calibration_error(sure, np.zeros(8, int)) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(sure, np.ones(8, int)) == pytest.approx(1, abs=1e-9)


def test_bins_have_equal_mass():
    scores, answer = _draw(1500)
    bins = reliability_bins(*confidence_and_correct(scores, answer), num_bins=15)
    assert bins.count.tolist() == [100] * 15
    assert (np.diff(bins.confidence) > 0).all()
    assert ((bins.ci_low <= bins.accuracy) & (bins.accuracy <= bins.ci_high)).all()


def test_temperature_keeps_the_chosen_letters():
    scores, _ = _draw(100)
    for temperature in (0.1, 3.0):
        scaled = apply_temperature(scores, temperature)
        assert np.array_equal(scaled.argmax(axis=1), scores.argmax(axis=1))
        np.testing.assert_allclose(np.exp(scaled).sum(axis=1), 1)
    np.testing.assert_allclose(apply_temperature(scores, 1.0), scores, atol=1e-12)
    np.testing.assert_allclose(probabilities(scores).sum(axis=1), 1)
    with pytest.raises(ValueError, match="positive"):
        apply_temperature(scores, 0.0)


def test_full_coverage_is_plain_accuracy_and_ties_are_answered_together():
    confidence = np.array([0.9, 0.5, 0.5, 0.3])
    correct = np.array([True, True, False, False])
    curve = coverage_curve(confidence, correct)
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    assert curve.accuracy.tolist() == [1.0, 2 / 3, 0.5]
    assert curve.threshold.tolist() == [0.9, 0.5, 0.3]
    assert curve.at(1.0) == 0.5
    assert curve.at(0.5) == 2 / 3
    swapped = coverage_curve(confidence, correct[[0, 2, 1, 3]])
    assert swapped.accuracy.tolist() == curve.accuracy.tolist()


def test_nothing_has_no_calibration():
    nothing = np.zeros(0)
    with pytest.raises(ValueError, match="no questions"):
        reliability_bins(nothing, nothing.astype(bool))
    with pytest.raises(ValueError, match="no questions"):
        coverage_curve(nothing, nothing.astype(bool))
