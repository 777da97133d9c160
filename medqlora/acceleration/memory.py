"""How much device memory a training step takes, before it is tried."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from medqlora.acceleration.backbone import Checkpointing
from medqlora.acceleration.folding import LINEARS
from medqlora.acceleration.fused import MIN_CHUNK, MLP_CHUNKS

KNOWN_SHAPES: Mapping[str, Mapping[str, int]] = {
    "gemma-2b": {
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
    "gemma-7b": {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
}
"""Shapes of the published models, for a machine that has not downloaded their config."""

MOST_SCORING_TOKENS = 65_536
"""Longest row of scoring. Up to 56,576 tokens, the most tried, longer ones were no slower."""

_WORKING_MLP, _WORKING_HIDDEN = 7, 4
"""Tensors of a plain layer that live at once in its backward pass, by their width; fitted."""

_CHUNK_MLP, _CHUNK_HIDDEN = 4, 2
"""Likewise for a piece of the MLP that the fast path computes again."""


@dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of a training step by what it is for, in GB of 10^9 bytes.

    Attributes:
        weights_gb: Frozen weights of the base.
        adapter_gb: Adapter, and its gradients where they are there at the peak.
        optimizer_gb: State of the optimiser.
        activations_gb: What the forward pass keeps for the backward pass.
        working_gb: What the backward pass of one layer takes on top, dequantised weights included.
    """

    weights_gb: float
    adapter_gb: float
    optimizer_gb: float
    activations_gb: float
    working_gb: float

    @property
    def total_gb(self) -> float:
        """All of it."""
        return (
            self.weights_gb
            + self.adapter_gb
            + self.optimizer_gb
            + self.activations_gb
            + self.working_gb
        )


