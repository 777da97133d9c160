"""One run: data, quantised base, adapter, fit, test, run folder.

python -m medqlora.train quant=nf4 peft=lora_r16
python -m medqlora.train -m quant=none,int8,nf4 seed=1,2,3
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from lightning import Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from rich.console import Console

from medqlora import instantiation, pipeline, processes
from medqlora.budget import with_token_budget
from medqlora.data import MedMCQADataModule
from medqlora.entry import choices, command, is_sweep, move_log, names_its_folder
from medqlora.errors import CheckpointError, ConfigError, MedQLoRAError
from medqlora.evaluation import (
    config_hash,
    questions_sha256,
    read_run,
)
from medqlora.evaluation.tables import result_row, result_table
from medqlora.finetuning import (
    Pruning,
    RunCheckpoints,
    find_resumable,
    fit,
    fit_in_memory,
    load_trained_weights,
    save_adapter,
    scored_after,
    token_budget_of,
)
from medqlora.runs import (
    RunRecord,
    describe,
    find_completed,
    find_unfinished,
    free_memory,
    has_checkpoint,
    job_place,
    record_base,
    record_calibration,
    record_score,
    recorded,
    resolved,
    score_into,
    sweep_root,
)
from medqlora.search import trial_of_this_job
from medqlora.tracking import check_loggers, finish_loggers, last_logged, log_result

log = logging.getLogger("medqlora.train")  # under `python -m` the name would be __main__

_SCORING_KEYS = ("data", "prompt", "model", "quant", "peft", "acceleration", "trainer", "seed")
_TAGS = ("data", "model", "quant", "peft", "loss")


def train(cfg: DictConfig, run_dir: Path) -> Path:
    """Run one training job and keep its run folder.

    Args:
        cfg: The composed config of `train`.
        run_dir: Where the run folder goes.

    Returns:
        The run folder; another one than asked for where `resume=auto` went on with an earlier run.

    Raises:
        MedQLoRAError: If the request cannot work or the run failed.
        RunInterrupted: If it was asked to stop; its state is saved.
    """
    with processes.connected(cfg.trainer.accelerator):
        return _train_here(cfg, run_dir)


def _train_here(cfg: DictConfig, run_dir: Path) -> Path:
    cfg = with_token_budget(cfg)
    if processes.world_size() > 1:  # the smallest device decides what `auto` found
        cfg.data.token_budget = min(processes.gathered(cfg.data.token_budget))
    if is_sweep():
        with job_place(cfg, run_dir, move_log) as place:
            if place.done:
                log.info("done already: %s", place.run_dir)
                if (trial := trial_of_this_job()) is not None:
                    trial.answered_by(place.run_dir)
            else:
                _train_in(cfg, place.run_dir, sweep=True, go_on=place.go_on)
        return place.run_dir
    _check(cfg)
    searched = cfg.resume == "auto" and not names_its_folder() and not has_checkpoint(run_dir)
    if searched and not processes.rank():
        root = Path(cfg.get("run_root") or run_dir.parent.parent)
        earlier = find_unfinished(root, config_hash(resolved(cfg)))
        if earlier is not None:
            move_log(run_dir, earlier)
            run_dir = earlier
    run_dir = processes.from_first(run_dir)
    _train_in(cfg, run_dir, sweep=False, go_on=cfg.resume == "auto")
    return run_dir


def _train_in(cfg: DictConfig, run_dir: Path, *, sweep: bool, go_on: bool) -> None:
    if go_on and has_checkpoint(run_dir):
        log.info("going on with %s", run_dir)
    with recorded(cfg, run_dir, "train", keep_refused=sweep, go_on=go_on) as record:
        if sweep:
            _check(cfg)  # the table of a sweep has a row for a refused job as well
        try:
            _train(cfg, run_dir, record, go_on=go_on)
        finally:
            free_memory()
    if not processes.rank():
        _print_table(run_dir)


def _check(cfg: DictConfig) -> None:
    instantiation.check(cfg)
    check_loggers(OmegaConf.to_container(cfg.logger, resolve=True))  # type: ignore[arg-type]


def _train(cfg: DictConfig, run_dir: Path, record: RunRecord, *, go_on: bool) -> None:
    checkpoint = find_resumable(run_dir / "checkpoints") if go_on else None
    if checkpoint is not None:
        saved = token_budget_of(checkpoint)
        if saved is not None and saved < cfg.data.token_budget:
            cfg = _with_rows(cfg, saved, cfg.data.token_budget // saved)
            log.info("going on with data.token_budget=%d, as memory did not suffice before", saved)
    datamodule = _read_data(cfg)
    if "train" not in datamodule.questions:
        raise ConfigError(
            f"data={datamodule.name} has no train questions here, so there is nothing to learn "
            f"from. "
            "Give data.train_file, or a data.limit_train above 0."
        )
    stopping = cfg.callbacks.get("early_stopping")
    if stopping and stopping.monitor.startswith("val/") and "val" not in datamodule.questions:
        raise ConfigError(
            f"callbacks=early_stopping watches {stopping.monitor}, and data={datamodule.name} has "
            "no val questions here. Give data.val_file or data.num_val, or choose "
            "callbacks=default."
        )
    record.metrics["data"] = pipeline.data_section(datamodule)
    splits = [split for split in ("val", "test") if split in datamodule.questions]
    for name in cfg.baselines:
        _score_baseline(cfg, run_dir, datamodule, name, splits)

    def train_with(token_budget: int, accumulate_grad_batches: int) -> None:
        if token_budget == cfg.data.token_budget:
            _fit_and_score(cfg, run_dir, record, datamodule, go_on=go_on)
            return
        _start_over(run_dir)
        shorter = _with_rows(
            cfg, token_budget, accumulate_grad_batches // cfg.trainer.accumulate_grad_batches
        )
        reread = _read_data(shorter)
        record.metrics["data"] = pipeline.data_section(reread)
        _fit_and_score(shorter, run_dir, record, reread, go_on=False)

    fit_in_memory(
        train_with,
        cfg.data.token_budget,
        cfg.trainer.accumulate_grad_batches,
        smallest=datamodule.longest,
    )


def _read_data(cfg: DictConfig) -> MedMCQADataModule:
    targets = instantiation.make(cfg.loss).targets
    datamodule = pipeline.build_datamodule(cfg, loss_targets=targets, share=is_sweep())
    datamodule.setup()
    return datamodule


def _with_rows(cfg: DictConfig, token_budget: int, times: int) -> DictConfig:
    """The config with shorter rows, and that many times as many an update and a validation."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[assignment]
    cfg.data.token_budget = token_budget
    for key in ("eval_token_budget", "max_length"):
        if cfg.data.get(key):
            cfg.data[key] = None if cfg.data[key] == "auto" else min(cfg.data[key], token_budget)
    cfg.trainer.accumulate_grad_batches *= times
    if isinstance(cfg.trainer.get("val_check_interval"), int):
        cfg.trainer.val_check_interval *= times
    return cfg


