"""AdaLoRA's penalty and ranks, taken at once, are those that PEFT and the paper have."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import RankAllocator as PeftRankAllocator

from medqlora.acceleration import last_hidden
from medqlora.finetuning import attach_adapter, load_adapter, save_adapter
from medqlora.finetuning.adalora import RankAllocator, find_adalora, orthogonality
from medqlora.finetuning.adapters import trainable_state

CONFIG = AdaLoraConfig(
    init_r=4, target_r=2, total_step=6, deltaT=2, target_modules=["q_proj", "down_proj"]
)


@pytest.fixture
def tuner(base):
    return find_adalora(attach_adapter(base(), CONFIG))


def step(tuner, number: int) -> None:
    """Weights and gradients of an update, and what the allocator makes of them."""
    generator = torch.Generator().manual_seed(number)
    for name, p in tuner.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator))
            p.grad = torch.randn(p.shape, generator=generator)
    tuner.update_and_allocate(number)


def test_ranks_are_moved_as_peft_moves_them(tuner):
    """To the bit, up to the end of the plan and behind it."""
    theirs = copy.deepcopy(tuner)
    theirs.rankallocator = PeftRankAllocator(theirs.model, theirs.peft_config["default"], "default")
    assert type(tuner.rankallocator) is RankAllocator
    for number in range(1, 9):
        for each in (tuner, theirs):
            step(each, number)
        for key in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            ours, others = (getattr(each.rankallocator, key) for each in (tuner, theirs))
            assert ours.keys() == others.keys()
            assert all(torch.equal(ours[name], others[name]) for name in ours), (number, key)
        patterns = [each.peft_config["default"].rank_pattern for each in (tuner, theirs)]
        assert patterns[0] == patterns[1], number
    kept = [flag for pattern in patterns[0].values() for flag in pattern]
    assert 0 < sum(kept) < len(kept)
    for (name, ours), (_, others) in zip(
        tuner.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(ours, others), name


def test_the_penalty_is_that_of_each_matrix(tuner):
    step(tuner, 1)
    distances = []
    for name, p in tuner.named_parameters():
        if "lora_A" in name:
            distances.append((p @ p.T - torch.eye(4)).norm())
        elif "lora_B" in name:
            distances.append((p.T @ p - torch.eye(4)).norm())
    expected = CONFIG.orth_reg_weight * torch.stack(distances).mean()
    torch.testing.assert_close(orthogonality(tuner), expected)


def test_an_adapter_that_is_loaded_to_be_trained_has_it_too(base, tmp_path):
    """Its ranks may have been cut to what was left of them."""
    adapted = attach_adapter(base(), CONFIG)
    for number in range(1, 7):
        step(find_adalora(adapted), number)
    save_adapter(adapted, tmp_path / "adapter")
    loaded = find_adalora(load_adapter(base(), tmp_path / "adapter", trainable=True))
    factors = loaded.rankallocator.factors
    assert set(factors.values()) == {p for n, p in loaded.named_parameters() if "lora_" in n}
    assert sum(p.shape[0] for n, p in factors.items() if "lora_A" in n) < 4 * len(factors) / 3
    assert torch.isfinite(orthogonality(loaded))


@pytest.mark.parametrize("go_back", [False, True])
def test_what_is_written_are_the_ranks_in_use(base, rows, tmp_path, go_back):
    """Not those of the last move: what it cut grows again, and the best weights are of another."""
    model = attach_adapter(base(), CONFIG)
    tuner, row = find_adalora(model), rows[0]
    step(tuner, 1)
    step(tuner, 2)
    earlier = {name: p.clone() for name, p in trainable_state(model).items()}
    moved = copy.deepcopy(tuner.peft_config["default"].rank_pattern)
    step(tuner, 4)
    if go_back:
        model.load_state_dict(earlier, strict=False)
    else:
        step(tuner, 5)  # no move follows
    with torch.no_grad():
        scored = last_hidden(model, row)
        save_adapter(model, tmp_path / "adapter")
        loaded = last_hidden(load_adapter(base(), tmp_path / "adapter"), row)
    torch.testing.assert_close(loaded, scored, rtol=0, atol=0)
    kept = tuner.peft_config["default"].rank_pattern
    assert sum(map(sum, kept.values())) > sum(map(sum, moved.values())) - go_back


def test_other_models_have_none_of_it(base):
    assert find_adalora(base()) is None
    assert find_adalora(get_peft_model(base(), CONFIG)) is not None
