"""Gemma over packed rows with every adapter folded into its 4-bit weight: the fast path.

A decoder layer becomes one pure function of tensors, compiled once and called for every layer.
Four things make it fast. The adapter is added while the weight is dequantised, so that a layer
costs one matrix product forward and one for the gradient of its input, as if there were no
adapter. The adapter's own gradients take one pass over the gradient of the output. Attention
reads the projections as they are, without repeated heads, and questions of tens of tokens in one
program each. And behind the last attention only the tokens that are scored are computed at all.

On CUDA kernels of our own do the first three, in bfloat16. On the CPU plain torch does, in float32
or bfloat16, of any size; there attention is `packed_attention`, and stays outside of compiled code.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medqlora.acceleration.attention import cover_padding, packed_attention
from medqlora.acceleration.backbone import FAST_PATH, Checkpointing, find_backbone, offloaded
from medqlora.acceleration.graphs import RecordedPass, Row
from medqlora.acceleration.operators import matmul
from medqlora.schema import PackedBatch

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIN_RANK = 16
"""Smallest rank that the matrix units multiply; smaller adapters are padded with zeros."""

FLOAT8_MAX = 448.0
"""Largest float8_e4m3fn."""

MLP_CHUNKS, MIN_CHUNK = 4, 256
"""Where the MLP is computed again backwards, so many pieces of a row, of so many tokens or more."""


class Linear(NamedTuple):
    """The tensors of one 4-bit layer and its adapter; see `operators.effective_weight`."""

    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_code: Tensor | None
    absmax_offset: Tensor | None
    code: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None


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


@dataclass(frozen=True)
class Sizes:
    """What is the same in every layer, fixed at compilation.

    Attributes:
        num_heads: Query heads.
        head_dim: Width of a head.
        width: Width of the hidden state.
        kv_width: Key heads times `head_dim`.
        mlp_width: Width between the two halves of the MLP.
        eps: Epsilon of the norms.
        activation: Approximation of GELU, "tanh" or "none".
        scaling: `lora_alpha / r`.
        block_size: Weights that share a constant.
        weight_scale: Factor that brings the weights into the range of 8-bit floats; 0 for none.
        dropout: Share of the inputs of an adapter that are dropped, others for each token.
        keep_weights: Whether a dequantised weight may be kept for the backward pass.
        prefix_length: Tokens at the front of a row that its questions share.
        dtype: What is computed in, but for norms and sums.
    """

    num_heads: int
    head_dim: int
    width: int
    kv_width: int
    mlp_width: int
    eps: float
    activation: str
    scaling: float
    block_size: int
    weight_scale: float = 0.0
    dropout: float = 0.0
    keep_weights: bool = True
    prefix_length: int = 0
    dtype: torch.dtype = torch.bfloat16


def enable_fused(model: nn.Module, **options: Any) -> None:
    """Send `last_hidden` and `hidden_states` of a model through the fast path from now on.

    Args:
        model: A model for which `why_not_fused` returns None.
        **options: Arguments of `FusedBackbone`.
    """
    object.__setattr__(find_backbone(model), FAST_PATH, FusedBackbone(model, **options))


def disable_fused(model: nn.Module) -> None:
    """Send the rows of a model through its plain layers again."""
    vars(find_backbone(model)).pop(FAST_PATH, None)


def why_not_fused(model: nn.Module) -> str | None:
    """Why a model cannot take the fast path.

    Args:
        model: A quantised Gemma, with or without an adapter.

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
    backbone = find_backbone(model)
    config: Any = backbone.config
    if config.model_type != "gemma":
        return f"it is made for Gemma 1, not for {config.model_type}"
    if config.hidden_act not in ("gelu", "gelu_pytorch_tanh") or config.attention_bias:
        return "the activation or the attention bias is not Gemma's"
    adapters, dtypes = set(), set()
    for name, module in _linears(backbone):
        base = getattr(module, "base_layer", module)
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        if state is None or base.bias is not None:
            return f"{name} is not stored in 4 bits without bias"
        if state.nested and state.state2.blocksize != 256:
            return "the block constants are not quantised in blocks of 256"
        dtypes.add(base.compute_dtype)
        if (reason := _why_not_folded(module)) is not None:
            return reason
        if hasattr(module, "base_layer"):
            adapters.add(_scaling_and_dropout(module))
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float32}:
        return "it computes all layers in bfloat16 or all in float32"
    others = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    if others:
        return f"{others[0]} is trained, which is no part of a LoRA adapter"
    if len(adapters) > 1:
        return "the adapter's scaling or dropout differs between layers"
    return None