def _start_over(run_dir: Path) -> None:
    """Remove what training wrote so far: rows of another length are another order of questions."""
    if not processes.rank():
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        (run_dir / "metrics.csv").unlink(missing_ok=True)


def _fit_and_score(
    cfg: DictConfig,
    run_dir: Path,
    record: RunRecord,
    datamodule: MedMCQADataModule,
    *,
    go_on: bool,
) -> None:
    """Train, keep the adapter and score it.

    Raises:
        OutOfMemory: If training needs more memory than the device has.
    """
    splits = [split for split in ("val", "test") if split in datamodule.questions]
    base = pipeline.build_base(cfg, share=is_sweep())
    revision = base.config._commit_hash
    identity = {
        "model.path": cfg.model.path,
        "model.revision": revision or cfg.model.get("revision"),
        "quant": str(sorted(dataclasses.asdict(instantiation.make(cfg.quant)).items())),
        "config_hash": record.metrics["config_hash"],
    }
    checkpoint = find_resumable(run_dir / "checkpoints", identity) if go_on else None
    checkpoint = processes.from_first(checkpoint)
    callbacks = pipeline.build_callbacks(cfg, run_dir, datamodule, identity)
    trial = trial_of_this_job()
    if trial is not None:
        record.metrics["search"] = trial.describe()
    loggers = _build_loggers(cfg, run_dir)
    exit_code = 1
    try:
        trainer = pipeline.build_trainer(cfg, run_dir, callbacks, loggers)
        datamodule.trainer = trainer
        steps = pipeline.num_updates(cfg, datamodule)
        # A short run logs its last update at least.
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps)  # type: ignore[attr-defined]
        if trial is not None:
            pruning = Pruning(trial.metric, trial.is_hopeless, steps)
            trainer.callbacks.append(pruning)  # type: ignore[attr-defined]
        module = pipeline.build_training_module(cfg, base, datamodule, steps)
        record.metrics["model"] = pipeline.model_section(cfg, module.model)
        record.metrics["train"].update(
            token_budget=datamodule.token_budget,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            num_processes=trainer.world_size,
        )
        record.write()
        log.info(
            "training %s of %s weights on %d questions, %d updates of %d rows of %d tokens",
            f"{record.metrics['model']['num_trainable']:,}",
            f"{record.metrics['model']['num_parameters']:,}",
            len(datamodule.questions["train"]),
            steps,
            trainer.accumulate_grad_batches * trainer.world_size,
            datamodule.token_budget,
        )
        if checkpoint is not None:
            log.info("resuming from %s", checkpoint)
        try:
            fit(trainer, module, datamodule, ckpt_path=str(checkpoint) if checkpoint else None)
        finally:
            section = _train_section(callbacks, trainer)
            if "loss" not in section and checkpoint is not None:
                section["loss"] = last_logged(run_dir, "train/loss")
            record.metrics["train"].update(section)
        checkpoints = callbacks.get("checkpoints")
        if (
            cfg.select == "best"
            and isinstance(checkpoints, RunCheckpoints)
            and checkpoints.best_path is not None
        ):
            load_trained_weights(module.model, checkpoints.best_path)
            record.metrics["train"]["best_step"] = checkpoints.best_step
        if not processes.rank():
            save_adapter(
                cast(PeftModel, module.model),
                run_dir / pipeline.ADAPTER_DIR,
                base_name=cfg.model.path,
                revision=identity["model.revision"],
            )
        module.eval()
        for split in splits:
            with scored_after(trainer.global_step):
                scored = pipeline.score(cfg, module, datamodule, split)
            record_score(record, split, scored)
            log_result(loggers, split, record.metrics[split])
        if processes.rank():
            return
        record_calibration(record, splits)
        _compare(cfg, record, datamodule, splits)
        exit_code = 0
    except BaseException as error:
        exit_code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    finally:
        finish_loggers(loggers, exit_code)


