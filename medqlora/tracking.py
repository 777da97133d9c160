"""Where the numbers of a run go while it runs: metrics.csv always, Weights & Biases on request."""

from __future__ import annotations

import csv
import logging
import os
import secrets
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from medqlora.errors import ConfigError

log = logging.getLogger(__name__)

WANDB_MODES = ("auto", "online", "offline", "disabled")


class _AppendingWriter(ExperimentWriter):
    """Lightning's CSV writer, which goes on with an existing file instead of deleting it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.log_dir) / _ExperimentWriter.NAME_METRICS_FILE
        if path.exists():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class RunCSVLogger(CSVLogger):
    """Writes `metrics.csv` straight into the run folder and survives a resume."""

    def __init__(self, run_dir: Path, flush_logs_every_n_steps: int = 50) -> None:
        super().__init__(
            run_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps
        )

    @property
    @rank_zero_only
    def experiment(self) -> ExperimentWriter:  # type: ignore[override]
        """The writer, made on first use."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return cast(ExperimentWriter, self._experiment)

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run folder holds the whole config already."""


def build_loggers(
    wandb: dict[str, Any] | None,
    *,
    run_dir: Path,
    run_config: dict[str, Any],
    group: str | None = None,
) -> list[Logger]:
    """The loggers of one run.

    Args:
        wandb: Keys of `conf/logger/wandb.yaml`; None for `metrics.csv` alone.
        run_dir: The run folder.
        run_config: The resolved config, stored with the W&B run.
        group: Name that the jobs of one sweep share.

    Returns:
        The CSV logger and, where asked for, the W&B logger.

    Raises:
        ConfigError: If `wandb.mode` is unknown.
    """
    loggers: list[Logger] = [RunCSVLogger(run_dir)]
    if wandb is None:
        return loggers
    mode = wandb.get("mode", "auto")
    if mode not in WANDB_MODES:
        raise ConfigError(
            f"logger.wandb.mode={mode} is unknown. Choose one of {', '.join(WANDB_MODES)}."
        )
    if mode != "disabled":
        logger = _wandb_logger(wandb, mode, run_dir, run_config, group)
        if logger is not None:
            loggers.append(logger)
    return loggers


def finish_wandb(loggers: list[Logger], exit_code: int) -> None:
    """Close the W&B run of this job, so that the next job of a sweep starts its own."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            try:
                logger.experiment.finish(exit_code=exit_code, quiet=True)  # type: ignore[attr-defined]
            except Exception as error:  # a lost connection must not lose the run
                log.warning("W&B could not be closed: %s", error)


def _wandb_logger(
    options: dict[str, Any], mode: str, run_dir: Path, config: dict[str, Any], group: str | None
) -> Logger | None:
    """The W&B logger, or None with a warning where W&B does not start: training goes on."""
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
    except ImportError:
        log.warning(
            "wandb is not installed: the run is kept in metrics.csv only (pip install wandb)"
        )
        return None
    if mode == "auto":
        mode = "online" if _wandb_key() else "offline"
    folder = run_dir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "run_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    try:
        return WandbLogger(
            project=options.get("project") or "medqlora",
            entity=options.get("entity"),
            group=options.get("group") or group,
            name=options.get("name") or run_dir.name,
            tags=options.get("tags") or None,
            id=id_file.read_text().strip(),
            resume="allow",
            save_dir=run_dir,
            offline=mode == "offline",
            config=config,
            settings=wandb.Settings(silent=True, init_timeout=60, console="off"),
            reinit="finish_previous",
        )
    except Exception as error:
        log.warning("W&B did not start and training goes on without it: %s", error)
        return None


def _wandb_key() -> bool:
    """Whether a key is configured, in the environment or by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False
