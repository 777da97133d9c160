"""Raw rows in MedMCQA's columns -> checked `Question`s, and which of them belong to which split.

The raw names `opa`..`ope` and `cop` do not leave this file.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from medqlora.data.readers import RawRows, read_rows
from medqlora.errors import ConfigError, DataError
from medqlora.schema import LETTERS, Question

OPTION_COLUMNS = ("opa", "opb", "opc", "opd", "ope")
REQUIRED_COLUMNS = ("question", "opa", "opb", "opc", "opd")
OPTIONAL_COLUMNS = ("id", "cop", "ope", "exp", "subject_name", "topic_name", "choice_type")

_NOT_A_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong or noteworthy about one row.

    Attributes:
        id: Id of the row's question, or "" where it has none.
        row: Row number in its source, from 1.
        split: Split the row belongs to.
        finding: Name of the finding, such as "repeated_options".
        detail: What was found, for a reader.
    """

    id: str
    row: int
    split: str
    finding: str
    detail: str


def normalise(text: str) -> str:
    """Text without case, punctuation, spacing and forms of characters: copies compare equal.

    Signs vanish too, so ">50" equals "<50": a question found this way is a suspect, not a culprit.
    """
    return _NOT_A_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def read_questions(
    path: str, *, label_base: int | None = None, ignore_columns: Collection[str] = ()
) -> list[Question]:
    """Read the questions of one file; labels are not needed.

    Args:
        path: A `.json`, `.jsonl`, `.csv` or `.parquet` file, the first three also `.gz`;
            `bundled:...` for an asset; `-` for JSON lines on standard input.
        label_base: Value of `cop` that means the first option, 0 or 1; None to find it.
        ignore_columns: Unknown columns that are let pass.

    Returns:
        The questions in the order of the file.

    Raises:
        DataError: If the file cannot be read or contradicts itself; names the file and the row.
    """
    rows = {"file": read_rows(path)}
    return parse_rows(rows, label_base=label_base, ignore_columns=ignore_columns)["file"]


def parse_rows(
    raws: Mapping[str, RawRows],
    *,
    label_base: int | None = None,
    require_labels: Collection[str] = (),
    ignore_columns: Collection[str] = (),
    findings: list[Finding] | None = None,
) -> dict[str, list[Question]]:
    """Check the rows of one data set and make questions of them.

    The splits are read together, because ids, the number of options and the base of the labels
    belong to a data set rather than to a file.

    Args:
        raws: Raw rows by split.
        label_base: Value of `cop` that means the first option, 0 or 1; None to find it.
        require_labels: Splits in which every row needs a label.
        ignore_columns: Unknown columns that are let pass.
        findings: If given, a wrong row is noted there instead of raising, its answer counts as
            unknown, and the reading goes on. Missing texts are noted in either case.

    Returns:
        Questions by split, in the order of the rows.

    Raises:
        DataError: If columns, ids, texts or labels are wrong; the line names the source and the
            row.
    """
    for raw in raws.values():
        _check_columns(raw, ignore_columns)
    strict = findings is None
    notes: list[Finding] = [] if findings is None else findings
    num_options = count_options(raws, None if strict else notes)
    labels = {
        split: parse_labels(split, raw, num_options, None if strict else notes)
        for split, raw in raws.items()
    }
    base = find_label_base(raws, labels, num_options, label_base, None if strict else notes)
    questions: dict[str, list[Question]] = {}
    seen: dict[str, str] = {}
    for split, raw in raws.items():
        questions[split] = _parse_split(
            split,
            raw,
            labels[split],
            base,
            num_options,
            split in require_labels,
            seen,
            strict,
            notes,
        )
    return questions


