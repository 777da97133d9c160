"""Where the configuration lives, and how notebooks and tests compose it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

_PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = next(d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if d.is_dir())
"""The Hydra tree: inside an installed wheel, or at the top level of a checkout."""

ASSETS_DIR = _PACKAGE / "assets"
"""The bundled sample questions and the tiny base model."""


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose one of the entry points' configs, as the command line would; also within a command.

    Args:
        config_name: Root config, such as "train".
        overrides: Hydra overrides, such as ["quant=nf4", "peft=lora_r16"].

    Returns:
        The composed config, interpolations unresolved, without the `hydra` node.

    Raises:
        hydra.errors.HydraException: If an override names an option that does not exist.
    """
    around, outer = GlobalHydra.instance(), GlobalHydra.instance().hydra
    around.clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            return hydra_compose(config_name=config_name, overrides=list(overrides))
    finally:
        around.hydra = outer
