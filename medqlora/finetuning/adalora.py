"""AdaLoRA over packed rows: its penalty, its ranks and their state.

The ranks are PEFT's to move. Here all weights take part in one call, where PEFT makes some ten for
each of hundreds, which take longer than a step on a GPU; the numbers are the same.

References:
    Zhang et al. 2023, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners import adalora
from torch import Tensor, nn

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankAllocator(adalora.RankAllocator):
    """PEFT's, whose importance of every weight is brought up to date at once.

    Args:
        model: The model inside of `tuner`.
        peft_config: Its config.
        adapter_name: Its adapter.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str) -> None:
        super().__init__(model, peft_config, adapter_name)
        self.factors = {
            name: p
            for name, p in model.named_parameters()
            if "lora_" in name and adapter_name in name
        }

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Sensitivity and uncertainty of the weights, smoothed (equations 8 to 10)."""
        names = list(self.factors)
        for values in (self.exp_avg_ipt, self.exp_avg_unc):
            for name in names:
                if name not in values:
                    values[name] = torch.zeros_like(self.factors[name])
        each: Any = torch  # whose calls on lists are not in its type stubs
        gradients = [p.grad for p in self.factors.values()]
        now = each._foreach_mul([p.detach() for p in self.factors.values()], gradients)
        each._foreach_abs_(now)
        smooth = self._smoothed(self.exp_avg_ipt, now, self.beta1)
        change = each._foreach_sub(now, list(smooth.values()))
        each._foreach_abs_(change)
        self.exp_avg_unc = self._smoothed(self.exp_avg_unc, change, self.beta2)
        self.exp_avg_ipt = smooth
        self.ipt = dict(zip(names, now, strict=True))

    def _smoothed(
        self, average: Mapping[str, Tensor], now: list[Tensor], beta: float
    ) -> dict[str, Tensor]:
        each: Any = torch
        before = each._foreach_mul([average[name] for name in self.factors], beta)
        each._foreach_add_(before, each._foreach_mul(now, 1 - beta))
        return dict(zip(self.factors, before, strict=True))


def find_adalora(model: nn.Module) -> Any:
    """PEFT's model of an AdaLoRA adapter inside a model; None if it has another one or none."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, adalora.AdaLoraModel) else None


def allocate_at_once(model: nn.Module) -> None:
    """Let `RankAllocator` move the ranks of a model, in place; does nothing to other adapters."""
    tuner = find_adalora(model)
    ranks = getattr(tuner, "rankallocator", None)
    if ranks is not None:
        tuner.rankallocator = RankAllocator(tuner.model, ranks.peft_config, ranks.adapter_name)


def orthogonality(tuner: Any) -> Float[Tensor, ""]:
    """The penalty on P and Q that are not orthogonal (equation 4), with its weight.

    PEFT adds it in a forward pass of its own, which packed rows do not go through.
    """
    alike: dict[Any, list[Tensor]] = {}
    for name, p in tuner.rankallocator.factors.items():
        if "lora_A" in name or "lora_B" in name:
            alike.setdefault(("lora_A" in name, p.shape), []).append(p)
    norms = []
    for (is_a, _), members in alike.items():
        factors = torch.stack(members)
        gram = factors @ factors.mT if is_a else factors.mT @ factors
        eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        norms.append(torch.linalg.matrix_norm(gram - eye))
    return tuner.rankallocator.peft_config.orth_reg_weight * torch.cat(norms).mean()


def keep_ranks_in_use(tuner: Any) -> None:
    """Let the ranks that are written be those whose singular value is not zero.

    PEFT writes those of its last move, but restored weights are of an earlier one, and values that
    were set to zero grow again until the next. Before the first move all are written.
    """
    config = tuner.peft_config[tuner.rankallocator.adapter_name]
    if config.rank_pattern:
        config.rank_pattern = {
            name: values.ne(0).flatten().tolist()
            for name, values in tuner.rankallocator.factors.items()
            if "lora_E" in name
        }


def state_of(tuner: Any) -> dict[str, Any]:
    """What a checkpoint keeps of the ranks beside the weights."""
    ranks = tuner.rankallocator
    averages = {key: dict(getattr(ranks, key)) for key in _AVERAGES}
    return averages | {"rank_pattern": tuner.peft_config[ranks.adapter_name].rank_pattern}


def restore(tuner: Any, saved: Mapping[str, Any], device: torch.device) -> None:
    """Go on from what `state_of` gave.

    Args:
        tuner: As it is at the start.
        saved: The state.
        device: Where the weights are.
    """
    ranks = tuner.rankallocator
    for key in _AVERAGES:
        setattr(ranks, key, {name: t.to(device) for name, t in saved[key].items()})
    tuner.peft_config[ranks.adapter_name].rank_pattern = saved["rank_pattern"]
