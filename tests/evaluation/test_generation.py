"""Letters read from replies, and what is said about those that name none."""

from __future__ import annotations

import pytest
import torch

from medqlora.evaluation.generation import left_pad, parse_letter, summarise_replies, unpack
from medqlora.schema import PackedBatch
from tests.evaluation.conftest import make_predictions, make_questions

OPTIONS = ("Facial nerve", "Vagus nerve", "E. coli", "All of the above")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        (" B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("**B. Vagus nerve**", "B"),
        ("B) Vagus nerve", "B"),
        ("B: because of its course", "B"),
        ("B\n\nThe vagus nerve ...", "B"),
        ('"D"', "D"),
        ("A - Facial nerve", "A"),
        ("B Vagus nerve", "B"),
        ("vagus nerve.", "B"),
        ("E. coli", "C"),
        ("The correct answer is (B) Vagus nerve.", "B"),
        ("The answer is: D", "D"),
        ("Answer: A", "A"),
        ("The patient has a palsy, so option C is right.", "C"),
        ("It is not option A. The answer is B.", "B"),
        ("The answer is B. A and C are wrong.", "B"),
        ("The answer is B, as C and D are wrong.", "B"),
        (r"$\boxed{D}$", "D"),
        (" A\n\nQuestion: Which?\nChoices:\nAnswer: B", "A"),
    ],
)
def test_a_reply_that_names_one_option_is_read(reply, letter):
    assert parse_letter(reply, OPTIONS) == "ABCD".index(letter)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   ",
        "A patient with a palsy of the face",
        "A and C",
        "A, B and C",
        "A or B",
        "I cannot tell.",
        "The nerve",
        "The answer is not B",
        "Option A is wrong and option B is right.",
        "Answer B or C",
        "The answer is B and D.",
        "The correct option is (A) or (C)",
        "The answer is A, C",
        "Answer: B/D",
        "E",
        "E. faecalis",
        "C. difficile is the cause",
        "A's lesion",
        "Question: Which?\nAnswer: B",
        "the answer is a nerve",
        "Question: next\nQuestion: B",
    ],
)
def test_a_reply_that_names_none_or_several_counts_as_no_letter(reply):
    assert parse_letter(reply, OPTIONS) is None


def test_options_of_one_character_are_read_as_letters():
    """Blood groups: after "Answer:" the letter B means option B, whatever its text is."""
    assert parse_letter("B", ("B", "A", "O", "AB")) == 1


def test_unparsed_replies_are_wrong_and_count_for_no_letter():
    predictions = make_predictions(make_questions(8))
    letters = [p.answer for p in predictions[:4]] + [None] * 4
    section = summarise_replies(letters, predictions)
    assert section["n"] == 8
    assert section["accuracy"] == 0.5
    assert section["num_unparsed"] == 4
    assert section["unparsed_fraction"] == 0.5
    assert sum(section["letter_share"]) == pytest.approx(0.5)
    assert section["n_parsed"] == 4
    assert section["accuracy_parsed"] == 1.0
    assert sum(row[-1] for row in section["confusion"]) == 4
    assert section["ci_low"] < 0.5 < section["ci_high"]


def test_without_labels_replies_claim_no_accuracy():
    predictions = make_predictions(make_questions(6, labelled=False))
    section = summarise_replies([0, 1, None, 0, 0, 0], predictions)
    assert section["accuracy"] is None
    assert section["confusion"] is None
    assert section["num_unparsed"] == 1
    assert section["letter_share"][0] == pytest.approx(4 / 6)


def test_where_nothing_was_read_there_is_no_agreement():
    section = summarise_replies([None] * 5, make_predictions(make_questions(5)))
    assert section["accuracy"] == 0.0
    assert section["agreement"] is None
    assert section["accuracy_parsed"] is None


def test_left_padding_ends_every_prompt_in_its_last_token():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_unpacking_gives_back_the_prompts_without_what_follows_them():
    batch = PackedBatch(
        input_ids=torch.tensor([2, 7, 8, 2, 9, 0, 0]),
        position_ids=torch.tensor([0, 1, 2, 0, 1, 0, 0]),
        cu_seqlens=torch.tensor([0, 3, 5, 5], dtype=torch.int32),
        last=torch.tensor([1, 4, 0]),
        answer=torch.tensor([1, -100, -100]),
        index=torch.tensor([4, 0, -1]),
        labels=None,
        num_questions=2,
        num_tokens=5,
        max_length=4,
    )
    assert list(unpack(batch)) == [(4, [2, 7]), (0, [2, 9])]
