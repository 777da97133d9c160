"""What an audit finds."""

from __future__ import annotations

import json

import pytest

from medqlora.data.audit import FINDERS, audit_questions, audit_rows, find, near_duplicates
from medqlora.data.medmcqa import read_questions
from medqlora.data.readers import read_rows
from medqlora.errors import DataError
from tests.data.data_tools import question, raw_row, write_jsonl


def rows_of(report, finding, split="train"):
    table = report.findings
    return table[(table.finding == finding) & (table.split == split)].row.tolist()


def audit_of(tmp_path, rows, **options):
    return audit_rows({"train": read_rows(write_jsonl(tmp_path / "q.jsonl", rows))}, **options)


PLANTED = [
    ("repeated_options", {"opb": "Facial 1 "}),
    ("ambiguous_gold", {"opb": "FACIAL 1", "cop": 0}),
    ("image_reference", {"question": "The structure shown in the figure below is"}),
    ("deleted_rt", {"question": "A drug for hypeension of the hea"}),
    ("negated", {"question": "All are true except"}),
    ("all_or_none_of_the_above", {"opd": "All of the above"}),
    ("missing_field", {"opc": None}),
    ("missing_field", {"question": "  "}),
    ("unlabelled", {"cop": -1}),
    ("invalid_label", {"cop": 9}),
    ("missing_id", {"id": None}),
    ("duplicate_id", {"id": "q0"}),
    ("invalid_field", {"opa": [1]}),
]


@pytest.mark.parametrize(("finding", "changes"), PLANTED)
def test_planted_fault_is_found_in_its_row_alone(tmp_path, finding, changes):
    rows = [raw_row(0), raw_row(1, **changes), raw_row(3), raw_row(4)]
    report = audit_of(tmp_path, rows)
    assert rows_of(report, finding) == [2]
    assert report.summary["findings"][finding] == 1


def test_clean_rows_have_no_findings(tmp_path):
    report = audit_of(tmp_path, [raw_row(i) for i in range(8)])
    assert report.findings.empty
    assert report.summary["label_base"] == 0
    assert report.summary["num_rows"] == report.summary["num_labelled"] == 8


def test_copies_name_all_but_the_first_and_conflicts_name_all(tmp_path):
    copy = {k: raw_row(0)[k] for k in ("question", "opa", "opb", "opc", "opd")}
    swapped = copy | {"opa": copy["opb"], "opb": copy["opa"]}
    rows = [raw_row(0), raw_row(1, **swapped, cop=1), raw_row(2, **copy, cop=3), raw_row(3)]
    report = audit_of(tmp_path, rows)
    assert rows_of(report, "identical") == rows_of(report, "duplicate_question") == [2, 3]
    assert rows_of(report, "conflicting") == [1, 2, 3]
    assert report.summary["groups"] == {
        "duplicate_question": 1,
        "identical": 1,
        "conflicting": 1,
    }


def test_options_that_differ_in_a_sign_say_so():
    asked = question(options=("> 50", "< 50", "60", "70"))
    [finding] = find({"train": [asked]}, ["repeated_options"])
    assert "but for punctuation or signs" in finding.detail
    exact = question(options=("50", "50 ", "60", "70"))
    [finding] = find({"train": [exact]}, ["repeated_options"])
    assert "punctuation" not in finding.detail


def test_contradictory_labels_are_a_finding_rather_than_the_end(tmp_path):
    report = audit_of(tmp_path, [raw_row(0), raw_row(1), raw_row(2, ope="x")])
    assert report.summary["findings"]["mixed_options"] == 1
    both = audit_of(tmp_path, [raw_row(0, cop=0), raw_row(1, cop=4)])
    assert both.summary["findings"]["mixed_label_base"] == 1
    assert both.summary["label_base"] is None
    assert both.summary["majority_share"] is None


@pytest.mark.parametrize(
    ("labels", "finding"),
    [([1, 2, None], "unknown_label_base"), ([0, 4, None], "mixed_label_base")],
)
def test_labels_of_an_unknown_base_are_labels(tmp_path, labels, finding):
    """What train refuses in one line is found here, and only a row without a label has none."""
    rows = [raw_row(i, cop=label) for i, label in enumerate([*labels, 9])]
    report = audit_of(tmp_path, rows)
    assert report.summary["findings"] | {"deleted_rt": 0} == dict.fromkeys(
        report.summary["findings"], 0
    ) | {finding: 1, "unlabelled": 1, "invalid_label": 1}
    assert rows_of(report, "unlabelled") == [3]
    assert report.summary["num_labelled"] == report.summary["splits"]["train"]["num_labelled"] == 2
    assert report.summary["majority_letter"] is None
    with pytest.raises(DataError) as refused:
        read_questions(write_jsonl(tmp_path / "q.jsonl", rows[:3]))
    [detail] = report.findings[report.findings.finding == finding].detail
    assert detail == str(refused.value)
    if finding == "unknown_label_base":
        stated = audit_of(tmp_path, rows, label_base=1)
        assert finding not in stated.summary["findings"]
        assert stated.summary["letter_counts"] == {"A": 1, "B": 1, "C": 0, "D": 0}


