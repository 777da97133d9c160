"""Training questions with their options in another order in every epoch, the label following."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from medqlora.data.prompts import PromptTemplate
from medqlora.data.tokenization import TextEncoder, tokenize_questions
from medqlora.schema import PackedBatch, Question

_SPEAKS_OF_OTHERS = re.compile(
    r"\b(?:above|below|aforementioned)\b"
    r"|\b(?:all|none|both|any|either|neither)\b(?: \w+){0,2} (?:these|those|them|[a-e])\b"
    r"|\b[a-e](?:\s*[,&+/]\s*|\s+(?:and|or)\s+)[a-e]\b"
    r"|^\W*(?:all|none|both)\W*$",
    re.IGNORECASE,
)


def is_movable(question: Question) -> bool:
    """Whether the options mean the same in any order: none speaks of others by their place.

    "All of the above", "none of these" and "both a and c" do: in MedMCQA's validation set an option
    of every thirteenth question.
    """
    return not any(_SPEAKS_OF_OTHERS.search(option) for option in question.options)


def reorder(question: Question, order: Sequence[int]) -> Question:
    """The question with option `order[i]` in place `i`; the answer stays the same option."""
    answer = None if question.answer is None else list(order).index(question.answer)
    return replace(question, options=tuple(question.options[i] for i in order), answer=answer)


class OptionShuffle:
    """Puts the options of training questions into another order in every epoch.

    The order is a function of the seed, the epoch and the question alone, so that a resumed run,
    and every process, sees the same. A question keeps the order of the data where an option speaks
    of others by their place, and in the epochs in which the new order would take more or fewer
    tokens than it has room for in its row, which is rare.

    Args:
        questions: The questions of the split.
        prompt: Template, with its solved questions.
        encoder: Tokenizer.
        limit: Most tokens of a question.
        seed: Seed of the orders.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        prompt: PromptTemplate,
        encoder: TextEncoder,
        *,
        limit: int,
        seed: int,
    ) -> None:
        self.questions = questions
        self.prompt = prompt
        self.encoder = encoder
        self.limit = limit
        self.seed = seed

    def __call__(self, row: PackedBatch, epoch: int) -> PackedBatch:
        """A row as an epoch shows it: other tokens and labels in the same places.

        Args:
            row: Prompts alone, in the order of the data.
            epoch: Number of the pass over the data.
        """
        input_ids, answer = row.input_ids.clone(), row.answer.clone()
        moved = [self._moved(member, epoch) for member in row.index[: row.num_questions].tolist()]
        other = tokenize_questions(moved, self.prompt, self.encoder, limit=self.limit)
        starts = row.cu_seqlens[: row.num_questions + 1].tolist()
        for place, (start, end) in enumerate(pairwise(starts)):
            first = other.offsets[place] + row.prefix_length
            tokens = other.tokens[first : other.offsets[place + 1]]
            if len(tokens) == end - start:
                input_ids[start:end] = torch.from_numpy(tokens)
                if other.answer[place] >= 0:
                    answer[place] = int(other.answer[place])
        return replace(row, input_ids=input_ids, answer=answer)

    def _moved(self, member: int, epoch: int) -> Question:
        question = self.questions[member]
        if not is_movable(question):
            return question
        generator = np.random.default_rng([self.seed, epoch, 2, member])
        return reorder(question, generator.permutation(len(question.options)).tolist())
