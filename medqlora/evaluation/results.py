"""The only reader and writer of metrics.json and predictions.parquet."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluation.metrics import BREAKDOWNS
from medqlora.masking import masked
from medqlora.schema import LETTERS, Prediction

SCHEMA_VERSION = 1
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.parquet"
CONFIG_FILE = "config.yaml"

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "medqlora")

EXCLUDED_KEYS = (
    "hydra",
    "logger",
    "resume",
    "baselines",
    "run_dir",
    "data.num_workers",
    "data.pin_memory",
    "data.persistent_workers",
    "data.prefetch_factor",
    "*.cache_dir",
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "callbacks.*progress*",
    "callbacks.*throughput*",
    "callbacks.*memory*",
    "callbacks.*report*",
    "run",
    "of_run",
    "choices",
    "evaluate.base",
    "evaluate.figures",
)
"""Dotted keys (patterns; all below a key goes with it) that cannot change a result."""

FILE_KEYS = ("data.train_file", "data.val_file", "data.test_file")
"""Keys that name data files: only whether one is given is hashed; the content has its own hash."""

FOLDER_KEYS = ("model.path",)
"""Keys that name a folder or a hub entry: of a folder only its own name is hashed."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run folder says.

    Attributes:
        run_dir: The folder.
        metrics: metrics.json, every key of the contract there; of a damaged run those of
            `empty_metrics` with `status` "failed" and the reason in `error`.
        config: config.yaml, None where there is none.
        damaged: Whether metrics.json could not be read.
    """

    run_dir: Path
    metrics: dict[str, Any]
    config: dict[str, Any] | None
    damaged: bool = False

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.run_dir.name

    @property
    def status(self) -> str | None:
        """One of "completed", "interrupted", "failed"."""
        return self.metrics["status"]

    @property
    def ending(self) -> str:
        """The status for readers: "pruned" where a search ended the run early."""
        return "pruned" if self.metrics.get("pruned") else str(self.status)

    @property
    def error(self) -> str | None:
        """Why the run failed or cannot be read, if so."""
        return self.metrics["error"]


def empty_section() -> dict[str, Any]:
    """The contract's keys of `val` and `test`, all unknown."""
    keys = ("n", "accuracy", "ci_low", "ci_high", "macro_accuracy", "loss", "ece", "brier")
    return {
        **dict.fromkeys(keys),
        "majority_accuracy": None,
        "letter_share": None,
        "by": {name: {} for name in BREAKDOWNS},
    }


def empty_metrics() -> dict[str, Any]:
    """metrics.json with every key of the contract, all unknown but the schema version."""
    top = ("status", "error", "config_hash", "seed", "started", "wall_seconds", "command")
    data = ("name", "sha256", "num_train", "num_val", "num_test", "num_dropped")
    model = (
        "name",
        "revision",
        "num_parameters",
        "num_trainable",
        "weight_gb_16bit",
        "weight_gb",
    )
    train = (
        "num_steps",
        "num_questions",
        "loss",
        "questions_per_second",
        "tokens_per_second",
        "fill_fraction",
        "peak_memory_gb",
    )
    return {
        "schema_version": SCHEMA_VERSION,
        **dict.fromkeys(top),
        "versions": dict.fromkeys(("python", *PACKAGES)),
        "hardware": dict.fromkeys(("device", "memory_gb")),
        "data": dict.fromkeys(data),
        "model": dict.fromkeys(model),
        "train": dict.fromkeys(train),
        "val": empty_section(),
        "test": empty_section(),
    }


def write_metrics(run_dir: str | Path, metrics: Mapping[str, Any]) -> Path:
    """Write metrics.json whole or not at all.

    Args:
        run_dir: The run folder; made if missing.
        metrics: What is known; keys of the contract that are missing become null. Numbers of numpy
            and torch, paths and tuples are turned into plain JSON, NaN and infinity into null, and
            secrets are masked.

    Returns:
        The file.

    Raises:
        TypeError: If a value has no JSON form.
    """
    complete = _merge(empty_metrics(), masked(_plain(metrics, "metrics")))
    text = json.dumps(complete, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(run_dir) / METRICS_FILE
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


def read_run(run_dir: str | Path) -> RunResult:
    """Read one run folder.

    Args:
        run_dir: The folder of a run.

    Returns:
        Its metrics, complete, and its config.

    Raises:
        CheckpointError: If the folder or metrics.json is missing, damaged, or of a newer version.
    """
    folder = Path(run_dir)
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a run, run=DIR.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {METRICS_FILE}: the run still goes on, was killed, or this is no run "
            "folder; wait for it or run it again."
        )
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_one_line(error)}); run or evaluate it again."
        ) from error
    version = metrics.get("schema_version") if isinstance(metrics, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version {version!r}, but this medqlora reads {SCHEMA_VERSION}; "
            "read it with the version that wrote it, or run it again."
        )
    complete = _merge(empty_metrics(), metrics)
    if wrong := _wrong_kinds(empty_metrics(), complete):
        raise CheckpointError(
            f"{path} is damaged ({'; '.join(wrong[:3])}); run or evaluate it again."
        )
    return RunResult(folder, complete, _read_config(folder))


