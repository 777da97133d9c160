r"""Every way of storing the base, and adapters on it: bytes, rounding, speed, memory.

    python benchmarks/matrix.py --model GEMMA --lengths lengths.txt --output matrix.json
    python benchmarks/matrix.py --model GEMMA --lengths lengths.txt --quant nf4 --peft lora_r16,ia3
    python benchmarks/matrix.py ... acceleration.fused=off acceleration.compile=none

For each option of `conf/quant`: seconds and peak device memory of loading, bytes of weights by
part, how far the last hidden states, the letters' log-probabilities and the logits over the
whole vocabulary lie from those of the 16-bit base (norm of the difference over the norm), and
questions scored a second. For each option of `conf/peft` on it: 50 updates of 2,048 tokens in
Lightning's Trainer with the defaults of `train`, as fast as the run measures itself (warm-up left
out), the peak of the allocator, and what is trained. One process and one line of JSON a step;
random questions of the lengths in tokens that `--lengths` names. `acceleration` is the default;
overrides of Hydra are for all steps.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import write_questions

from medqlora import instantiation, pipeline
from medqlora.acceleration import last_hidden
from medqlora.config import compose
from medqlora.data import MedMCQADataModule
from medqlora.evaluation.scoring import letter_scores
from medqlora.finetuning.losses import output_head
from medqlora.quantization import footprint, letter_rows

FULL = ("lora_r16", "lora_attention", "dora_r16", "ia3", "vera", "adalora", "prompt_tuning")
SOME = ("lora_r16", "dora_r16", "ia3")
QUANTS = {"none": SOME, "nf4": FULL, "nf4_full": SOME, "int8": SOME, "fp4": ("lora_r16",)}
QUANTS |= {"nf4_single": ("lora_r16",), "nf4_block128": (), "hqq_4bit": (), "torchao_int8": ()}


def config(arguments: argparse.Namespace, quant: str, peft: str, train_file: Path) -> Any:
    """The config of `train` for one step of the matrix."""
    return compose(
        "train",
        [
            "data=files", f"data.train_file={train_file}", "data.label_base=0",
            f"model.path={arguments.model}", "model.revision=null", f"quant={quant}",
            f"peft={peft}", "logger=csv", "baselines=[]", f"data.token_budget={arguments.tokens}",
            f"trainer.max_steps={arguments.steps}", "callbacks.progress=null",
            "callbacks.checkpoints=null", f"trainer={arguments.trainer}",
            *arguments.overrides,
        ],
    )  # fmt: skip


def measure_base(cfg: Any, datamodule: MedMCQADataModule, rows: list[Any], reference: Any) -> Any:
    """Load a base and compare it with the 16-bit one; the row, and what a first base answered."""
    free()
    started = time.perf_counter()
    base = pipeline.build_base(cfg)
    synchronize()
    row: dict[str, Any] = {"load_seconds": round(time.perf_counter() - started, 2)}
    size = footprint(base)
    row |= {
        "weight_gb": round(size.weight_gb, 3),
        "parts_gb": {name: round(part["num_bytes"] / 1e9, 4) for name, part in size.parts.items()},
    }
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        row |= {"load_peak_gb": round(peak, 3), "load_peak_over": round(peak / size.weight_gb, 2)}
    letters = letter_rows(base, datamodule.letter_ids)
    pipeline.accelerate_for(cfg, base, datamodule.token_budget)
    answers: dict[str, list[torch.Tensor]] = {"hidden": [], "letters": [], "logits": []}
    with torch.no_grad():
        for batch in rows:
            there = batch.answer >= 0
            hidden = last_hidden(base, batch)[there]
            answers["hidden"].append(hidden.float().cpu())
            answers["letters"].append(letter_scores(hidden, letters).float().cpu())
            answers["logits"].append(output_head(base)(hidden[:16]).float().cpu())
        synchronize()
        started = time.perf_counter()
        for batch in rows:
            last_hidden(base, batch)
        synchronize()
    seconds = time.perf_counter() - started
    row["scored_per_second"] = round(sum(batch.num_questions for batch in rows) / seconds, 1)
    ours = {name: torch.cat(parts) for name, parts in answers.items()}
    if reference is not None:
        for name, theirs in reference.items():
            distance = (ours[name] - theirs).norm() / theirs.norm()
            row[f"{name}_error"] = round(float(distance), 5)
        same = ours["letters"].argmax(1) == reference["letters"].argmax(1)
        row["same_answer"] = round(float(same.float().mean()), 4)
    return row, reference or ours


def measure_training(cfg: Any, datamodule: MedMCQADataModule, folder: str) -> dict[str, Any]:
    """Train an adapter for some updates; the numbers of `train` in metrics.json."""
    free()
    base = pipeline.build_base(cfg)
    callbacks = pipeline.build_callbacks(cfg, Path(folder), datamodule, {})
    trainer = pipeline.build_trainer(cfg, Path(folder), callbacks, [])
    datamodule.trainer = trainer
    module = pipeline.build_training_module(cfg, base, datamodule, cfg.trainer.max_steps)
    trainer.fit(module, datamodule)
    datamodule.trainer = None  # which would keep the model
    summary = callbacks["throughput"].summary()  # type: ignore[attr-defined]
    return {
        "questions_per_second": round(summary["questions_per_second"], 1),
        "first_step_seconds": round(summary["first_step_seconds"], 1),
        "peak_gb": round(callbacks["memory"].peak_memory_gb, 2),  # type: ignore[attr-defined]
        "num_trainable": module.num_trainable,
    }


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Forget what the step before held, and its peak."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Go through the matrix; a step that fails is a line that says why."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of Hydra, such as acceleration.fused=off")
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--quant", help="options of conf/quant; all of the matrix if left out")
    parser.add_argument("--peft", help="options of conf/peft for each of them")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--trainer", default="gpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after these")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    quants = {
        name: tuple(arguments.peft.split(",")) if arguments.peft else QUANTS.get(name, SOME)
        for name in (arguments.quant.split(",") if arguments.quant else QUANTS)
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    started, results, reference, rows = time.perf_counter(), [], None, []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.jsonl")
        lengths = np.loadtxt(arguments.lengths, dtype=int)
        write_questions(file, AutoTokenizer.from_pretrained(arguments.model), lengths, 4000, 0)
        cfg = config(arguments, "none", "lora_r16", file)
        datamodule = pipeline.build_datamodule(cfg)
        datamodule.setup()
        for batch in itertools.islice(datamodule.train_dataloader(), 16):
            rows.append(batch.to(instantiation.device_of(cfg)))
        for quant, adapters in quants.items():
            for peft in (None, *adapters):
                result: dict[str, Any] = {"quant": quant, "peft": peft, "device": device}
                if arguments.overrides:
                    result["overrides"] = arguments.overrides
                if time.perf_counter() - started > arguments.seconds:
                    result["not_run"] = "out of time"
                else:
                    cfg = config(arguments, quant, peft or "lora_r16", file)
                    try:
                        if peft is None:
                            row, reference = measure_base(cfg, datamodule, rows, reference)
                            result |= row
                        else:
                            result |= measure_training(cfg, datamodule, folder)
                    except Exception as error:
                        result["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[
                            :300
                        ]
                results.append(result)
                print("RESULT", json.dumps(result), flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
