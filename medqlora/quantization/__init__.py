"""Quantization Module: how the frozen weights of a base model are stored, loaded and measured."""

from medqlora.quantization.checkpoint import Checkpoint
from medqlora.quantization.config import QuantConfig
from medqlora.quantization.embedding import (
    QuantizedEmbedding,
    TiedHead,
    chunked_logits,
    letter_rows,
)
from medqlora.quantization.footprint import (
    Footprint,
    LayerFootprint,
    code_levels,
    footprint,
    rounding_error,
    within_blocks,
)
from medqlora.quantization.kept import KeptBase
from medqlora.quantization.linear import dequantized_weight
from medqlora.quantization.loading import dequantize, load_base, local_device

__all__ = [
    "Checkpoint",
    "Footprint",
    "KeptBase",
    "LayerFootprint",
    "QuantConfig",
    "QuantizedEmbedding",
    "TiedHead",
    "chunked_logits",
    "code_levels",
    "dequantize",
    "dequantized_weight",
    "footprint",
    "letter_rows",
    "load_base",
    "local_device",
    "rounding_error",
    "within_blocks",
]
