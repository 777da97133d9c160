"""The weights of a base model kept between the jobs of one process."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from medqlora.quantization.cache import checksum

log = logging.getLogger(__name__)


class KeptBase:
    """Holds the weights of the base that was loaded last, and nothing else of a job.

    Each job gets a model of its own, built anew around the same tensors, so that adapters, hooks,
    modes and compiled code end with the job. What a job did to the weights themselves shows in
    their checksums, which are compared before the next job gets them.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._state: dict[str, Tensor] = {}
        self._sums: dict[str, int] = {}

    def take(self, key: Any) -> dict[str, Tensor] | None:
        """The weights kept under a key; what is kept under another is let go.

        Args:
            key: Source, storage and device of the weights.

        Returns:
            The tensors by name, not to be written to; None if they have to be loaded.
        """
        if key != self._key:
            self.forget()
            return None
        changed = [
            name for name, tensor in self._state.items() if self._sums[name] != checksum(tensor)
        ]
        if changed:
            log.warning(
                "the last job changed %d weights of the base, such as %s: it is loaded again",
                len(changed),
                changed[0],
            )
            self.forget()
            return None
        return self._state

    def keep(self, key: Any, state: dict[str, Tensor]) -> None:
        """Keep the weights of a base that was just loaded.

        Args:
            key: As for `take`.
            state: Its tensors by name; no copy is made.
        """
        self._key, self._state = key, state
        self._sums = {name: checksum(tensor) for name, tensor in state.items()}

    def forget(self) -> None:
        """Let the weights go; a model that is built around them keeps them alive."""
        self._key, self._state, self._sums = None, {}, {}
