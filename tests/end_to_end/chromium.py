"""A headless Chromium that opens pages and tells what it saw: requests, errors, what was drawn.

It speaks the browser's debugging protocol over two pipes: a JSON message up to each zero byte.

    with Chromium() as browser:
        page = browser.open(path, width=390)
        page.run("document.title")
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
BINARY = next(filter(None, map(shutil.which, _NAMES)), None)
TIME_LIMIT_S = 60
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Chromium:
    """One browser process; pages are opened in it one after the other."""

    def __init__(self) -> None:
        """Start it."""
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads its file 3 and writes its file 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", str(BINARY),
             *_OPTIONS, f"--user-data-dir={self._profile.name}"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; what it tells meanwhile is kept in ``events``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        """The next message."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], deadline - time.monotonic())
            if not ready:
                raise AssertionError(f"the browser said nothing for {TIME_LIMIT_S} s")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise AssertionError(f"the browser ended with {self._process.wait()}")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> "Page":
        """Open a file in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.events.clear()
        page = Page(self, attached["sessionId"])
        for domain in ("Network", "Runtime", "Log", "Page"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        look = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[look])
        page.call("Page.navigate", url=path.resolve().as_uri())
        page.run("new Promise(r => document.readyState === 'complete' ? r() "
                 ": addEventListener('load', () => r()))")  # fmt: skip
        page.stand_still()
        return page


class Page:
    """One open page."""

    def __init__(self, browser: Chromium, session: str) -> None:
        """Speak for ``session``."""
        self._browser = browser
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol for this page."""
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what is due has been drawn."""
        self.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r())))")

    def stand_still(self) -> None:
        """Wait until nothing moves any more: fonts and sizes may come after the first drawing."""
        places = (
            "JSON.stringify([...document.querySelectorAll('svg')].map("
            "e => [e.getBoundingClientRect(), e.childElementCount]))"
        )
        before, now = None, self.run(places)
        while before != now:
            self.settle()
            before, now = now, self.run(places)

    def click(self, selector: str) -> None:
        """Click on the first element that a selector finds."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
        self.settle()

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place of the window, move and release it at another."""
        button = {"button": "left", "clickCount": 1}
        self._mouse("mousePressed", start, **button)
        for share in (0.3, 0.6, 1.0):
            at = [a + (b - a) * share for a, b in zip(start, end, strict=True)]
            self._mouse("mouseMoved", (at[0], at[1]), button="left", buttons=1)
        self._mouse("mouseReleased", end, **button)
        self.settle()

    def hover(self, at: tuple[float, float], until: str) -> None:
        """Move the mouse about a place of the window until a JavaScript expression is true."""
        deadline = time.monotonic() + TIME_LIMIT_S
        for aside in itertools.cycle((0, 1)):
            self._mouse("mouseMoved", (at[0] + aside, at[1]))
            self.settle()
            if self.run(until):
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {TIME_LIMIT_S} s: {until}")

    def press(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)
        self.settle()

    def _mouse(self, kind: str, at: tuple[float, float], **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **more)

    def told(self, method: str) -> list[dict[str, Any]]:
        """What the browser has told of this page under a name of the protocol."""
        self.settle()
        own = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event["params"] for event in own if event.get("method") == method]

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """Keep a picture of the page, as a whole or its upper part."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"],
                "height": min(height or size["height"], size["height"]), "scale": 1}  # fmt: skip
        picture = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))
