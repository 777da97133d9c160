"""Where the numbers of a run go while it runs: metrics.csv always, other services on request.

None of those services can stop a run: whatever goes wrong there is one warning.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from medqlora.errors import ConfigError
from medqlora.masking import mask, masked

log = logging.getLogger(__name__)

WANDB_MODES = ("auto", "online", "offline", "disabled")


class _AppendingWriter(ExperimentWriter):
    """Lightning's CSV writer, which goes on with an existing file instead of deleting it.

    A run that was killed has logged more than its checkpoint holds and logs that again: its first
    row replaces those of its step and of later ones.
    """

    _goes_on = False

    def _check_log_dir_exists(self) -> None:
        self._goes_on = Path(self.metrics_file_path).exists()

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Record metrics; the first time, cut what is there."""
        if self._goes_on and step is not None:
            self._cut(step)
        self._goes_on = False
        super().log_metrics(metrics_dict, step)

    def _cut(self, step: int) -> None:
        """Keep the rows of earlier steps; a last one that was not written to its end goes too."""
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(line for line in file if line.endswith("\n"))
            rows = [row for row in reader if _is_before(row.get("step"), step)]
        self.metrics_keys = list(reader.fieldnames or ())
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)


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


class GuardedLogger(Logger):
    """Another logger, started at its first use; its failures are one warning and stop nothing.

    Args:
        title: What to call it in a warning.
        start: Makes the logger.
        finish: Ends it, given an exit code.
        abandon: Lets go of what is left of one that failed.
    """

    def __init__(
        self,
        title: str,
        start: Callable[[], Logger],
        finish: Callable[[Any, int], object],
        abandon: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        self.title = title
        self.inner: Logger | None = None
        self.failed = False
        self._start = start
        self._finish = finish
        self._abandon = abandon

    @property
    def name(self) -> str:
        """Its title."""
        return self.title

    @property
    def version(self) -> None:
        """None: the run folder is the version."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass metrics on."""
        self._try(lambda inner: inner.log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Nothing: each logger is given the whole config when it starts."""

    @rank_zero_only
    def save(self) -> None:
        """Start, where it has not: Lightning calls this before the first step."""
        self._try(lambda inner: inner.save())

    @rank_zero_only
    def finish(self, exit_code: int) -> None:
        """End the run there, if it was started."""
        if self.inner is not None:
            self._try(lambda inner: self._finish(inner, exit_code))
            if self.failed and self._abandon is not None:
                with contextlib.suppress(Exception):
                    self._abandon()
        self.inner, self.failed = None, True

    def _try(self, act: Callable[[Logger], object]) -> None:
        if self.failed:
            return
        try:
            if self.inner is None:
                self.inner = self._start()
            act(self.inner)
        except Exception as error:
            self.failed = True
            log.warning("%s failed and the run goes on without it: %s", self.title, _line(error))


def check_loggers(options: Mapping[str, Any]) -> None:
    """Refuse a logger that cannot work, before anything is loaded.

    Args:
        options: The config of the loggers.

    Raises:
        ConfigError: If `wandb.mode` is unknown, or the package of a logger is not installed.
    """
    for name, node in options.items():
        if name in LOGGERS and node is not None and not isinstance(node, Mapping):
            raise ConfigError(
                f"logger.{name}={node} is no group of options. Choose logger={name}, or set one of "
                f"its keys, such as logger.{name}.{LOGGERS[name]}."
            )
    mode = (options.get("wandb") or {}).get("mode", "auto")
    if mode not in WANDB_MODES:
        raise ConfigError(
            f"logger.wandb.mode={mode} is unknown. Choose one of {', '.join(WANDB_MODES)}."
        )
    for name, packages in _PACKAGES.items():
        if options.get(name) and not any(importlib.util.find_spec(p) for p in packages):
            raise ConfigError(
                f"logger={name} needs the package {packages[0]}, which is not installed. Type pip "
                f"install 'medqlora[{name}]', or choose logger=csv."
            )


LOGGERS = {
    "wandb": "mode=offline",
    "tensorboard": "log_graph=true",
    "mlflow": "experiment_name=NAME",
}
"""Loggers that an option can choose, with a key of each."""

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}


def build_loggers(
    wandb: dict[str, Any] | None = None,
    tensorboard: dict[str, Any] | None = None,
    mlflow: dict[str, Any] | None = None,
    *,
    run_dir: Path,
    run_config: dict[str, Any],
    group: str | None = None,
    tags: Sequence[str] = (),
) -> list[Logger]:
    """The loggers of one run.

    Args:
        wandb: Keys of `conf/logger/wandb.yaml`; None for no W&B.
        tensorboard: Keys of `conf/logger/tensorboard.yaml`; None for no TensorBoard.
        mlflow: Keys of `conf/logger/mlflow.yaml`; None for no MLflow.
        run_dir: The run folder.
        run_config: The resolved config, stored with the run, its secrets masked.
        group: Name that the jobs of one sweep share.
        tags: What the run is, such as "quant=nf4", where the config gives no tags.

    Returns:
        The CSV logger and those asked for.

    Raises:
        ConfigError: See `check_loggers`.
    """
    check_loggers({"wandb": wandb, "tensorboard": tensorboard, "mlflow": mlflow})
    loggers: list[Logger] = [RunCSVLogger(run_dir)]
    name = f"{group}-{run_dir.name}" if group else run_dir.name
    run_config = masked(run_config)
    if wandb is not None and wandb.get("mode", "auto") != "disabled":
        if importlib.util.find_spec("wandb"):
            start = partial(_start_wandb, masked(wandb), run_dir, run_config, group, name, tags)
            loggers.append(GuardedLogger("W&B", start, _finish_wandb, _abandon_wandb))
        else:
            log.warning(
                "wandb is not installed: the run is kept in metrics.csv only (pip install wandb)"
            )
    if tensorboard is not None:
        start = partial(_start_tensorboard, tensorboard, run_dir, run_config)
        loggers.append(GuardedLogger("TensorBoard", start, _finish_plain))
    if mlflow is not None:
        start = partial(_start_mlflow, mlflow, run_dir, run_config, group, name, tags)
        loggers.append(GuardedLogger("MLflow", start, _finish_plain))
    return loggers


def log_result(loggers: Sequence[Logger], split: str, section: Mapping[str, Any]) -> None:
    """Send the final scores of a split to every service, as `final/<split>/accuracy` and so on.

    Args:
        loggers: What `build_loggers` returned.
        split: "val" or "test".
        section: Its section of metrics.json.
    """
    keys = ("n", "accuracy", "ci_low", "ci_high", "macro_accuracy", "majority_accuracy", "loss")
    known = {f"final/{split}/{key}": section[key] for key in keys if section.get(key) is not None}
    for logger in loggers:
        if isinstance(logger, GuardedLogger) and known:
            logger.log_metrics(known)


def finish_loggers(loggers: Sequence[Logger], exit_code: int) -> None:
    """End the run in every service, so that the next job of a sweep starts its own.

    Args:
        loggers: What `build_loggers` returned.
        exit_code: 0 for a completed run.
    """
    for logger in loggers:
        if isinstance(logger, GuardedLogger):
            logger.finish(exit_code)


def _start_wandb(
    options: dict[str, Any],
    run_dir: Path,
    config: dict[str, Any],
    group: str | None,
    name: str,
    tags: Sequence[str],
) -> Logger:
    """The W&B logger; kept offline where there is no key or the server cannot be reached."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    # What it reports as errors, with tracebacks, is told here in one line.
    logging.getLogger("wandb").setLevel(logging.CRITICAL)
    mode = options.get("mode") or "auto"
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ""
    if mode not in WANDB_MODES[1:]:
        mode = "online" if _wandb_key() else "offline"
    folder = run_dir / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "run_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))

    def start(mode: str) -> Any:
        return wandb.init(
            project=options.get("project") or "medqlora",
            entity=options.get("entity"),
            group=options.get("group") or group,
            name=options.get("name") or name,
            # W&B refuses longer ones.
            tags=[tag[:64] for tag in (options.get("tags") or tags)],
            id=id_file.read_text().strip(),
            # Offline there is no server to ask whether the run is known.
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            mode=mode,  # type: ignore[arg-type]
            config=config,
            settings=wandb.Settings(
                silent=True,
                console="off",
                # It would keep the command line as it was typed.
                x_disable_meta=any(mask(word) != word for word in sys.argv),
                init_timeout=60,  # seconds
                # What is not sent by then stays in the run folder.
                finish_timeout=options.get("finish_timeout") or 60,
            ),
            reinit="finish_previous",
        )

    try:
        run = start(mode)
    except Exception as error:
        if mode != "online":
            raise
        log.warning(
            "W&B cannot be reached, so the run is kept offline (`wandb sync %s` sends it later): "
            "%s",
            folder / "offline-run-*",
            _line(error),
        )
        wandb.teardown()  # its service holds the name of the run that did not start
        run = start("offline")
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run)


def _finish_wandb(logger: Any, exit_code: int) -> None:
    logger.experiment.finish(exit_code=exit_code)


def _abandon_wandb() -> None:
    """Forget its service, which Python would else ask once more as it ends, with a traceback."""
    import wandb
    from wandb.sdk.lib.module import unset_globals

    try:
        wandb.teardown()
    finally:
        unset_globals()  # the next job of a sweep would else try to end this run once more


def _start_tensorboard(options: dict[str, Any], run_dir: Path, config: dict[str, Any]) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(run_dir, name="", version="tensorboard", **options)
    logger.log_hyperparams(config)
    return logger


def _start_mlflow(
    options: dict[str, Any],
    run_dir: Path,
    config: dict[str, Any],
    group: str | None,
    name: str,
    tags: Sequence[str],
) -> Logger:
    from lightning.pytorch.loggers import MLFlowLogger

    pairs = dict(tag.split("=", 1) for tag in tags if "=" in tag)
    options = dict(options)
    experiment = options.pop("experiment_name", None) or "medqlora"
    address = options.pop("tracking_uri", None) or os.environ.get("MLFLOW_TRACKING_URI")
    logger = MLFlowLogger(
        experiment_name=experiment,
        run_name=name,
        tracking_uri=address or "sqlite:///mlflow.db",
        tags=pairs | ({"sweep": group} if group else {}),
        **options,
    )
    logger.log_hyperparams(config)
    return logger


def _finish_plain(logger: Any, exit_code: int) -> None:
    logger.finalize("success" if exit_code == 0 else "failed")


def last_logged(run_dir: Path, key: str) -> float | None:
    """The last value of a metric in metrics.csv; None where there is none."""
    with contextlib.suppress(OSError, ValueError), (run_dir / "metrics.csv").open() as file:
        values = [row[key] for row in csv.DictReader(file) if row.get(key)]
        return float(values[-1]) if values else None
    return None


def _is_before(text: str | None, step: int) -> bool:
    return text is not None and text.isdecimal() and int(text) < step


def _line(error: BaseException) -> str:
    return " ".join(mask(str(error)).split()) or type(error).__name__


def _wandb_key() -> bool:
    """Whether a key is configured, in the environment or by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False
