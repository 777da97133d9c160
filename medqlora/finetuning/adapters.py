"""Adapters: put on a base model, counted, saved, loaded, merged.

The methods are PEFT's own and configured by PEFT's own classes. Here stand only what a quantised
base needs beyond them and the checks that PEFT leaves out.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from medqlora.acceleration import find_backbone
from medqlora.errors import CheckpointError, ConfigError
from medqlora.finetuning.adalora import allocate_at_once, find_adalora, keep_ranks_in_use

AdapterDtype = Literal["auto", "float32", "bfloat16"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FULL_WEIGHTS = "trained_weights.safetensors"

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_ADAPTER = "default"
_INITIAL = "_medqlora_initial_lora"

# What a config can name beyond the adapter: a module to import, code of a tokenizer to trust,
# layers to copy any number of times.
_REACHES_OUTSIDE = ("megatron_config", "tokenizer_kwargs", "layer_replication")

# What decides how much memory an adapter takes before its weights are compared.
_SIZES = ("r", "init_r", "target_r", "rank_pattern", "num_virtual_tokens", "oft_block_size")

# Methods of PEFT that change the base weights in place when they start.
_REWRITES_BASE = ("pissa", "olora", "corda")

# One table of Gemma under two names.
_TIED = {"embed_tokens", "lm_head"}


@dataclass(frozen=True)
class FullFinetuning:
    """Train every weight of the transformer's layers and the final norm; no adapter.

    The embedding stays frozen: it is tied to the output head, whose letter rows the loss and the
    scores take as constants.
    """


def no_adapter() -> None:
    """The option `peft=none`: the base model as it is."""


def changes_base(peft_config: Any) -> bool:
    """Whether a method writes into the weights of the base, which then cannot be shared.

    Args:
        peft_config: As for `attach_adapter`.
    """
    return isinstance(peft_config, FullFinetuning) or _initialisation(peft_config) in _REWRITES_BASE


def attach_adapter(
    model: PreTrainedModel,
    peft_config: PeftConfig | FullFinetuning | Callable[..., PeftConfig] | None,
    *,
    adapter_dtype: AdapterDtype = "auto",
    num_training_steps: int | None = None,
) -> PreTrainedModel | PeftModel:
    """Add trainable weights to a frozen base model, in place.

    Args:
        model: A frozen base model.
        peft_config: A PEFT config; a function of `total_step` that gives one (AdaLoRA);
            `FullFinetuning`; or None for no adapter.
        adapter_dtype: Storage of the trainable weights. "auto" is float32, so that small updates
            are not rounded away; the matmuls still run in the base's 16 bit. "bfloat16" saves the
            casts.
        num_training_steps: Updates of the run, for methods with a plan over them.

    Returns:
        The model with its adapter. The base's own parameters do not require gradients.

    Raises:
        ConfigError: If the method cannot work on this base, or one of its options has no effect.
    """
    if adapter_dtype not in _DTYPES:
        raise ConfigError(
            f"adapter_dtype={adapter_dtype} is not known. Choose auto, float32 or bfloat16."
        )
    if peft_config is None:
        return model
    if isinstance(peft_config, FullFinetuning):
        _refuse_quantised(model, "full", "training a weight needs all its bits")
        for part in (find_backbone(model).layers, find_backbone(model).norm):  # type: ignore[union-attr]
            cast(nn.Module, part).requires_grad_(True)
        return _cast_trainable(model, adapter_dtype)
    if not isinstance(peft_config, PeftConfig):
        if not num_training_steps:
            raise ConfigError(
                "this peft option plans over the updates of a run, and their number is not known "
                "here. Choose peft=lora_r16."
            )
        peft_config = _with_total_step(peft_config, num_training_steps)
    peft_config = copy.deepcopy(peft_config)
    method = _method(peft_config)
    base_path = str(model.name_or_path or "")
    loftq = _initialisation(peft_config) == "loftq"
    if loftq:
        if not _is_quantised(model):
            raise ConfigError(
                "peft=loftq starts from the rounding error of the base, and quant=none has none. "
                "Choose quant=nf4 or peft=lora_r16."
            )
        _set_initialisation(peft_config, True)
    if _initialisation(peft_config) in _REWRITES_BASE:
        _refuse_quantised(
            model, method, "it rewrites the base weights when it starts, which rounds them again"
        )
    if peft_config.is_prompt_learning and method not in ("prompt_tuning", "p_tuning"):
        raise ConfigError(
            f"peft={method} puts its tokens into a key-value cache, which packed rows of several "
            "questions do not have. Choose peft=prompt_tuning, or an adapter inside the layers."
        )
    adapted = _wrap(model, peft_config, method)
    allocate_at_once(adapted)
    _refuse_tied(adapted, method)
    if loftq:
        _start_from_rounding_error(adapted, base_path)
    if _initialisation(peft_config) in _REWRITES_BASE:
        _remember_start(adapted)
    return _cast_trainable(adapted, adapter_dtype)


_REFUSALS = (
    ValueError, TypeError, RuntimeError, ImportError, AttributeError, ArithmeticError
)  # fmt: skip
"""What PEFT raises at options that it does not check; NotImplementedError is a RuntimeError."""


def _wrap(model: PreTrainedModel, peft_config: PeftConfig, method: str) -> PeftModel:
    with warnings.catch_warnings():
        # The tied output head is no target; PEFT warns whenever one exists.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        try:
            adapted = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
        except _REFUSALS as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"peft={method} does not work on this base ({_storage(model)}): {reason}. "
                "Choose another method, such as peft=lora_r16, or quant=none."
            ) from error
    assert isinstance(adapted, PeftModel)
    _freeze_rank_numbers(adapted)
    if not any(p.requires_grad for p in adapted.parameters()):
        raise ConfigError(
            f"peft={method} found nothing to train in this model: check peft.target_modules."
        )
    return adapted


def _refuse_tied(adapted: PeftModel, method: str) -> None:
    """The embedding is the output head as well, whose letter rows are constants of the scores."""
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    if tied := sorted(_TIED & {part for name in names for part in name.split(".")}):
        raise ConfigError(
            f"peft={method} would train {tied[0]}, and Gemma's embedding is its output head: "
            "letters would be scored, and a merged model would answer, with other rows than were "
            "trained. Leave embed_tokens and lm_head out of peft.target_modules and "
            "peft.modules_to_save."
        )


def count_trainable(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Trainable weights by name, detached."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(
    model: PreTrainedModel | PeftModel,
    directory: Path | str,
    *,
    base_name: str | None = None,
    revision: str | None = None,
) -> None:
    """Write the adapter in PEFT's format, which stock peft loads; atomically.

    PiSSA and OLoRA, whose adapter belongs to a rewritten base, are written as the plain LoRA of
    twice the rank that makes the same difference to the original base. Full fine-tuning has no such
    format: its weights go to `trained_weights.safetensors`.

    Args:
        model: Result of `attach_adapter`.
        directory: Where `adapter_config.json` and `adapter_model.safetensors` go; replaced if it is
            there.
        base_name: What to record as the base: the hub name or path as the user gave it. None
            records the model's own name.
        revision: Its revision.

    Raises:
        ConfigError: If the model has nothing trained to save.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write_adapter(model, temporary, base_name, revision)
        temporary.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_adapter(
    model: PreTrainedModel | PeftModel, directory: Path, base_name: str | None, revision: str | None
) -> None:
    if not isinstance(model, PeftModel):
        state = _contiguous(trainable_state(model))
        if not state:
            raise ConfigError("peft=none trained nothing, so there is no adapter to save.")
        save_file(state, directory / FULL_WEIGHTS, metadata={"format": "pt"})
        return
    if (tuner := find_adalora(model)) is not None:
        keep_ranks_in_use(tuner)
    config = copy.deepcopy(model.peft_config[_ADAPTER])
    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    state = _contiguous(cast(dict[str, Tensor], state))
    initial: dict[str, Tensor] | None = getattr(model, _INITIAL, None)
    if initial is not None:
        state = _as_plain_lora(cast(LoraConfig, config), state, initial)
    config.inference_mode = True
    config.base_model_name_or_path = base_name or model.get_base_model().name_or_path  # type: ignore[union-attr]
    config.revision = revision
    save_file(state, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(directory))


