"""The search for the longest row that fits."""

from __future__ import annotations

import json

import pytest
import torch

from medqlora import budget, instantiation, pipeline
from medqlora.acceleration.memory import KNOWN_SHAPES, estimate_training_memory
from medqlora.budget import largest_that_fits, random_row, with_token_budget
from medqlora.config import compose
from medqlora.errors import ConfigError


def device_of(limit):
    def trial(tokens):
        tried.append(tokens)
        if tokens > limit:
            raise torch.OutOfMemoryError("out of memory")

    tried: list[int] = []
    return trial, tried


def test_the_largest_row_that_fits_is_found_and_nothing_beyond_the_first_failure_is_tried():
    trial, tried = device_of(3000)
    assert largest_that_fits(trial, (512, 1024, 2048, 4096, 8192)) == 2048
    assert tried == [512, 1024, 2048, 4096]


@pytest.mark.parametrize(
    ("limit", "first", "expected"),
    [
        (3000, 2048, [2048, 4096]),
        (3000, 1024, [1024, 2048, 4096]),
        (3000, 8192, [8192, 4096, 2048]),
        (9000, 8192, [8192]),
        (600, 1024, [1024, 512]),
    ],
)
def test_the_search_begins_where_the_answer_is_expected(limit, first, expected):
    trial, tried = device_of(limit)
    found = largest_that_fits(trial, (512, 1024, 2048, 4096, 8192), first)
    assert found == max(b for b in (512, 1024, 2048, 4096, 8192) if b <= limit)
    assert tried == expected


class Gpu:
    """What torch says of a GPU, with its memory in GB."""

    def __init__(self, gb):
        self.total_memory = gb * 1e9
        self.name = "made up"


@pytest.fixture
def gpu_of(monkeypatch):
    def make(gb):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Gpu(gb))
        for module in (pipeline, instantiation):
            monkeypatch.setattr(module, "device_of", lambda cfg: torch.device("cuda"))
        monkeypatch.setattr(instantiation, "check", lambda cfg: None)

    return make


def test_rows_that_cannot_fit_are_refused_before_anything_is_loaded(gpu_of, caplog):
    cfg = compose("train", ["model.path=/nowhere", "data.token_budget=16384"])
    gpu_of(24)
    message = r"41 GB.*has 24 GB\. Set data\.token_budget=4096 or acceleration\.gradient_checkp"
    with pytest.raises(ConfigError, match=message):
        with_token_budget(cfg)
    gpu_of(80)
    with caplog.at_level("INFO", logger="medqlora"):
        assert with_token_budget(cfg) is cfg
    assert "about 40.9 GB of the 80.0 GB" in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["peft=lora_r4"], {"r": 4}),
        (["peft=lora_r4", "~peft.r"], {"r": 8}),
        (["peft=dora_r16"], {}),
        (["peft=adalora"], {"r": 24}),
        (["peft=vera"], {"r": 1}),
        (["peft=vera", "peft.vera_dropout=0.1"], {"r": 1, "token_dropout": True}),
        (["peft=ia3"], {"r": 0, "targets": ()}),
        (["peft=norms"], {"r": 0, "targets": ()}),
        (["peft=none"], {"r": 0, "targets": ()}),
        (["peft=lora_attention"], {"targets": ("q_proj", "v_proj")}),
        (["peft=oft"], {"r": 0, "targets": (), "fused": False}),
        (["quant=none", "peft=full"], {"trains_base": True, "fused": False}),
        (
            ["quant=none", "peft=full", "optimizer=adamw"],
            {"trains_base": True, "fused": False, "optimizer_bytes": 8},
        ),
        (["optimizer=adafactor"], {"optimizer_bytes": 0}),
        (["quant=none"], {"weight_bits": 16}),
        (["quant=int8"], {"weight_bits": 8 + 16 / 2048, "fused": False}),
        (["quant=nf4_full"], {"embedding_bits": 4.127}),
        (["acceleration.fused=off"], {"fused": False}),
    ],
)
def test_the_estimate_is_that_of_the_adapter_and_the_storage(gpu_of, options, expected):
    """Peaks that were measured for most of them stand in `acceleration/test_memory.py`."""
    gpu_of(80)
    cfg = compose("train", ["model.path=/nowhere", *options])
    peak = budget.estimated_peak(cfg, 2048)
    estimate = estimate_training_memory(KNOWN_SHAPES["gemma-2b"], token_budget=2048, **expected)
    assert peak == pytest.approx(estimate.total_gb, rel=2e-3)


