"""Loading a frozen, quantised Gemma straight onto its device, one tensor at a time."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaForCausalLM, PretrainedConfig

from medqlora.errors import ConfigError, ModelError
from medqlora.quantization.cache import QuantizedCache
from medqlora.quantization.checkpoint import Checkpoint
from medqlora.quantization.checkpoint import cast as cast_copy
from medqlora.quantization.config import HQQ_BITS, QuantConfig, require_extra
from medqlora.quantization.embedding import QuantizedEmbedding, TiedHead
from medqlora.quantization.kept import KeptBase
from medqlora.quantization.linear import (
    dequantized_weight,
    empty_hqq_linear,
    empty_linear,
    is_quantized,
    quantize_linear,
)

log = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens"


def load_base(
    path: str,
    quant: QuantConfig,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    cache_dir: Path | str | None = None,
    kept: KeptBase | None = None,
) -> GemmaForCausalLM:
    """Load a Gemma with its weights stored as `quant` says: frozen, in eval mode.

    Each weight goes from its file to the device and is quantised there before the next is read, the
    embedding some rows at a time, so that the peak on the device is the final size and one layer,
    and the peak in main memory is one tensor. Norms are in `quant.compute_dtype`; nothing is
    upcast. The head is tied: it is the embedding's own storage. Only safetensors are read, and no
    code of the model.

    Args:
        path: Folder, hub name, or `bundled:` name.
        quant: How the weights are stored.
        revision: Branch, tag or commit of a hub model.
        device: Where to put the weights; "cuda" is this process's own GPU (`local_device`).
        attn_implementation: As in transformers.
        cache_dir: Folder for quantised copies, which load faster the second time; None for none. A
            copy that is stale or damaged is made anew, with a warning.
        kept: Weights in memory that this base shares with the last one, if it is the same, and with
            the next one; None for weights of its own.

    Returns:
        The model, as stock transformers and peft know it. `model.quant_config` is `quant`.

    Raises:
        ModelError: If the model cannot be found, reached or read, or is no Gemma.
        ConfigError: If `quant` does not fit the model or the machine; before any weight is read.
    """
    require_extra(quant)
    device = _checked_device(device)
    checkpoint = Checkpoint(path, revision)
    cache = _cache(cache_dir, checkpoint, quant)
    model = _skeleton(checkpoint.config, quant, attn_implementation)
    targets = _check_layers(model, quant)
    key = (checkpoint.fingerprint(), quant, device) if kept is not None else None
    state = kept.take(key) if kept is not None else None
    if state is None and cache is not None:
        state = cache.read(device)
    if state is not None:
        _fill_from_state(model, state, targets, quant, device)
    else:
        _fill(model, checkpoint, targets, quant, device)
        if cache is not None:
            cache.write(_own_state(model))
    if kept is not None and not quant.data_type.startswith("torchao"):
        kept.keep(key, _own_state(model))
    model.config._name_or_path = model.name_or_path = checkpoint.path
    model.config._commit_hash = checkpoint.commit
    return _finish(model, quant)


def local_device(accelerator: str = "auto") -> torch.device:
    """The device of this process: its own GPU by LOCAL_RANK, which torchrun sets, else the CPU.

    Args:
        accelerator: "auto" (a GPU where there is one), "gpu" or "cpu".

    Raises:
        ConfigError: If a GPU is asked for and there is none for this rank.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "A CUDA device was asked for and torch sees none on this machine. Choose trainer=cpu, "
            "or install a driver and a torch build with CUDA (`python -m medqlora.doctor` tells)."
        )
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(
            f"LOCAL_RANK={rank} has no GPU of its own: this machine has {count}. Start at most "
            f"{count} processes here, as with `torchrun --nproc-per-node`."
        )
    return torch.device("cuda", rank)


def dequantize(model: GemmaForCausalLM, dtype: torch.dtype = torch.bfloat16) -> GemmaForCausalLM:
    """Turn a quantised model into a plain one with the rounded weights, in place.

    Merging an adapter into the result gives what was trained: the sum of the rounded base and the
    adapter. Merging it into the original base gives slightly different weights, and merging into
    the quantised base rounds the sum once more.

    Args:
        model: A model of `load_base`, without adapter.
        dtype: dtype of all weights.

    Returns:
        The same model; `save_pretrained` writes it as stock transformers reads it.
    """
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            weight = dequantized_weight(module).to(dtype)
            model.set_submodule(name, _plain_linear(weight))
    embedding = model.get_input_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(
                model.config, trust_remote_code=False
            ).get_input_embeddings()
        plain.weight = nn.Parameter(embedding.dequantize(), requires_grad=False)
        if hasattr(plain, "embed_scale"):
            plain.embed_scale = embedding.embed_scale
        model.set_submodule(EMBEDDING, plain)
        model.set_submodule("lm_head", _plain_linear(plain.weight))
    cast(nn.Module, model).to(dtype)
    cast(Any, model).lm_head.weight = cast(Any, model).model.embed_tokens.weight
    return _finish(model, QuantConfig(data_type="none", skip_modules=()))


