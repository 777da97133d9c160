"""What the fast path reads of a model: which models it takes, and the tensors of their layers.

Every adapter that it takes turns a linear layer into one matrix and scales of its inputs and
outputs:

    y = output_scale * (x * input_scale) @ (W + scaling * (row_scale * B) (rank_scale * A)).T

LoRA has A and B. AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) scales each rank, by its singular
value over the number of ranks; VeRA (Kopiczko et al. 2024, arXiv:2310.11454) each rank and each row
of matrices that all layers share. DoRA (Liu et al. 2024, arXiv:2402.09353) gives each row of the
sum a length. IA3 (Liu et al. 2022, arXiv:2205.05638) has scales of outputs, and in the MLP of
inputs, only. Prompt tuning leaves all layers as they are, behind tokens that all questions share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftType
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from medqlora.acceleration.backbone import find_backbone

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

HEAD_DIMS = (16, 32, 64, 128, 256)
"""Widths of a head that the kernels multiply."""

_ADAPTER = "default"
_FOLDED = (LoraLayer, VeraLayer, IA3Layer, LNTuningLayer)
_TRAINED = (".lora_", ".vera_lambda_", ".ia3_l.", ".ln_tuning_layers.")
"""In the names of what those train."""


class Stored(NamedTuple):
    """The base's weight in 4 bits, see `operators.effective_weight`; or `packed` is all of it."""

    packed: Tensor
    absmax: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_offset: Tensor | None = None
    code: Tensor | None = None


class Adapter(NamedTuple):
    """The tensors of one layer's adapter, those that its method has.

    Attributes:
        lora_a: (rank, in_features).
        lora_b: (out_features, rank).
        rank_scale: Factors on the rows of `lora_a`, of any shape with as many numbers.
        rank_count: One number that the product is divided by.
        row_scale: (out_features,), factors on the rows of `lora_b`.
        magnitude: (out_features,), lengths of the rows of weight and product together.
        input_scale: Factors on the layer's input, of any shape with as many numbers.
        output_scale: Likewise on its output.
    """

    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    rank_scale: Tensor | None = None
    rank_count: Tensor | None = None
    row_scale: Tensor | None = None
    magnitude: Tensor | None = None
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None


class Linear(NamedTuple):
    """One linear layer and its adapter."""

    stored: Stored
    adapter: Adapter


class Layer(NamedTuple):
    """The tensors of one decoder layer."""

    input_norm: Tensor
    post_norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear


# --- which models it takes ------------------------------------------------------------------------


def why_not_fused(model: nn.Module) -> str | None:
    """Why a model cannot take the fast path.

    Args:
        model: A Gemma, with or without an adapter.

    Returns:
        The reason, to follow "because"; None if it can.
    """
    device = next(find_backbone(model).parameters()).device
    if device.type not in ("cuda", "cpu"):
        return f"the model is on {device.type}, not on CUDA or the CPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU has no bfloat16 matrix units (compute capability below 8.0)"
    return why_other_layers(model) or (why_no_kernels(model) if device.type == "cuda" else None)


def why_other_layers(model: nn.Module) -> str | None:
    """Why a model is none whose layers the fast path computes, wherever it is."""
    backbone: Any = find_backbone(model)
    config = backbone.config
    if config.model_type != "gemma":
        return f"it is made for Gemma 1, not for {config.model_type}"
    if config.hidden_act not in ("gelu", "gelu_pytorch_tanh") or config.attention_bias:
        return "the activation or the attention bias is not Gemma's"
    adapters, dtypes = set(), set()
    for name, module in linears(backbone):
        base, state = _base(module), quant_state(module)
        if (state is None and not is_whole(base)) or base.bias is not None:
            return f"{name} is stored neither in 4 bits nor in 16 or 32, or has a bias"
        if state is not None and state.nested and state.state2.blocksize != 256:
            return "the block constants are not quantised in blocks of 256"
        dtypes.add(compute_dtype(module))
        if (reason := why_not_folded(module)) is not None:
            return reason
        adapters |= {scaling_and_dropout(module)} - {None}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float32}:
        return "it computes all layers in bfloat16 or all in float32"
    if (prompt := virtual_tokens(model)) is None and learns_prompt(model):
        return "its virtual tokens are not learned as they are"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [
        name
        for name, p in trained.items()
        if p is not prompt and not any(part in name for part in _TRAINED)
    ]
    if others:
        return f"{others[0]} is trained, which is no part of an adapter that it folds"
    for norm in [*(norm for layer in backbone.layers for norm in _norms(layer)), backbone.norm]:
        if (reason := why_not_folded(norm)) is not None:
            return reason
    if len(adapters) > 1:
        return "the adapter's scaling or dropout differs between layers"
    return None


