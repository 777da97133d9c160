"""Sections of metrics.json beside the plain numbers, which they never replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from medqlora.errors import ConfigError
from medqlora.evaluation import calibration
from medqlora.evaluation.difficulty import base_nll_difficulty
from medqlora.evaluation.metrics import score_arrays, summarise
from medqlora.evaluation.scoring import (
    combine_permutations,
    contextual_calibration,
    cyclic_orders,
)
from medqlora.evaluation.statistics import bootstrap_mean, compare_runs, wilson_interval
from medqlora.schema import Prediction, Question

UNLABELLED = "unlabelled"
"""Group of questions whose base loss is unknown; never listed, for only labelled ones count."""

BASE_NLL = "difficulty_base_nll"
"""Key of `by` for the tertiles of the base's loss."""

CONTENT_FREE = ("N/A", "[MASK]", "")
"""What stands for stem and options of a prompt without content (Zhao et al. 2021, section 5)."""

COVERAGES = (0.25, 0.5, 0.75, 1.0)
"""Fractions of the questions that `selective_section` answers."""

_BRIEF = (
    "n", "accuracy", "ci_low", "ci_high", "macro_accuracy", "loss", "ece", "brier",
    "letter_share",
)  # fmt: skip


def with_scores(
    predictions: Sequence[Prediction], scores: Float[np.ndarray, "question letter"]
) -> list[Prediction]:
    """The same questions with other scores."""
    return [
        replace(prediction, scores=tuple(row))
        for prediction, row in zip(predictions, scores.tolist(), strict=True)
    ]


def calibration_section(
    temperature: float,
    predictions: Sequence[Prediction] = (),
    *,
    fitted_on: str = "val",
    num_fitted: int | None = None,
) -> dict[str, Any]:
    """What a temperature that was fitted elsewhere does to the calibration of a split.

    Args:
        temperature: From `calibration.fit_temperature`.
        predictions: Of the split it is applied to; without any, or without labels, nothing is
            measured.
        fitted_on: Split it was fitted on.
        num_fitted: Labelled questions it was fitted on.

    Returns:
        `temperature, fitted_on, num_fitted, split, n`, and `nll`, `ece` and `brier`, each
        `_before` and `_after`.
    """
    section: dict[str, Any] = {
        "temperature": temperature,
        "fitted_on": fitted_on,
        "num_fitted": num_fitted,
        "split": predictions[0].split if predictions else None,
        "n": 0,
    }
    scores, answer = score_arrays(predictions)
    scores, answer = scores[answer >= 0], answer[answer >= 0]
    section["n"] = len(answer)
    scaled = calibration.apply_temperature(scores, temperature) if len(answer) else scores
    for name, measure in (
        ("nll", calibration.negative_log_likelihood),
        ("ece", calibration.expected_calibration_error),
        ("brier", calibration.brier_score),
    ):
        section[f"{name}_before"] = measure(scores, answer) if len(answer) else None
        section[f"{name}_after"] = measure(scaled, answer) if len(answer) else None
    return section


