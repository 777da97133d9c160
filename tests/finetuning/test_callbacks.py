"""What the callbacks count, and what they stop."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time

import pytest
import torch
from lightning import Callback
from lightning.pytorch.trainer.connectors.logger_connector import result

from medqlora.errors import TrainingError
from medqlora.finetuning import (
    GracefulStop,
    GradientGuard,
    NaNGuard,
    PeakMemory,
    ProgressBar,
    RunInterrupted,
    Throughput,
    fit,
)
from medqlora.finetuning.callbacks import check_gradients
from medqlora.schema import IGNORE
from tests.finetuning.conftest import Loader, Rows


def test_throughput_counts_questions_tokens_and_filling(make_module, make_trainer, rows):
    throughput = Throughput(warmup_steps=1)
    make_trainer(max_epochs=2, callbacks=[throughput]).fit(make_module(), Rows(rows))
    summary = throughput.summary()
    assert summary["num_steps"] == 2 * len(rows)
    assert summary["num_questions"] == 2 * sum(r.num_questions for r in rows)
    assert summary["fill_fraction"] == sum(r.num_tokens for r in rows) / (40 * len(rows))
    ratio = summary["tokens_per_second"] / summary["questions_per_second"]
    assert 4 < ratio < 12


def test_throughput_leaves_out_the_first_rows_and_validation(
    make_module, make_trainer, rows, monkeypatch
):
    """Both are made to take an hour, by the clock."""
    clock, hours = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * len(hours))

    class Slow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                hours.append("first row")

        def on_validation_batch_start(self, *args):
            hours.append("validation")

    throughput = Throughput(warmup_steps=2)
    trainer = make_trainer(
        max_epochs=2, callbacks=[Slow(), throughput], limit_val_batches=1, val_check_interval=3
    )
    trainer.fit(make_module(), Rows(rows))
    assert {*hours} == {"first row", "validation"}
    assert 0 < throughput.seconds < 3600


def test_rates_are_none_before_the_clock_starts(make_module, make_trainer, rows):
    throughput = Throughput(warmup_steps=100)
    make_trainer(max_steps=2, callbacks=[throughput]).fit(make_module(), Rows(rows))
    assert throughput.questions_per_second is None
    assert throughput.tokens_per_second is None


def test_peak_memory_is_that_of_the_process_on_the_cpu(make_module, make_trainer, rows):
    peak = PeakMemory()
    make_trainer(max_steps=1, callbacks=[peak]).fit(make_module(), Rows(rows))
    assert 0.05 < peak.peak_memory_gb < 100


@pytest.mark.parametrize("every_n_rows", [1, 3, 1000])
def test_an_infinite_loss_stops_the_run_and_names_its_questions(
    make_module, make_trainer, rows, caplog, every_n_rows
):
    """Also where the look comes later than the row, or only at the end."""
    module = make_module("nf4", "lora_r4")
    loss = module.loss

    def broken(model, batch, *args):
        total, count = loss(model, batch, *args)
        return (total * float("inf") if batch.index[0] == 20 else total), count

    module.loss = broken
    ids = [f"question-{i}" for i in range(50)]
    guard = NaNGuard(ids, every_n_rows=every_n_rows)
    with (
        caplog.at_level(logging.ERROR, logger="medqlora"),
        pytest.raises(TrainingError, match="the loss became inf at step 3") as error,
    ):
        make_trainer(max_epochs=1, callbacks=[guard]).fit(module, Loader(rows))
    assert "\n" not in str(error.value)
    assert all(f"question-{i}" in caplog.text for i in range(20, 25))
    assert "question-19" not in caplog.text


def test_nothing_is_validated_after_an_infinite_loss(make_module, make_trainer, rows):
    validated = []

    class Watch(Callback):
        def on_validation_batch_start(self, *arguments, **keywords):
            validated.append(arguments)

    module = make_module("nf4", "lora_r4")
    module.loss = lambda model, batch, rows, ids: (
        sum(p.sum() for p in model.parameters() if p.requires_grad) * float("inf"),
        torch.tensor(1),
    )
    trainer = make_trainer(
        max_epochs=1, limit_val_batches=1, callbacks=[NaNGuard(every_n_rows=1000), Watch()]
    )
    with pytest.raises(TrainingError, match=r"the loss became (inf|nan) at step 1"):
        trainer.fit(module, Rows(rows))
    assert not validated


def test_a_finite_run_passes_the_guards(make_module, make_trainer, rows):
    guards = [NaNGuard(), GradientGuard()]
    trainer = make_trainer(max_steps=3, callbacks=guards)
    trainer.fit(make_module(), Rows(rows))
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    "peft",
    [
        "lora_r4",
        "dora_r16",
        "loftq_r16",
        "adalora",
        "ia3",
        "vera",
        "oft",
        "norms",
        "prompt_tuning",
    ],
)
def test_every_method_gives_gradient_to_all_it_trains(peft, make_module, make_trainer, rows):
    trainer = make_trainer(max_steps=1, callbacks=[GradientGuard()])
    # In bfloat16, as on a GPU: peft casts what belongs to an adapter to the dtype of the base.
    trainer.fit(make_module("nf4", peft, compute_dtype="bfloat16"), Rows(rows))
    assert trainer.global_step == 1


def test_a_trainable_tensor_without_gradient_stops_the_run_by_name(make_module, make_trainer, rows):
    module = make_module("nf4", "lora_r4")
    module.model.register_parameter("stray", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(TrainingError, match=r"1 trainable.*model\.stray") as error:
        make_trainer(max_steps=1, callbacks=[GradientGuard()]).fit(module, Rows(rows))
    assert "\n" not in str(error.value)


def test_a_lora_b_whose_gradient_is_zero_stops_the_run_by_name(make_module, rows):
    """What reentrant checkpointing did to whole layers (peft issue 137)."""
    module = make_module("nf4", "lora_r4")
    module.model.train()
    module.loss(module.model, rows[0], module.letter_rows, module.letter_ids)[0].backward()
    check_gradients(module)
    name, parameter = next((n, p) for n, p in module.named_parameters() if "lora_B" in n)
    parameter.grad.zero_()
    with pytest.raises(TrainingError, match=r"layers\.0\.self_attn\.q_proj") as error:
        check_gradients(module)
    assert name.split(".lora_B")[0] in str(error.value)


def test_gradients_are_looked_at_once(make_module, make_trainer, rows):
    """Looking waits for the device."""

    class Zero(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step > 0:
                for p in pl_module.parameters():
                    p.grad = None if p.grad is None else torch.zeros_like(p.grad)

    trainer = make_trainer(max_steps=3, callbacks=[Zero(), GradientGuard()])
    trainer.fit(make_module(), Rows(rows))
    assert trainer.global_step == 3


def test_gradients_are_looked_at_behind_a_row_with_answers(make_module, make_trainer, rows):
    """A process that got none has zeros only, and the others wait for it."""
    empty = dataclasses.replace(rows[0], answer=torch.full_like(rows[0].answer, IGNORE))

    class Looked(GradientGuard):
        def on_after_backward(self, trainer, pl_module):
            super().on_after_backward(trainer, pl_module)
            found.append(self._checked)

    found: list[bool] = []
    for row in (empty, rows[0]):
        make_trainer(max_steps=1, callbacks=[Looked()]).fit(make_module(), Rows([row]))
    assert found == [False, True]


def test_a_second_signal_stops_at_once(make_module, make_trainer, rows):
    class Signals(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(RunInterrupted, match="stopped at once") as error:
            fit(
                make_trainer(max_steps=3, callbacks=[Signals(), GracefulStop()]),
                make_module(),
                Rows(rows),
            )
        assert error.value.exit_code == 130
    finally:
        signal.signal(signal.SIGINT, before)


class Keep(ProgressBar):
    """A bar that remembers what it showed, each time that it asked for it."""

    def __init__(self, refresh_seconds: float) -> None:
        super().__init__(refresh_seconds)
        self.shown: list[dict] = []

    def get_metrics(self, trainer, pl_module):
        self.shown.append(super().get_metrics(trainer, pl_module))
        return self.shown[-1]


@pytest.mark.parametrize(("seconds", "rows_shown"), [(0.0, 5), (3600.0, 2)])
def test_the_bar_shows_questions_a_second_and_the_loss(
    make_module, make_trainer, rows, seconds, rows_shown
):
    """In every row, or in the first and the last: what is read is waited for."""
    bar = Keep(refresh_seconds=seconds)
    callbacks = [bar, Throughput(warmup_steps=1)]
    trainer = make_trainer(max_epochs=1, enable_progress_bar=True, callbacks=callbacks)
    trainer.fit(make_module(), Loader((rows * 5)[:5]))
    during = [metrics for metrics in bar.shown if "train/loss" in metrics]
    assert len(during) >= rows_shown
    assert len(during) - rows_shown <= 1, "the end of the epoch shows them once more"
    assert "questions/s" in during[-1]
    assert not any("v_num" in metrics for metrics in bar.shown)


def test_the_loss_is_read_when_the_bar_is_drawn_and_not_after_every_row(
    make_module, make_trainer, rows, monkeypatch
):
    """Lightning turns what is logged for its bar into numbers after every row."""
    read = []
    monkeypatch.setattr(result, "convert_tensors_to_scalars", lambda value: read.append(value) or 0)
    callbacks = [Keep(refresh_seconds=3600.0), Throughput(warmup_steps=1)]
    trainer = make_trainer(max_epochs=1, enable_progress_bar=True, callbacks=callbacks)
    trainer.fit(make_module(), Loader((rows * 5)[:5]))
    assert trainer.global_step == 5
    assert not read


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", ["choice", "token", "explanation"])
def test_no_step_waits_for_the_device(make_module, make_trainer, rows, loss):
    """Torch raises at whatever would, from the second step to the last, and between them."""
    watched = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                torch.cuda.set_sync_debug_mode("error")
            elif trainer.global_step == 4:
                watched.append(torch.cuda.get_sync_debug_mode())
                torch.cuda.set_sync_debug_mode("default")

    module = make_module("nf4", "lora_r4", loss=loss, compute_dtype="bfloat16")
    trainer = make_trainer(
        accelerator="gpu",
        max_steps=5,
        gradient_clip_val=1.0,
        callbacks=[NaNGuard(every_n_rows=1000), Throughput(), GradientGuard(), Watch()],
    )
    try:
        trainer.fit(module, Loader([row.pin_memory() for row in rows]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 5
    assert watched == [2]
