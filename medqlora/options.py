"""Whether the values of a config fit what they are for, before anything is made of them.

The type of a value is the one that its target declares, the target being a part of ours or of a
library; the range of a number stands in `RANGES`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from beartype import BeartypeConf
from beartype.door import is_bearable

from medqlora.errors import ConfigError

_LIKE_PYTHON = BeartypeConf(is_pep484_tower=True)  # a whole number is a number


class Range(NamedTuple):
    """From `low` to `high`, each included unless it is `above` or `below`."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, int | float)
        if math.isinf(number):
            return False
        low = number > self.low if self.above else number >= self.low
        return low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"{self.low} or more"
        high = f"below {self.high}" if self.below else f"at most {self.high}"
        ends = [low] * (self.low > -math.inf) + [high] * (self.high < math.inf)
        return " and ".join(ends)


_COUNT, _SHARE = Range(1), Range(0, 1, below=True)
RANGES = {
    "seed": Range(0, 2**32 - 1),  # what numpy takes
    "hub_timeout": Range(0, above=True),
    "data.num_workers": Range(0),
    "optimizer.lr": Range(0, above=True),
    "optimizer.betas": _SHARE,
    "optimizer.eps": Range(0, above=True),
    "optimizer.weight_decay": Range(0),
    "optimizer.loraplus_ratio": Range(0, above=True),
    "optimizer.momentum": _SHARE,
    "optimizer.clip_threshold": Range(0, above=True),
    "optimizer.beta2_decay": Range(-math.inf, 0),
    "scheduler.num_cycles": _COUNT,
    "scheduler.power": Range(0, above=True),
    "peft.r": Range(0),  # of OFT, where a block size is given; of others peft refuses it
    "peft.init_r": Range(1),
    "peft.target_r": Range(1),
    "peft.lora_alpha": Range(0, above=True),
    "peft.lora_dropout": _SHARE,
    "peft.vera_dropout": _SHARE,
    "peft.module_dropout": _SHARE,
    "peft.oft_block_size": Range(0),
    "peft.deltaT": _COUNT,
    "peft.tinit": Range(0),
    "peft.tfinal": Range(0),
    "peft.beta1": Range(0, 1, above=True, below=True),
    "peft.beta2": Range(0, 1, above=True, below=True),
    "peft.num_virtual_tokens": Range(1),
    "trainer.max_epochs": Range(-1),
    "trainer.max_steps": Range(-1),
    "trainer.accumulate_grad_batches": _COUNT,
    "trainer.gradient_clip_val": Range(0),
    "trainer.val_check_interval": Range(0, above=True),
    "trainer.log_every_n_steps": _COUNT,
    "trainer.num_sanity_val_steps": Range(-1),
    "callbacks.checkpoints.every_n_minutes": Range(0, above=True),
    "callbacks.checkpoints.every_n_steps": _COUNT,
    "callbacks.nan_guard.every_n_rows": _COUNT,
    "callbacks.throughput.warmup_steps": Range(0),
    "callbacks.progress.refresh_seconds": Range(0),
    "callbacks.early_stopping.patience": Range(0),
    "callbacks.early_stopping.min_delta": Range(0),
}
"""Numbers that an option takes where its type says too little; of a list, each of its numbers."""

TYPES: dict[str, Any] = {
    "seed": int,
    "data.token_budget": int | Literal["auto"],  # which becomes a number before it is used
    "run": str | None,
    "runs": str | None,
    "adapter": str | None,
    "output": str | None,
    "evaluate.base": str | None,
    "hub_timeout": float,
    "model.path": str,
    "model.revision": str | None,
    "model.cache_quantized": bool,
}
"""Types of options that no target declares, or that it takes in another form."""


def check_values(target: Callable[..., Any], values: Mapping[str, Any], place: str = "") -> None:
    """Refuse values that the parameters of a target do not take.

    Args:
        target: A class or a function.
        values: Its keyword arguments. Those with a target of their own are left to that.
        place: Where they stand in the config, such as "optimizer".

    Raises:
        ConfigError: One line about the first such value.
    """
    hints, names = _hints(target), _names(target)
    for name, value in values.items():
        if name.startswith("_"):
            continue
        key = f"{place}.{name}" if place else name
        if names and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f" Did you mean {key.removesuffix(name)}{near[0]}?" if near else ""
            raise ConfigError(f"{key} is nothing that {target.__name__} takes.{advice}")
        if not (isinstance(value, Mapping) and "_target_" in value):
            check_value(key, value, TYPES.get(key, hints.get(name, Any)))