def find_label_base(
    raws: Mapping[str, RawRows],
    labels: Mapping[str, Sequence[int | None]],
    num_options: int,
    label_base: int | None = None,
    findings: list[Finding] | None = None,
) -> int | None:
    """Find out whether the labels count from 0 or from 1.

    A 0 proves that they count from 0, the number of options that they count from 1. The hub copy of
    MedMCQA counts from 0, the authors' files from 1, and the data card says the opposite of its
    data.

    Args:
        raws: Raw rows by split, for the names of the sources.
        labels: Raw labels by split, None where there is none.
        num_options: Options of every question.
        label_base: The base as the user states it, or None.
        findings: If given, what would be raised is noted there instead.

    Returns:
        0, 1, or None if no row is labelled or the labels contradict each other.

    Raises:
        DataError: If the labels contradict each other or `label_base`, or prove neither base.
    """
    witness: dict[int, tuple[str, int]] = {}
    if label_base is not None:
        if label_base not in (0, 1):
            raise ConfigError(
                f"data.label_base={label_base} is neither 0 nor 1: give the value of cop that "
                "means the first option, or null to find it from the data."
            )
        witness[label_base] = ("", 0)
    anything = False
    for split, values in labels.items():
        present = set(values)
        anything = anything or any(value is not None for value in present)
        if raws[split].class_labels:
            witness.setdefault(0, (split, 0))
        for value, base in ((0, 0), (num_options, 1)):
            if value in present:
                witness.setdefault(base, (split, list(values).index(value) + 1))
    if not anything:
        return None
    if len(witness) == 1:
        return next(iter(witness))
    if not witness:
        message = (
            f"{_sources(raws)}: no label is 0 and none is {num_options}, so they may count from 0 "
            "or from 1: say which with data.label_base=0 or data.label_base=1."
        )
        if findings is None:
            raise DataError(message)
        split, row = next(
            (split, row)
            for split, values in labels.items()
            for row, value in enumerate(values, start=1)
            if value is not None
        )
        findings.append(Finding("", row, split, "unknown_label_base", message))
        return None
    places = {
        base: f"{raws[split].source}, row {row}"
        if row
        else f"{raws[split].source}"
        if split
        else ""
        for base, (split, row) in witness.items()
    }
    if label_base is not None:
        other = 1 - label_base
        message = (
            f"{places[other]} has cop={0 if other == 0 else num_options}, which contradicts "
            f"data.label_base={label_base}: set data.label_base={other} or null."
        )
    else:
        message = (
            f"{places[0]} has cop=0 and {places[1]} has cop={num_options}: labels of one data set "
            f"count either from 0 or from 1; correct one of them to 0..{num_options - 1} or "
            f"1..{num_options}."
        )
    if findings is None:
        raise DataError(message)
    split, row = witness[1 if label_base is None else 1 - label_base]
    findings.append(Finding("", row, split, "mixed_label_base", message))
    return None


def _sources(raws: Mapping[str, RawRows]) -> str:
    return ", ".join(raw.source for raw in raws.values())


def _check_columns(raw: RawRows, ignore_columns: Collection[str]) -> None:
    known = {*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS}
    unknown = [name for name in raw.columns if name not in known and name not in ignore_columns]
    missing = [name for name in REQUIRED_COLUMNS if name not in raw.columns]
    if missing:
        raise DataError(
            f"{raw.source} lacks the column {missing[0]}; it has "
            f"{', '.join(raw.columns)[:200] or 'none'}: "
            f"name the columns {', '.join(REQUIRED_COLUMNS)}, and cop for the answer."
        )
    if unknown:
        raise DataError(
            f"{raw.source} has an unknown column {unknown[0]!r}: rename it to one of "
            f"{', '.join((*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS))}, or let it pass with "
            f"'data.ignore_columns=[{','.join(map(_quoted, unknown))}]'."
        )


def _quoted(name: str) -> str:
    """A name as Hydra reads it in a list."""
    return name if name.isidentifier() else f'"{name}"'


