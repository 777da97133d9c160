"""Facts in YAML -> the bundled questions in MedMCQA's columns, byte for byte the same every time.

    python -m medqlora.assets.build_sample

A fact has five wordings of one question, one right answer and seven wrong ones. One wording of
every fact is kept for test and one of every second fact for val; train gets the others. The three
wrong options of a question are one of the 35 ways to choose three of seven, and a way that is used
in one split is used in no other. A model therefore meets every fact in train and no question of
val or test: neither its wording nor its set of options.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

FACTS_DIR = Path(__file__).resolve().parent / "facts"
"""One YAML file a subject."""

SAMPLE_DIR = Path(__file__).resolve().parent / "sample"
"""Where the built splits lie, one `<split>.jsonl.gz` each."""

SEED = 20240611
"""Decides which wording goes to which split, the wrong options and their order."""

SPLITS = ("train", "val", "test")
NUM_STEMS = 5
NUM_DISTRACTORS = 7
OPTION_SETS = 3
"""Times each wording stands in train, every time with another set of options."""

_COLUMNS = ("opa", "opb", "opc", "opd")
_SUBJECTS = {
    "ent": "ENT",
    "gynaecology_obstetrics": "Gynaecology & Obstetrics",
    "social_preventive_medicine": "Social & Preventive Medicine",
}
_SMALL_WORDS = {"and", "of"}

Row = dict[str, Any]
"""One question in the columns of the hub's copy of MedMCQA, `cop` counting from 0."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One medical fact and everything a question about it can be made of.

    Attributes:
        id: Identifier, unique among all facts.
        subject_name: Medical subject, from the name of the file.
        fact: The fact as one statement.
        stems: Five wordings of one question.
        answer: The right option for all of them.
        distractors: Seven options, each wrong for all of them.
        explanation: Why the answer is right.
    """

    id: str
    subject_name: str
    fact: str
    stems: tuple[str, ...]
    answer: str
    distractors: tuple[str, ...]
    explanation: str

    @property
    def is_negated(self) -> bool:
        """Whether the question asks for the odd one out of a list."""
        return any(" NOT " in f" {stem} " or "EXCEPT" in stem for stem in self.stems)


def read_facts(directory: Path = FACTS_DIR) -> list[Fact]:
    """Read every YAML file of a folder, in the order of its name.

    Raises:
        ValueError: If a fact lacks a part, has one too many, or says something twice.
    """
    facts: list[Fact] = []
    for path in sorted(directory.glob("*.yaml")):
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        facts += [_read_fact(entry, path) for entry in entries]
    _refuse_repeats((fact.id, fact.id) for fact in facts)
    _refuse_repeats((_key(stem), fact.id) for fact in facts for stem in fact.stems)
    return facts


def build_rows(facts: Sequence[Fact], seed: int = SEED) -> dict[str, list[Row]]:
    """Make the questions of every split.

    What becomes of a fact depends on the seed and its id alone, so that a corrected fact changes
    its own questions and no others.

    Args:
        facts: The facts; their order decides only which of them have a question in val.
        seed: Decides everything that is drawn.

    Returns:
        Rows of "train", "val" and "test", each in random order.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for index, fact in enumerate(facts):
        rng = random.Random(f"{seed} {fact.id}")
        stems = rng.sample(range(NUM_STEMS), NUM_STEMS)
        triples = list(combinations(fact.distractors, 3))
        rng.shuffle(triples)
        held_out = ["test", "val"] if index % 2 == 0 else ["test"]
        for split in held_out:
            rows[split].append(_row(fact, stems.pop(), 0, triples.pop(), rng))
        for stem in sorted(stems):
            for repeat in range(OPTION_SETS):
                rows["train"].append(_row(fact, stem, repeat, triples.pop(), rng))
    for split in SPLITS:
        random.Random(f"{seed} {split}").shuffle(rows[split])
    return rows


