"""What the hub answers, and what the user is told to do about it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import httpx
import pandas as pd
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub

from medqlora import config
from medqlora.data import load_tokenizer, read_hub
from medqlora.errors import DataError, ModelError
from medqlora.hub import hub_error, hub_is_reachable, resolve_path
from tests.data.data_tools import raw_row

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
from medqlora.data import load_tokenizer, read_hub
from medqlora.errors import MedQLoRAError
told = {}
for name in json.loads(sys.argv[1]):
    for ask in (load_tokenizer, lambda name: read_hub(name, None, ["train"])):
        try:
            ask(name)
            told.setdefault(name, []).append("read")
        except MedQLoRAError as error:
            told.setdefault(name, []).append(f"{type(error).__name__}: {error}")
rows = read_hub("some/questions", sys.argv[2], ["train", "validation"]) if sys.argv[2] else {}
told["rows"] = [[len(part), part.columns["cop"][:4], part.source] for part in rows.values()]
print(json.dumps(told))
"""


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


class LoopbackHub(BaseHTTPRequestHandler):
    """A hub with one data set, and names that are refused in every way."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "some/gated" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "some/private" in path:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "some/broken" in path:
            return self.answer(500, b"{}", {})
        if "some/questions" not in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/datasets/some/questions/tree/"):
            folder = path.partition(COMMIT)[2].strip("/")
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in self.files.items()
                if name.startswith(folder)
            ]
            if not folder:
                entries.append({"type": "directory", "path": "data", "oid": "0" * 40, "size": 0})
            return self.answer(200, json.dumps(entries).encode(), {})
        if path.startswith("/api/datasets/some/questions/paths-info/"):
            return self.answer(200, b"[]", {})
        if path.startswith("/api/datasets/some/questions"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "some/questions", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.answer(200, json.dumps(info).encode(), {})
        data = self.files.get(path.rpartition(COMMIT)[2].strip("/"))
        if data is None:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        start, status = 0, 200
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, status = int(first), 206
            data = data[: int(last) + 1] if last else data
        found = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT}
        return self.answer(status, data[start:], found)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        self.rfile.read(size)
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
            for name, data in self.files.items()
        ]
        self.answer(200, json.dumps(entries).encode(), {})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format, *args) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def ask(tmp_path, endpoint: str, names: list[str], revision: str = "") -> dict:
    environment = {
        name: value for name, value in os.environ.items() if "proxy" not in name.lower()
    } | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    command = [sys.executable, "-c", ASK, json.dumps(names), revision]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=config.CONFIG_DIR.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_loopback_hub_is_read_and_its_refusals_are_translated(tmp_path):
    for split, number in (("train", 6), ("validation", 4)):
        frame = pd.DataFrame([raw_row(i) for i in range(number)])
        frame.to_parquet(tmp_path / f"{split}.parquet")
        name = f"data/{split}-00000-of-00001.parquet"
        LoopbackHub.files[name] = (tmp_path / f"{split}.parquet").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoopbackHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    names = ["some/gated", "some/private", "some/missing"]
    try:
        told = ask(tmp_path, endpoint, names, COMMIT)
    finally:
        server.shutdown()
        server.server_close()
    assert told["rows"] == [
        [6, [0, 1, 2, 3], "some/questions [train]"],
        [4, [0, 1, 2, 3], "some/questions [validation]"],
    ]
    for name, word in zip(names, ("accept the licence", "hf auth login", "not found"), strict=True):
        model, data = told[name]
        assert model.startswith("ModelError: model " + name)
        assert data.startswith("DataError: data set " + name)
        assert word in model
        assert word in data
        assert "\n" not in model + data


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
