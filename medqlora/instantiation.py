"""What a config may make, whether it can, and making it.

The only module that makes objects from YAML: `pipeline` puts them together, and everything below is
given plain values.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, ListConfig, OmegaConf
from peft import PeftConfig

from medqlora import processes
from medqlora.errors import ConfigError, MedQLoRAError
from medqlora.finetuning import FullFinetuning
from medqlora.options import check_others, check_values

ALLOWED_TARGETS = (
    "medqlora.",
    "peft.",
    "lightning.",
    "torch.optim.",
    "bitsandbytes.optim.",
    "transformers.",
)
"""Where a `_target_` may point: a config that came with somebody's run folder is data, not code."""

_OWN_TARGETS = tuple(
    f"medqlora.{part}."
    for part in ("data", "quantization", "acceleration", "evaluation", "finetuning", "tracking")
)

_LIBRARY_TARGETS = (
    PeftConfig,
    Trainer,
    Callback,
    Logger,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)

BASELINES = ("base_16bit", "base_quantized")
"""What `baselines` of train can name."""

STRATEGIES = ("ddp", "fsdp")
"""What `trainer.strategy` can be: how several devices share the work."""

GROUPS = (
    "data",
    "prompt",
    "model",
    "quant",
    "optimizer",
    "scheduler",
    "loss",
    "acceleration",
    "trainer",
    "logger",
    "callbacks",
)
"""Config groups from which one option must be chosen; without `peft` a bare base is meant."""

_MADE = ("data", "prompt", "quant", "optimizer", "scheduler", "loss", "acceleration")
"""Those that make one object, and so cannot be empty."""

AVERAGES = ("EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging")
"""Callbacks of Lightning that average all weights."""

WATCHED = {
    "val/accuracy": "max",
    "val/macro_accuracy": "max",
    "val/loss": "min",
    "val/ece": "min",
    "val/brier": "min",
}
"""What is logged after each validation, and whether more or less of it is better."""

Config = DictConfig | Mapping[str, Any]


