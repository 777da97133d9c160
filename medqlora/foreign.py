"""A config from elsewhere chooses options; what Hydra itself would run is not for it to choose.

`--config-path RUN --config-name config` repeats a run, perhaps one that somebody sent. Hydra makes
objects of its own from the node `hydra` (launcher, sweeper, callbacks, loggers), sets environment
variables and makes folders before any code of this package sees the config, so the node is read
first. What the rest of the config may make, `instantiation.make` says.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from medqlora.errors import ConfigError
from medqlora.masking import is_secret_name

_FOLDER_FLAGS = ("config_path", "config_dir")
_PARTS = {
    "launcher": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "sweeper": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
}
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*)")
_COMPUTED = re.compile(r"\$\{\s*oc\.(?:create|decode|deprecated)\s*:")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While entered, Hydra refuses a config from elsewhere that would run something.

    Raises:
        ConfigError: If the command line names a pickle, or a config that is refused.
    """
    asked, _ = get_args_parser().parse_known_args(sys.argv[1:])
    if asked.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun reads a pickle, which can run any code. Repeat a run by its "
            "config: --config-path RUN --config-name config."
        )
    if not any(getattr(asked, flag) for flag in _FOLDER_FLAGS):
        yield  # the options are those of this package and of who typed the line
        return
    load = ConfigLoaderImpl.load_configuration

    def load_and_check(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = load(self, *args, **kwargs)
        check(OmegaConf.to_container(cfg, resolve=False), asked.overrides)  # type: ignore[arg-type]
        return cfg

    ConfigLoaderImpl.load_configuration = load_and_check  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def check(config: Mapping[str, Any], typed: list[str]) -> None:
    """Refuse a composed config whose `hydra` node would run code, or that reads secrets.

    Args:
        config: The config with its node `hydra`, interpolations as they are written.
        typed: Overrides of the command line, which are the user's own word.

    Raises:
        ConfigError: One line about the first thing that is refused.
    """
    hydra = config["hydra"]
    harmless = {
        **{name: _is_own_part(name, hydra[name]) for name in _PARTS},
        "callbacks": not hydra.get("callbacks"),
        **{name: _logs_nothing(hydra.get(name) or {}) for name in ("job_logging", "hydra_logging")},
        "job.env_set": not hydra["job"].get("env_set"),
        **{
            name: _stays_here(_at(hydra, name)) for name in ("run.dir", "sweep.dir", "sweep.subdir")
        },
    }
    for name, is_harmless in harmless.items():
        if not is_harmless and not _is_typed(name, typed):
            _refuse(f"hydra.{name}={_short(_at(hydra, name))}")
    for text in _texts({key: node for key, node in config.items() if key != "hydra"}):
        names = _ENVIRONMENT.findall(text)
        if _COMPUTED.search(text) or any("$" in n or is_secret_name(n.strip()) for n in names):
            _refuse(_short(text))


def _at(node: Any, name: str) -> Any:
    for key in name.split("."):
        node = node[key]
    return node


def _is_typed(name: str, typed: list[str]) -> bool:
    keys = (f"hydra.{name}", f"hydra/{name}")
    return any(word.lstrip("+~").startswith(keys) for word in typed)


def _is_own_part(name: str, node: Any) -> bool:
    """Whether a launcher or sweeper is Hydra's own, and makes nothing else."""
    return list(_targets(node)) == [_PARTS[name]]


def _logs_nothing(node: Any) -> bool:
    """Whether a logging config has no handlers, which can be any callable and write any file."""
    known = {"version", "root", "disable_existing_loggers"}
    return isinstance(node, Mapping) and node.get("root") is None and set(node) <= known


def _stays_here(folder: Any) -> bool:
    """Whether a folder lies below the working directory, with no more computed than the time."""
    plain = re.sub(r"\$\{(?:now:[\w%:-]*|sweep_name:|hydra\.job\.num)\}", "0", str(folder))
    path = PurePath(plain)
    return "$" not in plain and not path.is_absolute() and ".." not in path.parts


def _refuse(what: str) -> None:
    raise ConfigError(
        f"{what} of the config that was given is not used: a config from elsewhere may choose "
        "options, not what Hydra runs, where it writes or what it reads of the environment. Remove "
        "it from the file, or type it on the command line."
    )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield str(value)
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node
