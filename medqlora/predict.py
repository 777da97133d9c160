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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO, cast

from omegaconf import DictConfig, OmegaConf

from medqlora import pipeline
from medqlora.answering import answer, check_row, run_temperature
from medqlora.data.medmcqa import REQUIRED_COLUMNS
from medqlora.data.readers import STDIN
from medqlora.entry import command
from medqlora.errors import ConfigError, DataError, MedQLoRAError
from medqlora.hub import resolve_path

FORMATS = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")
"""File name endings that are read as a stream."""

CELL_LIMIT = 1_000_000
"""Characters of a CSV cell: a quote that is never closed must not swallow the rest of the file."""


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
