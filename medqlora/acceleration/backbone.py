"""The transformer without its output head, run over packed rows."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from medqlora.acceleration.attention import cover_padding
from medqlora.acceleration.graphs import RecordedPasses, Row
from medqlora.schema import PackedBatch

Checkpointing = bool | Literal["mlp", "offload"]
"""What the backward pass computes again; see `Acceleration.gradient_checkpointing`."""

RUN_AS = "medqlora_run_as"
"""Attribute of a backbone that runs its rows in another way with the same result."""


def find_backbone(model: nn.Module) -> PreTrainedModel:
    """The transformer inside a causal language model, inside an adapter or not.

    Args:
        model: A `PeftModel`, a `GemmaForCausalLM` or already a `GemmaModel`.

    Returns:
        The module that maps tokens to hidden states, with its adapters, without the output head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    backbone = getattr(base, "model", base)
    assert isinstance(backbone, PreTrainedModel)
    return backbone


def hidden_states(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "token width"]:
    """Hidden states of every token of a packed row, after the final norm.

    Where the base computes in 16 bit and the adapter is kept in float32, autocast runs the matmuls
    of the adapter in 16 bit as well; what the base computes is the same with and without it.

    Args:
        model: As for `find_backbone`, switched over by `use_packed_attention`.
        batch: One packed row.

    Returns:
        Hidden states. Those of padding are finite and mean nothing.
    """
    return _run(model, batch, None)


def last_hidden(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "question width"]:
    """Hidden state of the last prompt token of each question, from which its answer is read.

    The output head is never run: with Gemma's 256 000 tokens its logits would be the largest
    tensor of the step.

    Args:
        model: As for `hidden_states`.
        batch: One packed row.

    Returns:
        One hidden state a place; that of an empty place belongs to the row's first token.
    """
    return _run(model, batch, batch.last)


def run_as(model: nn.Module, way: Any) -> None:
    """Send `last_hidden` and `hidden_states` of a model another way from now on.

    Args:
        model: As for `find_backbone`.
        way: Called with a batch and the tokens to keep where `holds_for(model)`; None for plain
            layers.
    """
    object.__setattr__(find_backbone(model), RUN_AS, way)


def _run(model: nn.Module, batch: PackedBatch, keep: Tensor | None) -> Tensor:
    way = getattr(find_backbone(model), RUN_AS, None)
    if way is not None and way.holds_for(model):
        return way(batch, keep)
    return _plain_layers(model, Row.of(batch, keep), batch.max_length, batch.prefix_length)


def _plain_layers(model: nn.Module, row: Row, max_length: int, prefix_length: int) -> Tensor:
    """Hidden states of the tokens to keep, through the layers of transformers and peft."""
    backbone = find_backbone(model)
    embed = backbone.get_input_embeddings()
    assert isinstance(embed, nn.Module)
    device, cu_seqlens, position_ids = row.input_ids.device, row.cu_seqlens, row.position_ids
    inputs, num_virtual = embed(row.input_ids[None]), 0
    if (prompt := _virtual_tokens(model)) is not None:
        # They come before every question, so they are tokens that all questions share.
        num_virtual = prompt.shape[0]
        inputs = torch.cat([prompt.to(inputs.dtype)[None], inputs], dim=1)
        position_ids, cu_seqlens = behind(num_virtual, position_ids, cu_seqlens)
        max_length, prefix_length = max_length + num_virtual, prefix_length + num_virtual
    if device.type == "cuda":
        cu_seqlens = cover_padding(cu_seqlens, inputs.shape[1], max_length)
    half = inputs.dtype if inputs.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    # Without its cache, which a recorded pass would read where it has to cast.
    autocast = partial(torch.autocast, device.type, dtype=half, cache_enabled=False)
    with autocast(enabled=inputs.dtype == half):
        output = backbone(
            inputs_embeds=inputs,
            position_ids=position_ids[None],
            # Four dimensions pass through transformers' mask code unread; with None it would
            # compare positions on the device, and wait for the answer, in every step.
            attention_mask=inputs.new_zeros(1, 1, 1, 1),
            use_cache=False,
            cu_seqlens=cu_seqlens,
            max_length=max_length,
            prefix_length=prefix_length,
        )
    hidden = output.last_hidden_state[0, num_virtual:]
    return hidden if row.keep is None else hidden.index_select(0, row.keep)


