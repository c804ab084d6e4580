"""A headless browser for tests of pages: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator:
    """Playwright's browser; skips the test where there is no Playwright or no Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on PATH")
    with sync_api.sync_playwright() as playwright:
        # A container's root has no sandbox to be in.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, path: Path, **options) -> Iterator:
    """A page of one file. It must ask for no other address and write nothing to the console.

    Args:
        browser: of `chromium`.
        path: of the file.
        options: of Playwright's `new_context`.
    """
    asked, said = [], []
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    address = path.resolve().as_uri()

    def answer(route):
        asked.append(route.request.url)
        if route.request.url == address:
            route.continue_()
        else:
            route.abort()

    context.route("**/*", answer)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    assert asked == [address]
    assert said == []
