"""A W&B server of this machine: as much of its protocol as a run and `wandb sync` need.

It answers the mutations that begin a run and announce its files, and keeps what it is sent.
"""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class SentRun:
    """A run as the server knows it.

    Attributes:
        about: Variables of the mutation that began it, the latest of each name.
        config: Its config.
        history: Its rows, by their place.
        files: The other files that were sent, by name.
        artifacts: Names of its artifacts.
        exit_code: None until it has ended.
    """

    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    exit_code: int | None = None


class WandbServer:
    """Listens on a port of 127.0.0.1 from its making to `close`.

    Attributes:
        runs: What it was sent, by run id.
        url: Its address, for WANDB_BASE_URL.
    """

    def __init__(self) -> None:
        self.runs: dict[str, SentRun] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that lead a run here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}

    def close(self) -> None:
        """Answer no more; a second call does nothing."""
        if not self._thread.is_alive():
            return
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes) -> Any:
        """What a request is answered with."""
        parts = path.strip("/").split("/")
        if path == "/graphql":
            asked = json.loads(body)
            return {"data": self._query(asked["query"], asked.get("variables") or {})}
        if parts[-1] == "file_stream":
            self._stream(self.runs[parts[-2]], json.loads(body))
        elif parts[0] == "upload":
            self.runs[parts[1]].files["/".join(parts[2:])] = body
        return {}

    def _query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            run = self.runs.setdefault(variables["name"], SentRun())
            run.about |= {key: value for key, value in variables.items() if value is not None}
            for key, item in json.loads(variables.get("config") or "{}").items():
                run.config[key] = item["value"]
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {
                "id": variables["name"],
                "name": variables["name"],
                "displayName": variables.get("displayName"),
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.url}/upload/{variables['run']}/{name}"}
                for name in variables["files"]
            ]
            answer = {"runID": variables["run"], "uploadHeaders": [], "files": files}
            return {"createRunFiles": answer}
        if "createArtifact(" in query:  # a table: its file is sent with the others
            asked = variables["input"]
            self.runs[asked["runName"]].artifacts.append(asked["artifactCollectionName"])
            sequence = {"id": "s", "latestArtifact": None}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        return {}

    @staticmethod
    def _stream(run: SentRun, sent: dict[str, Any]) -> None:
        history = (sent.get("files") or {}).get("wandb-history.jsonl") or {}
        for place, line in enumerate(history.get("content") or [], history.get("offset", 0)):
            run.history[place] = json.loads(line)
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = json.dumps(server.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: what was asked is no part of a test's output."""

        return Handler
