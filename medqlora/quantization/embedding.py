"""A token embedding in 8 or 4 bits, and the output head that is served from the same storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from jaxtyping import Float, Int
from torch import Tensor, nn

from medqlora.errors import ModelError
from medqlora.quantization.config import NESTED_BLOCK_SIZE

VOCABULARY_CHUNK = 8192
"""Rows of the vocabulary that are dequantised at a time: 34 MB in bf16 at Gemma-2B's width."""


class QuantizedEmbedding(nn.Module):
    """Token embedding whose table is stored in int8 or nf4; a lookup dequantises only its own rows.

    int8 keeps one constant a row, `max|row| / 127`. nf4 keeps 4-bit NormalFloat codes with one
    constant per block of `block_size` along the row, which are 8-bit codes themselves with
    `double_quant`: the format of bitsandbytes, bit for bit. Everything in `forward` is plain tensor
    arithmetic with static shapes, so `torch.compile` takes it whole.

    Args:
        num_embeddings: Rows, one a token.
        embedding_dim: Width.
        data_type: int8 or nf4.
        block_size: Weights that share a constant; nf4 only, divides the width.
        double_quant: Whether the constants are quantised again; nf4 only.
        dtype: dtype of the rows that come out.
        embed_scale: Factor of the rows in `forward`; sqrt(width) where Gemma scales in its
            embedding.
        padding_idx: Kept for callers that read it from an embedding; nothing here is trained.
        device: Device of the storage.

    References:
        NormalFloat and double quantisation: Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """

    packed: Tensor
    scales: Tensor
    constants: Tensor
    offset: Tensor
    code: Tensor
    constant_code: Tensor
    embed_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        data_type: str,
        block_size: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        embed_scale: float = 1.0,
        padding_idx: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.data_type, self.block_size, self.dtype = data_type, block_size, dtype
        self.double_quant = double_quant and data_type == "nf4"
        self.padding_idx = padding_idx
        blocks = 1 if data_type == "int8" else embedding_dim // block_size
        bytes_a_row = embedding_dim if data_type == "int8" else embedding_dim // 2

        def store(name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
            empty = torch.zeros(tuple(shape), dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

        store(
            "packed",
            (num_embeddings, bytes_a_row),
            torch.int8 if data_type == "int8" else torch.uint8,
        )
        if self.double_quant:
            groups = -(-num_embeddings * blocks // NESTED_BLOCK_SIZE)
            store("scales", (num_embeddings, blocks), torch.uint8)
            store("constants", (groups,), torch.float32)
            store("offset", (), torch.float32)
            store("constant_code", (256,), torch.float32)
        else:
            store("scales", (num_embeddings, blocks), torch.float32)
        if data_type == "nf4":
            store("code", (16,), torch.float32)
        scale = torch.tensor(embed_scale, dtype=torch.float32, device=device)
        self.register_buffer("embed_scale", scale, persistent=False)

    @torch.no_grad()
    def fill(self, chunks: Iterable[tuple[int, Float[Tensor, "row width"]]]) -> QuantizedEmbedding:
        """Quantise a table that arrives some rows at a time.

        Args:
            chunks: Pairs of the number of the first row and the rows, in the compute dtype.

        Returns:
            The embedding itself.
        """
        device = self.packed.device
        absmax = torch.empty(self.scales.shape, dtype=torch.float32, device=device)
        for start, rows in chunks:
            rows, part = rows.to(device), slice(start, start + len(rows))
            if self.data_type == "int8":
                absmax[part] = rows.float().abs().amax(dim=1, keepdim=True) / 127
                unit = absmax[part].clamp_min(torch.finfo(torch.float32).tiny)
                self.packed[part] = (rows.float() / unit).round().clamp(-127, 127).to(torch.int8)
            else:
                packed, state = quantize_4bit(
                    rows.contiguous(), blocksize=self.block_size, quant_type="nf4"
                )
                self.packed[part] = packed.view(len(rows), -1)
                absmax[part] = state.absmax.view(len(rows), -1)
                self.code.copy_(cast(Tensor, state.code))
        if self.double_quant:
            offset = absmax.mean()
            codes, state = quantize_blockwise(
                absmax.flatten() - offset, blocksize=NESTED_BLOCK_SIZE
            )
            self.scales.copy_(codes.view_as(self.scales))
            self.offset.copy_(offset)
            self.constants.copy_(cast(Tensor, state.absmax))
            self.constant_code.copy_(cast(Tensor, state.code))
        else:
            self.scales.copy_(absmax)
        return self

    def _block_constants(self, ids: Int[Tensor, " row"]) -> Float[Tensor, "row block"]:
        scales = self.scales[ids]
        if not self.double_quant:
            return scales
        blocks = self.scales.shape[1]
        place = ids[:, None] * blocks + torch.arange(blocks, device=ids.device)
        group = self.constants[place // NESTED_BLOCK_SIZE]
        return self.constant_code[scales.int()] * group + self.offset

    def rows(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Dequantised rows of the table, without the factor `embed_scale`."""
        flat = ids.reshape(-1).long()
        packed = self.packed[flat]
        constants = self._block_constants(flat)
        if self.data_type == "int8":
            values = packed.float() * constants
        else:
            # the first of two weights is in the high half of the byte
            codes = torch.stack((packed >> 4, packed & 15), dim=-1).int()
            blocks = self.code[codes].view(len(flat), -1, self.block_size)
            values = blocks * constants[:, :, None]
        return values.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def row_range(self, start: int, stop: int) -> Float[Tensor, "row width"]:
        """Rows `start` to `stop`, as `rows` gives them but faster."""
        stop = min(stop, self.num_embeddings)
        ids = torch.arange(start, stop, device=self.packed.device)
        if self.data_type == "int8":
            return self.rows(ids)
        state = QuantState(
            absmax=self._block_constants(ids).flatten(),
            shape=torch.Size((stop - start, self.embedding_dim)),
            code=self.code,
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=self.dtype,
        )
        return dequantize_4bit(self.packed[start:stop].view(-1, 1), state)

    def forward(self, input_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Embedding of each token, scaled as the embedding it replaces scales it."""
        return self.rows(input_ids) * self.embed_scale.to(self.dtype)

    @property
    def weight(self) -> Float[Tensor, "token width"]:
        """The whole table, dequantised anew at each access: 1.05 GB for Gemma-2B."""
        return self.dequantize()

    @torch.no_grad()
    def dequantize(self) -> Float[Tensor, "token width"]:
        """The whole table in the compute dtype, without the factor `embed_scale`."""
        table = torch.empty(
            self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=self.packed.device
        )
        for start in range(0, self.num_embeddings, VOCABULARY_CHUNK):
            table[start : start + VOCABULARY_CHUNK] = self.row_range(
                start, start + VOCABULARY_CHUNK
            )
        return table

    def extra_repr(self) -> str:
        """Shape and storage."""
        return f"{self.num_embeddings}, {self.embedding_dim}, data_type={self.data_type}"


class TiedHead(nn.Module):
    """Output head that reads its rows from a quantised embedding and stores nothing itself.

    Args:
        embedding: The embedding that the head is tied to.
        chunk_size: Rows of the vocabulary that are dequantised at a time.
    """

    embedding: QuantizedEmbedding

    def __init__(self, embedding: QuantizedEmbedding, chunk_size: int = VOCABULARY_CHUNK) -> None:
        super().__init__()
        # not a submodule: its tensors would be listed, moved and saved a second time
        self.__dict__["embedding"] = embedding
        self.chunk_size = chunk_size

    @property
    def in_features(self) -> int:
        """Width."""
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        """Size of the vocabulary."""
        return self.embedding.num_embeddings

    @property
    def weight(self) -> Float[Tensor, "token width"]:
        """The whole table, dequantised anew at each access."""
        return self.embedding.dequantize()

    def forward(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape token"]:
        """Logits of the whole vocabulary, computed chunk by chunk."""
        return chunked_logits(hidden, self.embedding, self.chunk_size)

    def extra_repr(self) -> str:
        """Shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def chunked_logits(
    hidden: Float[Tensor, "*shape width"],
    embedding: QuantizedEmbedding | nn.Embedding,
    chunk_size: int = VOCABULARY_CHUNK,
) -> Float[Tensor, "*shape token"]:
    """Product of hidden states with every row of an embedding, a chunk of rows at a time.

    Beside the logits only one chunk of dequantised rows is in memory, in the forward pass and in
    the backward pass, which dequantises again.

    Args:
        hidden: Last hidden states, after the final norm.
        embedding: Frozen embedding whose rows are the output rows.
        chunk_size: Rows dequantised at a time.

    Returns:
        Logits in the dtype of `hidden`. Gradients flow to `hidden` only.
    """
    if isinstance(embedding, QuantizedEmbedding):
        get_rows, count = embedding.row_range, embedding.num_embeddings
    else:
        table = embedding.weight.detach()
        get_rows, count = (lambda start, stop: table[start:stop]), len(table)
    return cast(Tensor, _ChunkedLogits.apply(hidden, get_rows, count, chunk_size))


class _ChunkedLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        get_rows: Callable[[int, int], Tensor],
        count: int,
        chunk_size: int,
    ) -> Tensor:
        ctx.get_rows, ctx.count, ctx.chunk_size = get_rows, count, chunk_size
        logits = hidden.new_empty(*hidden.shape[:-1], count)
        for start in range(0, count, chunk_size):
            rows = get_rows(start, start + chunk_size).to(hidden.dtype)
            logits[..., start : start + chunk_size] = F.linear(hidden, rows)
        return logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        total = None
        for start in range(0, ctx.count, ctx.chunk_size):
            rows = ctx.get_rows(start, start + ctx.chunk_size).to(grad.dtype)
            # float32: the sum over the vocabulary is spread over many bf16 products
            part = (grad[..., start : start + ctx.chunk_size] @ rows).float()
            total = part if total is None else total.add_(part)
        return cast(Tensor, total).to(grad.dtype), None, None, None


@torch.no_grad()
def letter_rows(model: nn.Module, letter_ids: Sequence[int]) -> Float[Tensor, "letter width"]:
    """Rows of the output head that belong to some tokens, dequantised once and detached.

    Args:
        model: A causal language model of `load_base`, with or without an adapter.
        letter_ids: Token ids of the answer letters.

    Returns:
        The rows in the compute dtype, on the model's device.

    Raises:
        ModelError: If the head is not one that `load_base` makes, such as one with an adapter of
            its own.
    """
    head = cast(Any, model).get_output_embeddings()
    if isinstance(head, TiedHead):
        ids = torch.tensor(list(letter_ids), device=head.embedding.packed.device)
        return head.embedding.rows(ids)
    if type(head) is nn.Linear:
        return head.weight.detach()[list(letter_ids)].clone()
    raise ModelError(
        f"the output head is a {type(head).__name__}: its letter rows are not constant. Leave "
        "lm_head out of peft.target_modules and peft.modules_to_save."
    )
