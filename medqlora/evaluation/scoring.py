"""Hidden states to letter scores, and the arithmetic over several orders of the options."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medqlora.schema import LETTERS


def check_letter_rows(letter_rows: Float[Tensor, "letter width"]) -> None:
    """Refuse output rows that can never tell two letters apart.

    Called once when a model is set up: comparing values on the device waits for it, which the
    scoring of every step must not do.

    Args:
        letter_rows: Rows of the output embedding that belong to the letters, in option order.

    Raises:
        ValueError: If two letters share a row, so that they always tie.
    """
    same = (letter_rows[:, None, :] == letter_rows[None, :, :]).all(dim=-1).tolist()
    for first in range(len(same)):
        for second in range(first + 1, len(same)):
            if same[first][second]:
                raise ValueError(
                    f"Letters {LETTERS[first]} and {LETTERS[second]} have the same output row, so "
                    "they always tie; give each letter its own token with its own weights."
                )


def letter_scores(
    hidden: Float[Tensor, "question width"],
    letter_rows: Float[Tensor, "letter width"],
    softcap: float | None = None,
) -> Float[Tensor, "question letter"]:
    """Log-probability of each answer letter as the next token, among the letters.

    The arithmetic is float32 whatever the inputs are. It multiplies and sums instead of calling
    matmul, which would follow autocast to bfloat16 and CUDA to TF32 and would round differently
    with the number of questions in the row; with four letters it costs nothing.

    Args:
        hidden: Last hidden state of each question, after the final norm.
        letter_rows: Rows of the output embedding that belong to the letters, in option order;
            checked once by `check_letter_rows`.
        softcap: Bound of the logits, `softcap * tanh(logit / softcap)`, for models that have one
            (Gemma 2: 30); None for Gemma 1.

    Returns:
        Log-probabilities in nats, normalised over the letters of each question.

    References:
        Letter scoring for multiple choice: Hendrycks et al. 2021, arXiv:2009.03300.
    """
    logits = (hidden.float()[:, None, :] * letter_rows.float()[None, :, :]).sum(dim=-1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1)


def cyclic_orders(num_options: int) -> tuple[tuple[int, ...], ...]:
    """The cyclic orders of the options, the original first.

    Args:
        num_options: Options of a question, k.

    Returns:
        k orders: under order `r`, place `p` shows option `(p + r) % k`. Over all of them each
        option stands once in each place.
    """
    return tuple(
        tuple((place + shift) % num_options for place in range(num_options))
        for shift in range(num_options)
    )


@dataclass(frozen=True, slots=True)
class PermutationSummary:
    """What showing the same questions in several orders says.

    Attributes:
        num_orders: Orders shown.
        num_questions: Questions.
        consistency: Fraction of questions whose chosen option (not letter) is the same in every
            order.
        accuracy_by_order: Accuracy under each order over labelled questions; empty without labels.
        mean_accuracy: Mean of `accuracy_by_order`; None without labels.
        debiased_accuracy: Accuracy of the debiased scores; None without labels.
        num_labelled: Questions the accuracies are over.
        debiased_scores: Log-probability in nats of each option in its original place, averaged over
            the orders and normalised again.
    """

    num_orders: int
    num_questions: int
    consistency: float
    accuracy_by_order: tuple[float, ...]
    mean_accuracy: float | None
    debiased_accuracy: float | None
    num_labelled: int
    debiased_scores: Float[np.ndarray, "question option"]


def combine_permutations(
    scores: Float[np.ndarray, "order question letter"],
    answer: Int[np.ndarray, " question"] | None = None,
    orders: tuple[tuple[int, ...], ...] | None = None,
) -> PermutationSummary:
    """Combine the letter scores of the same questions under several orders of their options.

    The debiased score of an option is the mean of its log-probability over the orders. Over all
    cyclic orders each option has stood in each place once, so a preference for places that adds to
    the logits cancels exactly.

    Args:
        scores: Log-probabilities in nats, as scored: the last axis is the place (letter) shown.
        answer: Right option in the original order; negative where unknown. None for no labels.
        orders: `orders[o][p]` is the option shown at place `p`; the cyclic orders if None.

    Returns:
        Consistency, accuracies, debiased scores.

    Raises:
        ValueError: If `orders` does not have one permutation of the options for each order scored.

    References:
        Zheng et al. 2024, arXiv:2309.03882, section 3 (cyclic permutation; they average
        probabilities, here log-probabilities are averaged).
    """
    num_orders, num_questions, num_options = scores.shape
    orders = cyclic_orders(num_options)[:num_orders] if orders is None else orders
    if len(orders) != num_orders or any(sorted(o) != list(range(num_options)) for o in orders):
        raise ValueError(
            f"Scores of {num_orders} orders of {num_options} options need as many permutations of "
            f"0..{num_options - 1}, not {orders}; at most {num_options} orders are cyclic."
        )
    by_option = np.empty_like(scores)
    for index, order in enumerate(orders):
        by_option[index][:, list(order)] = scores[index]
    # Of letters that tie the first shown is chosen, as in every prediction.
    chosen = np.stack(
        [np.asarray(order)[row.argmax(axis=-1)] for order, row in zip(orders, scores, strict=True)]
    )
    mean = by_option.mean(axis=0, dtype=np.float64)
    debiased = mean - np.logaddexp.reduce(mean, axis=-1, keepdims=True)

    labelled = np.zeros(num_questions, dtype=bool) if answer is None else answer >= 0
    accuracy_by_order: tuple[float, ...] = ()
    mean_accuracy = debiased_accuracy = None
    if answer is not None and labelled.any():
        right = chosen[:, labelled] == answer[labelled]
        accuracy_by_order = tuple(float(value) for value in right.mean(axis=1))
        mean_accuracy = float(right.mean())
        debiased_accuracy = float((debiased.argmax(axis=-1) == answer)[labelled].mean())
    return PermutationSummary(
        num_orders=num_orders,
        num_questions=num_questions,
        consistency=float((chosen == chosen[0]).all(axis=0).mean()),
        accuracy_by_order=accuracy_by_order,
        mean_accuracy=mean_accuracy,
        debiased_accuracy=debiased_accuracy,
        num_labelled=int(labelled.sum()),
        debiased_scores=debiased,
    )


def contextual_calibration(
    scores: Float[np.ndarray, "question letter"],
    content_free: Float[np.ndarray, "prompt letter"],
) -> Float[np.ndarray, "question letter"]:
    """Divide the letters' probabilities by those of prompts without content.

    Args:
        scores: Log-probabilities in nats of each question's letters.
        content_free: The same of content-free prompts ("N/A", an empty string); their probabilities
            are averaged.

    Returns:
        Calibrated log-probabilities in nats, normalised over the letters.

    References:
        Zhao et al. 2021, arXiv:2102.09690, section 5 (W = diag(p_cf)^-1, b = 0).
    """
    prior = np.logaddexp.reduce(content_free.astype(np.float64), axis=0) - np.log(len(content_free))
    calibrated = scores - prior
    return calibrated - np.logaddexp.reduce(calibrated, axis=-1, keepdims=True)
