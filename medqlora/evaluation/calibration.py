"""Whether a score means what it says: calibration error, temperature, selective accuracy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar

from medqlora.evaluation.statistics import wilson_interval

NUM_BINS = 15
"""Bins of `ece`, as in Guo et al. 2017."""

_TEMPERATURES = (0.02, 50.0)


def probabilities(
    scores: Float[np.ndarray, "question letter"],
) -> Float[np.ndarray, "question letter"]:
    """Probabilities of the letters from their log-probabilities; float64, each row sums to 1."""
    exponent = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)


def confidence_and_correct(
    scores: Float[np.ndarray, "question letter"], answer: Int[np.ndarray, " question"]
) -> tuple[Float[np.ndarray, " question"], Bool[np.ndarray, " question"]]:
    """Probability of the chosen letter, and whether it is the answer."""
    return probabilities(scores).max(axis=-1), scores.argmax(axis=-1) == answer


def negative_log_likelihood(
    scores: Float[np.ndarray, "question letter"], answer: Int[np.ndarray, " question"]
) -> float:
    """Mean cross-entropy in nats on the right letter; ln k is knowing nothing of k letters."""
    log_p = scores.astype(np.float64)
    log_p = log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True)
    # "+ 0.0" turns the -0.0 of a certain, right answer into 0.0.
    return float(-log_p[np.arange(len(answer)), answer].mean()) + 0.0


def brier_score(
    scores: Float[np.ndarray, "question letter"], answer: Int[np.ndarray, " question"]
) -> float:
    """Mean squared error of the probabilities, summed over the letters; in [0, 2], lower is better.

    References:
        Brier 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2 (the multi-class form).
    """
    error = probabilities(scores)
    error[np.arange(len(answer)), answer] -= 1
    return float((error**2).sum(axis=-1).mean())


@dataclass(frozen=True, slots=True)
class ReliabilityBins:
    """Confidence and accuracy of equal-mass bins, from low to high confidence.

    Attributes:
        confidence: Mean confidence of each bin.
        accuracy: Accuracy of each bin.
        ci_low: Lower end of the accuracy's 95 % Wilson interval.
        ci_high: Upper end.
        count: Questions in each bin, at least 1.
        ece: Expected calibration error over these bins, in [0, 1].
    """

    confidence: Float[np.ndarray, " bin"]
    accuracy: Float[np.ndarray, " bin"]
    ci_low: Float[np.ndarray, " bin"]
    ci_high: Float[np.ndarray, " bin"]
    count: Int[np.ndarray, " bin"]
    ece: float


def reliability_bins(
    confidence: Float[np.ndarray, " question"],
    correct: Bool[np.ndarray, " question"],
    num_bins: int = NUM_BINS,
) -> ReliabilityBins:
    """Group questions of similar confidence into bins of equal size.

    Equal confidences share a bin, so that the result does not depend on the order of the questions;
    there may then be fewer bins.

    Args:
        confidence: Probability of the chosen letter.
        correct: Whether the chosen letter is the answer.
        num_bins: Bins at most.

    Returns:
        The bins and their expected calibration error.

    Raises:
        ValueError: If there are no questions.

    References:
        Expected calibration error: Guo et al. 2017, arXiv:1706.04599, section 2. Equal-mass bins:
        Nguyen and O'Connor 2015, arXiv:1508.05154, and Roelofs et al. 2022, arXiv:2012.08668.
    """
    n = len(confidence)
    if n == 0:
        raise ValueError("No calibration of no questions.")
    rank = np.searchsorted(np.sort(confidence), confidence, side="left")
    _, index = np.unique(rank * min(num_bins, n) // n, return_inverse=True)
    count = np.bincount(index)
    mean_confidence = np.bincount(index, weights=confidence) / count
    num_correct = np.bincount(index, weights=correct.astype(np.float64)).astype(np.int64)
    accuracy = num_correct / count
    intervals = np.array(
        [wilson_interval(int(k), int(m)) for k, m in zip(num_correct, count, strict=True)]
    )
    return ReliabilityBins(
        confidence=mean_confidence,
        accuracy=accuracy,
        ci_low=intervals[:, 0],
        ci_high=intervals[:, 1],
        count=count,
        ece=float((count * np.abs(accuracy - mean_confidence)).sum() / n),
    )


def expected_calibration_error(
    scores: Float[np.ndarray, "question letter"],
    answer: Int[np.ndarray, " question"],
    num_bins: int = NUM_BINS,
) -> float:
    """Expected calibration error with equal-mass bins, in [0, 1]; see `reliability_bins`.

    torchmetrics has the equal-width form only, whose low bins are empty for a model of four
    letters.
    """
    return reliability_bins(*confidence_and_correct(scores, answer), num_bins).ece


def fit_temperature(
    scores: Float[np.ndarray, "question letter"], answer: Int[np.ndarray, " question"]
) -> float:
    """Temperature that minimises the loss; fitted on `val`, applied to `test`.

    Args:
        scores: Log-probabilities in nats.
        answer: Right letters, all labelled.

    Returns:
        The temperature within [0.02, 50]; above 1 the scores were overconfident. 1 where no
        temperature lowers the loss.

    References:
        Temperature scaling: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(scores / np.exp(log_temperature), answer)

    low, high = np.log(_TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    log_temperature = float(found.x)  # pyright: ignore[reportAttributeAccessIssue]
    return float(np.exp(log_temperature)) if loss(log_temperature) < loss(0.0) - 1e-12 else 1.0


def apply_temperature(
    scores: Float[np.ndarray, "question letter"], temperature: float
) -> Float[np.ndarray, "question letter"]:
    """Log-probabilities at another temperature, normalised again; the chosen letters stay.

    Raises:
        ValueError: If the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"A temperature is positive, not {temperature}.")
    scaled = scores.astype(np.float64) / temperature
    return scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration of a split before and after a temperature that was fitted on another one.

    Attributes:
        temperature: The fitted temperature.
        n: Labelled questions of the split.
        num_fitted: Labelled questions the temperature was fitted on.
        loss: Cross-entropy in nats as scored.
        ece: Expected calibration error as scored.
        brier: Brier score as scored.
        loss_scaled: Cross-entropy at the temperature.
        ece_scaled: Expected calibration error at the temperature.
        brier_scaled: Brier score at the temperature.
    """

    temperature: float
    n: int
    num_fitted: int
    loss: float
    ece: float
    brier: float
    loss_scaled: float
    ece_scaled: float
    brier_scaled: float

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, for metrics.json."""
        return asdict(self)


def calibrate(
    fit_scores: Float[np.ndarray, "fitted letter"],
    fit_answer: Int[np.ndarray, " fitted"],
    scores: Float[np.ndarray, "question letter"],
    answer: Int[np.ndarray, " question"],
) -> Calibration:
    """Fit a temperature on one split (`val`) and measure it on another (`test`).

    Args:
        fit_scores: Log-probabilities in nats of the split to fit on.
        fit_answer: Its right letters; negative where unknown, which are left out.
        scores: Log-probabilities of the split to measure.
        answer: Its right letters; negative ones are left out.

    Returns:
        The temperature, and loss, ECE and Brier score without and with it.

    Raises:
        ValueError: If either split has no labelled question.
    """
    fit_scores, fit_answer = fit_scores[fit_answer >= 0], fit_answer[fit_answer >= 0]
    scores, answer = scores[answer >= 0], answer[answer >= 0]
    if not len(fit_answer) or not len(answer):
        raise ValueError(
            f"{len(fit_answer)} labelled questions to fit on and {len(answer)} to measure on: both "
            "splits need labels."
        )
    temperature = fit_temperature(fit_scores, fit_answer)
    scaled = apply_temperature(scores, temperature)
    return Calibration(
        temperature=temperature,
        n=len(answer),
        num_fitted=len(fit_answer),
        loss=negative_log_likelihood(scores, answer),
        ece=expected_calibration_error(scores, answer),
        brier=brier_score(scores, answer),
        loss_scaled=negative_log_likelihood(scaled, answer),
        ece_scaled=expected_calibration_error(scaled, answer),
        brier_scaled=brier_score(scaled, answer),
    )


@dataclass(frozen=True, slots=True)
class CoverageCurve:
    """Selective accuracy: accuracy when only the most confident questions are answered.

    Attributes:
        coverage: Fraction of questions answered, rising to 1.
        accuracy: Accuracy on those.
        count: Number of those.
        threshold: Lowest confidence answered.
    """

    coverage: Float[np.ndarray, " point"]
    accuracy: Float[np.ndarray, " point"]
    count: Int[np.ndarray, " point"]
    threshold: Float[np.ndarray, " point"]

    def at(self, coverage: float) -> float:
        """Accuracy at the smallest coverage that is at least `coverage`, a fraction in (0, 1]."""
        index = int(np.searchsorted(self.coverage, coverage - 1e-12, side="left"))
        return float(self.accuracy[min(index, len(self.accuracy) - 1)])


def coverage_curve(
    confidence: Float[np.ndarray, " question"], correct: Bool[np.ndarray, " question"]
) -> CoverageCurve:
    """Accuracy over the questions at least as confident as each threshold.

    Equal confidences are answered together, so that the curve does not depend on the order.

    Args:
        confidence: Probability of the chosen letter.
        correct: Whether the chosen letter is the answer.

    Returns:
        One point for each distinct confidence, from the highest down; its last accuracy is the
        plain accuracy.

    Raises:
        ValueError: If there are no questions.

    References:
        El-Yaniv and Wiener 2010, JMLR 11, 1605-1641; Geifman and El-Yaniv 2017, arXiv:1705.08500.
    """
    n = len(confidence)
    if n == 0:
        raise ValueError("No coverage curve of no questions.")
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), n - 1)
    num_correct = np.cumsum(correct[order])[last]
    return CoverageCurve(
        coverage=(last + 1) / n,
        accuracy=num_correct / (last + 1),
        count=last + 1,
        threshold=ordered[last],
    )
