"""A headless Chromium, driven through chromedriver's own HTTP interface: no package is needed."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "chromium and chromedriver are not installed"


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Browser:
    """One window. Everything it logs or requests is kept."""

    def __init__(
        self, port: int, *, dark: bool = False, width: int = 1280, height: int = 900
    ) -> None:
        assert DRIVER is not None
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            f"--window-size={width},{height}",
            "--hide-scrollbars",
        ]
        if dark:
            arguments.append("--blink-settings=preferredColorScheme=0")
        options = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        for _ in range(100):
            try:
                self._request("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        answer = self._request("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._session = f"/session/{answer['sessionId']}"

    def open(self, path: Path) -> None:
        """Open a file."""
        self._post("/url", url=path.resolve().as_uri())

    def visit(self, url: str) -> None:
        """Open an address."""
        self._post("/url", url=url)

    def press(self, key: str, code: int, *, ctrl: bool = False) -> None:
        """Press a key that has no text, such as Tab or Enter; `code` is its virtual key code."""
        for kind in ("rawKeyDown", "keyUp"):
            self.devtools(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=2 * ctrl,
            )

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script's `return`."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def wait(self, script: str) -> None:
        """Wait until a script returns something true, some ten seconds at most."""
        for _ in range(200):
            if self.run(script):
                return
            time.sleep(0.05)
        raise AssertionError(
            f"{script} did not come true: {self.run('return document.body.innerText')}"
        )

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def hover(self, selector: str) -> None:
        """Move a real pointer over an element."""
        x, y = self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];",
            selector,
        )
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.devtools("Input.insertText", text=text)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: "browser" or "performance"."""
        return self._post("/se/log", type=kind)

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page, in CSS pixels."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        height = self.run("return document.documentElement.scrollHeight;")
        width = self.run("return innerWidth;")
        self.resize(width, height)
        path.write_bytes(base64.b64decode(self._request("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        """End the browser and its driver."""
        try:
            self._request("DELETE", self._session)
        finally:
            self._process.terminate()
            self._process.wait(10)

    def _post(self, path: str, **body: Any) -> Any:
        return self._request("POST", self._session + path, body)

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with self._opener.open(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]
