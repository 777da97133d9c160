"""Arrow files that spare the second start of a run the reading and tokenising of the first.

A file is written beside its final name and moved there, so that a run that dies leaves no half of
one; its buffers are hashed, so that one that was damaged later is noticed, said, and made again.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from medqlora.data.tokenization import TokenizedQuestions
from medqlora.schema import Question

log = logging.getLogger(__name__)

VERSION = "2"
"""Part of every key; changed whenever the same input would give other rows or tokens."""

MIN_ROWS = 5000
"""Sets below this many rows are made anew: that takes less than a second."""


def cache_dir(path: str | None = None) -> Path:
    """Folder of the cache: `path`, else MEDQLORA_CACHE, else `~/.cache/medqlora`."""
    chosen = path or os.environ.get("MEDQLORA_CACHE") or "~/.cache/medqlora"
    return Path(chosen).expanduser()


def cache_key(*parts: Any) -> str:
    """Hash of what a cached table was made from."""
    content = json.dumps([VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


Value = TypeVar("Value")


class KeptData:
    """What was read and tokenised last, in memory for the next job of the same process.

    Of each kind the newest is kept, so that a sweep over data sets holds one of them.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, Any]] = {}

    def get(self, kind: str, key: str, make: Callable[[], Value]) -> Value:
        """What is kept, or else what `make` returns, which is kept from now on.

        Args:
            kind: What it is.
            key: `cache_key` of all it is made from.
            make: Makes it; its value must not be changed afterwards.
        """
        known = self._values.get(kind)
        if known is not None and known[0] == key:
            return known[1]
        self._values.pop(kind, None)  # before the next one is made
        value = make()
        self._values[kind] = (key, value)
        return value

    def forget(self) -> None:
        """Let everything go."""
        self._values = {}


def write_table(file: Path, table: pa.Table, meta: dict[str, Any]) -> None:
    """Write a table for later starts; a folder that cannot be written to costs only the time.

    Args:
        file: Where to; its folder is made if need be.
        table: What to keep.
        meta: What else to keep, as JSON.
    """
    table = table.combine_chunks()
    described = table.replace_schema_metadata(
        {"meta": json.dumps(meta), "checksum": _checksum(table, json.dumps(meta))}
    )
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        os.close(handle)
        with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, described.schema) as writer:
            writer.write_table(described)
        os.replace(temporary, file)
    except OSError as error:
        log.warning("no cache in %s (%s): the next start takes as long as this one", file, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read_table(file: Path) -> tuple[pa.Table, dict[str, Any]] | None:
    """Read a table back.

    Returns:
        The table, mapped rather than copied into memory, and its `meta`; None if there is none or
        it is damaged, which is said.
    """
    if not file.is_file():
        return None
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        metadata = table.schema.metadata or {}
        meta = metadata[b"meta"].decode()
        if metadata[b"checksum"].decode() != _checksum(table, meta):
            raise ValueError("its checksum does not fit")
        return table, json.loads(meta)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        log.warning("the cache %s is damaged (%s) and is made again", file, reason)
        return None


def _checksum(table: pa.Table, meta: str) -> str:
    total = hashlib.blake2b(meta.encode(), digest_size=16)
    for name, column in zip(table.column_names, table.columns, strict=True):
        total.update(name.encode())
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                # A missing buffer, such as that of validity bits, counts as an empty one.
                total.update(b"\0" if buffer is None else buffer)
    return total.hexdigest()


# --- what is kept ---------------------------------------------------------------------------------


def questions_to_table(
    questions: Sequence[Question], splits: Sequence[str], groups: np.ndarray, digests: list[bytes]
) -> pa.Table:
    """Questions of all splits of a source, with their group and digest."""
    options = pa.array([o for q in questions for o in q.options], pa.large_string())
    width = len(questions[0].options)
    offsets = np.arange(0, width * len(questions) + 1, width, dtype=np.int64)
    return pa.table(
        {
            "split": pa.array(splits, pa.large_string()),
            "id": pa.array([q.id for q in questions], pa.large_string()),
            "stem": pa.array([q.stem for q in questions], pa.large_string()),
            "options": pa.LargeListArray.from_arrays(pa.array(offsets), options),
            "answer": pa.array([q.answer for q in questions], pa.int8()),
            "subject_name": pa.array([q.subject_name for q in questions], pa.large_string()),
            "choice_type": pa.array([q.choice_type for q in questions], pa.large_string()),
            "topic_name": pa.array([q.topic_name for q in questions], pa.large_string()),
            "explanation": pa.array([q.explanation for q in questions], pa.large_string()),
            "group": pa.array(groups, pa.uint64()),
            "digest": pa.array(digests, pa.large_binary()),
        }
    )


def table_to_questions(table: pa.Table) -> list[Question]:
    """Questions of a table, in order."""
    columns = {name: table[name].to_pylist() for name in ("id", "stem", "answer", "explanation")}
    # Few different values in many rows: sharing the strings saves most of their memory.
    shared = {
        name: table[name].combine_chunks().dictionary_encode()
        for name in ("subject_name", "choice_type", "topic_name")
    }
    for name, column in shared.items():
        array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        values = [*array.dictionary.to_pylist(), None]
        codes = array.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
        columns[name] = [values[code] for code in codes.tolist()]
    flat = table["options"].combine_chunks().flatten().to_pylist()
    width = len(flat) // max(1, len(table))
    options = zip(*(flat[letter::width] for letter in range(width)), strict=True)
    return list(
        map(
            Question,
            columns["id"],
            columns["stem"],
            options,
            columns["answer"],
            columns["subject_name"],
            columns["choice_type"],
            columns["topic_name"],
            columns["explanation"],
        )
    )


def tokens_to_table(tokenized: TokenizedQuestions) -> pa.Table:
    """Token ids as one list a question."""
    return pa.table(
        {
            "tokens": pa.LargeListArray.from_arrays(
                pa.array(tokenized.offsets), pa.array(tokenized.tokens)
            ),
            "prompt_length": pa.array(tokenized.prompt_lengths),
            "answer": pa.array(tokenized.answer),
            "stem_cut": pa.array(tokenized.stem_cut.astype(np.int8)),
            "explanation_cut": pa.array(tokenized.explanation_cut.astype(np.int8)),
        }
    )


def table_to_tokens(table: pa.Table) -> TokenizedQuestions:
    """Token ids of a table, without copying them."""
    tokens = table["tokens"].combine_chunks()
    return TokenizedQuestions(
        tokens=tokens.values.to_numpy(),
        offsets=tokens.offsets.to_numpy(),
        prompt_lengths=table["prompt_length"].combine_chunks().to_numpy(),
        answer=table["answer"].combine_chunks().to_numpy(),
        stem_cut=table["stem_cut"].combine_chunks().to_numpy().astype(bool),
        explanation_cut=table["explanation_cut"].combine_chunks().to_numpy().astype(bool),
    )


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Suspend the collector, which would visit hundred thousands of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
