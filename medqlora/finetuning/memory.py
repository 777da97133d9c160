"""Going on with shorter rows when a device is too small."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from medqlora.errors import TrainingError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class OutOfMemory(TrainingError):
    """Training ran out of the device's memory."""


def fit_in_memory(
    run: Callable[[int, int], Result],
    token_budget: int,
    accumulate_grad_batches: int,
    *,
    smallest: int,
) -> Result:
    """Run with rows half as long, and twice as many an update, until they fit.

    All rows of a run have the same shapes, so that one that does not fit fails in its first step or
    its first validation: starting over loses little and keeps every update over as many tokens.

    Args:
        run: `run(token_budget, accumulate_grad_batches)` builds everything anew and trains. Only
            its `OutOfMemory` counts: shorter rows do not help a base that cannot even be loaded.
        token_budget: Tokens a row to begin with.
        accumulate_grad_batches: Rows an update to begin with.
        smallest: Tokens of the longest question, below which no row can be.

    Returns:
        What `run` returns.

    Raises:
        TrainingError: If the shortest possible row does not fit either.
    """
    while True:
        try:
            return run(token_budget, accumulate_grad_batches)
        except OutOfMemory:
            pass
        # Outside the handler, whose traceback keeps the tensors of the failed step alive.
        _release()
        if token_budget // 2 < smallest:
            raise TrainingError(
                f"out of memory with data.token_budget={token_budget}, and half of it is shorter "
                f"than the longest question ({smallest} tokens). Set "
                "acceleration.gradient_checkpointing=true, choose quant=nf4_full, or use a larger "
                "device."
            )
        token_budget, accumulate_grad_batches = token_budget // 2, accumulate_grad_batches * 2
        log.warning(
            "out of memory: starting over with data.token_budget=%d and "
            "trainer.accumulate_grad_batches=%d, so that an update sees as many tokens",
            token_budget,
            accumulate_grad_batches,
        )


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
