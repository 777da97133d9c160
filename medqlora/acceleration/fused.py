"""Gemma over packed rows with every adapter folded into its weight: the fast path.

A decoder layer becomes one pure function of tensors, compiled once and called for every layer.
Four things make it fast. The adapter is added while the weight is dequantised, so that a layer
costs one matrix product forward and one for the gradient of its input, as if there were no
adapter. The adapter's own gradients take one pass over the gradient of the output. Attention
reads the projections as they are, without repeated heads, and questions of tens of tokens in one
program each. And behind the last attention only the tokens that are scored are computed at all.
Which adapters that goes for stands in `folding`.

On CUDA kernels of our own do the first three, in bfloat16. On the CPU plain torch does, in float32
or bfloat16, of any size; there attention is `packed_attention`, and stays outside of compiled code.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medqlora.acceleration.attention import cover_padding, kept_attention, packed_attention
from medqlora.acceleration.backbone import (
    Checkpointing,
    behind,
    find_backbone,
    offloaded,
    run_as,
)
from medqlora.acceleration.folding import (
    Adapter,
    Layer,
    Linear,
    Stored,
    adapted_modules,
    compute_dtype,
    largest_weight,
    learns_prompt,
    linears,
    norm_weight,
    quant_state,
    read_layer,
    scaling_and_dropout,
    virtual_tokens,
    why_not_folded,
    without_some_columns,
)
from medqlora.acceleration.graphs import RecordedPasses, Row
from medqlora.acceleration.operators import MAX_RANK, matmul
from medqlora.schema import PackedBatch

MIN_RANK = 16
"""Smallest rank that the matrix units multiply; smaller adapters are padded with zeros, and others
up to `MAX_RANK` to a power of two."""

FLOAT8_MAX = 448.0
"""Largest float8_e4m3fn."""

MLP_CHUNKS, MIN_CHUNK = 4, 256
"""Where the MLP is computed again backwards, so many pieces of a row, of so many tokens or more."""


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
        block_size: Weights that share a constant, where they are in 4 bits.
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
    run_as(model, FusedBackbone(model, **options))


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
        for _, module in linears(self._backbone):
            if (state := quant_state(module)) is not None:
                block_size = state.blocksize
            dtype = compute_dtype(module)
            largest = max(largest, float(largest_weight(module))) if float8 else 0.0
            adapter = scaling_and_dropout(module) or adapter
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
        self.layers = [read_layer(layer) for layer in self._backbone.layers]
        self._folded = adapted_modules(self._backbone)
        self._prompt = virtual_tokens(model)
        self.row_dropout = adapter[1] if dropout_per == "row" else 0.0
        self.gradient_checkpointing = gradient_checkpointing

        whole = next(self._backbone.parameters()).is_cuda

        def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(function, dynamic=False, fullgraph=whole) if compile else function

        self._run = compiled(decoder_layer)
        self._attend, self._mlp = compiled(attention_block), compiled(mlp_block)
        self._angles: tuple[Tensor, Tensor] | None = None
        self._recorded = RecordedPasses(self.forward, model) if cuda_graphs else None

    def holds_for(self, model: nn.Module) -> bool:
        """Whether the adapter of a model is still the one that was folded, neither off nor merged.

        Looked up in one layer: peft changes them together.
        """
        if virtual_tokens(model) is not self._prompt or (
            self._prompt is None and learns_prompt(model)
        ):
            return False
        now = adapted_modules(self._backbone)
        return all(
            module is folded and why_not_folded(module) is None
            for module, folded in zip(now, self._folded, strict=True)
        )

    def forget(self) -> None:
        """Let go of what was recorded."""
        if self._recorded is not None:
            self._recorded.clear()

    def __call__(self, batch: PackedBatch, keep: Tensor | None) -> Float[Tensor, "kept width"]:
        """Hidden states of the tokens to keep, or of all with None, after the final norm."""
        run = self._recorded or self.forward
        return run(Row.of(batch, keep), batch.max_length, batch.prefix_length)

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
        boundaries, positions, kept = row.cu_seqlens, row.position_ids, row.keep
        hidden = self._backbone.embed_tokens(row.input_ids[None])[0].to(self.sizes.dtype)
        learning = torch.is_grad_enabled()
        if learning:
            # One compilation then serves the first layer as well.
            hidden = hidden.detach().requires_grad_()
        num_virtual = 0 if self._prompt is None else self._prompt.shape[0]
        if self._prompt is not None:
            hidden = torch.cat([self._prompt.to(hidden.dtype), hidden])
            positions, boundaries = behind(num_virtual, positions, boundaries)
            max_length, prefix_length = max_length + num_virtual, prefix_length + num_virtual
            kept = None if kept is None else kept + num_virtual
        if boundaries.is_cuda:
            boundaries = F.pad(cover_padding(boundaries, hidden.shape[0], max_length), (1, 0))
        cosine, sine = self._rotary(max_length, positions)
        training = learning and self._backbone.training
        sizes = replace(self.sizes, prefix_length=prefix_length)
        if not training:
            sizes = replace(sizes, dropout=0.0)
        run = self._recomputed if learning and self.gradient_checkpointing else self._run
        layers = self.layers
        if training and self.row_dropout:
            layers = [without_some_columns(layer, self.row_dropout) for layer in layers]
        for index, layer in enumerate(layers):
            keep = kept if index == len(self.layers) - 1 else None
            hidden = run(hidden, layer, boundaries, cosine, sine, keep, sizes)
        if kept is None:
            hidden = hidden[num_virtual:]
        return rms_norm(hidden, norm_weight(self._backbone.norm), self.sizes.eps)

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
            self.forget()  # passes that read the shorter ones
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
    key = rotate(_linear(x, layer.k, sizes.kv_width, sizes.width, sizes), cosine, sine)
    value = _linear(x, layer.v, sizes.kv_width, sizes.width, sizes)
    if keep is not None:
        hidden = hidden.index_select(0, keep)
        if not x.is_cuda:  # the kernel takes whole questions
            x, cosine, sine = (t.index_select(0, keep) for t in (x, cosine, sine))
    query = rotate(_linear(x, layer.q, width, sizes.width, sizes), cosine, sine)
    attended = _attention(query, key, value, boundaries, keep, sizes)
    if _adds_in_place(hidden, layer.o, sizes):
        hidden = hidden.clone()  # the input is the caller's
    return _add_linear(hidden, attended, layer.o, sizes.width, width, sizes)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    keep: Tensor | None,
    sizes: Sizes,
) -> Tensor:
    """Of the tokens to keep; on the CPU `query` is theirs alone."""
    scale, prefix = sizes.head_dim**-0.5, sizes.prefix_length
    if query.is_cuda:
        attended = torch.ops.medqlora.question_attention(
            query, key, value, boundaries, sizes.num_heads, scale, prefix
        )[0]
        return attended if keep is None else attended.index_select(0, keep)
    q, k, v = (t.unflatten(1, (-1, sizes.head_dim)) for t in (query, key, value))
    if keep is None:
        return _attend(q, k, v, boundaries, len(q), scale, prefix).flatten(1)
    return _attend_kept(q, k, v, keep, boundaries, scale, prefix).flatten(1)


# On the CPU every row has a layout of other shapes.
_attend: Any = torch.compiler.disable(packed_attention)
_attend_kept: Any = torch.compiler.disable(kept_attention)


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

    On the CPU, where it is compiled or, in float32, where nothing is learned, its approximation by
    tanh is written with a sigmoid, which is the same function in a third to half of the time.
    """
    if gate.device.type == "cpu" and approximate == "tanh":
        slope = 2 * math.sqrt(2 / math.pi)
        if torch.compiler.is_compiling():
            x = gate.float()
            share = torch.sigmoid(x * (slope + 0.044715 * slope * x * x))
            return (x * share).to(gate.dtype) * up
        if gate.dtype == torch.float32 and not torch.is_grad_enabled():
            share = torch.addcmul(gate.new_full((), slope), gate, gate, value=0.044715 * slope)
            return share.mul_(gate).sigmoid_().mul_(gate).mul_(up)
    return F.gelu(gate, approximate=approximate) * up


