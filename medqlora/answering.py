"""Rows from outside -> questions -> answers: what `predict` and `serve` have in common."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medqlora import pipeline
from medqlora.data.medmcqa import OPTION_COLUMNS, REQUIRED_COLUMNS, parse_rows
from medqlora.data.readers import RawRows
from medqlora.entry import one_line
from medqlora.errors import CheckpointError, ConfigError, DataError, MedQLoRAError
from medqlora.evaluation import apply_temperature, fit_temperature, read_predictions
from medqlora.schema import LETTERS, Prediction, Question

_USED_COLUMNS = (
    *dict.fromkeys((*REQUIRED_COLUMNS, *OPTION_COLUMNS)),
    "id",
    "subject_name",
    "choice_type",
    "topic_name",
)
"""Everything else in a row, a label and an explanation above all, is not looked at."""

_THIS = "this row"


class BusyError(MedQLoRAError):
    """More questions at once than may wait."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of the input: a question, or why it is none.

    Attributes:
        row: Row number from 1; for JSON lines the line, for CSV without the header.
        id: The row's own id, None where it has none.
        question: The question; None for a bad row.
        error: One line about a bad row.
    """

    row: int
    id: str | int | None
    question: Question | None
    error: str | None = None


def run_temperature(run_dir: str | Path, choice: str | None) -> float:
    """Temperature that the scores are divided by.

    Args:
        run_dir: The run folder.
        choice: None for 1; "run" for the one that fits the run's val predictions best.

    Raises:
        ConfigError: If `choice` is neither.
        CheckpointError: If the run has no labelled val predictions to fit one on.
    """
    if choice is None:
        return 1.0
    if choice != "run":
        raise ConfigError(
            f"temperature={choice} is unknown. Choose run, or null for scores as they are."
        )
    found: list[Prediction] = []
    with contextlib.suppress(ConfigError):  # no such split
        found = read_predictions(run_dir, "val")
    found = [prediction for prediction in found if prediction.answer is not None]
    if not found:
        raise CheckpointError(
            f"{run_dir} has no labelled val predictions to fit a temperature on. Set "
            "temperature=null, or train with val questions."
        )
    return fit_temperature(
        np.array([prediction.scores for prediction in found]),
        np.array([prediction.answer for prediction in found]),
    )


def check_row(row: int, record: Mapping[str, Any] | str, num_options: int) -> Asked:
    """Make a question of a row, or say why it is none.

    Args:
        row: Row number.
        record: Its fields by raw name, or why it could not be read.
        num_options: Options that the run answers with.
    """
    if isinstance(record, str):
        return Asked(row, None, None, record)
    fields = {key: record[key] for key in _USED_COLUMNS if key in record}
    own = fields.get("id")
    if own is None or own == "" or own != own:
        fields.pop("id", None)
        own = None
    name = own if isinstance(own, str | int) and not isinstance(own, bool) else None
    raw = RawRows(_THIS, {key: [value] for key, value in fields.items()})
    findings = []
    try:
        (question,) = parse_rows({"row": raw}, findings=findings)["row"]
    except DataError as error:
        return Asked(row, name, None, _about_this(one_line(error)))
    if findings:
        return Asked(row, name, None, _about_this(findings[0].detail))
    if not question.stem.strip():
        return Asked(row, name, None, "question is empty: write a text.")
    if empty := [
        column
        for column, text in zip(OPTION_COLUMNS, question.options, strict=False)
        if not text.strip()
    ]:
        return Asked(row, name, None, f"{empty[0]} is empty: write a text.")
    if len(question.options) != num_options:
        return Asked(
            row,
            name,
            None,
            f"the row has {len(question.options)} options, and this run answers with "
            f"{num_options} letters: give as many.",
        )
    return Asked(row, name, replace(question, answer=None, explanation=None))


def _about_this(message: str) -> str:
    return message.replace(f"{_THIS}, row 1", _THIS)


def answer(
    run: pipeline.LoadedRun, asked: Sequence[Asked], temperature: float = 1.0
) -> Iterator[dict[str, Any]]:
    """The output lines of a block of rows, in order.

    Args:
        run: What answers.
        asked: Rows, bad ones among them.
        temperature: Divides the log-probabilities before they are normalised again.

    Yields:
        `row`, `id`, `prediction` (a letter), `index` and `probabilities` by letter, and
        `shortened` where the stem was too long and lost its beginning; or `row`, `id` and `error`.
    """
    answers = iter(_answers(run, [entry.question for entry in asked if entry.question]))
    for entry in asked:
        found = entry.error if entry.question is None else next(answers)
        if isinstance(found, Prediction):
            scores = apply_temperature(np.array([found.scores]), temperature)[0]
            letters = LETTERS[: len(scores)]
            line = {
                "row": entry.row,
                "id": entry.id,
                "prediction": letters[found.prediction],
                "index": found.prediction,
                "probabilities": dict(zip(letters, np.exp(scores).tolist(), strict=True)),
            }
            assert entry.question is not None
            yield line | ({"shortened": True} if run.shortens(entry.question) else {})
        else:
            yield {"row": entry.row, "id": entry.id, "error": found}


def _answers(run: pipeline.LoadedRun, questions: Sequence[Question]) -> list[Prediction | str]:
    """Predictions in order; a question that the run refuses is found by halving the block."""
    if not questions:
        return []
    try:
        return list(run.predict(questions))
    except (ConfigError, DataError) as error:
        if len(questions) == 1:
            return [one_line(error)]
    middle = len(questions) // 2
    return _answers(run, questions[:middle]) + _answers(run, questions[middle:])


class AnswerThread:
    """One thread that answers for many callers: what waits while rows are scored shares the next.

    Args:
        run: What answers.
        temperature: Divides the log-probabilities; 1 leaves them as scored.
        max_waiting: Questions that may wait, which bounds memory and waiting time.
        block: Questions scored together at most.
    """

    def __init__(
        self,
        run: pipeline.LoadedRun,
        temperature: float = 1.0,
        *,
        max_waiting: int = 4096,
        block: int = 1024,
    ) -> None:
        self.num_options = run.datamodule.num_options
        self.num_blocks = 0
        self._run, self._temperature = run, temperature
        self._max_waiting, self._block = max_waiting, block
        self._waiting: deque[tuple[list[Asked], Future[list[dict[str, Any]]]]] = deque()
        self._num_waiting = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def ask(self, records: Sequence[Mapping[str, Any] | str]) -> Future[list[dict[str, Any]]]:
        """Have rows answered together with whatever else waits.

        Args:
            records: Fields of each row, or why it could not be read.

        Returns:
            The lines of `answer`, rows counted from 1; cancelled, it is left out of the next block.

        Raises:
            BusyError: If too many questions wait, or the thread was closed.
        """
        asked = [
            check_row(row, record, self.num_options) for row, record in enumerate(records, start=1)
        ]
        future: Future[list[dict[str, Any]]] = Future()
        with self._changed:
            if self._closed:
                raise BusyError("the server is ending: ask again when it is back.")
            if self._num_waiting + len(asked) > self._max_waiting:
                raise BusyError(
                    f"{self._num_waiting} questions wait already, and at most {self._max_waiting} "
                    "may: ask again later."
                )
            self._waiting.append((asked, future))
            self._num_waiting += len(asked)
            self._changed.notify()
        return future

    def close(self, timeout: float = 10.0) -> None:
        """Refuse what waits and end after the rows that are scored now.

        Args:
            timeout: Seconds to wait for them.
        """
        with self._changed:
            self._closed = True
            for _, future in self._waiting:
                future.cancel()
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while (block := self._next_block()) is not None:
            asked = [entry for rows, _ in block for entry in rows]
            try:
                lines = list(answer(self._run, asked, self._temperature))
            except Exception as error:  # of the device, such as its memory: the next block may fit
                for _, future in block:
                    future.set_exception(error)
                continue
            self.num_blocks += 1
            start = 0
            for rows, future in block:
                future.set_result(lines[start : start + len(rows)])
                start += len(rows)

    def _next_block(self) -> list[tuple[list[Asked], Future[list[dict[str, Any]]]]] | None:
        """What waits, as much of it as one block takes; None once closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return None
                block, size = [], 0
                while self._waiting and (
                    not block or size + len(self._waiting[0][0]) <= self._block
                ):
                    rows, future = self._waiting.popleft()
                    self._num_waiting -= len(rows)
                    if future.set_running_or_notify_cancel():
                        block.append((rows, future))
                        size += len(rows)
                if block:
                    return block
