"""Which question belongs to which split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.data.medmcqa import cut_groups, normalise, sample_rows
from medqlora.errors import ConfigError, DataError
from tests.data.data_tools import question, raw_row, write_jsonl


@given(
    # Twelve groups of one row can always fill what larger groups leave open.
    groups=st.lists(st.integers(0, 40), min_size=30, max_size=200).map(
        lambda some: [*some, *range(100, 112)]
    ),
    seed=st.integers(0, 2**31),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_cut_keeps_groups_whole_whatever_the_row_order(groups, seed, shuffle):
    values = np.array(groups, dtype=np.uint64)
    parts = cut_groups(values, seed, (7, 5))
    assert [len(part) for part in parts] == [7, 5, len(groups) - 12]
    sides = [set(values[part].tolist()) for part in parts]
    assert sum(map(len, sides)) == len(set(groups))
    order = list(range(len(groups)))
    shuffle.shuffle(order)
    again = cut_groups(values[order], seed, (7, 5))
    assert [set(values[order][part].tolist()) for part in again] == sides


def test_cut_depends_on_the_seed():
    values = np.arange(1000, dtype=np.uint64)
    first, second = cut_groups(values, 0, (100,)), cut_groups(values, 1, (100,))
    assert len(np.intersect1d(first[0], second[0])) < 30


def test_cut_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="ask for 11 questions of 10"):
        cut_groups(np.arange(10, dtype=np.uint64), 0, (6, 5))


def test_normalised_copies_are_one_group():
    assert normalise("Which, nerve?  ") == normalise("which NERVE")
    assert normalise("Straße_1") == normalise("STRASSE 1")
    assert normalise("Me\u0301nie\u0300re") == normalise("M\u00e9ni\u00e8re")
    assert normalise("\uff2b\uff0b of the \ufb01bre") == normalise("K+ of the fibre")


def test_limited_set_is_the_same_whatever_the_row_order():
    questions = [question(i) for i in range(50)]
    chosen = {questions[i].id for i in sample_rows(questions, 7)}
    again = {questions[::-1][i].id for i in sample_rows(questions[::-1], 7)}
    assert len(chosen) == 7
    assert chosen == again
    assert len(sample_rows(questions, None)) == len(sample_rows(questions, 99)) == 50


# --- the data module ------------------------------------------------------------------------------


def stems(data, split):
    return {normalise(question.stem) for question in data.questions[split]}


def test_val_is_cut_from_train_and_copies_never_cross(tmp_path, make_data):
    rows = [raw_row(i) for i in range(60)]
    rows += [raw_row(100 + i, question=rows[i]["question"].upper() + " ") for i in range(30)]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    data = make_data(train_file=file, num_val=20)
    data.setup()
    assert len(data.questions["val"]) == 20
    assert len(data.questions["train"]) == 70
    assert "test" not in data.questions
    assert stems(data, "train").isdisjoint(stems(data, "val"))
    backwards = make_data(train_file=write_jsonl(tmp_path / "r.jsonl", rows[::-1]), num_val=20)
    backwards.setup()
    assert {q.id for q in backwards.questions["val"]} == {q.id for q in data.questions["val"]}
    assert backwards.sha256 == data.sha256
    other = make_data(train_file=file, num_val=20, seed=1)
    other.setup()
    assert {q.id for q in other.questions["val"]} != {q.id for q in data.questions["val"]}
    assert other.sha256 != data.sha256


def test_pool_is_cut_into_all_three_splits_without_unlabelled_rows(tmp_path, make_data):
    test = [raw_row(200 + i, cop=-1 if i < 10 else i % 4) for i in range(30)]
    data = make_data(
        100,
        splits="pool",
        num_val=15,
        num_test=25,
        test_file=write_jsonl(tmp_path / "t.jsonl", test),
    )
    data.setup()
    assert {split: len(q) for split, q in data.questions.items()} == {
        "train": 80,
        "val": 15,
        "test": 25,
    }
    assert all(q.answer is not None for split in data.questions.values() for q in split)
    assert data.dropped == {"unlabelled": 10}


def test_unlabelled_train_rows_are_refused_and_unlabelled_test_rows_are_not(tmp_path, make_data):
    rows = [raw_row(200 + i, cop=None) for i in range(5)]
    file = write_jsonl(tmp_path / "u.jsonl", rows)
    with pytest.raises(DataError, match=r"u\.jsonl, row 1 has no label"):
        make_data(train_file=file).setup()
    data = make_data(test_file=file)
    data.setup()
    assert [q.answer for q in data.questions["test"]] == [None] * 5
    for row in data.test_dataloader():
        assert row.answer.tolist() == [-100] * data.max_questions


def test_id_in_two_files_names_both(tmp_path, make_data):
    file = write_jsonl(tmp_path / "t.jsonl", [raw_row(3)])
    with pytest.raises(DataError, match=r"t\.jsonl, row 1 repeats the id 'q3' of .*train\.jsonl"):
        make_data(test_file=file).setup()


def test_limits_leave_out_rows_or_the_split(make_data):
    data = make_data(num_val=20, limit_train=30, limit_val=0)
    data.setup()
    assert {split: len(q) for split, q in data.questions.items()} == {"train": 30}
    assert data.val_dataloader() == []


def test_drop_leaves_out_what_the_audit_finds(tmp_path, make_data):
    rows = [raw_row(i) for i in range(10)]
    rows[3]["opb"] = rows[3]["opa"]
    rows.append(raw_row(20, **{k: rows[5][k] for k in ("question", "opa", "opb", "opc", "opd")}))
    file = write_jsonl(tmp_path / "q.jsonl", [*rows, raw_row(21, cop=3)])
    data = make_data(train_file=file, drop=["repeated_options", "conflicting"])
    data.setup()
    assert data.dropped == {"repeated_options": 1, "conflicting": 2}
    assert data.num_dropped == 3
    assert {"q3", "q5", "q20"}.isdisjoint(q.id for q in data.questions["train"])


def test_a_copy_of_what_is_left_out_stays(tmp_path, make_data):
    """The first of two copies has no label: it goes for that, and the other is the only one."""
    row = raw_row(200)
    file = write_jsonl(tmp_path / "t.jsonl", [row | {"id": "bare", "cop": None}, row])
    data = make_data(test_file=file, drop=["unlabelled", "identical"])
    data.setup()
    assert [q.id for q in data.questions["test"]] == ["q200"]
    assert data.dropped == {"unlabelled": 1, "identical": 0}


def test_copy_leaves_train_rather_than_test(tmp_path, make_data):
    copy = raw_row(200) | {
        k: raw_row(7)[k] for k in ("question", "opa", "opb", "opc", "opd", "cop")
    }
    data = make_data(test_file=write_jsonl(tmp_path / "t.jsonl", [copy]), drop=["identical"])
    data.setup()
    assert len(data.questions["test"]) == 1
    assert "q7" not in {q.id for q in data.questions["train"]}


def test_training_questions_that_are_scored_as_well_are_said(tmp_path, make_data, caplog):
    """Without ids nothing else tells a file that is given twice."""
    rows = [{k: v for k, v in raw_row(i).items() if k != "id"} for i in range(30)]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    # The same stem with other options is another question.
    other = write_jsonl(tmp_path / "o.jsonl", [rows[0] | {"opa": "other"}])
    for test_file, options, repeated in (
        (file, {}, 30),
        (file, {"limit_test": 7}, 7),
        (file, {"limit_train": 0}, 0),
        (other, {}, 0),
    ):
        caplog.clear()
        make_data(train_file=file, test_file=test_file, **options).setup()
        said = f"{repeated} of 30 training questions stand in val or test as well"
        assert (said in caplog.text) == bool(repeated)
        assert ("data.decontaminate=true" in caplog.text) == bool(repeated)


def test_decontamination_removes_near_duplicates_from_train_alone(tmp_path, make_data):
    stem = (
        "A man of 55 years has sudden chest pain that spreads to his left arm; which artery is it"
    )
    options = {"opa": "Left", "opb": "Right", "opc": "Circumflex", "opd": "Marginal"}
    train = [*(raw_row(i) for i in range(40)), raw_row(90, question=stem + "?", **options)]
    test = [raw_row(91, question=stem + " most likely?", **options), raw_row(92, question="Why?")]
    files = {
        "train_file": write_jsonl(tmp_path / "a.jsonl", train),
        "test_file": write_jsonl(tmp_path / "b.jsonl", test),
    }
    data = make_data(**files, decontaminate=True)
    data.setup()
    assert data.dropped == {"near_duplicate": 1}
    assert "q90" not in {q.id for q in data.questions["train"]}
    assert len(data.questions["train"]) == 40
    assert len(data.questions["test"]) == 2


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"token_budget": "auto"}, "auto is turned into a number"),
        ({"token_budget": 0}, "no number of tokens"),
        ({"max_length": 512}, "above data.token_budget=256"),
        ({"eval_token_budget": 128}, "below the 256 tokens"),
        (
            {"eval_token_budget": "most"},
            "is no number of tokens: give a whole number such as 2048, or auto",
        ),
        ({"train_file": None}, "no data are given"),
        ({"hub": "some/set"}, "only one can be read"),
        ({"num_test": 5}, "no effect with data.splits=official"),
        ({"num_val": 5, "val_file": "x.jsonl"}, "no effect beside data.val_file"),
        ({"num_val": 5, "train_file": None, "test_file": "x.jsonl"}, "cuts val from train"),
        ({"num_val": -1}, "negative"),
        ({"limit_train": -1}, "no number of questions"),
        ({"drop": ["typos"]}, "choose from"),
        ({"splits": "mine"}, "choose official or pool"),
        ({"targets": "all"}, "choose answer or explanation"),
        ({"num_val": 121}, "of 120"),
        ({"limit_test": 5}, "have no test questions"),
        ({"limit_train": 0}, "every split is left out"),
        ({"token_budget": 20}, "set it to at least"),
        ({"decontaminate": True}, "no effect without"),
        ({"label_base": 2}, "neither 0 nor 1"),
    ],
)
def test_option_that_cannot_work_is_refused_in_one_line(make_data, options, word):
    with pytest.raises(ConfigError) as caught:
        make_data(**options).setup()
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_that_cannot_fill_a_part_are_refused():
    with pytest.raises(ConfigError, match="without parting copies"):
        cut_groups(np.array([1, 1, 1, 2, 2, 2], dtype=np.uint64), 0, (4,))
