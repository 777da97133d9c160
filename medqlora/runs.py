"""A run folder from its first second to its last: the config, the state, and why it ended."""

from __future__ import annotations

import contextlib
import gc
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from medqlora import pipeline
from medqlora.data import MedMCQADataModule
from medqlora.entry import one_line
from medqlora.errors import ConfigError, MedQLoRAError
from medqlora.evaluation import (
    config_hash,
    empty_metrics,
    hardware,
    read_run,
    versions,
    write_metrics,
    write_predictions,
)

log = logging.getLogger(__name__)

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"

_REPEATABLE = """\
# The config of this run, resolved and complete. To repeat it:
#   python -m {module} --config-path {folder} --config-name config
defaults:
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
"""


class RunRecord:
    """The `metrics.json` of a run that is under way.

    Attributes:
        run_dir: The run folder.
        metrics: The keys of `metrics.json`, filled in as they become known.
    """

    def __init__(self, run_dir: Path, metrics: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.metrics = metrics

    def write(self) -> None:
        """Write `metrics.json` as it stands, atomically."""
        write_metrics(self.run_dir, self.metrics)


def describe(config: Mapping[str, Any] | None) -> str:
    """A run in a few words, such as "NF4 + LoRA r=16" or "base, 16 bit"."""
    if not config:
        return "unknown"
    quant = config["quant"]
    bits = {"bfloat16": "16 bit", "float32": "32 bit"}.get(
        str(quant.get("compute_dtype")), "16 bit"
    )
    storage = bits if quant["data_type"] == "none" else str(quant["data_type"]).upper()
    if quant.get("embedding", "bf16") != "bf16":
        storage += f", embedding {str(quant['embedding']).upper()}"
    peft = config.get("peft") or {}
    target = str(peft.get("_target_", "")).rpartition(".")[2].removesuffix("Config")
    if config.get("adapter"):
        return f"{storage} + {Path(str(config['adapter'])).name}"
    if not target or target == "no_adapter":
        return f"base, {storage}"
    method = "DoRA" if peft.get("use_dora") else "rsLoRA" if peft.get("use_rslora") else target
    method = {"Lora": "LoRA"}.get(method, method)
    return f"{storage} + {method}" + (f" r={peft['r']}" if "r" in peft else "")


def score_into(
    record: RunRecord, cfg: DictConfig, datamodule: MedMCQADataModule, splits: Sequence[str]
) -> None:
    """Load the model of a config, score splits and fill the record and the run folder.

    Args:
        record: The record to fill in.
        cfg: A config with `peft` empty, or with `adapter` naming a PEFT folder.
        datamodule: Set up.
        splits: Splits to score.
    """
    base = pipeline.build_base(cfg)
    module = pipeline.build_scoring_module(cfg, base, datamodule, cfg.get("adapter"))
    record.metrics["data"] = pipeline.data_section(datamodule)
    record.metrics["model"] = pipeline.model_section(cfg, module.model)
    record.metrics["scoring"] = {}
    for split in splits:
        scored = pipeline.score(cfg, module, datamodule, split)
        # "train" holds what training did.
        record.metrics["train_split" if split == "train" else split] = scored.section
        record.metrics["scoring"][split] = {
            "seconds": scored.seconds,
            "questions_per_second": len(scored.predictions) / scored.seconds,
            "peak_memory_gb": scored.peak_memory_gb,
        }
        write_predictions(record.run_dir, scored.predictions)


def free_memory() -> None:
    """What a job held must be gone before the next one of a sweep starts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain containers, interpolations resolved, without the `hydra` node."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "hydra"}


def write_config(run_dir: Path, cfg: DictConfig, verb: str) -> None:
    """Write `config.yaml` so that Hydra can run it again and `load_run` can read it."""
    values = resolved(cfg)
    values.pop("experiment", None)
    values.pop("sweep", None)
    root = "runs" if verb == "train" else f"runs/{verb}"
    values["hydra"] = {
        "output_subdir": None,
        "job": {"name": verb, "chdir": False},
        "run": {"dir": root + "/${now:%Y-%m-%d}/${now:%H-%M-%S-%f}"},
    }
    head = _REPEATABLE.format(module=f"medqlora.{verb}", folder=shlex.quote(str(run_dir)))
    (run_dir / "config.yaml").write_text(head + OmegaConf.to_yaml(OmegaConf.create(values)))


def command_line(verb: str) -> str:
    """The command that was typed, as a shell would read it again."""
    return f"python -m medqlora.{verb} " + shlex.join(sys.argv[1:])


@contextlib.contextmanager
def recorded(
    cfg: DictConfig, run_dir: Path, verb: str, *, keep_refused: bool
) -> Iterator[RunRecord]:
    """Keep the run folder's `config.yaml` and `metrics.json` true on every ending.

    `metrics.json` says "interrupted" from the first second, so that a run that is killed is told
    from one that completed.

    Args:
        cfg: The composed config.
        run_dir: The run folder, made by Hydra.
        verb: The entry point, such as "train".
        keep_refused: Keep the folder of a bad request, with its reason, as the row of a sweep.
            Without
            it a request that is refused before anything was computed leaves no folder behind.

    Yields:
        The record to fill in.

    Raises:
        ConfigError: If the folder holds another run.
    """
    started = time.time()
    values = resolved(cfg)
    metrics = empty_metrics()
    metrics.update(
        status="interrupted",
        config_hash=config_hash(values),
        seed=values.get("seed"),
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        command=command_line(verb),
        versions=versions(),
        hardware=hardware(),
    )
    record = RunRecord(run_dir, metrics)
    _refuse_foreign_folder(run_dir, metrics["config_hash"], values.get("resume", "never"))
    earlier = _earlier_seconds(run_dir)
    clock = time.monotonic()
    write_config(run_dir, cfg, verb)
    record.write()
    try:
        yield record
        metrics["status"] = "completed"
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        metrics["status"] = "interrupted" if interrupted else "failed"
        metrics["error"] = one_line(error)
        refused = isinstance(error, MedQLoRAError) and error.exit_code == 2
        if refused and not keep_refused and not (run_dir / "checkpoints").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            raise
        log.debug("the run ended early", exc_info=error)
        raise
    finally:
        if run_dir.exists():
            metrics["wall_seconds"] = round(earlier + time.monotonic() - clock, 3)
            record.write()


def find_unfinished(root: Path, hash_: str) -> Path | None:
    """The newest run folder below `root` with this config hash that has a checkpoint and no ending.

    Args:
        root: The folder that holds run folders, at any depth.
        hash_: `config_hash` of the run that is wanted.

    Returns:
        The folder, or None.
    """
    found = []
    for path in root.glob("**/metrics.json"):
        with contextlib.suppress(MedQLoRAError):
            metrics = read_run(path.parent).metrics
            unfinished = metrics.get("status") != "completed"
            if unfinished and metrics.get("config_hash") == hash_ and has_checkpoint(path.parent):
                found.append(path.parent)
    return max(found, key=lambda d: (d / "metrics.json").stat().st_mtime, default=None)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the folder holds a checkpoint to resume from."""
    return any((run_dir / "checkpoints").glob("last*.ckpt"))


def _earlier_seconds(run_dir: Path) -> float:
    """Seconds that earlier parts of a resumed run took."""
    with contextlib.suppress(MedQLoRAError):
        return float(read_run(run_dir).metrics.get("wall_seconds") or 0.0)
    return 0.0


def _refuse_foreign_folder(run_dir: Path, hash_: str, resume: str) -> None:
    if not (run_dir / "metrics.json").exists():
        return
    metrics = read_run(run_dir).metrics
    if resume != "auto":
        raise ConfigError(
            f"{run_dir} already holds a run ({metrics.get('status')}): nothing is overwritten. "
            f"Choose "
            "another hydra.run.dir, or resume=auto to go on with it."
        )
    if metrics.get("config_hash") != hash_:
        raise ConfigError(
            f"{run_dir} holds a run of another config (config_hash "
            f"{metrics.get('config_hash')}), so "
            "resume=auto cannot go on with it. Choose another hydra.run.dir."
        )
