"""A headless Chromium, driven through its own protocol over two pipes, so that no library and no port is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
_PATIENCE = 60.0  # seconds for an answer
# What becomes the browser: with its two file descriptors in their places.
_BEGIN = "import os, sys; [os.dup2(int(sys.argv[n]), n + 2) for n in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}


def program() -> str | None:
    """The path of a Chromium, if one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; ``errors`` has what it says on its console or throws, ``requests`` what it asks for."""

    def __init__(self, ask: int, answer: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._ask, self._answer, self._left, self._count = ask, answer, b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **options: Any) -> dict[str, Any]:
        """Send a command of the protocol, and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": options}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._count:
            self._note(found)
        assert "error" not in found, f"{method}: {found['error']}"
        return dict(found["result"])

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._answer], [], [], max(0.0, until - time.monotonic()))
            more = os.read(self._answer, 1 << 20) if ready else b""
            assert more, "no answer of the browser"
            self._left += more
        first, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(first))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled":
            self.errors.append(str(params["args"]))
        elif event["method"] == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Show a file in a window of that many CSS pixels."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=path.absolute().as_uri())
        until = time.monotonic() + _PATIENCE
        while not self.find("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < until, f"{path} does not load"

    def find(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key: Tab, Enter or a space."""
        code, text = _KEYS[key]
        what = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def picture(self) -> bytes:
        """All of the page as a PNG file."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, both gone afterwards."""
    path = program()
    assert path is not None, f"expected one of {', '.join(NAMES)}, got none"
    (theirs, ask), (answer, they_say) = os.pipe(), os.pipe()
    # The browser reads from the file descriptor 3 and writes to 4, which pytest's own may be.
    given = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs, they_say)]
    for handle in (theirs, they_say):
        os.close(handle)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [sys.executable, "-c", _BEGIN, *map(str, given), path, *_FLAGS, f"--user-data-dir={profile}"]
        started = subprocess.Popen(command, pass_fds=given, stderr=subprocess.DEVNULL)
        for handle in given:
            os.close(handle)
        try:
            yield Browser(ask, answer)
        finally:
            os.close(ask)
            os.close(answer)
            try:
                started.wait(10)  # it ends when its pipe does
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
