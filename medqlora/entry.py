"""What every command shares: Hydra around a function, one line for an expected failure, exit codes.

Exit code 0 only when all that was asked was done, 2 for a bad request, 1 for a failed run, 130
after Ctrl-C, 143 after SIGTERM. `HYDRA_FULL_ERROR=1` shows tracebacks instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from medqlora.config import CONFIG_DIR
from medqlora.errors import MedQLoRAError

log = logging.getLogger("medqlora")

Task = Callable[[DictConfig, Path], None]


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
            show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
            os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra.main then raises instead of printing
            exit_codes: list[int] = []

            def job(cfg: DictConfig) -> None:
                run_dir = Path(HydraConfig.get().runtime.output_dir)
                if _keeps_log():
                    _log_to(run_dir / f"{config_name}.log")
                try:
                    task(cfg, run_dir)
                except BaseException as error:
                    if show_traceback or isinstance(error, SystemExit):
                        raise
                    exit_codes.append(_report(error))
                    if isinstance(error, KeyboardInterrupt):
                        raise
                finally:
                    _close_logs()

            _console_logging()
            try:
                hydra.main(
                    version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name
                )(job)()
            except (KeyboardInterrupt, HydraException, OmegaConfBaseException, ValueError) as error:
                if show_traceback:
                    raise
                if not exit_codes:
                    exit_codes.append(_report(error))
            finally:
                if not show_traceback:
                    os.environ.pop("HYDRA_FULL_ERROR", None)
            if exit_codes:
                sys.exit(max(exit_codes))

        main.__doc__ = task.__doc__
        return main

    return decorate


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
            path.unlink()
    with contextlib.suppress(OSError):
        old.rmdir()


def is_sweep() -> bool:
    """Whether the job that runs now is one of several (`-m`)."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def one_line(error: BaseException) -> str:
    """The message of an exception on a single line, its type named where it was not foreseen."""
    message = ", ".join(line.strip() for line in str(error).splitlines() if line.strip())
    message = message.replace(":, ", ": ")
    foreseen = isinstance(error, (MedQLoRAError, HydraException, OmegaConfBaseException))
    return message if foreseen and message else f"{type(error).__name__}: {message}"


def _report(error: BaseException) -> int:
    """Print one line about a failure to standard error and return its exit code."""
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
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code


def _keeps_log() -> bool:
    """Verbs that only print set `hydra.run.dir=.` and leave no file behind."""
    return HydraConfig.get().run.dir != "." or is_sweep()


def _close_logs() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    logging.getLogger("medqlora").setLevel(logging.DEBUG)


def _console_logging() -> None:
    """Warnings of all libraries and news of this package go to standard error, one line each."""

    class Concise(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            own = record.name.startswith("medqlora")
            return record.levelno >= (logging.INFO if own else logging.ERROR)

    handler = logging.StreamHandler()
    handler.addFilter(Concise())
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "datasets"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    warnings.simplefilter("default")
