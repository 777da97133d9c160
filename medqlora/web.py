"""The web side of `serve`: routes, limits, and a server that ends quietly.

The page and its answers never leave the machine: no route of another origin is asked, and requests
that a foreign page makes a browser send are refused by their Host and Origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from medqlora.answering import AnswerThread, BusyError
from medqlora.config import ASSETS_DIR
from medqlora.entry import one_line

log = logging.getLogger("medqlora.serve")

MAX_CONNECTIONS = 512
"""Connections at once; one more is told to come back later."""

GRACE = 5
"""Seconds that requests have to end when the server does."""

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_bytes: Bytes of its body.
        max_questions: Questions in it.
        timeout: Seconds for it to arrive, and again for its answer.
    """

    max_bytes: int
    max_questions: int
    timeout: float


def build_app(
    answers: AnswerThread, facts: Mapping[str, Any], limits: Limits, *, host: str = "127.0.0.1"
) -> Starlette:
    """The routes: the page, `GET /run` and `POST /predict`.

    Args:
        answers: What answers.
        facts: What `GET /run` says.
        limits: What a request may ask for.
        host: Name or address that is listened at.

    Returns:
        An ASGI application.
    """
    about = {**facts, "max_bytes": limits.max_bytes, "max_questions": limits.max_questions}

    async def run(request: Request) -> Response:
        return _json(about)

    async def predict(request: Request) -> Response:
        records, many = read_request(await _body(request, limits), limits.max_questions)
        lines = await _answers(answers, records, limits.timeout)
        extra = {"temperature": facts["temperature"], "disclaimer": facts["disclaimer"]}
        if many:
            return _json({"answers": lines, **extra})
        (line,) = lines
        return _json({**line, **extra}, 400 if "error" in line else 200)

    def page(name: str, kind: str) -> Any:
        content = (ASSETS_DIR / "serve" / name).read_bytes()

        async def send(request: Request) -> Response:
            return Response(content, media_type=kind)

        return send

    return Starlette(
        routes=[
            *(Route(path, page(*file)) for path, file in _PAGE.items()),
            Route("/run", run),
            Route("/predict", predict, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, host=host)],
        exception_handlers={
            HTTPException: _refused,
            ClientDisconnect: _gone,
            BusyError: _busy,
        },
    )


# --- requests -------------------------------------------------------------------------------------


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, not more of it than may be and not later than it should come."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # A form of a foreign page can send other types without asking first.
        raise HTTPException(415, "send JSON with the header Content-Type: application/json.")
    too_large = HTTPException(
        413,
        f"a request may have {limits.max_bytes} bytes: ask fewer questions at a time.",
        {"connection": "close"},
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(
            408,
            f"the request did not arrive within {limits.timeout:g} seconds.",
            {"connection": "close"},
        ) from error
    return bytes(body)


def read_request(body: bytes, max_questions: int) -> tuple[Sequence[Mapping[str, Any] | str], bool]:
    """The rows of a request; what is wrong with a single row is said in its place later.

    Args:
        body: JSON: an object with one question, or with `questions`, a list of such objects.
        max_questions: Questions it may have.

    Returns:
        The rows, and whether they came as a list.

    Raises:
        HTTPException: If the request as a whole cannot be read.
    """
    try:
        asked = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the request is not UTF-8.") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise HTTPException(400, f"the request is not valid JSON ({reason}).") from error
    if not isinstance(asked, dict):
        raise HTTPException(
            400,
            f"the request is a {type(asked).__name__}: send an object with question, opa, opb, opc "
            "and opd, or with questions, a list of them.",
        )
    if "questions" not in asked:
        return [asked], False
    rows = asked["questions"]
    if not isinstance(rows, list) or not rows:
        raise HTTPException(400, "questions is no list of questions: send one or more in it.")
    if len(rows) > max_questions:
        raise HTTPException(
            413, f"{len(rows)} questions are more than the {max_questions} a request may have."
        )
    return [
        row
        if isinstance(row, dict)
        else f"{row!r:.40} is no question: send an object with question, opa, opb, opc and opd."
        for row in rows
    ], True


async def _answers(
    answers: AnswerThread, records: Sequence[Mapping[str, Any] | str], timeout: float
) -> list[dict[str, Any]]:
    future = asyncio.wrap_future(answers.ask(records))
    try:
        async with asyncio.timeout(timeout):
            return await future
    except TimeoutError as error:
        raise HTTPException(503, f"no answer within {timeout:g} seconds: ask later.") from error
    except asyncio.CancelledError as error:
        if not future.cancelled():
            raise
        raise BusyError("the server is ending: ask again when it is back.") from error
    except Exception as error:
        log.error("a request failed: %s", one_line(error))
        raise HTTPException(500, f"the run could not answer: {one_line(error)}") from error


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # Text from outside may hold half a character, which has a form in ASCII and none in UTF-8.
    text = json.dumps(value, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    refusal = cast(HTTPException, error)
    return _json({"error": refusal.detail}, refusal.status_code, refusal.headers)


async def _busy(request: Request, error: Exception) -> Response:
    return _json({"error": str(error)}, 503, {"retry-after": "5"})


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


class _Guard:
    """Refuses what a foreign page could make a browser send, and forbids ours to load anything.

    A page whose name is pointed at this machine (DNS rebinding) still sends that name as Host, so
    only addresses, `localhost` and the name listened at pass; one that sends from elsewhere says so
    in Origin.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._names = {"localhost", host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            refusal = f"Host: {host[:100]} is not the name of this server."
        elif origin is not None and origin != f"http://{host}":
            refusal = f"Origin: {origin[:100]} is not the page of this server."
        else:
            await self._app(scope, receive, guarded)
            return
        response = _json({"error": refusal}, 403, {"connection": "close"})
        await response(scope, receive, guarded)

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


# --- server ---------------------------------------------------------------------------------------


def run_server(app: ASGIApp, listener: socket.socket, limits: Limits) -> None:
    """Serve until Ctrl-C or SIGTERM, then let what is being answered end.

    Args:
        app: What `build_app` returned.
        listener: A listening socket.
        limits: Its timeout is also that of the headers of a request.
    """
    QuietServer(server_config(app, limits)).run(sockets=[listener])


def server_config(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """Settings of the server: HTTP/1.1 only, nothing logged about single requests."""
    return uvicorn.Config(
        app,
        http=_patient_for(limits.timeout),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=GRACE,
        timeout_graceful_shutdown=GRACE,
    )


class QuietServer(uvicorn.Server):
    """Ends on a signal and leaves it at that: uvicorn would raise the signal once more."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take SIGINT and SIGTERM while the server runs; only the main thread can."""
        before = {}
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _patient_for(timeout: float) -> type[H11Protocol]:
    """The protocol of uvicorn, which by itself waits for ever for the rest of the headers."""

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_watching()

        def _watch(self) -> None:
            """Count the time from the first byte of a request to the last of its headers."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_watching()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(timeout, self.transport.close)

        def _stop_watching(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol
