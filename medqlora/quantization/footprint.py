"""What a model's weights take, by part and by layer, and the error that storing them made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bitsandbytes.functional import get_4bit_type
from jaxtyping import Float
from torch import Tensor, nn

from medqlora.errors import ConfigError
from medqlora.quantization.checkpoint import Checkpoint, cast
from medqlora.quantization.config import BITSANDBYTES_4BIT
from medqlora.quantization.embedding import QuantizedEmbedding, TiedHead
from medqlora.quantization.linear import dequantized_weight, is_quantized, stored_tensors

PARTS = ("embedding", "attention", "mlp", "norms", "adapter", "other")


@dataclass(frozen=True)
class LayerFootprint:
    """Weights of one layer.

    Attributes:
        part: One of `PARTS`.
        num_parameters: Weights, each counted once however it is stored.
        num_bytes: Bytes of the codes and their constants.
        bits_per_weight: Bits a weight takes, constants included.
    """

    part: str
    num_parameters: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes, constants included."""
        return 8 * self.num_bytes / self.num_parameters


@dataclass(frozen=True)
class Footprint:
    """Weights of a model, each tensor counted once though two layers share it; no activations.

    Attributes:
        num_parameters: Weights of the base model and the adapter.
        num_bytes: Bytes they take, with the lookup tables and buffers under "other".
        parts: Parameters and bytes by part, all of `PARTS`.
        layers: By module path within the base model, those with weights of their own.
    """

    num_parameters: int
    num_bytes: int
    parts: dict[str, dict[str, int]]
    layers: dict[str, LayerFootprint]

    @property
    def weight_gb(self) -> float:
        """Size in GB of 10^9 bytes."""
        return self.num_bytes / 1e9

    @property
    def weight_gb_16bit(self) -> float:
        """Size in GB if every weight took 16 bits."""
        return 2 * self.num_parameters / 1e9

    @property
    def bits_per_weight(self) -> float:
        """Mean over the whole model."""
        return 8 * self.num_bytes / self.num_parameters

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "num_parameters": self.num_parameters,
            "weight_gb": self.weight_gb,
            "weight_gb_16bit": self.weight_gb_16bit,
            "bits_per_weight": self.bits_per_weight,
            "parts": self.parts,
            "layers": {
                name: {**asdict(layer), "bits_per_weight": layer.bits_per_weight}
                for name, layer in self.layers.items()
            },
        }


