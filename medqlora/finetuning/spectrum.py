"""What an adapter of the LoRA family adds to each weight: the change and its singular values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from medqlora.errors import ConfigError
from medqlora.finetuning.adapters import _ADAPTER, _lora_layers, _method


@dataclass(frozen=True)
class WeightChange:
    """What an adapter adds to one weight.

    Attributes:
        name: Module path within the base model.
        rank: `r` of the adapter at this weight.
        stored: The weight as the base multiplies with it, after dequantisation, float32.
        change: What the adapter adds to it, float32.
        singular_values: Of `change`, falling; `rank` of them at most, or all where the change has
            full rank (DoRA, whose magnitudes scale every row).
    """

    name: str
    rank: int
    stored: Float[Tensor, "output input"]
    change: Float[Tensor, "output input"]
    singular_values: Float[Tensor, " direction"]


@torch.no_grad()
def weight_changes(
    model: nn.Module, dequantize: Callable[[nn.Module], Tensor]
) -> Iterator[WeightChange]:
    """Go through the adapted weights; one at a time, so that a full-size model fits.

    Args:
        model: A model with its adapter, on any storage of the base.
        dequantize: Gives the weight that a linear layer multiplies with.

    Yields:
        One change an adapted weight, in the order of the model.

    Raises:
        ConfigError: If the adapter is none of the LoRA family (LoRA and its starts, rsLoRA, DoRA,
            AdaLoRA), which adds no such product to a weight.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(
            "this model has no adapter (peft=none or peft=full), so there is no change to a weight "
            "to show. Give a run of an adapter, such as peft=lora_r16."
        )
    found = False
    for path, layer in _lora_layers(model):
        found = True
        left, right = _factors(layer)
        stored = dequantize(layer.get_base_layer()).float()
        change = left @ right
        name = path.removeprefix("base_model.model.")
        magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
        if _ADAPTER in magnitudes:
            change = _with_magnitude(stored, change, magnitudes[_ADAPTER].weight.float())
            values = torch.linalg.svdvals(change)
        else:
            values = low_rank_singular_values(left, right)
        yield WeightChange(name, len(right), stored, change, values)
    if not found:
        method = _method(model.peft_config[_ADAPTER])
        raise ConfigError(
            f"peft={method} adds no product of two factors to a weight, so it has no singular "
            "values to show. Give a run of the LoRA family, such as peft=lora_r16."
        )


def low_rank_singular_values(
    left: Float[Tensor, "output r"], right: Float[Tensor, "r input"]
) -> Float[Tensor, " direction"]:
    """Singular values of `left @ right` without forming it, falling; at most r.

    With left = Q1 R1 and right^T = Q2 R2 they are those of R1 R2^T, which is r by r at most.
    """
    _, first = torch.linalg.qr(left.double())
    _, second = torch.linalg.qr(right.double().T)
    return torch.linalg.svdvals(first @ second.T).to(left.dtype)


def effective_rank(singular_values: Float[Tensor, " direction"]) -> float:
    """In how many directions a matrix really acts: 1 for one, k for k equal ones, 0 for none.

    References:
        exp of the entropy of the normalised singular values: Roy and Vetterli 2007, "The effective
        rank: a measure of effective dimensionality", EUSIPCO, section 2.
    """
    total = float(singular_values.sum())
    if total == 0:
        return 0.0
    share = singular_values.double() / total
    return float(torch.special.entr(share).sum().exp())


def _factors(layer: Any) -> tuple[Float[Tensor, "output r"], Float[Tensor, "r input"]]:
    """The two factors of the difference, the scale in the first, float32."""
    first, second = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    scale = layer.scaling[_ADAPTER]
    if not isinstance(first, Tensor):
        return scale * second.weight.float(), first.weight.float()
    # AdaLoRA keeps the singular values of its own between the factors (Zhang et al. 2023).
    own: Tensor = layer.lora_E[_ADAPTER].float()
    scale = scale / (float(layer.ranknum[_ADAPTER]) + 1e-5)  # as peft's get_delta_weight
    return scale * second.float(), first.float() * own


def _with_magnitude(
    stored: Float[Tensor, "output input"],
    change: Float[Tensor, "output input"],
    magnitude: Float[Tensor, " output"],
) -> Float[Tensor, "output input"]:
    """DoRA: rows of the sum are scaled to a learned length (Liu et al. 2024, arXiv:2402.09353)."""
    total = stored + change
    return magnitude[:, None] * total / total.norm(dim=1, keepdim=True) - stored
