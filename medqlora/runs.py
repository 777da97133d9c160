"""A run folder from its first second to its last: the config, the state, and why it ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import hashlib
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from medqlora import pipeline, processes
from medqlora.data import MedMCQADataModule
from medqlora.entry import choices, command_line, one_line
from medqlora.errors import (
    CheckpointError,
    ConfigError,
    MedQLoRAError,
    RunPruned,
    TrainingError,
)
from medqlora.evaluation import (
    config_hash,
    empty_metrics,
    hardware,
    read_predictions,
    read_run,
    versions,
    write_metrics,
    write_predictions,
)
from medqlora.evaluation.metrics import summarise
from medqlora.evaluation.results import (
    CONFIG_FILE,
    FILE_KEYS,
    FOLDER_KEYS,
    METRICS_FILE,
    PREDICTIONS_FILE,
)
from medqlora.evaluation.sections import (
    base_nll_groups,
    calibration_section,
    fit_on,
    paired_section,
)
from medqlora.finetuning import MCQAModule, find_resumable
from medqlora.masking import masked
from medqlora.schema import Question

log = logging.getLogger(__name__)

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"

_RESULTS = (pipeline.ADAPTER_DIR, "checkpoints", PREDICTIONS_FILE)

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
        """Write `metrics.json` as it stands, atomically; the first process alone writes."""
        if not processes.rank():
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
    record: RunRecord,
    cfg: DictConfig,
    datamodule: MedMCQADataModule,
    splits: Sequence[str],
    *,
    share: bool = False,
) -> MCQAModule:
    """Load the model of a config, score splits and fill the record and the run folder.

    Args:
        record: The record to fill in.
        cfg: A config with `peft` empty, or with `adapter` naming a PEFT folder.
        datamodule: Set up.
        splits: Splits to score.
        share: As for `pipeline.build_base`.

    Returns:
        What scored.
    """
    base = pipeline.build_base(cfg, share=share)
    module = pipeline.build_scoring_module(cfg, base, datamodule, cfg.get("adapter"))
    record.metrics["data"] = pipeline.data_section(datamodule)
    record.metrics["model"] = pipeline.model_section(cfg, module.model)
    for split in splits:
        record_score(record, split, pipeline.score(cfg, module, datamodule, split))
    record_calibration(record, splits)
    return module


def record_score(record: RunRecord, split: str, scored: pipeline.Scored) -> None:
    """Put a scored split into the record and the run folder."""
    record.metrics[section_key(split)] = scored.section
    record.metrics.setdefault("scoring", {})[split] = {
        "seconds": scored.seconds,
        "questions_per_second": len(scored.predictions) / scored.seconds,
        "peak_memory_gb": scored.peak_memory_gb,
    }
    if not processes.rank():
        write_predictions(record.run_dir, scored.predictions)


def section_key(split: str) -> str:
    """Key of a split in metrics.json, where "train" holds what training did."""
    return "train_split" if split == "train" else split


def record_calibration(record: RunRecord, splits: Sequence[str]) -> None:
    """Fit a temperature on val and measure what it does to test, from the predictions on disk.

    Args:
        record: Its run folder holds the predictions; `calibration` is filled in.
        splits: What was scored; without val nothing is fitted, without test nothing measured.
    """
    if "val" not in splits or processes.rank():
        return
    fitted = fit_on(read_predictions(record.run_dir, "val"))
    if fitted is None:
        return
    measured = read_predictions(record.run_dir, "test") if "test" in splits else []
    record.metrics["calibration"] = calibration_section(fitted[0], measured, num_fitted=fitted[1])


def record_base(
    record: RunRecord, base: Path, split: str, questions: Sequence[Question], name: str
) -> None:
    """Compare a split with a bare base question by question, and group it by the base's loss.

    Args:
        record: Its run folder holds the predictions; the breakdown `difficulty_base_nll` and
            `paired` are filled in.
        base: Run folder of the base.
        split: The split.
        questions: Its questions.
        name: What was scored, for tables.

    Raises:
        CheckpointError: If the folder is no run or has no predictions.
        ConfigError: If it scored other questions, or is no bare base.
    """
    run = read_run(base)
    key = section_key(split)
    config = run.config or {}
    if config.get("adapter") or (base / pipeline.ADAPTER_DIR).is_dir():
        raise ConfigError(
            f"{base} scored an adapter, not a bare base. Evaluate one with peft=none and give its "
            "folder, or leave evaluate.base out."
        )
    section, base_section = record.metrics[key], run.metrics.get(key) or {}
    if base_section.get("sha256") != section["sha256"]:
        raise ConfigError(
            f"{base} scored other questions than this {split} split (sha256 "
            f"{str(base_section.get('sha256'))[:12]} and {str(section['sha256'])[:12]}), so they "
            f"cannot be compared pairwise. Evaluate the base with the same data and split={split}."
        )
    predictions = read_predictions(record.run_dir, split)
    base_predictions = read_predictions(base, split)
    groups = base_nll_groups(predictions, base_predictions)
    record.metrics[key] = summarise(predictions, questions, groups=groups)
    paired = paired_section(
        predictions,
        base_predictions,
        name=name,
        base_name=describe(run.config),
        sha256=section["sha256"],
        base_sha256=base_section["sha256"],
    )
    if paired is not None:
        record.metrics.setdefault("paired", {})[split] = paired


def from_run(
    cfg: DictConfig, saved: Mapping[str, Any], groups: Sequence[str], overridden: set[str]
) -> DictConfig:
    """Take what the command line left open from the config of a run.

    Args:
        cfg: The composed config.
        saved: The config of the run.
        groups: Keys of the top level that can come from it.
        overridden: Keys that were given on the command line. A group ("data") comes whole from the
            command line; of one that comes from the run, single values ("data.limit_test") change.
    """
    merged: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    for key in groups:
        if key not in overridden and key in saved:
            merged[key] = saved[key]
    complete = OmegaConf.create(merged)
    for key in overridden:
        group = key.split(".")[0]
        if key != group and group in groups and group not in overridden:
            OmegaConf.update(complete, key, OmegaConf.select(cfg, key), force_add=True)
    return complete


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
    values = masked(resolved(cfg))
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


@contextlib.contextmanager
def recorded(
    cfg: DictConfig, run_dir: Path, verb: str, *, keep_refused: bool, go_on: bool = False
) -> Iterator[RunRecord]:
    """Keep the run folder's `config.yaml` and `metrics.json` true on every ending.

    `metrics.json` says "interrupted" from the first second, so that a run that is killed is told
    from one that completed.

    Args:
        cfg: The composed config.
        run_dir: The run folder; made if missing.
        verb: The entry point, such as "train".
        keep_refused: Keep the folder of a bad request, with its reason, as the row of a sweep.
            Without it a request that is refused leaves nothing behind.
        go_on: Go on with an unfinished run of this config in the folder, as `resume=auto` does.

    Yields:
        The record to fill in.

    A run that a search ends early (`RunPruned`) stays "interrupted", with `pruned` saying when;
    the exception ends here.

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
        command=_command(verb, run_dir),
        choices=choices(verb),
        versions=versions(),
        hardware=hardware(),
    )
    record = RunRecord(run_dir, metrics)
    if processes.rank():
        yield record  # the first process keeps the folder
        return
    there = _names(run_dir)
    clock = time.monotonic()
    with _told_of_disk(run_dir), _held(run_dir):
        _refuse_foreign_folder(
            run_dir, metrics["config_hash"], go_on or values.get("resume") == "auto"
        )
        earlier = _earlier(run_dir)
        seconds = float(earlier.get("wall_seconds") or 0.0)
        # A checkpoint stays one of the files it was made from.
        source = earlier if has_checkpoint(run_dir) else {"files": _fingerprints(values)}
        if "files" in source:
            metrics["files"] = source["files"]
        write_config(run_dir, cfg, verb)
        record.write()
        with _kept_true(record, there, seconds - clock, keep_refused):
            yield record


