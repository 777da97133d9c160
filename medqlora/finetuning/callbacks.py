"""What watches a run: speed, memory, guards against silent failure, a graceful end."""

from __future__ import annotations

import logging
import math
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import psutil
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from medqlora import processes
from medqlora.acceleration import one_stream
from medqlora.errors import RunPruned, TrainingError, is_out_of_memory
from medqlora.finetuning.checkpoints import RunCheckpoints, between_updates, validates_now
from medqlora.finetuning.memory import OutOfMemory
from medqlora.schema import PackedBatch

log = logging.getLogger(__name__)


class Throughput(Callback):
    """Questions and tokens a second of training, without waiting for the device in between.

    The clock stops during validation and starts after `warmup_steps` rows, which hold compilation.
    It waits for the device only where it starts and stops, and to log. Of several processes each
    counts its own rows; their sum is taken when a checkpoint is written and at the end.

    Args:
        warmup_steps: Rows left out at the start.

    Attributes:
        first_step_seconds: How long the first row took, compilation included; None before its end.
    """

    _COUNTS: ClassVar = {
        "num_questions": "num_questions",
        "num_tokens": "num_tokens",
        "num_places": "num_places",
        "timed_questions": "_timed_questions",
        "timed_tokens": "_timed_tokens",
    }

    def __init__(self, warmup_steps: int = 3) -> None:
        self.warmup_steps = warmup_steps
        self.num_questions = 0
        self.num_tokens = 0
        self.num_places = 0
        self._rows = 0
        self._timed_questions = 0
        self._timed_tokens = 0
        self._seconds = 0.0
        self._started: float | None = None
        self._num_steps = 0
        self._first_row_started = 0.0
        self.first_step_seconds: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rows of this process are counted from here."""
        self._rows = 0
        self._started = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Start the clock once the first rows are done."""
        if self._rows == 0:
            self._first_row_started = time.perf_counter()
        if self._started is None and self._rows >= self.warmup_steps:
            self._start(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
    ) -> None:
        """Count a row; log the rates at Lightning's interval."""
        self._rows += 1
        if self._rows == 1:
            self._say_first_step(pl_module)
        self._num_steps = trainer.global_step
        self.num_questions += batch.num_questions
        self.num_tokens += batch.num_tokens
        self.num_places += batch.input_ids.shape[0]
        if self._started is not None:
            self._timed_questions += batch.num_questions
            self._timed_tokens += batch.num_tokens
            # Each value logged is a copy to the device, which waits for it: no more than are read.
            if between_updates(trainer) and trainer._logger_connector.should_update_logs:
                _wait(pl_module)  # before the clock is read: rows are launched ahead of it
                for name in ("questions_per_second", "tokens_per_second"):
                    rate = (getattr(self, name) or 0.0) * trainer.world_size
                    pl_module.log(f"train/{name}", rate, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and count what all processes did."""
        self._stop(pl_module)
        self._set_counts(self._summed())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the clock without asking a device that may have failed."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    @property
    def seconds(self) -> float:
        """Seconds on the clock."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    @property
    def questions_per_second(self) -> float | None:
        """Questions trained on a second; None before the clock started."""
        return self._timed_questions / self.seconds if self._timed_questions else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of those questions a second, padding not counted."""
        return self._timed_tokens / self.seconds if self._timed_tokens else None

    @property
    def fill_fraction(self) -> float | None:
        """Share of the row places that held a token."""
        return self.num_tokens / self.num_places if self.num_places else None

    def summary(self) -> dict[str, float | int | None]:
        """The numbers of `train` in metrics.json that this callback knows."""
        return {
            "num_steps": self._num_steps,
            "num_questions": self.num_questions,
            "questions_per_second": self.questions_per_second,
            "tokens_per_second": self.tokens_per_second,
            "fill_fraction": self.fill_fraction,
            "first_step_seconds": self.first_step_seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts and seconds, so that a resumed run reports the whole of it."""
        return {**self._summed(), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the counts of the earlier part, which the first process takes over."""
        self._set_counts(dict.fromkeys(state_dict, 0) if processes.rank() else state_dict)
        self._seconds = state_dict["seconds"]

    def _summed(self) -> dict[str, int]:
        counts = {name: getattr(self, attribute) for name, attribute in self._COUNTS.items()}
        everywhere = processes.gathered(counts)
        return {name: sum(counts[name] for counts in everywhere) for name in counts}

    def _set_counts(self, counts: Mapping[str, Any]) -> None:
        for name, attribute in self._COUNTS.items():
            setattr(self, attribute, counts[name])

    def _say_first_step(self, pl_module: LightningModule) -> None:
        _wait(pl_module)
        self.first_step_seconds = time.perf_counter() - self._first_row_started
        log.info(
            "first step after %.1f s, compilation included; %.1f s since the process started",
            self.first_step_seconds,
            max(0.0, time.time() - psutil.Process().create_time()),  # somebody may set the clock
        )

    def _start(self, pl_module: LightningModule) -> None:
        _wait(pl_module)
        self._started = time.perf_counter()

    def _stop(self, pl_module: LightningModule) -> None:
        if self._started is not None:
            _wait(pl_module)
            self._seconds += time.perf_counter() - self._started
            self._started = None


class PeakMemory(Callback):
    """The most memory that training held: allocated on the GPU, or resident in main memory.

    Of several processes, that of the one that held most.
    """

    def __init__(self) -> None:
        self.peak_memory_gb: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what loading took."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read it before validation can raise it."""
        self._read(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read it at the end."""
        self._read(trainer, pl_module)
        self.peak_memory_gb = max(processes.gathered(self.peak_memory_gb or 0.0))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Read it when the run fails."""
        self._read(trainer, pl_module)

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.peak_memory_gb = max(self.peak_memory_gb or 0.0, peak_memory_gb(pl_module.device))


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB of 10^9 bytes: torch's allocator on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class NaNGuard(Callback):
    """Stops a run whose loss is infinite or NaN and names the questions of the row.

    Losses are looked at every `every_n_rows` rows and before every validation and checkpoint, in
    one transfer, so that no step waits for the device and nothing is scored or written after the
    failure.

    Args:
        question_ids: Identifier of each training question by its row number.
        every_n_rows: Rows between two looks.
    """

    def __init__(self, question_ids: Sequence[str] = (), every_n_rows: int = 50) -> None:
        self.question_ids = question_ids
        self.every_n_rows = every_n_rows
        self._recent: list[tuple[int, Tensor, Tensor]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
    ) -> None:
        """Remember the loss and the row, on the device."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._recent.append((trainer.global_step, loss.detach(), batch.index))
        if len(self._recent) >= self.every_n_rows:
            self.check()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing is saved after a bad row, nor weights that a bad gradient has spoilt.

        Raises:
            TrainingError: If a loss or a trained weight is not finite.
        """
        self.check()
        trained = {n for n, p in pl_module.named_parameters() if p.requires_grad and p.numel()}
        state = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        if not state:
            return
        # Lightning hands the weights over on whichever device they are saved from.
        finite = torch.stack([t.isfinite().all().to(pl_module.device) for t in state.values()])
        finite = finite.tolist()
        if not all(finite):
            name = list(state)[finite.index(False)]
            raise TrainingError(
                f"{finite.count(False)} trained tensors are not finite at step "
                f"{trainer.global_step}, such as {name}, though the loss still was; the last good "
                "checkpoint, if there was one, is kept. Lower optimizer.lr or "
                "trainer.gradient_clip_val."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the rows before it."""
        self.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last rows."""
        self.check()

    def check(self) -> None:
        """Look at the rows since the last look.

        Raises:
            TrainingError: If a loss was not finite.
        """
        recent, self._recent = self._recent, []
        # A bad row of one process spoils the weights of all, so the earliest is the cause.
        found = [row for row in processes.gathered(self._first_bad(recent)) if row is not None]
        if not found:
            return
        step, loss, ids = min(found)
        log.error("the loss was %s at step %d on the questions %s", loss, step, ", ".join(ids))
        raise TrainingError(
            f"the loss became {loss} at step {step}, on a row of {len(ids)} questions from "
            f"{ids[0]} to {ids[-1]} (all in train.log); the last good checkpoint, if there "
            "was one, is kept. Lower optimizer.lr or trainer.gradient_clip_val, or audit the data: "
            "python -m medqlora.audit."
        )

    def _first_bad(
        self, recent: list[tuple[int, Tensor, Tensor]]
    ) -> tuple[int, str, list[str]] | None:
        if not recent:
            return None
        finite = torch.stack([loss for _, loss, _ in recent]).isfinite().tolist()
        if all(finite):
            return None
        step, loss, index = recent[finite.index(False)]
        return step, str(loss.item()), [self._name(i) for i in index.tolist() if i >= 0]

    def _name(self, index: int) -> str:
        return self.question_ids[index] if index < len(self.question_ids) else str(index)


class GradientGuard(Callback):
    """Stops a run in its first step if a trainable tensor receives no gradient.

    A tensor counts as reached if its gradient exists; of the tensors of one adapted module at least
    one must be other than zero (at the start only `lora_B` is: `lora_A` is multiplied by its
    zeros).
    """

    def __init__(self) -> None:
        self._checked = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again in every fit, also after a resume."""
        self._checked = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once, behind the first row with answers.

        Raises:
            TrainingError: If a tensor was not reached.
        """
        if not self._checked and int(getattr(pl_module, "window_count", 1)):
            self._checked = True
            check_gradients(pl_module)


def check_gradients(module: torch.nn.Module) -> None:
    """Refuse a model whose backward pass did not reach every trainable tensor.

    Args:
        module: A model after its first backward pass.

    Raises:
        TrainingError: If a trainable tensor has no gradient, or a whole adapted module has zeros
            only.
    """
    trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad and p.numel()]
    unreached = [name for name, p in trainable if p.grad is None]
    if not unreached:
        groups: dict[str, list[Tensor]] = {}
        for name, p in trainable:
            assert p.grad is not None
            groups.setdefault(_adapted_module(name), []).append(p.grad.abs().sum())
        names = list(groups)
        reached = torch.stack([torch.stack(sums).sum() for sums in groups.values()]).ne(0).tolist()
        unreached = [name for name, ok in zip(names, reached, strict=True) if not ok]
    if unreached:
        shown = ", ".join(unreached[:4]) + (", ..." if len(unreached) > 4 else "")
        log.error("no gradient reached %s", ", ".join(unreached))
        raise TrainingError(
            f"{len(unreached)} trainable tensors or modules received no gradient in the first "
            f"step: {shown} (all in train.log). They would stay as they are; check "
            "peft.target_modules."
        )


def _adapted_module(name: str) -> str:
    return re.split(r"\.(?:lora|vera|ia3|oft|ln_tuning|hira|road|randlora)_", name)[0]


class RunInterrupted(KeyboardInterrupt):
    """A run that was asked to stop, after it saved its state.

    Attributes:
        exit_code: 128 + the number of the signal, as a shell reports it.
    """

    def __init__(self, signal_number: int, detail: str) -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}: {detail}")


class _StopNow(Exception):
    """Leaves Lightning's loop at once; a KeyboardInterrupt would end the process there."""


class GracefulStop(Callback):
    """On Ctrl-C or SIGTERM saves `last.ckpt` after the update under way, then ends the run.

    A second signal ends it at once; of several processes all stop after the same update, and a
    second signal is let pass, since `torchrun` sends one of its own. Run through `fit`, which turns
    the end into `RunInterrupted`. Belongs behind the callbacks that count (`Throughput`), whose
    state the checkpoint holds.

    Args:
        checkpoints: Writes the checkpoint.
    """

    def __init__(self, checkpoints: RunCheckpoints | None = None) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over from Lightning's handlers, which stop without a checkpoint."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop between two updates.

        A validation runs to its end and is followed by one more update, if there is one: its result
        belongs to the state that is saved.
        """
        if not between_updates(trainer) or validates_now(trainer) or not self._asked():
            return
        if self.checkpoints is not None:
            self.checkpoints.save_last(trainer)
        raise _StopNow

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the handlers back before Lightning takes away its own.

        In `teardown` those would come back after that, and each would hold its whole run alive.
        """
        self._restore()
        if self._asked():  # in the last validation, or before it; the state was saved behind it
            raise _StopNow

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the handlers back."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the handlers back."""
        self._restore()

    def _asked(self) -> bool:
        """Whether any process was asked to stop."""
        received = processes.largest(self.received or 0)
        if received:  # else a signal may have come since
            self.received = received
        return bool(received)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            if processes.world_size() > 1:
                return
            raise KeyboardInterrupt
        self.received = number
        log.warning(
            "%s: saving a checkpoint after this update; again to stop at once",
            signal.Signals(number).name,
        )

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Pruning(Callback):
    """Ends a run that a search finds hopeless, after a validation.

    Args:
        metric: What is reported, such as "val/loss".
        is_hopeless: Given its value and the updates so far, whether to end the run.
        num_training_steps: Updates of the whole run; one that is at its end is let end.

    Raises:
        RunPruned: From the hook, out of `fit`.
    """

    def __init__(
        self, metric: str, is_hopeless: Callable[[float, int], bool], num_training_steps: int
    ) -> None:
        self.metric = metric
        self.is_hopeless = is_hopeless
        self.num_training_steps = num_training_steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric and perhaps end the run."""
        value, step = trainer.callback_metrics.get(self.metric), trainer.global_step
        if trainer.sanity_checking or value is None:
            return
        hopeless = self.is_hopeless(float(value), step)
        if hopeless and step < self.num_training_steps:
            raise RunPruned(self.metric, float(value), step)


def fit(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    ckpt_path: str | None = None,
    **dataloaders: Any,
) -> None:
    """`trainer.fit` with weights-only loading, in which a signal ends as an exception.

    Args:
        trainer: The trainer.
        module: The module.
        datamodule: The data module.
        ckpt_path: Checkpoint to resume from.
        dataloaders: `train_dataloaders` and `val_dataloaders`, in place of a data module.

    Raises:
        RunInterrupted: If `GracefulStop` ended the run, or a second Ctrl-C did.
        OutOfMemory: If the device has too little memory.
    """
    stops = [c for c in trainer.callbacks if isinstance(c, GracefulStop)]  # type: ignore[attr-defined]
    try:
        with one_stream(trainer.strategy.root_device):
            trainer.fit(
                module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True, **dataloaders
            )
    except _StopNow:
        number = stops[0].received or signal.SIGINT
        raise RunInterrupted(
            number, f"state saved at step {trainer.global_step}; resume=auto goes on from there"
        ) from None
    except SystemExit:
        # Lightning answers a KeyboardInterrupt with sys.exit.
        number = next((c.received for c in stops if c.received), signal.SIGINT)
        raise RunInterrupted(
            number, "stopped at once; resume=auto goes on from last.ckpt"
        ) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.debug("out of memory at step %d", trainer.global_step, exc_info=error)
        # Of several processes the others are in the middle of a step and wait for this one.
        kind = OutOfMemory if processes.world_size() == 1 else TrainingError
        raise kind(
            f"out of memory at step {trainer.global_step} ({' '.join(str(error).split())[:160]}). "
            "Halve data.token_budget and double trainer.accumulate_grad_batches, or set "
            "acceleration.gradient_checkpointing=true."
        ) from None


class ProgressBar(RichProgressBar):
    """Lightning's rich bar with questions a second and the loss.

    Args:
        refresh_seconds: Least time between two redraws in training: one reads the loss, for which
            the device is waited for, and has nothing to do until its next row is launched.
        leave: Keep the bars of past epochs on screen.
    """

    def __init__(self, refresh_seconds: float = 1.0, leave: bool = True) -> None:
        super().__init__(refresh_rate=10, leave=leave)
        self.refresh_seconds = refresh_seconds
        self._drawn = -math.inf

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar; before the rate is known, how long the first step took."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            metrics = {"train/loss": float(loss), **metrics}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                if callback.questions_per_second:
                    metrics["questions/s"] = round(callback.questions_per_second, 1)
                elif callback.first_step_seconds:
                    metrics["first step"] = f"{callback.first_step_seconds:.1f} s"
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        """Said while nothing moves: the first step compiles."""
        description = super()._get_train_description(current_epoch)
        throughputs = (c for c in self.trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
        waiting = any(callback.first_step_seconds is None for callback in throughputs)
        return f"{description} (first step, may compile)" if waiting else description

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
    ) -> None:
        """Move the bar, under its plain name once the first step is done."""
        early = time.monotonic() < self._drawn + self.refresh_seconds
        if early and batch_idx and not trainer.is_last_batch:
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._drawn = time.monotonic()
        if self.progress is not None and self.train_progress_bar_id is not None:
            description = self._get_train_description(trainer.current_epoch)
            self.progress.update(self.train_progress_bar_id, description=description)


def _wait(pl_module: LightningModule) -> None:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
