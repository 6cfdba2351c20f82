"""Pictures of web pages, by Chromium without a screen, through chromedriver's own protocol (W3C WebDriver)."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1600, 1000
_START_SECONDS = 60


def missing() -> str:
    """What is not installed of what pictures need; empty if all is."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed: apt-get install chromium chromium-driver" if absent else ""


class Browser:
    """An open page."""

    def __init__(self, driver: str) -> None:
        self._driver = driver
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},{HEIGHT}"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self._session = f"/session/{session}"

    def open(self, url: str) -> None:
        """Goes to a page. What it loads by itself may take longer."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the JavaScript returns."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, css: str, seconds: float = 60) -> None:
        """A click as with a mouse on the first element that matches, once there is one."""
        end = time.monotonic() + seconds
        while not (found := self._ask("POST", f"{self._session}/elements", {"using": "css selector", "value": css})):
            assert time.monotonic() < end, f"nothing on the page is {css}"
            time.sleep(0.3)
        (element,) = found[0].values()
        self._ask("POST", f"{self._session}/element/{element}/click", {})

    def write(self, css: str, text: str) -> None:
        """Keys typed into the first element that matches."""
        (element,) = self._ask("POST", f"{self._session}/element", {"using": "css selector", "value": css}).values()
        self._ask("POST", f"{self._session}/element/{element}/value", {"text": text})

    def text(self) -> str:
        """What can be read on the page: text, and the texts inside drawings."""
        drawn = "[...document.querySelectorAll('svg text')].map(t => t.textContent).join('\\n')"
        return str(self.run(f"return document.body.innerText + '\\n' + {drawn}"))

    def wait_for(self, words: list[str], seconds: float = 120) -> str:
        """The page's text, once all words are in it. Raises AssertionError with those that are not."""
        return self.wait(lambda text: [word for word in words if word not in text], seconds)

    def wait(self, lacking: Callable[[str], list[str]], seconds: float) -> str:
        """The page's text, once `lacking` finds that it lacks nothing."""
        end = time.monotonic() + seconds
        while absent := lacking(text := self.text()):
            assert time.monotonic() < end, f"not on the page: {absent}; it says: {text[:3000]}"
            time.sleep(0.5)
        return text

    def save(self, png: Path) -> None:
        """A picture of what is seen."""
        png.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        """Ends Chromium."""
        self._ask("DELETE", self._session)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=180) as reply:
            return json.load(reply)["value"]


@contextmanager
def browser(port: int) -> Iterator[Browser]:
    """A browser, with its driver on a free port; both end with the block."""
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/status", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < end, "chromedriver does not answer"
                time.sleep(0.2)
        opened = Browser(address)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        driver.kill()
        driver.wait()


def screenshot(url: str, png: Path, wait_for: list[str], port: int) -> str:
    """Opens a page, waits for words on it, and pictures it. Returns its text."""
    with browser(port) as page:
        page.open(url)
        text = page.wait_for(wait_for)
        page.save(png)
        return text
