"""The operators of the fast path: Triton kernels compute them on CUDA, libraries elsewhere.

`torch.compile` and CUDA graphs take them as they are. What plain torch and bitsandbytes compute is
what the kernels have to agree with; of it the fast path on the CPU takes `effective_weight`, and
`matmul` for its products. The attention goes over all pairs of tokens of a row, nothing to train
with.
"""

from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def _is_amd() -> bool:
    """Whether the processor is AMD's, as far as Linux tells."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


MAX_RANK = 64
"""Largest rank that the kernels fold into a weight; libraries multiply what is wider."""

ONEDNN = torch.backends.mkldnn.is_available() and _is_amd()
"""Whether oneDNN multiplies float32 matrices faster than MKL, which holds back on AMD."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of matrices; in float32 on an AMD processor by oneDNN.

    torch asks MKL there, which takes twice as long (`benchmarks/README.md`); on Intel's they are
    equal. In compiled code it is torch's choice: the compiler takes oneDNN for constant weights
    only.

    Args:
        a: (row, sum).
        b: (sum, column), of the same type; either may be transposed.

    Returns:
        (row, column).
    """
    on_cpu = a.device.type == "cpu" and a.dtype == torch.float32
    if ONEDNN and on_cpu and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def _kernels() -> ModuleType:
    from medqlora.acceleration import kernels  # Triton is there on CUDA only

    return kernels


@torch.library.custom_op("medqlora::effective_weight", mutates_args=())
def effective_weight(
    packed: Tensor,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    code: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    out_features: int,
    in_features: int,
    block_size: int,
    out_scale: float,
    dtype: torch.dtype,
    transpose: bool,
    again: bool,
) -> Tensor:
    """`dequantise(packed) + scaling * lora_b @ lora_a`, rounded once, at the end.

    The base weight lies anywhere between two 16-bit numbers before that rounding, so an adapter
    whose change is smaller than their distance still moves the right share of the weights. Of a
    rank above `MAX_RANK` on CUDA it is added to a weight that was rounded before.

    Args:
        packed: 4-bit codes, two a byte, of the row-major (out_features, in_features) weight; or
            the weight itself, in 16 or 32 bit.
        absmax: Constant of each block; 8-bit codes where it is quantised again. None if `packed` is
            the weight.
        absmax_scale: Constant of each 256 block constants, or None.
        absmax_code: The 256 values of those 8-bit codes, or None.
        absmax_offset: Mean of the block constants, or None.
        code: The 16 values of the 4-bit codes, or None.
        lora_a: (rank, in_features), or None without an adapter.
        lora_b: (out_features, rank), or None.
        scaling: `lora_alpha / r`.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        block_size: Weights that share a constant.
        out_scale: Factor on the result, for 8-bit floats.
        dtype: Of the result: bfloat16, float8_e4m3fn, or on the CPU float32.
        transpose: Return (in_features, out_features).
        again: Changes nothing. The compiler takes calls with the same arguments for one, and would
            keep the weight of the forward pass for the backward pass; told apart by this they stay
            two, which costs time and saves the memory of a weight in 16 bit.

    Returns:
        The weight.
    """
    rank = 0 if lora_a is None else lora_a.shape[0]
    if packed.is_cuda and rank <= MAX_RANK:
        return _kernels().effective_weight(
            packed,
            absmax,
            absmax_scale,
            absmax_code,
            absmax_offset,
            code,
            lora_a,
            lora_b,
            scaling,
            out_features,
            in_features,
            block_size,
            out_scale,
            dtype,
            transpose,
            again,
        )
    if code is None or absmax is None:
        weight = packed
    elif packed.is_cuda:
        stored = packed, absmax, absmax_scale, absmax_code, absmax_offset, code, None, None
        fixed = scaling, out_features, in_features, block_size, 1.0, torch.bfloat16, False, again
        weight = _kernels().effective_weight(*stored, *fixed)
    else:
        library = torch.ops.bitsandbytes
        if absmax_scale is not None and absmax_offset is not None:
            scales = absmax_scale, absmax_code, 256, torch.float32
            absmax = library.dequantize_blockwise(absmax, *scales) + absmax_offset
        weight = library.dequantize_4bit(
            packed,
            absmax,
            block_size,
            "nf4" if float(code[0]) < 0 else "fp4",  # whose first value is 0
            (out_features, in_features),
            torch.float32,
        )
    if lora_a is not None and lora_b is not None:
        # In 16 bit the sum of the product is one in 32, rounded with the weight.
        a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
        add = weight.addmm if weight is packed else weight.addmm_
        weight = add(b, a, alpha=scaling)
    if out_scale != 1:
        weight = weight * out_scale
    weight = weight.to(dtype)
    if weight is packed:
        weight = weight.clone()
    return weight.t().contiguous() if transpose else weight


@effective_weight.register_fake
def _(
    packed,
    absmax,
    absmax_scale,
    absmax_code,
    absmax_offset,
    code,
    lora_a,
    lora_b,
    scaling,
    out_features,
    in_features,
    block_size,
    out_scale,
    dtype,
    transpose,
    again,
):
    shape = (in_features, out_features) if transpose else (out_features, in_features)
    return torch.empty(shape, dtype=dtype, device=packed.device)


@torch.library.custom_op("medqlora::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """`total += x @ weight.T`, in place.

    The compiler turns a residual behind a product into one call as well, but into a copy of the
    residual first.

    Args:
        total: (row, column).
        x: (row, sum), of the same type.
        weight: (column, sum), likewise.
    """
    total.addmm_(x, weight.t())


@torch.library.custom_op("medqlora::lora_gradient", mutates_args=())
def lora_gradient(grad: Tensor, down: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """`grad @ lora_b` and `grad.T @ down` in one pass over `grad`, the largest tensor of the step.

    Both are left in parts to be added up, where the compiler adds what follows; in a fixed order,
    so that the same inputs give the same bits. Where a layer's input is
    wider than its output, the input stands for `grad`, the gradient of `down` for `down` and
    `lora_a.T` for `lora_b`; the results are `down` and the gradient of `lora_a.T`.

    Args:
        grad: Gradient of a layer's output, (token, out_features), contiguous; on CUDA bfloat16.
        down: What the adapter's first matrix made of the input, (token, rank).
        lora_b: (out_features, rank).

    Returns:
        Gradients of `down`, (part, token, rank), and of `lora_b`, (part, out_features, rank), in
        float32, both without the adapter's scaling.
    """
    if grad.is_cuda:
        return _kernels().lora_gradient(grad, down, lora_b)
    grad, down, lora_b = grad.float(), down.float(), lora_b.float()
    return (grad @ lora_b)[None], (grad.t() @ down)[None]


@lora_gradient.register_fake
def _(grad, down, lora_b):
    rows, columns = _kernels().lora_parts(*grad.shape) if grad.is_cuda else (1, 1)
    return (
        torch.empty((columns, *down.shape), dtype=torch.float32, device=grad.device),
        torch.empty((rows, *lora_b.shape), dtype=torch.float32, device=grad.device),
    )


@torch.library.custom_op("medqlora::question_attention", mutates_args=())
def question_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    num_heads: int,
    scale: float,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each question of a packed row, and to the tokens all of them share.

    Reads the projections as they come out of their matrix products: nothing is transposed and no
    key head is repeated. Made for questions of tens to hundreds of tokens: one program takes a
    whole question of one head.

    Args:
        query: (token, num_heads * width), bfloat16.
        key: (token, kv_head * width).
        value: (token, kv_head * width).
        boundaries: 0, the start of each question, then the end of the last, repeated; int32.
            Together they must cover every token.
        num_heads: Query heads.
        scale: Factor on the scores.
        prefix: Tokens at the beginning of the row that every question goes on from, which are the
            first piece within `boundaries`.

    Returns:
        The attention output, (token, num_heads * width), and the log-sum-exp of the scores,
        (token, num_heads) in float32, for the backward pass.

    References:
        Online softmax: Dao et al. 2022, arXiv:2205.14135.
    """
    if query.is_cuda:
        return _kernels().question_attention(
            query, key, value, boundaries, num_heads, scale, prefix
        )
    scores = _scores(query, key, boundaries, num_heads, scale, prefix)
    log_sum = scores.logsumexp(-1)
    out = (scores - log_sum[..., None]).exp() @ _heads(value, query, num_heads)
    return _tokens(out).to(query.dtype), log_sum.t().contiguous()