def selective_section(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Accuracy when only the most confident questions are answered.

    Returns:
        `coverage` (fraction answered), `n`, `accuracy`, `ci_low` and `ci_high` of each point of
        `COVERAGES`, equal confidences answered together; empty without labels.
    """
    scores, answer = score_arrays(predictions)
    scores, answer = scores[answer >= 0], answer[answer >= 0]
    if not len(answer):
        return []
    curve = calibration.coverage_curve(*calibration.confidence_and_correct(scores, answer))
    points = []
    for wanted in COVERAGES:
        index = int(np.searchsorted(curve.coverage, wanted - 1e-12))
        n, accuracy = int(curve.count[index]), float(curve.accuracy[index])
        low, high = wilson_interval(round(accuracy * n), n)
        points.append(
            {
                "coverage": float(curve.coverage[index]),
                "n": n,
                "accuracy": accuracy,
                "ci_low": low,
                "ci_high": high,
            }
        )
    return points


def fit_on(predictions: Sequence[Prediction]) -> tuple[float, int] | None:
    """Temperature of a split and its number of labelled questions; None without a label."""
    scores, answer = score_arrays(predictions)
    labelled = answer >= 0
    if not labelled.any():
        return None
    return calibration.fit_temperature(scores[labelled], answer[labelled]), int(labelled.sum())


def reorder(question: Question, order: Sequence[int]) -> Question:
    """The question with option `order[p]` shown at place `p`."""
    answer = None if question.answer is None else list(order).index(question.answer)
    options = tuple(question.options[option] for option in order)
    return replace(question, options=options, answer=answer)


def permutation_section(
    predictions: Sequence[Prediction], scores: Float[np.ndarray, "order question letter"]
) -> tuple[dict[str, Any], list[Prediction]]:
    """What the cyclic orders of the options say.

    Args:
        predictions: The plain ones, in the original order of the options.
        scores: Log-probabilities in nats of the same questions under each order.

    Returns:
        `num_orders, num_questions, consistency, accuracy_by_order, mean_accuracy` with its
        bootstrap interval by question (`ci_low, ci_high`; Wilson's where all questions agree), and
        `debiased`, the numbers of the debiased predictions; and those predictions.
    """
    _, answer = score_arrays(predictions)
    combined = combine_permutations(scores, answer)
    debiased = with_scores(predictions, combined.debiased_scores)
    section: dict[str, Any] = {
        "num_orders": combined.num_orders,
        "num_questions": combined.num_questions,
        "num_labelled": combined.num_labelled,
        "consistency": combined.consistency,
        "accuracy_by_order": list(combined.accuracy_by_order),
        "mean_accuracy": combined.mean_accuracy,
        "ci_low": None,
        "ci_high": None,
        "debiased": _brief(debiased),
    }
    labelled = answer >= 0
    if labelled.any():
        orders = cyclic_orders(scores.shape[-1])
        option = np.stack(
            [
                np.asarray(order)[row.argmax(axis=-1)]
                for order, row in zip(orders, scores, strict=True)
            ]
        )
        share = (option == answer).mean(axis=0)[labelled]
        section["ci_low"], section["ci_high"] = (
            bootstrap_mean(share)
            if np.ptp(share) > 0
            else wilson_interval(round(float(share.sum())), len(share))
        )
    return section, debiased


def content_free_questions(num_options: int) -> list[Question]:
    """Prompts without content: stem and options all the same placeholder."""
    return [
        Question(f"content-free-{i}", text, (text,) * num_options, None)
        for i, text in enumerate(CONTENT_FREE)
    ]


def contextual_section(
    predictions: Sequence[Prediction], content_free: Float[np.ndarray, "prompt letter"]
) -> tuple[dict[str, Any], list[Prediction]]:
    """What dividing by the letters' probabilities without content does.

    Args:
        predictions: The plain ones.
        content_free: Log-probabilities in nats of `content_free_questions`.

    Returns:
        `content_free` (probability of each letter, averaged over the placeholders) and the numbers
        of the calibrated predictions; and those predictions.
    """
    scores, _ = score_arrays(predictions)
    calibrated = with_scores(predictions, contextual_calibration(scores, content_free))
    prior = calibration.probabilities(content_free).mean(axis=0)
    section = {
        "method": "contextual calibration, arXiv:2102.09690",
        "placeholders": list(CONTENT_FREE),
        "content_free": prior.tolist(),
    }
    return section | _brief(calibrated), calibrated


def base_nll_groups(
    predictions: Sequence[Prediction], base: Sequence[Prediction]
) -> dict[str, list[str]]:
    """Difficulty of each question by the tertile of a frozen base's loss on it.

    Args:
        predictions: The predictions to group.
        base: The base's predictions of the same questions, in any order.

    Returns:
        A breakdown for `metrics.summarise`, in the order of `predictions`.

    Raises:
        ConfigError: If the base did not score the same questions.
    """
    known = {prediction.id: prediction for prediction in base}
    missing = [p.id for p in predictions if p.id not in known]
    if missing:
        raise ConfigError(
            f"the base scored none or not all of these questions ({len(missing)} are missing, such "
            f"as {missing[0]}), so their difficulty is unknown. Evaluate it on the same data."
        )
    matched = [known[prediction.id] for prediction in predictions]
    labelled = [i for i, p in enumerate(predictions) if p.answer is not None]
    if not labelled:
        return {}
    scores, _ = score_arrays([matched[i] for i in labelled])
    log_p = calibration.apply_temperature(scores, 1.0)
    answer = np.array([predictions[i].answer for i in labelled])
    groups = [UNLABELLED] * len(predictions)
    for i, level in zip(
        labelled, base_nll_difficulty(-log_p[np.arange(len(answer)), answer]), strict=True
    ):
        groups[i] = level
    return {BASE_NLL: groups}


def paired_section(
    predictions: Sequence[Prediction],
    base: Sequence[Prediction],
    *,
    name: str,
    base_name: str,
    sha256: str | None,
    base_sha256: str | None,
) -> dict[str, Any] | None:
    """The paired comparison with a base: exact McNemar, bootstrap interval of the difference.

    Returns:
        The attributes of `statistics.Comparison`, the base first; None without labels.

    Raises:
        ConfigError: If the two scored different questions.
    """
    if all(prediction.answer is None for prediction in predictions):
        return None
    comparison = compare_runs(
        base, predictions, name_a=base_name, name_b=name, sha256_a=base_sha256, sha256_b=sha256
    )
    return asdict(comparison)


def constant_letter(section: Mapping[str, Any]) -> int | None:
    """The letter that was given to every question, if it was always the same."""
    shares = section.get("letter_share") or []
    return next((letter for letter, share in enumerate(shares) if share == 1), None)


def _brief(predictions: Sequence[Prediction]) -> dict[str, Any]:
    summary = summarise(predictions)
    return {key: summary[key] for key in _BRIEF}
