"""What is minimised: over the four letters, over the whole vocabulary, or over the explanation too.

Each loss returns a sum and the number of positions it is over, so that the module can divide by the
positions of a whole accumulation window instead of averaging averages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from medqlora.acceleration import hidden_states, last_hidden
from medqlora.errors import ConfigError
from medqlora.evaluation.scoring import letter_scores
from medqlora.schema import IGNORE, PackedBatch

Targets = Literal["answer", "explanation"]


class Loss(Protocol):
    """A loss over one packed row.

    Attributes:
        targets: What the data must hold: "answer", or "explanation" for labels along the row.
    """

    targets: ClassVar[Targets]

    def __call__(
        self,
        model: nn.Module,
        batch: PackedBatch,
        letter_rows: Float[Tensor, "letter width"],
        letter_ids: Int[Tensor, " letter"],
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Run the model over the row.

        Args:
            model: The base model with its adapter.
            batch: One packed row.
            letter_rows: Rows of the output embedding that belong to the letters.
            letter_ids: Token ids of the letters.

        Returns:
            Sum of the loss in nats, and the number of supervised positions.
        """
        ...


@dataclass(frozen=True)
class ChoiceLoss:
    """Cross-entropy over the letters only; ln 4 = 1.386 is knowing nothing.

    Four rows of the output embedding stand for the whole head.

    Attributes:
        label_smoothing: Probability shared out evenly over the letters, in [0, 1).

    References:
        Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """

    label_smoothing: float = 0.0
    targets: ClassVar[Targets] = "answer"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(
        self,
        model: nn.Module,
        batch: PackedBatch,
        letter_rows: Float[Tensor, "letter width"],
        letter_ids: Int[Tensor, " letter"],
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """See `Loss.__call__`."""
        scores = letter_scores(last_hidden(model, batch), letter_rows)
        total = F.cross_entropy(
            scores,
            batch.answer,
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return total, (batch.answer != IGNORE).sum()


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy over the whole vocabulary at the answer position.

    Attributes:
        chunk_size: Positions whose logits are alive at a time; 64 of them are 66 MB with Gemma's
            256 000 tokens.
        label_smoothing: Probability shared out evenly over the vocabulary, in [0, 1).
    """

    chunk_size: int = 64
    label_smoothing: float = 0.0
    targets: ClassVar[Targets] = "answer"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)
        _check_chunk(self.chunk_size)

    def __call__(
        self,
        model: nn.Module,
        batch: PackedBatch,
        letter_rows: Float[Tensor, "letter width"],
        letter_ids: Int[Tensor, " letter"],
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """See `Loss.__call__`."""
        labels = torch.where(
            batch.answer == IGNORE, IGNORE, letter_ids[batch.answer.clamp(min=0).long()]
        )
        hidden = last_hidden(model, batch)
        total = chunked_cross_entropy(
            hidden, labels, output_head(model), self.chunk_size, self.label_smoothing
        )
        return total, (labels != IGNORE).sum()


@dataclass(frozen=True)
class ExplanationLoss:
    """Cross-entropy over the whole vocabulary at the answer and along the expert's explanation.

    Attributes:
        chunk_size: As for `TokenLoss`.
        label_smoothing: As for `TokenLoss`.
    """

    chunk_size: int = 256
    label_smoothing: float = 0.0
    targets: ClassVar[Targets] = "explanation"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)
        _check_chunk(self.chunk_size)

    def __call__(
        self,
        model: nn.Module,
        batch: PackedBatch,
        letter_rows: Float[Tensor, "letter width"],
        letter_ids: Int[Tensor, " letter"],
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """See `Loss.__call__`.

        Raises:
            ConfigError: If the rows were packed without labels.
        """
        if batch.labels is None:
            raise ConfigError(
                "loss=explanation needs rows with labels, but the data was packed with the answer "
                "alone. Build the data module with targets=explanation, or choose loss=choice."
            )
        hidden, labels = hidden_states(model, batch), batch.labels
        if labels.device.type == "cpu":
            # Elsewhere selecting positions would wait for the device, and most are supervised.
            supervised = (labels != IGNORE).nonzero()[:, 0]
            hidden, labels = hidden.index_select(0, supervised), labels[supervised]
        total = chunked_cross_entropy(
            hidden, labels, output_head(model), self.chunk_size, self.label_smoothing
        )
        return total, (labels != IGNORE).sum()


def output_head(model: nn.Module) -> nn.Module:
    """The frozen module that maps hidden states to logits over the vocabulary.

    Raises:
        ConfigError: If it is trainable.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = base.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module)
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ConfigError(
            "the output head is trainable, and this loss gives gradients to hidden states only. "
            "Leave lm_head out of peft.target_modules and peft.modules_to_save."
        )
    return head


def chunked_cross_entropy(
    hidden: Float[Tensor, "position width"],
    labels: Int[Tensor, " position"],
    head: Callable[[Tensor], Tensor],
    chunk_size: int,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy over the vocabulary, with one chunk of logits alive at a time.

    The gradient of each chunk is taken right after its loss and only the gradient of the hidden
    states is kept, so the head must be frozen.

    Args:
        hidden: Last hidden states.
        labels: Next token; -100 where there is none.
        head: Maps hidden states to logits over the vocabulary.
        chunk_size: Positions a chunk.
        label_smoothing: As for `torch.nn.functional.cross_entropy`.

    Returns:
        The sum in nats.

    References:
        The same order of work, fused: Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section
        3.2.
    """
    total = _ChunkedCrossEntropy.apply(hidden, labels, head, chunk_size, label_smoothing)
    assert isinstance(total, Tensor)
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk_size: int,
        label_smoothing: float,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, hidden.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            with torch.set_grad_enabled(needs_grad):
                chunk = hidden[part].detach().requires_grad_(needs_grad)
                loss = F.cross_entropy(
                    head(chunk).float(),
                    labels[part],
                    ignore_index=IGNORE,
                    reduction="sum",
                    label_smoothing=label_smoothing,
                )
            total += loss.detach()
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(loss, chunk)
            del loss, chunk  # or these logits would still be there while the next ones are made
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None, None, None


def _check_smoothing(value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ConfigError(
            f"loss.label_smoothing={value} is no share of probability. Choose a number of at least "
            "0 and below 1, such as 0.1."
        )


def _check_chunk(value: int) -> None:
    if value < 1:
        raise ConfigError(
            f"loss.chunk_size={value} leaves no position in a chunk. Choose a whole number of at "
            "least 1, such as 64."
        )
