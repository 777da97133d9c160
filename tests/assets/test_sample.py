"""Laws of the bundled questions, proved on the shipped files."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import yaml

from medqlora.assets import build_sample as sample

COLUMNS = {
    "id", "question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp", "subject_name",
    "topic_name",
}  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    return sample.read_facts()


@pytest.fixture(scope="module")
def rows():
    return {split: sample.read_rows(split) for split in sample.SPLITS}


@pytest.fixture(scope="module")
def every_row(rows):
    return [row for split in sample.SPLITS for row in rows[split]]


def made_up_fact(**changes):
    entry = {
        "id": "botany-001",
        "subject_name": "Botany",
        "fact": "Moss has no roots.",
        "stems": tuple(f"Wording {i} of what moss has not" for i in range(5)),
        "answer": "Roots",
        "distractors": tuple(f"Part {i}" for i in range(7)),
        "explanation": "It has rhizoids.",
    }
    return sample.Fact(**(entry | changes))


def test_the_files_are_what_the_facts_give(facts, rows, tmp_path):
    """Anyone can make the bundled files again from the facts beside them."""
    rebuilt = sample.build_rows(facts)
    assert rebuilt == rows
    sample.write_rows(rebuilt, tmp_path)
    for split in sample.SPLITS:
        name = f"{split}.jsonl.gz"
        assert (tmp_path / name).read_bytes() == (sample.SAMPLE_DIR / name).read_bytes()


def test_a_file_knows_neither_its_name_nor_the_time(tmp_path):
    """Both stand in a gzip header unless they are left out (RFC 1952, section 2.3)."""
    rows = sample.build_rows([made_up_fact()])
    sample.write_rows(rows, tmp_path)
    header = (tmp_path / "train.jsonl.gz").read_bytes()[:10]
    assert header[3] == 0
    assert header[4:8] == bytes(4)


def test_there_are_enough_questions_facts_and_subjects(facts, rows, every_row):
    assert len(facts) >= 400
    assert len({row["subject_name"] for row in every_row}) >= 14
    assert len(every_row) >= 1500
    assert len(rows["test"]) >= 400
    assert len(rows["val"]) >= 200


def test_every_row_has_the_columns_of_medmcqa(every_row):
    for row in every_row:
        assert set(row) == COLUMNS
        assert row["cop"] in range(4)
        assert row["choice_type"] in {"single", "multi"}
        assert row["topic_name"] is None
        texts = [row[name] for name in COLUMNS - {"cop", "topic_name"}]
        assert all(isinstance(text, str) and text.strip() for text in texts)
        assert len({row[name].lower() for name in ("opa", "opb", "opc", "opd")}) == 4
    assert len({row["id"] for row in every_row}) == len(every_row)


def test_cop_points_at_the_answer_of_the_fact(facts, every_row):
    answers = {fact.id: fact.answer for fact in facts}
    for row in every_row:
        fact_id = row["id"].rpartition("-")[0]
        assert row[("opa", "opb", "opc", "opd")[row["cop"]]] == answers[fact_id]


def test_no_letter_gives_the_answer_away(rows):
    """Each letter is right about as often as the others: guessing one letter knows nothing."""
    for split in sample.SPLITS:
        counts = Counter(row["cop"] for row in rows[split])
        assert max(counts.values()) / len(rows[split]) < 0.33


def test_splits_share_no_wording_and_no_set_of_options(rows):
    sample.check_split_law(rows)


def test_the_split_law_holds_counted_by_hand(rows):
    """The check itself is checked: plain sets of (wording, option set) and of wordings."""
    for one, other in combinations(sample.SPLITS, 2):
        pairs = [
            {(r["question"], frozenset((r["opa"], r["opb"], r["opc"], r["opd"]))) for r in rows[s]}
            for s in (one, other)
        ]
        assert not pairs[0] & pairs[1]
        assert not {stem for stem, _ in pairs[0]} & {stem for stem, _ in pairs[1]}


def test_the_check_finds_a_question_that_stands_in_two_splits():
    rows = sample.build_rows([made_up_fact()])
    rows["test"].append({**rows["train"][0], "question": " WORDING  0 of what else"})
    with pytest.raises(ValueError, match="share 1 set of options"):
        sample.check_split_law(rows)
    rows["test"][-1] = {**rows["test"][0], "question": rows["train"][0]["question"].upper()}
    with pytest.raises(ValueError, match="share 1 wording"):
        sample.check_split_law(rows)


def test_what_becomes_of_a_fact_depends_on_no_other_fact():
    """A corrected fact changes its own questions only."""
    moss = made_up_fact()
    fern = made_up_fact(id="botany-002", answer="Petals")
    alone = {row["id"]: row for rows in sample.build_rows([moss]).values() for row in rows}
    beside = {row["id"]: row for rows in sample.build_rows([moss, fern]).values() for row in rows}
    assert alone.items() <= beside.items()


def test_a_question_that_asks_for_the_odd_one_out_is_multi():
    plain, odd = made_up_fact(), made_up_fact(stems=tuple(f"{i}: all EXCEPT" for i in range(5)))
    assert {row["choice_type"] for row in sample.build_rows([plain])["train"]} == {"single"}
    assert {row["choice_type"] for row in sample.build_rows([odd])["train"]} == {"multi"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"stems": ["One wording"]}, "has 1 stems"),
        ({"distractors": [f"Part {i}" for i in range(6)]}, "has 6 distractors"),
        ({"distractors": [*(f"Part {i}" for i in range(6)), "roots "]}, "repeats an option"),
        ({"answer": 7}, "holds 7"),
        ({"explanation": None}, "holds None"),
    ],
)
def test_a_malformed_fact_is_refused(tmp_path, changes, complaint):
    fact = made_up_fact()
    entry = {name: getattr(fact, name) for name in ("id", "fact", "answer", "explanation")}
    entry |= {"stems": list(fact.stems), "distractors": list(fact.distractors)} | changes
    (tmp_path / "botany.yaml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match=complaint):
        sample.read_facts(tmp_path)


def test_no_wording_is_asked_for_two_facts(facts):
    """Else a wording of test could stand in train under another fact's name."""
    counts = Counter(" ".join(stem.lower().split()) for fact in facts for stem in fact.stems)
    assert [stem for stem, count in counts.items() if count > 1] == []