def rotate(
    x: Float[Tensor, "token width"],
    cosine: Float[Tensor, "token half"],
    sine: Float[Tensor, "token half"],
) -> Float[Tensor, "token width"]:
    """Rotary position embedding of each head: Su et al. 2021, arXiv:2104.09864."""
    cosine, sine = cosine[:, None], sine[:, None]
    halves = x.unflatten(-1, (-1, 2, cosine.shape[-1]))
    first, second = halves[:, :, 0], halves[:, :, 1]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return torch.stack(turned, dim=2).flatten(1)


def _linear(x: Tensor, linear: Linear, out_features: int, in_features: int, sizes: Sizes) -> Tensor:
    stored, adapter = linear
    x = _scaled(x, adapter.input_scale)
    a, b = _factors(adapter, sizes)
    fixed = (out_features, in_features, sizes)
    if sizes.dropout and a is not None and b is not None:
        # Only what the adapter reads is dropped, so it cannot be folded into the weight.
        down = F.dropout(x, sizes.dropout) @ a.t()
        plain = _FoldedLinear.apply(x, None, None, *stored, *fixed, False)
        return torch.addmm(plain, down, b.t(), alpha=sizes.scaling)
    if adapter.magnitude is not None:
        y, lengths = _FoldedLinear.apply(x, a, b, *stored, *fixed, True)
        return _scaled(y, adapter.magnitude / lengths)
    y = _FoldedLinear.apply(x, a, b, *stored, *fixed, False)
    return _scaled(y, adapter.output_scale)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Columns times their scales, in float32 and rounded once."""
    return x if scale is None else (x.float() * scale.flatten().float()).to(x.dtype)


def _factors(adapter: Adapter, sizes: Sizes) -> tuple[Tensor | None, Tensor | None]:
    """The adapter's two matrices with their scales, of a rank that the matrix units multiply."""
    a, b = adapter.lora_a, adapter.lora_b
    if a is None or b is None:
        return None, None
    if adapter.rank_scale is not None:
        scale = adapter.rank_scale.reshape(-1, 1)
        # As peft has it, with a little more than the number of ranks.
        a = a * (scale if adapter.rank_count is None else scale / (adapter.rank_count + 1e-5))
    if adapter.row_scale is not None:
        b = b * adapter.row_scale[:, None]
    a, b, rank = a.to(sizes.dtype), b.to(sizes.dtype), a.shape[0]
    short = max(MIN_RANK, 1 << (rank - 1).bit_length()) - rank if rank <= MAX_RANK else 0
    return (F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))) if short > 0 else (a, b)


