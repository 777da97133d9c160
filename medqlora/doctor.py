"""Check this machine: packages, accelerator, dtype support, hub access, disk, W&B, and memory.

python -m medqlora.doctor
python -m medqlora.doctor data=sample model=tiny_gemma
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    get_token,
    hf_hub_url,
)
from huggingface_hub import try_to_load_from_cache as cached
from omegaconf import DictConfig
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medqlora import instantiation
from medqlora.budget import estimated_peak, is_hub_model
from medqlora.data.cache import cache_dir
from medqlora.entry import command, one_line
from medqlora.errors import DataError, MedQLoRAError, ModelError
from medqlora.evaluation import hardware
from medqlora.hub import hub_error, resolve_path
from medqlora.quantization import Checkpoint, QuantConfig
from medqlora.quantization.config import require_extra
from medqlora.tracking import _wandb_key

Status = Literal["pass", "warn", "fail"]

BUDGETS = (1024, 2048, 4096, 8192, 16_384, 32_768)
"""Tokens a row whose memory is estimated."""

USABLE = 0.92
"""Part of a GPU's memory that a run can have: the context and fragmentation take the rest."""

MAIN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "hydra-core")
"""Packages with a line of their own; the others share one."""

NF4_ERROR = (0.06, 0.13)
"""Relative error of a working NF4 round trip on normal numbers; about 0.09."""

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
_INSTALL = "Install again with the constraints: pip install -c constraints.txt -e ."
_HUB_ADVICE = (
    "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; `make quickstart` needs none of them."
)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        status: "pass", "warn" (works, but not as well as it could) or "fail".
        found: What was found.
        advice: What to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(cfg: DictConfig) -> list[Check]:
    """Every check, in order. A check that breaks is a failed check and stops no other.

    Args:
        cfg: The composed config of `doctor`.
    """
    timeout = float(cfg.hub_timeout)
    groups: dict[str, Callable[[], Iterator[Check]]] = {
        "packages": check_packages,
        "accelerator": check_accelerator,
        "machine": check_machine,
        "bitsandbytes": check_bitsandbytes,
        "compiler": check_compiler,
        "options": lambda: check_options(cfg),
        "hub": lambda: check_hub(cfg, timeout),
        "disk": lambda: check_disk(cfg),
        "W&B": check_wandb,
        "memory": lambda: check_memory(cfg),
    }
    checks: list[Check] = []
    for name, group in groups.items():
        try:
            checks += group()
        except Exception as error:
            checks.append(Check(name, "fail", one_line(error), "Report this with the whole table."))
    return checks


# --- software -------------------------------------------------------------------------------------


def requirements() -> tuple[str, list[str]]:
    """Supported Python versions and packages: of the installed metadata, else of pyproject.toml."""
    try:
        found = importlib.metadata.metadata("medqlora")
        return found["Requires-Python"], importlib.metadata.requires("medqlora") or []
    except importlib.metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parent.parent / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]


def check_packages() -> Iterator[Check]:
    """Python and every package, against the supported ranges."""
    python, wanted = requirements()
    version = platform.python_version()
    fits = SpecifierSet(python).contains(version, prereleases=True)
    yield Check(
        "Python",
        "pass" if fits else "fail",
        f"{version} (supported {python})",
        "" if fits else f"Make a virtual environment with Python {python}.",
    )
    fine = 0
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", f"pip install '{requirement}'")
            continue
        shown = f"{version} (supported {requirement.specifier})"
        if not requirement.specifier.contains(version, prereleases=True):
            yield Check(name, "fail", shown, f"pip install '{requirement}'. {_INSTALL}")
        elif name in MAIN_PACKAGES:
            yield Check(name, "pass", shown)
        else:
            fine += 1
    if fine:
        yield Check("other packages", "pass", f"{fine} within their supported ranges")


