r"""Training and scoring as a user runs them, beside what a user would run instead.

    python benchmarks/training.py --model GEMMA --lengths lengths.txt --output training.json \
        --ours 16384 16384,float8 2048 --epoch 16384 --score 32768 32768,float8 \
        --peers peers.py 'trl --batch 128 --no-checkpointing' 'unsloth --batch 256' \
        --harness 256

Every run is a process of its own. `--ours` are whole commands, `python -m medqlora.train`, with
Lightning, logging, loading and the clipped paged 8-bit AdamW of the defaults; `--epoch` trains on
all of 182,822 questions and validates on 5,000 more. Options behind the tokens of a row: float8,
mlp, layers, offload (what is computed again backwards), nf4_full, steps=N, dropout=P, profile (what
the device does in ten steps, and for how long nothing), and any override of Hydra. The questions
are random words with the lengths in tokens that `--lengths` names, one a line; the model is any
folder with Gemma's weights and a tokenizer: random weights have the real speed and memory, and a
loss that means nothing.

Peers come from a script that prints `RESULT {json}`; the harness is lm-evaluation-harness, whose
MedMCQA task is asked about the same questions with the same NF4 weights. Memory "by the driver"
is what the device gave out beyond the CUDA context, polled every 5 ms; "peak_gb" is the peak of
torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTING = {"mlp": "mlp", "layers": "true", "offload": "offload"}
EPOCH, NUM_TRAIN, NUM_VAL = 182_822, 60_000, 5_000
MEMORY_MARK, PROFILE_MARK = "DRIVER ", "PROFILE "
PROFILED = range(40, 50)
"""Steps of a run that are profiled."""

KERNELS = {
    "matrix products": "gemm|nvjet|cutlass|xmma|splitK|cublas",
    "attention": "_attention|_with_key",
    "weights from 4 bits, adapter folded in": "_effective_weight|[dD]equant",
    "gradients of the adapter": "_lora_gradient",
    "optimizer": "[oO]ptimizer|multi_tensor|lpnorm",
    "copies from main memory": "HtoD",
    "GELU, norms, residuals, loss": "",
}
"""What a kernel is for, by the first pattern that its name matches."""


def write_questions(path: Path, tokenizer: Any, lengths: np.ndarray, count: int, seed: int) -> None:
    """Write questions of random words whose prompts have the wanted lengths in tokens."""
    from medqlora import instantiation
    from medqlora.config import compose
    from medqlora.schema import Question

    template = instantiation.make(compose("train").prompt)

    def length(stem: str) -> int:
        question = Question("", stem, ("heart", "liver", "lung", "bone"), 0)
        prompt = "".join(map(str, template.render(question)))
        return len(tokenizer(prompt, add_special_tokens=True)["input_ids"])

    pieces = tokenizer.get_vocab()
    words = [piece[1:] for piece in pieces if piece.startswith("▁") and piece[1:].isalpha()]
    words = [word for word in words if word.isascii() and len(word) > 2]
    words = [w for w in words[:4000] if length(f"{w} {w}") - length(w) == 1]
    frame = length(words[0]) - 1
    rng = np.random.default_rng(seed)
    letters, texts = rng.integers(0, 4, count), rng.choice(words, int(lengths.max()) * 4)
    with path.open("w") as file:
        for index in range(count):
            number = max(1, int(lengths[index % len(lengths)]) - frame)
            start = int(rng.integers(0, len(texts) - number))
            row = {
                "id": f"{seed}-{index}",
                "question": " ".join(texts[start : start + number]),
                "opa": "heart", "opb": "liver", "opc": "lung", "opd": "bone",
                "cop": int(letters[index]),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


class DriverMemory(threading.Thread):
    """Polls how much memory the device gave out beyond the CUDA context."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        import torch

        self.torch, self.peak, self.ended = torch, 0, threading.Event()
        if not torch.cuda.is_available():
            return
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        self.before = self.used()
        self.start()

    def used(self) -> int:
        """Bytes in use on the device, whoever uses them."""
        free, total = self.torch.cuda.mem_get_info()
        return total - free

    def run(self) -> None:
        """Poll until told to end."""
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, self.used() - self.before)

    def peak_gb(self) -> float:
        """The most that was used; a thread that still polls would not survive the interpreter."""
        self.ended.set()
        if self.is_alive():
            self.join()
        return self.peak / 1e9