def _plain_linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _checked_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and (device.index is None or not torch.cuda.is_available()):
        return local_device("gpu")
    return device


def _cache(
    cache_dir: Path | str | None, checkpoint: Checkpoint, quant: QuantConfig
) -> QuantizedCache | None:
    if cache_dir is None or not quant.changes_weights:
        return None
    if quant.data_type.startswith("torchao"):
        raise ConfigError(
            f"model.cache_quantized=true cannot keep quant.data_type={quant.data_type}: torchao's "
            "tensors have no safetensors form of their own here. Set model.cache_quantized=false."
        )
    return QuantizedCache(Path(cache_dir), checkpoint, quant)


def _skeleton(config: PretrainedConfig, quant: QuantConfig, attn: str) -> GemmaForCausalLM:
    """The architecture without weights, on the meta device."""
    if not config.tie_word_embeddings:
        raise ModelError(
            "the config says tie_word_embeddings=false, but a Gemma's head is its embedding. Set "
            "it to true in config.json if the head was not trained apart; other heads are not "
            "supported."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=quant.torch_dtype, attn_implementation=attn, trust_remote_code=False
        )
    return cast(GemmaForCausalLM, model)


def _check_layers(model: GemmaForCausalLM, quant: QuantConfig) -> list[str]:
    """Names of the layers to quantise, checked against the options before any weight is read."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for pattern in quant.skip_modules:
        if not any(_matches(name, pattern) for name in linears):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ConfigError(
                f"quant.skip_modules names {pattern}, which matches no linear layer of the model. "
                f"Choose among {', '.join(kinds)}, or a full name such as {next(iter(linears))}."
            )
    targets = [
        name
        for name in linears
        if name != "lm_head" and not any(_matches(name, p) for p in quant.skip_modules)
    ]
    if quant.data_type != "none" and not targets:
        raise ConfigError(
            f"quant.skip_modules={list(quant.skip_modules)} leaves no layer to quantise, so "
            f"quant.data_type={quant.data_type} has no effect. Name fewer modules, or choose "
            "quant=none."
        )
    if quant.data_type not in ("none", "int8", "torchao_int8"):
        for name in targets:
            _check_block(name, linears[name].in_features, quant.block_size)
    if quant.embedding == "nf4":
        _check_block(EMBEDDING, model.config.hidden_size, quant.block_size)
    return targets if quant.data_type != "none" else []


def _check_block(name: str, width: int, block_size: int) -> None:
    if width % block_size:
        fitting = [size for size in (64, 128, 256) if width % size == 0]
        advice = (
            f"Choose quant.block_size={' or '.join(map(str, fitting))}"
            if fitting
            else "Add it to quant.skip_modules, or choose quant=int8"
        )
        raise ConfigError(
            f"quant.block_size={block_size} does not divide the {width} inputs of {name}: a block "
            f"would span two rows. {advice}."
        )


def _matches(name: str, pattern: str) -> bool:
    return f".{pattern}." in f".{name}."


def _fill(
    model: GemmaForCausalLM,
    checkpoint: Checkpoint,
    targets: list[str],
    quant: QuantConfig,
    device: torch.device,
) -> None:
    """Read every weight, quantise it on the device, and put it in its place."""
    if quant.embedding != "bf16":
        embedding = _empty_embedding(model, quant, device)
        rows = (
            (
                start,
                _checked(chunk, (len(chunk), embedding.embedding_dim), EMBEDDING).to(
                    quant.torch_dtype
                ),
            )
            for start, chunk in checkpoint.chunks(f"{EMBEDDING}.weight")
        )
        count = checkpoint.shape(f"{EMBEDDING}.weight")[0]
        if count != embedding.num_embeddings:
            raise ModelError(_wrong_shape(EMBEDDING, count, embedding.num_embeddings))
        _install_embedding(model, embedding.fill(rows))
    chosen = set(targets)
    for name, module in list(model.named_modules()):
        for own, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta or name == "lm_head":
                continue
            full = f"{name}.{own}"
            weight = _checked(checkpoint.read(full), tuple(parameter.shape), full)
            weight = cast_copy(weight, quant.torch_dtype, device)
            if name in chosen:
                model.set_submodule(name, quantize_linear(weight, quant, device))
            else:
                setattr(module, own, nn.Parameter(weight, requires_grad=False))
    _fill_buffers(model, device)


def _checked(weight: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(weight.shape) != shape:
        raise ModelError(_wrong_shape(name, tuple(weight.shape), shape))
    return weight


def _wrong_shape(name: str, found: object, expected: object) -> str:
    return (
        f"weight {name} has shape {found} and config.json asks for {expected}: they belong to "
        "different models. Download the model again."
    )


def _embed_scale(model: GemmaForCausalLM) -> float:
    """Factor inside Gemma's embedding; 1 in versions of transformers where the backbone scales."""
    if hasattr(model.get_input_embeddings(), "embed_scale"):
        return float(model.config.hidden_size**0.5)
    return 1.0


