"""Letter scores and the arithmetic over orders of the options."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.evaluation import (
    check_letter_rows,
    combine_permutations,
    contextual_calibration,
    cyclic_orders,
    letter_scores,
)


def test_scores_are_the_log_softmax_of_the_letters_logits():
    hidden, rows = torch.randn(5, 32), torch.randn(4, 32)
    expected = torch.log_softmax(hidden.double() @ rows.double().T, dim=-1).float()
    torch.testing.assert_close(letter_scores(hidden, rows), expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_neither_on_the_batch_nor_on_its_order():
    """Every question is scored by itself (lm-evaluation-harness#3055 is what happens otherwise)."""
    hidden = torch.randn(37, 64, dtype=torch.bfloat16)
    rows = torch.randn(4, 64, dtype=torch.bfloat16)
    scores = letter_scores(hidden, rows)
    order = torch.randperm(37)
    assert torch.equal(letter_scores(hidden[order], rows), scores[order])
    assert torch.equal(torch.cat([letter_scores(h[None], rows) for h in hidden]), scores)


def test_arithmetic_is_float32_even_under_autocast():
    hidden, rows = torch.randn(5, 512), torch.randn(4, 512)
    expected = letter_scores(hidden, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(letter_scores(hidden, rows), expected)
    assert letter_scores(hidden.bfloat16(), rows.bfloat16()).dtype == torch.float32


def test_gradient_reaches_the_hidden_states():
    hidden = torch.randn(3, 8, requires_grad=True)
    letter_scores(hidden, torch.randn(4, 8))[:, 0].sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad.abs().sum(dim=1) > 0).all()


def test_softcap_bounds_the_logits_and_keeps_the_choice():
    hidden, rows = 100 * torch.randn(9, 16), torch.randn(4, 16)
    capped = letter_scores(hidden, rows, softcap=30.0)
    # Logits within +-30 leave at most 60 nats between two letters.
    assert (capped.max(dim=-1).values - capped.min(dim=-1).values <= 60.001).all()
    mild = hidden / 1000
    assert torch.equal(
        letter_scores(mild, rows, 30.0).argmax(-1), letter_scores(mild, rows).argmax(-1)
    )


def test_letters_with_the_same_row_are_refused():
    rows = torch.randn(4, 8)
    check_letter_rows(rows)
    for first, second, message in ((1, 3, "B and D"), (0, 1, "A and B"), (2, 3, "C and D")):
        tied = rows.clone()
        tied[second] = tied[first]
        with pytest.raises(ValueError, match=message):
            check_letter_rows(tied)


@pytest.mark.parametrize("k", [2, 4, 5])
def test_cyclic_orders_put_each_option_once_in_each_place(k):
    orders = np.array(cyclic_orders(k))
    assert orders[0].tolist() == list(range(k))
    for table in (orders, orders.T):
        assert np.array_equal(np.sort(table, axis=1), np.tile(np.arange(k), (k, 1)))


def _scored(option_logits, place_bias):
    """What a model with these preferences would score under each cyclic order."""
    k = option_logits.shape[1]
    shown = np.stack([option_logits[:, list(order)] for order in cyclic_orders(k)])
    logits = shown + place_bias
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), k=st.sampled_from([4, 5]))
def test_a_preference_for_places_cancels_over_cyclic_orders(seed, k):
    """Zheng et al. 2024, section 3: each option stands once in each place."""
    rng = np.random.default_rng(seed)
    options = rng.normal(size=(6, k))
    expected = options - np.logaddexp.reduce(options, axis=-1, keepdims=True)
    summary = combine_permutations(_scored(options, 5 * rng.normal(size=k)))
    np.testing.assert_allclose(summary.debiased_scores, expected, atol=1e-9)


def test_a_model_that_reads_options_is_fully_consistent():
    options = np.random.default_rng(0).normal(size=(50, 4))
    answer = options.argmax(axis=1)
    summary = combine_permutations(_scored(options, np.zeros(4)), answer)
    assert summary.consistency == 1
    assert summary.mean_accuracy == summary.debiased_accuracy == 1
    assert summary.num_orders == 4


def test_a_model_that_always_says_a_is_never_consistent():
    """Under cyclic orders each option comes first once, so the mean accuracy is exactly 1/k."""
    options = np.zeros((40, 4))
    answer = np.random.default_rng(0).integers(0, 4, size=40)
    summary = combine_permutations(_scored(options, np.array([9.0, 0, 0, 0])), answer)
    assert summary.consistency == 0
    assert summary.mean_accuracy == pytest.approx(0.25)
    assert sum(summary.accuracy_by_order) == pytest.approx(1)


def test_unlabelled_questions_give_consistency_but_no_accuracy():
    scores = _scored(np.random.default_rng(0).normal(size=(5, 4)), np.zeros(4))
    for answer in (None, np.full(5, -100)):
        summary = combine_permutations(scores, answer)
        assert summary.consistency == 1
        assert summary.num_labelled == 0
        assert summary.mean_accuracy is summary.debiased_accuracy is None
        assert summary.accuracy_by_order == ()


def test_orders_that_do_not_match_the_scores_are_refused():
    with pytest.raises(ValueError, match="permutations"):
        combine_permutations(np.zeros((6, 2, 4)))
    with pytest.raises(ValueError, match="permutations"):
        combine_permutations(np.zeros((1, 2, 4)), orders=((0, 0, 1, 2),))


def test_contextual_calibration_makes_the_content_free_prompt_uniform():
    """Zhao et al. 2021, section 5: W is chosen so that the content-free input scores evenly."""
    free = np.log(np.array([[0.7, 0.1, 0.1, 0.1]]))
    np.testing.assert_allclose(np.exp(contextual_calibration(free, free)), 0.25)
    two = np.log(np.array([[0.6, 0.2, 0.1, 0.1], [0.8, 0.0001, 0.0999, 0.1]]))
    mean = np.log(np.exp(two).mean(axis=0, keepdims=True))
    scores = np.log(np.array([[0.4, 0.3, 0.2, 0.1]]))
    np.testing.assert_allclose(
        contextual_calibration(scores, two), contextual_calibration(scores, mean)
    )


def test_contextual_calibration_divides_by_the_mean_probability_and_normalises_each_question():
    free = np.log([[0.7, 0.1, 0.1, 0.1], [0.1, 0.3, 0.3, 0.3]])
    scores = np.log([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6], [0.25, 0.25, 0.25, 0.25]])
    expected = np.exp(scores) / np.exp(free).mean(axis=0)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(contextual_calibration(scores, free)), expected)


def test_permutations_of_several_questions_by_hand():
    """Two orders of three options; question 0 keeps its option, 1 changes it, 2 has no label."""
    orders = ((0, 1, 2), (1, 2, 0))
    first = np.log([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    second = np.log([[0.1, 0.2, 0.7], [0.3, 0.5, 0.2], [0.1, 0.7, 0.2]])
    summary = combine_permutations(np.stack([first, second]), np.array([0, 1, -1]), orders)
    assert (summary.num_orders, summary.num_questions, summary.num_labelled) == (2, 3, 2)
    assert summary.consistency == pytest.approx(2 / 3)
    assert summary.accuracy_by_order == (1.0, 0.5)
    assert summary.mean_accuracy == pytest.approx(0.75)
    by_option = second[:, [2, 0, 1]]
    mean = (first + by_option) / 2
    expected = mean - np.log(np.exp(mean).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(summary.debiased_scores, expected)
    assert summary.debiased_accuracy == 1.0