def estimate_training_memory(
    shape: Any,
    *,
    token_budget: int,
    weight_bits: float = 4.127,
    embedding_bits: float = 16.0,
    r: int = 16,
    targets: Collection[str] = LINEARS,
    adapter_bytes: int = 4,
    optimizer_bytes: float = 2.0,
    compute_bytes: int = 2,
    gradient_checkpointing: Checkpointing = False,
    fused: bool = True,
    float8: bool = False,
    token_dropout: bool = False,
    trains_base: bool = False,
) -> TrainingMemory:
    """Estimate the peak of the allocator in a training step on one packed row with `loss=choice`.

    With width d, key/value width k, query width q, MLP width m, L layers, T tokens a row, c tokens
    of the longest piece of an MLP that is computed again, b bytes a number (2 in bfloat16), and n
    linear weights in a layer:

        weights      n L weight_bits / 8 + vocabulary d embedding_bits / 8
        adapter      L r sum(in + out) over the linear layers that have one; through plain layers
                     as much for the gradients. On the fast path few are there at the peak: it is
                     where the backward pass begins
        optimiser    optimizer_bytes a weight of the adapter
        full         every weight of a layer 4 bytes, and b for its copy in 16 bit, in place of
                     weight_bits / 8; optimizer_bytes for each of them
        kept a layer T b ((2 d + 2 q + 2 k) + (2 d + 3 m)) on the fast path: input, its norm,
                     query, attention's result, key, value; input of the MLP, its norm, gate, up,
                     product. Norms and product are inputs of adapters, kept where there is one. Of
                     the last layer the MLP runs on the scored tokens only. The dequantised weights
                     are kept as well, b n, as computing them again takes longer than reading them;
                     not so with 8-bit floats, whose two passes want them in two layouts, nor in 16
                     bit without an adapter, where they are the base's own.
                     T b ((5 d + q + 2 k) + (2 d + 4 m)) through plain layers, which keep the
                     activation apart
        dropout      drawn for each token: of every adapter its dropped input and a byte a number
                     that says which, in place of the norms and the product on the fast path
        "mlp"        of the MLP only its input: T b d, in pieces on the fast path
        true         the inputs of attention and of the MLP, 2 T b d on the fast path; through plain
                     layers T b d, and what one layer keeps
        "offload"    likewise, in main memory; two tensors are on their way
        working      fast path: two dequantised weights and c b (2 d + 4 m) for a piece of the MLP;
                     nothing where nothing is computed again, as the peak is at the end of the
                     forward pass. Plain layers: T b (7 m + 4 d) for the gradients inside one layer,
                     and its dequantised weights, b n

    The sums follow the code of the layers; the factors of m and d in the last line are fitted.
    Peaks that torch's allocator reported for Gemma-2B stand in `tests/acceleration/test_memory.py`;
    all are met within 7 %, most within 5.
    The CUDA context and the libraries take about half a GB outside the allocator.

    Args:
        shape: A Gemma's config, or a mapping with the keys of `KNOWN_SHAPES`.
        token_budget: Tokens a row.
        weight_bits: Bits a weight of the linear layers, constants included; 16 unquantised.
        embedding_bits: Bits a weight of the embedding, which is also the head.
        r: Rank of LoRA.
        targets: Names of the linear layers that have it. AdaLoRA and DoRA take as much, VeRA as a
            rank of 1; what trains scales and norms, such as IA3, next to nothing, on none.
        adapter_bytes: Bytes a weight of the adapter.
        optimizer_bytes: Bytes of optimiser state a weight of the adapter: 2 for 8-bit Adam, 8 for
            Adam in float32.
        compute_bytes: Bytes of a number in `quant.compute_dtype`.
        gradient_checkpointing: What is computed again backwards.
        fused: Whether layers run on the fast path.
        float8: Whether it multiplies in 8-bit floats.
        token_dropout: Whether the adapter drops inputs, others for each token.
        trains_base: Whether all weights of the layers are trained, in float32, and no adapter.

    Returns:
        The estimate.

    Raises:
        ValueError: If `token_budget` is not positive.
    """
    if token_budget < 1:
        raise ValueError(f"A row has at least one token, not {token_budget}.")
    sizes = {key: int(_get(shape, key)) for key in KNOWN_SHAPES["gemma-2b"]}
    d, m, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    q = sizes["num_attention_heads"] * sizes["head_dim"]
    k = sizes["num_key_value_heads"] * sizes["head_dim"]
    linears = dict(
        zip(LINEARS, [(d, q), (d, k), (d, k), (q, d), (d, m), (d, m), (m, d)], strict=True)
    )
    a_layer = sum(inputs * outputs for inputs, outputs in linears.values())
    adapted = {name: size for name, size in linears.items() if name in targets}
    adapter = layers * r * sum(inputs + outputs for inputs, outputs in adapted.values())
    if trains_base:
        adapter, weight_bits = 0, 8 * (4 + (compute_bytes if compute_bytes < 4 else 0))
    weights = layers * a_layer * weight_bits / 8 + sizes["vocab_size"] * d * embedding_bits / 8
    updated = layers * a_layer if trains_base else adapter

    again = gradient_checkpointing
    in_flight, gradients = 0, 0 if fused else adapter
    share = 1 + 1 / compute_bytes
    of_mlp = ("gate_proj", "up_proj", "down_proj")
    dropped_attention = share * sum(size[0] for n, size in adapted.items() if n not in of_mlp)
    dropped_mlp = share * sum(size[0] for n, size in adapted.items() if n in of_mlp)
    if fused:
        norms = [d * any(name in adapted for name in half) for half in (LINEARS[:3], of_mlp[:2])]
        product = m * ("down_proj" in adapted)
        attention, mlp = d + norms[0] + 2 * q + 2 * k, d + norms[1] + 2 * m + product
        if token_dropout:
            attention += dropped_attention - norms[0]
            mlp += dropped_mlp - norms[1] - product
        if not again:
            kept = layers * attention + (layers - 1) * mlp
            as_stored = weight_bits >= 8 * compute_bytes
            made = adapted.values() if as_stored else linears.values()
            working = 0 if float8 else layers * sum(inputs * outputs for inputs, outputs in made)
        else:
            kept = layers * (attention + d if again == "mlp" else 2 * d)
            chunk = min(token_budget, max(MIN_CHUNK, -(-token_budget // MLP_CHUNKS)))
            working = 2 * d * m + chunk * (_CHUNK_MLP * m + _CHUNK_HIDDEN * d)
    else:
        attention, mlp = 5 * d + q + 2 * k, 2 * d + 4 * m
        if token_dropout:
            attention, mlp = attention + dropped_attention, mlp + dropped_mlp
        kept = layers * (attention + mlp)
        if again == "mlp":
            kept = layers * (attention + d) + mlp
        elif again:
            kept = layers * d + attention + mlp
        working = token_budget * (_WORKING_MLP * m + _WORKING_HIDDEN * d) + a_layer
    if again == "offload":
        kept -= layers * d * (2 if fused else 1)
        in_flight = 2 * d
    return TrainingMemory(
        weights_gb=weights / 1e9,
        adapter_gb=(adapter + gradients) * adapter_bytes / 1e9,
        optimizer_gb=updated * optimizer_bytes / 1e9,
        activations_gb=token_budget * (kept + in_flight) * compute_bytes / 1e9,
        working_gb=working * compute_bytes / 1e9,
    )


def scoring_tokens(shape: Any, memory: float, compute_bytes: int = 2) -> int:
    """Longest row whose scoring takes a quarter of a device's memory, beside the weights.

    Args:
        shape: As for `estimate_training_memory`.
        memory: Of the device, in bytes.
        compute_bytes: Bytes of a number in `quant.compute_dtype`.

    Returns:
        Tokens, a power of two, `MOST_SCORING_TOKENS` at most.
    """
    tokens = MOST_SCORING_TOKENS
    while tokens > 256 and scoring_bytes(shape, tokens, compute_bytes) > memory / 4:
        tokens //= 2
    return tokens


def scoring_bytes(shape: Any, token_budget: int, compute_bytes: int = 2) -> int:
    """What scoring a row takes beside the weights, in the layer under way.

    T b (3 m + 4 d) in the terms of `estimate_training_memory`.

    Args:
        shape: As for `estimate_training_memory`.
        token_budget: Tokens of the row.
        compute_bytes: Bytes of a number in `quant.compute_dtype`.

    Returns:
        Bytes.
    """
    of_mlp, of_hidden = (
        3 * int(_get(shape, "intermediate_size")),
        4 * int(_get(shape, "hidden_size")),
    )
    return token_budget * compute_bytes * (of_mlp + of_hidden)


def _get(shape: Any, key: str) -> Any:
    return shape[key] if isinstance(shape, Mapping) else getattr(shape, key)
