"""Attention over a packed row: each question sees itself, and the tokens that all of them share.

On CUDA in 16 bit this is `torch.nn.attention.varlen.varlen_attn`; elsewhere the questions are laid
out as padded batches and put back: for `scaled_dot_product_attention`, or, short ones on the CPU,
for plain matrix products, which are faster there. All hide behind one name in transformers'
registry, so the modelling code of Gemma stays upstream's.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from medqlora.errors import ModelError

PACKED_ATTENTION = "medqlora_packed"
"""Name of this attention in transformers' registry."""

BATCHES = 4
"""Batches that the questions of a row are padded in: the more, the less padding, the more calls."""

SHORT = 512
"""Tokens of the longest questions that the CPU attends to by plain products."""

_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters
# torch 2.11 has a flag for causal attention, later versions a window of (left, right) tokens.
_CAUSAL: dict[str, Any] = (
    {"is_causal": True} if "is_causal" in _VARLEN_PARAMETERS else {"window_size": (-1, 0)}
)


def use_packed_attention(model: nn.Module) -> None:
    """Switch a model to packed attention, in place.

    Afterwards it must be called through `hidden_states` or `last_hidden`;
    `model.set_attn_implementation("sdpa")` switches back for ordinary batches.

    Args:
        model: A Gemma, with or without an adapter around it.

    Raises:
        ModelError: If its attention has a window, a logit bound or dropout, which packed rows lack.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(base, PreTrainedModel)
    for option in ("sliding_window", "attn_logit_softcapping", "attention_dropout"):
        value = getattr(base.config, option, None)
        if value:
            raise ModelError(
                f"model.path={base.config.name_or_path} has {option}={value}, which packed "
                "attention does not carry. Choose a first-generation Gemma: model=gemma_2b."
            )
    base.set_attn_implementation(PACKED_ATTENTION)


def cover_padding(
    cu_seqlens: Int[Tensor, " boundary"], num_tokens: int, max_length: int
) -> Int[Tensor, " covered"]:
    """Boundaries under which the padding behind the last question forms questions of its own.

    The CUDA kernel leaves what lies outside every question uninitialised, forward and backward;
    a NaN there would reach the weights' gradients as 0 * NaN.

    Args:
        cu_seqlens: Start of each question, then the end of the last one, repeated.
        num_tokens: Tokens of the row with its padding.
        max_length: Upper bound of a question's length; the padding is cut into pieces of it.

    Returns:
        The boundaries, then as many more as the longest possible padding needs; the last one is
        `num_tokens`.
    """
    pieces = torch.arange(1, -(-num_tokens // max_length) + 1, device=cu_seqlens.device)
    ends = cu_seqlens[-1] + pieces * max_length
    return torch.cat([cu_seqlens, ends.clamp(max=num_tokens)]).to(cu_seqlens.dtype)


def packed_attention(
    query: Float[Tensor, "token head width"],
    key: Float[Tensor, "token kv_head width"],
    value: Float[Tensor, "token kv_head width"],
    cu_seqlens: Int[Tensor, " boundary"],
    max_length: int,
    scale: float | None = None,
    prefix_length: int = 0,
) -> Float[Tensor, "token head width"]:
    """Causal attention within each question of a packed row, and to the tokens all of them share.

    Args:
        query: Queries of all tokens.
        key: Keys; each is shared by `head / kv_head` query heads.
        value: Values, shared like the keys.
        cu_seqlens: Start of each question, then the end of the last one; int32.
        max_length: Upper bound of a question's length in tokens, shared ones counted.
        scale: Factor on the scores; `width ** -0.5` if None.
        prefix_length: Tokens at the front of the row that every question goes on from; the first
            question starts behind them.

    Returns:
        Attention outputs. Tokens behind the last boundary get zeros, except from the CUDA kernel,
        which needs boundaries that cover the row (`cover_padding`).

    References:
        Multi-query attention: Shazeer 2019, arXiv:1911.02150.
    """
    # The kernel has no float32 version.
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return _padded(query, key, value, cu_seqlens, scale, prefix_length)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    return _varlen(query, key, value, cu_seqlens, max_length, scale, prefix_length)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float | None,
    prefix_length: int,
) -> Tensor:
    options = dict(_CAUSAL)
    if scale is not None and "scale" in _VARLEN_PARAMETERS:
        options["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    cu_keys = cu_seqlens
    if prefix_length:
        # The kernel lines the last query up with the last key, so a question's queries see the
        # shared tokens put before its keys.
        cu_seqlens = F.pad(cu_seqlens, (1, 0))
        cu_keys, taken, there = _with_prefix(cu_seqlens, prefix_length, query.shape[0])
        key, value = (
            torch.where(there[:, None, None], t.index_select(0, taken), 0.0) for t in (key, value)
        )
    # Pieces of padding are as long without the shared tokens as questions are with them.
    longest = max_length + prefix_length
    out = varlen_attn(query, key, value, cu_seqlens, cu_keys, max_length, longest, **options)
    assert isinstance(out, Tensor)
    return out


def _with_prefix(
    boundaries: Int[Tensor, " boundary"], prefix_length: int, num_tokens: int
) -> tuple[Int[Tensor, " boundary"], Int[Tensor, " key"], Bool[Tensor, " key"]]:
    """A layout of keys in which the shared tokens stand before those of every question.

    Args:
        boundaries: 0, the start of each question, the ends; they cover the row.
        prefix_length: Shared tokens, which are the first piece.
        num_tokens: Tokens of the row.

    Returns:
        Boundaries of the keys, the token each key is of, and whether there is a key at all: places
        for empty questions stay unused at the end, and their gradients unwritten.
    """
    lengths = boundaries.diff()
    extra = torch.where(lengths > 0, prefix_length, 0)
    extra[0] = 0
    cu_keys = F.pad((lengths + extra).cumsum(0), (1, 0)).to(boundaries.dtype)
    place = torch.arange(num_tokens + prefix_length * (len(lengths) - 1), device=lengths.device)
    # In all of `cu_keys`: compiled for CUDA before torch 2.13, a search in a slice is one in what
    # it is a slice of (pytorch issues 160964 and 182343), and other questions would be seen.
    piece = torch.searchsorted(cu_keys, place, right=True) - 1
    there = piece < len(lengths)
    piece = piece.clamp(max=len(lengths) - 1)
    inside = place - cu_keys[piece]
    own = boundaries[piece] + inside - extra[piece]
    return cu_keys, torch.where(there, torch.where(inside < extra[piece], inside, own), 0), there


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    prefix_length: int,
) -> Tensor:
    """The same through batches padded on the right, which causal attention never looks at."""
    num_tokens, dtype = query.shape[0], query.dtype
    layout = _layout_of(cu_seqlens, prefix_length)  # pyright: ignore[reportCallIssue]
    if not query.is_cuda and all(length <= SHORT for _, length in layout.shapes):
        factor = 1 / math.sqrt(query.shape[2]) if scale is None else scale
        return _ShortAttention.apply(query, key, value, layout, factor)
    if query.device.type == "cpu":
        # In 16 bit the backward pass takes ten times as long there.
        query, key, value = query.float(), key.float(), value.float()
    queries, keys, values = (_laid_out(t, layout) for t in (query, key, value))
    attended = [
        _attend(*batch, scale).flatten(0, 1) for batch in zip(queries, keys, values, strict=True)
    ]
    return _Collect.apply(torch.cat(attended), layout, num_tokens).to(dtype)


def _attend(
    query: Float[Tensor, "line place head width"],
    key: Float[Tensor, "line place kv_head width"],
    value: Float[Tensor, "line place kv_head width"],
    scale: float | None,
) -> Float[Tensor, "line place head width"]:
    """Causal attention of padded questions."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    k, v = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