def read_runs(root: str | Path) -> list[RunResult]:
    """Read every run at and below a folder, such as that of a sweep.

    A run is a folder with metrics.json, or one with config.yaml and no run below it. Nothing is
    skipped: a run that cannot be read comes back with `damaged`, status "failed" and the reason.

    Args:
        root: The folder.

    Returns:
        The runs in natural order of their paths (job 2 before job 10); may be empty.

    Raises:
        CheckpointError: If `root` is not a folder.
    """
    if not Path(root).is_dir():
        raise CheckpointError(f"{root} is not a folder; give the folder of a sweep, runs=DIR.")
    with_metrics, with_config = [], []
    for folder, names, files in os.walk(root):
        # W&B keeps its own config.yaml; checkpoints and adapters hold no runs.
        names[:] = [
            n for n in names if n not in {"wandb", "checkpoints", "adapter"} and n[0] != "."
        ]
        if METRICS_FILE in files:
            with_metrics.append(Path(folder))
        elif CONFIG_FILE in files:
            with_config.append(Path(folder))
    unfinished = [
        folder for folder in with_config if not any(folder in run.parents for run in with_metrics)
    ]
    return [_read_or_explain(folder) for folder in sorted(with_metrics + unfinished, key=_natural)]


def newest_run(root: str | Path) -> Path:
    """The folder of the trained run that was started last, of those that completed.

    Args:
        root: A folder with runs at any depth, such as `runs`.

    Raises:
        CheckpointError: If there is none.
    """
    found = [
        run
        for run in (read_runs(root) if Path(root).is_dir() else [])
        if run.status == "completed" and (run.run_dir / "adapter").is_dir()
    ]
    if not found:
        raise CheckpointError(
            f"there is no trained run below {root}: make one with `make quickstart`, or name its "
            "folder."
        )
    return max(found, key=lambda run: str(run.metrics["started"])).run_dir


def write_predictions(run_dir: str | Path, predictions: Sequence[Prediction]) -> Path:
    """Write predictions.parquet whole or not at all, keeping the splits that are not written again.

    Args:
        run_dir: The run folder; made if missing.
        predictions: Predictions of one or more splits. They replace what the file has of those
            splits.

    Returns:
        The file.

    Raises:
        CheckpointError: If an existing file is damaged.
    """
    path = Path(run_dir) / PREDICTIONS_FILE
    kept: list[Prediction] = []
    if path.is_file():
        splits = {prediction.split for prediction in predictions}
        kept = [p for p in read_predictions(run_dir) if p.split not in splits]
    rows = [*kept, *predictions]
    width = max((len(row.scores) for row in rows), default=4)
    columns: dict[str, pa.Array] = {
        "id": pa.array([p.id for p in rows], pa.string()),
        "split": pa.array([p.split for p in rows], pa.string()),
        "subject_name": pa.array([p.subject_name for p in rows], pa.string()),
        "choice_type": pa.array([p.choice_type for p in rows], pa.string()),
        "answer": pa.array([p.answer for p in rows], pa.int8()),
        "prediction": pa.array([p.prediction for p in rows], pa.int8()),
    }
    for place in range(width):
        column = [p.scores[place] if place < len(p.scores) else None for p in rows]
        columns[f"score_{LETTERS[place].lower()}"] = pa.array(column, pa.float64())
    columns["correct"] = pa.array([p.correct for p in rows], pa.bool_())
    table = pa.table(columns)
    replace_file(path, lambda file: pq.write_table(table, file))
    return path


def read_predictions(run_dir: str | Path, split: str | None = None) -> list[Prediction]:
    """Read predictions.parquet.

    Args:
        run_dir: The run folder.
        split: Only this split; None for all.

    Returns:
        The predictions in the order written, scores exactly as written.

    Raises:
        CheckpointError: If the file is missing or damaged.
        ConfigError: If it has no such split.
    """
    path = Path(run_dir) / PREDICTIONS_FILE
    if not path.is_file():
        raise CheckpointError(f"{run_dir} has no {PREDICTIONS_FILE}; evaluate the run first.")
    try:
        with path.open("rb") as file:  # a path would be read as part of a partitioned data set
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_one_line(error)}); evaluate the run again."
        ) from error
    columns = ("id", "split", "subject_name", "choice_type", "answer", "score_a", "score_b")
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise CheckpointError(
            f"{path} lacks the column(s) {', '.join(missing)}; evaluate the run again."
        )
    score_names = [f"score_{letter.lower()}" for letter in LETTERS]
    scores = [table[name].to_pylist() for name in score_names if name in table.column_names]
    texts = [table[name].to_pylist() for name in columns[:5]]
    predictions = [
        Prediction(*row, scores=tuple(value for value in values if value is not None))
        for row, values in zip(zip(*texts, strict=True), zip(*scores, strict=True), strict=True)
    ]
    if split is None:
        return predictions
    there = dict.fromkeys(prediction.split for prediction in predictions)
    if split not in there:
        raise ConfigError(
            f"{path} has no split {split!r}, only {', '.join(there) or 'none'}; evaluate the run "
            "on it first."
        )
    return [prediction for prediction in predictions if prediction.split == split]