def load_adapter(
    model: PreTrainedModel, directory: Path | str, *, trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """Put a saved adapter on a base model, in place, with the dtype it was saved in.

    Args:
        model: The base model the adapter was trained on.
        directory: A folder of `save_adapter`, or any folder in PEFT's format.
        trainable: Whether its weights require gradients.

    Returns:
        The model with its adapter, in eval mode.

    Raises:
        CheckpointError: If a file is missing or damaged, or any weight has no counterpart.
    """
    directory = Path(directory)
    if (directory / FULL_WEIGHTS).exists():
        return _load_full(model, directory / FULL_WEIGHTS, trainable)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}: it is no adapter folder. Give a run folder's "
                "adapter/, or a folder that peft's save_pretrained wrote with safetensors."
            )
    state = _read_weights(directory / ADAPTER_WEIGHTS)
    config = _read_adapter_config(directory, state)
    config.inference_mode = not trainable
    try:
        adapted = _wrap_saved(model, config)
    except Exception as error:  # PEFT raises what comes when a value is of no use to it
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG} does not make an adapter of this base model: "
            f"{' '.join(str(error).split())[:300]}. Load it on the model it was trained on."
        ) from error
    try:
        expected = set(
            get_peft_model_state_dict(adapted, adapter_name=_ADAPTER, save_embedding_layers=False)
        )
        _check_keys(directory, expected, set(state))
        set_peft_model_state_dict(adapted, dict(state), adapter_name=_ADAPTER)
    except RuntimeError as error:
        raise CheckpointError(
            f"{directory} does not fit this base model: {' '.join(str(error).split())[:300]}. Load "
            "it on the model it was trained on."
        ) from error
    dtype = next(iter(state.values())).dtype
    for name, parameter in adapted.named_parameters():
        if _ADAPTER in name.split("."):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trainable and parameter.requires_grad)
    allocate_at_once(adapted)
    return adapted.eval()


