"""Optimisers over the trainable weights: who decays, at which rate, and which algorithm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from medqlora.errors import ConfigError

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def parameter_groups(
    named_parameters: NamedParameters,
    *,
    lr: float,
    weight_decay: float = 0.0,
    loraplus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort trainable weights by learning rate and weight decay.

    Norms, biases and other vectors do not decay. With `loraplus_ratio` the matrices that start at
    zero (`lora_B`) learn that many times faster.

    Args:
        named_parameters: Names and weights.
        lr: Learning rate.
        weight_decay: Decay of the matrices.
        loraplus_ratio: Learning rate of `lora_B` over that of the others; 1 is plain LoRA.

    Returns:
        Groups for a torch optimiser, none empty.

    Raises:
        ConfigError: If nothing is trainable, or the ratio has no `lora_B` to act on.

    References:
        LoRA+: Hayou et al. 2024, arXiv:2402.12354, section 4.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise ConfigError(
            "peft=none leaves no weight to train. Choose an adapter, such as peft=lora_r16, or "
            "score the base model with `python -m medqlora.evaluate peft=none`."
        )
    if loraplus_ratio != 1.0 and not any(_is_lora_b(name) for name, _ in trainable):
        raise ConfigError(
            f"optimizer.loraplus_ratio={loraplus_ratio} has no effect: this peft option has no "
            "lora_B. Choose a LoRA, such as peft=lora_r16, or set optimizer.loraplus_ratio=1."
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        rate = lr * loraplus_ratio if _is_lora_b(name) else lr
        decay = 0.0 if _is_vector(parameter) else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _is_lora_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


def _is_vector(parameter: nn.Parameter) -> bool:
    # Some adapters store a vector as (1, n) or (n, 1).
    return sum(size > 1 for size in parameter.shape) < 2


def adamw(
    named_parameters: NamedParameters,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    loraplus_ratio: float = 1.0,
) -> Optimizer:
    """AdamW with float32 states, fused (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    groups = parameter_groups(
        named_parameters, lr=lr, weight_decay=weight_decay, loraplus_ratio=loraplus_ratio
    )
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu") or None
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


BLOCK = 256
"""Numbers that share a constant in the 8-bit states of bitsandbytes."""

MIN_8BIT = 4096
"""Numbers below which bitsandbytes keeps the states of a tensor in 32 bit."""


MAX_JOINED_BYTES = 16 << 20
"""Size from which a tensor is updated by itself: that takes longer than the call, and joined with
others its gradient would be there twice."""


@functools.cache
def _in_one_go(optimizer_class: type[Optimizer]) -> type[Optimizer]:
    """An optimiser of bitsandbytes that takes an update with few calls, none of which waits.

    It calls a kernel for every tensor and waits for the device after each: for the 252 of a LoRA
    on Gemma-2B that takes longer than both passes of a row of 2,048 tokens. Here the tensors of a
    group lie end to end in one, and the parameters are views of it. Only tensors of whole blocks
    are joined, so no block of 8-bit states crosses a border and the numbers are the same, and none
    of `MAX_JOINED_BYTES` or more. Paged
    states are read by the processor when a checkpoint is taken, so there, and only there, the
    device is waited for.
    """
    import bitsandbytes.optim.optimizer

    library: Any = bitsandbytes.optim.optimizer

    class InOneGo(optimizer_class):
        def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
            self._joined: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
            joined = [{**group, "params": self._join(group["params"])} for group in groups]
            super().__init__(joined, **options)

        def _join(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
            kinds: dict[Any, list[nn.Parameter]] = {}
            for p in parameters:
                whole_blocks = p.numel() % BLOCK == 0 and p.numel() >= MIN_8BIT
                joined = whole_blocks and p.nbytes < MAX_JOINED_BYTES
                kinds.setdefault((p.dtype, p.device) if joined else p, []).append(p)
            result = []
            for members in kinds.values():
                if len(members) == 1:
                    result += members
                    continue
                whole = nn.Parameter(torch.cat([p.data.flatten() for p in members]))
                for p, part in zip(members, _parts(whole.data, members), strict=True):
                    p.data = part
                self._joined.append((whole, members))
                result.append(whole)
            return result

        def gather_gradients(self) -> None:
            """Join the gradients as the weights are; those of the parameters become views."""
            for whole, members in self._joined:
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
                whole.grad = _end_to_end(grads)
                for p, part in zip(members, _parts(whole.grad, members), strict=True):
                    p.grad = part

        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if any(whole.grad is None for whole, _ in self._joined):
                self.gather_gradients()
            wait, library.sync_gpu = library.sync_gpu, lambda tensor: None
            try:
                super().step()
            finally:
                library.sync_gpu = wait
            for whole, _ in self._joined:
                whole.grad = None
            return loss

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none=set_to_none)
            for _, members in self._joined:
                for p in members:
                    p.grad = None

        def state_dict(self) -> dict[str, Any]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return super().state_dict()

    InOneGo.__name__ = InOneGo.__qualname__ = optimizer_class.__name__
    return InOneGo


def _end_to_end(tensors: list[Tensor]) -> Tensor:
    """All numbers of contiguous tensors in one; no copy where they lie so, as after a graph."""
    first, place = tensors[0], tensors[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        here = tensor.untyped_storage().data_ptr() == storage and tensor.storage_offset() == place
        if not (here and tensor.is_contiguous()):
            return torch.cat([tensor.flatten() for tensor in tensors])
        place += tensor.numel()
    return first.as_strided((place - first.storage_offset(),), (1,))


def _parts(flat: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    pieces = flat.split([p.numel() for p in like])
    return [piece.view_as(p) for piece, p in zip(pieces, like, strict=True)]


def _bitsandbytes(class_name: str) -> Callable[..., Optimizer]:
    def build(
        named_parameters: NamedParameters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        loraplus_ratio: float = 1.0,
        **options: Any,
    ) -> Optimizer:
        import bitsandbytes

        groups = parameter_groups(
            named_parameters, lr=lr, weight_decay=weight_decay, loraplus_ratio=loraplus_ratio
        )
        made: Any = _in_one_go(getattr(bitsandbytes.optim, class_name))
        return made(groups, lr=lr, betas=tuple(betas), **options)

    build.__name__ = class_name
    build.__doc__ = (
        f"`bitsandbytes.optim.{class_name}`. 8-bit states are for tensors of 4096 numbers and "
        "more; paged states are ordinary ones on the CPU."
    )
    return build


adamw_8bit = _bitsandbytes("AdamW8bit")
paged_adamw_8bit = _bitsandbytes("PagedAdamW8bit")
paged_adamw_32bit = _bitsandbytes("PagedAdamW32bit")
lion_8bit = _bitsandbytes("Lion8bit")


def adafactor(
    named_parameters: NamedParameters,
    *,
    lr: float,
    beta2_decay: float = -0.8,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    loraplus_ratio: float = 1.0,
) -> Optimizer:
    """Adam with a factored second moment (Shazeer & Stern 2018, arXiv:1804.04235)."""
    groups = parameter_groups(
        named_parameters, lr=lr, weight_decay=weight_decay, loraplus_ratio=loraplus_ratio
    )
    return torch.optim.Adafactor(groups, lr=lr, beta2_decay=beta2_decay, d=clip_threshold)


def muon(
    named_parameters: NamedParameters,
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    loraplus_ratio: float = 1.0,
) -> Optimizer:
    """Momentum with orthogonalised updates, for matrices only (Liu et al. 2025, arXiv:2502.16982).

    Raises:
        ConfigError: If a trainable weight is no matrix.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    other = [name for name, p in named if p.ndim != 2]
    if other:
        raise ConfigError(
            f"optimizer=muon updates matrices, but this peft option trains {len(other)} tensors "
            f"that are none, such as {other[0]}. Choose optimizer=adamw, or peft=lora_r16."
        )
    groups = parameter_groups(
        named, lr=lr, weight_decay=weight_decay, loraplus_ratio=loraplus_ratio
    )
    return torch.optim.Muon(groups, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
