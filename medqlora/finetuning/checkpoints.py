"""Checkpoints that are small, whole and safe to read: adapter, optimiser, schedule, sampler, RNG.

`last.ckpt` is what a run resumes from, `last.prev.ckpt` the one before it, in case that one is
damaged, `best.ckpt` the best on validation. A file appears under its name only when it is complete
on disk.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from medqlora import processes
from medqlora.errors import CheckpointError, ConfigError
from medqlora.finetuning.adapters import trainable_state

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "last.prev.ckpt", "best.ckpt"
_IDENTITY, _RNG = "medqlora_identity", "medqlora_rng"


class AtomicCheckpointIO(CheckpointIO):
    """Names a checkpoint only once it is on disk; reads nothing that could run code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to a temporary file, fsync, rename; an old `last.ckpt` becomes the previous.

        Whoever looks at `last.ckpt` meanwhile finds the old one or the new one.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                _keep_as_previous(path)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """See `read_checkpoint`; `weights_only` is always true."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file, if it is there."""
        Path(path).unlink(missing_ok=True)


def _keep_as_previous(path: Path) -> None:
    """Give the file a second name, where the file system can; its name only moves otherwise."""
    link = path.with_name(f".{PREVIOUS}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        os.replace(path, path.with_name(PREVIOUS))
        return
    os.replace(link, path.with_name(PREVIOUS))
    link.unlink(missing_ok=True)  # still there where both names were of one file already


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_checkpoint(path: str | Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint into main memory, tensors and plain values only.

    Args:
        path: The file.
        identity: What the run that reads it is built on; see `check_identity`.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If it is missing, damaged, holds code to run, or belongs to another run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there, so there is nothing to resume. Start anew with resume=never in "
            "another hydra.run.dir."
        )
    try:
        # torch.load does not look at the checksums that torch.save wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that would run code when read, so it is refused: only tensors "
            "and plain values are read. Use a checkpoint that medqlora wrote, or start anew with "
            "resume=never in another hydra.run.dir."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({' '.join(str(error).split())[:200]}). Resume from {PREVIOUS} "
            "beside it, or start anew with resume=never in another hydra.run.dir."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} holds no training state. Use a checkpoint that medqlora wrote."
        )
    if identity is not None:
        check_identity(checkpoint, identity)
    return checkpoint


def find_resumable(directory: str | Path, identity: Mapping[str, Any] | None = None) -> Path | None:
    """The newest undamaged checkpoint of a run to resume from.

    Args:
        directory: A run's `checkpoints/`.
        identity: See `check_identity`.

    Returns:
        `last.ckpt`, or `last.prev.ckpt` where that is missing or damaged; None where neither is
        there.

    Raises:
        CheckpointError: If all that is there is damaged, or belongs to another run.
    """
    failure: CheckpointError | None = None
    for name in (LAST, PREVIOUS):
        path = Path(directory) / name
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s", error)
            failure = failure or error
            continue
        if identity is not None:
            check_identity(checkpoint, identity)
        return path
    if failure is not None:
        raise failure
    return None


def token_budget_of(path: str | Path) -> int | None:
    """Tokens a row of the run that wrote a checkpoint; None where its data have no rows.

    Another number than the config has means that the run was once out of memory.

    Args:
        path: The checkpoint.
    """
    states = (state for state in read_checkpoint(path).values() if isinstance(state, dict))
    return next((state["token_budget"] for state in states if "token_budget" in state), None)