def check_bitsandbytes() -> Iterator[Check]:
    """A real 4-bit round trip on every kind of device there is."""
    import bitsandbytes.functional as bnb

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        name = f"bitsandbytes on {device}"
        advice = "Reinstall bitsandbytes for this torch and driver: `python -m bitsandbytes`."
        try:
            numbers = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
            packed, state = bnb.quantize_4bit(
                numbers, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            back = bnb.dequantize_4bit(packed, state)
            error = float((back - numbers).norm() / numbers.norm())
        except Exception as problem:
            yield Check(name, "fail", one_line(problem), advice)
            continue
        low, high = NF4_ERROR
        fits = low < error < high
        yield Check(
            name,
            "pass" if fits else "fail",
            f"NF4 and back changes numbers by {100 * error:.1f} %",
            "" if fits else f"{100 * low:.0f} to {100 * high:.0f} % is right. {advice}",
        )


def check_compiler() -> Iterator[Check]:
    """What torch.compile needs: Triton, a C compiler and Python's headers."""
    gpu = torch.cuda.is_available()
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((name for name in names if name and shutil.which(name)), "")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    parts = {
        "Triton": importlib.util.find_spec("triton") is not None,
        f"C compiler {compiler}".rstrip(): bool(compiler),
        "Python.h": headers.is_file(),
    }
    found = ", ".join(f"{name} {'there' if there else 'missing'}" for name, there in parts.items())
    if not gpu:
        yield Check("torch.compile", "pass", f"{found}; not used on the CPU")
    elif all(parts.values()):
        yield Check("torch.compile", "pass", found)
    else:
        yield Check(
            "torch.compile",
            "warn",
            found,
            "Install what is missing (such as gcc and python3-dev), or set "
            "acceleration.compile=none and acceleration.fused=off, which is several times slower.",
        )


# --- hardware -------------------------------------------------------------------------------------


def check_accelerator() -> Iterator[Check]:
    """Every GPU with its memory and what its matrix units multiply."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"torch was built for CUDA {built}" if built else "torch was built without CUDA"
        advice = (
            "Install or update NVIDIA's driver (`nvidia-smi` must list the GPU)"
            if built
            else "Install a torch with CUDA"
        )
        yield Check(
            "accelerator",
            "warn",
            f"no CUDA device; {reason}",
            f"{advice}, or use trainer=cpu with the tiny model: `make quickstart`.",
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        free = torch.cuda.mem_get_info(index)[0] / 1e9
        bf16, fp8 = capability >= (8, 0), capability >= (8, 9)
        found = (
            f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, {free:.1f} free, compute "
            f"capability {capability[0]}.{capability[1]}, bf16 {_yes(bf16)}, fp8 {_yes(fp8)}"
        )
        if not bf16:
            yield Check(
                f"cuda:{index}",
                "warn",
                found,
                "No bfloat16 matrix units: set quant.compute_dtype=float32, or use a newer GPU.",
            )
        elif free < 0.5 * properties.total_memory / 1e9:
            advice = "Another process holds much of its memory: `nvidia-smi` says which."
            yield Check(f"cuda:{index}", "warn", found, advice)
        else:
            yield Check(f"cuda:{index}", "pass", found)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def check_machine() -> Iterator[Check]:
    """Cores and main memory, as far as this process may use them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU", "pass", f"{hardware('cpu')['device']}, {cores} cores")
    total, free = main_memory_gb()
    if total is None or free is None:
        yield Check("main memory", "warn", "unknown", "The system does not say how much there is.")
        return
    enough = free >= 3
    yield Check(
        "main memory",
        "pass" if enough else "warn",
        f"{total:.1f} GB, {free:.1f} free",
        "" if enough else "Loading Gemma-2B takes about 3 GB: close other programs.",
    )


def main_memory_gb() -> tuple[float | None, float | None]:
    """Main memory and what is free of it, in GB; a container's limit counts."""
    total = hardware("cpu")["memory_gb"]
    free = None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: line.split()[1] for line in lines}
        free = int(values["MemAvailable"]) * 1024 / 1e9
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit.isdecimal() and total is not None:
            total = min(total, int(limit) / 1e9)
            free = min(free, max(0.0, (int(limit) - used) / 1e9))
    except (OSError, KeyError, ValueError):
        pass
    return total, free if free is not None else total


# --- model and data -------------------------------------------------------------------------------


def check_options(cfg: DictConfig) -> Iterator[Check]:
    """Whether the chosen quantisation and adapter can be made at all."""
    for group in ("quant", "peft"):
        try:
            made = instantiation.make(cfg[group])
            if isinstance(made, QuantConfig):
                require_extra(made)
        except MedQLoRAError as error:
            yield Check(group, "fail", one_line(error), "See the message.")
        else:
            found = getattr(made, "data_type", None) or type(made).__name__
            yield Check(group, "pass", "none" if made is None else str(found))


def check_hub(cfg: DictConfig, timeout: float) -> Iterator[Check]:
    """Whether model and data can be had, without downloading them."""
    path, revision = str(cfg.model.path), cfg.model.get("revision")
    hub_name = cfg.data.get("hub")
    on_hub = is_hub_model(path) or hub_name is not None
    reachable, check = _ask_hub(timeout) if on_hub else (False, None)
    if check is not None:
        yield check
    if is_hub_model(path):
        yield _hub_model(path, revision, reachable, timeout)
    else:
        yield _local_model(path)
    if hub_name is not None:
        yield _hub_data(str(hub_name), cfg.data.get("revision"), reachable, timeout)
    else:
        yield from _local_data(cfg.data)


