"""A real Chromium for tests of pages; tests that need it skip where there is none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def chromium_page(width: int = 1280, height: int = 800, scheme: str = "light") -> Iterator:
    """Yields a Playwright page; fails at the end if the page wrote errors to its console."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        errors = []
        page.on("console", lambda m: m.type in ("error", "warning") and errors.append(m.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    # Software rendering warns of its own slowness when pixels are read back; that is no fault.
    assert not [text for text in errors if "GPU stall" not in text], errors
