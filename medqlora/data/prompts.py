"""Question -> prompt, as text and control tokens, and the text an answer continues it with.

The explanation of a question names its answer, so no template has a place for it.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medqlora.data.medmcqa import group_of
from medqlora.errors import ConfigError
from medqlora.schema import LETTERS, Question


@dataclass(frozen=True, slots=True)
class Control:
    """A token with a meaning to the model, such as `<start_of_turn>`; never made from text."""

    token: str


Prompt = tuple[str | Control, ...]
"""Segments of a prompt. A string is text whatever it contains; the BOS token is not part of it."""


class PromptTemplate:
    """How a question is put to the model. Immutable by convention; no dataclass.

    Hydra takes a dataclass instance for a config and would hand over a dict in its place.

    Args:
        name: Name for messages and caches.
        text: Python format string with the fields `stem`, `options` (one line each, with its line
            break), and optionally `subject_name`. It ends where the answer letter follows.
        answer_prefix: What stands between the prompt and the letter; " " gives " A".
        option: Format string of one line of `options`, with the fields `letter` and `text`.
        num_shots: Solved questions in front of each prompt, taken from train.
        shot_seed: Seed that chooses them.
        separator: What stands between solved questions.
        shots: The solved questions, all different, one more than `num_shots`; see `with_shots`.

    Raises:
        ConfigError: If the text leaves the question out, or asks for what there is not.
    """

    def __init__(
        self,
        name: str,
        text: str,
        answer_prefix: str = " ",
        option: str = "{letter}. {text}\n",
        num_shots: int = 0,
        shot_seed: int = 1234,
        separator: str = "\n\n",
        shots: tuple[Question, ...] = (),
    ) -> None:
        self.name = name
        self.text = text
        self.answer_prefix = answer_prefix
        self.option = option
        self.num_shots = num_shots
        self.shot_seed = shot_seed
        self.separator = separator
        self.shots = shots
        self._check()
        self._groups = [group_of(shot) for shot in shots]
        # Filling in a split line is several times as fast as formatting it.
        self._lines = [option.format(letter=x, text="\0").split("\0") for x in LETTERS]

    def _check(self) -> None:
        fields = _fields(self.text)
        if unknown := sorted(fields - {"stem", "options", "subject_name"}):
            raise ConfigError(
                f"prompt.text asks for {{{unknown[0]}}}: it can hold {{stem}}, {{options}} and "
                "{subject_name}; double a brace that is meant as a brace."
            )
        for needed in ("stem", "options"):
            if needed not in fields:
                raise ConfigError(
                    f"prompt.text={self.text!r} has no {{{needed}}}: without it the model cannot "
                    "know the question; add it."
                )
        if _fields(self.option) != {"letter", "text"}:
            raise ConfigError(
                f"prompt.option={self.option!r} must hold {{letter}} and {{text}}, and nothing "
                "else: leave it at its default."
            )
        if self.num_shots < 0:
            raise ConfigError(f"prompt.num_shots={self.num_shots} is negative: choose 0 or more.")

    def question_text(self, question: Question) -> str:
        """The question and its options as text, up to where the letter follows."""
        options = "".join(
            [text.join(line) for line, text in zip(self._lines, question.options, strict=False)]
        )
        return self.text.format(
            stem=question.stem, options=options, subject_name=question.subject_name
        )

    def render(self, question: Question) -> Prompt:
        """Segments of the prompt of `question`, without BOS and without the answer.

        A solved question that is asked itself, or of which a copy is asked, is replaced by the
        spare one, so that no prompt contains its own answer.

        Raises:
            ConfigError: If the template needs solved questions and was given none.
        """
        return (self._solved(question) + self.question_text(question),)

    def with_shots(self, train: Sequence[Question]) -> PromptTemplate:
        """The same template with its solved questions chosen from `train`.

        The choice depends on `shot_seed` and the ids alone, not on the order of the rows.

        Args:
            train: Questions to choose from; unlabelled ones and copies are passed over.

        Raises:
            ConfigError: If there are not enough labelled questions.
        """
        if not self.num_shots:
            return self
        labelled = [question for question in train if question.answer is not None]
        labelled.sort(key=lambda question: _rank(self.shot_seed, question.id))
        chosen: dict[int, Question] = {}
        for question in labelled:
            if len(chosen) <= self.num_shots:
                chosen.setdefault(group_of(question), question)
        if len(chosen) <= self.num_shots:
            raise ConfigError(
                f"prompt.num_shots={self.num_shots} needs {self.num_shots + 1} labelled training "
                f"questions and there are {len(chosen)}: give data.train_file, or choose "
                "prompt=harness."
            )
        return self._copy(shots=tuple(chosen.values()))

    def shown_to(self, question: Question) -> PromptTemplate:
        """The same template with those solved questions alone that `question` is asked with."""
        return self._copy(shots=self._chosen(question)) if self.num_shots else self

    def without_shots(self) -> PromptTemplate:
        """The same template with no solved questions in front."""
        return self._copy(num_shots=0, shots=())

    @property
    def digest(self) -> str:
        """Hash of everything that can change a prompt."""
        content = f"{type(self).__name__} {sorted(self._options().items())!r}"
        return hashlib.sha256(content.encode()).hexdigest()

    def _copy(self, **changes: Any) -> PromptTemplate:
        return type(self)(**(self._options() | changes))

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _solved(self, question: Question) -> str:
        if not self.num_shots:
            return ""
        if not self.shots:
            raise ConfigError(
                f"prompt.num_shots={self.num_shots} needs training questions to show and none are "
                "known: give data.train_file, or choose prompt=harness."
            )
        return "".join(
            self.question_text(shot)
            + self.answer_prefix
            + LETTERS[shot.answer or 0]
            + self.separator
            for shot in self._chosen(question)
        )

    def _chosen(self, question: Question) -> tuple[Question, ...]:
        """The solved questions in front of `question`."""
        own = group_of(question)
        others = [
            shot
            for shot, group in zip(self.shots, self._groups, strict=True)
            if group != own and shot.id != question.id
        ]
        return tuple(others[: self.num_shots])


class GemmaChatPrompt(PromptTemplate):
    """The question as a user turn in Gemma's chat format; the letter opens the model's turn.

    References:
        The format of `google/gemma-2b-it`: Gemma Team 2024, arXiv:2403.08295, table 4.
    """

    def render(self, question: Question) -> Prompt:
        """Segments of the two turns, the second one open."""
        text = self._solved(question) + self.question_text(question)
        return (
            Control("<start_of_turn>"),
            "user\n" + text.strip(),
            Control("<end_of_turn>"),
            "\n",
            Control("<start_of_turn>"),
            "model\n",
        )


def _fields(text: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ConfigError(
            f"prompt.text={text!r} is no format string ({error}): double a brace that is meant as "
            "a brace."
        ) from error


def _rank(seed: int, identifier: str) -> bytes:
    return hashlib.blake2b(f"{seed} {identifier}".encode(), digest_size=16).digest()
