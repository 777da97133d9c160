"""Files and hub copies -> columns of raw rows; what is wrong with a file is said with its row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from huggingface_hub import HfApi

from medqlora.errors import DataError
from medqlora.hub import hub_error, offline_unless_reachable, resolve_path

FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
"""File name endings that are read."""

_WHOLE = re.compile(r"-?\d+\.0")

STDIN = "-"
"""Path that stands for JSON lines on standard input."""


@dataclass(frozen=True)
class RawRows:
    """Rows as they came, column by column, before anything was checked.

    Attributes:
        source: Path of the file, or name and split on the hub; used in messages.
        columns: Values of each column; all columns are equally long.
        class_labels: Whether `cop` is a `datasets.ClassLabel`, which counts from 0 by definition.
    """

    source: str
    columns: dict[str, list[Any]]
    class_labels: bool = False

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))


def read_rows(path: str) -> RawRows:
    """Read a file of questions without interpreting it.

    Args:
        path: A path with one of the endings in `FORMATS`, `bundled:...`, or `-` for JSON lines on
            standard input. A `.json` file holds one array, or one object a line as the original
            MedMCQA files do.

    Returns:
        Its columns; a key that a JSON object lacks is None, the row numbers that pandas writes
        into a CSV are left out, and so is the ".0" of ids that it made fractions of.

    Raises:
        DataError: If the file is missing, empty, damaged or not of the format its name says; the
            message names the file and the row, counted from 1 without the header.
    """
    if path == STDIN:
        return _from_records(_json_lines(sys.stdin, "standard input"), "standard input")
    file = Path(resolve_path(path)).expanduser()
    name = file.name.lower()
    ending = next((e for e in sorted(FORMATS, key=len, reverse=True) if name.endswith(e)), None)
    if ending is None:
        raise DataError(
            f"{path} has none of the endings that can be read: name a file that ends in "
            f"{', '.join(FORMATS)}."
        )
    if not file.is_file():
        raise DataError(f"{path} does not exist or is no file: check the path and its folder.")
    if file.stat().st_size == 0:
        raise DataError(f"{path} is empty: give a file with at least one question.")
    if ending == ".parquet":
        rows = _read_parquet(file, path)
    else:
        with _open_text(file) as text:
            read = _read_csv if ending.startswith(".csv") else _read_json
            rows = read(text, path)
    if not len(rows):
        raise DataError(f"{path} holds no rows: give a file with at least one question.")
    if "id" in rows.columns:
        rows.columns["id"] = [
            int(value) if isinstance(value, float) and value.is_integer() else value
            for value in rows.columns["id"]
        ]
    return rows


def read_hub(name: str, revision: str | None, splits: Sequence[str]) -> dict[str, RawRows]:
    """Read splits of a data set from the hub, or from the hub's cache on this machine.

    Args:
        name: Hub name, such as "openlifescienceai/medmcqa".
        revision: Commit, branch or tag; None for the newest.
        splits: Names of the splits that are wanted.

    Returns:
        Raw rows by split.

    Raises:
        DataError: If the data set is gated, missing or out of reach, or lacks a split.
    """
    # Imported here because it takes a second, which a run on local files need not pay.
    import datasets

    what = f"data set {name}"
    with offline_unless_reachable():
        try:
            loaded = datasets.load_dataset(name, revision=revision)
        except Exception as error:
            raise hub_error(_reason(name, revision) or error, what, DataError) from error
    missing = [split for split in splits if split not in loaded]
    if missing:
        raise DataError(
            f"{what} has no split {missing[0]!r}, only {', '.join(map(str, loaded))}: name another "
            "data set, or give its files with data=files."
        )
    rows = {}
    for split in splits:
        part = loaded[split]
        table: Any = part.with_format("arrow")[:]
        rows[split] = RawRows(
            source=f"{name} [{split}]",
            columns={column: table[column].to_pylist() for column in table.column_names},
            class_labels=isinstance(part.features.get("cop"), datasets.ClassLabel),
        )
        if not len(rows[split]):
            raise DataError(f"{name} [{split}] holds no rows: name another revision.")
    return rows


def _reason(name: str, revision: str | None) -> Exception | None:
    """The hub's own word on a data set, which `datasets` has dropped from what it raises."""
    try:
        HfApi().dataset_info(name, revision=revision)
    except Exception as error:
        return error
    return None


