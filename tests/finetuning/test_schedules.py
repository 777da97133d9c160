"""Schedules start, peak and end where their definitions say."""

from __future__ import annotations

import math

import pytest
import torch

from medqlora.config import CONFIG_DIR
from medqlora.errors import ConfigError
from medqlora.finetuning.schedules import num_warmup_steps, wsd
from tests.finetuning.conftest import option

NAMES = ("constant", "linear", "cosine", "cosine_restarts", "wsd", "polynomial")


def rates(name: str, steps: int, *overrides: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = option("scheduler", name, *overrides)(optimizer, num_training_steps=steps)
    values = []
    for _ in range(steps):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*values, schedule.get_last_lr()[0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", ["20", "0.2"])
def test_each_schedule_rises_linearly_to_the_full_rate(name, warmup):
    values = rates(name, 100, f"scheduler.warmup={warmup}")
    assert values[0] == 0.0
    assert values[10] == pytest.approx(0.5)
    assert values[20] == pytest.approx(1.0)
    assert max(values) == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES[1:])
def test_each_schedule_but_the_constant_ends_at_zero(name):
    assert rates(name, 100, "scheduler.warmup=0.2")[100] == pytest.approx(0.0, abs=1e-6)


def test_the_shapes_between():
    zero = "scheduler.warmup=0"
    assert rates("constant", 100, zero)[73] == 1.0
    assert rates("linear", 100, zero)[25] == pytest.approx(0.75)
    assert rates("cosine", 100, zero)[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert rates("polynomial", 100, zero)[25] == pytest.approx(0.75**2)
    restarts = rates("cosine_restarts", 100, zero)
    assert restarts[49] < 0.01
    assert restarts[50] == pytest.approx(1.0)
    stable = rates("wsd", 100, zero)
    assert stable[79] == 1.0
    assert stable[90] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 0), (0.0, 0), (1, 1), (30, 30), (0.03, 3), (0.001, 0)]
)
def test_warmup_is_updates_or_a_fraction_of_them(warmup, steps):
    assert num_warmup_steps(warmup, 100) == steps


@pytest.mark.parametrize("warmup", [-1, 1.5, -0.1, 100, 500])
def test_a_warmup_that_cannot_work_is_refused(warmup):
    with pytest.raises(ConfigError, match=r"scheduler\.warmup="):
        num_warmup_steps(warmup, 100)


def test_a_run_of_one_update_trains():
    """A smoke test with trainer.max_steps=1 must not have a learning rate of 0."""
    assert rates("cosine", 1)[0] == 1.0


def test_warmup_and_decay_have_to_fit_the_run():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ConfigError, match="take 110 of the run's 100 updates"):
        wsd(optimizer, num_training_steps=100, warmup=0.5, decay=0.6)


def test_every_option_of_the_group_is_tried_here():
    assert {path.stem for path in (CONFIG_DIR / "scheduler").glob("*.yaml")} == set(NAMES)