def make(node: Any, **runtime: Any) -> Any:
    """Instantiate a config node with objects that only exist at run time.

    Args:
        node: A node with `_target_`, or an empty one.
        **runtime: Further keyword arguments.

    Returns:
        The object; None for an empty node.

    Raises:
        ConfigError: If a `_target_` lies outside `ALLOWED_TARGETS`, or the arguments do not fit.
        MedQLoRAError: What the constructor itself raised.
    """
    if not node:
        return None
    plain = _plain(node)
    _check_node(plain, node._get_full_key("") if isinstance(node, DictConfig) else "")
    try:
        if not runtime:
            return hydra.utils.instantiate(plain)
        # Objects are handed over by a call: Hydra would look for `_target_` inside them.
        build = hydra.utils.instantiate(plain, _partial_=True)
    except (InstantiationException, TypeError, ValueError, AttributeError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MedQLoRAError):
                raise cause from error
            cause = cause.__cause__
        raise ConfigError(" ".join(str(error).split())) from error
    try:
        inspect.signature(build).bind(**runtime)
    except TypeError as error:
        _, values = next(_made_of(plain, ""))
        target = values["_target_"]
        raise ConfigError(f"{target} cannot be made from this config: {error}.") from error
    try:
        return build(**runtime)
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def device_of(cfg: Config) -> torch.device:
    """The device that `trainer` asks for.

    Raises:
        ConfigError: If it is a GPU and there is none.
    """
    accelerator = cfg["trainer"]["accelerator"]
    if accelerator in ("gpu", "cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(
                "trainer=gpu needs a CUDA device and torch sees none: run `python -m "
                "medqlora.doctor`, or choose trainer=cpu, for models such as model=tiny_gemma."
            )
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check(cfg: Config) -> None:
    """Refuse what cannot work or cannot take effect, before any data or weight is read.

    Raises:
        ConfigError: One line about the first such option.
    """
    for name in GROUPS:
        if name in cfg and not isinstance(cfg[name], Mapping | DictConfig):
            raise ConfigError(
                f"{name}={cfg[name]} is no option of that group. Choose one that --help lists, or "
                f"set single keys of it, {name}.KEY=VALUE."
            )
        if name in _MADE and name in cfg and "_target_" not in cfg[name]:
            raise ConfigError(
                f"{name}={cfg[name]} does not say what to make of it: it lacks _target_. Choose "
                f"one of {name}'s options, which --help lists."
            )
        if name in cfg:
            _check_node(_plain(cfg[name]), name)
    for name, node in cfg.get("callbacks", {}).items():
        if node and not isinstance(node, Mapping | DictConfig):
            raise ConfigError(
                f"callbacks.{name}={node} is no callback: it lacks _target_. Set null to leave "
                "one out, or give single keys of it."
            )
    check_others(_plain(cfg))
    device = device_of(cfg)
    between = cfg["trainer"].get("val_check_interval")
    if isinstance(between, float) and between > 1:
        raise ConfigError(
            f"trainer.val_check_interval={between} is no fraction of an epoch. Give one, such as "
            "0.5, or a whole number of rows."
        )
    for key in ("max_steps", "max_epochs"):
        if cfg["trainer"].get(key) == 0:
            raise ConfigError(
                f"trainer.{key}=0 leaves no update to make. Give one or more, or score the bare "
                "base with `python -m medqlora.evaluate peft=none`."
            )
    precision = cfg["trainer"].get("precision")
    if precision not in (None, "32-true", 32, "32"):
        raise ConfigError(
            f"trainer.precision={precision} has no effect: the base computes in "
            f"quant.compute_dtype={cfg['quant']['compute_dtype']} whatever Lightning is told. Set "
            "quant.compute_dtype=bfloat16 or float32 instead."
        )
    make(cfg["quant"])
    peft_config = make(cfg.get("peft"))
    make(cfg["acceleration"]).check_device(device)
    if "optimizer" not in cfg:
        return
    if peft_config is None:
        raise ConfigError(
            "peft=none leaves nothing to train. Choose peft=lora_r16, or score the bare base with "
            "`python -m medqlora.evaluate peft=none`."
        )
    for key, choices in (("resume", ("never", "auto")), ("select", ("best", "last"))):
        if cfg[key] not in choices:
            raise ConfigError(f"{key}={cfg[key]} is unknown. Choose {' or '.join(choices)}.")
    if not isinstance(cfg["baselines"], Sequence | ListConfig) or isinstance(cfg["baselines"], str):
        raise ConfigError(
            f"baselines={cfg['baselines']} is no list. Choose among {', '.join(BASELINES)}, or []."
        )
    unknown = set(map(str, cfg["baselines"])) - set(BASELINES)
    if unknown:
        raise ConfigError(
            f"baselines={sorted(unknown)} are unknown. Choose among {', '.join(BASELINES)}, or []."
        )
    _check_watched(cfg)
    _check_processes(cfg)


def _check_watched(cfg: Config) -> None:
    """Refuse a callback that waits for a number that is never logged, keeps the worst, or averages.

    Lightning's averages are of all weights, packed codes included, and are not what is written.
    """
    for name, node in cfg["callbacks"].items():
        if str((node or {}).get("_target_")).rpartition(".")[2] in AVERAGES:
            raise ConfigError(
                f"callbacks.{name} would average the 4-bit codes of the base like numbers, and its "
                f"average is no adapter that is written. Set callbacks.{name}=null."
            )
    for name in ("checkpoints", "early_stopping"):
        node = cfg["callbacks"].get(name) or {}
        monitor, mode = node.get("monitor"), node.get("mode")
        if monitor is None:
            continue
        of_group = monitor.startswith("val/") and monitor.count("/") > 1  # as of a subject
        at_updates = name == "early_stopping" and monitor == "train/loss"
        if monitor not in WATCHED and not of_group and not at_updates:
            raise ConfigError(
                f"callbacks.{name}.monitor={monitor} is not logged after a validation. Choose "
                f"{', '.join(WATCHED)}, or an accuracy such as val/subject_name/Anatomy."
            )
        if monitor in WATCHED and mode not in (None, WATCHED[monitor]):
            raise ConfigError(
                f"callbacks.{name}.mode={mode} would take the worst {monitor} for the best. Set "
                f"callbacks.{name}.mode={WATCHED[monitor]}."
            )


