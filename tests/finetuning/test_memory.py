"""A row that does not fit is halved, its update is not."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch

from medqlora.errors import TrainingError, is_out_of_memory
from medqlora.finetuning.memory import OutOfMemory, fit_in_memory


def device_of(tokens: int):
    """A run on a device that holds so many tokens."""
    seen = []

    def run(token_budget: int, accumulate: int) -> str:
        seen.append((token_budget, accumulate))
        if token_budget > tokens:
            raise OutOfMemory("out of memory at step 0")
        return "trained"

    return run, seen


def test_rows_are_halved_until_they_fit_and_updates_keep_their_tokens(caplog):
    run, seen = device_of(5000)
    with caplog.at_level(logging.WARNING, logger="medqlora"):
        assert fit_in_memory(run, 16384, 1, smallest=300) == "trained"
    assert seen == [(16384, 1), (8192, 2), (4096, 4)]
    assert len({budget * rows for budget, rows in seen}) == 1
    assert "data.token_budget=4096" in caplog.text


def test_a_row_that_fits_is_left_alone():
    run, seen = device_of(20000)
    fit_in_memory(run, 16384, 3, smallest=300)
    assert seen == [(16384, 3)]


def test_no_row_is_shorter_than_a_question():
    run, seen = device_of(10)
    with pytest.raises(TrainingError, match=r"data\.token_budget=512") as error:
        fit_in_memory(run, 2048, 1, smallest=300)
    assert seen[-1] == (512, 4)
    assert "\n" not in str(error.value)


def test_other_failures_are_not_swallowed():
    def run(token_budget: int, accumulate: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        fit_in_memory(run, 2048, 1, smallest=300)


def test_what_the_failed_run_held_is_released_first():
    held: list[weakref.ref] = []

    def run(token_budget: int, accumulate: int) -> None:
        if held:
            assert held[0]() is None, "the failed step's tensors are still there"
            return
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise OutOfMemory("out of memory at step 0")

    fit_in_memory(run, 2048, 1, smallest=300)


def test_the_libraries_own_words_for_it_are_known():
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**55)
    assert is_out_of_memory(found.value)
    assert not is_out_of_memory(ValueError("out of memory"))