@contextlib.contextmanager
def _kept_true(
    record: RunRecord, there: set[str], offset: float, keep_refused: bool
) -> Iterator[None]:
    """Write how the run ended, and after how long, on every ending."""
    run_dir, metrics = record.run_dir, record.metrics
    removed = False
    try:
        with _told_of_disk(run_dir):
            yield
        metrics["status"] = "completed"
    except RunPruned as end:  # not completed: another sweep of this config goes on from here
        metrics["error"] = str(end)
        metrics["pruned"] = {"metric": end.metric, "value": end.value, "step": end.step}
        log.info("%s", end)
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        metrics["status"] = "interrupted" if interrupted else "failed"
        metrics["error"] = one_line(error)
        refused = isinstance(error, MedQLoRAError) and error.exit_code == 2
        if refused and not keep_refused and not (run_dir / "checkpoints").exists():
            removed = True
            _remove_all_but(run_dir, there)
            raise
        log.debug("the run ended early", exc_info=error)
        raise
    finally:
        if not removed:
            # Of a clock that no one can set.
            metrics["wall_seconds"] = round(offset + time.monotonic(), 3)
            try:
                record.write()
            except OSError as error:
                if metrics["status"] == "completed":
                    raise
                log.warning("%s is as it was written before: %s", METRICS_FILE, one_line(error))