def _check_processes(cfg: Config) -> None:
    """Refuse what does not go together with the processes there are."""
    trainer = cfg["trainer"]
    strategy, devices = trainer.get("strategy"), trainer.get("devices", 1)
    if strategy not in (None, "auto", *STRATEGIES):
        raise ConfigError(
            f"trainer.strategy={strategy} is unknown. Choose trainer=ddp or trainer=fsdp, or "
            "trainer=gpu for one device."
        )
    if strategy in STRATEGIES and not processes.launched():
        raise ConfigError(
            f"trainer={strategy} needs one process a device, and Lightning would start them by "
            "running this Hydra command again in each. Type: torchrun --nproc-per-node 2 -m "
            f"medqlora.train trainer={strategy} ..."
        )
    if strategy not in STRATEGIES:
        if processes.world_size() > 1:
            raise ConfigError(
                f"torchrun started {processes.world_size()} processes, and this trainer uses one "
                "device, so each would do the whole run. Add trainer=ddp or trainer=fsdp."
            )
        if devices not in (1, "auto", "1"):
            raise ConfigError(
                f"trainer.devices={devices} needs as many processes. Type: torchrun "
                "--nproc-per-node N -m medqlora.train trainer=ddp ..."
            )
        return
    acceleration = make(cfg["acceleration"])
    if acceleration.compile == "cuda_graphs" and strategy == "fsdp":
        raise ConfigError(
            "acceleration.compile=cuda_graphs cannot record trainer=fsdp, which fetches weights "
            "in between. Set acceleration.compile=auto, or choose trainer=ddp."
        )
    if strategy == "fsdp":
        if acceleration.of_fast_path:
            raise ConfigError(
                f"acceleration.{acceleration.of_fast_path[0]} reads whole weights, "
                "which trainer=fsdp shares out. Leave it out, or choose trainer=ddp."
            )
        quant = make(cfg["quant"])
        if quant.changes_weights:
            raise ConfigError(
                f"quant.data_type={quant.data_type} with trainer=fsdp would cut blocks of "
                "quantised weights apart. Choose quant=none, or trainer=ddp with this quant."
            )
        if isinstance(make(cfg["peft"]), FullFinetuning):
            raise ConfigError(
                "peft=full with trainer=fsdp would leave every weight whole: only frozen weights "
                "are shared out. Choose an adapter, such as peft=lora_r16, or trainer=ddp."
            )


def _check_node(node: Any, place: str) -> None:
    """Refuse targets that a config may not name, and values that do not fit theirs.

    Raises:
        ConfigError: One line about the first of them.
    """
    _refuse_interpolations(node)
    made = [
        (_allowed_target(str(values["_target_"])), values, where)
        for where, values in _made_of(node, place)
    ]
    for target, values, where in made:
        check_values(target, values, where)


def _made_of(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_` in a nested config, and its place."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield place, node
        for key, value in node.items():
            yield from _made_of(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _made_of(value, f"{place}[{index}]")


def _allowed_target(target: str) -> Any:
    """The part that a `_target_` names, if a config may name it.

    The prefix alone does not do: `medqlora.pipeline.os.system` begins as it should, and
    `from_pretrained` of a library runs the code of a model.

    Raises:
        ConfigError: If it is not allowed, or there is no such part.
    """
    if target.startswith(ALLOWED_TARGETS):
        try:
            found = pkgutil.resolve_name(target)
        except Exception as error:  # whatever importing it raises
            raise ConfigError(f"_target_={target} is not there: {error}.") from error
        if target.startswith("medqlora."):
            own = f"{getattr(found, '__module__', '')}."
            if own.startswith(_OWN_TARGETS) and (
                inspect.isclass(found) or inspect.isfunction(found)
            ):
                return found
        elif inspect.isclass(found) and issubclass(found, _LIBRARY_TARGETS):
            return found
    raise ConfigError(
        f"_target_={target} is not run: a config may only name parts of "
        f"{', '.join(name.rstrip('.') for name in ALLOWED_TARGETS)}, and of libraries only "
        "adapter configs, optimisers, schedulers, callbacks, loggers and the Trainer. Correct "
        "the config."
    )


def _refuse_interpolations(node: Any) -> None:
    """Hydra would resolve what is left of them, and they can make up a new `_target_`."""
    if isinstance(node, Mapping):
        for value in node.values():
            _refuse_interpolations(value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            _refuse_interpolations(value)
    elif isinstance(node, str) and "${" in node:
        raise ConfigError(
            f"the config holds {node[:60]!r}, which would be computed, and a config.yaml holds "
            "values only. Write the value."
        )


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