def versions() -> dict[str, str | None]:
    """Versions of Python and the packages that can change a result; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # A plain clone has no installed metadata of its own.
            found[package] = getattr(sys.modules.get(package), "__version__", None)
    return found


def hardware(device: str | torch.device | None = None) -> dict[str, Any]:
    """Name and memory (10^9 bytes) of the device a run is on.

    Args:
        device: Where the model runs; None for CUDA if there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "memory_gb": properties.total_memory / 1e9}
    return {"device": _cpu_name(), "memory_gb": _main_memory() / 1e9 or None}


def config_hash(
    config: Mapping[str, Any],
    *,
    content: Mapping[str, str] | None = None,
    excluded: Sequence[str] = EXCLUDED_KEYS,
) -> str:
    """SHA-256 of what can change a result.

    Left out are `EXCLUDED_KEYS`. Of data files (`FILE_KEYS`) only whether one is given counts, and
    of a model folder (`FOLDER_KEYS`) only its own name, so that a copy of the project elsewhere has
    the same hash; what they hold counts through `content`. 1 and 1.0 are the same, as is the order
    of keys.

    Args:
        config: The resolved config.
        content: Hashes of files that belong to the config, such as `{"data": sha256}`.
        excluded: Dotted keys to leave out, with `*` as in file names.

    Returns:
        64 hexadecimal digits.
    """
    reduced = _reduce(_plain(config, "config"), "", excluded)
    text = json.dumps(
        {"config": reduced, "content": dict(content or {})}, sort_keys=True, ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def is_folder(path: str) -> bool:
    """Whether a value of `FOLDER_KEYS` is a folder; a hub name ("google/gemma-2b") is none."""
    return path.startswith(("/", ".", "~")) or Path(path).is_absolute()


def _reduce(value: Any, key: str, excluded: Sequence[str]) -> Any:
    if key in FILE_KEYS:
        return value is not None
    if key in FOLDER_KEYS and isinstance(value, str):
        return Path(value).name if is_folder(value) else value
    if isinstance(value, dict):
        below = {name: f"{key}.{name}" if key else name for name in value}
        return {
            name: _reduce(value[name], dotted, excluded)
            for name, dotted in below.items()
            if not any(fnmatchcase(dotted, pattern) for pattern in excluded)
        }
    if isinstance(value, list):
        return [_reduce(item, "", ()) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _plain(value: Any, key: str) -> Any:
    """The value in the types of JSON; NaN and infinity become None."""
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, key) for item in value]
    raise TypeError(f"{key} is a {type(value).__name__}, which has no JSON form.")


_TEXTS = ("status", "error", "config_hash", "started", "command", "name", "sha256", "revision")


def _wrong_kinds(known: Mapping[str, Any], metrics: Mapping[str, Any], at: str = "") -> list[str]:
    """What is no section, text or number where the contract has one, in words."""
    wrong = []
    for key, empty in known.items():
        value, name = metrics[key], f"{at}{key}"
        if isinstance(empty, dict):
            if not isinstance(value, Mapping):
                wrong.append(f"{name}={value!r:.60} is no section")
            elif key not in ("by", "versions"):
                wrong += _wrong_kinds(empty, value, f"{name}.")
        elif value is None or key in ("letter_share", "device"):
            continue
        elif key in _TEXTS:
            wrong += [] if isinstance(value, str) else [f"{name}={value!r:.60} is no text"]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            wrong.append(f"{name}={value!r:.60} is no number")
    return wrong


def _merge(base: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what is known put over it; a section given as null stays complete."""
    merged = dict(base)
    for key, value in known.items():
        below = merged.get(key)
        if isinstance(below, dict) and (value is None or isinstance(value, Mapping)):
            merged[key] = _merge(below, value or {})
        else:
            merged[key] = value
    return merged


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, make it durable, then put it in the file's place.

    Args:
        path: The file; its folder is made if missing.
        write: Writes the content to the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_one_line(error)}); run it again."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no config; run it again.")
    return config


def _read_or_explain(folder: Path) -> RunResult:
    try:
        return read_run(folder)
    except CheckpointError as error:
        metrics = empty_metrics() | {"status": "failed", "error": str(error)}
        return RunResult(folder, metrics, None, damaged=True)


def _natural(path: Path) -> list[tuple[tuple[int, int, str], ...]]:
    """Sort key of a path in which numbers sort by value."""
    return [
        tuple(
            (0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in _pieces(part)
        )
        for part in path.parts
    ]


def _pieces(text: str) -> list[str]:
    """Runs of digits and of other characters."""
    pieces: list[str] = []
    for character in text:
        if pieces and character.isdecimal() == pieces[-1][-1].isdecimal():
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


def _main_memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