def _read_adapter_config(directory: Path, state: Mapping[str, Tensor]) -> PeftConfig:
    """The config of an adapter folder, which may be anybody's.

    Args:
        directory: The folder.
        state: Its weights.

    Raises:
        CheckpointError: If it is no config, or asks for more than an adapter of these weights.
    """
    path = directory / ADAPTER_CONFIG
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no config of an adapter: {' '.join(str(error).split())}. Train again, or "
            "copy the folder again."
        ) from error
    method = str(getattr(config.peft_type, "value", config.peft_type))
    asked = [name for name in _REACHES_OUTSIDE if getattr(config, name, None)]
    if asked or method == "XLORA":
        raise CheckpointError(
            f"{path} asks for {asked[0] if asked else method}: modules to import, folders to read "
            "or layers to copy are no part of an adapter here. Remove it from the file, or use "
            "another adapter."
        )
    if not all(tensor.is_floating_point() for tensor in state.values()) or not state:
        raise CheckpointError(
            f"{directory / ADAPTER_WEIGHTS} holds {'other than floats' if state else 'no weights'}"
            ": it is no adapter. Copy the folder again."
        )
    largest = max(max(tensor.shape, default=0) for tensor in state.values())
    for name in _SIZES:
        size = getattr(config, name, None)
        sizes = size.values() if isinstance(size, Mapping) else [size]
        # AdaLoRA lists which ranks it kept, and there need be no such option.
        numbers = [n for n in sizes if n is not None and not isinstance(n, list)]
        if not all(isinstance(n, int) and 0 <= n <= 4 * largest for n in numbers):
            raise CheckpointError(
                f"{path} has {name}={str(size)[:80]}, and the largest weight beside it has "
                f"{largest} rows or columns: they do not belong together. Copy the folder again."
            )
    return config


