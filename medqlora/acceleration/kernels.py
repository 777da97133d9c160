"""Triton kernels for weights under LoRA, in 4 bits or whole, and for attention of short questions.

Imported on CUDA only, by `operators`, which says what each function computes, also in plain torch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads annotations of a kernel as types of its arguments, so kernels have none but
# constexpr. ruff: noqa: D103


@triton.jit
def _effective_weight(
    packed,
    absmax,
    absmax_scale,
    absmax_code,
    absmax_offset,
    code,
    lora_a,
    lora_b,
    out,
    scaling,
    out_scale,
    N,
    K,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    NESTED: tl.constexpr,
    FOLD: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    if WHOLE:
        weight = tl.load(packed + rows[:, None] * K + columns[None, :]).to(tl.float32)
    else:
        # Two weights a byte, the first in the high half.
        bytes_ = column_block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        byte = tl.load(packed + rows[:, None] * (K // 2) + bytes_[None, :]).to(tl.int32)
        weight = tl.reshape(
            tl.join(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))), (BLOCK_N, BLOCK_K)
        )
        blocks = column_block * (BLOCK_K // BLOCK) + tl.arange(0, BLOCK_K // BLOCK)
        block = rows[:, None] * (K // BLOCK) + blocks[None, :]
        if NESTED:
            constant = tl.load(absmax_code + tl.load(absmax + block).to(tl.int32))
            constant = constant * tl.load(absmax_scale + block // 256) + tl.load(absmax_offset)
        else:
            constant = tl.load(absmax + block)
        weight = tl.reshape(
            tl.reshape(weight, (BLOCK_N, BLOCK_K // BLOCK, BLOCK)) * constant[:, :, None],
            (BLOCK_N, BLOCK_K),
        )
    if FOLD:
        ranks = tl.arange(0, RANK)
        b = tl.load(lora_b + rows[:, None] * RANK + ranks[None, :])
        a = tl.load(lora_a + ranks[:, None] * K + columns[None, :])
        weight += scaling * tl.dot(b, a)
    weight = (weight * out_scale).to(out.dtype.element_ty)
    if TRANSPOSE:
        tl.store(out + columns[None, :] * N + rows[:, None], weight)
    else:
        tl.store(out + rows[:, None] * K + columns[None, :], weight)


WEIGHT = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4}
"""The fastest tile on an H200 (`benchmarks/tune_kernels.py`)."""


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
    """See `operators.effective_weight`."""
    shape = (in_features, out_features) if transpose else (out_features, in_features)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    tile = {**WEIGHT, "BLOCK_K": max(WEIGHT["BLOCK_K"], block_size)}
    _effective_weight[(out_features // tile["BLOCK_N"], in_features // tile["BLOCK_K"])](
        packed,
        # What is not there is not read.
        *(packed if t is None else t for t in (absmax, absmax_scale, absmax_code, absmax_offset)),
        *(packed if t is None else t for t in (code, lora_a, lora_b)),
        out,
        scaling,
        out_scale,
        out_features,
        in_features,
        RANK=16 if lora_a is None else lora_a.shape[0],
        BLOCK=block_size,
        WHOLE=code is None,
        NESTED=absmax_scale is not None,
        FOLD=lora_a is not None,
        TRANSPOSE=transpose,
        **tile,
    )
    return out


@triton.jit
def _lora_gradient(
    grad,
    down,
    lora_b,
    grad_down,
    grad_b,
    T,
    N,
    splits,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_block, split = tl.program_id(0), tl.program_id(1)
    row, ranks = tl.arange(0, BLOCK_T), tl.arange(0, RANK)
    rows = row_block * BLOCK_T + row
    there = rows[:, None] < T
    grad += (row_block * BLOCK_T).to(tl.int64) * N
    h = tl.load(down + rows[:, None] * RANK + ranks[None, :], mask=there, other=0.0)
    total = tl.zeros((BLOCK_T, RANK), tl.float32)
    # Without being told, the compiler would load one number at a time.
    first = tl.multiple_of(split * (N // splits), BLOCK_N)
    for i in range(0, N // splits, BLOCK_N):
        columns = first + i + tl.arange(0, BLOCK_N)
        d = tl.load(grad + row[:, None] * N + columns[None, :], mask=there, other=0.0)
        b = tl.load(lora_b + columns[:, None] * RANK + ranks[None, :])
        total += tl.dot(d, b)
        partial = tl.dot(tl.trans(d), h)
        tl.store(grad_b + (row_block * N + columns)[:, None] * RANK + ranks[None, :], partial)
    tl.store(grad_down + (split * T + rows)[:, None] * RANK + ranks[None, :], total, mask=there)


SHORT = 1024
LORA = {"BLOCK_T": 256, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
LORA_SHORT = {"BLOCK_T": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
PROGRAMS = 132
"""What was the fastest on an H200 (`benchmarks/tune_kernels.py`); up to `SHORT` tokens another.