def _ask_hub(timeout: float) -> tuple[bool, Check]:
    """Whether the hub answers, at the first try: its own client would retry for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False, Check("hub", "warn", "HF_HUB_OFFLINE is set", "Unset it to download.")
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:
        found = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        return False, Check("hub", "warn", found, _HUB_ADVICE)
    token = "logged in" if get_token() else "not logged in"
    return True, Check("hub", "pass", f"{constants.ENDPOINT} answers, {token}")


def _hub_model(path: str, revision: str | None, reachable: bool, timeout: float) -> Check:
    what = f"model {path}"
    names = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json")
    here = [n for n in names if isinstance(cached(path, n, revision=revision), str)]
    if "config.json" in here and any("model" in n for n in here) and "tokenizer.json" in here:
        return Check(what, "pass", "in the cache of this machine")
    if not reachable:
        return Check(what, "fail", "not on this machine, and the hub does not answer", _HUB_ADVICE)
    try:
        get_hf_file_metadata(hf_hub_url(path, "config.json", revision=revision), timeout=timeout)
    except Exception as error:
        return _refused(what, hub_error(error, what, ModelError))
    return Check(what, "pass", "can be downloaded")


def _hub_data(name: str, revision: str | None, reachable: bool, timeout: float) -> Check:
    what = f"data set {name}"
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"
    if not reachable:
        if folder.is_dir() and any(folder.iterdir()):
            return Check(what, "pass", "in the cache of this machine, perhaps in part")
        return Check(what, "fail", "not on this machine, and the hub does not answer", _HUB_ADVICE)
    try:
        HfApi().dataset_info(name, revision=revision, timeout=timeout)
    except Exception as error:
        return _refused(what, hub_error(error, what, DataError))
    return Check(what, "pass", "can be downloaded")


def _refused(what: str, error: MedQLoRAError) -> Check:
    """The hub's refusal, its reason and what to do about it in their columns."""
    reason, _, advice = str(error).partition(": ")
    return Check(what, "fail", reason.removeprefix(f"{what} "), advice[:1].upper() + advice[1:])


def _local_model(path: str) -> Check:
    what = f"model {path}"
    try:
        checkpoint = Checkpoint(path)
        count = len(checkpoint.files)
    except ModelError as error:
        return Check(what, "fail", str(error), "See the message.")
    folder = Path(resolve_path(path)).expanduser()
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return Check(what, "fail", "has no tokenizer", f"Copy tokenizer.json into {folder}.")
    return Check(what, "pass", f"folder with {count} tensors and a tokenizer")


def _local_data(data: DictConfig) -> Iterator[Check]:
    files = [data.get(f"{split}_file") for split in ("train", "val", "test")]
    given = [str(file) for file in files if file is not None]
    if not given:
        advice = "Set data.train_file, or choose data=sample or data=medmcqa."
        yield Check(f"data {data.get('name')}", "fail", "no file is given", advice)
    for file in given:
        path = Path(resolve_path(file)).expanduser()
        if path.is_file() and os.access(path, os.R_OK):
            yield Check(f"data {file}", "pass", f"{path.stat().st_size / 1e6:.1f} MB")
        else:
            yield Check(f"data {file}", "fail", "no such file", "Check the path and its folder.")


# --- disk, logging --------------------------------------------------------------------------------


def check_disk(cfg: DictConfig) -> Iterator[Check]:
    """Room where runs, downloads and caches go."""
    needs_model = is_hub_model(str(cfg.model.path))
    for name, folder, wanted in (
        ("disk for runs", Path(str(cfg.run_root)), 1.0),
        ("disk for the hub's cache", Path(constants.HF_HUB_CACHE), 6.0 if needs_model else 0.0),
        ("disk for MEDQLORA_CACHE", cache_dir(), 2.0 if needs_model else 0.1),
    ):
        yield disk_check(name, folder.expanduser().absolute(), wanted)


