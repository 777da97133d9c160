"""Answer questions with a run: one JSON line a question, in order, on standard output.

python -m medqlora.predict run=runs/DAY/TIME questions=mine.jsonl
cat mine.jsonl | python -m medqlora.predict run=runs/DAY/TIME questions=-
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TextIO, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf

from medqlora import pipeline
from medqlora.data.medmcqa import OPTION_COLUMNS, REQUIRED_COLUMNS, parse_rows
from medqlora.data.readers import STDIN, RawRows
from medqlora.entry import command, one_line
from medqlora.errors import CheckpointError, ConfigError, DataError, MedQLoRAError
from medqlora.evaluation import apply_temperature, fit_temperature, read_predictions
from medqlora.hub import resolve_path
from medqlora.schema import LETTERS, Prediction, Question

FORMATS = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")
"""File name endings that are read as a stream."""

CELL_LIMIT = 1_000_000
"""Characters of a CSV cell: a quote that is never closed must not swallow the rest of the file."""

_USED_COLUMNS = (
    *dict.fromkeys((*REQUIRED_COLUMNS, *OPTION_COLUMNS)),
    "id",
    "subject_name",
    "choice_type",
    "topic_name",
)
"""Everything else in a row, a label and an explanation above all, is not looked at."""

_THIS = "this row"


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


def predict(cfg: DictConfig, out: TextIO) -> None:
    """Answer every question of a file.

    Args:
        cfg: The composed config of `predict`.
        out: Where the JSON lines go.

    Raises:
        ConfigError: If the request cannot work.
        DataError: If the file cannot be read, or is damaged from some row on; what came before
            was answered.
        CheckpointError: If the run folder is none.
        MedQLoRAError: If rows could not be answered; each has its error in its place.
    """
    for key, example in (("run", "run=runs/DAY/TIME"), ("questions", "questions=mine.jsonl")):
        if OmegaConf.is_missing(cfg, key) or cfg[key] is None:
            raise ConfigError(f"predict needs {example}, and {key} is not given.")
    if isinstance(cfg.block, bool) or not isinstance(cfg.block, int) or cfg.block < 1:
        raise ConfigError(f"block={cfg.block} is no number of questions: give 1 or more.")
    temperature = run_temperature(cfg.run, cfg.temperature)
    with open_rows(str(cfg.questions)) as rows:
        run = pipeline.load_run(cfg.run, device=cfg.device)
        num_options = run.datamodule.num_options
        total = bad = 0
        for block in in_blocks(rows, cfg.block):
            asked = [check_row(row, record, num_options) for row, record in block]
            for line in answer(run, asked, temperature):
                total += 1
                bad += "error" in line
                out.write(json.dumps(line, allow_nan=False) + "\n")
            out.flush()
    if not total:
        raise DataError(f"{_source(str(cfg.questions))} holds no rows: give at least one question.")
    if bad:
        raise MedQLoRAError(
            f"{bad} of {total} rows could not be answered; each has its error in its place of the "
            "output. Correct those rows and ask them again."
        )


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


# --- rows -----------------------------------------------------------------------------------------

Row = tuple[int, "Mapping[str, Any] | str"]
"""Row number, and its fields or the reason why they cannot be read."""


@contextlib.contextmanager
def open_rows(path: str) -> Iterator[Iterator[Row]]:
    """Open a file of questions as a stream, so that memory does not grow with it.

    Args:
        path: A file with one of the endings in `FORMATS`, `bundled:...`, or `-` for JSON lines on
            standard input.

    Yields:
        Rows in order. A row that cannot be read comes as the reason; bytes that are no UTF-8 stay
        in the text as lone surrogates, which `check_row` refuses.

    Raises:
        DataError: If there is no such file, or its header lacks a column.
    """
    ending = next((e for e in sorted(FORMATS, key=len, reverse=True) if path.endswith(e)), None)
    if path != STDIN and ending is None:
        raise DataError(
            f"questions={path} has none of the endings that are read: name a file that ends in "
            f"{', '.join(FORMATS)}, or - for JSON lines on standard input."
        )
    with contextlib.ExitStack() as stack:
        raw: IO[bytes]
        if path == STDIN:
            raw = sys.stdin.buffer
        else:
            file = Path(resolve_path(path)).expanduser()
            try:
                raw = stack.enter_context(_open(file))
            except OSError as error:
                raise DataError(
                    f"questions={path} cannot be opened ({error.strerror}): check the path."
                ) from error
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        if path == STDIN:
            stack.callback(text.detach)  # standard input is not ours to close
        lines = _lines(text, _source(path))
        yield _csv_rows(lines, path) if ending and ".csv" in ending else _json_rows(lines)


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _source(path: str) -> str:
    return "standard input" if path == STDIN else path


def _lines(text: TextIO, source: str) -> Iterator[str]:
    number = 0
    try:
        for line in text:
            number += 1
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise DataError(
            f"{source} is damaged or cut off after line {number} ({error}): copy or download the "
            "file again."
        ) from error


def _json_rows(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            yield number, f"the line is not valid JSON ({reason}): write one object a line."
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            yield (
                number,
                f"the line is a {type(record).__name__}, not an object with the keys "
                f"{', '.join(REQUIRED_COLUMNS)}.",
            )


def _csv_rows(lines: Iterable[str], path: str) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    csv.field_size_limit(CELL_LIMIT)
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"the header of {path} is not valid CSV ({error}): correct it.") from error
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if header and missing:
        raise DataError(
            f"{path} lacks the column {missing[0]}; its header reads {', '.join(header)[:200]!r}: "
            f"separate the columns with commas and name them {', '.join(REQUIRED_COLUMNS)}."
        )
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield (
                number,
                f"the row is not valid CSV ({error}): put texts that contain commas, quotes or "
                "line breaks in double quotes, and double the quotes inside.",
            )
            continue
        if not cells:
            continue
        number += 1
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        else:
            yield (
                number,
                f"the row has {len(cells)} cells where the header has {len(header)}: put texts "
                "that contain commas, quotes or line breaks in double quotes.",
            )


def in_blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in lists of `size`; what was read before a damaged place comes before its error."""
    block: list[Row] = []
    try:
        for row in rows:
            block.append(row)
            if len(block) == size:
                yield block
                block = []
    except DataError:
        if block:
            yield block
        raise
    if block:
        yield block


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


