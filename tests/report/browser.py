"""Headless Chromium through chromedriver, which speaks plain HTTP: no package stands between it and the test."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "Debian's packages chromium and chromium-driver are not installed: `apt-get install chromium chromium-driver`"
needs_chromium = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)

_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",  # which a container's root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
]


class Browser:
    """One browser window.

    Args:
        url: Of the driver.
        session: The driver's name for the window.
    """

    def __init__(self, url: str, session: str) -> None:
        self._url = f"{url}/session/{session}"

    def resize(self, width_px: int, *, height_px: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Give the page a width, as a phone or a desk has it, a colour scheme and a medium."""
        phone = width_px < 600
        size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def open(self, page: Path) -> None:
        """Load a file."""
        for kind in ("browser", "performance"):
            self._log(kind)  # reading empties it
        call("POST", f"{self._url}/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return call("POST", f"{self._url}/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """What stands in the console since the page was opened."""
        return [entry["message"] for entry in self._log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened, but for what the page holds itself."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith("data:")]

    def picture(self, path: Path) -> None:
        """Write a PNG file of the whole page."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return call("POST", f"{self._url}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return call("POST", f"{self._url}/se/log", {"type": kind})


@contextmanager
def chromium(profile: Path):
    """A browser of our own; it and its driver are gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    home = {**os.environ, "HOME": str(profile)}
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], env=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    session = None
    try:
        wait_for(url)
        options = {"binary": CHROMIUM, "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        session = call("POST", f"{url}/session", {"capabilities": wanted})["sessionId"]
        yield Browser(url, session)
    finally:
        if session is not None:
            call("DELETE", f"{url}/session/{session}")
        driver.terminate()
        driver.wait()


def wait_for(url: str) -> None:
    """Wait until the driver answers."""
    for _ in range(300):
        try:
            if call("GET", f"{url}/status")["ready"]:
                return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail("chromedriver did not answer within 30 seconds")


def call(method: str, url: str, body: object = None) -> Any:
    """Ask the driver; what it answers under `value`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is here, whatever proxy is set
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)["value"]