def why_no_kernels(model: nn.Module) -> str | None:
    """Why the kernels for CUDA do not take the layers of a model that the fast path computes."""
    for name, module in _linears(find_backbone(model)):
        base = getattr(module, "base_layer", module)
        out_features, in_features = base.weight.quant_state.shape
        if base.compute_dtype != torch.bfloat16 or base.weight.quant_state.blocksize > 128:
            return "it computes in bfloat16 with blocks of at most 128 weights"
        if out_features % 64 or in_features % 128:
            return f"{name} is {out_features} x {in_features}, not a multiple of 64 x 128"
        rank = module.r["default"] if hasattr(module, "base_layer") else MIN_RANK
        if rank > 64 or rank & (rank - 1):
            return f"the rank {rank} is not a power of two up to 64"
    return None


def _linears(backbone: Any, number: int | None = None) -> Iterator[tuple[str, Any]]:
    """The linear layers of one decoder layer or of all, with their names within its halves."""
    for layer in backbone.layers if number is None else [backbone.layers[number]]:
        for name in LINEARS:
            yield name, getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name)


def _why_not_folded(module: nn.Module) -> str | None:
    """Why a layer's adapter, if it has one, cannot take the fast path."""
    if not hasattr(module, "base_layer"):
        return None
    if not hasattr(module, "lora_A") or type(module).__name__ not in ("Linear4bit", "Linear"):
        return f"the adapter is a {type(module).__name__}, not plain LoRA"
    adapter: Any = module
    if list(adapter.lora_A) != ["default"] or adapter.active_adapters != ["default"]:
        return "there is more than one adapter"
    if adapter.disable_adapters or adapter.merged:
        return "the adapter is switched off or merged"
    if adapter.lora_variant or adapter.lora_bias["default"]:
        return "the adapter is a variant of LoRA"
    return None


def _scaling_and_dropout(adapter: Any) -> tuple[float, float]:
    dropout = getattr(adapter.lora_dropout["default"], "p", 0.0)  # Identity has none
    return float(adapter.scaling["default"]), float(dropout)