@pytest.mark.parametrize(("gb", "tokens"), [(80, 65_536), (8, 65_536), (0.1, 2048)])
def test_rows_of_scoring_may_be_as_long_as_the_gpu_holds(gpu_of, monkeypatch, gb, tokens):
    """The bundled model is narrow: a row of 2,048 tokens of it takes 4 MB."""
    cfg = compose("train", ["experiment=quickstart", "data.eval_token_budget=auto"])
    gpu_of(gb)
    assert pipeline.build_datamodule(cfg).most_eval_tokens == tokens
    # What does not say how wide it is counts as the widest.
    monkeypatch.setattr(pipeline, "_model_config", lambda cfg: {"model_type": "gpt2", "n_embd": 9})
    assert pipeline.build_datamodule(cfg).most_eval_tokens <= tokens
    cfg.data.eval_token_budget = None
    assert pipeline.build_datamodule(cfg).most_eval_tokens == cfg.data.token_budget


def test_auto_tries_first_what_should_fit(gpu_of, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDQLORA_CACHE", str(tmp_path))
    trial, tried = device_of(16_384)
    monkeypatch.setattr(budget, "_Trial", lambda cfg: trial)
    monkeypatch.setattr(budget, "_key", lambda cfg: "key")
    gpu_of(80)
    cfg = compose("train", ["model.path=/nowhere", "data.token_budget=auto"])
    assert with_token_budget(cfg).data.token_budget == 16_384
    assert tried == [16_384, 32_768]


def test_a_device_on_which_nothing_fits_is_told_what_to_do():
    with pytest.raises(ConfigError, match="gradient_checkpointing=true"):
        largest_that_fits(device_of(0)[0], (512,))


def test_another_failure_than_memory_is_no_answer():
    def broken(tokens):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits(broken, (512,))


@pytest.mark.parametrize("tokens", [512, 2048])
def test_the_row_that_is_tried_is_full_and_of_fixed_shape(tokens):
    row = random_row(tokens, 100)
    assert row.input_ids.shape == (tokens,)
    assert int(row.cu_seqlens[-1]) == row.num_tokens == tokens
    assert int((row.answer >= 0).sum()) == row.num_questions


def test_auto_becomes_a_number_that_is_remembered(monkeypatch, tmp_path, caplog):
    """A real forward, backward and optimiser step, once; the second time the file answers."""
    monkeypatch.setenv("MEDQLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(budget, "BUDGETS", (512, 1024))
    options = ["acceleration.num_threads=1", "data.token_budget=auto"]
    cfg = compose("train", ["experiment=quickstart", *options])
    with caplog.at_level("INFO", logger="medqlora"):
        assert with_token_budget(cfg).data.token_budget == 1024
        assert list(json.loads((tmp_path / "token_budgets.json").read_text()).values()) == [1024]
        monkeypatch.setattr(budget, "_Trial", None)
        assert with_token_budget(cfg).data.token_budget == 1024
    assert "found on this device before" in caplog.text
    assert cfg.data.token_budget == "auto"


def test_the_trial_needs_no_solved_questions(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDQLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(budget, "BUDGETS", (1024,))
    options = ["acceleration.num_threads=1", "data.token_budget=auto", "prompt=few_shot"]
    cfg = compose("train", ["experiment=quickstart", *options])
    assert with_token_budget(cfg).data.token_budget == 1024


def test_a_given_number_stays(tmp_path):
    cfg = compose("train", ["experiment=quickstart"])
    assert with_token_budget(cfg) is cfg
