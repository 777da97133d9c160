"""Packed attention is ordinary causal attention within each question."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medqlora.acceleration import (
    attention,
    cover_padding,
    last_hidden,
    packed_attention,
    use_packed_attention,
)
from medqlora.acceleration.attention import _with_prefix, kept_attention
from medqlora.errors import ModelError

CU = torch.tensor([0, 5, 6, 15, 15, 15], dtype=torch.int32)


def qkv(num_tokens: int = 20, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(num_tokens, h, 8, generator=generator).requires_grad_(requires_grad)
        for h in (4, 2, 2)
    ]


def one_by_one(query, key, value, scale=None):
    """The definition, one question at a time; padding gets zeros."""
    out = torch.zeros_like(query)
    for start, end in ((0, 5), (5, 6), (6, 15)):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(2, dim=0) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        out = torch.cat([out[:start], attended.transpose(0, 1), out[end:]])
    return out


@pytest.mark.parametrize("scale", [None, 0.7])
def test_each_question_attends_to_itself_only(scale):
    query, key, value = qkv()
    out = packed_attention(query, key, value, CU, max_length=9, scale=scale)
    torch.testing.assert_close(out, one_by_one(query, key, value, scale), rtol=1e-5, atol=1e-6)


def test_boundaries_that_change_or_fall_to_another_prefix_are_laid_out_again():
    boundaries, (query, key, value) = CU.clone(), qkv()

    def attended(boundaries, prefix=0):
        return packed_attention(query, key, value, boundaries, max_length=9, prefix_length=prefix)

    first = attended(boundaries)
    assert torch.equal(attended(boundaries), first)
    boundaries[1] = 4
    assert torch.equal(attended(boundaries), attended(boundaries.clone()))
    assert not torch.equal(attended(boundaries), first)
    boundaries[0] = 2
    assert torch.equal(attended(boundaries, 2), attended(boundaries.clone(), 2))
    with torch.inference_mode():
        there = boundaries.clone()
        before = attended(there, 2)
        there[1] = 5
        assert not torch.equal(attended(there, 2), before)


def test_gradients_equal_those_of_the_definition():
    packed, single = qkv(requires_grad=True), qkv(requires_grad=True)
    weight = torch.linspace(-1, 1, 20 * 4 * 8).view(20, 4, 8)
    (packed_attention(*packed, CU, max_length=9) * weight).sum().backward()
    (one_by_one(*single) * weight).sum().backward()
    for ours, theirs in zip(packed, single, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_padding_between_boundary_and_row_end_is_zero_and_gets_no_gradient():
    query, key, value = qkv(requires_grad=True)
    out = packed_attention(query, key, value, CU, max_length=9)
    assert torch.equal(out[15:], torch.zeros_like(out[15:]))
    out.sum().backward()
    assert torch.equal(value.grad[15:], torch.zeros_like(value.grad[15:]))


@pytest.mark.parametrize(("num_tokens", "max_length"), [(20, 9), (20, 20), (40, 9), (15, 9)])
def test_covered_boundaries_reach_the_end_in_pieces_no_longer_than_a_question(
    num_tokens, max_length
):
    covered = cover_padding(CU, num_tokens, max_length)
    assert covered.dtype == torch.int32
    assert torch.equal(covered[: len(CU)], CU)
    assert covered[-1] == num_tokens
    pieces = covered.diff()
    assert pieces.min() >= 0
    assert pieces.max() <= max_length


def test_covered_padding_leaves_the_questions_alone():
    query, key, value = qkv()
    plain = packed_attention(query, key, value, CU, max_length=9)
    covered = packed_attention(query, key, value, cover_padding(CU, 20, 9), max_length=9)
    torch.testing.assert_close(covered[:15], plain[:15])


SHARED = torch.tensor([4, 6, 15, 15, 15], dtype=torch.int32)


def one_by_one_behind_a_prefix(query, key, value, scale=None):
    """Four shared tokens, then questions of 2 and 9 that see them; padding gets zeros."""
    out = torch.zeros_like(query)
    for start, end, shared in ((0, 4, 0), (4, 6, 4), (6, 15, 4)):
        q = query[start:end].transpose(0, 1)
        k, v = (torch.cat([t[:shared], t[start:end]]).transpose(0, 1) for t in (key, value))
        k, v = (t.repeat_interleave(2, dim=0) for t in (k, v))
        seen = torch.ones(end - start, shared + end - start, dtype=torch.bool).tril(shared)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        out = torch.cat([out[:start], attended.transpose(0, 1), out[end:]])
    return out


@pytest.mark.parametrize("scale", [None, 0.7])
def test_questions_attend_to_the_tokens_they_share(scale):
    packed, single = qkv(requires_grad=True), qkv(requires_grad=True)
    out = packed_attention(*packed, SHARED, max_length=13, scale=scale, prefix_length=4)
    expected = one_by_one_behind_a_prefix(*single, scale)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    weight = torch.linspace(-1, 1, 20 * 4 * 8).view(20, 4, 8)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(packed, single, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("boundaries", "prefix"), [(CU, 0), (SHARED, 4)])
def test_attention_of_some_tokens_is_theirs_among_all(boundaries, prefix):
    keep = torch.tensor([14, 4, 9, 5, 0, 0])  # in any order, and that of empty places
    packed, some = qkv(requires_grad=True), qkv(requires_grad=True)
    expected = packed_attention(*packed, boundaries, 13, prefix_length=prefix)[keep]
    query, key, value = some
    out = kept_attention(query[keep], key, value, keep, boundaries, 8**-0.5, prefix)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(some, packed, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_products_stay_in_float32_where_others_are_cast():
    """The plain layers of a 16-bit base run under autocast."""
    plain, cast = qkv(requires_grad=True), qkv(requires_grad=True)
    keep = torch.tensor([14, 4])

    def attended(query, key, value):
        some = kept_attention(query[keep], key, value, keep, CU, 8**-0.5)
        return torch.cat([packed_attention(query, key, value, CU, max_length=9), some])

    expected = attended(*plain)
    expected.square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attended(*cast)
    out.square().sum().backward()
    assert torch.equal(out, expected)
    for ours, theirs in zip(cast, plain, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("short", [0, 7])
def test_questions_too_long_to_keep_their_weights_get_the_same(monkeypatch, short):
    kept, not_kept = qkv(requires_grad=True), qkv(requires_grad=True)
    expected = packed_attention(*kept, SHARED, max_length=13, prefix_length=4)
    monkeypatch.setattr(attention, "SHORT", short)  # 7: one question is, the other is not
    out = packed_attention(*not_kept, SHARED, max_length=13, prefix_length=4)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=3e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(not_kept, kept, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=3e-6)


def test_keys_with_the_shared_ones_in_front_keep_their_order_and_use_no_empty_place():
    boundaries = F.pad(cover_padding(SHARED, 20, 13), (1, 0))  # 0 4 6 15 15 15 20 20
    cu_keys, taken, there = _with_prefix(boundaries, 4, 20)
    assert cu_keys.tolist() == [0, 4, 10, 23, 23, 23, 32, 32]
    shared = [0, 1, 2, 3]
    expected = [*shared, *shared, 4, 5, *shared, *range(6, 15), *shared, *range(15, 20)]
    assert taken[there].tolist() == expected
    assert not there[len(expected) :].any()
    assert len(there) == 20 + 4 * (len(boundaries) - 2)


def test_the_cuda_kernel_is_told_of_the_longest_keys(monkeypatch):
    """Behind shared tokens those of padding are longer than any question's."""
    told = []

    def varlen_attn(query, key, value, cu_queries, cu_keys, max_queries, max_keys, **options):
        told.extend([cu_queries.diff().max() <= max_queries, cu_keys.diff().max() <= max_keys])
        return query

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    query, key, _ = qkv(40)
    key = key.repeat_interleave(2, dim=1)
    attention._varlen(query, key, key, cover_padding(SHARED, 40, 13), 13, None, 4)
    assert told == [True, True]