def device_events(profiler: Any) -> list[tuple[str, float, float]]:
    """Name, start and end in us of all that the device did under a profiler of torch."""
    import torch

    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def device_time(events: list[tuple[str, float, float]]) -> dict[str, Any]:
    """What a device did and for how long it did nothing, from names, starts and ends in us."""
    first, last = min(start for _, start, _ in events), max(end for *_, end in events)
    shares, busy, covered, uncovered = dict.fromkeys(KERNELS, 0.0), 0.0, first, 0.0
    for name, start, end in sorted(events, key=lambda event: event[1]):
        kind = next(kind for kind, pattern in KERNELS.items() if re.search(pattern, name))
        shares[kind] += end - start
        alone = max(0.0, end - max(start, covered))
        busy, covered = busy + alone, max(covered, end)
        uncovered += alone if "HtoD" in name else 0.0
    steps = 1e3 * len(PROFILED)
    shares |= {"nothing": last - first - busy, "copies with nothing beside them": uncovered}
    return {"a step": round((last - first) / steps, 2)} | {
        kind: round(total / steps, 3) for kind, total in shares.items()
    }


def profile_steps() -> None:
    """Print what the device does in some steps of the training that follows in this process."""
    import lightning
    import torch
    from torch.profiler import ProfilerActivity, profile

    from medqlora import pipeline

    class Profiled(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == PROFILED.start:
                torch.cuda.synchronize()
                self.profiler = profile(activities=[ProfilerActivity.CUDA]).__enter__()
            elif index == PROFILED.stop:
                torch.cuda.synchronize()
                self.profiler.__exit__(None, None, None)
                told = json.dumps(device_time(device_events(self.profiler)))
                print(PROFILE_MARK + told, flush=True)

    build = pipeline.build_callbacks
    pipeline.build_callbacks = lambda *args: build(*args) | {"profiled": Profiled()}


def run_verb(verb: str, overrides: list[str]) -> None:
    """Run one command in this process and print what the driver saw."""
    sys.argv = ["-m"]  # as `python -m medqlora.train` does
    import medqlora  # noqa: F401

    memory = DriverMemory()
    if "profile" in overrides:
        overrides.remove("profile")
        profile_steps()
    sys.argv = [f"medqlora.{verb}", *overrides]
    try:
        runpy.run_module(f"medqlora.{verb}", run_name="__main__")
    finally:
        print(f"{MEMORY_MARK}{memory.peak_gb():.3f}", flush=True)


def overrides_of(text: str) -> tuple[list[str], dict[str, Any]]:
    """Overrides of Hydra from `TOKENS[,option...]`, and what the result calls them."""
    tokens, *words = text.split(",")
    overrides = [f"data.token_budget={tokens}"]
    steps: int | None = 60
    for word in words:
        if word in CHECKPOINTING:
            overrides.append(f"acceleration.gradient_checkpointing={CHECKPOINTING[word]}")
        elif word == "float8":
            overrides.append("acceleration.float8=true")
        elif word == "nf4_full":
            overrides.append("quant=nf4_full")
        elif word.startswith("steps="):
            steps = int(word.removeprefix("steps="))
        elif word.startswith("dropout="):
            overrides.append(f"peft.lora_dropout={word.removeprefix('dropout=')}")
        elif word == "epoch":
            steps = None
        else:
            overrides.append(word)
    if steps is not None:
        overrides.append(f"trainer.max_steps={steps}")
    return overrides, {"run": text, "tokens": int(tokens)}


def run_ours(
    text: str, verb: str, model: str, files: dict[str, Path], keep: Path | None
) -> dict[str, Any]:
    """One whole command of ours; what its metrics.json says, and the driver's memory."""
    overrides, result = overrides_of(text)
    epoch = "epoch" in text.split(",")
    common = ["data=files", f"model.path={model}", "model.revision=null", "data.label_base=0"]
    common += [f"data.cache_dir={files['cache']}"]
    if verb == "train":
        common += [f"data.train_file={files['epoch' if epoch else 'train']}", "baselines=[]"]
        common += [f"data.val_file={files['val']}", "data.eval_token_budget=16384"]
        common += [] if epoch else ["data.limit_val=0"]
    else:
        common += [f"data.test_file={files['test']}", "evaluate.figures=false", "quant=nf4"]
        overrides = [word for word in overrides if not word.startswith("trainer.max_steps")]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(keep or folder, f"{verb}-{time.strftime('%H-%M-%S')}")
        words = [*common, *overrides, f"hydra.run.dir={run_dir}"]
        started = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, __file__, "--verb", verb, *words],
            capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )  # fmt: skip
        result["wall_seconds"] = round(time.perf_counter() - started, 1)
        if ended.returncode:
            return result | {"failed": (ended.stdout + ended.stderr)[-2000:]}
        metrics = json.loads((run_dir / "metrics.json").read_text())
    for line in ended.stdout.splitlines():
        if line.startswith(MEMORY_MARK):
            result["driver_gb"] = float(line.removeprefix(MEMORY_MARK))
        elif line.startswith(PROFILE_MARK):
            result["profile_ms"] = json.loads(line.removeprefix(PROFILE_MARK))
    section = metrics["train"] if verb == "train" else metrics["scoring"]["test"]
    wanted = ("num_steps", "num_questions", "questions_per_second", "tokens_per_second", "seconds")
    wanted += ("fill_fraction", "peak_memory_gb", "first_step_seconds", "num_timed")
    result |= {key: section[key] for key in wanted if section.get(key) is not None}
    since = re.search(r"([\d.]+) s since the process started", ended.stderr)
    result |= {"start_to_first_step_seconds": float(since[1])} if since else {}
    return result | {"device": metrics["hardware"]["device"]}