class FusedBackbone:
    """The fast path of one model; reads its weights in place and copies none.

    Args:
        model: A model for which `why_not_fused` returns None.
        compile: Compile the layer function; off only to test against.
        float8: Multiply in 8-bit floats, scaled by token and by model; gradients of the adapter
            stay in 16 bit. Faster on Hopper and later; rounds weights and activations to 3 bits of
            mantissa.
        gradient_checkpointing: What is computed again backwards: nothing, "mlp", or with True and
            "offload" attention as well. The MLP is then computed in pieces of a row, so that its
            wide tensors never exist for the whole of it; "offload" keeps what is left in main
            memory.
        cuda_graphs: Record training passes once and replay them: for short rows, where launching
            kernels takes longer than running them.
        dropout_per: Whether an adapter drops other inputs for each "token", or the same in a whole
            "row", which leaves it folded into its weight.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compile: bool = True,
        float8: bool = False,
        gradient_checkpointing: Checkpointing = False,
        cuda_graphs: bool = False,
        dropout_per: Literal["token", "row"] = "token",
    ) -> None:
        self._backbone: Any = find_backbone(model)
        config = self._backbone.config
        adapter, largest, block_size, dtype = (0.0, 0.0), 0.0, 64, torch.bfloat16
        for _, module in _linears(self._backbone):
            base = getattr(module, "base_layer", module)
            state = base.weight.quant_state
            block_size, dtype = state.blocksize, base.compute_dtype
            largest = max(largest, float(_largest_weight(state))) if float8 else 0.0
            if hasattr(module, "lora_A"):
                adapter = _scaling_and_dropout(module)
        self.sizes = Sizes(
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            width=config.hidden_size,
            kv_width=config.num_key_value_heads * config.head_dim,
            mlp_width=config.intermediate_size,
            eps=config.rms_norm_eps,
            activation="tanh" if config.hidden_act == "gelu_pytorch_tanh" else "none",
            scaling=adapter[0],
            block_size=block_size,
            # Twice the largest weight leaves room for what the adapter adds.
            weight_scale=2.0 ** math.floor(math.log2(FLOAT8_MAX / (2 * largest)))
            if float8
            else 0.0,
            dropout=adapter[1] if dropout_per == "token" else 0.0,
            keep_weights=not gradient_checkpointing,
            dtype=dtype,
        )
        self.layers = [_layer(layer) for layer in self._backbone.layers]
        self._seen = next(
            (
                number
                for number in range(len(self.layers))
                if any(hasattr(m, "lora_A") for _, m in _linears(self._backbone, number))
            ),
            0,
        )
        self._folded = [module for _, module in _linears(self._backbone, self._seen)]
        self.row_dropout = adapter[1] if dropout_per == "row" else 0.0
        self.gradient_checkpointing = gradient_checkpointing

        whole = next(self._backbone.parameters()).is_cuda

        def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(function, dynamic=False, fullgraph=whole) if compile else function

        self._run = compiled(decoder_layer)
        self._attend, self._mlp = compiled(attention_block), compiled(mlp_block)
        self._angles: tuple[Tensor, Tensor] | None = None
        self.cuda_graphs = cuda_graphs
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._graphs: dict[Any, RecordedPass] = {}

    @property
    def holds(self) -> bool:
        """Whether the adapter is still the one that was folded, neither off nor merged.

        Looked up in one layer: peft changes them together.
        """
        now = (module for _, module in _linears(self._backbone, self._seen))
        return all(
            module is folded and _why_not_folded(module) is None
            for module, folded in zip(now, self._folded, strict=True)
        )

    def last_hidden(self, batch: PackedBatch) -> Float[Tensor, "question width"]:
        """Hidden state of the last prompt token of each question; see `backbone.last_hidden`."""
        return self._call(batch, batch.last)

    def hidden_states(self, batch: PackedBatch) -> Float[Tensor, "token width"]:
        """Hidden states of every token of a row; see `backbone.hidden_states`."""
        return self._call(batch, None)

    def _call(self, batch: PackedBatch, keep: Tensor | None) -> Tensor:
        row = Row(batch.input_ids, batch.position_ids, batch.cu_seqlens, keep)
        forward = functools.partial(
            self.forward, max_length=batch.max_length, prefix_length=batch.prefix_length
        )
        if not (self.cuda_graphs and torch.is_grad_enabled() and self._parameters):
            return forward(row)
        shapes = tuple(None if t is None else tuple(t.shape) for t in row)
        kind = shapes, batch.max_length, batch.prefix_length
        if kind not in self._graphs:
            self._graphs[kind] = RecordedPass(forward, row, self._parameters)
        return self._graphs[kind](row)

    def forward(
        self, row: Row, max_length: int, prefix_length: int = 0
    ) -> Float[Tensor, "kept width"]:
        """Run every layer.

        Args:
            row: The tensors of one packed row.
            max_length: Upper bound of a question's length.
            prefix_length: Tokens at the front of the row that its questions share.

        Returns:
            Hidden states after the final norm, of the tokens to keep.
        """
        boundaries = row.cu_seqlens
        if boundaries.is_cuda:
            covering = cover_padding(boundaries, row.input_ids.shape[0], max_length)
            boundaries = F.pad(covering, (1, 0))
        cosine, sine = self._rotary(max_length, row.position_ids)
        hidden = self._backbone.embed_tokens(row.input_ids[None])[0].to(self.sizes.dtype)
        learning = torch.is_grad_enabled()
        if learning:
            # One compilation then serves the first layer as well.
            hidden = hidden.detach().requires_grad_()
        training = learning and self._backbone.training
        sizes = replace(self.sizes, prefix_length=prefix_length)
        if not training:
            sizes = replace(sizes, dropout=0.0)
        run = self._recomputed if learning and self.gradient_checkpointing else self._run
        layers = self.layers
        if training and self.row_dropout:
            layers = [_without_some_columns(layer, self.row_dropout) for layer in layers]
        for index, layer in enumerate(layers):
            keep = row.keep if index == len(self.layers) - 1 else None
            hidden = run(hidden, layer, boundaries, cosine, sine, keep, sizes)
        return rms_norm(hidden, self._backbone.norm.weight, self.sizes.eps)

    def _recomputed(
        self,
        hidden: Tensor,
        layer: Layer,
        boundaries: Tensor,
        cosine: Tensor,
        sine: Tensor,
        keep: Tensor | None,
        sizes: Sizes,
    ) -> Tensor:
        """`decoder_layer` with what is computed again backwards; the MLP piece by piece."""
        offload = self.gradient_checkpointing == "offload"
        with offloaded() if offload else contextlib.nullcontext():

            def again(function: Callable[..., Tensor], x: Tensor, *fixed: Any) -> Tensor:
                # What is handed over by the closure is held as it is, not saved, nor offloaded.
                return checkpoint(
                    lambda x: function(x, *fixed),
                    x,
                    use_reentrant=False,
                    preserve_rng_state=sizes.dropout > 0,
                )

            fixed = (layer, boundaries, cosine, sine, keep, sizes)
            if self.gradient_checkpointing == "mlp":
                hidden = self._attend(hidden, *fixed)
            else:
                hidden = again(self._attend, hidden, *fixed)
            size = max(MIN_CHUNK, -(-hidden.shape[0] // MLP_CHUNKS))
            return torch.cat([again(self._mlp, x, layer, sizes) for x in hidden.split(size)])

    def _rotary(self, max_length: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._angles is None or self._angles[0].shape[0] < max_length:
            frequencies = self._backbone.rotary_emb.inv_freq.float().to(positions.device)
            angles = (
                torch.arange(max_length, device=positions.device).float()[:, None] * frequencies
            )
            # In the type that transformers hands to attention.
            self._angles = angles.cos().to(self.sizes.dtype), angles.sin().to(self.sizes.dtype)
        cosine, sine = self._angles
        return cosine[positions], sine[positions]


def rms_norm(
    hidden: Float[Tensor, "token width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "token width"]:
    """Gemma's norm: computed in float32, scaled by one plus the weight, rounded at the end.

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    x = hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * (1.0 + weight.float())).to(hidden.dtype)