def check_split_law(rows: Mapping[str, Sequence[Row]]) -> None:
    """Prove that nothing of val or test stands in another split.

    Two questions are compared regardless of letter case, spaces, and the order of the options.

    Raises:
        ValueError: If two splits share a wording, or a fact's set of options, or if val or test
        asks
            about a fact that train does not know.
    """
    stems = {split: {_key(row["question"]) for row in rows[split]} for split in SPLITS}
    options = {split: {_option_set(row) for row in rows[split]} for split in SPLITS}
    answers = {split: {_fact_id(row) for row in rows[split]} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        for what, sets in (("wording", stems), ("set of options", options)):
            if shared := sets[one] & sets[other]:
                raise ValueError(
                    f"{one} and {other} share {len(shared)} {what}(s), such as "
                    f"{min(map(str, shared))}: run `python -m medqlora.assets.build_sample` again."
                )
    for split in ("val", "test"):
        if unknown := answers[split] - answers["train"]:
            raise ValueError(
                f"{split} asks about {min(unknown)}, which train has no question on: run "
                "`python -m medqlora.assets.build_sample` again."
            )


def write_rows(rows: Mapping[str, Sequence[Row]], directory: Path = SAMPLE_DIR) -> None:
    """Write one `<split>.jsonl.gz` a split, without the time of day or a file name inside."""
    directory.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        buffer = io.BytesIO()
        with gzip.GzipFile(
            filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0
        ) as file:
            file.write(lines.encode())
        (directory / f"{split}.jsonl.gz").write_bytes(buffer.getvalue())


def read_rows(split: str, directory: Path = SAMPLE_DIR) -> list[Row]:
    """Rows of one built split, in their order."""
    text = gzip.decompress((directory / f"{split}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def _read_fact(entry: Mapping[str, Any], path: Path) -> Fact:
    where = f"{path.name}, {entry.get('id', 'an entry without id')}"
    try:
        texts = {name: entry[name] for name in ("id", "fact", "answer", "explanation")}
        lists = {name: tuple(entry[name]) for name in ("stems", "distractors")}
    except KeyError as error:
        raise ValueError(f"{where} has no {error}: see medqlora/assets/README.md.") from error
    for text in (*texts.values(), *lists["stems"], *lists["distractors"]):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where} holds {text!r}, which is no text: put it in quotes.")
    for name, count in (("stems", NUM_STEMS), ("distractors", NUM_DISTRACTORS)):
        if len(lists[name]) != count:
            raise ValueError(f"{where} has {len(lists[name])} {name}: it must have {count}.")
    options = [_key(text) for text in (texts["answer"], *lists["distractors"])]
    if len(set(options)) < len(options):
        raise ValueError(f"{where} repeats an option: give eight that differ.")
    words = path.stem.split("_")
    name = " ".join(word if word in _SMALL_WORDS else word.capitalize() for word in words)
    return Fact(
        id=texts["id"],
        subject_name=_SUBJECTS.get(path.stem, name),
        fact=texts["fact"],
        stems=lists["stems"],
        answer=texts["answer"],
        distractors=lists["distractors"],
        explanation=texts["explanation"],
    )


def _refuse_repeats(pairs: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for key, where in pairs:
        if key in seen:
            raise ValueError(f"{where} repeats {key!r} of {seen[key]}: change one of the two.")
        seen[key] = where


def _row(fact: Fact, stem: int, repeat: int, wrong: Sequence[str], rng: random.Random) -> Row:
    options = [fact.answer, *wrong]
    rng.shuffle(options)
    return {
        "id": f"{fact.id}-{stem + 1}{'abcde'[repeat]}",
        "question": fact.stems[stem],
        **dict(zip(_COLUMNS, options, strict=True)),
        "cop": options.index(fact.answer),
        "choice_type": "multi" if fact.is_negated else "single",
        "exp": fact.explanation,
        "subject_name": fact.subject_name,
        "topic_name": None,
    }


def _key(text: str) -> str:
    return " ".join(text.lower().split())


def _fact_id(row: Row) -> str:
    return row["id"].rpartition("-")[0]


def _option_set(row: Row) -> tuple[str, frozenset[str]]:
    return _fact_id(row), frozenset(_key(row[column]) for column in _COLUMNS)


def main() -> None:
    """Build the splits from the bundled facts and write them."""
    facts = read_facts()
    rows = build_rows(facts)
    check_split_law(rows)
    write_rows(rows)
    counts = ", ".join(f"{split} {len(rows[split])}" for split in SPLITS)
    print(f"{len(facts)} facts of {len({fact.subject_name for fact in facts})} subjects: {counts}")


if __name__ == "__main__":
    main()
