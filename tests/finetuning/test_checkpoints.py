"""Checkpoints are small, whole or absent, safe to read, and resume to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from lightning import Callback

from medqlora.errors import CheckpointError, ConfigError, TrainingError
from medqlora.finetuning import (
    AtomicCheckpointIO,
    GracefulStop,
    NaNGuard,
    RunCheckpoints,
    RunInterrupted,
    Throughput,
    find_resumable,
    fit,
    load_trained_weights,
    read_checkpoint,
)
from tests.finetuning.conftest import Rows

IDENTITY = {"model.revision": "abc", "quant": "nf4", "config_hash": "0123"}
EPOCHS = 3


class Killed(Exception):
    """Stands for a run that ends without warning."""


class KillAfter(Callback):
    """Ends the run after so many rows, before anything else hears of the row."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.rows == 0:
            raise Killed
        self.rows -= 1


@pytest.fixture
def run(make_module, make_trainer, rows, tmp_path):
    """Train in `folder`, resuming from what is there."""

    def train(folder: str, *callbacks: Callback, **options):
        module = make_module(
            "nf4",
            options.pop("peft", "lora_r16"),
            optimizer=options.pop("optimizer", "paged_adamw_8bit"),
            steps=12,
            overrides=options.pop("overrides", ("peft.lora_dropout=0.2",)),
            seed=1,
        )
        directory = tmp_path / folder
        checkpoints = RunCheckpoints(
            directory,
            every_n_minutes=options.pop("every_n_minutes", 2.0),
            every_n_steps=options.pop("every_n_steps", 2),
            identity=IDENTITY,
        )
        resume = find_resumable(directory, IDENTITY)
        defaults = {"max_epochs": EPOCHS, "limit_val_batches": 2, "gradient_clip_val": 1.0}
        trainer = make_trainer(
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            callbacks=[*callbacks, Throughput(), checkpoints],
            **(defaults | options),
        )
        # Another state of the generators than that of the interrupted run.
        torch.manual_seed(os.getpid() if resume else 1)
        fit(trainer, module, Rows(rows), ckpt_path=None if resume is None else str(resume))
        return module, trainer, checkpoints

    return train


def everything(module, trainer):
    """Adapter, optimiser, schedule and step as one comparable list."""
    state = [(n, p.detach()) for n, p in module.model.named_parameters() if p.requires_grad]
    for number, values in trainer.optimizers[0].state_dict()["state"].items():
        nested = values.get("__bnb_optimizer_quant_state__", {})
        state += [(f"{number}.{k}", v) for k, v in {**values, **nested}.items() if k[0] != "_"]
    return [*state, ("lr", trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])]