def _open_text(file: Path) -> TextIO:
    """Open a plain or gzipped text file; a byte order mark is dropped."""
    if file.name.lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.open(file, "rb"), encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def _lines(text: TextIO, path: str) -> Iterator[str]:
    """Lines of a text; damage is reported with the number of lines read before it."""
    number = 0
    while True:
        try:
            line = text.readline()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path} is damaged or cut off after row {number} ({error}): copy or download the "
                "file again."
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, after row {number}: the text is not UTF-8 ({error.reason}): save the "
                "file as UTF-8."
            ) from error
        if not line:
            return
        number += 1
        yield line


def _json_lines(text: TextIO, path: str) -> list[Any]:
    records = []
    for number, line in enumerate(_lines(text, path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, row {number} is not valid JSON ({error.msg} at column {error.colno}): "
                "write one object a line, or an array in a .json file."
            ) from error
        records.append(record)
    return records


def _read_json(text: TextIO, path: str) -> RawRows:
    lines = list(_lines(text, path))
    first = next((line.lstrip()[:1] for line in lines if line.strip()), "")
    if first != "[":
        return _from_records(_json_lines(io.StringIO("".join(lines)), path), path)
    try:
        records = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno} is not valid JSON ({error.msg}): write one array of "
            "objects, or one object a line."
        ) from error
    return _from_records(records, path)


def _from_records(records: list[Any], path: str) -> RawRows:
    columns: dict[str, list[Any]] = {}
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise DataError(
                f"{path}, row {number} is a {type(record).__name__}, not an object with the keys "
                'question, opa, ... : write rows like {"question": "...", "opa": "...", ...}.'
            )
        for key, value in record.items():
            if key not in columns:
                columns[key] = [None] * (number - 1)
            columns[key].append(value)
        for values in columns.values():
            if len(values) < number:
                values.append(None)
    if not columns:
        raise DataError(f"{path} holds no rows: give at least one question.")
    return RawRows(path, columns)


def _read_csv(text: TextIO, path: str) -> RawRows:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(text, path), strict=True)
    number = 0
    header: list[str] = []
    values: list[list[Any]] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        _check_header(header, path)
        for cells in reader:
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, row {number} has {len(cells)} cells where the header has "
                    f"{len(header)}: put texts that contain commas, quotes or line breaks in "
                    "double quotes."
                )
            values.append(cells)
    except csv.Error as error:
        raise DataError(
            f"{path}, row {number + 1} is not valid CSV ({error}): put texts that contain commas, "
            "quotes or line breaks in double quotes, and double the quotes inside."
        ) from error
    transposed = zip(*values, strict=True) if values else ([] for _ in header)
    columns = dict(zip(header, map(list, transposed), strict=True))
    if columns.get("") == [str(row) for row in range(number)]:
        del columns[""]  # the index of a pandas table
    # A cell has no type: an empty one means that there is nothing in these columns.
    for key in ("cop", "id", "exp", "topic_name", "subject_name", "choice_type"):
        if key in columns:
            columns[key] = [value if value.strip() else None for value in columns[key]]
    ids = columns.get("id", [])
    if all(value is None or _WHOLE.fullmatch(value) for value in ids):
        ids[:] = [value and value.removesuffix(".0") for value in ids]
    return RawRows(path, columns)


def _check_header(header: list[str], path: str) -> None:
    if len(header) == 1:
        for delimiter, name in ((";", "a semicolon"), ("\t", "a tab"), ("|", "a bar")):
            if delimiter in header[0]:
                raise DataError(
                    f"{path} separates its columns with {name}, its header reads as one column "
                    f"{header[0][:60]!r}: save the file with commas."
                )
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path} has two columns {twice!r}: rename or remove one of them.")


def _read_parquet(file: Path, path: str) -> RawRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is no intact parquet file ({' '.join(str(error).split())[:120]}): copy or "
            "download the file again."
        ) from error
    return RawRows(path, {name: table[name].to_pylist() for name in table.column_names})
