"""Questions -> rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.data.packing import (
    PackedLoader,
    RowPlan,
    build_row,
    full_budgets,
    max_questions_of,
    pack,
    spread,
)
from medqlora.data.tokenization import TokenizedQuestions
from medqlora.errors import CheckpointError
from medqlora.schema import IGNORE

LENGTHS = st.lists(st.integers(1, 60), max_size=120).map(lambda x: np.array(x, dtype=np.int64))
MODEST = settings(max_examples=60, deadline=None)


def medmcqa_like(number: int) -> np.ndarray:
    """Lengths with MedMCQA's mean of 57, 95th percentile of 95 and longest of 215 tokens."""
    draws = np.random.default_rng(0).lognormal(np.log(53), 0.36, size=number)
    return np.clip(draws, 28, 215).astype(np.int64)


def tokenized(lengths, prompt_lengths=None) -> TokenizedQuestions:
    """Questions whose tokens are 1000 * (question + 1) + position."""
    lengths = np.asarray(lengths)
    tokens = [1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]
    zeros = np.zeros(len(lengths), dtype=bool)
    return TokenizedQuestions(
        tokens=np.concatenate(tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.asarray(prompt_lengths or lengths, dtype=np.int32),
        answer=np.array([i % 4 for i in range(len(lengths))], dtype=np.int8),
        stem_cut=zeros,
        explanation_cut=zeros,
    )


@given(lengths=LENGTHS, places=st.integers(1, 9), seed=st.integers(0, 9), epoch=st.integers(0, 3))
@MODEST
def test_every_question_is_in_exactly_one_row_that_it_fits(lengths, places, seed, epoch):
    plan = RowPlan(lengths, 64, places, seed=seed)
    rows = plan.rows(epoch)
    assert len(rows) == plan.num_rows
    members = np.concatenate(rows) if rows else np.zeros(0, dtype=int)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    for row in rows:
        assert 1 <= len(row) <= places
        assert lengths[row].sum() <= 64


@given(lengths=LENGTHS, world_size=st.integers(1, 5))
@MODEST
def test_ranks_get_equally_many_rows_and_no_question_twice(lengths, world_size):
    plan = RowPlan(lengths, 64, 8, world_size=world_size)
    build = _members_of(lengths)
    seen = []
    for rank in range(world_size):
        loader = PackedLoader(plan, build, rank=rank, world_size=world_size)
        rows = list(loader)
        assert len(rows) == len(loader) == plan.num_rows // world_size
        seen += [i for row in rows for i in row]
    assert sorted(seen) == list(range(len(lengths)))


def _members_of(lengths):
    return lambda row: row.tolist()


def test_rows_are_full_at_medmcqas_lengths():
    """At least 98 % at 2,048 tokens and 99.5 % at 16,384."""
    lengths = medmcqa_like(40_000)
    for budget, least in ((2048, 0.98), (16_384, 0.995)):
        places = max_questions_of(lengths.mean(), budget)
        plan = RowPlan(lengths, budget, places)
        assert plan.fill_fraction >= least
        assert max(map(len, plan.rows(1))) <= places


@given(
    total=st.integers(1, 10**7),
    most=st.integers(300, 40_000),
    least=st.integers(1, 300),
    shared=st.integers(0, 40),
)
@MODEST
def test_full_budgets_hold_all_questions_in_the_rows_they_are_for(total, most, least, shared):
    budgets = full_budgets(total, most, least, shared)
    assert budgets[0] == most
    for budget in budgets[1:]:
        assert least <= budget < most
        assert budget % 256 == 0
    numbers = [math.ceil(total / (budget - shared)) for budget in budgets]
    assert min(numbers) == numbers[0] == math.ceil(total / (most - shared))
    assert max(numbers) <= numbers[0] + 7


def test_medmcqas_validation_set_has_a_budget_that_its_rows_fill():
    lengths = medmcqa_like(4183)
    filled = []
    for budget in full_budgets(int(lengths.sum()), 65_536, 2048):
        plan = RowPlan(lengths, budget, max_questions_of(lengths.mean(), budget), shuffle=False)
        filled.append(plan.fill_fraction)
    assert max(filled) > 0.993


def test_epochs_differ_and_an_epoch_repeats_itself():
    lengths = medmcqa_like(500)
    first, again = RowPlan(lengths, 512, 24, seed=3), RowPlan(lengths, 512, 24, seed=3)
    assert _ids(first.rows(2)) == _ids(again.rows(2))
    assert _ids(first.rows(0)) == _ids(again.rows(0))
    assert _ids(first.rows(0)) != _ids(first.rows(1))
    assert {frozenset(row) for row in _ids(first.rows(0))}.isdisjoint(
        {frozenset(row) for row in _ids(first.rows(1))}
    )
    assert _ids(RowPlan(lengths, 512, 24, seed=4).rows(0)) != _ids(first.rows(0))


def _ids(rows):
    return [row.tolist() for row in rows]


def test_members_of_a_row_are_not_sorted_by_length():
    lengths = medmcqa_like(5000)
    means = [lengths[row].mean() for row in RowPlan(lengths, 2048, 64).rows(0)[:-3]]
    shuffled = np.random.default_rng(0).permutation(lengths)
    expected = np.std([part.mean() for part in np.array_split(shuffled, len(means))])
    assert np.std(means) < 2.5 * expected
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_question_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="65 tokens"):
        pack(np.array([3, 65]), np.arange(2), 64, 8)