def _empty_embedding(
    model: GemmaForCausalLM, quant: QuantConfig, device: torch.device
) -> QuantizedEmbedding:
    config = model.config
    return QuantizedEmbedding(
        config.vocab_size,
        config.hidden_size,
        data_type=quant.embedding,
        block_size=quant.block_size,
        double_quant=quant.embedding_double_quant,
        dtype=quant.torch_dtype,
        embed_scale=_embed_scale(model),
        padding_idx=config.pad_token_id,
        device=device,
    )


def _install_embedding(model: GemmaForCausalLM, embedding: QuantizedEmbedding) -> None:
    model.set_submodule(EMBEDDING, embedding)
    model.set_submodule("lm_head", TiedHead(embedding))


def _fill_buffers(model: GemmaForCausalLM, device: torch.device) -> None:
    """Buffers are computed, not stored: the rotary frequencies and the embedding's factor."""
    backbone = cast(Any, model).model
    backbone.rotary_emb = type(backbone.rotary_emb)(config=model.config).to(device)
    embedding = backbone.embed_tokens
    if isinstance(embedding, nn.Embedding):
        if hasattr(embedding, "embed_scale"):
            scale = torch.tensor(_embed_scale(model), dtype=torch.float32, device=device)
            embedding.embed_scale = scale
        cast(Any, model).lm_head.weight = embedding.weight


def _finish(model: GemmaForCausalLM, quant: QuantConfig) -> GemmaForCausalLM:
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise ModelError(
            f"weight {left[0]} was not found: this version of transformers builds Gemma otherwise. "
            "Install transformers>=5.17,<5.24."
        )
    marks = cast(Any, model)
    marks.is_loaded_in_4bit = quant.is_4bit  # peft asks for these two before it wraps a layer
    marks.is_loaded_in_8bit = quant.data_type == "int8"
    marks.is_quantized = quant.changes_weights
    marks.quant_config = quant
    model.config.dtype = quant.torch_dtype
    return model.requires_grad_(False).eval()


def _own_state(model: GemmaForCausalLM) -> dict[str, Tensor]:
    """Every stored tensor by module and name; the tied head adds none."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head.")
    }


def _fill_from_state(
    model: GemmaForCausalLM,
    state: dict[str, Tensor],
    targets: list[str],
    quant: QuantConfig,
    device: torch.device,
) -> None:
    """Put tensors that are stored and on the device already in their places; none is copied."""
    if quant.embedding != "bf16":
        embedding = _empty_embedding(model, quant, torch.device("meta"))
        embedding.embed_scale = torch.tensor(_embed_scale(model), device=device)
        _install_embedding(model, embedding)
    chosen = set(targets)
    by_module: dict[str, dict[str, Tensor]] = {}
    modules = dict(model.named_modules())
    for full, tensor in state.items():
        name = full
        while name not in modules:
            name = name.rpartition(".")[0]
        by_module.setdefault(name, {})[full.removeprefix(f"{name}.")] = tensor
    for name, tensors in by_module.items():
        module = modules[name]
        if name in chosen:
            model.set_submodule(
                name, _restored_linear(cast(nn.Linear, module), tensors, quant, device)
            )
        else:
            for own, tensor in tensors.items():
                setattr(module, own, nn.Parameter(tensor, requires_grad=False))
    _fill_buffers(model, device)


def _restored_linear(
    shape: nn.Linear, tensors: dict[str, Tensor], quant: QuantConfig, device: torch.device
) -> nn.Module:
    if quant.data_type in HQQ_BITS:
        layer = empty_hqq_linear(quant, device)
        layer.load_state_dict(tensors)
        return layer.requires_grad_(False)
    layer = empty_linear(shape.in_features, shape.out_features, quant)
    weight = tensors["weight"]
    if isinstance(layer, Linear8bitLt):
        layer.weight = cast(Any, Int8Params)(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=tensors["SCB"]
        )
        return layer
    stats = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    layer.weight = Params4bit.from_prequantized(
        weight, stats, device=cast(Any, device), module=cast(Any, layer)
    )
    return layer