def footprint(model: nn.Module) -> Footprint:
    """Measure the weights a model holds, from the tensors that are really there.

    Args:
        model: A model of `load_base`, with or without a PEFT adapter.
    """
    seen: set[tuple[int, int]] = set()

    def count(tensors: list[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            key = (tensor.data_ptr(), tensor.nbytes)
            if tensor.nbytes and key not in seen:
                seen.add(key)
                total += tensor.nbytes
        return total

    layers: dict[str, LayerFootprint] = {}
    parts = {part: {"num_parameters": 0, "num_bytes": 0} for part in PARTS}
    adapters = [name for name, module in model.named_modules() if _is_adapter_layer(module)]
    for name, module in model.named_modules():
        own, shared, num_parameters = _weights(module)
        num_bytes = count(own)
        parts["other"]["num_bytes"] += count(shared)
        if not num_bytes:
            continue
        part = _part(name, module, adapters)
        parts[part]["num_parameters"] += num_parameters
        parts[part]["num_bytes"] += num_bytes
        if num_parameters:
            layers[base_name(name)] = LayerFootprint(part, num_parameters, num_bytes)
    return Footprint(
        num_parameters=sum(part["num_parameters"] for part in parts.values()),
        num_bytes=sum(part["num_bytes"] for part in parts.values()),
        parts=parts,
        layers=layers,
    )


def _weights(module: nn.Module) -> tuple[list[Tensor], list[Tensor], int]:
    """Tensors of a module itself, those that belong to no layer, and the number of its weights."""
    if is_quantized(module):
        own, tables = stored_tensors(module)
        return own, tables, _num_weights(module)
    parameters: list[Tensor] = list(module.parameters(recurse=False))
    buffers = list(module.buffers(recurse=False))
    if isinstance(module, QuantizedEmbedding):
        tables = [module.code] if module.data_type == "nf4" else []
        if module.double_quant:
            tables.append(module.constant_code)
        own = [p for p in parameters if not any(p is table for table in tables)]
        return own, [*tables, *buffers], module.num_embeddings * module.embedding_dim
    return parameters, buffers, sum(p.numel() for p in parameters)


def _num_weights(layer: nn.Module) -> int:
    return int(getattr(layer, "in_features")) * int(getattr(layer, "out_features"))  # noqa: B009


def _is_adapter_layer(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _part(name: str, module: nn.Module, adapters: list[str]) -> str:
    for adapter in adapters:
        below = name.removeprefix(f"{adapter}.")
        if name == adapter or (below != name and not f"{below}.".startswith("base_layer.")):
            return "adapter"
    if isinstance(module, (nn.Embedding, QuantizedEmbedding, TiedHead)) or "lm_head" in name:
        return "embedding"
    steps = name.split(".")
    if "norm" in steps[-1]:
        return "norms"
    if "self_attn" in steps:
        return "attention"
    return "mlp" if "mlp" in steps else "other"


def base_name(name: str) -> str:
    """Module path within the base model, whatever PEFT has wrapped around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@torch.no_grad()
def rounding_error(model: nn.Module, path: str, revision: str | None = None) -> dict[str, float]:
    """Relative error that storing each quantised layer made, against the original weights.

    The originals are read one tensor at a time, the embedding some rows at a time, so this runs
    beside a full-size model.

    Args:
        model: A quantised model of `load_base`, with or without an adapter.
        path: The path it was loaded from.
        revision: The revision it was loaded from.

    Returns:
        By module path within the base model: ||stored - original|| / ||original||, Frobenius norms
        in float32.
    """
    checkpoint = Checkpoint(path, revision)
    errors: dict[str, float] = {}
    for name, stored, original in _pairs(model, checkpoint):
        difference = norm = 0.0
        for have, want in zip(stored, original, strict=True):
            want = cast(want, torch.float32, have.device)
            difference += float((have.float() - want).square().sum())
            norm += float(want.square().sum())
        errors[name] = (difference / norm) ** 0.5 if norm else 0.0
    return errors


def code_levels(data_type: str) -> list[float]:
    """The values that a 4-bit code can take, in units of the largest weight of its block, rising.

    Args:
        data_type: "nf4" or "fp4".

    Raises:
        ConfigError: If it is another one, whose values are evenly spaced.
    """
    if data_type not in BITSANDBYTES_4BIT:
        raise ConfigError(
            f"data_type={data_type} has no table of values: its codes are evenly spaced. Give nf4 "
            "or fp4."
        )
    return sorted(get_4bit_type(data_type, device="cpu").tolist())


def within_blocks(weight: Tensor, block_size: int = 64) -> Float[Tensor, " weight"]:
    """Weights divided by the largest absolute one of their block, so that they lie in [-1, 1].

    Args:
        weight: Any shape; the last block may be shorter. A block of zeros stays zero.
        block_size: Consecutive weights that share one constant.
    """
    flat = weight.detach().float().flatten()
    largest = torch.stack([block.abs().max() for block in flat.split(block_size)])
    scale = largest.repeat_interleave(block_size)[: len(flat)]
    return torch.where(scale > 0, flat / scale, 0.0)


def _pairs(
    model: nn.Module, checkpoint: Checkpoint
) -> Iterator[tuple[str, Iterator[Tensor], Iterator[Tensor]]]:
    for path, module in model.named_modules():
        name = base_name(path)
        weight = f"{name}.weight"
        if isinstance(module, QuantizedEmbedding):
            step = 4096
            starts = range(0, module.num_embeddings, step)
            yield (
                name,
                (module.row_range(start, start + step) for start in starts),
                (rows for _, rows in checkpoint.chunks(weight, step)),
            )
        elif is_quantized(module):
            yield name, iter([dequantized_weight(module)]), iter([checkpoint.read(weight)])