def check_identity(checkpoint: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run that is built on something else.

    Args:
        checkpoint: A checkpoint.
        identity: What must be the same, such as the base's revision, its quantisation,
            `config_hash`.

    Raises:
        CheckpointError: If one of them differs.
    """
    saved = checkpoint.get(_IDENTITY, {})
    for key, value in identity.items():
        if saved.get(key) != _plain(value):
            raise CheckpointError(
                f"the checkpoint was made with {key}={saved.get(key)}, this run has "
                f"{key}={_plain(value)}: the adapter does not fit another base. Use the same "
                "options, or start anew with resume=never in another hydra.run.dir."
            )


def load_trained_weights(model: nn.Module, path: str | Path) -> None:
    """Set the trainable weights of a model to those of a checkpoint, such as `best.ckpt`.

    Args:
        model: The base model with its adapter.
        path: The checkpoint.

    Raises:
        CheckpointError: If a weight is missing, unknown or of another shape.
    """
    state = {n.removeprefix("model."): t for n, t in read_checkpoint(path)["state_dict"].items()}
    ours = trainable_state(model)
    wrong = [
        n for n in sorted(ours.keys() | state.keys()) if _shape_of(ours, n) != _shape_of(state, n)
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this adapter: {len(wrong)} weights differ, such as {wrong[0]}. "
            "Use the same peft, quant and model options."
        )
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name])


class RunCheckpoints(Checkpoint):
    """Writes `last.ckpt` between updates and `best.ckpt` after the best validation so far.

    The state of the random number generators that a checkpoint holds is put back before the next
    row, in the run that goes on as in the run that resumes: what draws numbers in between (a
    validation, the loader of a new epoch) then cannot make them differ.

    Args:
        directory: The run's `checkpoints/`.
        every_n_minutes: Minutes of training between two `last.ckpt`, the most that a power cut
            costs; None: after validations and epochs only. By the clock, since two minutes are ten
            updates or thousands.
        every_n_steps: Updates between two `last.ckpt`, whichever comes first; None: by the clock.
        monitor: Logged metric that decides what is best.
        mode: Whether more or less of it is better.
        identity: What a resumed run must have in common with this one; plain values.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_n_minutes: float | None = 2.0,
        every_n_steps: int | None = None,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(
                f"callbacks.every_n_steps={every_n_steps} saves never. Choose at least 1, or null "
                "to save by the clock only."
            )
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ConfigError(
                f"callbacks.every_n_minutes={every_n_minutes} would do nothing but save. Choose "
                "more than 0, or null for after validations only."
            )
        if mode not in ("max", "min"):
            raise ConfigError(f"callbacks.mode={mode} is not known. Choose max or min.")
        self.directory = Path(directory)
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.identity = {key: _plain(value) for key, value in (identity or {}).items()}
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._rng: dict[str, Any] | None = None

    @property
    def last_path(self) -> Path:
        """`last.ckpt`."""
        return self.directory / LAST

    @property
    def best_path(self) -> Path | None:
        """`best.ckpt`; None before the first validation with labels."""
        return self.directory / BEST if self.best_score is not None else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run does not write again what it has just read."""
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the random number generators back to where the last checkpoint has them."""
        if self._rng is not None:
            _set_rng(self._rng)
            self._rng = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save when it is time, unless a validation is about to do it."""
        if between_updates(trainer) and self._due(trainer) and not validates_now(trainer):
            self.save_last(trainer)

    def _due(self, trainer: Trainer) -> bool:
        """Whether it is time to save; by the clock of whichever process is first."""
        if self.every_n_steps is not None:
            updates = trainer.global_step - max(self._saved_step, 0)
            if updates >= self.every_n_steps:
                return True
        if self.every_n_minutes is None:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return bool(processes.largest(int(minutes >= self.every_n_minutes)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best, and the last if no update is under way."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and self._is_better(float(score)):
            self.best_score, self.best_step = float(score), trainer.global_step
            trainer.save_checkpoint(self.directory / BEST)
        if between_updates(trainer):
            self.save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch that no validation closed."""
        if trainer.global_step != self._saved_step and between_updates(trainer):
            self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> None:
        """Write `last.ckpt`; the one that is there becomes `last.prev.ckpt`."""
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.last_path)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random number generators and what the run is built on."""
        rng = _get_rng()
        self._rng = rng
        checkpoint[_RNG] = rng
        checkpoint[_IDENTITY] = dict(self.identity)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse another run's checkpoint; remember its random number generators."""
        check_identity(checkpoint, self.identity)
        self._rng = checkpoint.get(_RNG)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best score so far."""
        self.best_score = state_dict["best_score"]
        self.best_step = state_dict["best_step"]

    def _is_better(self, score: float) -> bool:
        if score != score:
            return False
        if self.best_score is None:
            return True
        return score > self.best_score if self.mode == "max" else score < self.best_score


def between_updates(trainer: Trainer) -> bool:
    """Whether no gradients are under way: after an update and before the next row."""
    return not trainer.fit_loop._should_accumulate()


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning runs a validation after this row, from which a resumed run must start."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


def _get_rng() -> dict[str, Any]:
    """State of all generators as plain values and tensors."""
    # The legacy generator, because it is the global one that libraries draw from.
    name, keys, *rest = cast(Any, np.random.get_state(legacy=True))  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(name), keys.tolist(), *(value for value in rest)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of this process's GPU, whichever it is
    return state


def _set_rng(state: Mapping[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and isinstance(state.get("cuda"), torch.Tensor):
        torch.cuda.set_rng_state(state["cuda"])


def _plain(value: Any) -> Any:
    """A value as a weights-only checkpoint can hold and compare it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _shape_of(state: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