class _ShortAttention(torch.autograd.Function):
    """The same for questions of few tokens on the CPU, as products whose weights are kept.

    Computes in float32. Of each batch nothing as large as its weights is made twice: on the CPU
    new memory takes longer to get than to fill.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "token head width"],
        key: Float[Tensor, "token kv_head width"],
        value: Float[Tensor, "token kv_head width"],
        layout: _Layout,
        scale: float,
    ) -> Float[Tensor, "token head width"]:
        ctx.layout, ctx.scale, ctx.num_kv_heads = layout, scale, key.shape[1]
        out, kept = query.new_empty(len(layout.token), *query.shape[1:]), []
        for place, lines in layout.batches():
            token = layout.token[place]
            q, k, v = (
                _by_key(t.index_select(0, token).float().unflatten(0, lines), key.shape[1])
                for t in (query, key, value)
            )
            weights = torch.empty(*q.shape[:2], k.shape[1])
            with torch.autocast("cpu", enabled=False):
                torch.baddbmm(weights, q, k.mT, beta=0, alpha=scale, out=weights)
                weights += _causal_mask(SHORT, q.shape[1] // k.shape[1])[
                    :, : q.shape[1], : k.shape[1]
                ]
                torch.softmax(weights, -1, out=weights)
                _write(out[place].unflatten(0, lines), torch.bmm(weights, v))
            if any(ctx.needs_input_grad):
                kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        return _taken(out, layout.place, query.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layout, scale, num_kv_heads = ctx.layout, ctx.scale, ctx.num_kv_heads
        grad, kept = grad_outputs[0], iter(ctx.saved_tensors)
        of_out = _placed(grad, layout)
        of_query = torch.empty_like(of_out)
        of_key, of_value = (
            grad.new_empty(len(layout.token), num_kv_heads, grad.shape[2]) for _ in "kv"
        )
        for place, lines in layout.batches():
            q, k, v, weights = (next(kept) for _ in range(4))
            g = _by_key(of_out[place].float().unflatten(0, lines), num_kv_heads)
            with torch.autocast("cpu", enabled=False):
                of_scores = torch.bmm(g, v.mT)
                torch.ops.aten._softmax_backward_data.out(
                    of_scores, weights, -1, weights.dtype, grad_input=of_scores
                )
                for whole, gradient in (
                    (of_query, torch.baddbmm(q, of_scores, k, beta=0, alpha=scale)),
                    (of_key, torch.baddbmm(k, of_scores.mT, q, beta=0, alpha=scale)),
                    (of_value, torch.bmm(weights.mT, g)),
                ):
                    _write(whole[place].unflatten(0, lines), gradient)
        gradients = (_gathered(t, layout, grad.shape[0]) for t in (of_query, of_key, of_value))
        return *gradients, None, None


def _by_key(
    x: Float[Tensor, "line place head width"], num_kv_heads: int
) -> Float[Tensor, "line_and_kv_head row width"]:
    """All heads that share a key as rows of one matrix; a view where that is all heads."""
    return x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _write(
    place: Float[Tensor, "line place head width"], x: Float[Tensor, "line_and_kv_head row width"]
) -> None:
    """The inverse of `_by_key`, written where it belongs."""
    num_lines, length, _, width = place.shape
    split = x.view(num_lines, x.shape[0] // num_lines, length, -1, width)
    place.view(num_lines, length, split.shape[1], -1, width).copy_(split.transpose(1, 2))


def kept_attention(
    query: Float[Tensor, "kept head width"],
    key: Float[Tensor, "token kv_head width"],
    value: Float[Tensor, "token kv_head width"],
    keep: Int[Tensor, " kept"],
    cu_seqlens: Int[Tensor, " boundary"],
    scale: float,
    prefix_length: int = 0,
) -> Float[Tensor, "kept head width"]:
    """`packed_attention` of some tokens only, such as the last of each question; in float32.

    Args:
        query: Queries of these tokens.
        key: Keys of all tokens.
        value: Values of all tokens.
        keep: The tokens, none behind the last question.
        cu_seqlens: As for `packed_attention`.
        scale: Factor on the scores.
        prefix_length: As for `packed_attention`.

    Returns:
        Attention outputs of these tokens.
    """
    layout = _layout_of(cu_seqlens, prefix_length)  # pyright: ignore[reportCallIssue]
    places, (_, heads, width), kv_heads = layout.place[keep], query.shape, key.shape[1]
    keys, values = (_laid_out(t, layout) for t in (key, value))
    attended, order = [], []
    for (batch, (_, length)), k, v in zip(layout.batches(), keys, values, strict=True):
        here = ((places >= batch.start) & (places < batch.stop)).nonzero()[:, 0]
        inside = places[here] - batch.start
        line, last = inside // length, inside % length
        q = query.index_select(0, here).float()
        q = q.view(len(here) * kv_heads, heads // kv_heads, width)
        k, v = (_by_key(t.index_select(0, line).float(), kv_heads) for t in (k, v))
        unseen = (
            torch.arange(length, device=keep.device) > last.repeat_interleave(kv_heads)[:, None]
        )
        with torch.autocast(keep.device.type, enabled=False):
            scores = torch.bmm(q * scale, k.mT).masked_fill(unseen[:, None], float("-inf"))
            attended.append(torch.bmm(scores.softmax(-1), v).view(len(here), heads, width))
        order.append(here)
    back = torch.cat(order).argsort()
    return torch.cat(attended).index_select(0, back).to(query.dtype)


@functools.cache
def _causal_mask(length: int, group: int) -> Float[Tensor, "one row place"]:
    """0 where a query sees a place and minus infinity where it does not; `group` rows a place."""
    unseen = torch.full((length, length), float("-inf")).triu(1)
    return unseen.repeat_interleave(group, dim=0)[None]


class _Layout(NamedTuple):
    """Where the tokens of a row lie in a few batches, each of questions of similar length.

    Every question has a line there: the tokens that all share, its own, and its last one again up
    to the width of its batch. Those copies change nothing: causal attention hides them from what
    comes before, and what they see themselves is not read.

    Attributes:
        shapes: Lines and width of each batch.
        token: What lies at each place, batch after batch, line after line.
        place: Where each token of the row is read, up to the end of the last question.
        shared: Places of the shared tokens, a line for each question.
    """

    shapes: list[tuple[int, int]]
    token: Int[Tensor, " place"]
    place: Int[Tensor, " token"]
    shared: Int[Tensor, "question shared"]

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, " boundary"], prefix_length: int) -> _Layout:
        """The layout of the questions between some boundaries, behind their shared tokens."""
        lengths = cu_seqlens.diff().long()
        starts = cu_seqlens[:-1][lengths > 0].long()
        lengths = lengths[lengths > 0]
        if not len(lengths):  # in the row of a process that got none, a token of padding is one
            starts, lengths = cu_seqlens[:1].long(), torch.ones_like(cu_seqlens[:1]).long()
        shapes, token, own, shared, begin = [], [], [], [], 0
        for questions in lengths.argsort().chunk(BATCHES):
            length, start = lengths[questions, None], starts[questions, None]
            width = prefix_length + int(length.max())
            inside = torch.arange(-prefix_length, width - prefix_length, device=lengths.device)
            of_question = start + torch.minimum(inside, length - 1)
            token.append(torch.where(inside < 0, inside + prefix_length, of_question).flatten())
            own.append(((inside >= 0) & (inside < length)).flatten())
            lines = torch.arange(len(questions), device=lengths.device)[:, None] * width
            shared.append(begin + lines + torch.arange(prefix_length, device=lengths.device))
            shapes.append((len(questions), width))
            begin += len(questions) * width
        tokens, first = torch.cat(token), torch.cat(shared)
        (places,) = torch.cat(own).nonzero(as_tuple=True)
        place = torch.cat([first[0], torch.empty_like(places)])
        place[tokens[places]] = places
        return cls(shapes, tokens, place, first)

    def batches(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Where the places of each batch lie, and its lines and width."""
        begin = 0
        for lines, length in self.shapes:
            yield slice(begin, begin + lines * length), (lines, length)
            begin += lines * length


