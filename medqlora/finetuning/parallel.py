"""Several devices for one run: copies of the model, or a base that is shared out among them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from medqlora.acceleration import find_backbone
from medqlora.errors import ConfigError

log = logging.getLogger(__name__)


class AdapterParallel(DDPStrategy):
    """Every process trains the same adapter on its own rows.

    Lightning's data parallelism without torch's wrapper around the model: next to nothing is
    trained, so its gradients are averaged in one transfer an update, and the backward pass is free
    of hooks, which compiled layers and CUDA graphs do not go well with. The module asks for the
    average once the gradients of an update are complete.

    Args:
        shard_base: Share the frozen weights of the layers out over the processes (FSDP2) and fetch
            each layer when it is needed. The adapter and the embedding stay whole everywhere.

    References:
        Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 5; Zhao et al. 2023 (FSDP),
        arXiv:2304.11277.
    """

    def __init__(self, *, shard_base: bool = False) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment())
        self.shard_base = shard_base

    def configure_ddp(self) -> None:
        """Start from the adapter of the first process; share the base out if wanted."""
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)
        if self.shard_base:
            shard_frozen_layers(self.lightning_module.model, self.root_device.type)  # pyright: ignore[reportArgumentType]

    def average_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their mean over the processes, in one transfer a dtype."""
        for dtype in {gradient.dtype for gradient in gradients}:
            same = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in same])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            parts = flat.split([gradient.numel() for gradient in same])
            for gradient, part in zip(same, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def shard_frozen_layers(model: nn.Module, device_type: str) -> None:
    """Keep one part of each layer's frozen weights in each process, in place.

    What is trained stays whole, and so does the embedding, whose weights the output head shares.

    Args:
        model: A base model with its adapter.
        device_type: "cuda" or "cpu".

    Raises:
        ConfigError: If the weights cannot be cut into parts.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone = find_backbone(model)
    layers: Any = backbone.layers
    frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
    if any(type(p) is not nn.Parameter or not p.is_floating_point() for p in frozen):
        raise ConfigError(
            "trainer=fsdp shares out weights of 16 or 32 bit, and this base is quantised: its "
            "blocks would be cut. Choose quant=none, or trainer=ddp with this quant."
        )
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    whole = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    sharded = {p for layer in layers for p in layer.parameters()} - whole
    fully_shard(backbone, mesh=mesh, ignored_params={*whole, *set(backbone.parameters()) - sharded})
    log.info(
        "each process keeps about %s of the %s frozen weights of the layers",
        f"{sum(p.to_local().numel() for p in sharded):,}",
        f"{sum(p.numel() for p in sharded):,}",
    )
