"""Accuracy, calibration and breakdowns of a split; streaming metrics for use in training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.utilities import dim_zero_cat

from medqlora.errors import DataError, NotFiniteError
from medqlora.evaluation import calibration
from medqlora.evaluation.difficulty import LENGTHS, LEVELS, length_groups, negated, stem_difficulty
from medqlora.evaluation.statistics import wilson_interval
from medqlora.schema import IGNORE, LETTERS, Prediction, Question

BREAKDOWNS = ("subject_name", "choice_type", "difficulty", "negated", "length")
"""Keys of `by` that are always there."""


class LetterMetrics(Metric):
    """Accuracy and loss over letter scores, kept as three sums.

    Nothing waits for the device before `compute`. Sums cannot tell a question from its copy: where
    a sampler repeats rows to even out its processes, take the accuracy from `PredictionCollector`.
    torchmetrics' `MulticlassAccuracy(ignore_index=...)` gives the same number but selects the
    labelled rows by a mask, which waits for the device in every step.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    num_correct: Tensor
    loss_sum: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.zeros((), dtype=torch.int64)
        self.add_state("num_correct", default=zero.clone(), dist_reduce_fx="sum")
        self.add_state("count", default=zero.clone(), dist_reduce_fx="sum")
        self.add_state(
            "loss_sum", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum"
        )

    def update(
        self, scores: Float[Tensor, "question letter"], answer: Int[Tensor, " question"]
    ) -> None:
        """Add the questions whose answer is not negative (-100: no label, or an empty place)."""
        scores = scores.detach()
        labelled = answer >= 0
        picked = scores.gather(-1, answer.clamp(min=0).long()[:, None])[:, 0].double()
        self.num_correct += (scores.argmax(dim=-1) == answer).sum()
        self.loss_sum += torch.where(labelled, -picked, picked.new_zeros(())).sum()
        self.count += labelled.sum()

    def compute(self) -> dict[str, Tensor]:
        """`accuracy` in [0, 1], `loss` in nats (both NaN without a labelled question), `n`."""
        return {
            "accuracy": self.num_correct.double() / self.count,
            "loss": self.loss_sum / self.count,
            "n": self.count,
        }


class PredictionCollector(Metric):
    """Letter scores of every question of a split: `num_options` numbers and an index a question.

    Gathered over processes, with empty places and the copies that even out processes dropped.

    Args:
        num_options: Letters scored.
        kwargs: Passed to `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    index: list[Tensor]
    scores: list[Tensor]

    def __init__(self, num_options: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_options = num_options
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(
        self, scores: Float[Tensor, "question letter"], index: Int[Tensor, " question"]
    ) -> None:
        """Keep one packed row, empty places (index -1) too: dropping them waits for the device."""
        self.scores.append(scores.detach().float())
        self.index.append(index.detach().long())

    def compute(self) -> tuple[Int[Tensor, " question"], Float[Tensor, "question letter"]]:
        """Row numbers in rising order, each once, and their scores; on the CPU."""
        if not isinstance(self.index, Tensor) and len(self.index) == 0:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.num_options)
        index, scores = dim_zero_cat(self.index).cpu(), dim_zero_cat(self.scores).cpu()
        index, scores = index[index >= 0], scores[index >= 0]
        order = torch.argsort(index, stable=True)
        index, scores = index[order], scores[order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return index[first], scores[first]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather as torchmetrics does; a process that scored no row takes part with no rows.

        torchmetrics skips an empty list, and the other processes would wait for it in vain.
        """
        if not self._is_synced and isinstance(self.index, list) and not self.index:
            empty = torch.zeros(0, self.num_options, device=self.device)
            self.update(empty, empty[:, 0].long())
        super().sync(*args, **kwargs)

    def predictions(self, questions: Sequence[Question], split: str) -> list[Prediction]:
        """The predictions collected so far, in the order of `questions`.

        Args:
            questions: Questions of the split; `index` counts in them.
            split: Name of the split.

        Returns:
            One prediction for each question scored.
        """
        index, scores = self.compute()
        # torchmetrics makes a number of a tensor of one.
        index, scores = index.reshape(-1), scores.reshape(-1, self.num_options)
        return to_predictions(questions, split, index, scores)