def test_spreading_halves_rows_before_it_makes_empty_ones():
    rows = [np.array([0, 1, 2, 3]), np.array([4])]
    assert sorted(map(len, spread(rows, 4))) == [1, 1, 1, 2]
    assert sorted(map(len, spread(rows, 7))) == [0, 0, 1, 1, 1, 1, 1]


# --- one row --------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    budget=st.integers(54, 70),
    places=st.integers(6, 9),
)
@MODEST
def test_row_has_fixed_shapes_and_gives_every_question_back(lengths, budget, places):
    questions = tokenized(lengths)
    members = np.arange(len(lengths))[::-1].copy()
    row = build_row(questions, members, token_budget=budget, max_questions=places, max_length=64)
    assert row.input_ids.shape == row.position_ids.shape == (budget,)
    assert row.cu_seqlens.shape == (places + 1,)
    assert row.last.shape == row.answer.shape == row.index.shape == (places,)
    assert row.cu_seqlens.dtype == torch.int32
    assert (row.num_questions, row.num_tokens) == (len(lengths), sum(lengths))
    assert row.labels is None
    for place, member in enumerate(members.tolist()):
        start, end = row.cu_seqlens[place], row.cu_seqlens[place + 1]
        expected = 1000 * (member + 1) + torch.arange(lengths[member])
        assert torch.equal(row.input_ids[start:end], expected)
        assert torch.equal(row.position_ids[start:end], torch.arange(lengths[member]))
        assert row.last[place] == end - 1
        assert (row.index[place], row.answer[place]) == (member, member % 4)
    assert (row.cu_seqlens[len(lengths) :] == sum(lengths)).all()
    assert (row.input_ids[sum(lengths) :] == 0).all()
    assert (row.index[len(lengths) :] == -1).all()
    assert (row.answer[len(lengths) :] == IGNORE).all()


def test_empty_row_has_the_same_shapes():
    row = build_row(
        tokenized([3]), np.zeros(0, dtype=int), token_budget=8, max_questions=2, max_length=8
    )
    assert row.num_questions == row.num_tokens == 0
    assert row.cu_seqlens.tolist() == [0, 0, 0]
    assert row.answer.tolist() == [IGNORE, IGNORE]


def test_labels_are_the_next_tokens_from_the_last_prompt_token_on():
    questions = tokenized([5, 4, 3], prompt_lengths=[2, 3, 3])
    row = build_row(
        questions,
        np.array([1, 0, 2]),
        token_budget=16,
        max_questions=4,
        max_length=8,
        with_labels=True,
    )
    assert row.last[:3].tolist() == [2, 5, 11]
    learned = {i: label for i, label in enumerate(row.labels.tolist()) if label != IGNORE}
    assert learned == {2: 2003, 5: 1002, 6: 1003, 7: 1004}
    for place, label in learned.items():
        assert row.input_ids[place + 1] == label


# --- resuming -------------------------------------------------------------------------------------


def loader_of(plan, **options):
    return PackedLoader(plan, lambda row: tuple(row.tolist()), **options)


