"""The safetensors weights of a Gemma: where they lie, and one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from medqlora.errors import ModelError
from medqlora.hub import hub_error, resolve_path

MODEL_TYPES = ("gemma",)
ROWS_A_CHUNK = 2048
"""Rows of the embedding read at a time; on a CPU quantising takes 80 bytes a weight meanwhile."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Checkpoint:
    """A Gemma's config and weights, from a folder or the hub. Making one reads the config only.

    Weights are read one tensor, or a range of its rows, at a time and the file is closed in
    between, so that no more than that is in memory. Only safetensors are read, never a pickle, and
    no code.

    Args:
        path: Folder, hub name, or `bundled:` name.
        revision: Branch, tag or commit of a hub model.

    Attributes:
        path: The folder or hub name, `bundled:` resolved.
        revision: As given.
        config: The model's config.
        commit: Commit of a hub model, None for a folder.

    Raises:
        ModelError: If there is no such model, it is gated or unreachable, is no Gemma, or is
            quantised.
    """

    def __init__(self, path: str, revision: str | None = None) -> None:
        self.path = str(resolve_path(path))
        self.revision = revision
        self.is_local = Path(self.path).is_dir()
        if not self.is_local and not _HUB_NAME.fullmatch(self.path):
            raise ModelError(
                f"model.path={path} is no folder here and no hub name. Give an existing folder, or "
                "a name such as google/gemma-2b."
            )
        config_file = self._fetch("config.json")
        if config_file is None:
            raise ModelError(
                f"model.path={path} has no config.json, so it is no model. Give a folder that "
                "save_pretrained wrote, or a hub name such as google/gemma-2b."
            )
        self.commit = None if self.is_local else config_file.parent.name
        self.config = self._read_config(config_file)
        self._files: dict[str, Path] | None = None

    def _read_config(self, file: Path) -> PretrainedConfig:
        try:
            raw: dict[str, Any] = json.loads(file.read_text())
            model_type = raw.get("model_type")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{file} is no JSON object. Download the model again.") from error
        if raw.get("quantization_config"):
            method = dict(raw["quantization_config"]).get("quant_method", "an unknown method")
            raise ModelError(
                f"model.path={self.path} is quantised already ({method}): quantising it again "
                "would only add error. Give the 16-bit original, such as google/gemma-2b."
            )
        if model_type not in MODEL_TYPES:
            raise ModelError(
                f"model.path={self.path} has model_type={model_type}, and medqlora knows "
                f"{', '.join(MODEL_TYPES)}. Choose a Gemma of the first generation, such as "
                "google/gemma-2b or google/gemma-7b-it."
            )
        return AutoConfig.from_pretrained(file.parent, trust_remote_code=False)

    def _fetch(self, name: str) -> Path | None:
        """The local path of one file, downloaded if need be; None if the model does not have it."""
        if self.is_local:
            file = Path(self.path) / name
            return file if file.is_file() else None
        try:
            return Path(hf_hub_download(self.path, name, revision=self.revision))
        except LocalEntryNotFoundError as error:
            # out of reach and no copy here: for the index, a model in one file may still be here
            if name == _INDEX:
                return None
            raise hub_error(error, f"model {self.path}") from error
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise hub_error(error, f"model {self.path}") from error

    @property
    def files(self) -> dict[str, Path]:
        """The file of every tensor; the first use downloads a hub model's weights.

        Raises:
            ModelError: If there are no safetensors weights or a file is damaged.
        """
        if self._files is None:
            self._files = self._locate()
        return self._files

    def _locate(self) -> dict[str, Path]:
        if index := self._fetch(_INDEX):
            try:
                names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index} is damaged. Download the model again.") from error
            found = {shard: self._fetch(shard) for shard in sorted(set(names.values()))}
            files = {name: file for name, shard in names.items() if (file := found[shard])}
            if missing := [shard for shard, file in found.items() if file is None]:
                raise ModelError(
                    f"model.path={self.path} lacks {missing[0]}, which its index names. Download "
                    "the model again."
                )
            return files
        file = self._fetch(_SINGLE)
        if file is None:
            raise ModelError(
                f"model.path={self.path} has a config.json but no safetensors weights. Download "
                "the whole model, or convert pickled weights with save_pretrained."
            )
        with self._open(file) as weights:
            return dict.fromkeys(weights.keys(), file)

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is damaged ({error}). Delete it and download the model again."
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with self._open(self._file(name)) as weights:
            return tuple(weights.get_slice(name).get_shape())

    def read(
        self, name: str, start: int | None = None, stop: int | None = None
    ) -> Shaped[Tensor, ...]:
        """One tensor, or its rows `start` to `stop`, in main memory.

        Raises:
            ModelError: If the model has no such tensor.
        """
        with self._open(self._file(name)) as weights:
            if start is None:
                return weights.get_tensor(name)
            return weights.get_slice(name)[start:stop]

    def chunks(
        self, name: str, rows: int = ROWS_A_CHUNK
    ) -> Iterator[tuple[int, Shaped[Tensor, "row column"]]]:
        """The rows of a matrix, some at a time, each chunk with the number of its first row."""
        for start in range(0, self.shape(name)[0], rows):
            yield start, self.read(name, start, start + rows)

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise ModelError(
                f"model.path={self.path} has no weight {name}. It is another architecture or was "
                "not saved whole: download the model again."
            )
        return self.files[name]

    def fingerprint(self) -> dict[str, Any]:
        """What changes when the weights change: the commit, or name, size and time of each file.

        A folder's files are not hashed: reading them costs as much as loading the model.
        """
        if self.commit is not None:
            return {"path": self.path, "commit": self.commit}
        stats = {file.name: file.stat() for file in sorted(set(self.files.values()))}
        return {
            "path": str(Path(self.path).resolve()),
            "config": (Path(self.path) / "config.json").read_text(),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }


def cast(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy on `device`; never the file's own memory, which would keep the whole file mapped."""
    return tensor.to(device=device, dtype=dtype, copy=True)
