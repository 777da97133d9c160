"""Score a run, or a bare base model, on a split or on other files.

python -m medqlora.evaluate run=runs/DAY/TIME split=val
python -m medqlora.evaluate peft=none quant=nf4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from medqlora import pipeline
from medqlora.entry import command, is_sweep
from medqlora.errors import ConfigError
from medqlora.evaluation import read_run
from medqlora.evaluation.tables import breakdown_table, result_row, result_table
from medqlora.runs import describe, recorded, score_into

_FROM_RUN = ("data", "prompt", "model", "quant", "peft", "seed")
_SPLITS = ("train", "val", "test")


def evaluate(cfg: DictConfig, run_dir: Path) -> Path:
    """Score one split and keep a run folder.

    Args:
        cfg: The composed config of `evaluate`, complete (`with_run`).
        run_dir: Where the run folder goes.

    Returns:
        The run folder.

    Raises:
        MedQLoRAError: If the request cannot work.
    """
    if cfg.split not in _SPLITS:
        raise ConfigError(f"split={cfg.split} is unknown. Choose {', '.join(_SPLITS)}.")
    if cfg.adapter is None and pipeline.make(cfg.get("peft")) is not None:
        raise ConfigError(
            "peft chooses what is trained, and evaluate trains nothing. Give run=DIR or "
            "adapter=FOLDER to score an adapter, or peft=none for the bare base."
        )
    pipeline.check(cfg)
    with recorded(cfg, run_dir, "evaluate", keep_refused=is_sweep()) as record:
        datamodule = pipeline.build_datamodule(cfg)
        datamodule.setup()
        if cfg.split not in datamodule.questions:
            raise ConfigError(
                f"data={datamodule.name} has no {cfg.split} questions here. Choose split="
                f"{' or '.join(datamodule.questions)}, or give data.{cfg.split}_file."
            )
        score_into(record, cfg, datamodule, [cfg.split])
    return run_dir


def with_run(cfg: DictConfig, overridden: set[str]) -> DictConfig:
    """Take what the command line left open from the run folder that `run` names.

    Args:
        cfg: The composed config.
        overridden: Groups and top-level keys that were given on the command line.

    Returns:
        A config with `run` replaced by its parts; `adapter` names the run's adapter.

    Raises:
        ConfigError: If `run` and `adapter` are both given.
        CheckpointError: If the folder is no run.
    """
    if cfg.run is None:
        return cfg
    if cfg.adapter is not None:
        raise ConfigError("run and adapter are both given and one is scored. Give one of them.")
    saved = pipeline.read_config(cfg.run)
    merged: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    for key in _FROM_RUN:
        if key not in overridden and key in saved:
            merged[key] = saved[key]
    bare = "peft" in overridden
    folder = None if bare else pipeline.adapter_of(Path(cfg.run), saved)
    merged["adapter"] = None if folder is None else str(folder)
    merged["peft"] = {}
    return OmegaConf.create(merged)


@command("evaluate")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Score, keep a run folder, print the result."""
    task = HydraConfig.get().overrides.task
    cfg = with_run(cfg, {item.lstrip("+~").split("=")[0].split(".")[0] for item in task})
    evaluate(cfg, run_dir)
    run = read_run(run_dir)
    key = "train_split" if cfg.split == "train" else cfg.split
    section = run.metrics[key]
    console = Console()
    title = f"{run.metrics['data']['name']}, {cfg.split} split"
    console.print(result_table([result_row(run, key, name=describe(run.config))], title=title))
    if section["n"]:
        console.print(breakdown_table(section, "subject_name"))
    console.print(f"run folder: {run_dir}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
