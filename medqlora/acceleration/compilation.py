"""`torch.compile` for rows that always have the same shapes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from medqlora.acceleration.backbone import find_backbone
from medqlora.errors import ConfigError

CompileMode = Literal["none", "default", "cuda_graphs", "auto"]

CUDA_GRAPHS_UP_TO = 8192
"""Tokens a row up to which launching kernels costs more than running them."""


def compile_mode(mode: CompileMode, device: torch.device | str, token_budget: int) -> str:
    """What `mode` means on a device.

    Args:
        mode: "none", "default", "cuda_graphs", or "auto": none on the CPU, where the compiler
            needs a C++ toolchain; CUDA graphs for short rows and the default for long ones.
        device: Where the model runs.
        token_budget: Tokens a row.

    Returns:
        "none", "default" or "cuda_graphs".

    Raises:
        ConfigError: If the mode is unknown or CUDA graphs are asked for on another device.
    """
    kind = torch.device(device).type
    if mode not in ("none", "default", "cuda_graphs", "auto"):
        raise ConfigError(
            f"acceleration.compile={mode} is not known. Choose none, default, cuda_graphs or auto."
        )
    if mode == "cuda_graphs" and kind != "cuda":
        raise ConfigError(
            f"acceleration.compile=cuda_graphs has no effect on {kind}: it replays CUDA kernels. "
            "Choose acceleration.compile=auto, or trainer=gpu."
        )
    if mode != "auto":
        return mode
    if kind != "cuda":
        return "none"
    return "cuda_graphs" if token_budget <= CUDA_GRAPHS_UP_TO else "default"


def compile_backbone(
    model: nn.Module,
    mode: CompileMode = "auto",
    device: torch.device | str = "cpu",
    token_budget: int = 0,
) -> str:
    """Compile the transformer of a model in place; parameter names stay the same.

    Args:
        model: As for `find_backbone`.
        mode: See `compile_mode`.
        device: Where the model runs.
        token_budget: Tokens a row.

    Returns:
        The mode that was used.

    Raises:
        ConfigError: See `compile_mode`.
    """
    chosen = compile_mode(mode, device, token_budget)
    if chosen != "none":
        find_backbone(model).compile(
            dynamic=False, mode="reduce-overhead" if chosen == "cuda_graphs" else None
        )
    return chosen