def decoder_layer(
    hidden: Float[Tensor, "token width"],
    layer: Layer,
    boundaries: Int[Tensor, " boundary"],
    cosine: Float[Tensor, "token half"],
    sine: Float[Tensor, "token half"],
    keep: Int[Tensor, " question"] | None,
    sizes: Sizes,
) -> Float[Tensor, "kept width"]:
    """One Gemma decoder layer over a packed row.

    Args:
        hidden: Hidden states of all tokens.
        layer: The layer's tensors.
        boundaries: On CUDA 0, then the start of each question; together they cover the row. On the
            CPU those of `PackedBatch`.
        cosine: Of each token's rotary angles.
        sine: Likewise.
        keep: Tokens that are needed behind this layer; None for all. Attention still sees all.
        sizes: What is fixed.

    Returns:
        Hidden states of the tokens that are kept.
    """
    attended = attention_block(hidden, layer, boundaries, cosine, sine, keep, sizes)
    return mlp_block(attended, layer, sizes)


def attention_block(
    hidden: Float[Tensor, "token width"],
    layer: Layer,
    boundaries: Int[Tensor, " boundary"],
    cosine: Float[Tensor, "token half"],
    sine: Float[Tensor, "token half"],
    keep: Int[Tensor, " question"] | None,
    sizes: Sizes,
) -> Float[Tensor, "kept width"]:
    """The first half of a layer, added to its input; see `decoder_layer`."""
    x = rms_norm(hidden, layer.input_norm, sizes.eps)
    width = sizes.num_heads * sizes.head_dim
    query = _linear(x, layer.q, width, sizes.width, sizes)
    key = _linear(x, layer.k, sizes.kv_width, sizes.width, sizes)
    query, key = rotate(query, key, cosine, sine)
    value = _linear(x, layer.v, sizes.kv_width, sizes.width, sizes)
    attended = _attention(query, key, value, boundaries, sizes)
    if keep is not None:
        hidden, attended = hidden.index_select(0, keep), attended.index_select(0, keep)
    if _adds_in_place(hidden, sizes):
        hidden = hidden.clone()  # the input is the caller's
    return _add_linear(hidden, attended, layer.o, sizes.width, width, sizes)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, sizes: Sizes
) -> Tensor:
    if query.is_cuda:
        scale = sizes.head_dim**-0.5
        return torch.ops.medqlora.question_attention(
            query, key, value, boundaries, sizes.num_heads, scale, sizes.prefix_length
        )[0]
    return _uncompiled_attention(query, key, value, boundaries, sizes)  # pyright: ignore[reportCallIssue]