def test_restored_loader_yields_exactly_the_rows_that_were_left():
    plan = RowPlan(medmcqa_like(300), 512, 24)
    whole = loader_of(plan)
    whole.set_epoch(2)
    expected = list(whole)
    first = loader_of(plan)
    first.set_epoch(2)
    iterator = iter(first)
    begun = [next(iterator) for _ in range(5)]
    second = loader_of(plan)
    second.load_state_dict(first.state_dict())
    rest = iter(second)
    second.set_epoch(2)  # Lightning sets the epoch after it has made the iterator
    assert begun + list(rest) == expected
    assert len(second) == len(expected)
    second.set_epoch(3)
    assert len(list(second)) == len(second)


def test_state_of_a_finished_epoch_starts_the_next_from_its_beginning():
    plan = RowPlan(medmcqa_like(300), 512, 24)
    first = loader_of(plan)
    list(first)
    second = loader_of(plan)
    second.load_state_dict(first.state_dict())
    second.set_epoch(1)
    assert len(list(second)) == len(second)


def test_state_counts_what_the_trainer_completed_not_what_was_handed_out():
    plan = RowPlan(medmcqa_like(300), 512, 24)
    first = loader_of(plan, num_done=lambda: 3)
    iterator = iter(first)
    begun = [next(iterator) for _ in range(4)]
    second = loader_of(plan)
    second.load_state_dict(first.state_dict())
    assert next(iter(second)) == begun[3]


def test_state_of_another_number_of_rows_is_refused():
    first = loader_of(RowPlan(medmcqa_like(300), 512, 24))
    second = loader_of(RowPlan(medmcqa_like(300), 1024, 48))
    with pytest.raises(CheckpointError, match="rows an epoch"):
        second.load_state_dict(first.state_dict())


def test_places_of_a_row_are_half_as_many_again_as_it_holds_in_eights():
    """1.5 * 2048 / 57 = 53.9, so 56; and never below 8."""
    assert max_questions_of(57.0, 2048) == 56
    assert max_questions_of(1000.0, 64) == 8


def test_a_question_as_long_as_the_row_fits_it():
    assert [row.tolist() for row in pack(np.array([5, 5]), np.arange(2), 5, 8)] == [[0], [1]]
    with pytest.raises(ValueError, match="6 tokens"):
        pack(np.array([6]), np.arange(1), 5, 8)


def test_a_gap_is_closed_exactly_where_two_questions_do_and_with_the_longest_otherwise():
    """The first two fill 6 of 20; 14 is 9 + 5, though 13 and 12 would be longer alone."""
    lengths = np.array([3, 3, 13, 12, 9, 5])
    assert sorted(map(len, pack(lengths, np.arange(6), 20, 8)))[-1] >= 3
    rows = pack(lengths, np.arange(6), 20, 8)
    assert max(int(lengths[row].sum()) for row in rows) == 20
    alone = pack(np.array([3, 3, 13, 12]), np.arange(4), 20, 8)
    assert [int(np.array([3, 3, 13, 12])[row].sum()) for row in alone] == [19, 12]


def test_the_state_of_a_loader_has_the_keys_of_the_checkpoints_there_are():
    """A checkpoint that was written before must still be read."""
    loader = loader_of(RowPlan(medmcqa_like(100), 512, 24))
    rows = iter(loader)
    next(rows)
    assert loader.state_dict() == {"epoch": 0, "rows_done": 1, "num_rows": len(loader)}


def test_a_place_is_taken_up_only_inside_the_epoch_it_was_left_in():
    """Any other epoch, and one that was finished, is given whole."""
    plan = RowPlan(medmcqa_like(300), 512, 24)
    whole = len(loader_of(plan))
    assert whole > 5
    for epoch, done, left in ((1, 3, whole - 3), (0, 3, whole), (1, whole, whole)):
        loader = loader_of(plan)
        state = {"epoch": epoch, "rows_done": done, "num_rows": whole}
        loader.load_state_dict(state)
        assert loader.state_dict() == state  # saved again before the first step
        loader.set_epoch(1)
        assert len(list(loader)) == left
    assert loader_of(plan).state_dict()["rows_done"] == 0