def _adds_in_place(hidden: Tensor, linear: Linear, sizes: Sizes) -> bool:
    scaled = linear.adapter.magnitude is not None or linear.adapter.output_scale is not None
    return hidden.is_cuda and not (torch.is_grad_enabled() or sizes.weight_scale or scaled)


def _add_linear(
    hidden: Tensor, x: Tensor, linear: Linear, out_features: int, in_features: int, sizes: Sizes
) -> Tensor:
    """`hidden + _linear(x)`; in place where `_adds_in_place`."""
    if not _adds_in_place(hidden, linear, sizes):
        return hidden + _linear(x, linear, out_features, in_features, sizes)
    x = _scaled(x, linear.adapter.input_scale)
    fixed = (out_features, in_features, sizes)
    weight = _weight(linear.stored, *_factors(linear.adapter, sizes), fixed, backward=False)
    torch.ops.medqlora.add_product_(hidden, x, weight)
    return hidden


class _FoldedLinear(torch.autograd.Function):
    """`x @ (W + scaling * B A).T`, with W dequantised on the way forward and on the way back.

    With the lengths of the rows of that weight, which have no gradient, where they are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        packed: Tensor,
        absmax: Tensor | None,
        absmax_scale: Tensor | None,
        absmax_code: Tensor | None,
        absmax_offset: Tensor | None,
        code: Tensor | None,
        out_features: int,
        in_features: int,
        sizes: Sizes,
        with_lengths: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        stored = Stored(packed, absmax, absmax_scale, absmax_code, absmax_offset, code)
        ctx.fixed = (out_features, in_features, sizes)
        weight = _weight(stored, lora_a, lora_b, ctx.fixed, backward=False)
        kept = weight if sizes.keep_weights and not x.is_cuda else None
        ctx.save_for_backward(x, lora_a, lora_b, kept, *stored)
        if not with_lengths:
            return _product(x, weight, sizes)
        lengths = weight.float().norm(dim=1) / (sizes.weight_scale or 1.0)
        ctx.mark_non_differentiable(lengths)
        return _product(x, weight, sizes), lengths

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
                weight = _weight(Stored(*stored), lora_a, lora_b, ctx.fixed, backward=True)
            else:
                weight = weight.t()
            grad_x = _product(grad, weight, sizes)
        if lora_a is not None and ctx.needs_input_grad[1]:
            # The wider of input and gradient is passed over once, the other one twice.
            if not x.is_cuda or lora_a.shape[0] > MAX_RANK:
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
        return grad_x, grad_a, grad_b, *([None] * 10)


def _gradients(wide: Tensor, narrow: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`wide @ factor` in their type and `wide.T @ narrow` in float32; see `lora_gradient`."""
    product, gradient = torch.ops.medqlora.lora_gradient(wide, narrow, factor)
    return product.sum(0).to(wide.dtype), gradient.sum(0)


def _weight(
    stored: Stored,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    fixed: tuple[int, int, Sizes],
    *,
    backward: bool,
) -> Tensor:
    """The effective weight as (output, input) of the product it is for."""
    out_features, in_features, sizes = fixed
    float8 = sizes.weight_scale > 0
    if stored.code is None and lora_a is None and not float8:
        weight = stored.packed
    else:
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
