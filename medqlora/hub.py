"""Names of models and data sets: bundled ones, and what to do when the hub refuses one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub import errors as hub

from medqlora import config
from medqlora.errors import MedQLoRAError, ModelError

BUNDLED = "bundled:"
"""Prefix of a path below the assets of this package, such as `bundled:tiny_gemma`."""


def resolve_path(path: str) -> str:
    """Turn `bundled:NAME` into the path of that asset; every other name is returned unchanged.

    Args:
        path: A hub name, a path, or `bundled:` and a path below `medqlora/assets`.

    Returns:
        An absolute path for a bundled asset, else `path`.
    """
    if not path.startswith(BUNDLED):
        return path
    return str(config.ASSETS_DIR / path.removeprefix(BUNDLED))


def is_hub_name(path: str) -> bool:
    """Whether a path names a model of the hub: nothing bundled and no folder of this machine."""
    return not path.startswith((BUNDLED, "/", ".", "~")) and not Path(path).is_dir()


def display_name(path: str) -> str:
    """Name of a model for a reader: of a folder its own name, not where it lies."""
    return path if is_hub_name(path) else Path(path.removeprefix(BUNDLED)).name


def hub_error(
    exception: BaseException, what: str, kind: type[MedQLoRAError] = ModelError
) -> MedQLoRAError:
    """Translate a failed download into one line that says what to do.

    The libraries wrap the hub's own exceptions, so the whole chain of causes is looked at.

    Args:
        exception: What `huggingface_hub`, `transformers` or `datasets` raised.
        what: The thing that was asked for, such as "model google/gemma-2b".
        kind: Class of the error, `ModelError` or `DataError`.

    Returns:
        The error to raise, `from` the exception given.
    """
    chain = list(_causes(exception))
    statuses = http_statuses(exception)
    offline = "or try the offline example with `make quickstart`"
    if any(isinstance(link, hub.GatedRepoError) for link in chain) or 403 in statuses:
        return kind(
            f"{what} is gated and this machine has no access to it: accept the licence on its page "
            f"of the hub and log in with `hf auth login`, {offline}."
        )
    if any(isinstance(link, hub.RevisionNotFoundError) for link in chain):
        return kind(
            f"{what} has no such revision on the hub: leave the revision null for the newest, or "
            "name a commit that exists."
        )
    if 401 in statuses:
        return kind(
            f"{what} cannot be read without logging in, or does not exist: check the spelling, "
            f"accept the licence on its page of the hub and log in with `hf auth login`, {offline}."
        )
    if 404 in statuses or any(isinstance(link, hub.RepositoryNotFoundError) for link in chain):
        return kind(
            f"{what} was not found on the hub: check the spelling, give the path of a folder "
            f"instead, {offline}."
        )
    if is_unreachable(exception):
        return kind(
            f"{what} is not on this machine and the hub cannot be reached: check the network and "
            f"HF_ENDPOINT, unset HF_HUB_OFFLINE, give the path of a local copy, {offline}."
        )
    reason = " ".join(str(exception).split())[:300] or type(exception).__name__
    return kind(f"{what} could not be loaded ({reason}): check the name, {offline}.")


def http_statuses(exception: BaseException) -> set[int]:
    """Status codes of the answers that an exception and its causes carry."""
    return {
        response.status_code
        for link in _causes(exception)
        if (response := getattr(link, "response", None)) is not None
    }


def is_unreachable(exception: BaseException) -> bool:
    """Whether the hub did not answer, broke off, or answered that it cannot."""
    kinds = (
        hub.LocalEntryNotFoundError,
        hub.OfflineModeIsEnabled,
        ConnectionError,
        TimeoutError,
    )
    # The HTTP client is httpx or its successor, depending on the version of huggingface_hub.
    return any(status >= 500 for status in http_statuses(exception)) or any(
        isinstance(link, kinds)
        or any(base.__name__ == "TransportError" for base in type(link).__mro__)
        for link in _causes(exception)
    )


def hub_is_reachable() -> bool:
    """Whether the hub answers at all, at the first try.

    Asked before a download, because the hub's client retries for half a minute and prints each try;
    without a hub only what is on this machine already can be loaded.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:
        return False
    return True


@contextmanager
def offline_unless_reachable() -> Iterator[bool]:
    """Let the hub's libraries use their caches alone while the hub does not answer.

    Yields:
        Whether the hub answers.
    """
    reachable = hub_is_reachable()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE = before


def _causes(exception: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from, outermost first."""
    seen: set[int] = set()
    link: BaseException | None = exception
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
