"""Secrets stay out of what is written: config.yaml, metrics.json, logs, error lines, W&B.

A secret is known by three signs: the name of its key or environment variable ends as such names do
(HF_TOKEN, WANDB_API_KEY, my_password), it has the form that a service gives its tokens, or it
stands as the password in the address of a server.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

MIN_LENGTH = 8
"""Characters of an environment variable's value below which it is no secret but a word."""

_NAME = (
    r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<![a-z])token|api_?key|access_?key|private_?key|"
    r"secret(?:_?key)?|passw(?:or)?d|passphrase|credentials?"
)
_SECRET_NAME = re.compile(rf"(?:{_NAME})$", re.IGNORECASE)
_SECRET_SETTING = re.compile(rf"""((?:{_NAME})["']?=["']?)(?!["'\s])([^\s"',;&]+)""", re.IGNORECASE)
_TOKEN_FORM = re.compile(
    r"\b(?:(?:hf|api_org|gh[opsur])_[A-Za-z0-9]{20,}|github_pat_\w{20,}|wandb_v1_\w{16,}"
    r"|sk-[\w-]{20,}|AKIA[0-9A-Z]{16})"
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)([^/\s@:]*):[^/\s@]+(?=@)")


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def mask(text: str, secrets: Sequence[str] | None = None) -> str:
    """The text with every secret in it replaced by `MASK`.

    Args:
        text: What is to be written.
        secrets: Values that are secret wherever they stand; those of the environment if None.
    """
    for secret in _environment_secrets() if secrets is None else secrets:
        text = text.replace(secret, MASK)
    text = _TOKEN_FORM.sub(MASK, text)
    text = _PASSWORD_IN_URL.sub(rf"\1:{MASK}", text)
    return _SECRET_SETTING.sub(rf"\1{MASK}", text)


def masked(value: Any, key: str = "", secrets: Sequence[str] | None = None) -> Any:
    """A copy of nested plain values with every secret replaced.

    Args:
        value: Mappings, lists, strings, numbers.
        key: Name that the value has; of one that names a secret every string is replaced.
        secrets: As for `mask`.
    """
    if secrets is None:
        secrets = _environment_secrets()
    if isinstance(value, Mapping):
        return {name: masked(item, str(name), secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(item, key, secrets) for item in value)
    if not isinstance(value, str) or not value:
        return value
    return MASK if is_secret_name(key) else mask(value, secrets)


class MaskingFormatter(logging.Formatter):
    """Formats a record for a log file or a terminal, tracebacks included, without its secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of the record, masked."""
        return mask(super().format(record))


def _environment_secrets() -> list[str]:
    """Values of environment variables that hold secrets, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH
        and is_secret_name(name)
        # A path names where a secret is kept.
        and not value.startswith(("/", "~"))
    }
    return sorted(found, key=len, reverse=True)
