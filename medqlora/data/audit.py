"""What is wrong with a data set, row by row, and what a constant answer would score on it.

The findings are suspicions for a reader: texts are compared without case, punctuation and spacing,
as in the published counts of MedMCQA, so ">50 degree" and "<50 degree" count as one option
repeated; the detail says so.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from medqlora.data.medmcqa import (
    OPTION_COLUMNS,
    Finding,
    count_options,
    find_label_base,
    normalise,
    parse_labels,
    parse_rows,
)
from medqlora.data.prompts import PromptTemplate
from medqlora.data.readers import RawRows
from medqlora.data.tokenization import TextEncoder
from medqlora.errors import ConfigError
from medqlora.schema import LETTERS, Question

NEAR = 0.8
"""Jaccard similarity of two questions' character 5-grams from which on they are near-duplicates."""

Questions = Mapping[str, Sequence[Question]]
"""Questions by split."""

Cut = Callable[[Questions], Mapping[str, Sequence[tuple[str, int]]]]
"""Makes the splits of a run: split and row (from 1) in the source of each of their questions."""


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        summary: Counts and shares, ready for JSON; see `audit_rows`.
        findings: One row a finding: `id`, `row` (from 1), `split`, `finding`, `detail`.
    """

    summary: dict[str, Any]
    findings: pd.DataFrame


# --- findings -------------------------------------------------------------------------------------

# Common words with "rt", those two letters having been deleted from many words of the published
# files.
_RT_WORDS = """
abortion abortus aorta aortic apart artefact arterial arteries arteriole artery arthralgia
arthritis article articular artificial assertion bartholin cartilage cartilaginous certain
comfort convert cortex cortical cortisol cortisone department dirty distortion
diverticulitis diverticulum effort exertion fertile fertility fertilization heart
hypertelorism hypertension hypertensive hyperthermia hypertonic hypertrophic hypertrophy
importance important infertility inserted insertion mortality mortem orthodontic orthopaedic
partial partially participate particle particular parturition portal portion property
proportion quarter report reported short shortening started support supported thirty
transport vertebra vertebrae vertebral vertex vertical vertigo virtual wharton
"""
_REAL_WORDS = frozenset({"main", "paying", "pay", "was", "way"})
_WORD = re.compile(r"[a-z]+")
_NEGATED = re.compile(
    r"\b(?:not|except|excluding|false|incorrect|least|wrong|never|untrue|unlikely)\b|n't\b",
    re.IGNORECASE,
)
_ALL_OR_NONE = re.compile(
    r"\b(?:all|none|both|any|neither)\s+(?:of\s+)?(?:the\s+)?(?:above|these)\b"
    r"|^\W*(?:all|none|both)(?:\s+(?:are|is))?(?:\s+(?:true|correct|of them))?\W*$",
    re.IGNORECASE,
)
# "cha" and "pa" have lost their "rt". An X-ray that "shows" something is described, not shown.
_PICTURE = (
    r"(?:(?<!body )image|picture|photo(?:graph)?|figure|fig|diagram|graph|cha(?:rt)?|colou?r plate)"
)
_FILM = rf"(?:{_PICTURE}|radiograph|x[\s-]*ray)"
_STRUCTURE = r"(?:structure|area|pa(?:rt)?|nerve|muscle|vessel|bone|region|organ)"
_IMAGE = re.compile(
    rf"\b{_PICTURE}s?\b(?:\s+(?:shows?|depicts?)|.{{0,40}}\b(?:below|above|shown|given|marked|provided))\b"
    r"|(?<!data )\b(?:shown|given|depicted|provided)\W+(?:below|above|here)\b"
    rf"|(?<!of the )\b(?:below|following|given|above|shown|this)\s+(?:\w+\s+)?{_FILM}\b"
    rf"|\b(?:shown|given|marked|depicted|seen)\b.{{0,30}}\b{_FILM}\b"
    rf"|\bmarked\s+(?:arrow|{_STRUCTURE})s?\b|\b{_STRUCTURE}\s+marked\b|\bmarked\b.{{0,12}}\barrow"
    r"|\b(?:case|condition|instrument|lesion|appliance|structure|audiogram)\s+shown\b"
    r"|\bas shown\W*(?:[.?:]|$)|\b(?:image|picture|video)[\s-]+based\b",
    re.IGNORECASE,
)


def _rows(questions: Questions) -> Iterator[tuple[str, int, Question]]:
    for split, members in questions.items():
        for row, question in enumerate(members, start=1):
            yield split, row, question


def options_key(question: Question) -> tuple[str, frozenset[str]]:
    """What copies of a question with its options share, whatever the order of the options."""
    return normalise(question.stem), frozenset(map(normalise, question.options))


def _groups(
    questions: Questions, key: Callable[[Question], Any]
) -> Iterator[list[tuple[str, int, Question]]]:
    groups: dict[Any, list[tuple[str, int, Question]]] = defaultdict(list)
    for entry in _rows(questions):
        groups[key(entry[2])].append(entry)
    return (members for members in groups.values() if len(members) > 1)


def _gold(question: Question) -> str | None:
    return None if question.answer is None else normalise(question.options[question.answer])


def _find_missing_field(questions: Questions) -> Iterator[Finding]:
    for split, row, question in _rows(questions):
        for name, text in zip(
            ("question", *OPTION_COLUMNS), (question.stem, *question.options), strict=False
        ):
            if not text.strip():
                yield Finding(question.id, row, split, "missing_field", f"{name} is empty")


def _find_duplicate_question(questions: Questions) -> Iterator[Finding]:
    for members in _groups(questions, lambda q: normalise(q.stem)):
        split, row, _ = members[0]
        for other, number, question in members[1:]:
            detail = f"question text of {split} row {row}"
            yield Finding(question.id, number, other, "duplicate_question", detail)


def _find_identical(questions: Questions) -> Iterator[Finding]:
    for members in _groups(questions, options_key):
        split, row, _ = members[0]
        for other, number, question in members[1:]:
            detail = f"question and options of {split} row {row}"
            yield Finding(question.id, number, other, "identical", detail)


def _find_conflicting(questions: Questions) -> Iterator[Finding]:
    for members in _groups(questions, options_key):
        answers = {gold for _, _, q in members if (gold := _gold(q)) is not None}
        if len(answers) > 1:
            places = ", ".join(f"{split} row {row}" for split, row, _ in members)
            for split, row, question in members:
                detail = f"{places} are one question with different answers"
                yield Finding(question.id, row, split, "conflicting", detail)


def _find_repeated_options(questions: Questions) -> Iterator[Finding]:
    for split, row, question in _rows(questions):
        plain = [normalise(option) for option in question.options]
        if len(set(plain)) < len(plain):
            exact = len({" ".join(o.casefold().split()) for o in question.options}) < len(plain)
            twice = next(
                o for o, text in zip(question.options, plain, strict=True) if plain.count(text) > 1
            )
            how = "repeated" if exact else "repeated but for punctuation or signs"
            yield Finding(question.id, row, split, "repeated_options", f"{twice[:80]!r} is {how}")


def _find_ambiguous_gold(questions: Questions) -> Iterator[Finding]:
    for split, row, question in _rows(questions):
        gold = _gold(question)
        same = [
            letter
            for letter, option in zip(LETTERS, question.options, strict=False)
            if normalise(option) == gold
        ]
        if len(same) > 1:
            detail = f"options {' and '.join(same)} are the right text"
            yield Finding(question.id, row, split, "ambiguous_gold", detail)


def _find_image_reference(questions: Questions) -> Iterator[Finding]:
    for split, row, question in _rows(questions):
        if match := _IMAGE.search(question.stem):
            yield Finding(question.id, row, split, "image_reference", match.group()[:80])


def _find_deleted_rt(questions: Questions) -> Iterator[Finding]:
    words: dict[str, str] = {}
    for word in _RT_WORDS.split():
        words.setdefault(word.replace("rt", "", 1), word)
    # Whatever the data spells with "rt" elsewhere can have lost it as well; short remains are too
    # often words of their own.
    for _, _, question in _rows(questions):
        for text in (question.stem, *question.options):
            lower = text.lower()
            if "rt" in lower:
                for word in _WORD.findall(lower):
                    if "rt" in word and len(word) >= 8:
                        words.setdefault(word.replace("rt", "", 1), word)
    words = {broken: word for broken, word in words.items() if broken not in _REAL_WORDS}
    for split, row, question in _rows(questions):
        text = " ".join((question.stem, *question.options)).lower()
        hits = {word for word in _WORD.findall(text) if word in words}
        if hits:
            detail = ", ".join(f"{word} for {words[word]}" for word in sorted(hits))
            yield Finding(question.id, row, split, "deleted_rt", detail[:200])


def _find_negated(questions: Questions) -> Iterator[Finding]:
    for split, row, question in _rows(questions):
        if match := _NEGATED.search(question.stem):
            yield Finding(question.id, row, split, "negated", match.group())


def _find_all_or_none(questions: Questions) -> Iterator[Finding]:
    for split, row, question in _rows(questions):
        option = next((o for o in question.options if _ALL_OR_NONE.search(o.strip())), None)
        if option is not None:
            yield Finding(question.id, row, split, "all_or_none_of_the_above", option[:80])


def _find_unlabelled(questions: Questions) -> Iterator[Finding]:
    for split, row, question in _rows(questions):
        if question.answer is None:
            yield Finding(question.id, row, split, "unlabelled", "no answer is given")


FINDERS: dict[str, Callable[[Questions], Iterator[Finding]]] = {
    "missing_field": _find_missing_field,
    "unlabelled": _find_unlabelled,
    "duplicate_question": _find_duplicate_question,
    "identical": _find_identical,
    "conflicting": _find_conflicting,
    "repeated_options": _find_repeated_options,
    "ambiguous_gold": _find_ambiguous_gold,
    "image_reference": _find_image_reference,
    "deleted_rt": _find_deleted_rt,
    "negated": _find_negated,
    "all_or_none_of_the_above": _find_all_or_none,
}
"""Findings that `data.drop` can name.