def to_predictions(
    questions: Sequence[Question],
    split: str,
    index: Int[Tensor, " question"],
    scores: Float[Tensor, "question letter"],
) -> list[Prediction]:
    """Join scores with the questions they belong to.

    Args:
        questions: Questions of the split.
        split: Name of the split.
        index: Place of each scored question in `questions`.
        scores: Its log-probabilities in nats.

    Returns:
        One prediction for each row of `scores`.
    """
    return [
        Prediction(
            id=question.id,
            split=split,
            subject_name=question.subject_name,
            choice_type=question.choice_type,
            answer=question.answer,
            scores=tuple(row),
        )
        for question, row in zip(
            (questions[i] for i in index.tolist()), scores.tolist(), strict=True
        )
    ]


def score_arrays(
    predictions: Sequence[Prediction],
) -> tuple[Float[np.ndarray, "question letter"], Int[np.ndarray, " question"]]:
    """Scores and answers of predictions as arrays; the answer is -100 where unknown.

    Raises:
        DataError: If the questions differ in their number of options or an answer is not one of
            them.
        NotFiniteError: If a score is not finite.
    """
    widths = {len(prediction.scores) for prediction in predictions}
    if len(widths) > 1:
        raise DataError(
            f"Questions with {' and '.join(map(str, sorted(widths)))} options cannot be scored "
            "together; put questions of each number of options into their own file."
        )
    width = widths.pop() if widths else 4
    scores = np.array([p.scores for p in predictions], dtype=np.float64).reshape(-1, width)
    answer = np.array(
        [IGNORE if p.answer is None else p.answer for p in predictions], dtype=np.int64
    )
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise NotFiniteError(
            f"The scores of question {predictions[row].id} are not finite: "
            f"{predictions[row].scores}; the weights are damaged or overflowed: compute in "
            "bfloat16 or float32, never float16."
        )
    wrong = np.flatnonzero((answer != IGNORE) & ((answer < 0) | (answer >= width)))
    if len(wrong):
        raise DataError(
            f"Question {predictions[wrong[0]].id} has answer {answer[wrong[0]]}, which is none of "
            f"its {width} options (0..{width - 1}); use null where there is no label."
        )
    return scores, answer


