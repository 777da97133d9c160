"""What the tests of whole commands share: a tiny Gemma in a folder, questions, a private home.

The environment is set before anything is imported that reads it, so that no test sees the caches,
tokens or settings of this machine, and none leaves anything behind.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.shapes import check_package

_HOME = tempfile.TemporaryDirectory(prefix="medqlora-tests-")
for _name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_HOME": f"{_HOME.name}/huggingface",
    "MEDQLORA_CACHE": f"{_HOME.name}/medqlora",
    "WANDB_DIR": f"{_HOME.name}/wandb",
    "WANDB_CACHE_DIR": f"{_HOME.name}/wandb",
    "NETRC": f"{_HOME.name}/netrc",
    "NO_PROXY": "127.0.0.1,localhost",
    "OMP_NUM_THREADS": "1",  # workers share the cores, and sums do not depend on their number
    "TOKENIZERS_PARALLELISM": "false",
}

# Imported here, behind the environment it reads; torch.compile cannot trace through the checks.
if not importlib.import_module("torch").cuda.is_available():
    check_package("medqlora")

ROOT = Path(__file__).resolve().parent.parent


LONGEST = (
    "tests/test_distributed.py",
    "tests/test_resume.py",
    "tests/test_launchers.py",
    "tests/test_sweep.py::test_a_hundred_jobs",
    "tests/test_sweep.py::test_adapters_over_one_base",
    "tests/test_sweep.py::test_the_same_line",
)
"""Tests that take a minute each: begun first, lest a worker be left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first; the others keep their order."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def _earlier_objects_are_left_alone() -> None:
    """What others made is no garbage of this module: collecting, once a job, is over sooner."""
    gc.collect()
    gc.freeze()


class Ended(NamedTuple):
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines that tell of a failure."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="session")
def tiny_gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Gemma with its tokenizer, as a user would download one.

    Wide enough for the 8-bit optimisers, which keep tensors of less than 4096 numbers in 32 bit.
    """
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    from tests.data.data_tools import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    GemmaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def question_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Made-up questions in MedMCQA's columns: a file each of train, val and test."""
    from tests.data.data_tools import raw_row, write_jsonl

    folder = tmp_path_factory.mktemp("questions")
    parts = {"train": range(64), "val": range(100, 116), "test": range(200, 224)}
    return {
        split: write_jsonl(folder / f"{split}.jsonl", [raw_row(i) for i in numbers])
        for split, numbers in parts.items()
    }


@pytest.fixture(scope="session")
def tiny_options(tiny_gemma_folder: str, question_files: dict[str, str]) -> list[str]:
    """Overrides that make a run on the CPU out of any command of `train`: seconds, no network."""
    return [
        "data=files",
        *(f"data.{split}_file={file}" for split, file in question_files.items()),
        "data.token_budget=512",
        f"model.path={tiny_gemma_folder}",
        "model.revision=null",
        "trainer=cpu",
        "logger=csv",
        "callbacks.progress=null",
        "baselines=[]",
    ]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> Path:
    """The folder of a run of a few updates, scored on val and test. Not to be written into."""
    from medqlora.config import compose
    from medqlora.train import train

    options = ["quant=nf4_fp32", "optimizer=adamw", "optimizer.lr=0.01", "trainer.max_steps=6"]
    cfg = compose("train", [*tiny_options, *options])
    return train(cfg, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Ended]]:
    """`run_command("train", "quant=nf4", ...)` runs a verb as the command line does, in process."""

    def run(verb: str, *arguments: str) -> Ended:
        main: Any = importlib.import_module(f"medqlora.{verb}").main
        monkeypatch.setattr(sys, "argv", [f"medqlora.{verb}", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    with _logging_as_before():
        yield run


class _logging_as_before:
    """Commands set up logging for their process, which the next test must not see."""

    def __enter__(self) -> None:
        root = logging.getLogger()
        self.root = (root.handlers[:], root.level)
        self.loggers = {
            name: (logger.handlers[:], logger.propagate, logger.level)
            for name, logger in logging.root.manager.loggerDict.items()
            if isinstance(logger, logging.Logger)
        }
        self.filters = warnings.filters[:]

    def __exit__(self, *exception: object) -> None:
        logging.captureWarnings(False)
        root = logging.getLogger()
        root.handlers[:], level = self.root
        root.setLevel(level)
        for name, (handlers, propagate, level) in self.loggers.items():
            logger = logging.getLogger(name)
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        warnings.filters[:] = self.filters
