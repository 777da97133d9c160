"""Values of a config against what they are for: types as declared, ranges as written down."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from medqlora import instantiation, options
from medqlora.config import CONFIG_DIR, compose
from medqlora.errors import ConfigError

BASE = ("train", ["experiment=quickstart"])
GROUPS = ("data", "prompt", "quant", "peft", "optimizer", "scheduler", "loss", "acceleration")
WRONG = [
    ("data.limit_test=abc", "a whole number or null"),
    ("data.limit_test=nan", "a whole number or null"),
    ("data.limit_train=1e30", "a whole number or null"),
    ("data.ignore_columns=abc", "a list"),
    ("data.share_prefix=abc", "true or false"),
    ("data.num_workers=-1", "0 or more"),
    ("data.name=5", "\"'5'\""),
    ("model.revision=1234567", "\"'1234567'\""),
    ("model.path=[1]", "text"),
    ("quant.double_quant=null", "true or false"),
    ("peft.lora_dropout=1", "0 or more and below 1"),
    ("peft.lora_alpha=-1", "above 0"),
    ("optimizer.lr=-1", "above 0"),
    ("optimizer.lr=nan", "is no number"),
    ("optimizer.lr=inf", "out of range"),
    ("trainer.max_steps=0", "no update to make"),
    ("trainer.max_epochs=0", "no update to make"),
    ("optimizer.lr=true", "a number"),
    ("optimizer.betas=[0.9]", "a list of 2"),
    ("optimizer.betas=[0.9,1.5]", "below 1"),
    ("optimizer.weight_decay=-0.1", "0 or more"),
    ("scheduler.warmup=abc", "a number"),
    ("acceleration.compile=sometimes", "none or default or cuda_graphs or auto"),
    ("trainer.max_steps=null", "a whole number"),
    ("trainer.accumulate_grad_batches=0", "1 or more"),
    ("trainer.gradient_clip_val=-1", "0 or more"),
    ("trainer.val_check_interval=0", "above 0"),
    ("callbacks.nan_guard.every_n_rows=0", "1 or more"),
    ("callbacks.progress.refresh_seconds=abc", "a number"),
    ("callbacks.checkpoints.monitor=val/acc", "val/accuracy, val/macro_accuracy, val/loss"),
    ("callbacks.checkpoints.mode=min", "the worst val/accuracy"),
    ("callbacks.early_stopping=abc", "is no callback"),
    ("+data.bar=3", "is nothing that MedMCQADataModule takes"),
    ("+data.token_bugdet=3", "Did you mean data.token_budget?"),
    ("+trainer.gradient_clip=3", "Did you mean trainer.gradient_clip_val?"),
    ("+peft.rank=3", "is nothing that LoraConfig takes"),
    ("seed=-1", "at most 4294967295"),
    ("seed=null", "a whole number"),
    ("loss._target_=medqlora.finetuning.NoLoss", "is not there"),
]


@pytest.mark.parametrize("average", instantiation.AVERAGES)
def test_averages_of_all_weights_are_refused(average):
    """They would be of packed codes, too, and not of what is written."""
    command, given = BASE
    target = f"+callbacks.ema._target_=lightning.pytorch.callbacks.{average}"
    with pytest.raises(ConfigError, match=r"^callbacks.ema would average the 4-bit codes"):
        instantiation.check(compose(command, [*given, target]))


@pytest.mark.parametrize(("override", "words"), WRONG, ids=[override for override, _ in WRONG])
def test_a_value_that_does_not_fit_is_refused_before_anything_is_read(override, words):
    command, given = BASE
    with pytest.raises(ConfigError) as caught:
        instantiation.check(compose(command, [*given, override]))
    assert override.split("=")[0].split(".")[-1] in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1",
        "optimizer.betas=[0,0.5]",
        "data.limit_train=null",
        "trainer.max_steps=-1",
        "trainer.gradient_clip_val=null",
        "trainer.val_check_interval=10",
        "peft.target_modules=all-linear",
        "peft.target_modules=[q_proj]",
        "model.revision='1234567'",
        "+peft.init_lora_weights=pissa_niter_16",
        "+peft.layer_replication=[[0,2],[1,3]]",
        "+trainer.limit_train_batches=0.5",
        "callbacks.progress=null",
        "callbacks.checkpoints.monitor=val/subject_name/Anatomy",
        "+callbacks.early_stopping={_target_: lightning.pytorch.callbacks.EarlyStopping, "
        "monitor: train/loss}",
        "seed=4294967295",
    ],
)
def test_a_value_that_fits_is_taken(override):
    command, given = BASE
    instantiation.check(compose(command, [*given, override]))


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("predict", ["run=0", "questions=q.jsonl"]),
        ("export", ["run=true"]),
        ("export", ["run=here", "output=[1]"]),
        ("report", ["runs=5"]),
        ("evaluate", ["evaluate.base=5"]),
        ("doctor", ["hub_timeout=abc"]),
        ("doctor", ["hub_timeout=-1"]),
    ],
)
def test_every_verb_refuses_what_is_no_value_of_its_own_options(verb, words, run_command):
    ended = run_command(verb, *words)
    assert ended.code == 2
    [line] = ended.errors
    assert line.startswith(f"error: {words[-1] if verb != 'predict' else words[0]}")


@functools.cache
def composed(group: str, name: str) -> DictConfig:
    return compose("train", [f"{group}={name}"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.beta2_decay", 1.0, "Give at most 0."),
        ("peft.beta1", 1.0, "Give above 0 and below 1."),
        ("peft.deltaT", 0, "Give 1 or more."),
    ],
)
def test_a_range_says_both_of_its_ends(key, value, words):
    with pytest.raises(ConfigError, match=words):
        options.check_value(key, value, float)


def option_files() -> list[tuple[str, str]]:
    return [(group, p.stem) for group in GROUPS for p in sorted((CONFIG_DIR / group).glob("*"))]


@pytest.mark.parametrize(("group", "name"), option_files())
def test_what_every_option_gives_is_declared_by_its_target(group, name):
    node = composed(group, name).get(group)
    values: Any = OmegaConf.to_container(node, resolve=True) if node else {}
    if "_target_" in values:
        target = get_object(values["_target_"])
        options.check_values(target, values, group)
        keys = {key for key in values if not key.startswith("_")}
        assert keys - set(options._hints(target)) <= {"eps"}  # handed on to bitsandbytes


def test_every_range_belongs_to_an_option_that_exists():
    files = [*option_files(), ("callbacks", "early_stopping")]
    nodes = [compose("doctor"), *(composed(group, name) for group, name in files)]
    for key in options.RANGES:
        assert any(OmegaConf.select(node, key, default=nodes) is not nodes for node in nodes), key


def takes(
    whole: int,
    number: float | None,
    text: str,
    words: Sequence[str],
    pair: tuple[float, float],
    names: set[str],
    kind: Literal["a", "b"],
    path: str | Path,
    **others: Any,
) -> None: ...


takes.__module__ = "medqlora.takes"  # of a library's words others may be meant


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("whole", 3, True),
        ("whole", 3.0, False),
        ("whole", True, False),
        ("number", 3, True),
        ("number", math.inf, True),
        ("number", None, True),
        ("text", "abc", True),
        ("text", 5, False),
        ("words", ["a"], True),
        ("words", "abc", False),
        ("words", [1], False),
        ("pair", [0.9, 0.99], True),
        ("pair", [0.9], False),
        ("names", ["a", "b"], True),
        ("names", [["a"]], False),
        ("kind", "a", True),
        ("kind", "c", False),
        ("path", "here", True),
        ("others", [1], True),
    ],
)
def test_types_are_those_that_the_target_declares(name, value, fits):
    if fits:
        options.check_values(takes, {name: value, "_partial_": True})
    else:
        with pytest.raises(ConfigError, match="does not fit"):
            options.check_values(takes, {name: value})
