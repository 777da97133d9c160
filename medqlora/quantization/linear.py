"""Quantised linear layers: making one, getting its weight back, and knowing what it stores."""

from __future__ import annotations

import importlib
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    int8_vectorwise_dequant,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from jaxtyping import Float
from torch import Tensor, nn

from medqlora.errors import ConfigError
from medqlora.quantization.config import HQQ_BITS, NESTED_BLOCK_SIZE, QuantConfig

# It says at every layer of every step that inputs are cast to fp16; int8.yaml says it once.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

WEIGHTS_A_CHUNK = 1_048_576

OUTLIER_THRESHOLD = 6.0
"""LLM.int8: input columns with a value beyond this are multiplied in 16 bit (section 3.2)."""


class Int8Linear(Linear8bitLt):
    """LLM.int8, also where peft has read the weight back, as DoRA does in every step.

    On a CPU peft then puts a copy of the weight in its place that has codes but no constants.
    """

    def init_8bit_state(self) -> None:
        """Take codes and constants over from the weight, unless `state` has them already."""
        if cast(Any, self.weight).SCB is not None:
            super().init_8bit_state()
        else:
            cast(Any, self.weight).CB = None


def empty_linear(in_features: int, out_features: int, quant: QuantConfig) -> nn.Linear:
    """A bitsandbytes layer without a weight, on the meta device."""
    if quant.data_type == "int8":
        layer = Int8Linear(
            in_features,
            out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=OUTLIER_THRESHOLD,
            device="meta",
        )
    else:
        layer = Linear4bit(
            in_features,
            out_features,
            bias=False,
            compute_dtype=quant.torch_dtype,
            compress_statistics=quant.double_quant,
            quant_type=quant.data_type,
            quant_storage=quant.storage_dtype,
            device="meta",
        )
        # On CPUs with AVX512-BF16 bitsandbytes would repack the weight at the first forward in eval
        # mode, for good: its block constants are rounded to bf16, and later training steps get no
        # gradient through the layer because the packed kernel has none.
        layer.support_avx512bf16_for_cpu = False
    return layer


