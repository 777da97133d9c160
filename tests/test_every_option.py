"""Every option of every group in a run of two updates, each in the company of others.

One run a row of a table in which every option stands at least once: what works alone and fails
beside another is found as well, at a tenth of the runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

from medqlora import pipeline
from medqlora.config import CONFIG_DIR, compose
from medqlora.train import train

ELSEWHERE = {
    "trainer": {"gpu", "ddp", "fsdp"},  # test_conf, acceleration/test_gpu, test_distributed
    "quant": {"torchao_int4"},  # needs CUDA: quantization/test_extras, test_gpu
    "peft": {"none"},  # trains nothing: test_bad_input, test_evaluate
    "experiment": {"quickstart"},  # test_wheel, test_readme
    "logger": {name for name in ("mlflow", "tensorboard") if find_spec(name) is None},
    "sweep": {path.stem for path in (CONFIG_DIR / "sweep").glob("*.yaml")},  # test_sweep
}
PLAIN = ["full", "olora_r16", "pissa_r16"]
"""Methods that need a 16-bit base."""
EXTRAS = {"hqq_2bit": "hqq", "hqq_3bit": "hqq", "hqq_4bit": "hqq", "torchao_int8": "torchao"}
"""Storage that peft puts LoRA on and nothing else, and the package it needs."""


def options(group: str) -> list[str]:
    found = {path.stem for path in (CONFIG_DIR / group).glob("*.yaml")}
    return sorted(found - ELSEWHERE.get(group, set()))


def pairs() -> list[tuple[str, str]]:
    """Every method on some storage that carries it, and every storage under some method."""
    plain, extras = ["none", "none_fp32"], sorted(EXTRAS)
    lora = [name for name in options("peft") if "lora_" in name and name[0] in "lr"]
    other = [name for name in options("peft") if name not in (*PLAIN, *lora)]
    stored = [name for name in options("quant") if name not in (*plain, *extras)]
    on_extras = list(zip(lora, extras, strict=False))
    rest = [*other, *lora[len(extras) :]]
    assert len(rest) >= len(stored)
    return [*zip(PLAIN, cycle(plain)), *on_extras, *zip(rest, cycle(stored))]


def table() -> Iterator[list[str]]:
    """The overrides of each run."""
    groups = {folder.name for folder in CONFIG_DIR.iterdir() if options(folder.name)}
    groups -= {"quant", "peft", "optimizer"}
    cycles = {group: cycle(options(group)) for group in sorted(groups)}
    # Muon updates matrices only, so it takes the first method that trains nothing else.
    optimizers = cycle(name for name in options("optimizer") if name != "muon")
    muon = False
    for peft, quant in pairs():
        row = {group: next(names) for group, names in cycles.items()}
        if peft.startswith("lora_") and not muon:
            muon, row["optimizer"] = True, "muon"
        else:
            row["optimizer"] = next(optimizers)
        yield [f"quant={quant}", f"peft={peft}", *(f"{key}={name}" for key, name in row.items())]


ROWS = list(table())


def test_every_option_is_in_the_table_or_tested_elsewhere():
    tried = {word for row in ROWS for word in row}
    for folder in CONFIG_DIR.iterdir():
        if folder.is_dir():
            for name in options(folder.name):
                assert f"{folder.name}={name}" in tried


@pytest.fixture(scope="module")
def wide_gemma(tmp_path_factory, tiny_gemma_folder) -> str:
    """One layer that blocks of 256 weights divide."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma_folder)
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "wide"
    GemmaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ",".join(row[:2]))
def test_it_takes_two_steps(row, wide_gemma, tiny_gemma_folder, question_files, tmp_path):
    chosen = dict(word.split("=") for word in row)
    quant = chosen["quant"]
    if quant in EXTRAS and find_spec(EXTRAS[quant]) is None:
        pytest.skip(f"the optional extra {EXTRAS[quant]} is not installed")
    files = [f"data.{split}_file={question_files[split]}" for split in ("train", "val")]
    if chosen["data"].startswith("medmcqa"):  # the hub's copy is read in test_hub
        files = ["data.hub=null", f"data.train_file={question_files['train']}", "data.num_val=16"]
        files = [word.replace("data.train", "+data.train") for word in files]
        files += ["data.num_test=8"] if chosen["data"] == "medmcqa_5k" else []
    model = wide_gemma if quant == "nf4_block256" else tiny_gemma_folder
    if chosen["model"] != "tiny_gemma" or quant == "nf4_block256":
        files += [f"model.path={model}", "model.revision=null"]
    cfg = compose(
        "train",
        [
            *(*row, *files),
            *("data.token_budget=1024", "data.limit_train=24", "data.limit_val=8"),
            *("trainer.max_steps=2", "trainer.max_epochs=2", "optimizer.lr=1e-3", "baselines=[]"),
            *(["data.limit_test=0"] if chosen["data"] == "sample" else []),
        ],
    )
    folder = train(cfg, tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["status"] == "completed"
    assert metrics["train"]["num_steps"] == 2
    assert math.isfinite(metrics["train"]["loss"])
    assert metrics["val"]["n"] == 8
    [weights] = (folder / "adapter").glob("*.safetensors")
    state = load_file(weights)
    assert all(tensor.isfinite().all() for tensor in state.values())
    moved = [tensor for name, tensor in state.items() if "lora_B" in name]
    assert all(tensor.abs().max() > 0 for tensor in moved)
    again = pipeline.load_run(folder, device="cpu")
    assert again.datamodule.letter_ids