def learns_prompt(model: nn.Module) -> bool:
    """Whether learned embeddings go before every question, of whatever kind."""
    if getattr(model, "_adapters_disabled", False):  # as in `PeftModel.disable_adapter`
        return False
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.is_prompt_learning


def virtual_tokens(model: nn.Module) -> Tensor | None:
    """The embeddings that prompt tuning learns; None without it.

    References:
        Lester et al. 2021, arXiv:2104.08691.
    """
    if not learns_prompt(model):
        return None
    adapted: Any = model
    if adapted.active_peft_config.peft_type != PeftType.PROMPT_TUNING:
        return None
    return adapted.prompt_encoder[_ADAPTER].embedding.weight


def why_no_kernels(model: nn.Module) -> str | None:
    """Why the kernels for CUDA do not take the layers of a model that the fast path computes."""
    backbone: Any = find_backbone(model)
    if backbone.config.head_dim not in HEAD_DIMS:
        return f"its heads are {backbone.config.head_dim} wide, not a power of two from 16 to 256"
    for name, module in linears(backbone):
        base, state = _base(module), quant_state(module)
        if compute_dtype(module) != torch.bfloat16 or (state and state.blocksize > 128):
            return "it computes in bfloat16 with blocks of at most 128 weights"
        if base.out_features % 64 or base.in_features % 128:
            size = f"{base.out_features} x {base.in_features}"
            return f"{name} is {size}, not a multiple of 64 x 128"
    return None


def why_not_folded(module: Any) -> str | None:
    """Why the adapter of a linear layer or of a norm, if there is one, cannot be folded."""
    if not isinstance(module, BaseTunerLayer):
        return None
    adapter: Any = module
    if not isinstance(module, _FOLDED):
        return f"it folds no adapters of the kind {type(module).__module__.split('.')[2]}"
    names = [name for part in adapter.adapter_layer_names for name in getattr(adapter, part)]
    if set(names) != {_ADAPTER} or adapter.active_adapters != [_ADAPTER]:
        return "there is more than one adapter"
    if adapter.disable_adapters or adapter.merged:
        return "the adapter is switched off or merged"
    if isinstance(module, LoraLayer):
        variant = adapter.lora_variant.get(_ADAPTER)
        if adapter.lora_bias.get(_ADAPTER) or (variant is not None and not _has_magnitude(adapter)):
            return "the adapter is a variant of LoRA"
        found = scaling_and_dropout(adapter)
        if _has_magnitude(adapter) and found and found[1]:
            return "DoRA with dropout drops what the base reads as well"
    return None


def _has_magnitude(adapter: Any) -> bool:
    variant = adapter.lora_variant.get(_ADAPTER)
    return type(variant).__name__ == "DoraLinearVariant"


def is_whole(base: Any) -> bool:
    """Whether a layer's weight is an ordinary matrix of 16 or 32 bit."""
    return (
        type(base) is nn.Linear
        and type(base.weight.data) is Tensor
        and base.weight.dtype in (torch.bfloat16, torch.float32)
    )


# --- what it reads --------------------------------------------------------------------------------