def disk_check(name: str, folder: Path, wanted_gb: float) -> Check:
    """Whether a folder, or the nearest that exists above it, has room and may be written to."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    found = f"{folder}, {free:.1f} GB free"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        advice = f"Make {existing} a folder that you may write to, or choose another."
        return Check(name, "fail", f"{folder} cannot be written to", advice)
    if free < 0.1:
        return Check(name, "fail", found, "Free some space.")
    if free < wanted_gb:
        return Check(name, "warn", found, f"A run wants {wanted_gb:.0f} GB: free some space.")
    return Check(name, "pass", found)


def check_wandb() -> Iterator[Check]:
    """Whether runs go to Weights & Biases."""
    mode = os.environ.get("WANDB_MODE")
    if importlib.util.find_spec("wandb") is None:
        yield Check("W&B", "warn", "not installed", "pip install wandb, or use logger=csv.")
    elif _wandb_key() and mode not in ("offline", "disabled"):
        yield Check("W&B", "pass", "configured: runs are uploaded")
    else:
        reason = f"WANDB_MODE={mode}" if mode else "no key"
        yield Check(
            "W&B",
            "pass",
            f"{reason}: runs are kept offline in their folder",
            "To upload: `wandb login`, later `wandb sync RUN/wandb/offline-*`.",
        )


# --- memory ---------------------------------------------------------------------------------------


def check_memory(cfg: DictConfig) -> Iterator[Check]:
    """The longest rows that fit the device, by estimate."""
    rows, device, available = memory_rows(cfg)
    if available is None:
        yield Check("rows that fit", "warn", f"memory of {device} is unknown", "See the table.")
        return
    plain = [budget for budget, without, _ in rows if without <= available]
    light = [budget for budget, _, with_checkpointing in rows if with_checkpointing <= available]
    room = f"{available:.1f} GB of {device}"
    if plain:
        found = f"data.token_budget up to {max(plain):,} in {room}"
        yield Check("rows that fit", "pass", found)
    elif light:
        yield Check(
            "rows that fit",
            "warn",
            f"data.token_budget up to {max(light):,} in {room}, with checkpointing only",
            "Set acceleration.gradient_checkpointing=true.",
        )
    else:
        yield Check(
            "rows that fit",
            "fail",
            f"not even {BUDGETS[0]:,} tokens in {room}",
            "Choose quant=nf4_full with acceleration.gradient_checkpointing=true, a smaller model, "
            "or a larger device.",
        )


def memory_rows(cfg: DictConfig) -> tuple[list[tuple[int, float, float]], str, float | None]:
    """Estimated peak of training, for the chosen model, quantisation and adapter.

    Args:
        cfg: The composed config of `doctor`.

    Returns:
        Tokens a row, GB without and GB with gradient checkpointing; the name of the device; the
        memory in GB that a run can have there, None if unknown.
    """
    gpu = torch.cuda.is_available()
    rows = [(b, estimated_peak(cfg, b), estimated_peak(cfg, b, True)) for b in BUDGETS]
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        return rows, properties.name, USABLE * properties.total_memory / 1e9
    return rows, "main memory", main_memory_gb()[1]


# --- tables ---------------------------------------------------------------------------------------


def checks_table(checks: list[Check]) -> Table:
    """The report: a line a check, and below what is not as it should be, what to do about it."""
    table = _table("medqlora doctor", None)
    table.add_column("", no_wrap=True)
    table.add_column("check", overflow="fold", max_width=30)
    table.add_column("found, → what to do", overflow="fold")
    for check in checks:
        status = Text(check.status, style=_COLOURS[check.status])
        table.add_row(status, Text(check.name), Text(check.found))
        if check.advice:
            table.add_row("", "", Text(f"→ {check.advice}", style="bold"))
    return table


def memory_table(cfg: DictConfig) -> Table:
    """Estimated peak of training by row length."""
    rows, device, available = memory_rows(cfg)
    room = "" if available is None else f"; * fits the {available:.1f} GB of {device}"
    table = _table(
        f"estimated peak of training {cfg.model.path}, GB",
        "formula: acceleration.memory.estimate_training_memory" + room,
    )
    for heading in ("data.token_budget", "no checkpointing", "checkpointing"):
        table.add_column(heading, justify="right")
    for budget, *peaks in rows:
        cells = [
            f"{peak:.2f}{' *' if available is not None and peak <= available else '  '}"
            for peak in peaks
        ]
        table.add_row(f"{budget:,}", *cells)
    return table


def _table(title: str, caption: str | None) -> Table:
    return Table(
        title=Text(title),
        caption=None if caption is None else Text(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


@command("doctor")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Examine this machine and print what was found."""
    checks = examine(cfg)
    console = Console()
    console.print(checks_table(checks))
    console.print()
    if not any(check.name in ("quant", "memory") and check.status == "fail" for check in checks):
        console.print(memory_table(cfg))
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise MedQLoRAError(
            f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}): what to do "
            "stands below each."
        )


if __name__ == "__main__":
    main()
