"""The processes of one run: which one this is, and what they tell one another.

`torchrun` starts them and says so in the environment. Without it there is one process, and every
function here does nothing and takes no time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from medqlora.errors import ConfigError

Value = TypeVar("Value")


def launched() -> bool:
    """Whether `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def rank() -> int:
    """Number of this process; 0 writes the run folder."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """Number of this process on its machine, and of its device there."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def world_size() -> int:
    """Number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


@contextlib.contextmanager
def connected(accelerator: str) -> Iterator[None]:
    """Connect the processes of a run for as long as it takes.

    Tensors on a GPU go through NCCL; what the processes tell one another in between goes through
    gloo and main memory, so that no device is waited for.

    Args:
        accelerator: `trainer.accelerator`. On GPUs each process takes the one of its local rank.
    """
    if not launched():
        yield
        return
    import torch
    import torch.distributed as dist

    on_gpu = accelerator in ("gpu", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    yield
    # Only where all went well: a process that failed must not wait for the others.
    dist.barrier()
    dist.destroy_process_group()


def from_first(value: Value) -> Value:
    """What the first process says, for all of them."""
    return gathered(value)[0]


def gathered(value: Value) -> list[Value]:
    """What each process says, by rank. A collective: every process must call it."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def largest(number: int) -> int:
    """The largest of the numbers of all processes. A collective: every process must call it."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(number)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


_taken: list[int] = []
"""Open files whose locks say that a GPU is this process's, until it ends."""


def take_gpu() -> None:
    """Take a GPU of this machine that no other worker has; it is the current device from now on.

    The first job of a worker must call it before it uses CUDA; the GPU is given back when the
    process ends. The others cannot be hidden any more: imports have started CUDA, which reads
    CUDA_VISIBLE_DEVICES once. That variable names the GPUs there are; Slurm may number those of
    each of its jobs from 0, so they are told apart by job.

    Raises:
        ConfigError: If there are fewer GPUs than workers.
    """
    if _taken:
        return
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(count)))
    owner = f"{os.getuid()}-{os.environ.get('SLURM_JOB_ID', 'host')}"
    for index, name in enumerate(names[:count]):
        file = Path(tempfile.gettempdir()) / f"medqlora-gpu-{owner}-{name}.lock"
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        _taken.append(lock)
        torch.cuda.set_device(index)
        return
    if count:  # without any, `trainer=gpu` is refused in its own words
        raise ConfigError(
            f"all GPUs of this machine ({count}) are taken by other jobs. Let each job have one of "
            f"its own: hydra/launcher=joblib hydra.launcher.n_jobs={count}."
        )
