"""What changed between two sets of answers to the same questions, down to the questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medqlora.errors import ConfigError
from medqlora.evaluation.calibration import apply_temperature
from medqlora.schema import LETTERS, Prediction, Question


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that one run has right and the other wrong.

    Attributes:
        question: Its texts.
        before: The answer of the first run.
        after: The answer of the second run.
    """

    question: Question
    before: Prediction
    after: Prediction

    @property
    def to_right(self) -> bool:
        """Whether the second run has it right."""
        return self.after.correct is True

    @property
    def gain(self) -> float:
        """By how much the second run believes more in the right letter, in nats."""
        answer = self.after.answer
        assert answer is not None
        return self.after.scores[answer] - self.before.scores[answer]


def flips(
    before: Sequence[Prediction], after: Sequence[Prediction], questions: Sequence[Question]
) -> list[Flip]:
    """Questions that one run has right and the other wrong; the largest change of belief first.

    Args:
        before: Predictions of the first run.
        after: Predictions of the second run, of the same questions in any order.
        questions: The questions with their texts, in any order; more than those do not matter.

    Returns:
        The flips of both directions. Questions without a label cannot flip.

    Raises:
        ConfigError: If the runs answered different questions, or the text of one is missing.
    """
    first = _by_id(before, after)
    texts = {question.id: question for question in questions}
    missing = [prediction.id for prediction in after if prediction.id not in texts]
    if missing:
        raise ConfigError(
            f"the texts of {len(missing)} scored questions are missing, such as {missing[0]}: give "
            "the questions of the split that was scored."
        )
    found = [
        Flip(texts[prediction.id], first[prediction.id], prediction)
        for prediction in after
        if prediction.correct is not None and prediction.correct != first[prediction.id].correct
    ]
    return sorted(found, key=lambda flip: -abs(flip.gain))


def mean_divergence(before: Sequence[Prediction], after: Sequence[Prediction]) -> float:
    """Mean Kullback-Leibler divergence of the letters' probabilities, in nats.

    It is what the second run loses in cross-entropy on answers drawn from the first, so unlike
    accuracy it also sees what stays below the likeliest letter.

    Raises:
        ConfigError: If the runs answered different questions, or none.
    """
    first = _by_id(before, after)
    if not after:
        raise ConfigError("no question was answered, so nothing can differ: score some first.")
    p = apply_temperature(np.array([first[item.id].scores for item in after]), 1.0)
    q = apply_temperature(np.array([item.scores for item in after]), 1.0)
    # Rounding may leave it below zero by one part in 10^16.
    return max(float((np.exp(p) * (p - q)).sum(axis=1).mean()), 0.0)


def flips_markdown(flips: Sequence[Flip], name_before: str, name_after: str) -> str:
    """Flips with their texts in Markdown: both runs' probabilities beside each option.

    Args:
        flips: As many as are to be shown.
        name_before: Name of the first run.
        name_after: Name of the second run.

    Returns:
        A heading and a table a question; the right option is bold, a run's choice is starred.
    """
    return "\n".join(_flip_markdown(flip, name_before, name_after) for flip in flips) or (
        "No question flipped.\n"
    )


def _flip_markdown(flip: Flip, name_before: str, name_after: str) -> str:
    question = flip.question
    lines = [
        f"**{_plain(question.stem)}**  ",
        f"{_plain(question.subject_name)}; {'wrong → right' if flip.to_right else 'right → wrong'}",
        "",
        f"|  | option | {_plain(name_before)} | {_plain(name_after)} |",
        "|---|---|---:|---:|",
    ]
    for place, option in enumerate(question.options):
        is_answer = place == flip.after.answer
        text = f"**{_plain(option)}**" if is_answer else _plain(option)
        cells = [
            f"{100 * np.exp(run.scores[place]):.1f} %" + r" \*" * (run.prediction == place)
            for run in (flip.before, flip.after)
        ]
        lines.append(f"| {LETTERS[place]} | {text} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A text of the data in Markdown: nothing in it is markup, and it stays on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", " ".join(text.split()))


def _by_id(before: Sequence[Prediction], after: Sequence[Prediction]) -> Mapping[str, Prediction]:
    first = {prediction.id: prediction for prediction in before}
    others = {prediction.id for prediction in after}
    if first.keys() != others or len(first) != len(before) or len(others) != len(after):
        raise ConfigError(
            f"one run answered {len(before)} questions and the other {len(after)}, "
            f"{len(first.keys() & others)} of them the same: give answers to the same questions, "
            "each once."
        )
    return first
