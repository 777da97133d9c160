"""Proxies for a question's difficulty.

MedMCQA has no difficulty field, so each proxy is named after its rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from medqlora.schema import Question

LEVELS = ("basic", "intermediate", "advanced")
"""Difficulty groups of `stem_difficulty` and `base_nll_difficulty`, from easy to hard."""

LENGTHS = ("short", "medium", "long")
"""Length groups of `length_groups`."""


def _words(words: str, *phrases: str) -> re.Pattern[str]:
    """A pattern that finds any of the words (separated by spaces) or phrases whole, in any case."""
    return re.compile(rf"\b(?:{'|'.join([*words.split(), *phrases])})\b", re.IGNORECASE)


# MedMCQA lost the letters "rt" in many words: "Asseion" stands for "Assertion".
_ASSERTION = re.compile(r"\basse(?:rt)?ions?\b.*\breason\b", re.IGNORECASE | re.DOTALL)
_PART = r"(?:[1-9]|[ivx]{1,4}|[a-e])"
_NUMBERED = re.compile(rf"(?:^|[\s:.;,?])\(?{_PART}[.)](?=\s*[A-Za-z])", re.IGNORECASE)
# Parts run together in the data: "a) ... dayb) ... decreasedc)".
_RUN_TOGETHER = re.compile(r"(?:[1-9]|[a-e])\)(?=\s*[A-Z])")
_STATEMENTS = _words(
    "statements? match arrange",
    "(?:correct|right|ascending|descending) (?:order|sequence)",
    r"(?:true|correct)\s+(?:about|regarding|concerning|of|for|is|are)",
    r"(?:is|are)\s+true",
    r"true(?=\W*$)",
)
_COMBINED_OPTION = re.compile(rf"^\W*{_PART}(?:\s*(?:,|&|\+|and|/)\s*{_PART})+\W*$", re.IGNORECASE)

_FALSE_TERM = re.compile(
    r"\bfalse[\s-]+(?:positive|negative|[+-]ve|locali[sz]ing|vocal|cord|pelvis|rib|aneurysm|labou?r|pain"
    r"|teeth|tooth|memor|joint|passage|alarm|rate)",
    re.IGNORECASE,
)
_NEGATION = _words(
    "except(?:ing|ion)? not cannot false incorrect untrue wrong never least unlikely unrelated",
    r"\w+n['\u2019]t",
    r"excluded?(?!\s+a\b)",
    r"odd\s+one",
)
# "A/E" is short for "all except"; "all ... expect" is a frequent misspelling of it.
_EXCEPT = re.compile(r"\bexcept\b|\ba/e\b|\ball\b[^.?]*\bexpect\W*$", re.IGNORECASE)
_AT_LEAST = _words("", r"at\s+(?:the\s+)?least", r"least\s+(?:one|two|three|\d+)")
# "Why does X not ...", "X does not ... because": the negation belongs to the fact, not the choice.
_REASON = re.compile(r"\bwhy\b|\b(?:because(?: of)?|due to)\W*$|\bif\b[^,]*\bnot\b", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[^a-z\s])")

_PERSON = _words(
    "patients? man woman men women boy girl lady gentleman males? females? infant neonate "
    "newborn child baby toddler teenager adult person he she victim case mother "
    "primigravida multigravida primi gravida smoker alcoholic diabetic farmer "
    "labou?rer worker driver student teacher athlete housewife",
    r"g\d\s?p\d",
)
_AGE = _words(
    "",
    r"\d{1,3}\s*[-\u2013 ]?\s*(?:years?|yrs?|months?|weeks?|days?)\s*[-\u2013 ]?\s*"
    r"(?:s|olds?|of age|aged|male|female|man|woman|boy|girl|child|lady|patient|infant|baby)",
    r"aged?\s+(?:of\s+)?\d{1,3}",
    r"\d{1,2}\s*y/?o",
)
_FINDING = _words(
    "present(?:s|ed|ing) complain(?:s|ed|ing|ts?)? brought admitted came comes coming "
    "appear(?:s|ed) reports? reported referred develop(?:s|ed) diagnosed found h/o o/e "
    "suffer(?:s|ed|ing) underw?ent undergoes reveal(?:s|ed) show(?:s|ed) noticed "
    "sustain(?:s|ed) has had having with",
    r"(?:likely|probable)\s+(?:diagnosis|cause)",
    r"history\s+of",
    r"on\s+examination",
    r"examination\s+(?:shows?|showed|reveal)",
)


def negated(question: Question) -> bool:
    """Whether the stem asks for the option that does not fit ("all except", "which is not").

    Only the last sentence counts, for it asks the question: a patient who "does not smoke" negates
    nothing. "except", unlike the other words, counts anywhere. Terms such as "false negative", "at
    least", and questions for the reason of a "not" are no negation. A word list is a proxy: it
    misses paraphrases and takes some factual "not" for a negation.

    Args:
        question: The question; only its stem is read.

    Returns:
        True for a negated stem.
    """
    stem = question.stem.strip()
    if _EXCEPT.search(stem):
        return True
    last = _SENTENCE.split(stem)[-1]
    if len(last.split()) < 2:  # "... is not. true", "... false about it. ?": a stray full stop
        last = stem
    last = _AT_LEAST.sub(" ", _FALSE_TERM.sub(" ", last))
    return bool(_NEGATION.search(last)) and not _REASON.search(last)


def multi_statement(question: Question) -> bool:
    """Whether several statements have to be judged rather than one fact recalled.

    True for assertion and reason, two or more numbered parts in the stem, "which statement", "true
    about", matching and ordering, and for two or more options that combine parts ("1 and 3").
    """
    stem = question.stem
    return bool(
        _ASSERTION.search(stem)
        or len(_NUMBERED.findall(stem)) >= 2
        or len(_RUN_TOGETHER.findall(stem)) >= 3
        or _STATEMENTS.search(stem)
        or sum(bool(_COMBINED_OPTION.match(option)) for option in question.options) >= 2
    )


def clinical_vignette(question: Question) -> bool:
    """Whether the stem describes a patient: a person or an age, a finding, twelve words or more."""
    stem = question.stem
    if len(stem.split()) < 12 or not _FINDING.search(stem):
        return False
    return bool(_AGE.search(stem)) or bool(_PERSON.search(stem[:80]))


def stem_difficulty(question: Question) -> str:
    """The `stem` proxy of difficulty: what kind of thinking the wording asks for.

    - `advanced`: a clinical vignette, to be read and interpreted (`clinical_vignette`);
    - `intermediate`: otherwise, a negated stem or several statements (`negated`,
      `multi_statement`);
    - `basic`: otherwise, a recalled fact in one line.

    It describes the wording and was not checked against examinees' results. Of MedMCQA's 4,183
    validation questions 2,750 are basic (66 %), 789 intermediate (19 %) and 644 advanced (15 %),
    and 770 stems are negated; of the half the tests count (2,078 questions) 1,372 are basic, 385
    intermediate and 321 advanced, and 378 stems are negated.

    Args:
        question: The question; stem and options are read, never the answer or the explanation.

    Returns:
        One of `LEVELS`.
    """
    if clinical_vignette(question):
        return "advanced"
    if negated(question) or multi_statement(question):
        return "intermediate"
    return "basic"


def text_length(question: Question) -> int:
    """Characters of the stem and the options."""
    return len(question.stem) + sum(len(option) for option in question.options)


def tertile_groups(
    values: Sequence[int] | Sequence[float] | np.ndarray, names: tuple[str, ...]
) -> tuple[list[str], list[float]]:
    """Cut values into three groups of about equal size; equal values share a group.

    Args:
        values: One number a question; only their order matters.
        names: Names of the lower, middle and upper group.

    Returns:
        The group of each value, in order, and the largest value of each group that exists, from low
        to high.

    Raises:
        ValueError: If there are not three names or a value is NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(names) != 3 or np.isnan(array).any():
        raise ValueError(f"Tertiles need three names and no NaN, not {list(names)}.")
    # The rank of the first of its equals puts ties together, whatever order they come in.
    rank = np.searchsorted(np.sort(array), array, side="left")
    group = rank * 3 // max(len(array), 1)
    bounds = [float(array[group == index].max()) for index in range(3) if (group == index).any()]
    return [names[index] for index in group], bounds


def length_groups(questions: Sequence[Question]) -> tuple[list[str], list[float]]:
    """Length tertile (`LENGTHS`) of each question by `text_length`; the groups' upper bounds."""
    return tertile_groups([text_length(question) for question in questions], LENGTHS)


def base_nll_difficulty(base_loss: Float[np.ndarray, " question"]) -> list[str]:
    """The `base_nll` proxy of difficulty: tertile of the frozen base model's loss on the question.

    Args:
        base_loss: Cross-entropy in nats of the base model on the right letter of each question.

    Returns:
        One of `LEVELS` for each question; `advanced` holds the highest losses.
    """
    return tertile_groups(base_loss, LEVELS)[0]
