"""Who decays, at which rate; every optimiser takes steps and survives a save."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch

from medqlora.config import CONFIG_DIR
from medqlora.errors import ConfigError
from medqlora.finetuning import attach_adapter, optimizers
from medqlora.finetuning.optimizers import muon, parameter_groups
from tests.finetuning.conftest import Rows, option

NAMES = (
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "adafactor",
    "muon",
)


@pytest.mark.parametrize("name", NAMES)
def test_each_optimiser_takes_two_steps_and_goes_on_after_a_save(
    name, make_module, make_trainer, rows
):
    """A third step after loading the state equals a third step without."""
    module = make_module("nf4", "lora_r64", optimizer=name, scheduler="constant", steps=4)
    start = {n: p.detach().clone() for n, p in module.model.named_parameters() if p.requires_grad}
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, Rows(rows))
    trained = dict(module.model.named_parameters())
    changed = [n for n, p in start.items() if not torch.equal(p, trained[n])]
    assert len(changed) == len(start)

    named = [(n, p) for n, p in module.model.named_parameters() if p.requires_grad]
    first = trainer.optimizers[0]
    saved = copy.deepcopy(first.state_dict())
    weights = [p.detach().clone() for _, p in named]

    def step(optimizer):
        for _, p in named:
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()
        return [p.detach().clone() for _, p in named]

    expected = step(first)
    with torch.no_grad():
        for (_, p), w in zip(named, weights, strict=True):
            p.copy_(w)
    second = option("optimizer", name)(named)
    second.load_state_dict(saved)
    for ours, theirs in zip(step(second), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW32bit", "Lion8bit"])
def test_joined_tensors_are_updated_as_if_each_stood_alone(name, monkeypatch):
    """Bit for bit; what would share a block with another stands alone, and what is large."""
    monkeypatch.setattr(optimizers, "MAX_JOINED_BYTES", 4 * 128 * 128)
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (16, 512), (5000,), (16, 8), (64, 128), (128, 128), (128, 128)]
    start = [torch.randn(*shape, generator=generator) for shape in shapes]
    ours = [torch.nn.Parameter(t.clone()) for t in start]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    build = {
        "AdamW8bit": optimizers.adamw_8bit,
        "PagedAdamW32bit": optimizers.paged_adamw_32bit,
        "Lion8bit": optimizers.lion_8bit,
    }[name]
    options = {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.01}
    joined = build([(f"{i}.lora_A", p) for i, p in enumerate(ours)], **options)
    plain = getattr(bitsandbytes.optim, name)(theirs, **options)
    for group in joined.param_groups:  # vectors do not decay: let them here, as plain does
        group["weight_decay"] = 0.01
    assert sum(len(group["params"]) for group in joined.param_groups) == 5
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        joined.step()
        plain.step()
        joined.zero_grad()
        assert all(p.grad is None for p in ours)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


def test_gathered_gradients_are_those_that_the_update_sees():
    """Clipping acts on the joined gradient, and the parameters' own show it."""
    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    named = [(f"{i}.lora_A", p) for i, p in enumerate(parameters)]
    optimizer: Any = optimizers.adamw_8bit(named, lr=1)
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    optimizer.gather_gradients()
    [whole] = optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_([whole], 1.0)
    for p in parameters:
        assert p.grad is not None
        assert torch.allclose(p.grad, torch.full_like(p, (3 * 64 * 64) ** -0.5))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_gradients_that_lie_end_to_end_are_joined_where_they_are(order):
    """As a recorded pass leaves them; in another order they have to be moved."""
    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    named = [(f"{i}.lora_A", p) for i, p in enumerate(parameters)]
    optimizer: Any = optimizers.adamw_8bit(named, lr=1)
    numbers = torch.arange(3 * 64 * 64.0)
    for place, piece in zip(order, numbers.split(64 * 64), strict=True):
        parameters[place].grad = piece.view(64, 64)
    expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    optimizer.gather_gradients()
    [whole] = optimizer.param_groups[0]["params"]
    assert torch.equal(whole.grad, expected)
    assert (whole.grad.data_ptr() == numbers.data_ptr()) == (order == [0, 1, 2])


def test_norms_biases_and_vectors_do_not_decay():
    named = [
        ("layer.lora_A.weight", torch.nn.Parameter(torch.ones(2, 3))),
        ("layer.bias", torch.nn.Parameter(torch.ones(3))),
        ("norm.weight", torch.nn.Parameter(torch.ones(3))),
        ("layer.ia3_l", torch.nn.Parameter(torch.ones(3, 1))),
    ]
    groups = parameter_groups(named, lr=0.1, weight_decay=0.5)
    by_decay = {g["weight_decay"]: g["params"] for g in groups}
    assert [p is named[0][1] for p in by_decay[0.5]] == [True]
    assert len(by_decay[0.0]) == 3


def test_loraplus_gives_b_its_own_rate_and_changes_nothing_else():
    """Hayou et al. 2024, section 4: the rate of B is `ratio` times that of A."""
    a = ("layer.lora_A.default.weight", torch.nn.Parameter(torch.ones(2, 3)))
    b = ("layer.lora_B.default.weight", torch.nn.Parameter(torch.ones(3, 2)))
    groups = parameter_groups([a, b], lr=0.1, weight_decay=0.0, loraplus_ratio=16.0)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rates[id(a[1])] == pytest.approx(0.1)
    assert rates[id(b[1])] == pytest.approx(1.6)


def test_loraplus_without_lora_is_refused(base):
    model = attach_adapter(base("nf4"), option("peft", "ia3"))
    with pytest.raises(ConfigError, match=r"loraplus_ratio=16\.0 has no effect"):
        parameter_groups(model.named_parameters(), lr=0.1, loraplus_ratio=16.0)


def test_nothing_to_train_is_refused(base):
    with pytest.raises(ConfigError, match="peft=none leaves no weight to train"):
        parameter_groups(base("nf4").named_parameters(), lr=0.1)


def test_muon_refuses_vectors_by_name():
    vector = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"optimizer=muon updates matrices.*norm\.weight"):
        muon([("norm.weight", vector)], lr=0.1)


def test_every_option_of_the_group_is_tried_here():
    assert {path.stem for path in (CONFIG_DIR / "optimizer").glob("*.yaml")} == set(NAMES)
