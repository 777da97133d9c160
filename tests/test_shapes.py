"""The shapes that signatures state are checked wherever the tests call them."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from medqlora.acceleration import packed_attention
from medqlora.finetuning.losses import ChoiceLoss
from medqlora.runs import free_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="off, where torch.compile traces the package")
def test_a_wrong_shape_is_an_error_and_other_functions_run_as_they_are():
    heads = torch.zeros(2, 3, 4)
    with pytest.raises(TypeCheckError, match="value"):
        packed_attention(heads, heads, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), 2)
    assert hasattr(ChoiceLoss.__call__, "__wrapped__")
    assert not hasattr(free_memory, "__wrapped__")