More programs than processors leave more to be added up.
"""


def _lora_tile(num_tokens: int) -> dict[str, int]:
    return LORA if num_tokens > SHORT else LORA_SHORT


def lora_parts(num_tokens: int, out_features: int) -> tuple[int, int]:
    """Sums over tokens and over features that `lora_gradient` leaves to be added up."""
    tile = _lora_tile(num_tokens)
    row_blocks = triton.cdiv(num_tokens, tile["BLOCK_T"])
    splits = max(1, min(out_features // tile["BLOCK_N"], PROGRAMS // row_blocks))
    while out_features % (splits * tile["BLOCK_N"]):
        splits -= 1
    return row_blocks, splits


def lora_gradient(grad: Tensor, down: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `operators.lora_gradient`."""
    num_tokens, out_features = grad.shape
    rank = lora_b.shape[1]
    row_blocks, splits = lora_parts(num_tokens, out_features)
    grad_down = torch.empty((splits, num_tokens, rank), dtype=torch.float32, device=grad.device)
    grad_b = torch.empty((row_blocks, out_features, rank), dtype=torch.float32, device=grad.device)
    _lora_gradient[(row_blocks, splits)](
        grad,
        down,
        lora_b,
        grad_down,
        grad_b,
        num_tokens,
        out_features,
        splits,
        RANK=rank,
        **_lora_tile(num_tokens),
    )
    return grad_down, grad_b