def test_each_row_is_augmented_with_the_number_of_its_epoch():
    plan = RowPlan(medmcqa_like(300), 512, 24)
    seen = []
    loader = loader_of(plan, augment=lambda row, epoch: seen.append(epoch) or ("changed", row))
    plain = loader_of(plan)
    for each in (loader, plain):
        each.set_epoch(2)
    assert list(loader) == [("changed", row) for row in plain]
    assert set(seen) == {2}


def test_without_shuffling_every_epoch_is_the_first():
    lengths = medmcqa_like(300)
    plan = RowPlan(lengths, 512, 24, shuffle=False, world_size=4)
    rows = pack(lengths, np.arange(300), 512, 24)
    assert plan.num_rows == -(-len(rows) // 4) * 4
    assert _ids(plan.rows(0)) == _ids(plan.rows(3))
    assert plan.rows(0)[0].tolist() == rows[0].tolist()


def test_halves_of_a_row_stand_in_its_place_and_behind_all_others():
    rows = spread([np.array([0, 1, 2, 3]), np.array([4, 5, 6])], 4)
    assert [row.tolist() for row in rows] == [[0, 1], [4], [2, 3], [5, 6]]


def test_a_question_without_an_answer_has_none_in_its_row():
    questions = tokenized([3, 2, 4])
    questions.answer[1] = -1
    row = build_row(questions, np.arange(3), token_budget=16, max_questions=4, max_length=8)
    assert row.answer.tolist() == [0, IGNORE, 2, IGNORE]
    assert row.max_length == 8


@pytest.mark.parametrize(
    ("lengths", "budget", "places", "first"),
    [
        ([10, 4, 5, 6], 19, 2, [0, 3]),  # 4 + 5 would close it, and need three places
        ([10, 4, 5, 6], 19, 3, [0, 1, 2]),
        ([10, 4, 4, 7], 18, 3, [0, 1, 2]),  # two of one size are two questions
        ([10, 4, 7, 3], 18, 3, [0, 2]),  # one of it is not
    ],
)
def test_two_questions_close_a_gap_where_there_are_two_and_places_for_both(
    lengths, budget, places, first
):
    rows = pack(np.array(lengths), np.arange(len(lengths)), budget, places)
    assert rows[0].tolist() == first


def test_a_shared_beginning_stands_once_and_every_question_goes_on_behind_it():
    lengths, prompts = np.array([5, 4, 6]), [4, 3, 3]
    questions = tokenized(lengths, prompt_lengths=prompts)
    for start in questions.offsets[:-1]:
        questions.tokens[start : start + 2] = (7, 8)
    shape = {"token_budget": 16, "max_questions": 4, "max_length": 8, "with_labels": True}
    row = build_row(questions, np.array([2, 0, 1]), **shape, prefix_length=2)
    assert (row.prefix_length, row.num_tokens, row.num_questions) == (2, 2 + 4 + 3 + 2, 3)
    assert row.input_ids[:11].tolist() == [
        7,
        8,
        *(3002, 3003, 3004, 3005),
        1002,
        1003,
        1004,
        2002,
        2003,
    ]
    assert row.position_ids[:11].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3]
    assert row.cu_seqlens.tolist() == [2, 6, 9, 11, 11]
    assert row.last[:3].tolist() == [2, 7, 9]  # of prompts of 3, 4 and 3 tokens, 2 of them shared
    learned = {i: label for i, label in enumerate(row.labels.tolist()) if label != IGNORE}
    assert learned == {2: 3003, 3: 3004, 4: 3005, 7: 1004, 9: 2003}
    empty = build_row(questions, np.zeros(0, dtype=int), **shape, prefix_length=2)
    assert (empty.num_tokens, empty.num_questions) == (0, 0)


def test_an_epoch_whose_shuffles_all_need_too_many_rows_takes_those_of_the_first(monkeypatch):
    """The trainer counted the rows once; which question is in which row then repeats."""
    plan = RowPlan(medmcqa_like(100), 512, 24)
    first = _ids(plan.rows(0))
    alone = [np.array([question]) for question in range(100)]
    monkeypatch.setattr(plan, "_pack", lambda epoch, attempt: alone)
    later = _ids(plan.rows(1))
    assert later != first
    assert sorted(map(sorted, later)) == sorted(map(sorted, first))