def run_peer(script: Path, words: str, model: str) -> dict[str, Any]:
    """One run of a peer."""
    ended = subprocess.run(
        [sys.executable, script, *shlex.split(words), "--model", model],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"run": words, "failed": (ended.stdout + ended.stderr)[-2000:]}
    return {"run": words, **json.loads(lines[-1].removeprefix("RESULT "))}


def run_harness(batch: int, model: str, questions: Path) -> dict[str, Any]:
    """lm-evaluation-harness on the same questions with the same NF4 weights, in this process."""
    import lm_eval
    import torch
    from datasets import Dataset
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows = [row | {"exp": "", "subject_name": "", "choice_type": "single"} for row in rows]
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=quantized
    )
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "medmcqa" / "medmcqa.yaml")
    config |= {
        "custom_dataset": lambda **_: {
            "train": Dataset.from_list(rows[:1]), "validation": Dataset.from_list(rows)
        }
    }  # fmt: skip
    harness = HFLM(
        pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=batch
    )
    seconds = 0.0
    scored = harness.loglikelihood

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal seconds
        torch.cuda.synchronize()
        started = time.perf_counter()
        answer = scored(*arguments, **options)
        torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        return answer

    harness.loglikelihood = timed
    lm_eval.simple_evaluate(
        model=harness, tasks=[config], num_fewshot=0, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    return {
        "run": f"lm-evaluation-harness {lm_eval.__version__}, batch {batch}",
        "seconds": round(seconds, 2),
        "questions_per_second": round(len(rows) / seconds, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def main() -> None:
    """Read the command line and run everything on it, one line of JSON a run."""
    if sys.argv[1:2] == ["--verb"]:
        return run_verb(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--harness-here"]:
        batch, model, questions = sys.argv[2:]
        return print("RESULT", json.dumps(run_harness(int(batch), model, Path(questions))))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=Path, required=True, help="a length in tokens a line")
    parser.add_argument("--ours", nargs="*", default=[], metavar="TOKENS[,OPTION...]")
    parser.add_argument("--epoch", nargs="*", default=[], metavar="TOKENS[,OPTION...]")
    parser.add_argument("--score", nargs="*", default=[], metavar="TOKENS[,OPTION...]")
    parser.add_argument("--peers", nargs="*", default=[], metavar="SCRIPT RUN")
    parser.add_argument("--harness", nargs="*", type=int, default=[], metavar="BATCH")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder that keeps the run folders of ours")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    lengths = np.loadtxt(arguments.lengths, dtype=int)
    results: list[dict[str, Any]] = []

    def keep(kind: str, result: dict[str, Any]) -> None:
        results.append({"kind": kind, **result})
        print("RESULT", json.dumps(results[-1]), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        names = ("train", "val", "test", "epoch")
        files = {name: Path(folder, f"{name}.jsonl") for name in names}
        files["cache"] = Path(folder, "cache")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        counts = {"train": NUM_TRAIN, "val": NUM_VAL, "test": len(lengths)}
        counts |= {"epoch": EPOCH} if arguments.epoch else {}
        for seed, (name, count) in enumerate(counts.items()):
            write_questions(files[name], tokenizer, lengths, count, seed)
        for text in arguments.ours:
            keep("train", run_ours(text, "train", arguments.model, files, arguments.keep))
        for text in arguments.score:
            keep("score", run_ours(text, "evaluate", arguments.model, files, arguments.keep))
        for text in arguments.peers[1:]:
            keep("peer", run_peer(Path(arguments.peers[0]), text, arguments.model))
        for batch in arguments.harness:
            words = f"--harness-here {batch} MODEL {files['test']}"
            command = [sys.executable, __file__, *words.replace("MODEL", arguments.model).split()]
            ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
            keep(
                "harness",
                json.loads(lines[-1].removeprefix("RESULT "))
                if lines
                else {"run": f"batch {batch}", "failed": ended.stderr[-2000:]},
            )
        for text in arguments.epoch:
            keep(
                "epoch", run_ours(f"{text},epoch", "train", arguments.model, files, arguments.keep)
            )


if __name__ == "__main__":
    main()