Of equal questions, `duplicate_question` and `identical` name all but the first, `conflicting` all.
"""


def find(questions: Questions, names: Collection[str]) -> list[Finding]:
    """Findings of the given names.

    Raises:
        ConfigError: If there is no finding of that name.
    """
    for name in names:
        if name not in FINDERS:
            raise ConfigError(
                f"data.drop names {name!r}, which the audit does not find: choose from "
                f"{', '.join(FINDERS)}."
            )
    return [finding for name in FINDERS if name in names for finding in FINDERS[name](questions)]


# --- near-duplicates ------------------------------------------------------------------------------


_PERMUTATIONS = 100


def _shingles(question: Question) -> set[bytes]:
    text = normalise(" ".join((question.stem, *sorted(question.options)))).encode()
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def near_duplicates(
    train: Sequence[Question], held_out: Questions, threshold: float = NEAR
) -> list[Finding]:
    """Training questions that all but repeat a held-out question with its options.

    MinHash proposes pairs, and their Jaccard similarity is then computed exactly, so a pair can be
    missed but none is wrongly reported.

    Args:
        train: Questions to look through.
        held_out: Questions of the other splits.
        threshold: Similarity from which on two questions count as near-duplicates, in (0, 1].

    Returns:
        One finding a training question, with the most similar held-out question.

    References:
        MinHash: Broder 1997, doi:10.1109/SEQUEN.1997.666900.
    """
    from datasketch import MinHash, MinHashLSH

    # 20 bands of 5 propose 99.96 % of the pairs at 0.8 and few below 0.4.
    index: Any = MinHashLSH(num_perm=_PERMUTATIONS, params=(20, 5))
    shingles: dict[tuple[str, int], set[bytes]] = {}
    held = {(split, row): question for split, row, question in _rows(held_out) if split != "train"}
    keys = list(held)
    for key, sketch in zip(keys, _sketches(held.values(), MinHash), strict=True):
        shingles[key] = _shingles(held[key])
        index.insert(key, sketch, check_duplication=False)
    found = []
    for row, (question, sketch) in enumerate(
        zip(train, _sketches(train, MinHash), strict=True), start=1
    ):
        candidates = index.query(sketch)
        if not candidates:
            continue
        own = _shingles(question)
        best, key = max(
            (len(own & shingles[key]) / len(own | shingles[key]), key) for key in candidates
        )
        if best >= threshold:
            detail = f"{best:.2f} like {key[0]} question {held[key].id}"
            found.append(Finding(question.id, row, "train", "near_duplicate", detail))
    return found


def _near_in_source(questions: Questions, cut: Cut | None) -> list[Finding]:
    """Near-duplicates between the splits of a run, by their rows in the source."""
    if cut is None:
        places = {s: [(s, row) for row in range(1, len(q) + 1)] for s, q in questions.items()}
    else:
        places = {split: list(members) for split, members in cut(questions).items()}
    if "train" not in places or len(places) < 2:
        return []
    by_split = {s: [questions[where][row - 1] for where, row in p] for s, p in places.items()}
    found = near_duplicates(by_split["train"], by_split)
    in_source = [places["train"][finding.row - 1] for finding in found]
    return [replace(f, split=s, row=row) for f, (s, row) in zip(found, in_source, strict=True)]


def _sketches(questions: Iterable[Question], minhash: Any) -> Iterator[Any]:
    """One MinHash a question; the permutations are drawn once and shared."""
    empty = minhash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
    for question in questions:
        sketch = empty.copy()
        sketch.update_batch(sorted(_shingles(question)))
        yield sketch


# --- the whole audit ------------------------------------------------------------------------------


def audit_questions(
    questions: Questions,
    *,
    tokenizer: Any = None,
    prompt: PromptTemplate | None = None,
    near: bool = True,
    cut: Cut | None = None,
    extra: Sequence[Finding] = (),
    labelled: Collection[tuple[str, int]] = (),
) -> AuditReport:
    """Audit questions that were read already.

    Args:
        questions: Questions by split.
        tokenizer: Tokenizer of the run, for lengths in tokens; None leaves them out.
        prompt: Template of the run; needed with `tokenizer`.
        near: Whether to look for near-duplicates between train and the other splits.
        cut: How the run cuts its splits; None if those of the source are its own.
        extra: Findings made while reading.
        labelled: Split and row of questions that have a label, though which answer it means may be
            unknown.

    Returns:
        The summary holds `num_rows`, `num_labelled`, `num_options`, `rows_by_split`, `findings`
        (name: number of rows), `groups` (name: number of groups of equal questions),
        `null_explanations`, `subjects`, `choice_types`, `letter_counts`, `letter_shares`,
        `constant_accuracy` (always the same letter), `majority_letter`, `majority_share`,
        `negated_share`, and `length_tokens` with percentiles, by split and over `all`.
    """
    noted = {(f.split, f.row, f.finding) for f in extra}
    noted |= {(split, row, "unlabelled") for split, row in labelled}
    found = find(questions, [*FINDERS])
    findings = [*extra, *(f for f in found if (f.split, f.row, f.finding) not in noted)]
    if near:
        findings += _near_in_source(questions, cut)
    rows_with: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for finding in findings:
        rows_with[finding.finding].add((finding.split, finding.row))
    summary: dict[str, Any] = {
        "rows_by_split": {s: len(members) for s, members in questions.items()}
    }
    everything = [question for _, _, question in _rows(questions)]
    summary |= _describe(everything)
    summary["findings"] = {
        name: len(rows_with.get(name, ()))
        for name in (*FINDERS, *sorted({*rows_with} - {*FINDERS}))
    }
    conflicts = [
        members
        for members in _groups(questions, options_key)
        if len({gold for _, _, q in members if (gold := _gold(q)) is not None}) > 1
    ]
    summary["groups"] = {
        "duplicate_question": sum(1 for _ in _groups(questions, lambda q: normalise(q.stem))),
        "identical": sum(1 for _ in _groups(questions, options_key)),
        "conflicting": len(conflicts),
    }
    summary["negated_share"] = len(rows_with["negated"]) / max(1, len(everything))
    summary["splits"] = {split: _describe(members) for split, members in questions.items()}
    if tokenizer is not None and prompt is not None:
        encoder = TextEncoder(tokenizer)
        lengths = {s: _token_lengths(members, prompt, encoder) for s, members in questions.items()}
        summary["length_tokens"] = {
            split: _percentiles(values)
            for split, values in (*lengths.items(), ("all", np.concatenate([*lengths.values()])))
        }
    table = pd.DataFrame(
        [(f.id, f.row, f.split, f.finding, f.detail) for f in findings],
        columns=["id", "row", "split", "finding", "detail"],
    ).astype({"row": "int64"})
    return AuditReport(summary, table)


def audit_rows(
    raws: Mapping[str, RawRows],
    *,
    label_base: int | None = None,
    ignore_columns: Collection[str] = (),
    tokenizer: Any = None,
    prompt: PromptTemplate | None = None,
    near: bool = True,
    cut: Cut | None = None,
) -> AuditReport:
    """Audit raw rows: what a run would refuse becomes a finding here.

    Args:
        raws: Raw rows by split, from `read_rows` or `read_hub`.
        label_base: Value of `cop` that means the first option; None to find it.
        ignore_columns: Unknown columns that are let pass.
        tokenizer: Tokenizer of the run, for lengths in tokens; None leaves them out.
        prompt: Template of the run; needed with `tokenizer`.
        near: Whether to look for near-duplicates between train and the other splits.
        cut: How the run cuts its splits; None if those of the source are its own.

    Returns:
        As `audit_questions`, the summary with `label_base` (null where unknown) and `sources` as
        well.

    Raises:
        DataError: If the columns are not those of MedMCQA.
    """
    extra: list[Finding] = []
    questions = parse_rows(
        raws, label_base=label_base, ignore_columns=ignore_columns, findings=extra
    )
    num_options = count_options(raws, [])
    labels = {s: parse_labels(s, raw, num_options, []) for s, raw in raws.items()}
    base = find_label_base(raws, labels, num_options, label_base, [])
    labelled = {
        (split, row)
        for split, values in labels.items()
        for row, value in enumerate(values, start=1)
        if value is not None
    }
    invalid = {(f.split, f.row) for f in extra if f.finding == "invalid_label"}
    report = audit_questions(
        questions,
        tokenizer=tokenizer,
        prompt=prompt,
        near=near,
        cut=cut,
        extra=extra,
        labelled=labelled | invalid,
    )
    for split, part in report.summary["splits"].items():
        part["num_labelled"] = sum(where == split for where, _ in labelled)
    report.summary["num_labelled"] = len(labelled)
    sources = {split: raw.source for split, raw in raws.items()}
    return AuditReport({"sources": sources, "label_base": base} | report.summary, report.findings)


def _describe(questions: Sequence[Question]) -> dict[str, Any]:
    labelled = [question.answer for question in questions if question.answer is not None]
    num_options = len(questions[0].options) if questions else 4
    letters = LETTERS[:num_options]
    counts = {letter: labelled.count(index) for index, letter in enumerate(letters)}
    shares = {letter: count / max(1, len(labelled)) for letter, count in counts.items()}
    majority = max(letters, key=lambda letter: counts[letter]) if labelled else None
    return {
        "num_rows": len(questions),
        "num_labelled": len(labelled),
        "num_options": num_options,
        "null_explanations": sum(question.explanation is None for question in questions),
        "subjects": dict(Counter(question.subject_name for question in questions).most_common()),
        "choice_types": dict(Counter(question.choice_type for question in questions).most_common()),
        "letter_counts": counts,
        "letter_shares": shares,
        "constant_accuracy": shares if labelled else None,
        "majority_letter": majority,
        "majority_share": None if majority is None else shares[majority],
    }


def _token_lengths(
    questions: Sequence[Question], prompt: PromptTemplate, encoder: TextEncoder
) -> np.ndarray:
    lengths = []
    for start in range(0, len(questions), 8192):
        chunk = questions[start : start + 8192]
        lengths += map(len, encoder.encode_prompts([prompt.render(q) for q in chunk]))
    return np.array(lengths, dtype=np.int64)


def _percentiles(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    points = {f"p{p}": float(np.percentile(lengths, p)) for p in (5, 25, 50, 75, 95, 99)}
    return {
        "mean": float(lengths.mean()),
        "min": int(lengths.min()),
        **points,
        "max": int(lengths.max()),
    }