@triton.jit
def _attention_forward(
    query,
    key,
    value,
    out,
    log_sum,
    boundaries,
    scale,
    prefix,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    question, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(boundaries + question)
    length = tl.load(boundaries + question + 1) - start
    shared = tl.where(question == 0, 0, prefix)
    width = tl.arange(0, WIDTH)
    q_stride, kv_stride = HEADS * WIDTH, HEADS // GROUP * WIDTH
    kv_offset = (head // GROUP) * WIDTH
    for q0 in range(split * BLOCK_Q, length, splits * BLOCK_Q):
        q_position = q0 + tl.arange(0, BLOCK_Q)
        q_there = q_position < length
        q_where = (start + q_position)[:, None] * q_stride + head * WIDTH + width[None, :]
        q = tl.load(query + q_where, mask=q_there[:, None], other=0.0)
        maximum = tl.full((BLOCK_Q,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        result = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
        for k0 in range(0, shared + tl.minimum(q0 + BLOCK_Q, length), BLOCK_K):
            k_position = k0 + tl.arange(0, BLOCK_K)
            k_there = k_position < shared + length
            k_rows = tl.where(k_position < shared, k_position, start + k_position - shared)
            k_where = k_rows[:, None] * kv_stride + kv_offset + width[None, :]
            k = tl.load(key + k_where, mask=k_there[:, None], other=0.0)
            v = tl.load(value + k_where, mask=k_there[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k)) * scale
            seen = (k_position[None, :] <= shared + q_position[:, None]) & k_there[None, :]
            score = tl.where(seen, score, -1e30)
            new_maximum = tl.maximum(maximum, tl.max(score, 1))
            probability = tl.where(seen, tl.exp(score - new_maximum[:, None]), 0.0)
            shrink = tl.exp(maximum - new_maximum)
            total = total * shrink + tl.sum(probability, 1)
            result = result * shrink[:, None] + tl.dot(probability.to(tl.bfloat16), v)
            maximum = new_maximum
        result = result / total[:, None]
        tl.store(out + q_where, result.to(tl.bfloat16), mask=q_there[:, None])
        tl.store(
            log_sum + (start + q_position) * HEADS + head, maximum + tl.log(total), mask=q_there
        )


@triton.jit
def _attention_backward_query(
    query,
    key,
    value,
    out,
    grad_out,
    log_sum,
    delta,
    grad_query,
    boundaries,
    scale,
    prefix,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    question, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(boundaries + question)
    length = tl.load(boundaries + question + 1) - start
    shared = tl.where(question == 0, 0, prefix)
    width = tl.arange(0, WIDTH)
    q_stride, kv_stride = HEADS * WIDTH, HEADS // GROUP * WIDTH
    kv_offset = (head // GROUP) * WIDTH
    for q0 in range(split * BLOCK_Q, length, splits * BLOCK_Q):
        q_position = q0 + tl.arange(0, BLOCK_Q)
        q_there = q_position < length
        q_rows = start + q_position
        q_where = q_rows[:, None] * q_stride + head * WIDTH + width[None, :]
        o = tl.load(out + q_where, mask=q_there[:, None], other=0.0)
        d = tl.load(grad_out + q_where, mask=q_there[:, None], other=0.0)
        row_delta = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
        tl.store(delta + q_rows * HEADS + head, row_delta, mask=q_there)
        q = tl.load(query + q_where, mask=q_there[:, None], other=0.0)
        lse = tl.load(log_sum + q_rows * HEADS + head, mask=q_there, other=0.0)
        grad = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
        for k0 in range(0, shared + tl.minimum(q0 + BLOCK_Q, length), BLOCK_K):
            k_position = k0 + tl.arange(0, BLOCK_K)
            k_there = k_position < shared + length
            k_rows = tl.where(k_position < shared, k_position, start + k_position - shared)
            k_where = k_rows[:, None] * kv_stride + kv_offset + width[None, :]
            k = tl.load(key + k_where, mask=k_there[:, None], other=0.0)
            v = tl.load(value + k_where, mask=k_there[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k)) * scale
            seen = (k_position[None, :] <= shared + q_position[:, None]) & k_there[None, :]
            probability = tl.where(seen, tl.exp(score - lse[:, None]), 0.0)
            slope = probability * (tl.dot(d, tl.trans(v)) - row_delta[:, None]) * scale
            grad += tl.dot(slope.to(tl.bfloat16), k)
        tl.store(grad_query + q_where, grad.to(tl.bfloat16), mask=q_there[:, None])


@triton.jit
def _with_key_gradient(
    grad_k,
    grad_v,
    k,
    v,
    query,
    grad_out,
    log_sum,
    delta,
    q_rows,
    q_there,
    seen,
    head,
    width,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # What some queries of one head add to the gradients of some keys and values.
    q_where = q_rows[:, None] * (HEADS * WIDTH) + head * WIDTH + width[None, :]
    q = tl.load(query + q_where, mask=q_there[:, None], other=0.0)
    d = tl.load(grad_out + q_where, mask=q_there[:, None], other=0.0)
    lse = tl.load(log_sum + q_rows * HEADS + head, mask=q_there, other=0.0)
    row_delta = tl.load(delta + q_rows * HEADS + head, mask=q_there, other=0.0)
    score = tl.dot(k, tl.trans(q)) * scale
    probability = tl.where(seen, tl.exp(score - lse[None, :]), 0.0)
    grad_v += tl.dot(probability.to(tl.bfloat16), d)
    slope = probability * (tl.dot(v, tl.trans(d)) - row_delta[None, :]) * scale
    grad_k += tl.dot(slope.to(tl.bfloat16), q)
    return grad_k, grad_v


@triton.jit
def _attention_backward_key(
    query,
    key,
    value,
    grad_out,
    log_sum,
    delta,
    grad_key,
    grad_value,
    boundaries,
    scale,
    T,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The query heads of a key head are shared out over PARTS programs, whose sums are added up
    # afterwards.
    question, kv_head = tl.program_id(0), tl.program_id(1)
    part, split = tl.program_id(2) % PARTS, tl.program_id(2) // PARTS
    start = tl.load(boundaries + question)
    length = tl.load(boundaries + question + 1) - start
    width = tl.arange(0, WIDTH)
    kv_stride = HEADS // GROUP * WIDTH
    for k0 in range(split * BLOCK_K, length, splits * BLOCK_K):
        k_position = k0 + tl.arange(0, BLOCK_K)
        k_there = k_position < length
        k_where = (start + k_position)[:, None] * kv_stride + kv_head * WIDTH + width[None, :]
        k = tl.load(key + k_where, mask=k_there[:, None], other=0.0)
        v = tl.load(value + k_where, mask=k_there[:, None], other=0.0)
        grad_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
        grad_v = tl.zeros((BLOCK_K, WIDTH), tl.float32)
        for i in range(GROUP // PARTS):
            head = kv_head * GROUP + part * (GROUP // PARTS) + i
            for q0 in range(k0 // BLOCK_Q * BLOCK_Q, length, BLOCK_Q):
                q_position = q0 + tl.arange(0, BLOCK_Q)
                q_there = q_position < length
                q_rows = start + q_position
                seen = (k_position[:, None] <= q_position[None, :]) & q_there[None, :]
                grad_k, grad_v = _with_key_gradient(
                    grad_k,
                    grad_v,
                    k,
                    v,
                    query,
                    grad_out,
                    log_sum,
                    delta,
                    q_rows,
                    q_there,
                    seen,
                    head,
                    width,
                    scale,
                    HEADS,
                    WIDTH,
                )
        kv_where = part * T * kv_stride + k_where
        out_type = grad_key.dtype.element_ty
        tl.store(grad_key + kv_where, grad_k.to(out_type), mask=k_there[:, None])
        tl.store(grad_value + kv_where, grad_v.to(out_type), mask=k_there[:, None])


@triton.jit
def _attention_backward_prefix(
    query,
    key,
    value,
    grad_out,
    log_sum,
    delta,
    grad_key,
    grad_value,
    scale,
    prefix,
    T,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Every token behind the prefix has seen all of it; the sums over chunks of tokens, and over the
    # query heads of a key head in PARTS, are added up afterwards.
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    part, tile = tl.program_id(2) % PARTS, tl.program_id(2) // PARTS
    width = tl.arange(0, WIDTH)
    kv_stride = HEADS // GROUP * WIDTH
    k_rows = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_there = k_rows < prefix
    k_where = k_rows[:, None] * kv_stride + kv_head * WIDTH + width[None, :]
    k = tl.load(key + k_where, mask=k_there[:, None], other=0.0)
    v = tl.load(value + k_where, mask=k_there[:, None], other=0.0)
    grad_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    grad_v = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    for i in range(GROUP // PARTS):
        head = kv_head * GROUP + part * (GROUP // PARTS) + i
        for q0 in range(0, CHUNK, BLOCK_Q):
            q_rows = prefix + chunk * CHUNK + q0 + tl.arange(0, BLOCK_Q)
            q_there = q_rows < T
            seen = k_there[:, None] & q_there[None, :]
            grad_k, grad_v = _with_key_gradient(
                grad_k,
                grad_v,
                k,
                v,
                query,
                grad_out,
                log_sum,
                delta,
                q_rows,
                q_there,
                seen,
                head,
                width,
                scale,
                HEADS,
                WIDTH,
            )
    kv_where = (chunk * PARTS + part) * prefix * kv_stride + k_where
    tl.store(grad_key + kv_where, grad_k, mask=k_there[:, None])
    tl.store(grad_value + kv_where, grad_v, mask=k_there[:, None])


FORWARD = {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
BACKWARD_QUERY = {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
BACKWARD_KEY = {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
BACKWARD_PREFIX = {"BLOCK_Q": 32, "BLOCK_K": 16, "CHUNK": 128, "num_warps": 4, "num_stages": 2}
QUERY_SPLITS, KEY_SPLITS, PARTS, PREFIX_PARTS = 4, 8, 4, 8
LONG = 8192
QUERY_SPLITS_LONG, PARTS_LONG = 2, 2
"""What was the fastest on an H200 for heads of 256 (`benchmarks/tune_kernels.py`).

Splits are programs that share the tiles of a question, so that a long one does not keep all others
waiting, parts those that share the query heads of a key head. In rows of more than `LONG` tokens,
with work for every processor, fewer of them cost less.
"""


def _query_splits(num_tokens: int) -> int:
    return QUERY_SPLITS_LONG if num_tokens > LONG else QUERY_SPLITS


def _heads(query: Tensor, key: Tensor, num_heads: int) -> dict[str, int]:
    group, width = query.shape[1] // key.shape[1], query.shape[1] // num_heads
    return {"HEADS": num_heads, "GROUP": group, "WIDTH": width}


def key_parts(num_tokens: int, group: int, prefix: int) -> tuple[int, int]:
    """Sums that the gradients of keys and of the prefix's keys are left in, to be added up."""
    chunks = triton.cdiv(num_tokens - prefix, BACKWARD_PREFIX["CHUNK"]) if prefix else 0
    parts = PARTS_LONG if num_tokens > LONG else PARTS
    return math.gcd(parts, group), math.gcd(PREFIX_PARTS, group) * chunks


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
    out = torch.empty_like(query)
    log_sum = torch.empty((query.shape[0], num_heads), dtype=torch.float32, device=query.device)
    splits = _query_splits(query.shape[0])
    _attention_forward[(boundaries.numel() - 1, num_heads, splits)](
        query,
        key,
        value,
        out,
        log_sum,
        boundaries,
        scale,
        prefix,
        splits,
        **_heads(query, key, num_heads),
        **FORWARD,
    )
    return out, log_sum


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
    num_tokens, group = query.shape[0], query.shape[1] // key.shape[1]
    parts, prefix_sums = key_parts(num_tokens, group, prefix)
    grad_query = torch.empty_like(query)
    delta = torch.empty_like(log_sum)
    of_keys = torch.empty((2, parts, *key.shape), dtype=torch.float32, device=key.device)
    shape = (2, prefix_sums, prefix, key.shape[1])
    of_prefix = torch.empty(shape, dtype=torch.float32, device=key.device)
    splits = _query_splits(num_tokens)
    num_questions, kv_heads = boundaries.numel() - 1, num_heads // group
    sizes = _heads(query, key, num_heads)
    _attention_backward_query[(num_questions, num_heads, splits)](
        query,
        key,
        value,
        out,
        grad_out,
        log_sum,
        delta,
        grad_query,
        boundaries,
        scale,
        prefix,
        splits,
        **sizes,
        **BACKWARD_QUERY,
    )
    _attention_backward_key[(num_questions, kv_heads, parts * KEY_SPLITS)](
        query,
        key,
        value,
        grad_out,
        log_sum,
        delta,
        *of_keys,
        boundaries,
        scale,
        num_tokens,
        KEY_SPLITS,
        PARTS=parts,
        **sizes,
        **BACKWARD_KEY,
    )
    if prefix:
        prefix_parts = math.gcd(PREFIX_PARTS, group)
        tiles = triton.cdiv(prefix, BACKWARD_PREFIX["BLOCK_K"])
        _attention_backward_prefix[(prefix_sums // prefix_parts, kv_heads, tiles * prefix_parts)](
            query,
            key,
            value,
            grad_out,
            log_sum,
            delta,
            *of_prefix,
            scale,
            prefix,
            num_tokens,
            PARTS=prefix_parts,
            **sizes,
            **BACKWARD_PREFIX,
        )
    return grad_query, of_keys, of_prefix
