"""A real browser, without a window: Debian's Chromium, driven by selenium.

    with browser() as driver:
        driver.get(url)

Names other than this machine's are not resolved in it, so a page that needs the network shows that it does.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MISSING = "is not installed; `make test-browser` installs it, and on Debian so does: apt-get install {}"


@contextmanager
def browser(width: int = 1280, height: int = 1000, downloads: Path | None = None) -> Iterator[Any]:
    """A selenium ``WebDriver``; the browser is gone at the end, whatever happened.

    Args:
        downloads: folder for what a page offers to download; by default nothing is.
    Raises:
        RuntimeError: no Chromium, or no chromedriver, and how to get them.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    for found, name in ((program, "chromium"), (driver, "chromium-driver")):
        if found is None:
            raise RuntimeError(f"{name} {MISSING.format(name)}")
    options = webdriver.ChromeOptions()
    options.binary_location = str(program)
    for argument in (
        "--headless=new",
        "--no-sandbox",  # root, in a container, has no other way
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    running = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        running.set_page_load_timeout(60)
        yield running
    finally:
        running.quit()


def wait(what: Callable[[], Found], seconds: float = 30, every: float = 0.1) -> Found:
    """The first value of ``what()`` that is true; an element that is not there yet, or no more, counts as false.

    Raises:
        AssertionError: there is none in time.
    """
    from selenium.common.exceptions import WebDriverException

    end, problem = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (WebDriverException, IndexError) as error:
            problem = error
        time.sleep(every)
    raise AssertionError(f"not seen in {seconds} s" + (f": {problem}" if problem else ""))


def requested(driver: Any) -> list[str]:
    """Addresses that the page has asked for since the last call, in order; ``data:`` and ``blob:`` are none."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:"))]
