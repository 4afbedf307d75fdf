"""A headless Chromium, driven by the WebDriver protocol (W3C) over HTTP."""

import base64
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "wants chromium and chromedriver (apt-get install chromium chromium-driver)"


class Browser:
    """One window of a fresh browser.

    Args:
      profile: folder of its own.
      dark: whether pages are asked for dark colors.
    """

    def __init__(self, profile: Path, *, dark: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._driver = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                 "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync",
                 "--disable-dev-shm-usage", "--window-size=1000,800",
                 f"--user-data-dir={profile}"]  # fmt: skip
        if dark:
            flags.append("--force-dark-mode")
        options = {"binary": CHROMIUM, "args": flags}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        try:
            self._wait_for_driver()
            found = self._post("/session", capabilities={"alwaysMatch": wanted})
            self._session = f"/session/{found['sessionId']}"
        except BaseException:
            self._stop_driver()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self._http.delete(self._session)
        finally:
            self._stop_driver()

    def open(self, url: str) -> None:
        """Loads a page."""
        self._post(f"{self._session}/url", url=url)

    def run(self, script: str):
        """What a function body returns on the page."""
        return self._post(f"{self._session}/execute/sync", script=script, args=[])

    def wait_for(self, script: str, seconds: float = 60):
        """Waits until an expression is true on the page; returns it."""
        late = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            if time.monotonic() > late:
                raise TimeoutError(f"on the page this stays false: {script}")
            time.sleep(0.03)
        return value

    def write(self, selector: str, text: str) -> None:
        """Types into an element, as a person would."""
        [element] = self._element(selector).values()
        self._post(f"{self._session}/element/{element}/value", text=text)

    def click(self, selector: str) -> None:
        """Clicks an element."""
        [element] = self._element(selector).values()
        self._post(f"{self._session}/element/{element}/click")

    def screenshot(self, path: str | Path) -> None:
        """Writes what is seen as a PNG file."""
        shown = self._get(f"{self._session}/screenshot")
        Path(path).write_bytes(base64.b64decode(shown))

    def complaints(self) -> list[str]:
        """What the browser's console has told so far."""
        told = self._post(f"{self._session}/se/log", type="browser")
        return [each["message"] for each in told]

    def _element(self, selector: str) -> dict[str, str]:
        found = {"using": "css selector", "value": selector}
        return self._post(f"{self._session}/element", **found)

    def _get(self, path: str):
        return self._http.get(path).raise_for_status().json()["value"]

    def _post(self, path: str, **body):
        response = self._http.post(path, json=body)
        value = response.json()["value"]
        if response.is_error:
            raise ValueError(f"{path}: {value['error']}: {value['message'][:500]}")
        return value

    def _wait_for_driver(self) -> None:
        for _ in range(300):
            try:
                if self._get("/status")["ready"]:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def _stop_driver(self) -> None:
        self._http.close()
        self._driver.terminate()
        self._driver.wait(20)
