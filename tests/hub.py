"""A hub on this machine's loopback: repositories in memory, refusals and broken connections."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

MAIN = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """A model or data set as the hub holds it.

    Attributes:
        files: Content by path.
        commit: The one commit it has; also what the branch `main` points to.
        refusal: HTTP status with which every request is refused; None serves it.
        cuts: How often a connection is cut in the middle of a file, by path; -1: every time.
        private: Whether the upload that made it asked for a private one; None if none did.
        cut_uploads: Whether the connection is cut in the middle of every upload of a large file.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    commit: str = MAIN
    refusal: int | None = None
    cuts: dict[str, int] = field(default_factory=dict)
    private: bool | None = None
    cut_uploads: bool = False


_CODES = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}
"""What the hub calls a refusal: without a login it does not tell a private one from none."""


class LoopbackHub:
    """Serves repositories at `endpoint` while it is entered, and keeps a list of the requests.

    Args:
        models: Repositories by name, such as "google/gemma-2b".
        datasets: Likewise.
    """

    def __init__(
        self, models: Mapping[str, Repository], datasets: Mapping[str, Repository]
    ) -> None:
        self.repositories = {"models": models, "datasets": datasets}
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Any) -> dict[str, str]:
        """Variables with which a process finds this hub and nothing else, in a fresh home."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # another protocol, with servers of its own
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    """The routes that huggingface_hub and datasets use to read a repository, and to write one."""

    hub: ClassVar[LoopbackHub]

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "blobs":
            self._keep_blob(parts[1:])
            return
        if parts == ["api", "repos", "create"]:
            self._create()
            return
        if parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
            return
        if parts == ["close"]:
            self._answer(200, b"")
            threading.Thread(target=self.hub.close).start()
            return
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts[0] if parts and parts[0] in ("models", "datasets") else "models"
        parts = parts[1:] if parts and parts[0] == kind else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        if parts[-2:] == ["objects", "batch"]:
            self._say_where_to_upload(name.removesuffix(".git"))
            return
        repository = self.hub.repositories[kind].get(name)
        status = 404 if repository is None else repository.refusal
        if repository is None or status is not None:
            self._refuse(status or 404, _CODES.get(status or 404, "Error"))
            return
        if rest[:1] == ["preupload"]:
            self._say_how_to_upload()
            return
        if rest[:1] == ["commit"]:
            self._commit(repository, name)
            return
        verb, revision, inside = (*rest, "", "")[0], (*rest, "", "")[1], "/".join(rest[2:])
        if revision and revision not in (repository.commit, "main"):
            self._refuse(404, "RevisionNotFound")
        elif is_api:
            self._describe(repository, name, verb, inside)
        elif verb == "resolve":
            self._send_file(repository, inside)
        else:
            self._refuse(404, "EntryNotFound")

    def _describe(self, repository: Repository, name: str, verb: str, inside: str) -> None:
        if verb in ("", "revision"):
            siblings = [{"rfilename": path} for path in repository.files]
            self._json({"id": name, "sha": repository.commit, "siblings": siblings, "tags": []})
        elif verb == "tree":
            self._json(_entries(repository, inside))
        elif verb == "paths-info":
            wanted = _wanted(self._body, self.headers.get("Content-Type", ""))
            self._json(
                [entry for path in wanted for entry in _entries(repository, path, exact=True)]
            )
        else:
            self._refuse(404, "EntryNotFound")

    def _send_file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self._refuse(404, "EntryNotFound")
            return
        start = 0
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start = int(first)
            content = content[: int(last) + 1] if last else content
        headers = {
            "ETag": f'"{_digest(repository.files[path])}"',
            "X-Repo-Commit": repository.commit,
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and repository.cuts.get(path, 0) != 0
        if cut:
            repository.cuts[path] -= 1
        self._answer(206 if span else 200, content[start:], headers, cut=cut)

    def do_PUT(self) -> None:
        self._route()

    def _create(self) -> None:
        """Make a repository, or refuse as the one of that name does."""
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}"
        repository = self.hub.repositories["models"].get(name)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.refusal is not None:
            self._refuse(repository.refusal, "Error")
        else:
            repository.private = asked.get("private") or asked.get("visibility") == "private"
            self._json({"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})

    def _say_how_to_upload(self) -> None:
        paths = [file["path"] for file in json.loads(self._body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        files = [
            {"path": path, "uploadMode": mode, "shouldIgnore": False}
            for path, mode in zip(paths, modes, strict=True)
        ]
        self._json({"files": files})

    def _say_where_to_upload(self, name: str) -> None:
        objects = [
            {
                **one,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{name}/{one['oid']}"}},
            }
            for one in json.loads(self._body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _keep_blob(self, parts: list[str]) -> None:
        """Take a large file, or break off in its middle."""
        size = int(self.headers["Content-Length"])
        if self.hub.repositories["models"]["/".join(parts[:2])].cut_uploads:
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.hub.blobs[parts[2]] = self.rfile.read(size)
        self._answer(200, b"")

    def _commit(self, repository: Repository, name: str) -> None:
        files = dict(repository.files)
        for line in self._body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        repository.files = files
        url = f"{self.hub.endpoint}/{name}/commit/{repository.commit}"
        self._json({"commitUrl": url, "commitOid": repository.commit})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `requests` has them."""


def _entries(repository: Repository, folder: str, *, exact: bool = False) -> list[dict[str, Any]]:
    """The files below a folder, or the one file or folder of exactly this path."""
    files = {
        path: content
        for path, content in repository.files.items()
        if (path == folder if exact else not folder or path.startswith(f"{folder}/"))
    }
    entries = [
        {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
        for path, content in files.items()
    ]
    above = {path.rpartition("/")[0] for path in repository.files} - {"", folder}
    folders = (
        [folder]
        if exact and folder in {path.rpartition("/")[0] for path in repository.files}
        else []
    )
    folders += [] if exact or folder else sorted(above)
    return entries + [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in folders]


def _wanted(body: bytes, content_type: str) -> list[str]:
    """The paths that a request for details names, as JSON or as a form."""
    if "json" in content_type:
        paths = json.loads(body)["paths"]
        return [paths] if isinstance(paths, str) else paths
    pairs = [pair.partition("=")[::2] for pair in body.decode().split("&")]
    return [unquote(value.replace("+", " ")) for key, value in pairs if key == "paths"]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
