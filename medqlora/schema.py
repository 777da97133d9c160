"""The objects that cross a layer border. Nothing here imports the rest of the package."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

LETTERS = "ABCDE"
"""Names of the options, in order; MedMCQA uses the first four."""

IGNORE = -100
"""Answer or label of a place that is not scored, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question.

    Attributes:
        id: Identifier, unique within its data set.
        stem: The question text without its options.
        options: The option texts, in the order of `LETTERS`; four in MedMCQA.
        answer: Index of the right option, or None where the data has no label.
        subject_name: Medical subject, "Unknown" where the data has none.
        choice_type: "single" or "multi"; both have exactly one right option.
        topic_name: Topic within the subject, if any.
        explanation: The expert's explanation, if any. It names the answer: never part of a prompt.
    """

    id: str
    stem: str
    options: tuple[str, ...]
    answer: int | None
    subject_name: str = "Unknown"
    choice_type: str = "single"
    topic_name: str | None = None
    explanation: str | None = None


@dataclass(frozen=True)
class PackedBatch:
    """One row of exactly `token_budget` tokens: questions end to end, then padding.

    Every row of a run has the same shapes, so that one compilation serves all of them. The tokens
    with which all questions begin may stand at the front of the row once, instead of before each:
    every question goes on from them, sees them, and counts its positions on from theirs. Padding
    after the last question has token 0 and position 0 and lies behind `cu_seqlens[-1]` of the real
    questions; no real token attends to it.

    Attributes:
        input_ids: The `prefix_length` shared tokens, then what follows them in each question.
        position_ids: Position of a token within its own question, shared tokens counted.
        cu_seqlens: Start of each question behind the shared tokens, then the end of the last one,
            repeated up to the fixed length: question `i` is `input_ids[:prefix_length]`, then
            `input_ids[cu_seqlens[i] : cu_seqlens[i + 1]]`. int32.
        last: Index of the last prompt token of each question, whose next token is the answer
            letter; 0
            in an empty place.
        answer: Index of the right option; -100 where there is no label and in an empty place.
        index: Row number of the question within its split; -1 in an empty place.
        labels: Next token to learn at each position, -100 elsewhere; only for `loss=explanation`.
        num_questions: Questions in the row.
        num_tokens: Tokens of those questions, shared ones once; the rest of the row is padding.
        max_length: Upper bound of a question's length in tokens, the same for every row of the run.
        prefix_length: Tokens at the front of the row that all its questions share; 0 where each
            question stands for itself.
    """

    input_ids: Int[Tensor, " token"]
    position_ids: Int[Tensor, " token"]
    cu_seqlens: Int[Tensor, " boundary"]
    last: Int[Tensor, " question"]
    answer: Int[Tensor, " question"]
    index: Int[Tensor, " question"]
    labels: Int[Tensor, " token"] | None
    num_questions: int
    num_tokens: int
    max_length: int
    prefix_length: int = 0

    def question(self, place: int) -> Int[Tensor, " token"]:
        """Tokens of the question in a place, shared ones in front."""
        start, end = self.cu_seqlens[place], self.cu_seqlens[place + 1]
        return torch.cat([self.input_ids[: self.prefix_length], self.input_ids[start:end]])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The same row on `device`; copies from pinned memory overlap with computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same row in page-locked memory; called by the data loader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer given to one question.

    Attributes:
        id: The question's identifier.
        split: "train", "val", "test" or the name of a file.
        subject_name: The question's subject.
        choice_type: The question's choice type.
        answer: Index of the right option, None where unknown.
        scores: Log-probability in nats of each letter, normalised over the letters of the question.
    """

    id: str
    split: str
    subject_name: str
    choice_type: str
    answer: int | None
    scores: tuple[float, ...]

    @property
    def prediction(self) -> int:
        """Index of the letter with the highest score; the first of equals."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    @property
    def correct(self) -> bool | None:
        """Whether the prediction is the answer; None where the answer is unknown."""
        return None if self.answer is None else self.prediction == self.answer
