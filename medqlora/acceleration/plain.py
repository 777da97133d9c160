"""The operators of the fast path in plain torch: what the Triton kernels have to agree with.

Attention is computed over all pairs of tokens of a row and then masked, which is fine for a test
and nothing to train with.
"""

import torch
from torch import Tensor


def effective_weight(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    code: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    out_features: int,
    in_features: int,
    block_size: int,
    out_scale: float,
    float8: bool,
    transpose: bool,
    again: bool,
) -> Tensor:
    """See `operators.effective_weight`."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    constants = absmax.float()
    if absmax_scale is not None:
        assert absmax_code is not None
        assert absmax_offset is not None
        scales = absmax_scale.repeat_interleave(256)[: absmax.numel()]
        constants = absmax_code[absmax.long()] * scales + absmax_offset
    weight = code[codes.long()].view(-1, block_size) * constants[:, None]
    weight = weight.view(out_features, in_features)
    if lora_a is not None and lora_b is not None:
        weight = weight + scaling * (lora_b.float() @ lora_a.float())
    weight = (weight * out_scale).to(torch.float8_e4m3fn if float8 else torch.bfloat16)
    return weight.t().contiguous() if transpose else weight


def lora_gradient(grad: Tensor, down: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `operators.lora_gradient`."""
    return (grad.float() @ lora_b.float()).to(grad.dtype), grad.float().t() @ down.float()


def question_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    num_heads: int,
    scale: float,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """See `operators.question_attention`."""
    scores = _scores(query, key, boundaries, num_heads, scale, prefix)
    log_sum = scores.logsumexp(-1)
    out = (scores - log_sum[..., None]).exp() @ _heads(value, query, num_heads)
    return _tokens(out).to(query.dtype), log_sum.t().contiguous()


def question_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    boundaries: Tensor,
    num_heads: int,
    scale: float,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operators.question_attention_backward`."""
    scores = _scores(query, key, boundaries, num_heads, scale, prefix)
    shares = (scores - log_sum.t()[..., None]).exp()
    grad, q, k, v, o = (_heads(t, query, num_heads) for t in (grad_out, query, key, value, out))
    grad_scores = shares * (grad @ v.mT - (grad * o).sum(-1, keepdim=True)) * scale
    group = query.shape[1] // key.shape[1]
    grad_key, grad_value = (
        _tokens(t.unflatten(0, (-1, group)).sum(1)) for t in (grad_scores.mT @ q, shares.mT @ grad)
    )
    grad_query = _tokens(grad_scores @ k)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _scores(
    query: Tensor, key: Tensor, boundaries: Tensor, num_heads: int, scale: float, prefix: int
) -> Tensor:
    """(head, query, key) in float32, -inf where a token does not see another."""
    token = torch.arange(query.shape[0], device=query.device)
    piece = torch.searchsorted(boundaries[1:].contiguous(), token, right=True)
    seen = (piece[:, None] == piece) | (token < prefix)
    seen &= token[:, None] >= token
    scores = _heads(query, query, num_heads) @ _heads(key, query, num_heads).mT
    return (scores * scale).masked_fill(~seen, float("-inf"))


def _heads(x: Tensor, query: Tensor, num_heads: int) -> Tensor:
    """(token, head * width) as (head, token, width) in float32, shared heads repeated."""
    split = x.float().unflatten(1, (-1, query.shape[1] // num_heads)).transpose(0, 1)
    return split.repeat_interleave(num_heads // split.shape[0], dim=0)


def _tokens(x: Tensor) -> Tensor:
    """The inverse of `_heads`, but for what was repeated."""
    return x.transpose(0, 1).flatten(1)