_LAYOUTS = WeakTensorKeyDictionary()


@torch.compiler.disable
def _layout_of(cu_seqlens: Int[Tensor, " boundary"], prefix_length: int) -> _Layout:
    """That of a row, kept as long as its boundaries are there: all layers share it."""
    if cu_seqlens.is_inference():  # whose changes nobody counts
        return _Layout.of(cu_seqlens, prefix_length)
    made_for = cu_seqlens._version, prefix_length, torch.is_inference_mode_enabled()
    known = _LAYOUTS.get(cu_seqlens)
    if known is None or known[0] != made_for:
        known = _LAYOUTS[cu_seqlens] = (made_for, _Layout.of(cu_seqlens, prefix_length))
    return known[1]


class _Spread(torch.autograd.Function):
    """Tokens laid out; autograd's own gradient would add up row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: _Layout) -> Tensor:
        ctx.layout, ctx.num_tokens = layout, rows.shape[0]
        return rows.index_select(0, layout.token)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad_outputs[0], ctx.layout, ctx.num_tokens), None


def _laid_out(rows: Tensor, layout: _Layout) -> list[Tensor]:
    """Tokens laid out in each batch: (line, place, head, width)."""
    laid_out = _Spread.apply(rows, layout)
    return [laid_out[place].unflatten(0, lines) for place, lines in layout.batches()]


def _gathered(laid_out: Tensor, layout: _Layout, num_tokens: int) -> Tensor:
    """Gradients of tokens that were laid out; those of a shared token are added up."""
    rows, shared = _taken(laid_out, layout.place, num_tokens), layout.shared
    if (prefix_length := shared.shape[1]) > 0:
        of_questions = laid_out.index_select(0, shared.flatten())
        rows[:prefix_length] = of_questions.unflatten(0, shared.shape).sum(0)
    return rows


class _Collect(torch.autograd.Function):
    """Tokens read back into their row; zeros behind the last question."""

    @staticmethod
    def forward(ctx: Any, laid_out: Tensor, layout: _Layout, num_tokens: int) -> Tensor:
        ctx.layout = layout
        return _taken(laid_out, layout.place, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _placed(grad_outputs[0], ctx.layout), None, None


def _placed(grad: Tensor, layout: _Layout) -> Tensor:
    """Gradients of tokens at the places where these are read; zeros elsewhere."""
    zeros = grad.new_zeros(len(layout.token), *grad.shape[1:])
    return zeros.index_copy_(0, layout.place, grad[: len(layout.place)])


def _taken(laid_out: Tensor, place: Tensor, num_tokens: int) -> Tensor:
    rows = laid_out.new_empty(num_tokens, *laid_out.shape[1:])
    torch.index_select(laid_out, 0, place, out=rows[: len(place)])
    rows[len(place) :].zero_()
    return rows


def _packed_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "one head token width"],
    key: Float[Tensor, "one kv_head token width"],
    value: Float[Tensor, "one kv_head token width"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    prefix_length: int = 0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "one token head width"], None]:
    if cu_seqlens is None or max_length is None:
        raise ValueError(
            f"attention {PACKED_ATTENTION!r} was given no cu_seqlens: it knows packed rows only. "
            "Call last_hidden of medqlora.acceleration, or set_attn_implementation('sdpa') first."
        )
    # An adapter in float32 on some of the projections, such as IA3, widens only those.
    dtype = min((query.dtype, key.dtype, value.dtype), key=lambda dtype: dtype.itemsize)
    query, key, value = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    attended = packed_attention(query, key, value, cu_seqlens, max_length, scaling, prefix_length)
    return attended[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """`cu_seqlens` says which token sees which."""
    return None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