def assert_same(first, second):
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, a), (_, b) in zip(first, second, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("killed_after", [1, 3, 4, 5, 7, 10, 14])
def test_a_killed_run_resumes_to_the_same_bits(run, killed_after, accumulate):
    """Within an epoch, at its end, in mid-window, before any checkpoint; with dropout."""
    options = {"accumulate_grad_batches": accumulate}
    module, trainer, checkpoints = run("whole", **options)
    with pytest.raises(Killed):
        run("killed", KillAfter(killed_after), **options)
    again, resumed, resumed_checkpoints = run("killed", **options)
    assert resumed.global_step == trainer.global_step
    assert_same(everything(again, resumed), everything(module, trainer))
    assert resumed_checkpoints.best_score == checkpoints.best_score
    assert resumed_checkpoints.best_step == checkpoints.best_step


@pytest.mark.parametrize(
    ("peft", "optimizer"),
    [("adalora", "adamw"), ("dora_r16", "lion_8bit"), ("vera", "adafactor"), ("lora_r4", "muon")],
)
def test_other_methods_resume_to_the_same_bits(run, peft, optimizer):
    options = {"peft": peft, "optimizer": optimizer, "overrides": ()}
    module, trainer, _ = run("whole", **options)
    with pytest.raises(Killed):
        run("killed", KillAfter(8), **options)
    again, resumed, _ = run("killed", **options)
    assert_same(everything(again, resumed), everything(module, trainer))


def test_validation_in_mid_epoch_does_not_change_the_run(run):
    """Neither what it draws from the generators nor where it stands in a window."""
    module, trainer, _ = run("plain", limit_val_batches=0)
    other, validated, _ = run("validated", val_check_interval=2)
    assert_same(everything(other, validated), everything(module, trainer))
    with pytest.raises(Killed):
        run("killed", KillAfter(9), val_check_interval=2)
    again, resumed, _ = run("killed", val_check_interval=2)
    assert_same(everything(again, resumed), everything(module, trainer))


def test_a_resumed_run_counts_questions_once(run, rows):
    """As a run that was never stopped: rows done again after the last checkpoint count once."""
    with pytest.raises(Killed):
        run("killed", KillAfter(8))
    _, trainer, _ = run("killed")
    throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
    assert throughput.num_questions == EPOCHS * sum(r.num_questions for r in rows)


@pytest.mark.parametrize(
    ("minutes", "saved"), [(None, [5]), (2.0, [2, 4, 5]), (0.5, [1, 2, 3, 4, 5])]
)
def test_it_saves_by_the_clock(run, monkeypatch, minutes, saved):
    """A row takes a minute here; at the end of the epoch it saves in any case."""
    clock, steps = [0.0], []

    class Minute(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clock[0] += 60

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        steps.append(checkpoint["global_step"])

    monkeypatch.setattr("medqlora.finetuning.checkpoints.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_checkpoint)
    options = {"every_n_steps": None, "every_n_minutes": minutes}
    run("timed", Minute(), max_epochs=1, limit_val_batches=0, **options)
    assert steps == saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_the_exit_code_of_a_shell(run, number):
    class Signal(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                os.kill(os.getpid(), number)

    before, stop = signal.getsignal(number), GracefulStop()
    with pytest.raises(RunInterrupted) as error:
        run("stopped", Signal(), stop, every_n_steps=100)
    assert stop.received == number
    assert error.value.exit_code == 128 + number
    assert isinstance(error.value, KeyboardInterrupt)
    assert signal.getsignal(number) == before


def test_a_signal_in_mid_window_saves_after_the_update_and_loses_nothing(
    run, tmp_path, make_module, make_trainer, rows
):
    class Signal(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4 and batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    module, trainer, _ = run("whole", accumulate_grad_batches=2)
    checkpoints = RunCheckpoints(tmp_path / "stopped", every_n_steps=100, identity=IDENTITY)
    stopped = make_module(
        "nf4",
        "lora_r16",
        optimizer="paged_adamw_8bit",
        steps=12,
        overrides=("peft.lora_dropout=0.2",),
        seed=1,
    )
    torch.manual_seed(1)
    with pytest.raises(RunInterrupted, match="state saved at step 5"):
        fit(
            make_trainer(
                max_epochs=EPOCHS,
                limit_val_batches=2,
                gradient_clip_val=1.0,
                accumulate_grad_batches=2,
                enable_checkpointing=True,
                plugins=[AtomicCheckpointIO()],
                callbacks=[Signal(), Throughput(), checkpoints, GracefulStop(checkpoints)],
            ),
            stopped,
            Rows(rows),
        )
    assert (tmp_path / "stopped" / "last.ckpt").exists()
    again, resumed, _ = run("stopped", accumulate_grad_batches=2)
    assert_same(everything(again, resumed), everything(module, trainer))


@pytest.mark.parametrize("limit_val_batches", [0, 2])
@pytest.mark.parametrize("step", [4, 5, 10, 15])
def test_a_signal_in_the_last_update_of_an_epoch_loses_nothing(run, step, limit_val_batches):
    """The validation behind it belongs to the state that is saved; five updates an epoch."""

    class Stop(GracefulStop):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            [self.checkpoints] = [c for c in trainer.callbacks if isinstance(c, RunCheckpoints)]
            if trainer.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"limit_val_batches": limit_val_batches, "every_n_steps": 100}
    module, trainer, checkpoints = run("whole", **options)
    with pytest.raises(RunInterrupted, match="state saved at step"):
        run("stopped", Stop(), **options)
    again, resumed, resumed_checkpoints = run("stopped", **options)
    assert resumed.global_step == trainer.global_step == 15
    assert_same(everything(again, resumed), everything(module, trainer))
    assert resumed_checkpoints.best_score == checkpoints.best_score
    assert resumed_checkpoints.best_step == checkpoints.best_step


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_loses_nothing(run, tmp_path):
    with pytest.raises(Killed):
        run("killed", KillAfter(10), every_n_steps=1)
    folder = tmp_path / "killed"
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt", "last.prev.ckpt"]
    last, previous = (read_checkpoint(folder / n) for n in ("last.ckpt", "last.prev.ckpt"))
    assert last["global_step"] == previous["global_step"] + 1
    assert find_resumable(folder) == folder / "last.ckpt"
    content = bytearray((folder / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "last.ckpt").write_bytes(content)
    assert find_resumable(folder) == folder / "last.prev.ckpt"
    module, trainer, _ = run("whole")
    again, resumed, _ = run("killed")
    assert_same(everything(again, resumed), everything(module, trainer))


@pytest.mark.parametrize("links", [True, False])
def test_the_last_checkpoint_is_there_at_every_moment(tmp_path, monkeypatch, links):
    """Without hard links, its name is gone for a moment: the one before it is there then."""
    io, last, previous = AtomicCheckpointIO(), tmp_path / "last.ckpt", tmp_path / "last.prev.ckpt"
    replace = os.replace

    def watched(source, target):
        replace(source, target)
        assert last.exists() or (not links and previous.exists())

    def no_links(source, target):
        raise OSError("this file system has no links")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    io.save_checkpoint({"state_dict": {}, "global_step": 1}, last)
    monkeypatch.setattr("os.replace", watched)
    for step in (2, 3):
        io.save_checkpoint({"state_dict": {}, "global_step": step}, last)
        assert read_checkpoint(last)["global_step"] == step
        assert read_checkpoint(previous)["global_step"] == step - 1
        assert sorted(tmp_path.iterdir()) == [last, previous]
    if links:  # killed between the two renames: both names are of one file
        previous.unlink()
        os.link(last, previous)
        io.save_checkpoint({"state_dict": {}, "global_step": 4}, last)
        assert read_checkpoint(previous)["global_step"] == 3
        assert sorted(tmp_path.iterdir()) == [last, previous]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "text"])
def test_a_damaged_checkpoint_is_told_in_one_line(run, tmp_path, damage):
    run("run", max_epochs=1)
    path = tmp_path / "run" / "last.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    new = {
        "flipped": bytes(content),
        "truncated": path.read_bytes()[:-500],
        "empty": b"",
        "text": b"checkpoint",
    }
    path.write_bytes(new[damage])
    with pytest.raises(CheckpointError, match="is damaged") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    (tmp_path / "run" / "last.prev.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        find_resumable(tmp_path / "run")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    torch.save({"state_dict": {}, "x": Malicious()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="would run code") as error:
        read_checkpoint(tmp_path / "last.ckpt")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="would run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps({"state_dict": {}, "x": Malicious()}))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "raw.ckpt")
    assert not marker.exists()


def test_a_missing_checkpoint_is_told(tmp_path):
    assert find_resumable(tmp_path) is None
    with pytest.raises(CheckpointError, match="nothing to resume"):
        read_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("key", IDENTITY)
def test_a_checkpoint_on_another_base_is_refused(run, tmp_path, key):
    run("run", max_epochs=1)
    other = IDENTITY | {key: "other"}
    with pytest.raises(CheckpointError, match=f"{key}={IDENTITY[key]}, this run has {key}=other"):
        find_resumable(tmp_path / "run", other)
    with pytest.raises(CheckpointError, match="this run has"):
        read_checkpoint(tmp_path / "run" / "last.ckpt", other)


def test_a_checkpoint_of_another_rank_does_not_load(run, tmp_path):
    run("run", max_epochs=1)
    with pytest.raises(CheckpointError, match="weights differ"):
        run("run", peft="lora_r8")


def test_the_best_checkpoint_is_that_of_the_best_validation(run, tmp_path):
    seen = []

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module):
            value = trainer.callback_metrics["val/accuracy"].item()
            state = {n: p.detach().clone() for n, p in pl_module.model.named_parameters()}
            seen.append((value, {n: p for n, p in state.items() if "lora_" in n}))

    module, _, checkpoints = run("run", Watch())
    assert len(seen) == EPOCHS
    best, state = max(seen, key=lambda pair: pair[0])
    assert checkpoints.best_score == pytest.approx(best)
    load_trained_weights(module.model, checkpoints.best_path)
    for name, parameter in module.model.named_parameters():
        if name in state:
            assert torch.equal(parameter, state[name])


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [("weight", "the loss became nan"), ("gradient", "tensors are not finite")],
)
def test_no_checkpoint_is_written_of_a_run_that_is_not_finite(run, tmp_path, spoilt, says):
    class Poison(Callback):
        def poison(self, trainer, pl_module, what):
            if trainer.global_step == 6 and what == spoilt:
                lora = next(p for n, p in pl_module.named_parameters() if "lora" in n)
                with torch.no_grad():
                    (lora if what == "weight" else lora.grad)[:] = float("nan")

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.poison(trainer, pl_module, "weight")

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.poison(trainer, pl_module, "gradient")

    with pytest.raises(TrainingError, match=says) as error:
        run("run", Poison(), NaNGuard(every_n_rows=1000), every_n_steps=1)
    assert "\n" not in str(error.value)
    for name in ("last.ckpt", "last.prev.ckpt"):
        state = read_checkpoint(tmp_path / "run" / name)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(1)}}, path)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(1)}}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(path)["state_dict"]["a"] == 1