def _wrap_saved(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        task = config.task_type
        from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(task), PeftModel)
        adapted = kind(model, config, adapter_name=_ADAPTER, autocast_adapter_dtype=False)
    _freeze_rank_numbers(adapted)
    return adapted


def _freeze_rank_numbers(model: PeftModel) -> None:
    """AdaLoRA divides by its rank, a constant that peft makes trainable where it casts it."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def merge_adapter(
    model: PeftModel | PreTrainedModel,
    dequantize: Callable[..., PreTrainedModel],
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """Fold the adapter into the base weights, in 16 bit; the model given is used up.

    The base is dequantised first and the sum is made in float32, so that what was trained (rounded
    base plus adapter) is rounded only once more, to `dtype`. Nothing is ever rounded back to 4
    bits.

    Args:
        model: The model with its adapter.
        dequantize: `dequantize(model, dtype)` turns a quantised base into a plain one.
        dtype: dtype of the result.

    Returns:
        A plain model without adapter.

    Raises:
        ConfigError: If the method cannot be merged.
    """
    if not isinstance(model, PeftModel):
        merged = dequantize(model, torch.float32) if _is_quantised(model) else model
        return merged.to(dtype)  # type: ignore[arg-type]
    config = copy.deepcopy(model.peft_config[_ADAPTER])
    tuner = cast(Any, model.base_model)
    if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise ConfigError(
            f"peft={_method(config)} cannot be merged: it adds inputs, not weights. Use "
            "format=adapter."
        )
    if not _is_quantised(model.get_base_model()):
        model.float()
        return cast(PreTrainedModel, cast(Any, model.base_model).merge_and_unload()).to(dtype)  # type: ignore[arg-type]
    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    marks = cast(Any, model.get_base_model())
    # (IA)3 will not even come off a model that says it is quantised.
    marks.is_loaded_in_4bit = marks.is_loaded_in_8bit = False
    base = dequantize(cast(PreTrainedModel, tuner.unload()), torch.float32)
    config.inference_mode = True
    plain = _wrap_saved(base, config)
    set_peft_model_state_dict(plain, cast(dict[str, Any], state), adapter_name=_ADAPTER)
    plain.float()
    return cast(PreTrainedModel, cast(Any, plain.base_model).merge_and_unload()).to(dtype)  # type: ignore[arg-type]


def _is_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def _storage(model: nn.Module) -> str:
    quant = getattr(model, "quant_config", None)
    return f"quant={getattr(quant, 'data_type', 'none')}"


def _refuse_quantised(model: nn.Module, method: str, reason: str) -> None:
    if _is_quantised(model):
        raise ConfigError(
            f"peft={method} cannot work on quantised weights ({_storage(model)}): {reason}. Choose "
            f"quant=none, or an adapter that leaves the base alone, such as peft=lora_r16."
        )


def _method(config: PeftConfig) -> str:
    start = _initialisation(config)
    if start is not None:
        return start
    if getattr(config, "use_dora", False):
        return "dora"
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def _initialisation(config: Any) -> str | None:
    """Name of LoRA's way to start, without its options; None for the usual one."""
    start = getattr(config, "init_lora_weights", None)
    return start.lower().split("_niter")[0] if isinstance(start, str) else None


def _set_initialisation(config: PeftConfig, value: bool) -> None:
    cast(LoraConfig, config).init_lora_weights = value
    cast(LoraConfig, config).loftq_config = {}


def _with_total_step(build: Callable[..., PeftConfig], num_training_steps: int) -> PeftConfig:
    try:
        return build(total_step=num_training_steps)
    except ValueError as error:
        raise ConfigError(
            f"this peft option cannot plan over {num_training_steps} updates: "
            f"{' '.join(str(error).split())} Train longer, or choose peft=lora_r16."
        ) from error


def _cast_trainable(
    model: PreTrainedModel | PeftModel, adapter_dtype: AdapterDtype
) -> PreTrainedModel | PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(_DTYPES[adapter_dtype])
    return model


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {' '.join(str(error).split())}. Copy it "
            "again, or train again."
        ) from error