# --- answers --------------------------------------------------------------------------------------


def answer(
    run: pipeline.LoadedRun, asked: Sequence[Asked], temperature: float = 1.0
) -> Iterator[dict[str, Any]]:
    """The output lines of a block of rows, in order.

    Args:
        run: What answers.
        asked: Rows, bad ones among them.
        temperature: Divides the log-probabilities before they are normalised again.

    Yields:
        `row`, `id`, `prediction` (a letter), `index` and `probabilities` by letter; or `row`, `id`
        and `error`.
    """
    answers = iter(_answers(run, [entry.question for entry in asked if entry.question]))
    for entry in asked:
        found = entry.error if entry.question is None else next(answers)
        if isinstance(found, Prediction):
            scores = apply_temperature(np.array([found.scores]), temperature)[0]
            letters = LETTERS[: len(scores)]
            yield {
                "row": entry.row,
                "id": entry.id,
                "prediction": letters[found.prediction],
                "index": found.prediction,
                "probabilities": dict(zip(letters, np.exp(scores).tolist(), strict=True)),
            }
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


@command("predict")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Answer questions, one JSON line each; nothing else goes to standard output."""
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            predict(cfg, out)
    except BrokenPipeError:
        # Whoever read the answers has enough. Python would complain once more when it flushes.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise SystemExit(128 + 13) from None  # as a shell reports SIGPIPE


if __name__ == "__main__":
    main()
