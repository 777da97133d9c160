"""Checks the shapes that signatures state, in every function of the package that the tests call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker of jaxtyping's import hook: array annotations only.

    The others are pyright's. At run time they would stand between a wrong option and the line that
    tells the user what to type instead.
    """
    annotations = function.__annotations__
    arrays = {name: hint for name, hint in annotations.items() if _has_array(hint)}
    if not arrays:
        return function
    function.__annotations__ = arrays
    return _beartype(function)


def _has_array(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_has_array(inner) for inner in get_args(hint))
