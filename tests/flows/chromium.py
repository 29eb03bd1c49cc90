"""A headless Chromium, spoken to over two pipes, that says how a page looks and what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

WIDTH_PX, HEIGHT_PX = 1280, 900
_ANSWER_S = 60.0
_FLAGS = (
    "--headless",
    "--no-sandbox",  # root has none
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-breakpad",
    "--disable-crash-reporter",
    "--no-first-run",
)
_LOOK = """(async () => {
  await new Promise(done => setTimeout(done, 100));  // what a broken picture would start, has
  return JSON.stringify({
    images: [...document.images].map(image => image.naturalWidth),
    overflow_px: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    ran: window.ran === true,
    title: document.title,
    text: document.body.innerText,
  });
})()"""


@dataclass(frozen=True, slots=True)
class Look:
    """A page as it stands: natural widths of its pictures, what sticks out to the right.

    `ran` says whether a script of the page set `window.ran`; `problems` are errors of its console,
    exceptions and dialogs.
    """

    images: list[int]
    overflow_px: int
    ran: bool
    title: str
    text: str
    problems: list[str]


class Chromium:
    """Ends its browser, and every process of it, on leaving the `with`."""

    def __init__(self, profile: Path) -> None:
        names = ("chromium", "chromium-browser", "google-chrome")
        program = next(filter(None, map(shutil.which, names)), None)
        if program is None:
            pytest.skip(f"no browser to open pages in: none of {', '.join(names)} is on the PATH")
        # The protocol is spoken on the descriptors 3 and 4, messages end with a zero byte.
        wiring = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", wiring, "sh", program, *_FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._n_sent = 0
        self._unread = b""
        self._events: list[dict[str, Any]] = []
        self._session: dict[str, str] = {}

    def __enter__(self) -> Chromium:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH_PX,
            height=HEIGHT_PX,
            deviceScaleFactor=1,
            mobile=False,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def look(self, page: Path) -> Look:
        """Open a page, wait until all of it is loaded, and look at it."""
        self._events.clear()
        self._call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        answer = self._call("Runtime.evaluate", expression=_LOOK, awaitPromise=True)
        problems = [told for event in self._events if (told := _problem(event))]
        return Look(**json.loads(answer["result"]["value"]), problems=problems)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        sent = self._send(method, params)
        while True:
            message = self._receive()
            if message.get("id") == sent:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._n_sent += 1
        message = {"id": self._n_sent, "method": method, "params": params, **self._session}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        return self._n_sent

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept, and a dialog is closed, or the page would stand."""
        assert self._process.stdout is not None
        until_s = time.monotonic() + _ANSWER_S
        while b"\0" not in self._unread:
            left_s = max(0.0, until_s - time.monotonic())
            ready, _, _ = select.select([self._process.stdout], [], [], left_s)
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            assert data, "the browser ended" if ready else f"no answer within {_ANSWER_S:.0f} s"
            self._unread += data
        head, self._unread = self._unread.split(b"\0", 1)
        message: dict[str, Any] = json.loads(head)
        if "method" in message:
            self._events.append(message)
            if message["method"] == "Page.javascriptDialogOpening":
                self._send("Page.handleJavaScriptDialog", {"accept": True})
        return message


def _problem(event: dict[str, Any]) -> str | None:
    params = event["params"]
    match event["method"]:
        case "Runtime.exceptionThrown":
            return f"exception: {params['exceptionDetails']['text']}"
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            return f"console: {params['args']}"
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            return f"log: {params['entry']['text']} {params['entry'].get('url', '')[:200]}"
        case "Page.javascriptDialogOpening":
            return f"dialog: {params['message']}"
    return None