@question_attention.register_fake
def _(query, key, value, boundaries, num_heads, scale, prefix):
    log_sum = torch.empty((query.shape[0], num_heads), dtype=torch.float32, device=query.device)
    return torch.empty_like(query), log_sum


@torch.library.custom_op("medqlora::question_attention_backward", mutates_args=())
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
    """Gradients of `question_attention` for query, key and value, in a fixed order.

    Returns:
        The gradient of the query; those of key and value, (2, part, token, kv_head * width) in
        float32, whose parts are to be added up; and what the prefix adds to them, (2, part, prefix,
        kv_head * width), likewise.
    """
    if grad_out.is_cuda:
        return _kernels().question_attention_backward(
            grad_out, query, key, value, out, log_sum, boundaries, num_heads, scale, prefix
        )
    scores = _scores(query, key, boundaries, num_heads, scale, prefix)
    shares = (scores - log_sum.t()[..., None]).exp()
    grad, q, k, v, o = (_heads(t, query, num_heads) for t in (grad_out, query, key, value, out))
    grad_scores = shares * (grad @ v.mT - (grad * o).sum(-1, keepdim=True)) * scale
    group = query.shape[1] // key.shape[1]
    of_keys = torch.stack(
        [
            _tokens(t.unflatten(0, (-1, group)).sum(1))
            for t in (grad_scores.mT @ q, shares.mT @ grad)
        ]
    )
    of_prefix = of_keys.new_zeros(2, min(prefix, 1), prefix, key.shape[1])
    return _tokens(grad_scores @ k).to(query.dtype), of_keys[:, None], of_prefix


