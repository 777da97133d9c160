"""Quantised copies of base models on disk, so that the second load reads a quarter of the bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medqlora.quantization.checkpoint import Checkpoint
from medqlora.quantization.config import QuantConfig

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when copies written before can no longer be read."""

BYTES_A_FILE = 128_000_000
FILES_AT_ONCE = 4
_INDEX = "index.json"


class QuantizedCache:
    """The quantised copy of one base model under one `QuantConfig`.

    A copy is a folder of safetensors files and an index that names what it was made from and a
    checksum of every tensor. It appears all at once, by a rename, and is never changed.

    Args:
        directory: Folder of all copies.
        checkpoint: The base model; its weights are not read.
        quant: How its weights are stored.
    """

    def __init__(self, directory: Path, checkpoint: Checkpoint, quant: QuantConfig) -> None:
        self.key: dict[str, Any] = {
            "format": FORMAT,
            "source": checkpoint.fingerprint(),
            "quant": quant.as_dict(),
            "bitsandbytes": version("bitsandbytes"),
        }
        identity = json.dumps(
            [checkpoint.path, checkpoint.revision, quant.as_dict()], sort_keys=True
        )
        readable = re.sub(r"[^\w.-]+", "-", Path(checkpoint.path).name)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.folder = directory / f"{readable}-{quant.data_type}-{digest}"

    def read(self, device: torch.device) -> dict[str, Tensor] | None:
        """The tensors of the copy on `device`, or None if there is no usable one.

        A copy that is there and cannot be used is reported with one warning.
        """
        if not self.folder.exists():
            return None
        try:
            index = json.loads((self.folder / _INDEX).read_text())
            if index["key"] != self.key:
                changed = [k for k in self.key if index["key"].get(k) != self.key[k]]
                log.warning(
                    "The quantised copy in %s is stale (%s changed): quantising again.",
                    self.folder,
                    ", ".join(changed),
                )
                return None
            return self._read_files(index["files"], device)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning(
                "The quantised copy in %s is damaged (%s): quantising again.", self.folder, reason
            )
            return None

    def _read_files(
        self, files: dict[str, dict[str, int]], device: torch.device
    ) -> dict[str, Tensor]:
        def read(file: str) -> dict[str, Tensor]:
            state: dict[str, Tensor] = {}
            with safe_open(self.folder / file, framework="pt") as shard:
                for name, expected in files[file].items():
                    # a copy, since a view would keep the whole file mapped
                    tensor = shard.get_tensor(name).to(device, copy=True)
                    if checksum(tensor) != expected:
                        raise ValueError(f"{file}: {name} has changed")
                    state[name] = tensor
            return state

        state: dict[str, Tensor] = {}
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:  # one thread alone waits for page faults
            for part in pool.map(read, files):
                state |= part
        return state

    def write(self, state: dict[str, Tensor]) -> None:
        """Save the tensors; a disk that is full costs the copy, not the run."""
        temporary = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            files: dict[str, dict[str, int]] = {}
            for number, names in enumerate(_shards(state)):
                file = f"part-{number:03}.safetensors"
                files[file] = {name: checksum(state[name]) for name in names}
                save_file(
                    {n: state[n].detach().cpu().contiguous() for n in names}, temporary / file
                )
            index = json.dumps({"key": self.key, "files": files}, indent=1)
            (temporary / _INDEX).write_text(index)
            shutil.rmtree(self.folder, ignore_errors=True)
            temporary.rename(self.folder)
        except (OSError, SafetensorError) as error:
            # another process may have written the same copy first, which is as good
            if not (self.folder / _INDEX).is_file():
                log.warning("No quantised copy was kept in %s: %s", self.folder, error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _shards(state: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that go into one file; few enough to hold a second time in main memory."""
    names: list[str] = []
    size = 0
    for name, tensor in state.items():
        if names and size + tensor.nbytes > BYTES_A_FILE:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    if names:
        yield names


def checksum(tensor: Shaped[Tensor, ...]) -> int:
    """Sum of a tensor's bytes, read as 64-bit words, modulo 2^64; on the tensor's own device.

    It finds every change of a single word. It is no protection against intent: what is in the cache
    folder is as trusted as the model itself.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = len(flat) // 8 * 8
    if words and flat.storage_offset() % 8:
        flat = flat.clone()
    total = flat[:words].view(torch.int64).sum() if words else flat.new_zeros((), dtype=torch.int64)
    return int(total + flat[words:].sum(dtype=torch.int64))