class RecordedLayers:
    """Plain layers whose passes are recorded as CUDA graphs while they learn.

    Args:
        model: What learns, in 16 bit.
        demanded: As for `RecordedPasses`.
    """

    def __init__(self, model: nn.Module, *, demanded: bool) -> None:
        adapters = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
        self._adapter: Any = next(adapters, None)
        self._active = list(self._adapter.active_adapters) if self._adapter is not None else []
        tokens: dict[str, Tensor] = getattr(model, "prompt_tokens", {})
        device = next(model.parameters()).device
        for name, of_prompt in tokens.items():
            tokens[name] = of_prompt.to(device)  # peft would copy them in each pass
        forward = partial(_plain_layers, model)
        self._passes = RecordedPasses(forward, model, demanded=demanded)

    def holds_for(self, model: nn.Module) -> bool:
        """Whether the adapter is as it was; looked up in one layer: peft changes them together."""
        adapter = self._adapter
        if getattr(model, "_adapters_disabled", False):
            return False
        return adapter is None or (
            list(adapter.active_adapters) == self._active
            and not (adapter.disable_adapters or adapter.merged)
        )

    def forget(self) -> None:
        """Let go of what was recorded."""
        self._passes.clear()

    def __call__(self, batch: PackedBatch, keep: Tensor | None) -> Float[Tensor, "kept width"]:
        """Hidden states of the tokens to keep, or of all with None, after the final norm."""
        return self._passes(Row.of(batch, keep), batch.max_length, batch.prefix_length)


def behind(
    num_virtual: int, position_ids: Int[Tensor, " token"], cu_seqlens: Int[Tensor, " boundary"]
) -> tuple[Int[Tensor, " longer"], Int[Tensor, " boundary"]]:
    """Positions and boundaries of a row behind so many tokens, whose positions are added."""
    own = torch.arange(num_virtual, device=position_ids.device).to(position_ids.dtype)
    return torch.cat([own, position_ids + num_virtual]), cu_seqlens + num_virtual


def _virtual_tokens(model: nn.Module) -> Float[Tensor, "virtual width"] | None:
    """Learned embeddings that go before every question, if the adapter has any."""
    config = getattr(model, "active_peft_config", None)
    disabled = getattr(model, "_adapters_disabled", False)  # as in `PeftModel.disable_adapter`
    if config is None or not config.is_prompt_learning or disabled:
        return None
    return cast(PeftModel, model).get_prompt(batch_size=1)[0]  # type: ignore[index]


def prepare_for_training(model: nn.Module, gradient_checkpointing: Checkpointing = False) -> None:
    """Put a model with its adapter into training mode, in place.

    Unlike peft's `prepare_model_for_kbit_training` nothing is upcast: norms compute in float32
    anyway and the embedding alone would double.

    Args:
        model: A model whose trainable parameters require gradients already.
        gradient_checkpointing: What is computed again in the backward pass: False nothing, "mlp"
            the MLP of each layer, True the whole layer, of which only the input is kept, and
            "offload" likewise with that input in main memory.

    References:
        Chen et al. 2016, arXiv:1604.06174.
    """
    # Set on the layers: transformers' `gradient_checkpointing_enable` would also
    # make the embedding's output require a gradient that nobody uses.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=drops_inputs(model))
    if gradient_checkpointing == "offload":
        again = partial(_offloaded, again)
    for layer in find_backbone(model).modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = gradient_checkpointing in (True, "offload")
            layer._gradient_checkpointing_func = again  # pyright: ignore[reportArgumentType]
            mlp: Any = layer.mlp
            mlp.__dict__.pop("forward", None)  # of an earlier call
            if gradient_checkpointing == "mlp":
                mlp.forward = partial(again, mlp.forward)
    model.train()


def drops_inputs(model: nn.Module) -> bool:
    """Whether anything in a model drops inputs at random, so that it must draw the same again."""
    return any("Dropout" in type(m).__name__ and getattr(m, "p", 0) > 0 for m in model.modules())


def _offloaded(again: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    with offloaded():
        return again(function, *args, **kwargs)


def offloaded() -> contextlib.AbstractContextManager[Any]:
    """What is saved for the backward pass meanwhile lies in main memory, pinned where CUDA is."""
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