@torch.compiler.disable
def _uncompiled_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, sizes: Sizes
) -> Tensor:
    """On the CPU every row has a layout of other shapes."""
    query, key, value = (t.unflatten(1, (-1, sizes.head_dim)) for t in (query, key, value))
    scale, length = sizes.head_dim**-0.5, query.shape[0]
    out = packed_attention(query, key, value, boundaries, length, scale, sizes.prefix_length)
    return out.flatten(1)


def mlp_block(
    hidden: Float[Tensor, "token width"], layer: Layer, sizes: Sizes
) -> Float[Tensor, "token width"]:
    """The second half of a layer, added to its input; each token by itself.

    Where nothing is learned, on CUDA, it is added in place: `hidden` is the first half's result.
    """
    x = rms_norm(hidden, layer.post_norm, sizes.eps)
    gate = _linear(x, layer.gate, sizes.mlp_width, sizes.width, sizes)
    up = _linear(x, layer.up, sizes.mlp_width, sizes.width, sizes)
    inner = geglu(gate, up, sizes.activation)
    return _add_linear(hidden, inner, layer.down, sizes.width, sizes.mlp_width, sizes)


def geglu(
    gate: Float[Tensor, "token inner"], up: Float[Tensor, "token inner"], approximate: str
) -> Float[Tensor, "token inner"]:
    """GELU of one half times the other: Shazeer 2020, arXiv:2002.05202.

    In float32 on the CPU, where nothing is learned, its approximation by tanh is written with a
    sigmoid, which is the same function in a third of the time.
    """
    plain = gate.device.type == "cpu" and gate.dtype == torch.float32 and approximate == "tanh"
    if plain and not torch.is_grad_enabled():
        slope = 2 * math.sqrt(2 / math.pi)
        share = torch.addcmul(gate.new_full((), slope), gate, gate, value=0.044715 * slope)
        return share.mul_(gate).sigmoid_().mul_(gate).mul_(up)
    return F.gelu(gate, approximate=approximate) * up


