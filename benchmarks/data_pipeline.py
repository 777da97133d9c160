"""How long MedMCQA takes to become packed rows: first start, second start, loader, memory.

    python benchmarks/data_pipeline.py --output benchmarks/data_pipeline.json

The questions are synthetic, as many as in MedMCQA and about as long in tokens, and the tokenizer
is trained on them here with 32,000 pieces in Gemma's layout, so nothing is downloaded. Every start
is a process of its own; its seconds run from the data module to the first packed row, without the
imports, beside the processor seconds of all its threads, which a busy machine does not stretch.
Targets: first start 30 s and second start 3 s on 2 cores, a loader of 5,000 questions a
second (five times the fastest training on one H200), fill of 98 % at 2,048 and 99.5 % at 16,384
tokens a row, memory that does not grow over an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SEED = 0
SUBJECTS = ("Anatomy", "Dental", "Medicine", "Pathology", "Pharmacology", "Surgery")


def main() -> None:
    """Run the benchmark, or one start of it in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=182_822, help="questions")
    parser.add_argument("--pieces", type=int, default=32_000, help="vocabulary of the tokenizer")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--start", nargs=3, metavar=("QUESTIONS", "TOKENIZER", "BUDGET"))
    options = parser.parse_args()
    if options.start:
        questions, tokenizer, budget = options.start
        print(json.dumps(start(questions, tokenizer, int(budget))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = benchmark(Path(folder), options.rows, options.pieces)
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def benchmark(folder: Path, rows: int, pieces: int) -> dict[str, object]:
    """Make questions and tokenizer, then start several times; seconds, bytes and fractions."""
    texts = write_questions(folder / "train.parquet", rows)
    write_tokenizer(folder / "tokenizer", texts[: 40_000 * 5], pieces)
    result: dict[str, object] = {
        "num_questions": rows,
        "num_pieces": pieces,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    environment = os.environ | {"MEDQLORA_CACHE": str(folder / "cache")}
    for name, budget in (("first", 2048), ("second", 2048), ("third_at_16384", 16384)):
        command = [sys.executable, __file__, "--start"]
        command += [str(folder / "train.parquet"), str(folder / "tokenizer"), str(budget)]
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        result[name] = json.loads(output.stdout.splitlines()[-1])
    return result


def write_questions(path: Path, rows: int) -> list[str]:
    """Write synthetic questions with MedMCQA's columns and lengths; returns all their texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(SEED)
    onsets = [
        "b",
        "c",
        "d",
        "f",
        "g",
        "h",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "th",
        "v",
        "st",
        "pr",
    ]
    rhymes = ["a", "e", "i", "o", "u", "an", "er", "in", "is", "ol", "um", "ia", "al", "ic", "us"]
    syllables = [onset + rhyme for onset in onsets for rhyme in rhymes]
    words = np.array(
        [
            "".join(generator.choice(syllables, size=generator.integers(1, 5)))
            for _ in range(200_000)
        ]
    )
    # Flatter than a language, so that a trained tokenizer needs pieces rather than whole words.
    weights = np.arange(1, len(words) + 1) ** -0.25
    pool = generator.choice(words, size=4_000_000, p=weights / weights.sum())

    def some(means: float, spread: float) -> list[str]:
        lengths = np.clip(generator.lognormal(np.log(means), spread, size=rows), 1, 120).astype(int)
        begins = generator.integers(0, len(pool) - 120, size=rows)
        return [
            " ".join(pool[b : b + n])
            for b, n in zip(begins.tolist(), lengths.tolist(), strict=True)
        ]

    columns = {"question": some(11, 0.55)}
    columns |= {name: some(2.6, 0.6) for name in ("opa", "opb", "opc", "opd")}
    texts = [text for column in columns.values() for text in column]
    table = pa.table(
        {
            "id": [f"{row:032x}" for row in range(rows)],
            **columns,
            "cop": generator.integers(0, 4, size=rows),
            "exp": some(30, 0.7),
            "subject_name": generator.choice(SUBJECTS, size=rows),
            "topic_name": pa.nulls(rows, pa.string()),
            "choice_type": generator.choice(["single", "multi"], size=rows),
        }
    )
    pq.write_table(table, path)
    return texts


def write_tokenizer(folder: Path, texts: list[str], pieces: int) -> None:
    """Train a BPE tokenizer and store it in Gemma's layout: no words, only pieces of the text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    controls = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁|\n"), "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[AddedToken(token, special=True) for token in controls],
        show_progress=False,
    )
    frame = "Question: {}\nChoices:\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer: A B C D E"
    lines = [frame.format(*texts[i : i + 5]) for i in range(0, len(texts) - 5, 5)]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def start(questions: str, tokenizer: str, token_budget: int) -> dict[str, float]:
    """Set a data module up and read one epoch from it."""
    from medqlora.data import MedMCQADataModule, PromptTemplate, load_tokenizer

    prompt = PromptTemplate(name="harness", text="Question: {stem}\nChoices:\n{options}Answer:")
    loaded = load_tokenizer(tokenizer)
    began, used = time.perf_counter(), time.process_time()
    data = MedMCQADataModule(
        "synthetic",
        tokenizer=loaded,
        prompt=prompt,
        seed=SEED,
        train_file=questions,
        num_val=5000,
        token_budget=token_budget,
    )
    data.setup("fit")
    loader = data.train_dataloader()
    rows = len(loader)
    next(iter(loader))
    ready, processor = time.perf_counter() - began, time.process_time() - used
    before = peak_memory_gb()
    began = time.perf_counter()
    number = tokens = 0
    for batch in loader:
        number += batch.num_questions
        tokens += batch.num_tokens
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    loader.set_epoch(1)
    next(iter(loader))
    shuffled = time.perf_counter() - began
    return {
        "ready_seconds": round(ready, 3),
        "ready_cpu_seconds": round(processor, 3),
        "num_rows": rows,
        "mean_tokens": round(tokens / number, 2),
        "fill_fraction": round(data.fill_fraction("train"), 5),
        "questions_per_second": round(number / seconds),
        "next_epoch_seconds": round(shuffled, 3),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "memory_growth_gb": round(peak_memory_gb() - before, 3),
    }


def peak_memory_gb() -> float:
    """Largest resident size of this process so far, in GB of 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
