"""Learning-rate schedules over the updates of a run; the arithmetic is transformers'."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from medqlora.errors import ConfigError


def num_warmup_steps(warmup: float, num_training_steps: int, key: str = "warmup") -> int:
    """Updates of warm-up.

    Args:
        warmup: A whole number of updates, or a fraction of all updates below 1.
        num_training_steps: Updates of the run.
        key: Name of the option, for messages.

    Returns:
        Updates; a fraction is rounded, because each update of warm-up begins one at a rate of 0.

    Raises:
        ConfigError: If it is neither, or leaves no update at the full rate.
    """
    if isinstance(warmup, int) or float(warmup).is_integer():
        steps = int(warmup)
    elif 0 < warmup < 1:
        steps = round(warmup * num_training_steps)
    else:
        steps = -1
    if steps < 0:
        raise ConfigError(
            f"scheduler.{key}={warmup} is neither a number of updates nor a fraction of them. "
            "Choose a whole number, such as 100, or a fraction below 1, such as 0.05."
        )
    # A run of a single update, as in a smoke test, trains at the full rate.
    if num_training_steps > 1 and steps >= num_training_steps:
        raise ConfigError(
            f"scheduler.{key}={warmup} takes {steps} of the run's {num_training_steps} updates, so "
            "that nothing is left behind it. Choose a fraction, such as 0.05, or train longer."
        )
    return min(steps, num_training_steps - 1)


def constant(optimizer: Optimizer, *, num_training_steps: int, warmup: float = 0) -> LambdaLR:
    """A linear rise over `warmup`, then the full rate."""
    return get_constant_schedule_with_warmup(
        optimizer, num_warmup_steps(warmup, num_training_steps)
    )


def linear(optimizer: Optimizer, *, num_training_steps: int, warmup: float = 0) -> LambdaLR:
    """A linear rise, then a linear fall to 0."""
    return get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps(warmup, num_training_steps), num_training_steps
    )


def cosine(optimizer: Optimizer, *, num_training_steps: int, warmup: float = 0) -> LambdaLR:
    """A linear rise, then half a cosine wave down to 0 (Loshchilov 2017, arXiv:1608.03983)."""
    return get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps(warmup, num_training_steps), num_training_steps
    )


def cosine_restarts(
    optimizer: Optimizer, *, num_training_steps: int, warmup: float = 0, num_cycles: int = 2
) -> LambdaLR:
    """A linear rise, then `num_cycles` times half a cosine wave down to 0 and a jump back."""
    return get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer,
        num_warmup_steps(warmup, num_training_steps),
        num_training_steps,
        num_cycles=num_cycles,
    )


def wsd(
    optimizer: Optimizer, *, num_training_steps: int, warmup: float = 0, decay: float = 0.2
) -> LambdaLR:
    """Warm-up, stable, decay: the full rate until the last `decay` updates, then a cosine to 0.

    References:
        Hu et al. 2024 (MiniCPM), arXiv:2404.06395, section 4.
    """
    rise = num_warmup_steps(warmup, num_training_steps)
    fall = num_warmup_steps(decay, num_training_steps, "decay")
    if rise + fall > num_training_steps:
        raise ConfigError(
            f"scheduler.warmup={warmup} and scheduler.decay={decay} take {rise + fall} of the "
            f"run's {num_training_steps} updates. Choose fractions that add up to less than 1."
        )
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=rise,
        num_decay_steps=fall,
        num_training_steps=num_training_steps,
    )


def polynomial(
    optimizer: Optimizer, *, num_training_steps: int, warmup: float = 0, power: float = 2.0
) -> LambdaLR:
    """A linear rise, then `(1 - progress) ** power` down to 0."""
    return get_polynomial_decay_schedule_with_warmup(
        optimizer,
        num_warmup_steps(warmup, num_training_steps),
        num_training_steps,
        lr_end=0.0,
        power=power,
    )