def _check_keys(source: Path, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        problem = (
            f"lacks {len(missing)} weights of the adapter, such as {missing[0]}"
            if missing
            else f"has {len(unexpected)} weights that the adapter lacks, such as {unexpected[0]}"
        )
        raise CheckpointError(
            f"{source} {problem}: it belongs to another adapter or model. Use the base and the "
            "peft option it was trained with."
        )


def _load_full(model: PreTrainedModel, path: Path, trainable: bool) -> PreTrainedModel:
    state = _read_weights(path)
    _refuse_quantised(model, "full", "the trained weights replace the base's")
    parameters = dict(model.named_parameters())
    _check_keys(path, set(state) & set(parameters), set(state))
    for name, tensor in state.items():
        if parameters[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the base "
                f"{tuple(parameters[name].shape)}. Load it on the model it was trained on."
            )
        parameters[name].data = tensor.to(parameters[name].device)
        parameters[name].requires_grad_(trainable)
    return model.eval()


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A:
            yield name, module


@torch.no_grad()
def _start_from_rounding_error(model: PeftModel, base_path: str) -> None:
    """Give LoRA the best rank-r approximation of what quantisation rounded away.

    LoftQ with the quantised base kept as it is, one step (Li et al. 2023, arXiv:2310.08659, section
    3.2).
    """
    for name, layer in _lora_layers(model):
        key = name.removeprefix("base_model.model.") + ".weight"
        stored = dequantize_module_weight(layer.get_base_layer()).float()
        original = _original_weight(base_path, key).to(stored.device, torch.float32)
        r, scale = layer.r[_ADAPTER], layer.scaling[_ADAPTER]
        left, values, right = torch.linalg.svd(original - stored, full_matrices=False)
        root = (values[:r] / scale).sqrt()
        cast(Tensor, layer.lora_B[_ADAPTER].weight).copy_(left[:, :r] * root)
        cast(Tensor, layer.lora_A[_ADAPTER].weight).copy_(root[:, None] * right[:r])


def _original_weight(base_path: str, key: str) -> Float[Tensor, "output input"]:
    index = _base_file(base_path, "model.safetensors.index.json")
    name = "model.safetensors"
    if index is not None:
        name = json.loads(Path(index).read_text())["weight_map"].get(key, name)
    file = _base_file(base_path, name)
    if file is not None:
        with safe_open(file, framework="pt") as weights:
            if key in set(weights.keys()):
                return weights.get_tensor(key)
    raise ConfigError(
        f"peft=loftq needs the base's original weights, and {base_path or 'this model'} has no "
        f"{key} in safetensors files. Choose peft=lora_r16."
    )


def _base_file(base_path: str, name: str) -> str | None:
    if not base_path:
        return None
    found = cached_file(
        base_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return found if found is None else str(found)


def _remember_start(model: PeftModel) -> None:
    """Keep the first A and B, whose product was taken out of the base."""
    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    # Not as a buffer: it is no part of the adapter's state and never leaves main memory.
    object.__setattr__(
        model, _INITIAL, {n: t.detach().cpu().clone() for n, t in cast(dict, state).items()}
    )


def _as_plain_lora(
    config: LoraConfig, state: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """B A - B0 A0 as one LoRA of twice the rank (Meng et al. 2024, arXiv:2404.02948, app. C)."""
    double = {}
    for name, tensor in state.items():
        start = initial[name].to(tensor.dtype)
        is_a = "lora_A" in name
        double[name] = torch.cat([tensor, start if is_a else -start], dim=0 if is_a else 1)
    # The scale alpha / r must not change; with rsLoRA it is alpha / sqrt(r).
    factor: Any = 2**0.5 if config.use_rslora else 2
    config.lora_alpha *= factor
    config.r *= 2
    alphas, ranks = config.alpha_pattern or {}, config.rank_pattern or {}
    config.alpha_pattern = {name: factor * alpha for name, alpha in alphas.items()}
    config.rank_pattern = {name: 2 * rank for name, rank in ranks.items()}
    config.init_lora_weights = True
    return double