def _build_loggers(cfg: DictConfig, run_dir: Path) -> list[Logger]:
    """The loggers of a run; the first process logs for all."""
    if processes.rank():
        return []
    return instantiation.make(
        cfg.logger,
        run_dir=run_dir,
        run_config=resolved(cfg),
        group=run_dir.parent.name if is_sweep() else None,
        tags=[
            f"{group}={name}" for group, name in choices("train").items() if group in _TAGS and name
        ],
    )


def _train_section(callbacks: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """The keys of `train` in metrics.json."""
    section: dict[str, Any] = {}
    logged = trainer.callback_metrics
    if "throughput" in callbacks:
        section.update(callbacks["throughput"].summary())
    if "memory" in callbacks:
        section["peak_memory_gb"] = callbacks["memory"].peak_memory_gb
    # Of a run that goes on after its last update no callback sees a step.
    section["num_steps"] = trainer.global_step
    if "train/loss" in logged:
        section["loss"] = float(logged["train/loss"])
    return section


def _compare(
    cfg: DictConfig, record: RunRecord, datamodule: MedMCQADataModule, splits: list[str]
) -> None:
    """Set the run beside the base it started from, or the 16-bit one where only that was scored."""
    names = [name for name in reversed(instantiation.BASELINES) if name in cfg.baselines]
    for split in splits if names else ():
        base = record.run_dir / "baselines" / names[0]
        questions = datamodule.questions[split]
        try:
            record_base(record, base, split, questions, describe(resolved(cfg)))
        except MedQLoRAError as error:  # a folder of an earlier try, after its data were changed
            log.warning("the run is not compared with its base: %s", error)


def _score_baseline(
    cfg: DictConfig, run_dir: Path, datamodule: MedMCQADataModule, name: str, splits: list[str]
) -> None:
    """Score a base without adapter and keep it as a run folder of its own, `baselines/NAME`."""
    folder = run_dir / "baselines" / name
    if not splits or processes.from_first(_is_scored(folder, datamodule, splits)):
        return
    values = resolved(cfg)
    if name == "base_16bit":
        values["quant"] = {
            "_target_": "medqlora.quantization.QuantConfig",
            "data_type": "none",
            "double_quant": False,
            "compute_dtype": "bfloat16",
        }
    values["peft"] = {}
    baseline = OmegaConf.create({key: values[key] for key in _SCORING_KEYS if key in values})
    if is_sweep() and _copy_baseline(run_dir, folder, resolved(baseline), datamodule, splits):
        return
    if not processes.rank():
        shutil.rmtree(folder, ignore_errors=True)  # of a try that did not come to its end
        folder.mkdir(parents=True)
    with recorded(baseline, folder, "evaluate", keep_refused=True) as record:
        score_into(record, baseline, datamodule, splits, share=is_sweep())
    free_memory()


def _is_scored(folder: Path, datamodule: MedMCQADataModule, splits: list[str]) -> bool:
    """Whether an earlier try scored a base to its end, on these questions."""
    try:
        earlier = read_run(folder)
    except CheckpointError:
        return False
    return earlier.status == "completed" and all(
        earlier.metrics[split]["n"]
        and earlier.metrics[split].get("sha256") == questions_sha256(datamodule.questions[split])
        for split in splits
    )


def _copy_baseline(
    run_dir: Path,
    folder: Path,
    config: dict[str, Any],
    datamodule: MedMCQADataModule,
    splits: list[str],
) -> bool:
    """Take the scores of a base from a job of a sweep that has scored it already."""
    earlier = find_completed(sweep_root(run_dir.parent), config)
    if earlier is None or not _is_scored(earlier, datamodule, splits):
        return False
    log.info("the bare base was scored already: %s", earlier)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=folder.parent) as temporary:
        copy = Path(shutil.copytree(earlier, Path(temporary) / folder.name))
        shutil.rmtree(folder, ignore_errors=True)
        copy.replace(folder)
    return True


def _print_table(run_dir: Path) -> None:
    """The table a run ends in: each base that was scored, then the run, on its last split."""
    run = read_run(run_dir)
    split = "test" if run.metrics["test"]["n"] else "val"
    if not run.metrics[split]["n"]:
        return
    baselines = [read_run(folder) for folder in sorted((run_dir / "baselines").glob("*"))]
    rows = [result_row(found, split, name=describe(found.config)) for found in (*baselines, run)]
    console = Console()
    console.print(result_table(rows, title=f"{run.metrics['data']['name']}, {split} split"))
    console.print(f"run folder: {run_dir}", soft_wrap=True, highlight=False)


@command("train")
def _main(cfg: DictConfig, run_dir: Path) -> None:
    """Train, score, keep a run folder."""
    train(cfg, run_dir)


def main() -> None:
    """Train, score, keep a run folder."""
    try:
        _main()
    finally:
        pipeline.forget_kept()


if __name__ == "__main__":
    main()
