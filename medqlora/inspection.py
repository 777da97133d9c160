"""What a run folder holds beyond its numbers: what training changed, and what storage cost.

The notebooks are made of these; each function takes a run and gives back tables or predictions.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from medqlora import instantiation, pipeline
from medqlora.config import CONFIG_DIR, compose
from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluation import (
    RunResult,
    mean_divergence,
    read_predictions,
    read_run,
    summarise,
    to_predictions,
)
from medqlora.evaluation.tables import ResultRow
from medqlora.finetuning import effective_rank, weight_changes
from medqlora.quantization import (
    Checkpoint,
    Footprint,
    QuantConfig,
    dequantized_weight,
    footprint,
    rounding_error,
)
from medqlora.schema import Prediction, Question

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def adapter_changes(run: pipeline.LoadedRun) -> pd.DataFrame:
    """What the adapter of a run added to each weight, beside what quantisation rounded away.

    The original weights are read one at a time, so this runs beside a full-size model.

    Args:
        run: A run of the LoRA family.

    Returns:
        One row an adapted weight, in the order of the model. `name` (path within the base model),
        `layer`, `module`, `rank`; of the change: `norm` (Frobenius), `relative_norm` (over that of
        the original weight), `largest` (singular value), `effective_rank`, `singular_values`; of
        what storing rounded away, original minus stored: `rounding_error` (its norm over that of
        the original), `rounding_largest`, and `cosine` between the two: 1 where the adapter only
        makes up for rounding, 0 where it has nothing to do with it, NaN where nothing was rounded.

    Raises:
        ConfigError: If the run has no adapter of the LoRA family.
    """
    model = run.config["model"]
    checkpoint = Checkpoint(model["path"], model.get("revision"))
    rows = []
    for change in weight_changes(run.module.model, dequantized_weight):
        original = checkpoint.read(f"{change.name}.weight").to(change.stored)
        lost = original - change.stored
        norm, lost_norm = change.change.norm(), lost.norm()
        layer, module = place_of(change.name)
        rows.append(
            {
                "name": change.name,
                "layer": layer,
                "module": module,
                "rank": change.rank,
                "norm": float(norm),
                "relative_norm": float(norm / original.norm()),
                "largest": float(change.singular_values[0]),
                "effective_rank": effective_rank(change.singular_values),
                "rounding_error": float(lost_norm / original.norm()),
                "rounding_largest": float(torch.linalg.matrix_norm(lost, 2)),
                "cosine": float((change.change * lost).sum() / (norm * lost_norm)),
                "singular_values": change.singular_values.tolist(),
            }
        )
    return pd.DataFrame(rows)


def place_of(name: str) -> tuple[int, str]:
    """Layer number and module of a weight: "model.layers.3.mlp.up_proj" is (3, "up_proj").

    Outside the layers, as for the embedding, the number is -1.
    """
    found = _LAYER.search(name)
    return int(found.group(1)) if found else -1, name.rpartition(".")[2]


def by_layer(changes: pd.DataFrame, column: str) -> pd.DataFrame:
    """One column of `adapter_changes` as a map: modules in the order of the model, by layer."""
    modules = list(dict.fromkeys(changes["module"]))
    return changes.pivot(index="module", columns="layer", values=column).loc[modules]


def spectra(changes: pd.DataFrame) -> dict[str, list[list[float]]]:
    """The singular values of `adapter_changes` by module, a list a layer."""
    return {
        str(module): rows["singular_values"].tolist()
        for module, rows in changes.groupby("module", sort=False)
    }


# --- answers --------------------------------------------------------------------------------------


def base_run(run: RunResult) -> RunResult | None:
    """The bare base that `train` scored beside a run, stored as the run stores it, if it did."""
    with contextlib.suppress(CheckpointError):
        return read_run(run.run_dir / "baselines" / "base_quantized")
    return None


def base_predictions(run: pipeline.LoadedRun, split: str) -> list[Prediction]:
    """Answers of the run's base without its adapter: as kept beside the run, else scored now.

    Args:
        run: A run.
        split: "train", "val" or "test".

    Raises:
        ConfigError: If its data have no such split.
    """
    kept = base_run(read_run(run.run_dir))
    if kept is not None:
        with contextlib.suppress(CheckpointError, ConfigError):
            return read_predictions(kept.run_dir, split)
    questions = questions_of(run, split)
    base = pipeline.build_base(run.config)
    return _answers(run, base, questions, split)


def questions_of(run: pipeline.LoadedRun, split: str) -> list[Question]:
    """The questions of a split with their texts, read from the run's data.

    Raises:
        ConfigError: If its data have no such split.
        DataError: If they cannot be read.
    """
    run.datamodule.setup()
    if split not in run.datamodule.questions:
        raise ConfigError(
            f"the data of {run.run_dir.name} have no {split} questions: choose "
            f"{' or '.join(run.datamodule.questions)}."
        )
    return list(run.datamodule.questions[split])


def _answers(
    run: pipeline.LoadedRun, base: Any, questions: Sequence[Question], split: str
) -> list[Prediction]:
    module = pipeline.build_scoring_module(run.config, base, run.datamodule)
    scores = pipeline.score_questions(module, run.datamodule, questions)
    return to_predictions(questions, split, torch.arange(len(questions)), scores)


# --- storage --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredBase:
    """A bare base under one storage.

    Attributes:
        option: Of `conf/quant`, such as "nf4".
        quant: What it says.
        size: What its weights take.
        errors: Relative rounding error of each quantised weight, by path; see `rounding_error`.
        predictions: Its answers, without an adapter.
        questions: What was asked.
    """

    option: str
    quant: QuantConfig
    size: Footprint
    errors: dict[str, float]
    predictions: list[Prediction]
    questions: list[Question]


def stored_bases(
    run: pipeline.LoadedRun,
    options: Sequence[str],
    split: str = "val",
    limit: int | None = None,
) -> Iterator[StoredBase]:
    """Store the base of a run in several ways, one after the other, and ask each the same.

    Args:
        run: Gives the base, the prompt and the questions; how it stores its base does not matter.
        options: Of `conf/quant`, with their own compute dtypes; "none" for 16 bit.
        split: "train", "val" or "test".
        limit: Questions asked; None for all.

    Yields:
        One base an option. Its weights are let go of before the next is loaded.

    Raises:
        ConfigError: If an option is unknown or cannot work here, or the data have no such split.
    """
    model = run.config["model"]
    questions = questions_of(run, split)[:limit]
    for option in options:
        quant = _option(option)
        base = pipeline.build_base(run.config, quant)
        errors = rounding_error(base, model["path"], model.get("revision"))
        size = footprint(base)
        yield StoredBase(
            option, quant, size, errors, _answers(run, base, questions, split), questions
        )
        del base


def _option(name: str) -> QuantConfig:
    known = sorted(file.stem for file in (CONFIG_DIR / "quant").glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"quant={name} is unknown. Choose one of {', '.join(known)}.")
    return instantiation.make(compose("train", [f"quant={name}"]).quant)


def storage_row(stored: StoredBase, reference: StoredBase) -> ResultRow:
    """The row of a storage in a table of results, beside the one it is held against.

    Args:
        stored: A storage.
        reference: Usually 16 bit, asked the same questions.
    """
    linear = [layer for name, layer in stored.size.layers.items() if name in stored.errors]
    bits = sum(8 * layer.num_bytes for layer in linear) / max(
        1, sum(layer.num_parameters for layer in linear)
    )
    mean_error = sum(stored.errors.values()) / max(1, len(stored.errors))
    changed = sum(
        a.prediction != b.prediction
        for a, b in zip(stored.predictions, reference.predictions, strict=True)
    )
    return ResultRow(
        name=stored.option,
        section=summarise(stored.predictions, stored.questions),
        size_gb=stored.size.weight_gb,
        extra={
            "bits": f"{bits:.2f}" if linear else "-",
            "error": f"{100 * mean_error:.2f} %" if linear else "-",
            "KL nats": f"{mean_divergence(reference.predictions, stored.predictions):.2g}",
            "answers changed": str(changed),
        },
    )