_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_REFUSED = tuple(os.strerror(number) for number in (errno.EROFS, errno.EACCES, errno.EPERM))


@contextlib.contextmanager
def _told_of_disk(run_dir: Path) -> Iterator[None]:
    """Say in one line that the run folder cannot be written, and how to go on.

    Raises:
        TrainingError: For what the system raises then, by way of whichever library.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        # Reading somebody else's file can be refused as well; only writing fills a disk.
        known = (*_FULL, *_REFUSED) if str(run_dir) in text else _FULL
        reason = next((reason for reason in known if reason in text), None)
        if reason is None:
            raise
        where = getattr(error, "filename", None) or run_dir
        raise TrainingError(
            f"{where} could not be written ({reason}); what was finished before is kept. Free "
            "some space or make the folder writable, then type the same line with hydra.run.dir="
            f"{run_dir}, for train also with resume=auto."
        ) from error


def _command(verb: str, run_dir: Path) -> str:
    """The command that does this again."""
    if HydraConfig.initialized() and HydraConfig.get().job.name != verb:
        # A baseline of `train` was never typed; its config says all.
        folder = shlex.quote(str(run_dir))
        return f"python -m medqlora.{verb} --config-path {folder} --config-name config"
    return command_line(verb)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _remove_all_but(folder: Path, names: set[str]) -> None:
    """Remove what a refused run wrote; `hydra.run.dir` may be a folder that holds other things."""
    for name in _names(folder) - names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def find_unfinished(root: Path, hash_: str, config: Mapping[str, Any] | None = None) -> Path | None:
    """The newest run folder below `root` with this config hash that has a checkpoint and no ending.

    Args:
        root: The folder that holds run folders, at any depth.
        hash_: `config_hash` of the run that is wanted.
        config: Its resolved config; given, runs of other or changed files are passed over, as in
            `find_completed`.

    Returns:
        The folder, or None.
    """
    return _newest(
        folder
        for folder, metrics in _runs_with_hash(root, hash_)
        if metrics.get("status") != "completed"
        and has_checkpoint(folder)
        and (config is None or _read_the_same(folder, metrics, config))
    )


def find_completed(root: Path, config: Mapping[str, Any]) -> Path | None:
    """The newest completed run below `root` that a run of this config would repeat.

    `config_hash` leaves the paths and the content of data files and model folders out, so those are
    compared here.

    Args:
        root: The folder that holds run folders, at any depth.
        config: The resolved config of the run that is wanted.

    Returns:
        The folder, or None.
    """
    return _newest(
        folder
        for folder, metrics in _runs_with_hash(root, config_hash(config))
        if metrics.get("status") == "completed" and _read_the_same(folder, metrics, config)
    )


@dataclass(frozen=True)
class Place:
    """Where a job of a sweep goes.

    Attributes:
        run_dir: Its folder.
        done: Whether an earlier run there answers it already.
        go_on: Whether an unfinished run there has a checkpoint to go on from.
    """

    run_dir: Path
    done: bool = False
    go_on: bool = False


def sweep_root(sweep_dir: Path) -> Path:
    """The folder of all sweeps: the one named "sweeps" above a sweep, else the sweep itself."""
    for folder in (sweep_dir, *sweep_dir.parents):
        if folder.name == "sweeps":
            return folder
    return sweep_dir


@contextlib.contextmanager
def job_place(
    cfg: DictConfig, run_dir: Path, move: Callable[[Path, Path], None]
) -> Iterator[Place]:
    """Find the folder of one job of a sweep, and hold it while the job runs.

    What has been completed anywhere below the folder of all sweeps is not run again, an unfinished
    run with a checkpoint is gone on with, and one without is run again in its folder, as is one
    whose data were changed.

    Args:
        cfg: The composed config of the job.
        run_dir: The folder Hydra made for it.
        move: `move(old, new)` is called where the job goes to another folder than Hydra made.

    Yields:
        The place.

    Raises:
        TrainingError: If another process is at work in that folder.
    """
    values = resolved(cfg)
    place = _find_place(values, run_dir)
    if place.run_dir != run_dir:
        place.run_dir.mkdir(parents=True, exist_ok=True)
        move(run_dir, place.run_dir)
        if place.run_dir.parent != run_dir.parent and not run_dir.exists():
            # The report of this sweep follows it.
            with contextlib.suppress(OSError):
                run_dir.symlink_to(os.path.relpath(place.run_dir, run_dir.parent))
    if place.done:
        yield place
        return
    with _held(place.run_dir):
        if not place.go_on:
            _clear(place.run_dir, values)
        yield place


def _find_place(values: dict[str, Any], run_dir: Path) -> Place:
    root = sweep_root(run_dir.parent)
    done = find_completed(root, values)
    if done is not None:
        return Place(done, done=True)
    hash_ = config_hash(values)
    unfinished = find_unfinished(root, hash_, values)
    if unfinished is not None and _can_resume(unfinished):
        return Place(unfinished, go_on=True)
    number = 1
    place = run_dir
    while _holds_other_run(place, hash_, values):
        number += 1
        place = run_dir.with_name(f"{run_dir.name}-{number}")
    return Place(place)


def _holds_other_run(folder: Path, hash_: str, config: Mapping[str, Any]) -> bool:
    """Whether a folder is taken.

    By another config, a completed run of other data, an unfinished one of other files that can
    still go on, or by results that no `metrics.json` explains.
    """
    if folder.is_symlink():
        return True
    if not (folder / METRICS_FILE).exists():
        return any((folder / name).exists() for name in _RESULTS)
    with contextlib.suppress(MedQLoRAError):
        run = read_run(folder)
        if run.metrics.get("config_hash") != hash_ or run.status == "completed":
            return True
        return has_checkpoint(folder) and not _same_files(run.config or config, config)
    return False


def _can_resume(folder: Path) -> bool:
    try:
        return find_resumable(folder / "checkpoints") is not None
    except CheckpointError:
        return False


_LOCK = ".lock"
_HELD: set[Path] = set()


@contextlib.contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a folder, such as the same line typed in two terminals.

    Raises:
        TrainingError: If another process is at work there.
    """
    path = run_dir.absolute() / _LOCK
    if path in _HELD:  # by the job of a sweep that this run is
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except BlockingIOError:
            free = False
        except OSError as error:
            log.debug("%s is not locked: its file system cannot (%s)", run_dir, error)
            free = True
        if not free:
            raise TrainingError(
                f"{run_dir} is under way in another process: this one leaves it alone. Type the "
                "same line again when that one has ended."
            )
        _HELD.add(path)
        try:
            yield
        finally:
            _HELD.discard(path)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                run_dir.rmdir()  # of a refused request, which left nothing behind