def _is_blank(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def count_options(raws: Mapping[str, RawRows], findings: list[Finding] | None) -> int:
    """Number of options, 4 or 5, the same for every row of the data set.

    Raises:
        DataError: If some rows have a fifth option and others do not, unless `findings` is given.
    """
    first: dict[bool, tuple[str, int]] = {}
    for split, raw in raws.items():
        fifth = raw.columns.get("ope")
        blanks = [True] * len(raw) if fifth is None else [_is_blank(value) for value in fifth]
        for has_fifth in (False, True):
            if (not has_fifth) in blanks:
                first.setdefault(has_fifth, (split, blanks.index(not has_fifth) + 1))
    if len(first) < 2:
        return 5 if True in first else 4
    (split_4, row_4), (split_5, row_5) = first[False], first[True]
    message = (
        f"{raws[split_5].source}, row {row_5} has five options and {raws[split_4].source}, row "
        f"{row_4} has four: a data set has one number of options; split it into two files."
    )
    if findings is None:
        raise DataError(message)
    findings.append(Finding("", row_4, split_4, "mixed_options", message))
    return 5


def parse_labels(
    split: str, raw: RawRows, num_options: int, findings: list[Finding] | None
) -> list[int | None]:
    """Raw labels as whole numbers in 0..num_options, None where a row is unlabelled.

    Raises:
        DataError: If a label is anything else, unless `findings` is given.
    """
    column = raw.columns.get("cop")
    if column is None:
        return [None] * len(raw)
    labels: list[int | None] = []
    for row, value in enumerate(column, start=1):
        label = value
        if isinstance(value, str):
            text = value.strip()
            # Of a column with one missing value pandas writes "1.0".
            whole = re.fullmatch(r"([+-]?\d{1,3})(?:\.0+)?", text, re.ASCII)
            label = int(whole[1]) if whole else value
            if not text:
                label = None
        elif isinstance(value, float):
            label = None if math.isnan(value) else int(value) if value.is_integer() else value
        if label is None or label == -1:
            labels.append(None)
        elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label <= num_options:
            labels.append(label)
        else:
            message = (
                f"{raw.source}, row {row} has cop={value!r}: write the number of the right option, "
                f"0..{num_options - 1} or 1..{num_options}, or -1 where it is unknown."
            )
            if findings is None:
                raise DataError(message)
            findings.append(Finding(_id_text(raw, row), row, split, "invalid_label", message))
            labels.append(None)
    return labels


def _id_text(raw: RawRows, row: int) -> str:
    column = raw.columns.get("id")
    return "" if column is None or _is_blank(column[row - 1]) else str(column[row - 1])


def _parse_split(
    split: str,
    raw: RawRows,
    labels: Sequence[int | None],
    base: int | None,
    num_options: int,
    needs_labels: bool,
    seen: dict[str, str],
    strict: bool,
    findings: list[Finding],
) -> list[Question]:
    size = len(raw)
    nothing: list[Any] = [None] * size
    columns = raw.columns
    options_of = zip(
        *(columns.get(name, nothing) for name in OPTION_COLUMNS[:num_options]), strict=True
    )
    has_ids = "id" in columns
    rows = zip(
        columns["question"],
        options_of,
        labels,
        columns.get("id", nothing),
        columns.get("subject_name", nothing),
        columns.get("choice_type", nothing),
        columns.get("topic_name", nothing),
        columns.get("exp", nothing),
        strict=True,
    )

    def refuse(row: int, identifier: str, finding: str, message: str) -> None:
        if strict:
            raise DataError(message)
        findings.append(Finding(identifier, row, split, finding, message))

    questions = []
    for row, (stem, options, label, raw_id, subject, choice, topic, exp) in enumerate(
        rows, start=1
    ):
        place = f"{raw.source}, row {row}"
        if not has_ids:
            identifier = f"{split}-{row}"
        elif isinstance(raw_id, str) and raw_id.strip() and raw_id.strip().lower() != "nan":
            identifier = raw_id.strip()
        elif isinstance(raw_id, int) and not isinstance(raw_id, bool):
            identifier = str(raw_id)
        else:
            identifier = f"{split}-{row}"
            refuse(
                row,
                "",
                "missing_id",
                f"{place} has id={raw_id!r}: give every row an id, or leave the column id out.",
            )
        earlier = seen.get(identifier)
        if earlier is not None:
            refuse(
                row,
                identifier,
                "duplicate_id",
                f"{place} repeats the id {identifier!r} of {earlier}: an id names one question of "
                "a data set; remove the copy, or leave the column id out.",
            )
        else:
            seen[identifier] = place
        texts = []
        for name, value in zip(("question", *OPTION_COLUMNS), (stem, *options), strict=False):
            if isinstance(value, str):
                text = value
            elif _is_blank(value):
                text = ""
                findings.append(
                    Finding(identifier, row, split, "missing_field", f"{name} is missing")
                )
            elif isinstance(value, int | float) and not isinstance(value, bool):
                text = str(value)
            else:
                text = ""
                refuse(
                    row,
                    identifier,
                    "invalid_field",
                    f"{place} has a {type(value).__name__} as {name}: write a text or a number.",
                )
            if not text.isascii() and not _is_unicode(text):
                refuse(
                    row,
                    identifier,
                    "invalid_field",
                    f"{place}: {name} holds half of a surrogate pair, which is no character: save "
                    "the file as UTF-8.",
                )
                text = text.encode("utf-8", "replace").decode("utf-8")
            texts.append(text)
        if label is None and needs_labels:
            refuse(
                row,
                identifier,
                "unlabelled",
                f"{place} has no label, and {split} rows need one: fill in cop, remove the row, or "
                "give the file as data.test_file to predict it.",
            )
        questions.append(
            Question(
                id=identifier,
                stem=texts[0],
                options=tuple(texts[1:]),
                answer=None if label is None or base is None else label - base,
                subject_name=_optional_text(subject) or "Unknown",
                choice_type=_optional_text(choice) or "single",
                topic_name=_optional_text(topic),
                explanation=_optional_text(exp),
            )
        )
    return questions


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _optional_text(value: Any) -> str | None:
    if _is_blank(value):
        return None
    text = str(value).strip()
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text or None


# --- which question belongs to which split --------------------------------------------------------


def group_of(question: Question) -> int:
    """64-bit hash of the normalised stem: copies of a question share it."""
    return _hash64(normalise(question.stem))


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: UInt64[np.ndarray, " row"], seed: int) -> UInt64[np.ndarray, " row"]:
    """Pseudo-random numbers that depend on nothing but the value and the seed.

    References:
        The finaliser of SplitMix64: Steele et al. 2014, doi:10.1145/2714064.2660195.
    """
    with np.errstate(over="ignore"):
        offset = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        mixed = values + offset
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def cut_groups(
    groups: UInt64[np.ndarray, " row"], seed: int, sizes: Sequence[int]
) -> list[Int[np.ndarray, " _member"]]:
    """Cut rows into parts of exactly the sizes asked for, never splitting a group.

    Whole groups are taken in the order of a hash of seed and group, a group that would overfill a
    part being left to the rest; so the parts depend on the set of rows and the seed, not on the row
    order.

    Args:
        groups: Group of each row, as from `group_of`.
        seed: Seed of the cut.
        sizes: Rows of each part, in order.

    Returns:
        Row numbers of each part and then of the rest, each ascending.

    Raises:
        ConfigError: If there are too few rows, or the groups cannot fill a part exactly.
    """
    unique, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(mix(unique, seed), kind="stable")
    part_of_group = np.full(len(unique), len(sizes), dtype=np.int64)
    free = order
    for part, size in enumerate(sizes):
        if size > counts[free].sum():
            raise ConfigError(
                f"data.num_val and data.num_test ask for {sum(sizes)} questions of {len(groups)}: "
                "ask for fewer, or give data.val_file."
            )
        remaining = size
        left = []
        for position, group in enumerate(free):
            if counts[group] <= remaining:
                part_of_group[group] = part
                remaining -= counts[group]
                if remaining == 0:
                    left.append(free[position + 1 :])
                    break
            else:
                left.append(np.array([group]))
        if size and remaining:
            raise ConfigError(
                f"{size} questions cannot be cut without parting copies of one question: ask for "
                f"{size - remaining} in data.num_val or data.num_test."
            )
        free = free if not size else np.concatenate(left) if left else free[:0]
    parts = part_of_group[inverse]
    return [np.flatnonzero(parts == part) for part in range(len(sizes) + 1)]


def sample_rows(questions: Sequence[Question], limit: int | None) -> Int[np.ndarray, " member"]:
    """Row numbers of a limited set: the same ids whatever the seed and the row order.

    Runs with different seeds are so scored on the same questions and can be compared in pairs.
    """
    if limit is None or limit >= len(questions):
        return np.arange(len(questions))
    keys = np.array([_hash64(question.id) for question in questions], dtype=np.uint64)
    return np.sort(np.argsort(keys, kind="stable")[:limit])


def question_digest(question: Question) -> bytes:
    """16 bytes that change with anything of a question that can change a result."""
    content = repr(
        (
            question.id,
            question.stem,
            question.options,
            question.answer,
            question.subject_name,
            question.choice_type,
            question.explanation,
        )
    )
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def dataset_sha256(digests: Mapping[str, Iterable[bytes]]) -> str:
    """Hash of the questions of all splits; the order of the rows does not matter."""
    total = hashlib.sha256()
    for split in sorted(digests):
        total.update(split.encode() + b"\0")
        total.update(b"".join(sorted(digests[split])))
    return total.hexdigest()


def letters(num_options: int) -> str:
    """Letters of the options, in order."""
    return LETTERS[:num_options]