def quantize_linear(
    weight: Float[Tensor, "output input"], quant: QuantConfig, device: torch.device
) -> nn.Module:
    """A frozen layer that stores `weight` as `quant` says.

    Args:
        weight: The weight in `quant.compute_dtype`, on any device.
        quant: How to store it; not `data_type=none`.
        device: Where the layer is to be; the quantisation runs there.

    Raises:
        ConfigError: If the device cannot run the layer.
    """
    out_features, in_features = weight.shape
    if quant.data_type in HQQ_BITS:
        return _hqq_linear(weight, quant, device)
    if quant.data_type.startswith("torchao"):
        return _torchao_linear(weight, quant, device)
    layer = empty_linear(in_features, out_features, quant)
    if isinstance(layer, Linear8bitLt):
        # Int8Params quantises only on the way from main memory
        parameter = cast(Any, Int8Params)(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = parameter.to(device)
    else:
        layer.weight = _params_4bit(weight, quant, device, layer)
    return layer


def _params_4bit(
    weight: Float[Tensor, "output input"],
    quant: QuantConfig,
    device: torch.device,
    layer: nn.Linear,
) -> nn.Parameter:
    """A quantised weight, bit for bit as bitsandbytes makes it from the whole.

    Some rows at a time, since on a CPU bitsandbytes takes 80 bytes a weight while it quantises.
    """
    packed, constants, code = [], [], None
    for rows in weight.split(max(1, WEIGHTS_A_CHUNK // weight.shape[1])):
        codes, state = quantize_4bit(
            rows.contiguous().to(device),
            blocksize=quant.block_size,
            quant_type=quant.data_type,
            quant_storage=quant.storage_dtype,
        )
        packed.append(codes)
        constants.append(state.absmax)
        code = state.code
    absmax, offset, nested = torch.cat(constants), None, None
    if quant.double_quant:
        offset = absmax.mean()
        absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    state = QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=quant.block_size,
        code=code,
        quant_type=quant.data_type,
        offset=offset,
        state2=nested,
    )
    cast(Any, layer).quant_state = state
    return cast(Any, Params4bit)(
        torch.cat(packed),
        requires_grad=False,
        quant_state=state,
        blocksize=quant.block_size,
        compress_statistics=quant.double_quant,
        quant_type=quant.data_type,
        quant_storage=quant.storage_dtype,
        module=layer,
        bnb_quantized=True,
    )


def _hqq_linear(weight: Tensor, quant: QuantConfig, device: torch.device) -> nn.Module:
    hqq = importlib.import_module("hqq.core.quantize")
    layer = hqq.HQQLinear.from_weights(
        weight.to(device),
        None,
        hqq.BaseQuantizeConfig(
            nbits=HQQ_BITS[quant.data_type], group_size=quant.block_size, axis=1
        ),
        compute_dtype=quant.torch_dtype,
        device=str(device),
    )
    return layer.requires_grad_(False)


def empty_hqq_linear(quant: QuantConfig, device: torch.device) -> nn.Module:
    """An HQQ layer that waits for `load_state_dict`."""
    hqq = importlib.import_module("hqq.core.quantize")
    return hqq.HQQLinear(None, None, compute_dtype=quant.torch_dtype, device=str(device))


class Int4Linear(nn.Linear):
    """A torchao int4 layer that lets gradients through; torchao's own kernel has no backward."""

    def forward(self, input: Tensor) -> Tensor:
        """The product with the weight."""
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _Int4Product.apply(input, self.weight))
        return F.linear(input, self.weight)


class _Int4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        weight = dequantize_by_product(ctx.weight).to(grad_outputs[0].dtype)
        return grad_outputs[0] @ weight, None


def dequantize_by_product(weight: Tensor, rows: int = 2048) -> Float[Tensor, "output input"]:
    """The weight of a tensor class that can only multiply, read by multiplying unit vectors."""
    out_features, in_features = weight.shape
    full = torch.empty(out_features, in_features, dtype=weight.dtype, device=weight.device)
    for start in range(0, in_features, rows):
        stop = min(start + rows, in_features)
        unit = torch.zeros(stop - start, in_features, dtype=weight.dtype, device=weight.device)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
        full[:, start:stop] = F.linear(unit, weight).T
    return full


def _torchao_linear(weight: Tensor, quant: QuantConfig, device: torch.device) -> nn.Module:
    ao = importlib.import_module("torchao.quantization")

    is_int4 = quant.data_type == "torchao_int4"
    if is_int4 and device.type != "cuda":
        raise ConfigError(
            f"quant.data_type=torchao_int4 cannot run on {device.type}: its kernel needs a CUDA "
            "device of compute capability 8.0 or more. Choose quant=nf4 or quant=hqq_4bit."
        )
    with torch.device("meta"):
        layer = (Int4Linear if is_int4 else nn.Linear)(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
    config = (
        ao.Int4WeightOnlyConfig(
            group_size=quant.block_size,
            int4_packing_format="tile_packed_to_4d",
        )
        if is_int4
        else ao.Int8WeightOnlyConfig()
    )
    ao.quantize_(layer, config)
    return layer.requires_grad_(False)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is stored in fewer than 16 bits."""
    if isinstance(module, (Linear4bit, Linear8bitLt)) or _is_hqq(module):
        return True
    return isinstance(module, nn.Linear) and _is_torchao(module.weight)


def dequantized_weight(module: nn.Module) -> Float[Tensor, "output input"]:
    """The weight that a linear layer really multiplies with, as a plain tensor.

    Raises:
        TypeError: If the module is no linear layer.
    """
    if _is_hqq(module):
        return cast(Any, module).dequantize()
    if isinstance(module, Linear4bit):
        weight = cast(Any, module.weight)
        return dequantize_4bit(weight.data, weight.quant_state).view(weight.quant_state.shape)
    if isinstance(module, Linear8bitLt):
        codes, scales = int8_state(module)
        return int8_vectorwise_dequant(codes, scales)
    if isinstance(module, nn.Linear):
        if not _is_torchao(module.weight):
            return module.weight.detach()
        if isinstance(module, Int4Linear):
            return dequantize_by_product(module.weight)
        return cast(Any, module.weight).dequantize()
    raise TypeError(f"{type(module).__name__} is no linear layer")


def stored_tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What a quantised linear layer keeps in memory: its codes and constants, and shared tables.

    The tables (16 or 256 values) are the same for all layers, so they are no part of a layer's
    bits.
    """
    if isinstance(module, Linear4bit):
        weight = cast(Any, module.weight)
        state = weight.quant_state
        own, tables = [weight.data, state.absmax], [state.code]
        if state.nested:
            own += [state.state2.absmax, state.offset]
            tables.append(state.state2.code)
        return own, tables
    if isinstance(module, Linear8bitLt):
        return list(int8_state(module)), []
    if _is_hqq(module):
        hqq = cast(Any, module)
        return [hqq.W_q, *(v for v in hqq.meta.values() if isinstance(v, Tensor))], []
    weight = cast(Any, module.weight)
    return [getattr(weight, name) for name in weight.tensor_data_names], []


def int8_state(layer: Linear8bitLt) -> tuple[Tensor, Tensor]:
    """Codes and row constants, which move from the weight to `state` at the first forward."""
    weight = cast(Any, layer.weight)
    if weight.SCB is not None:
        return weight.CB, weight.SCB
    state = cast(Any, layer.state)
    return state.CB, state.SCB


def _is_hqq(module: nn.Module) -> bool:
    return type(module).__name__ == "HQQLinear"


def _is_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao")
