"""A run that does not fit the device goes on with shorter rows, and says what it did."""

from __future__ import annotations

import json

import pytest
import torch

from medqlora.config import compose
from medqlora.errors import TrainingError
from medqlora.finetuning import MCQAModule
from medqlora.train import train


@pytest.fixture
def options(tiny_options) -> list[str]:
    return [
        *tiny_options,
        "quant=nf4_fp32",
        "peft=lora_r4",
        "optimizer=adamw",
        "trainer.val_check_interval=4",
    ]


@pytest.fixture
def device_of(monkeypatch):
    """`device_of(tokens)` makes the CPU a device whose memory holds rows of so many tokens."""
    rows: list[int] = []

    def make(tokens: int, after: int = 0) -> list[int]:
        step = MCQAModule.training_step

        def training_step(self: MCQAModule, batch, batch_idx: int):
            rows.append(batch.input_ids.shape[0])
            if rows[-1] > tokens and len(rows) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return step(self, batch, batch_idx)

        monkeypatch.setattr(MCQAModule, "training_step", training_step)
        return rows

    return make


@pytest.mark.parametrize("scoring", ["null", "auto"])
def test_out_of_memory_halves_the_rows_and_keeps_the_tokens_of_an_update(
    options, device_of, tmp_path, caplog, scoring
):
    """After five rows of the first length, so that a checkpoint and a validation lie behind."""
    rows = device_of(256, after=5)
    run_dir = tmp_path / "run"
    options = [*options, f"data.eval_token_budget={scoring}"]
    train(compose("train", [*options, "callbacks.checkpoints.every_n_steps=1"]), run_dir)
    assert set(rows[:6]) == {512}
    assert set(rows[6:]) == {256}
    told = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert any("data.token_budget=256" in line for line in told), told
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["status"] == "completed"
    assert metrics["train"]["token_budget"] == 256
    assert metrics["data"]["eval_token_budget"] <= 256, (
        "what is short of memory scores as it trains"
    )
    assert metrics["train"]["accumulate_grad_batches"] == 2
    assert metrics["train"]["num_questions"] == 64, "each question once, none of the first try"
    assert metrics["train"]["num_steps"] == -(-len(rows[6:]) // 2)


def test_a_run_that_was_out_of_memory_resumes_with_the_rows_it_had(
    options, device_of, tmp_path, monkeypatch
):
    options = [*options, "resume=auto", "callbacks.checkpoints.every_n_steps=1"]
    rows = device_of(256)
    run_dir = tmp_path / "day" / "time"
    with monkeypatch.context() as broken:
        broken.setattr("medqlora.train.save_adapter", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(compose("train", options), run_dir)
    assert rows[0] == 512
    rows.clear()
    train(compose("train", options), run_dir)
    assert 512 not in rows, "the first try is not made again"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["status"] == "completed"
    assert metrics["train"]["token_budget"] == 256
    assert metrics["train"]["num_questions"] == 64


def test_rows_that_cannot_hold_the_longest_question_are_refused_in_one_line(
    options, device_of, tmp_path
):
    device_of(8)
    with pytest.raises(TrainingError, match=r"longest question \(\d+ tokens\)") as error:
        train(compose("train", options), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert "acceleration.gradient_checkpointing=true" in str(error.value)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "failed"
    assert metrics["error"] == str(error.value)