def rotate(
    query: Float[Tensor, "token width"],
    key: Float[Tensor, "token kv_width"],
    cosine: Float[Tensor, "token half"],
    sine: Float[Tensor, "token half"],
) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token kv_width"]]:
    """Rotary position embedding of each head: Su et al. 2021, arXiv:2104.09864."""
    cosine, sine = cosine[:, None], sine[:, None]

    def rotated(x: Tensor) -> Tensor:
        halves = x.unflatten(-1, (-1, 2, cosine.shape[-1]))
        first, second = halves[:, :, 0], halves[:, :, 1]
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return torch.stack(turned, dim=2).flatten(1)

    return rotated(query), rotated(key)


def _linear(x: Tensor, linear: Linear, out_features: int, in_features: int, sizes: Sizes) -> Tensor:
    a, b = linear.lora_a, linear.lora_b
    if sizes.dropout and a is not None and b is not None:
        # Only what the adapter reads is dropped, so it cannot be folded into the weight.
        down = F.dropout(x, sizes.dropout) @ a.to(sizes.dtype).t()
        plain = _FoldedLinear.apply(x, None, None, *linear[:6], out_features, in_features, sizes)
        return torch.addmm(plain, down, b.to(sizes.dtype).t(), alpha=sizes.scaling)
    a, b = _factors(linear, sizes)
    return _FoldedLinear.apply(x, a, b, *linear[:6], out_features, in_features, sizes)


def _factors(linear: Linear, sizes: Sizes) -> tuple[Tensor | None, Tensor | None]:
    """The adapter's two matrices, of a rank that the matrix units multiply."""
    if linear.lora_a is None or linear.lora_b is None:
        return None, None
    a, b = linear.lora_a.to(sizes.dtype), linear.lora_b.to(sizes.dtype)
    short = MIN_RANK - a.shape[0]
    return (F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))) if short > 0 else (a, b)


def _adds_in_place(hidden: Tensor, sizes: Sizes) -> bool:
    return hidden.is_cuda and not torch.is_grad_enabled() and not sizes.weight_scale


def _add_linear(
    hidden: Tensor, x: Tensor, linear: Linear, out_features: int, in_features: int, sizes: Sizes
) -> Tensor:
    """`hidden + _linear(x)`; in place where `_adds_in_place`."""
    if not _adds_in_place(hidden, sizes):
        return hidden + _linear(x, linear, out_features, in_features, sizes)
    fixed = (out_features, in_features, sizes)
    weight = _weight(linear[:6], *_factors(linear, sizes), fixed, backward=False)
    torch.ops.medqlora.add_product_(hidden, x, weight)
    return hidden


class _FoldedLinear(torch.autograd.Function):
    """`x @ (W + scaling * B A).T`, with W dequantised on the way forward and on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_code: Tensor | None,
        absmax_offset: Tensor | None,
        code: Tensor,
        out_features: int,
        in_features: int,
        sizes: Sizes,
    ) -> Tensor:
        stored = (packed, absmax, absmax_scale, absmax_code, absmax_offset, code)
        ctx.fixed = (out_features, in_features, sizes)
        weight = _weight(stored, lora_a, lora_b, ctx.fixed, backward=False)
        kept = weight if sizes.keep_weights and not x.is_cuda else None
        ctx.save_for_backward(x, lora_a, lora_b, kept, *stored)
        return _product(x, weight, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, weight, *stored = ctx.saved_tensors
        sizes = ctx.fixed[2]
        grad = grads[0].contiguous()
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            # Row-major operands of the product grad @ weight; 8-bit products want both along the
            # sum.
            if weight is None:
                weight = _weight(tuple(stored), lora_a, lora_b, ctx.fixed, backward=True)
            else:
                weight = weight.t()
            grad_x = _product(grad, weight, sizes)
        if lora_a is not None and ctx.needs_input_grad[1]:
            # The wider of input and gradient is passed over once, the other one twice.
            if not x.is_cuda:
                grad_a = matmul(matmul(grad, lora_b).t(), x)
                grad_b = matmul(matmul(x, lora_a.t()).t(), grad).t()
            elif x.shape[1] > grad.shape[1]:
                down, grad_a = _gradients(x, grad @ lora_b, lora_a.t().contiguous())
                grad_a, grad_b = grad_a.t(), grad.t() @ down
            else:
                grad_down, grad_b = _gradients(grad, x @ lora_a.t(), lora_b)
                grad_a = grad_down.t() @ x
            grad_a = (grad_a * sizes.scaling).to(lora_a.dtype)
            grad_b = (grad_b * sizes.scaling).to(lora_b.dtype)
        return grad_x, grad_a, grad_b, *([None] * 9)


def _gradients(wide: Tensor, narrow: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`wide @ factor` in their type and `wide.T @ narrow` in float32; see `lora_gradient`."""
    product, gradient = torch.ops.medqlora.lora_gradient(wide, narrow, factor)
    return product.sum(0).to(wide.dtype), gradient.sum(0)


