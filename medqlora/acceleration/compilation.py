"""How a model is run on a device: the fast path, `torch.compile`, CUDA graphs, or as it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from medqlora.acceleration.backbone import (
    RUN_AS,
    Checkpointing,
    RecordedLayers,
    drops_inputs,
    find_backbone,
    run_as,
)
from medqlora.acceleration.folding import compute_dtype, is_whole, quant_state, why_not_fused
from medqlora.acceleration.fused import enable_fused
from medqlora.acceleration.memory import scoring_bytes
from medqlora.errors import ConfigError

log = logging.getLogger(__name__)

CompileMode = Literal["none", "default", "cuda_graphs", "auto"]

CUDA_GRAPHS_UP_TO = 16_384
"""Tokens a row up to which passes are recorded: a busy CPU launches their kernels too late."""

MOST_GRADIENTS = 1 << 30
"""Bytes of gradients up to which plain layers are recorded: a recorded pass keeps a copy."""

VARIANTS = 128
"""Compiled variants of one function that are kept. The jobs of a sweep share them where adapter and
shapes agree and add to them where not; past torch's own limit of 8, compilation would fail."""


@dataclass(frozen=True)
class Acceleration:
    """How rows are run. Beyond rounding, only `float8` and `dropout_per` change a result.

    Attributes:
        compile: "none", "default", "cuda_graphs", or "auto": none on the CPU, where the compiler
            needs a C++ toolchain, and for LLM.int8; CUDA graphs for short rows of what can be
            recorded, and the default for others.
        fused: Run layers in 4, 16 or 32 bit with an adapter that can be folded into them through
            the fast path (`fused.FusedBackbone`): "auto" where it can, "on" or an error, "off".
        float8: Multiply in 8-bit floats on the fast path, on CUDA: rounds weights and activations
            to 3 bits of mantissa.
        gradient_checkpointing: What the backward pass computes again: False nothing, "mlp" the MLP
            of each layer, True the whole layer, "offload" the whole layer with its input kept in
            main memory.
        dropout_per: What the inputs that `peft.lora_dropout` drops are drawn for: each "token", as
            peft does, or a whole "row" on the fast path, whose adapters then stay folded. That
            drops columns of A: dropout of the factors, as in Lin et al. 2024, arXiv:2404.09610.
        num_threads: Threads of a CPU operation; None for one a core.

    Raises:
        ConfigError: If a value is unknown or cannot take effect.
    """

    compile: CompileMode = "auto"
    fused: Literal["auto", "on", "off"] = "auto"
    float8: bool = False
    gradient_checkpointing: Checkpointing = False
    dropout_per: Literal["token", "row"] = "token"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.compile not in ("none", "default", "cuda_graphs", "auto"):
            raise ConfigError(
                f"acceleration.compile={self.compile} is not known. Choose none, default, "
                "cuda_graphs or auto."
            )
        if self.fused not in ("auto", "on", "off"):
            raise ConfigError(
                f"acceleration.fused={self.fused} is not known. Choose auto, on or off."
            )
        if self.dropout_per not in ("token", "row"):
            raise ConfigError(
                f"acceleration.dropout_per={self.dropout_per} is not known. Choose token or row."
            )
        if self.gradient_checkpointing not in (False, True, "mlp", "offload"):
            raise ConfigError(
                f"acceleration.gradient_checkpointing={self.gradient_checkpointing} is not known. "
                "Choose false, true, mlp or offload."
            )
        if self.gradient_checkpointing == "offload" and self.compile == "cuda_graphs":
            raise ConfigError(
                "acceleration.gradient_checkpointing=offload copies to main memory, which a CUDA "
                "graph cannot record. Set acceleration.compile=default."
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(
                f"acceleration.num_threads={self.num_threads} is no number of threads. Give 1 or "
                f"more, "
                "or null for one a core."
            )
        if self.fused == "off" and self.of_fast_path:
            raise ConfigError(
                f"acceleration.{self.of_fast_path[0]} has no effect with acceleration.fused=off: "
                "only the fast path does that. Set acceleration.fused=auto."
            )

    @property
    def of_fast_path(self) -> list[str]:
        """The options that were chosen and take effect on the fast path only."""
        chosen = {
            "fused=on": self.fused == "on",
            "float8=true": self.float8,
            "dropout_per=row": self.dropout_per == "row",
        }
        return [option for option, wanted in chosen.items() if wanted]

    def check_device(self, device: torch.device | str) -> None:
        """Refuse what has no effect on a device.

        Raises:
            ConfigError: If the options need CUDA, or a newer GPU, and the device is none.
        """
        kind = torch.device(device).type
        of_cuda = ["compile=cuda_graphs"] if self.compile == "cuda_graphs" else []
        of_cuda += ["float8=true"] if self.float8 else []
        if of_cuda and kind != "cuda":
            raise ConfigError(
                f"acceleration.{of_cuda[0]} has no effect on {kind}: it needs a CUDA device. Leave "
                "it out, or choose trainer=gpu."
            )
        if self.float8 and torch.cuda.get_device_capability(device) < (8, 9):
            raise ConfigError(
                "acceleration.float8=true needs a GPU of compute capability 8.9 or more (Ada, "
                "Hopper and later). Set acceleration.float8=false."
            )

    def compile_mode(self, device: torch.device | str, token_budget: int) -> str:
        """What `compile` means for rows of a length on a device."""
        if self.compile != "auto":
            return self.compile
        if torch.device(device).type != "cuda":
            return "none"
        if self.gradient_checkpointing == "offload" or token_budget > CUDA_GRAPHS_UP_TO:
            return "default"
        return "cuda_graphs"


def accelerate(
    model: nn.Module, options: Acceleration, device: torch.device | str, token_budget: int
) -> str:
    """Choose and set up how a model runs its rows, in place; parameter names stay the same.

    Args:
        model: A base model, with or without an adapter, switched to packed attention.
        options: What is wanted.
        device: Where the model is.
        token_budget: Tokens a row.

    Returns:
        What was chosen, in words, for the log.

    Raises:
        ConfigError: If what is wanted cannot take effect.
    """
    options.check_device(device)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    mode = options.compile_mode(device, token_budget)
    if options.compile == "auto" and _counts_outliers(find_backbone(model)):
        mode = "none"
    if mode != "none":
        _configure_compiler()
    reason = why_not_fused(model) if options.fused != "off" else "acceleration.fused=off"
    if reason is not None and options.of_fast_path:
        raise ConfigError(
            f"acceleration.{options.of_fast_path[0]} cannot take effect because {reason}. Leave it "
            "out, or change that."
        )
    if mode == "cuda_graphs" and (obstacle := _why_not_recorded(model, options, reason is None)):
        if options.compile == "cuda_graphs":
            raise ConfigError(
                f"acceleration.compile=cuda_graphs cannot record {obstacle}. Set "
                "acceleration.compile=auto."
            )
        mode = "default"
    if reason is None:
        enable_fused(
            model,
            compile=mode != "none",
            float8=options.float8,
            gradient_checkpointing=options.gradient_checkpointing,
            cuda_graphs=mode == "cuda_graphs",
            dropout_per=options.dropout_per,
        )
        return f"fast path, compile={mode}" + (", float8" if options.float8 else "")
    backbone: Any = find_backbone(model)
    if mode != "none":
        # One by one: what is compiled for the first layer serves all, in a fraction of the time.
        for layer in backbone.layers:
            layer.compile(dynamic=False)
    demanded = options.compile == "cuda_graphs"
    run_as(model, RecordedLayers(model, demanded=demanded) if mode == "cuda_graphs" else None)
    return f"plain layers ({reason}), compile={mode}"


def make_room(model: nn.Module, token_budget: int) -> None:
    """Let go of recorded passes where rows that are scored need their memory; on CUDA only.

    Args:
        model: As for `accelerate`.
        token_budget: Tokens of a row that is scored.
    """
    backbone: Any = find_backbone(model)
    device, way = next(backbone.parameters()).device, getattr(backbone, RUN_AS, None)
    if device.type != "cuda" or way is None:
        return
    torch.cuda.empty_cache()
    dtype = compute_dtype(backbone.layers[0].self_attn.q_proj)
    needed = scoring_bytes(backbone.config, token_budget, dtype.itemsize)
    if torch.cuda.mem_get_info(device)[0] < needed:
        way.forget()
        torch.cuda.empty_cache()


def _why_not_recorded(model: nn.Module, options: Acceleration, fused: bool) -> str | None:
    """What of the passes of a model that learns cannot be recorded; None if nothing is."""
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        return None
    draws = drops_inputs(model) and not (fused and options.dropout_per == "row")
    if options.gradient_checkpointing and draws:
        # That restores the state of the generator, which a recorded pass cannot.
        again = "layers that are computed again and drop other inputs for each token"
        return f"{again}, as acceleration.dropout_per=row does not" if fused else again
    if fused:
        return None
    num_bytes = sum(p.nbytes for p in learned)
    if num_bytes > MOST_GRADIENTS:
        return f"gradients of {num_bytes / 1e9:.1f} GB, which it would keep twice"
    return _what_waits(find_backbone(model))


def _what_waits(backbone: Any) -> str | None:
    """What may wait for the device in the middle of a pass of plain layers, and end a recording."""
    for module in backbone.layers.modules():
        kind = type(module).__name__
        if "Dropout" in kind and not isinstance(module, nn.Dropout) and getattr(module, "p", 0) > 0:
            return f"{kind}, which draws on the CPU"
        of_base = not type(module).__module__.startswith("peft.")
        linear = of_base and hasattr(module, "in_features")
        if linear and quant_state(module) is None and not is_whole(module):
            if type(module) is nn.Linear:
                kind = type(module.weight.data).__name__
            return f"{kind}, only weights of 16 bit and 4 bits of bitsandbytes"
    if getattr(backbone.norm, "base_layer", backbone.norm).weight.dtype == torch.float32:
        return "attention in float32, which waits for the lengths of questions"
    return None


def _counts_outliers(backbone: Any) -> bool:
    """Whether layers are in 8 bits of bitsandbytes, which take outliers apart, now 3, now 5.

    Compiled, each number is compiled for: half as fast as not at all (`benchmarks/README.md`).
    """
    return any(type(module).__name__ == "Linear8bitLt" for module in backbone.layers.modules())


def _configure_compiler() -> None:
    import torch._dynamo
    import torch._functorch.config

    # Without it, what a gradient of our own is part of would be traced anew at every start.
    traces: Any = torch._functorch.config
    traces.autograd_cache_allow_custom_autograd_functions = True

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * VARIANTS)
