"""A headless Chromium for tests, and pages served by a separate process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.toy import PATHS


def _find(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


CHROMIUM, DRIVER = _find("chromium", "chromium-browser"), _find("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium here (Debian: apt-get install chromium chromium-driver)"
)


@contextmanager
def chromium(profile: Path):
    """A browser that only contacts the page; its profile is deleted with the test's folder."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    words = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    words += " disable-component-update disable-sync disable-dev-shm-usage window-size=1280,1400"
    for word in (*words.split(), f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(DRIVER))
    try:
        driver.set_page_load_timeout(120)
        yield driver
    finally:
        driver.quit()


@contextmanager
def served(*words: str, cwd: Path | None = None, path: list[Path] = PATHS, timeout: float = 200):
    """The address of a page served by `python words --port N`, once it responds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + timeout
    try:
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise AssertionError(f"The page was not served: {process.communicate()[0][-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False