def _weight(
    stored: tuple[Any, ...],
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    fixed: tuple[int, int, Sizes],
    *,
    backward: bool,
) -> Tensor:
    """The effective weight as (output, input) of the product it is for."""
    out_features, in_features, sizes = fixed
    float8 = sizes.weight_scale > 0
    weight = torch.ops.medqlora.effective_weight(
        *stored,
        lora_a,
        lora_b,
        sizes.scaling,
        out_features,
        in_features,
        sizes.block_size,
        sizes.weight_scale if float8 else 1.0,
        torch.float8_e4m3fn if float8 else sizes.dtype,
        backward and float8,
        backward and not sizes.keep_weights,
    )
    return weight.t() if backward and not float8 else weight


def _product(x: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
    """`x @ weight.T`, in their type or with both rounded to 8-bit floats."""
    if not sizes.weight_scale:
        return matmul(x, weight.t())
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
    rounded = (x.float() / scale).to(torch.float8_e4m3fn)
    weight_scale = torch.full(
        (1, weight.shape[0]), 1 / sizes.weight_scale, device=x.device, dtype=torch.float32
    )
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rounded,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        *(_stored(getattr(attention if name[0] in "qkvo" else mlp, name)) for name in LINEARS),
    )


def _without_some_columns(layer: Layer, share: float) -> Layer:
    """A layer whose adapters have lost columns of A: the same inputs dropped of all tokens."""

    def dropped(linear: Linear) -> Linear:
        a = linear.lora_a
        if a is None:
            return linear
        kept = F.dropout(torch.ones(a.shape[1], device=a.device), share)
        return linear._replace(lora_a=a * kept)

    return layer._replace(
        **{
            name: dropped(value)
            for name, value in layer._asdict().items()
            if isinstance(value, Linear)
        }
    )


def adapter_dropout(model: nn.Module) -> float:
    """Share of its inputs that the adapter of a model drops in training."""
    adapters = (m for m in find_backbone(model).modules() if hasattr(m, "lora_dropout"))
    return max((_scaling_and_dropout(adapter)[1] for adapter in adapters), default=0.0)


def _stored(module: Any) -> Linear:
    base = getattr(module, "base_layer", module)
    state = base.weight.quant_state
    nested = state.nested
    has_adapter = hasattr(module, "lora_A")
    return Linear(
        base.weight.data,
        state.absmax,
        state.state2.absmax if nested else None,
        state.state2.code if nested else None,
        state.offset if nested else None,
        state.code,
        module.lora_A["default"].weight if has_adapter else None,
        module.lora_B["default"].weight if has_adapter else None,
    )


def _largest_weight(state: Any) -> Tensor:
    if not state.nested:
        return state.absmax.max()
    import bitsandbytes.functional as bnb

    return (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).max()