@pytest.mark.parametrize("prefix", [0, 4])
def test_a_row_without_questions_attends_and_gives_no_gradient_but_zeros(prefix):
    """A process that got none of the questions has such rows."""
    packed = qkv(requires_grad=True)
    boundaries = torch.full((6,), prefix, dtype=torch.int32)
    out = packed_attention(*packed, boundaries, max_length=13, prefix_length=prefix)
    assert torch.isfinite(out).all()
    (out * 0.0).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in packed)


def test_an_adapter_that_widens_a_projection_changes_no_attention(tiny_gemma, pack, questions):
    """IA3 scales the keys in float32, while the queries of a 16-bit base stay as they are."""
    model = tiny_gemma.bfloat16()
    use_packed_attention(model)
    row = pack(questions)
    with torch.no_grad():
        expected = last_hidden(model, row)
        for layer in model.model.layers:
            layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: out.float())
        # Keys are rotated in float32 now, which rounds them once less.
        torch.testing.assert_close(last_hidden(model, row), expected, rtol=0, atol=0.05)


def test_a_model_with_a_sliding_window_is_refused(tiny_gemma):
    tiny_gemma.config.sliding_window = 4
    with pytest.raises(ModelError, match="sliding_window=4"):
        use_packed_attention(tiny_gemma)


def test_a_packed_model_refuses_an_ordinary_batch_instead_of_scoring_it_wrong(
    tiny_gemma, questions
):
    use_packed_attention(tiny_gemma)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        tiny_gemma(questions[0][None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_kernel_equals_the_padded_layout():
    query, key, value = (t.to("cuda", torch.bfloat16) for t in qkv())
    covered = cover_padding(CU.to("cuda"), 20, 9)
    kernel = packed_attention(query, key, value, covered, max_length=9)
    padded = packed_attention(query.float(), key.float(), value.float(), covered, max_length=9)
    torch.testing.assert_close(kernel.float(), padded, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_kernel_shows_shared_tokens_as_the_padded_layout_does():
    covered = cover_padding(SHARED.to("cuda"), 20, 13)
    kernel = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in qkv()]
    padded = [t.detach().float().requires_grad_() for t in kernel]
    weight = torch.linspace(-1, 1, 20 * 4 * 8, device="cuda").view(20, 4, 8)
    outs = [packed_attention(*t, covered, max_length=13, prefix_length=4) for t in (kernel, padded)]
    torch.testing.assert_close(outs[0].float(), outs[1], rtol=2e-2, atol=2e-2)
    for out in outs:
        (out.float() * weight)[:15].sum().backward()
    for ours, theirs in zip(kernel, padded, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=5e-2, atol=5e-2)
