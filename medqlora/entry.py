"""What every command shares: Hydra around a function, one line for an expected failure, exit codes.

Exit code 0 only when all that was asked was done, 2 for a bad request, 1 for a failed run or for a
sweep with a failed job, 130 after Ctrl-C, 143 after SIGTERM. `HYDRA_FULL_ERROR=1` shows tracebacks
instead.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import hashlib
import itertools
import logging
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medqlora import foreign, processes
from medqlora.config import CONFIG_DIR, compose
from medqlora.errors import ConfigError, MedQLoRAError
from medqlora.masking import MaskingFormatter, mask
from medqlora.options import check_others

log = logging.getLogger("medqlora")

Task = Callable[[DictConfig, Path], None]


class _JobFailed(Exception):
    """Carries the failure of a job, in one line, out of a worker process of a launcher."""


def sweep_name(arguments: list[str] | None = None) -> str:
    """A folder name that the same command line always gets, so that its sweep is found again.

    Args:
        arguments: Words of the command line; None for those of this process.

    Returns:
        The swept keys and eight digits of a hash of all overrides but those of Hydra.
    """
    words = sys.argv[1:] if arguments is None else arguments
    overrides = sorted(word for word in words if not word.startswith(("-", "hydra")))
    swept = [word.partition("=")[0] for word in overrides if _is_swept(word)]
    keys = re.sub(r"[^\w.-]+", "_", "-".join(swept))[:60]
    digest = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:8]
    return f"{keys}-{digest}" if keys else digest


def _is_swept(override: str) -> bool:
    """Whether an override names several values."""
    value = override.partition("=")[2]
    return value.startswith(("choice(", "range(", "glob(")) or (
        "," in value and not value.startswith(("[", "{", '"', "'"))
    )


# Cached, so that the workers of a launcher get the name of the line that was typed.
OmegaConf.register_new_resolver("sweep_name", lambda: sweep_name(), use_cache=True, replace=True)


_MULTIRUN = ("-m", "--multirun")


def group_options(verb: str) -> str:
    """The config groups that a verb has and what each can be, a line each, for its --help."""
    config: Any = OmegaConf.load(CONFIG_DIR / f"{verb}.yaml")
    names = [next(iter(entry)) for entry in config.defaults if OmegaConf.is_dict(entry)]
    return "\n".join(
        f"{name}: {', '.join(sorted(file.stem for file in (CONFIG_DIR / name).glob('*.yaml')))}"
        for name in names
        if (CONFIG_DIR / name).is_dir()
    )


OmegaConf.register_new_resolver("group_options", group_options, replace=True)


def command(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Turn `task(cfg, run_dir)` into the `main()` of one verb.

    Args:
        config_name: The verb's root config, which is also the name of its log file.

    Returns:
        A decorator. The decorated function takes no arguments, reads `sys.argv`, and ends the
        process with the exit code of CONTRACT only when something failed. In a sweep a failed job
        does not stop the others.
    """

    def decorate(task: Task) -> Callable[[], None]:
        def main() -> None:
            if not gc.isenabled():  # since the imports of a command: see `medqlora/__init__.py`
                gc.freeze()
                gc.enable()
            show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
            exit_codes: list[int] = []
            process = os.getpid()
            # Between overrides Hydra would not know it.
            sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in _MULTIRUN)

            def job(cfg: DictConfig) -> None:
                run_dir = Path(HydraConfig.get().runtime.output_dir)
                is_worker = os.getpid() != process
                if is_worker:
                    _console_logging()
                if _keeps_log():
                    _log_to(run_dir / f"{config_name}.log")
                try:
                    _refuse_what_nothing_reads(cfg, config_name)
                    check_others(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
                    if is_worker and _wants_gpu(cfg):
                        processes.take_gpu()
                    task(cfg, run_dir)
                except BaseException as error:
                    if show_traceback or isinstance(error, SystemExit):
                        raise
                    place = f"job {HydraConfig.get().job.num}: " if is_sweep() else ""
                    code = _report(error, place)
                    exit_codes.append(1 if is_sweep() and code == 2 else code)
                    if code == 2 and not is_sweep():
                        _remove_if_unused(run_dir, f"{config_name}.log")
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    if is_worker:
                        raise _JobFailed(f"{place}{one_line(error)}") from None
                finally:
                    _close_logs()

            _console_logging()
            if (refusal := _why_not_here(config_name)) is not None:
                sys.exit(_report(refusal))
            os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra.main then raises instead of printing
            try:
                with _run_folder_of_this_process(), foreign.guarded():
                    hydra.main(
                        version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name
                    )(job)()
            except _JobFailed as error:
                print(f"error: the first job that failed is {error}", file=sys.stderr, flush=True)
                exit_codes.append(1)
            except (
                ConfigError,
                KeyboardInterrupt,
                HydraException,
                OmegaConfBaseException,
                ValueError,
            ) as error:
                if show_traceback:
                    raise
                if not exit_codes:
                    exit_codes.append(_report(_unknown_key(error, config_name) or error))
            except OSError as error:  # the folder's or its log's: a job reports its own
                if show_traceback:
                    raise
                exit_codes.append(_report(_no_folder(error)))
            finally:
                if not show_traceback:
                    os.environ.pop("HYDRA_FULL_ERROR", None)
            if exit_codes:
                sys.exit(max(exit_codes))

        main.__doc__ = task.__doc__
        return main

    return decorate


def _wants_gpu(cfg: DictConfig) -> bool:
    """Whether this worker on one machine has to find a GPU; a cluster gives each job its own."""
    on_gpu = (cfg.get("trainer") or {}).get("accelerator") in ("gpu", "cuda")
    launcher = str(HydraConfig.get().launcher._target_)
    return on_gpu and launcher.endswith(("JoblibLauncher", "LocalLauncher"))


def _why_not_here(verb: str) -> ConfigError | None:
    """Why `torchrun` cannot start this command in several processes; None if it can."""
    if processes.world_size() == 1:
        return None
    if verb != "train":
        return ConfigError(
            f"torchrun started {processes.world_size()} processes, and medqlora.{verb} works in "
            f"one. Type: python -m medqlora.{verb} ..."
        )
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        return ConfigError(
            "torchrun with -m would run every job of the sweep in the same processes. Type one "
            "torchrun line a job, or sweep over single devices: python -m medqlora.train -m ..."
        )
    return None


@contextlib.contextmanager
def _run_folder_of_this_process() -> Iterator[None]:
    """Let Hydra make a run folder for the first process alone; the others get one to throw away."""
    if not processes.rank():
        yield
        return
    arguments = sys.argv
    with tempfile.TemporaryDirectory(prefix="medqlora-") as folder:
        sys.argv = [*arguments, f"hydra.run.dir={folder}"]
        try:
            yield
        finally:
            sys.argv = arguments


def move_log(old: Path, new: Path) -> None:
    """Write the log of this job into another run folder, and remove the folder made for it.

    Args:
        old: The folder Hydra made; removed if it holds nothing but the log.
        new: The folder of the run that goes on.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if (
            isinstance(handler, logging.FileHandler)
            and Path(handler.baseFilename).parent == old.resolve()
        ):
            root.removeHandler(handler)
            handler.close()
            path = Path(handler.baseFilename)
            _log_to(new / path.name)
            if not (old / "metrics.json").exists():
                path.unlink()
    with contextlib.suppress(OSError):
        old.rmdir()


def is_sweep() -> bool:
    """Whether the job that runs now is one of several (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def names_its_folder() -> bool:
    """Whether the command line says where its run folder is (`hydra.run.dir=DIR`)."""
    words = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else ()
    return any(word.startswith("hydra.run.dir=") for word in words)


def choices(verb: str) -> dict[str, str | None]:
    """The option chosen in each config group of the job that runs now.

    Args:
        verb: The entry point; empty where another one runs, as for the baselines of `train`.
    """
    if not HydraConfig.initialized() or HydraConfig.get().job.name != verb:
        return {}
    return {
        str(group): option if option is None else str(option)
        for group, option in HydraConfig.get().runtime.choices.items()
        if not str(group).startswith("hydra/")
    }


def command_line(verb: str) -> str:
    """The command that runs this job alone, as a shell would read it again, secrets masked.

    Args:
        verb: The entry point, such as "train".
    """
    words = sys.argv[1:]
    if is_sweep():
        task = HydraConfig.get().overrides.task
        # The values that a named sweep gives to this job are overrides of the job already.
        words = [word for word in task if not word.startswith(("sweep=", "+sweep="))]
    return mask(f"{_launcher()} -m medqlora.{verb} " + shlex.join(words))


def _launcher() -> str:
    """What started this process."""
    if not processes.launched():
        return "python"
    here, everywhere = processes.local_world_size(), processes.world_size()
    nodes = f"--nnodes {everywhere // here} " if everywhere > here else ""
    return f"torchrun {nodes}--nproc-per-node {here}"


def one_line(error: BaseException) -> str:
    """The message of an exception on a single line, its type named where it was not foreseen."""
    message = ", ".join(line.strip() for line in mask(str(error)).splitlines() if line.strip())
    message = message.replace(":, ", ": ")
    message = message.partition(", Config search path:")[0]  # of Hydra, behind what can be chosen
    name = type(error).__name__
    known = (MedQLoRAError, HydraException, OmegaConfBaseException, KeyboardInterrupt)
    if isinstance(error, known):
        return message or name
    return f"{name}: {message}" if message else name


def _report(error: BaseException, place: str = "") -> int:
    """Print one line about a failure to standard error and return its exit code.

    Args:
        error: What was raised.
        place: Which job it was, in front of the message.
    """
    if isinstance(error, KeyboardInterrupt):
        code, text = getattr(error, "exit_code", 130), str(error) or "interrupted"
    elif isinstance(error, MedQLoRAError):
        code, text = error.exit_code, one_line(error)
    elif isinstance(error, (HydraException, OmegaConfBaseException)):
        code, text = 2, one_line(error)
    else:
        log.debug("traceback", exc_info=error)
        code, text = 1, f"{one_line(error)} (HYDRA_FULL_ERROR=1 shows where)"
    log.debug("ended with exit code %d: %s", code, text)
    if processes.rank():
        if code == 2:
            return code  # the first process says the same
        place = f"process {processes.rank()}: "
    print(f"error: {place}{text}", file=sys.stderr, flush=True)
    return code


def _unknown_key(error: BaseException, config_name: str) -> ConfigError | None:
    """What Hydra says of a key that there is not, with the nearest that there is.

    Hydra's advice, to add it with a +, would have the value ignored.
    """
    if str(error).startswith("Config group override must be"):
        words = [word for word in sys.argv[1:] if word.endswith(("=null", "="))]
        return ConfigError(
            f"{' '.join(words)}: a group cannot be null. Choose one of its options, which --help "
            "lists; single keys of it can, such as callbacks.progress=null."
        )
    found = re.match(r"Could not override '(?:.*@)?([^']+)'", str(error))
    return _no_option(found[1], config_name) if found else None


def _refuse_what_nothing_reads(cfg: DictConfig, config_name: str) -> None:
    """Refuse a key that was added with a + where no part takes it and no value refers to it.

    Raises:
        ConfigError: It names the nearest key that there is.
    """
    overrides = [w for w in HydraConfig.get().overrides.task if w.startswith("+")]
    for override in overrides:
        key = override.lstrip("+").partition("=")[0].partition("@")[0]
        group = key in HydraConfig.get().runtime.choices
        referred = f"${{{key}" in str(OmegaConf.to_container(cfg))
        if not (group or referred or _goes_to_a_part(cfg, key)):
            unknown = _no_option(key, config_name)
            if unknown is not None:
                raise unknown


def _goes_to_a_part(cfg: DictConfig, key: str) -> bool:
    """Whether a key, or one above it, says what is made of it, which refuses what it lacks."""
    nodes = [OmegaConf.select(cfg, p) for p in itertools.accumulate(key.split("."), "{}.{}".format)]
    return any(OmegaConf.is_dict(node) and "_target_" in node for node in nodes)


def _no_option(key: str, config_name: str) -> ConfigError | None:
    known = list(_keys(OmegaConf.to_container(compose(config_name))))
    if key in known:
        return None
    near = difflib.get_close_matches(key, known, n=1)
    advice = f"Did you mean {near[0]}?" if near else "--help shows them all."
    return ConfigError(f"{key} is no option of {config_name}. {advice}")


def _keys(node: Any, place: str = "") -> Iterator[str]:
    """Every key of a nested config, with those above it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{place}{key}"
            yield from _keys(value, f"{place}{key}.")


def _keeps_log() -> bool:
    """Verbs that only print set `hydra.run.dir=.` and leave no file behind."""
    return (HydraConfig.get().run.dir != "." or is_sweep()) and not processes.rank()


def _no_folder(error: OSError) -> ConfigError:
    return ConfigError(
        f"the run folder cannot be made or written ({error.strerror}: {error.filename}). Give "
        "another one with hydra.run.dir=DIR, for a sweep with hydra.sweep.dir=DIR."
    )


def _remove_if_unused(run_dir: Path, log_name: str) -> None:
    """A request that was refused before anything was written leaves no folder behind."""
    _close_logs()
    with contextlib.suppress(OSError):
        if {path.name for path in run_dir.iterdir()} == {log_name}:
            (run_dir / log_name).unlink()
            run_dir.rmdir()


def _close_logs() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: that is said once, without a traceback, and ends it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that the file cannot be written, and write to it no more."""
        logging.getLogger().removeHandler(self)
        self.stream = None  # type: ignore[assignment]  # flushing it would fail once more
        error = sys.exc_info()[1]
        print(f"warning: no more is written to {self.baseFilename} ({error})", file=sys.stderr)


def _log_to(path: Path) -> None:
    handler = _LogFile(path)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    logging.getLogger("medqlora").setLevel(logging.DEBUG)


class _ToStandardError(logging.StreamHandler):
    """Writes to what standard error is at the moment: a bar that is being drawn stands in for it.

    What is written then comes above the bar, on a line of its own.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # type: ignore[override]
        """Standard error."""
        return sys.stderr


def _console_logging() -> None:
    """Warnings of all libraries and news of this package go to standard error, one line each."""

    class Concise(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            own = record.name.startswith("medqlora") and not processes.rank()
            return record.levelno >= (logging.INFO if own else logging.ERROR)

    handler = _ToStandardError()
    handler.addFilter(Concise())
    handler.setFormatter(MaskingFormatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "datasets"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    warnings.simplefilter("default")
