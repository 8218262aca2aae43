"""A headless Chromium, driven over a pipe by its DevTools protocol; needs no package beside it."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
MISSING = "no chromium is installed (Debian: apt-get install chromium)"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe", "about:blank"),
)
KEYS = {
    "Enter": {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Escape": {"key": "Escape", "code": "Escape", "windowsVirtualKeyCode": 27},
    **{
        f"Arrow{way}": {"key": f"Arrow{way}", "code": f"Arrow{way}", "windowsVirtualKeyCode": code}
        for way, code in (("Left", 37), ("Up", 38), ("Right", 39), ("Down", 40))
    },
}


class Browser:
    """One page of a browser; `requested` are the addresses that it has asked for."""

    def __init__(self, commands, answers, seconds):
        self.commands, self.answers, self.seconds = commands, answers, seconds
        self.rest, self.number, self.session = b"", 0, None
        self.requested, self.errors, self.loaded = [], [], 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _receive(self):
        until = time.monotonic() + self.seconds
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.answers], [], [], max(until - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            part = os.read(self.answers, 2**16)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        event = json.loads(message)
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"])
        return event

    def call(self, method, **params):
        """What a command of the protocol gives back."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            event = self._receive()
            if event.get("id") == self.number:
                assert "error" not in event, event
                return event["result"]

    def waits_for_load(self, before):
        while self.loaded == before:
            self._receive()

    def opens(self, url):
        before = self.loaded
        self.call("Page.navigate", url=url)
        self.waits_for_load(before)

    def sized(self, width, height, dark=False):
        """Sets the size of the window; a narrow one is a telephone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, expression):
        """The value of an expression in the page's JavaScript."""
        settings = {"returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", expression=expression, **settings)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def types(self, text):
        self.call("Input.insertText", text=text)

    def presses(self, *keys):
        for key in keys:
            named = KEYS.get(key) or {"key": key, "text": key}
            self.call("Input.dispatchKeyEvent", type="keyDown", **named)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def shot(self, path, whole=False):
        """Saves a picture of the window, or of the page as a whole."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def opened(profile, seconds=60):
    """Gives a `Browser` with an empty profile, and ends it."""
    (to_read, commands), (answers, to_write) = os.pipe(), os.pipe()
    # The browser takes its pipe as 3 and 4, which must not be in use before.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_read, to_write)]
    script = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]} {ends[0]}<&- {ends[1]}>&-'
    process = subprocess.Popen(
        ["bash", "-c", script, PROGRAM, f"--user-data-dir={profile}", *FLAGS],
        pass_fds=ends,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (*ends, to_read, to_write):
        os.close(end)
    try:
        yield Browser(commands, answers, seconds)
    finally:
        for end in (commands, answers):
            os.close(end)
        # It ends by itself when its pipe is closed.
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