def _clear(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Remove what a run left that cannot go on; its log stays, and baselines of this data."""
    stale = ["adapter", "checkpoints"]
    with contextlib.suppress(MedQLoRAError):
        if not _read_the_same(run_dir, read_run(run_dir).metrics, config):
            stale.append("baselines")
    for name in stale:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    files = ("metrics.csv", PREDICTIONS_FILE, CONFIG_FILE, METRICS_FILE)
    for path in (*(run_dir / name for name in files), run_dir / "wandb" / "run_id.txt"):
        path.unlink(missing_ok=True)


def _runs_with_hash(root: Path, hash_: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run folders below `root` with this config hash; damaged ones are passed over."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in ("wandb", "checkpoints", "adapter")]
        if METRICS_FILE not in files:
            continue
        with contextlib.suppress(OSError, ValueError):
            text = (Path(folder) / METRICS_FILE).read_text(encoding="utf-8")
            # A sweep asks this of every folder for every job, so only what matches is parsed.
            if hash_ in text and (metrics := json.loads(text)).get("config_hash") == hash_:
                yield Path(folder), metrics


def _read_the_same(folder: Path, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a run read the data files and the model folder that a config names, unchanged.

    Where its `metrics.json` does not say what it read, their dates must not be after its start.
    """
    try:
        before = read_run(folder).config
        started = datetime.fromisoformat(metrics["started"]).timestamp()
    except (MedQLoRAError, KeyError, TypeError, ValueError):
        return False
    if before is None or not _same_files(before, config):
        return False
    if "files" in metrics:
        return metrics["files"] == _fingerprints(config)
    if metrics.get("status") != "completed":
        # `started` is of its last part, which changed data may have ended at once.
        written = (folder / "checkpoints").glob("last*.ckpt")
        started = min([started, *(file.stat().st_mtime for file in written)])
    for path in _files_of(config):
        if path.exists():
            files = [path, *path.glob("*.*")] if path.is_dir() else [path]
            # `started` is in whole seconds.
            if max(int(file.stat().st_mtime) for file in files) > started:
                return False
    return True


def _fingerprints(config: Mapping[str, Any]) -> dict[str, str | None]:
    """A hash of each file and folder that a config names, None where there is none.

    Of a model folder the sizes and dates are hashed: its weights are too many to be read each time.
    """
    found: dict[str, str | None] = {}
    for key, path in zip((*FILE_KEYS, *FOLDER_KEYS), _files_of(config), strict=True):
        found[key] = None
        with contextlib.suppress(OSError):
            if path.is_dir():
                files = sorted(
                    (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.glob("*.*")
                )
                found[key] = hashlib.sha256(repr(files).encode()).hexdigest()
            elif path.is_file():
                with path.open("rb") as file:
                    found[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _same_files(before: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether two configs name the same data files and the same model folder."""
    old, new = ([path.resolve() for path in _files_of(c)] for c in (before, config))
    return old == new


def _files_of(config: Mapping[str, Any]) -> list[Path]:
    """What a config names under `FILE_KEYS` and `FOLDER_KEYS`, in their order."""
    keys = (key.split(".") for key in (*FILE_KEYS, *FOLDER_KEYS))
    return [Path(str((config.get(s) or {}).get(name))).expanduser() for s, name in keys]


def _newest(folders: Iterator[Path]) -> Path | None:
    return max(folders, key=lambda d: (d / METRICS_FILE).stat().st_mtime, default=None)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the folder holds a checkpoint to resume from."""
    return any((run_dir / "checkpoints").glob("last*.ckpt"))


def _earlier(run_dir: Path) -> dict[str, Any]:
    """What `metrics.json` says of the earlier parts of a resumed run."""
    with contextlib.suppress(MedQLoRAError):
        return read_run(run_dir).metrics
    return {}


def _refuse_foreign_folder(run_dir: Path, hash_: str, go_on: bool) -> None:
    """Refuse a folder that holds a run; without `metrics.json` its `config.yaml` says which.

    Raises:
        ConfigError: Unless it is a run of this config that goes on, or that left no results.
    """
    there = [name for name in (METRICS_FILE, CONFIG_FILE, *_RESULTS) if (run_dir / name).exists()]
    if not there:
        return
    if there[0] == METRICS_FILE:
        metrics = read_run(run_dir).metrics
        found, state = metrics.get("config_hash"), f"a run ({metrics.get('status')})"
    else:
        found = _hash_of_config(run_dir)
        state = f"a run without {METRICS_FILE} ({', '.join(there)})"
        go_on = go_on or (there == [CONFIG_FILE] and found == hash_)
    if not go_on:
        resumable = found == hash_ and has_checkpoint(run_dir)
        raise ConfigError(
            f"{run_dir} already holds {state}: nothing is overwritten. Choose another "
            f"hydra.run.dir{', or resume=auto to go on with it' * resumable}."
        )
    if found != hash_:
        raise ConfigError(
            f"{run_dir} holds {state} of another config (config_hash {found}), so resume=auto "
            "cannot go on with it. Choose another hydra.run.dir."
        )


def _hash_of_config(run_dir: Path) -> str | None:
    """`config_hash` of what `write_config` wrote; None where there is nothing like it."""
    with contextlib.suppress(OSError, TypeError, ValueError, yaml.YAMLError):
        config = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config_hash({key: config[key] for key in config if key != "defaults"})
    return None