def test_letters_of_the_answers_give_the_constant_baselines(tmp_path):
    report = audit_of(tmp_path, [raw_row(i, cop=c) for i, c in enumerate([0, 0, 0, 1, 3])])
    assert report.summary["letter_counts"] == {"A": 3, "B": 1, "C": 0, "D": 1}
    assert report.summary["constant_accuracy"] == {"A": 0.6, "B": 0.2, "C": 0.0, "D": 0.2}
    assert (report.summary["majority_letter"], report.summary["majority_share"]) == ("A", 0.6)


def test_near_duplicates_across_splits_are_counted_with_their_similarity():
    stem = "Which artery of the heart supplies the sinoatrial node in most people"
    train = [question(i, stem=f"{i} other question {i * 7}") for i in range(5)]
    train.append(question(8, stem=stem + "?"))
    held_out = {"test": [question(50, stem=stem + " here")], "val": [question(51, stem="Why?")]}
    [finding] = near_duplicates(train, held_out)
    assert (finding.id, finding.row, finding.split) == ("q8", 6, "train")
    assert finding.detail.endswith("like test question q50")
    report = audit_questions({"train": train, **held_out})
    assert report.summary["findings"]["near_duplicate"] == 1
    assert near_duplicates(train[:5], held_out) == []


@pytest.mark.parametrize("splits", ["official", "pool"])
def test_near_duplicates_are_those_between_the_splits_that_a_run_cuts(tmp_path, make_data, splits):
    """Found by the row in the file, though the file is only cut into train and val by the run."""
    rows = [raw_row(i) for i in range(20)]
    stem = "A man of 55 has sudden chest pain that spreads to his left arm; which artery is it"
    same = {"opa": "Left", "opb": "Right", "opc": "Circumflex", "opd": "Marginal"}
    rows += [raw_row(20 + i, question=stem + " now" * i + "?", **same) for i in range(8)]
    data = make_data(
        train_file=write_jsonl(tmp_path / "q.jsonl", rows), num_val=10, splits=splits, seed=3
    )
    data.setup()
    train = {question.id for question in data.questions["train"]}
    copies = [f"q{20 + i}" for i in range(8)]
    assert 0 < len(train.intersection(copies)) < 8, "choose another seed"
    report = data.audit()
    found = report.findings[report.findings.finding == "near_duplicate"]
    assert set(found.id) == train.intersection(copies)
    assert [rows[row - 1]["id"] for row in found.row] == found.id.tolist()
    assert set(found.split) == {"train"}
    assert data.audit(near=False).summary["findings"].get("near_duplicate") is None


@pytest.mark.parametrize(
    "stem",
    [
        "Name the structure marked with arrow",
        "A CXR was done and shown below. What is the most likely diagnosis?",
        "What is the best management of the case shown?",
        "An erect abdominal X-ray was taken as shown. What is the likely diagnosis?",
        "Process shown in color plate is:",
        "The following X-ray was obtained. What is it?",
        "Complete the missing step in the flow cha shown below:",
        "Which muscle is not supplied by the nerve marked in the diagram?",
    ],
)
def test_question_that_needs_a_picture_is_found(stem):
    [finding] = find({"train": [question(stem=stem)]}, ["image_reference"])
    assert finding.row == 1


@pytest.mark.parametrize(
    "stem",
    [
        "Chest X-ray shows bilateral infiltrates. What is the diagnosis?",
        "Which of the following radiographs should be taken?",
        "Cytopathic effect is shown by:",
        "Specificity of the test based on the data given below: TP 27, FN 3",
        "Which drug has shown the best results?",
        "Which eating disorder is marked by distorted body image and low weight?",
        "A photograph with flash shows a white pupil in a toddler. Which tumor is suspected?",
        "The incision is given 2 cm below the mandible to preserve which nerve?",
    ],
)
def test_finding_that_is_described_in_words_needs_no_picture(stem):
    assert find({"train": [question(stem=stem)]}, ["image_reference"]) == []


def test_audit_of_a_data_module_has_lengths_in_tokens_and_is_json(make_data):
    report = make_data(40).audit()
    lengths = report.summary["length_tokens"]
    assert lengths["train"] == lengths["all"]
    assert lengths["all"]["min"] <= lengths["all"]["p50"] <= lengths["all"]["max"]
    assert json.loads(json.dumps(report.summary)) == report.summary
    assert list(report.findings.columns) == ["id", "row", "split", "finding", "detail"]


def test_half_of_the_official_validation_set_has_the_known_counts(half_validation):
    """Counts of the file at hand; `A` and nulls as in its README."""
    report = audit_rows({"test": read_rows(half_validation)})
    summary = report.summary
    assert summary["num_rows"] == summary["num_labelled"] == 2078
    assert summary["label_base"] == 1
    assert summary["letter_counts"] == {"A": 684, "B": 540, "C": 442, "D": 412}
    assert round(summary["majority_share"], 4) == 0.3292
    assert summary["null_explanations"] == 1000
    assert summary["choice_types"] == {"single": 1411, "multi": 667}
    assert summary["groups"] == {"duplicate_question": 2, "identical": 2, "conflicting": 1}
    found = summary["findings"]
    assert found["repeated_options"] == 18
    assert found["ambiguous_gold"] == 7
    assert found["image_reference"] == 18
    assert found["conflicting"] == 2
    assert found["missing_field"] == found["unlabelled"] == 0
    broken = report.findings[report.findings.finding == "deleted_rt"].detail
    assert broken.str.contains("aery for artery").sum() >= 8
    assert set(FINDERS) <= set(found)