def questions_sha256(questions: Sequence[Question]) -> str:
    """SHA-256 of what was asked: ids, stems, options and answers, in whatever order."""
    rows = sorted(
        json.dumps([q.id, q.stem, list(q.options), q.answer], ensure_ascii=False) for q in questions
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def summarise(
    predictions: Sequence[Prediction],
    questions: Sequence[Question] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Everything metrics.json says about one split.

    Only labelled questions count, in every number but `letter_share` and `num_unlabelled`. Without
    any label all that needs one is None, and no group is listed.

    Args:
        predictions: Predictions of the split, each question once.
        questions: The questions scored, in any order; None leaves `difficulty`, `negated` and
            `length` without groups and `sha256` None.
        groups: More breakdowns: name -> group of each prediction, in the order of `predictions`,
            such as `{"difficulty_base_nll": base_nll_difficulty(...)}`.

    Returns:
        The contract's keys `n, accuracy, ci_low, ci_high, macro_accuracy, loss, ece, brier,
        majority_accuracy, letter_share, by`, and beside them `num_unlabelled`, `random_accuracy`,
        `majority_letter`, `letter_accuracy` (accuracy of always giving each letter), `confusion`
        (rows are answers, columns predictions), `length_bounds` (characters, upper bounds of the
        length groups) and `sha256` of the questions. Macro accuracy is the mean over subjects. The
        majority baseline is the best constant letter of this very split.

    Raises:
        DataError: If predictions and questions do not belong together.
        NotFiniteError: If a score is not finite.
    """
    scores, answer = score_arrays(predictions)
    num_options = scores.shape[1]
    predicted = scores.argmax(axis=1)
    labelled = answer >= 0
    n = int(labelled.sum())
    summary: dict[str, Any] = {
        "n": n,
        "accuracy": None,
        "ci_low": None,
        "ci_high": None,
        "macro_accuracy": None,
        "loss": None,
        "ece": None,
        "brier": None,
        "majority_accuracy": None,
        "letter_share": _shares(predicted, num_options),
        "by": {name: {} for name in BREAKDOWNS},
        "num_unlabelled": len(predictions) - n,
        "random_accuracy": 1 / num_options,
        "majority_letter": None,
        "letter_accuracy": None,
        "confusion": None,
        "length_bounds": None,
        "sha256": None,
    }
    all_groups: dict[str, Sequence[str]] = {
        "subject_name": [p.subject_name for p in predictions],
        "choice_type": [p.choice_type for p in predictions],
    }
    if questions is not None:
        matched = _match(predictions, questions)
        lengths, summary["length_bounds"] = length_groups(matched)
        all_groups |= {
            "difficulty": [stem_difficulty(question) for question in matched],
            "negated": ["yes" if negated(question) else "no" for question in matched],
            "length": lengths,
        }
        summary["sha256"] = questions_sha256(questions)
    for name, group in (groups or {}).items():
        if len(group) != len(predictions):
            raise DataError(
                f"Breakdown {name} has {len(group)} groups for {len(predictions)} predictions; "
                "give one a prediction."
            )
        all_groups[name] = group
    if n == 0:
        return summary

    correct = (predicted == answer)[labelled]
    low, high = wilson_interval(int(correct.sum()), n)
    letter_accuracy = _shares(answer[labelled], num_options) or []
    best = int(np.argmax(letter_accuracy))
    confusion = multiclass_confusion_matrix(
        torch.from_numpy(predicted[labelled]), torch.from_numpy(answer[labelled]), num_options
    )
    by = {
        name: _breakdown(np.asarray(group, dtype=object)[labelled], correct)
        for name, group in all_groups.items()
    }
    summary["by"] |= by
    summary |= {
        "accuracy": float(correct.mean()),
        "ci_low": low,
        "ci_high": high,
        "macro_accuracy": float(np.mean([g["accuracy"] for g in by["subject_name"].values()])),
        "loss": calibration.negative_log_likelihood(scores[labelled], answer[labelled]),
        "ece": calibration.expected_calibration_error(scores[labelled], answer[labelled]),
        "brier": calibration.brier_score(scores[labelled], answer[labelled]),
        "majority_accuracy": letter_accuracy[best],
        "majority_letter": LETTERS[best],
        "letter_accuracy": letter_accuracy,
        "confusion": confusion.tolist(),
    }
    return summary


def _shares(letters: np.ndarray, num_options: int) -> list[float] | None:
    """Fraction of each letter; None of nothing."""
    if len(letters) == 0:
        return None
    return [float(share) for share in np.bincount(letters, minlength=num_options) / len(letters)]


def _breakdown(group: np.ndarray, correct: np.ndarray) -> dict[str, dict[str, Any]]:
    """Accuracy of each group with its n and interval; levels from low to high, others by size."""
    names, index = np.unique(group.astype(str), return_inverse=True)
    count = np.bincount(index)
    num_correct = np.bincount(index, weights=correct.astype(np.float64)).astype(int)
    table = {}
    ranks = {level: rank for levels in (LEVELS, LENGTHS) for rank, level in enumerate(levels)}
    for i in sorted(range(len(names)), key=lambda i: (ranks.get(names[i], 0), -count[i])):
        low, high = wilson_interval(int(num_correct[i]), int(count[i]))
        table[str(names[i])] = {
            "n": int(count[i]),
            "accuracy": float(num_correct[i] / count[i]),
            "ci_low": low,
            "ci_high": high,
        }
    return table


def _match(predictions: Sequence[Prediction], questions: Sequence[Question]) -> list[Question]:
    """The question of each prediction.

    Raises:
        DataError: If a question has no prediction or two, or a prediction no question, or they
            disagree about the answer.
    """
    by_id = {question.id: question for question in questions}
    ids = {prediction.id for prediction in predictions}
    advice = "score the questions again and summarise both together"
    if len(by_id) != len(questions) or len(ids) != len(predictions):
        twice = len(questions) - len(by_id) or len(predictions) - len(ids)
        raise DataError(f"{twice} question id(s) occur twice; give every question its own id.")
    if ids != by_id.keys():
        raise DataError(
            f"{len(predictions)} predictions and {len(questions)} questions share "
            f"{len(ids & by_id.keys())} ids; {advice}."
        )
    matched = [by_id[prediction.id] for prediction in predictions]
    for prediction, question in zip(predictions, matched, strict=True):
        if (prediction.answer, len(prediction.scores)) != (question.answer, len(question.options)):
            raise DataError(
                f"Question {question.id} has answer {question.answer} of {len(question.options)} "
                f"options, its prediction {prediction.answer} of {len(prediction.scores)}; "
                f"{advice}."
            )
    return matched
