"""What the hub answers, and what the user is told to do about it."""

from __future__ import annotations

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub

from medqlora import config
from medqlora.data import load_tokenizer, read_hub
from medqlora.errors import DataError, ModelError
from medqlora.hub import hub_error, hub_is_reachable, resolve_path


def test_bundled_paths_are_below_the_assets_and_other_names_are_left_alone():
    assert resolve_path("bundled:tiny_gemma") == str(config.ASSETS_DIR / "tiny_gemma")
    for name in ("google/gemma-2b", "/a/b.jsonl", "./x"):
        assert resolve_path(name) == name


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://127.0.0.1"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.GatedRepoError("no", response=response(403)), ["accept the licence", "hf auth login"]),
        (hub.HfHubHTTPError("no", response=response(403)), ["accept the licence"]),
        (hub.RepositoryNotFoundError("no", response=response(401)), ["hf auth login", "spelling"]),
        (hub.RepositoryNotFoundError("no", response=response(404)), ["not found", "spelling"]),
        (hub.RevisionNotFoundError("no", response=response(404)), ["revision"]),
        (hub.HfHubHTTPError("no", response=response(503)), ["cannot be reached", "HF_ENDPOINT"]),
        (hub.LocalEntryNotFoundError("no"), ["cannot be reached"]),
        (hub.OfflineModeIsEnabled("no"), ["HF_HUB_OFFLINE"]),
        (httpx.ConnectError("no"), ["cannot be reached"]),
        (ValueError("two\nlines"), ["two lines"]),
    ],
)
def test_every_refusal_is_one_line_that_says_what_to_do(error, words):
    wrapped = OSError("something vague")
    wrapped.__cause__ = error
    for link in (error, wrapped) if "two" not in str(error) else (error,):
        for kind in (ModelError, DataError):
            told = hub_error(link, "model some/model", kind)
            assert isinstance(told, kind)
            assert "\n" not in str(told)
            for word in ("some/model", "make quickstart", *words):
                if word != "make quickstart" or "revision" not in words:
                    assert word in str(told)


def test_hub_that_does_not_answer_is_given_up_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not hub_is_reachable()
    for load, told in (
        (load_tokenizer, "model some/model is not on this machine and the hub cannot be reached"),
        (read_questions_of, "data set some/model is not on this machine"),
    ):
        with pytest.raises((ModelError, DataError), match=told):
            load("some/model")
    assert not constants.HF_HUB_OFFLINE


def read_questions_of(name: str):
    return read_hub(name, None, ["train"])