@question_attention_backward.register_fake
def _(grad_out, query, key, value, out, log_sum, boundaries, num_heads, scale, prefix):
    parts, prefix_parts = 1, min(prefix, 1)
    if query.is_cuda:
        group = query.shape[1] // key.shape[1]
        parts, prefix_parts = _kernels().key_parts(query.shape[0], group, prefix)
    of_keys = torch.empty((2, parts, *key.shape), dtype=torch.float32, device=key.device)
    return (
        torch.empty_like(query),
        of_keys,
        of_keys.new_empty(2, prefix_parts, prefix, key.shape[1]),
    )


def _keep(ctx, inputs, output):
    query, key, value, boundaries, *fixed = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries)
    ctx.fixed = fixed


def _attention_gradient(ctx, grad_out, grad_log_sum):
    *saved, boundaries = ctx.saved_tensors
    key, prefix = saved[1], ctx.fixed[-1]
    grad_query, of_keys, of_prefix = torch.ops.medqlora.question_attention_backward(
        grad_out.contiguous(), *saved, boundaries, *ctx.fixed
    )
    both = of_keys.sum(1)
    if prefix:
        both = both + F.pad(of_prefix.sum(1), (0, 0, 0, key.shape[0] - prefix))
    return (grad_query, *both.to(key.dtype), None, None, None, None)


question_attention.register_autograd(_attention_gradient, setup_context=_keep)


def _scores(
    query: Tensor, key: Tensor, boundaries: Tensor, num_heads: int, scale: float, prefix: int
) -> Tensor:
    """(head, query, key) in float32, -inf where a token does not see another."""
    token = torch.arange(query.shape[0], device=query.device)
    piece = torch.searchsorted(boundaries, token, right=True) - 1
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
