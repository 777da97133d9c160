"""Checks the shapes that signatures state, in every function of the package that the tests call."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, AbstractDtype, jaxtyped

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_package(name: str) -> None:
    """Check the shapes of what a package defines, of the modules that are imported from now on.

    Functions that state none run as they are: jaxtyping's own hook puts itself before each of them,
    which thousands of calls a run pay for.
    """
    sys.meta_path.insert(0, _Finder(name))


class _Finder(MetaPathFinder):
    """Finds what the other finders find, one of which may ask this one in turn."""

    def __init__(self, package: str) -> None:
        self.package, self.asked = package, set[str]()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package or fullname in self.asked:
            return None
        self.asked.add(fullname)
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        self.asked.remove(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Checks what another loader has made: it may count lines, for one."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        kinds = [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, AbstractDtype)
        ]
        if kinds:
            stated = re.compile(rf"\b(?:{'|'.join(kinds)})\[")
            _check_all(module, module.__name__, stated)


def _check_all(owner: Any, module: str, stated: re.Pattern[str]) -> None:
    """Put the check before the functions, methods and fields of a module or class that need it."""
    for name, value in list(vars(owner).items()):
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if getattr(function, "__module__", None) != module:
            continue
        if inspect.isclass(function):
            _check_all(function, module, stated)
            if is_dataclass(function) and _states(function, stated):
                jaxtyped(function, typechecker=_check)
        elif inspect.isfunction(function) and _states(function, stated):
            checked: Any = jaxtyped(function, typechecker=_check)
            setattr(owner, name, checked if function is value else type(value)(checked))


def _states(thing: Any, stated: re.Pattern[str]) -> bool:
    hints = vars(thing).get("__annotations__", {}) if inspect.isclass(thing) else None
    hints = thing.__annotations__ if hints is None else hints
    return any(stated.search(str(hint)) for hint in hints.values())


def _check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker that jaxtyping calls: array annotations only.

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
