"""Losses equal their definitions over full logits, without the full logits ever being there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from medqlora.acceleration import hidden_states, last_hidden, use_packed_attention
from medqlora.errors import ConfigError
from medqlora.finetuning import ChoiceLoss, ExplanationLoss, TokenLoss
from medqlora.finetuning.losses import chunked_cross_entropy
from medqlora.schema import IGNORE
from tests.finetuning.conftest import LETTER_IDS, make_row

IDS = torch.tensor(LETTER_IDS)


@pytest.fixture
def model(base):
    return base("none")


def rows_of(model):
    return model.lm_head.weight[IDS].detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_choice_loss_is_cross_entropy_over_the_four_letters(model, rows, smoothing):
    batch = rows[0]
    total, count = ChoiceLoss(smoothing)(model, batch, rows_of(model), IDS)
    logits = model.lm_head(last_hidden(model, batch))[:4][:, IDS]
    expected = F.cross_entropy(logits, batch.answer[:4], reduction="sum", label_smoothing=smoothing)
    assert count == 4
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_choice_loss_of_knowing_nothing_is_ln_4(model, rows):
    total, count = ChoiceLoss()(model, rows[0], torch.zeros(4, 64), IDS)
    torch.testing.assert_close(total / count, torch.tensor(4.0).log())


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_is_the_stock_loss_of_one_question_at_a_time(base, rows, chunk_size, smoothing):
    """Over the whole vocabulary at the answer position, the label being the letter's token."""
    batch, stock = rows[0], base("none")
    stock.set_attn_implementation("sdpa")
    expected = torch.zeros(())
    for i in range(batch.num_questions):
        question = batch.input_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        logits = stock(question[None]).logits[0, -1]
        label = IDS[batch.answer[i]]
        expected = expected + F.cross_entropy(logits, label, label_smoothing=smoothing)
    total, count = TokenLoss(chunk_size, smoothing)(base("none"), batch, torch.zeros(4, 64), IDS)
    assert count == batch.num_questions
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_explanation_loss_is_cross_entropy_over_all_supervised_positions(model, rows):
    batch = rows[0]
    labels = batch.labels.clone()
    labels[6:9] = torch.tensor([40, 41, 42])
    batch = dataclasses.replace(batch, labels=labels)
    total, count = ExplanationLoss(chunk_size=3)(model, batch, rows_of(model), IDS)
    logits = model.lm_head(hidden_states(model, batch))
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    assert count == 4 + 3
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_explanation_loss_refuses_rows_without_labels(model, rows):
    batch = dataclasses.replace(rows[0], labels=None)
    with pytest.raises(ConfigError, match="loss=explanation needs rows with labels"):
        ExplanationLoss()(model, batch, rows_of(model), IDS)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunked_gradients_equal_those_of_full_logits(chunk_size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    labels = torch.randint(0, 50, (7,), generator=generator)
    labels[2] = IGNORE
    chunked = torch.randn(7, 8, generator=generator).requires_grad_()
    full = chunked.detach().clone().requires_grad_()
    loss = chunked_cross_entropy(chunked, labels, lambda h: h @ weight.T, chunk_size, 0.1)
    (3 * loss).backward()
    expected = F.cross_entropy(full @ weight.T, labels, reduction="sum", label_smoothing=0.1)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked.grad, full.grad, rtol=1e-5, atol=1e-6)


def test_at_most_one_chunk_of_logits_is_alive():
    """Also none of an earlier chunk's, which a reference left behind would keep."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def head(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal most
        logits = hidden @ torch.ones(8, 50)
        assert logits.shape[0] <= 2
        alive.append(weakref.ref(logits.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))
        return logits

    hidden = torch.randn(9, 8, requires_grad=True)
    chunked_cross_entropy(hidden, torch.zeros(9, dtype=torch.long), head, 2).backward()
    assert len(alive) == 5
    assert most == 1


def test_choice_loss_never_runs_the_head(model, rows):
    model.lm_head.register_forward_hook(lambda *args: pytest.fail("the head ran"))
    model.requires_grad_(True)
    total, _ = ChoiceLoss()(model, rows[0], rows_of(model), IDS)
    total.backward()


def test_an_empty_place_weighs_nothing(model):
    full, places = make_row((5, 9), 0, places=2), make_row((5, 9), 0, places=6)
    for loss in (ChoiceLoss(), TokenLoss()):
        first = loss(model, full, rows_of(model), IDS)
        second = loss(model, places, rows_of(model), IDS)
        torch.testing.assert_close(first, second)


def test_a_trainable_head_is_refused(model, rows):
    model.lm_head.weight.requires_grad_(True)
    use_packed_attention(model)
    with pytest.raises(ConfigError, match="the output head is trainable"):
        TokenLoss()(model, rows[0], rows_of(model), IDS)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ChoiceLoss(1.0), "label_smoothing=1.0"),
        (lambda: TokenLoss(label_smoothing=-0.1), "label_smoothing=-0.1"),
        (lambda: ExplanationLoss(chunk_size=0), "chunk_size=0"),
    ],
)
def test_numbers_without_meaning_are_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