def check_others(values: Mapping[str, Any]) -> None:
    """Refuse values of `TYPES` that do not fit.

    Args:
        values: A whole config, plain.

    Raises:
        ConfigError: One line about the first such value.
    """
    for key, hint in TYPES.items():
        group, _, option = key.rpartition(".")
        here = values.get(group) if group else values
        if isinstance(here, Mapping) and option in here:
            check_value(key, here[option], hint)


def check_value(key: str, value: Any, hint: Any) -> None:
    """Refuse one value.

    Args:
        key: Of the config, such as "optimizer.lr".
        value: Plain.
        hint: Its type.

    Raises:
        ConfigError: If it is of another type, no number, or outside of its range.
    """
    if not _fits(value, hint):
        text = not isinstance(value, str) and _fits(str(value), hint)
        quoted = f", in quotes: {key}=\"'{value}'\"" if text and not _is_list(value) else ""
        raise ConfigError(f"{key}={_shown(value)} does not fit. Give {_in_words(hint)}{quoted}.")
    for number in _numbers(value):
        if math.isnan(number):
            raise ConfigError(f"{key}={_shown(value)} is no number. Give {_in_words(hint)}.")
        if key in RANGES and number not in RANGES[key]:
            raise ConfigError(f"{key}={_shown(value)} is out of range. Give {RANGES[key]}.")


@functools.cache
def _names(target: Callable[..., Any]) -> frozenset[str]:
    """Parameters; none where it takes any."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return frozenset() if any_name else frozenset(p.name for p in parameters)


@functools.cache
def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters; none where they cannot be told, as of a library's own names.

    Of a library's words another may be meant: `pissa_niter_[number of iters]` of peft stands for
    many.
    """
    of_fields = inspect.isclass(target) and dataclasses.is_dataclass(target)
    declared = target.__init__ if inspect.isclass(target) and not of_fields else target
    try:
        hints = typing.get_type_hints(declared)
    except (NameError, TypeError, AttributeError):
        return {}
    if not declared.__module__.startswith("medqlora."):
        hints = {name: hint | str if _has_words(hint) else hint for name, hint in hints.items()}
    collected = {p.name for p in inspect.signature(target).parameters.values() if p.kind in _MANY}
    return {name: hint for name, hint in hints.items() if name not in collected}


def _has_words(hint: Any) -> bool:
    return any(typing.get_origin(member) is Literal for member in _members(hint))


_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str):  # which is a sequence of texts, but nobody means it
        kinds = [member for member in _members(hint) if not _is_list_type(member)]
        return any(is_bearable(value, kind, conf=_LIKE_PYTHON) for kind in kinds)
    if isinstance(value, bool):  # which is a whole number to Python
        kinds = [member for member in _members(hint) if member not in (int, float)]
        return any(is_bearable(value, kind, conf=_LIKE_PYTHON) for kind in kinds)
    return any(is_bearable(form, hint, conf=_LIKE_PYTHON) for form in _forms(value))


def _forms(value: Any) -> Iterator[Any]:
    """A value, and what a list of YAML may stand for."""
    yield value
    if _is_list(value):
        yield tuple(value)
        yield [tuple(item) if _is_list(item) else item for item in value]
        if _hashable(value):
            yield set(value)


def _is_list(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _hashable(values: Iterable[Any]) -> bool:
    return all(not isinstance(value, list | dict) for value in values)


def _members(hint: Any) -> Iterator[Any]:
    """The types of a union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _members(member)
    else:
        yield hint


def _is_list_type(hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    return inspect.isclass(kind) and kind in (list, tuple, set, Sequence, Collection, Iterable, Set)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif _is_list(value):
        for item in value:
            yield from _numbers(item)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
}


def _in_words(hint: Any) -> str:
    """A type as somebody who types a command calls it."""
    words: list[str] = []
    members = list(_members(hint))
    for member in members:
        if typing.get_origin(member) is Literal:
            words += map(str, typing.get_args(member))
        elif _is_list_type(member):
            of_each = typing.get_args(member)
            fixed = typing.get_origin(member) is tuple and Ellipsis not in of_each
            words.append(f"a list of {len(of_each)}" if fixed else "a list")
        elif member in _WORDS and not (member is int and float in members):
            words.append(_WORDS[member])
        elif typing.get_origin(member) in (dict, Mapping):
            words.append("a mapping")
    return " or ".join(dict.fromkeys(words)) or str(hint)


def _shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if _is_list(value):
        return f"[{','.join(map(_shown, value))}]"
    return str(value)[:80]