def write_without_end(path: Path, told: Connection) -> None:
    io, n = AtomicCheckpointIO(), 0
    while True:
        io.save_checkpoint({"state_dict": {"n": torch.full((20000,), n)}}, path)
        n += 1
        told.send(n)


def test_a_kill_while_writing_leaves_a_checkpoint(tmp_path):
    """A process that writes without end is killed at some moment; one of the two files is whole."""
    path = tmp_path / "run" / "last.ckpt"
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=write_without_end, args=(path, there))
    process.start()
    try:
        for _ in range(7):
            assert here.poll(60)
            done = here.recv()
    finally:
        process.kill()
        process.join()
    found = find_resumable(path.parent)
    assert found is not None
    assert read_checkpoint(found)["state_dict"]["n"][0] >= done - 2


def test_a_file_of_tensors_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="holds no training state"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_weights_of_another_adapter_are_refused_with_one_of_them(run, make_module, tmp_path):
    _, _, checkpoints = run("run", max_epochs=1)
    other = make_module("nf4", "lora_r4")
    before = {n: p.detach().clone() for n, p in other.model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"weights differ, such as .*lora_A"):
        load_trained_weights(other.model, checkpoints.last_path)
    assert all(torch.equal(p, before[n]) for n, p in other.model.named_parameters())


def test_options_without_effect_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="saves never"):
        RunCheckpoints(tmp_path, every_n_steps=0)
    with pytest.raises(ConfigError, match="do nothing but save"):
        RunCheckpoints(tmp_path, every_n_minutes=0)
    with pytest.raises(ConfigError, match="is not known"):
        RunCheckpoints(tmp_path, mode="highest")


def test_a_rank_16_checkpoint_of_the_full_size_is_below_250_mb(run, tmp_path):
    """Bytes a trained number, measured here with float32 AdamW, times those of Gemma-2B."""
    module, _, _ = run("run", max_epochs=1, peft="lora_r64", optimizer="adamw", overrides=())
    overhead = 60_000  # RNG, loops and names do not grow with the model's width
    size = (tmp_path / "run" / "last.ckpt").stat().st_size - overhead
    full_size = 18 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 16384))
    assert full_size == 19_611_648
    assert size / module.num_trainable * full_size < 250e6
