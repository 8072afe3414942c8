"""A headless Chromium, spoken to in the DevTools protocol over two pipes: no library, no network."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

BROWSER = Path(__file__).parents[2] / ".references" / "chromium" / "browser"

needs_browser = pytest.mark.skipif(not BROWSER.exists(), reason="no .references/chromium")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--mute-audio"),
    *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


class Tab:
    """One page; `requests` are the addresses that it asked for, `errors` what its script threw."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.number, self.session, self.events = 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """The result of a command; what happened meanwhile is in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while (reply := self.receive()).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def receive(self):
        parts = bytearray()
        while (byte := self.reader.read(1)) != b"\0":
            assert byte, "the browser has gone"
            parts += byte
        return json.loads(parts)

    def open(self, path, width=1280, height=900, dark=False):
        """Load a file and wait until its script has run."""
        self.size(width, height, dark)
        before = len(self.events)
        self.send("Page.navigate", url=Path(path).as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events[before:]):
            self.events.append(self.receive())

    def size(self, width, height, dark=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression):
        reply = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def point(self, selector, click=False):
        """Move the mouse onto the middle of an element, scrolled into view first."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.point_at(*box, click=click)

    def point_at(self, x, y, click=False):
        kinds = ["mouseMoved", *(["mousePressed", "mouseReleased"] if click else [])]
        for kind in kinds:
            more = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self):
        """PNG, base64."""
        return self.send("Page.captureScreenshot", format="png")["data"]

    @property
    def requests(self):
        wanted = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in wanted]

    @property
    def errors(self):
        return [
            event
            for event in self.events
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
        ]


@contextlib.contextmanager
def tab(profile):
    """A Tab of a browser of its own, whose files are in the folder `profile`."""
    read_commands, write_commands = os.pipe()
    read_replies, write_replies = os.pipe()
    # The browser reads from descriptor 3 and writes to 4.
    script = f'exec "$@" 3<&{read_commands} 4>&{write_replies}'
    flags = (*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}")
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", BROWSER, *flags],
        pass_fds=(read_commands, write_replies),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "HOME": str(profile)},
    )
    os.close(read_commands)
    os.close(write_replies)
    try:
        with os.fdopen(read_replies, "rb") as reader, os.fdopen(write_commands, "wb") as writer:
            yield Tab(reader, writer)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
