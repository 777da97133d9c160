"""Run folders as `train` and `evaluate` leave them, made in milliseconds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medqlora.config import compose
from medqlora.evaluation import (
    config_hash,
    empty_metrics,
    summarise,
    versions,
    write_metrics,
    write_predictions,
)
from medqlora.runs import resolved
from medqlora.schema import Prediction, Question

SUBJECTS = ("Dental", "Medicine", "Surgery", "Pathology", "Pharmacology", "Anatomy", "Psychiatry")
WEIGHTS = (0.31, 0.2, 0.16, 0.12, 0.1, 0.09, 0.02)


def make_questions(n: int = 240, seed: int = 0) -> list[Question]:
    """Questions with random answers, option A a little more often, in subjects of many sizes."""
    rng = np.random.default_rng(seed)
    answers = rng.choice(4, size=n, p=[0.32, 0.26, 0.22, 0.2])
    subjects = rng.choice(SUBJECTS, size=n, p=WEIGHTS)
    return [
        Question(f"q{i}", f"Fact {i}?", ("a", "b", "c", "d"), int(answers[i]), str(subjects[i]))
        for i in range(n)
    ]


def answer(questions: list[Question], skill: float, seed: int, split: str) -> list[Prediction]:
    """Scores that favour the right letter by `skill`; two runs err on the same hard questions."""
    hard = np.random.default_rng(99).normal(size=(len(questions), 4))
    rng = np.random.default_rng(seed)
    predictions = []
    for i, question in enumerate(questions):
        logits = hard[i] + 0.5 * rng.normal(size=4)
        logits[question.answer or 0] += skill
        scores = logits - np.logaddexp.reduce(logits)
        predictions.append(
            Prediction(
                question.id,
                split,
                question.subject_name,
                question.choice_type,
                question.answer,
                tuple(scores.tolist()),
            )
        )
    return predictions


def base_config(*overrides: str) -> dict[str, Any]:
    """The config of a `train` run."""
    return resolved(compose("train", ["trainer=cpu", "logger=csv", *overrides]))


def write_run(
    folder: Path,
    config: dict[str, Any],
    *,
    skill: float = 0.6,
    questions: list[Question] | None = None,
    choices: dict[str, str] | None = None,
    gb: float = 2.1,
    trainable: int = 19_600_000,
    ms: float = 0.5,
    status: str = "completed",
    error: str | None = None,
    curve: bool = True,
    command: str = "python -m medqlora.train",
) -> Path:
    """Write a run folder.

    Args:
        folder: Where.
        config: Its config, seed included.
        skill: How good it is.
        questions: Its test questions.
        choices: Options of its groups.
        gb: Size of its weights.
        trainable: Trainable numbers.
        ms: Milliseconds a question.
        status: How it ended.
        error: Why.
        curve: Whether metrics.csv is written.
        command: What was typed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = config["seed"]
    metrics = empty_metrics()
    metrics |= {
        "status": status,
        "error": error,
        "config_hash": config_hash(config),
        "seed": seed,
        "started": "2026-11-24T03:00:00+00:00",
        "wall_seconds": 60.0 + seed,
        "command": command,
        "choices": choices or {},
        "versions": versions(),
        "hardware": {"device": "NVIDIA H200", "memory_gb": 150.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if status == "completed":
        questions = make_questions() if questions is None else questions
        predictions = answer(questions, skill, seed, "test")
        half = questions[: len(questions) // 2]
        val = answer(half, skill, seed + 50, "val")
        metrics["test"] = summarise(predictions, questions)
        metrics["val"] = summarise(val, half)
        metrics["data"] |= {"name": "sample", "sha256": "0" * 64, "num_test": len(questions)}
        metrics["model"] |= {
            "name": "google/gemma-2b",
            "num_parameters": 2_506_172_416 + trainable,
            "num_trainable": trainable,
            "weight_gb_16bit": 5.01,
            "weight_gb": gb,
        }
        metrics["train"] |= {
            "num_steps": 100,
            "num_questions": 5000,
            "loss": 1.3,
            "questions_per_second": 700.0,
            "tokens_per_second": 40000.0,
            "peak_memory_gb": 2 * gb,
        }
        metrics["scoring"] = {"test": {"seconds": ms * len(questions) / 1000}}
        write_predictions(folder, [*predictions, *val])
        if curve and trainable:
            _write_curve(folder / "metrics.csv", skill, seed)
    write_metrics(folder, metrics)
    return folder


def _write_curve(path: Path, skill: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", "epoch", "train/loss", "val/loss", "val/accuracy"])
        table.writeheader()
        for step in range(9, 100, 10):
            done = 1 - np.exp(-step / 40)
            loss = 1.386 - 0.25 * skill * done
            table.writerow({"step": step, "train/loss": loss + 0.03 * rng.normal()})
            if step % 30 == 9:
                accuracy = 0.3 + 0.25 * skill * done + 0.01 * rng.normal()
                table.writerow({"step": step, "val/loss": loss, "val/accuracy": accuracy})


QUANTS = {"none": (5.01, 0.12), "int8": (3.1, 0.06), "nf4": (2.07, 0.0)}
PEFTS = {"lora_r8": (8, 0.0), "lora_r16": (16, 0.15), "dora_r16": (16, 0.22)}


def write_sweep(root: Path, *, seeds: tuple[int, ...] = (1, 2)) -> Path:
    """A sweep of 3 quantisations, 3 adapters and some seeds, with bases, a failed job and a wreck.

    Args:
        root: Its folder.
        seeds: Seeds.
    """
    config = base_config()
    questions = make_questions()
    number = 0
    for quant, (gb, gain) in QUANTS.items():
        for peft, (r, more) in PEFTS.items():
            for seed in seeds:
                own = {
                    **config,
                    "seed": seed,
                    "quant": {
                        **config["quant"],
                        "data_type": quant,
                        "double_quant": quant == "nf4",
                    },
                    "peft": {**config["peft"], "r": r, "use_dora": peft == "dora_r16"},
                }
                words = f"quant={quant} peft={peft} seed={seed}"
                folder = write_run(
                    root / str(number),
                    own,
                    skill=0.45 + gain + more,
                    questions=questions,
                    choices={"quant": quant, "peft": peft, "data": "sample"},
                    gb=gb + 0.005 * r,
                    trainable=1_225_000 * r + (500_000 if peft == "dora_r16" else 0),
                    ms=0.3 + (quant != "none") * 0.15 + 0.01 * r,
                    command=f"python -m medqlora.train {words}",
                )
                scoring = ("data", "prompt", "model", "quant", "acceleration", "trainer", "seed")
                write_run(
                    folder / "baselines" / "base_quantized",
                    {**{key: own[key] for key in scoring}, "peft": {}},
                    skill=0.12 + 4 * gain,  # so that some difference is sure
                    questions=questions,
                    gb=gb,
                    trainable=0,
                    ms=0.3 + (quant != "none") * 0.15,
                    command=f"python -m medqlora.evaluate quant={quant} peft=none",
                )
                number += 1
    write_run(
        root / str(number),
        {
            **config,
            "seed": 1,
            "quant": {**config["quant"], "data_type": "fp4"},
            "peft": {**config["peft"], "use_dora": False},
        },
        choices={"quant": "fp4", "peft": "lora_r16", "data": "sample"},
        status="failed",
        error="the loss is not finite <b>at</b> update 12: lower optimizer.lr",
        command="python -m medqlora.train quant=fp4 peft=lora_r16 seed=1",
    )
    wreck = root / str(number + 1)
    wreck.mkdir()
    (wreck / "metrics.json").write_text('{"schema_version": 1, "stat')
    return root