def linears(backbone: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of all decoder layers, with their names within its halves."""
    for layer in backbone.layers:
        yield from zip(LINEARS, _linears(layer), strict=True)


def _linears(layer: Any) -> list[Any]:
    return [getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name) for name in LINEARS]


def _norms(layer: Any) -> list[Any]:
    return [layer.input_layernorm, layer.post_attention_layernorm]


def adapted_modules(backbone: Any) -> list[Any]:
    """The linear layers and norms of the first decoder layer with an adapter, else of the last."""
    modules: list[Any] = []
    for layer in backbone.layers:
        modules = [*_linears(layer), *_norms(layer)]
        if any(isinstance(module, BaseTunerLayer) for module in modules):
            break
    return modules


def _base(module: Any) -> Any:
    """A linear layer without its adapter."""
    return getattr(module, "base_layer", module)


def quant_state(module: Any) -> Any:
    """How a linear layer is stored in 4 bits; None if it is not."""
    return getattr(getattr(_base(module), "weight", None), "quant_state", None)


def compute_dtype(module: Any) -> torch.dtype:
    """What a linear layer computes in."""
    base = _base(module)
    return getattr(base, "compute_dtype", None) or base.weight.dtype


def scaling_and_dropout(module: Any) -> tuple[float, float] | None:
    """The factor on the product of A and B, and the share of inputs dropped; None without them."""
    if isinstance(module, VeraLayer):
        scaling, dropout = 1.0, module.vera_dropout
    elif isinstance(module, LoraLayer):
        scaling, dropout = float(module.scaling[_ADAPTER]), module.lora_dropout
    else:
        return None
    return scaling, float(getattr(dropout[_ADAPTER], "p", 0.0))  # Identity has none


def read_layer(layer: Any) -> Layer:
    """The tensors of a decoder layer, in place."""
    return Layer(
        norm_weight(layer.input_layernorm),
        norm_weight(layer.post_attention_layernorm),
        *(Linear(_stored(module), _adapter(module)) for module in _linears(layer)),
    )


def norm_weight(norm: Any) -> Tensor:
    """The weight of a norm, or of the one that is trained in its place."""
    trained: Any = norm.ln_tuning_layers[_ADAPTER] if isinstance(norm, LNTuningLayer) else norm
    return trained.weight


def _stored(module: Any) -> Stored:
    base, state = _base(module), quant_state(module)
    if state is None:
        return Stored(base.weight)
    nested = state.nested
    return Stored(
        base.weight.data.view(torch.uint8),  # for FSDP they are kept in the type of other weights
        state.absmax,
        state.state2.absmax if nested else None,
        state.state2.code if nested else None,
        state.offset if nested else None,
        state.code,
    )


def _adapter(layer: nn.Module) -> Adapter:
    module: Any = layer
    if isinstance(layer, AdaLoraLayer):
        a, b, values = (getattr(module, f"lora_{kind}")[_ADAPTER] for kind in "ABE")
        return Adapter(a, b, rank_scale=values, rank_count=module.ranknum[_ADAPTER])
    if isinstance(layer, LoraLayer):
        a, b = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
        lengths = module.lora_magnitude_vector
        magnitude = lengths[_ADAPTER].weight if _has_magnitude(module) else None
        return Adapter(a, b, magnitude=magnitude)
    if isinstance(layer, VeraLayer):
        on_ranks, on_rows = module.vera_lambda_d[_ADAPTER], module.vera_lambda_b[_ADAPTER]
        shared_a, shared_b = (t[_ADAPTER] for t in (module.vera_A, module.vera_B))
        a = shared_a[:, : module.in_features].to(on_ranks.device)
        b = shared_b[: module.out_features].to(on_rows.device)
        return Adapter(a, b, rank_scale=on_ranks, row_scale=on_rows)
    if isinstance(layer, IA3Layer):
        scale = module.ia3_l[_ADAPTER]
        return Adapter(**{"input_scale" if module.is_feedforward else "output_scale": scale})
    return Adapter()


def largest_weight(module: Any) -> Tensor:
    """The largest absolute weight of a layer's base; where it is in 4 bits, of any block."""
    state = quant_state(module)
    if state is None:
        return _base(module).weight.detach().abs().max()
    if not state.nested:
        return state.absmax.max()
    import bitsandbytes.functional as bnb

    return (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).max()


def without_some_columns(layer: Layer, share: float) -> Layer:
    """A layer whose adapters have lost columns of A: the same inputs dropped of all tokens."""

    def dropped(linear: Linear) -> Linear:
        a = linear.adapter.lora_a
        if a is None:
            return linear
        kept = F.dropout(torch.ones(a.shape[1], device=a.device), share)
        return linear._replace(adapter=linear.adapter._replace(lora_a=a * kept))

    return layer._replace(
        **{
            name: dropped(value)
            for name, value in layer._asdict().items()
            if isinstance(value, Linear)
        }
    )
