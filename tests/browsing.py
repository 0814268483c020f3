"""Chromium for tests of pages; tests that need it are skipped where it is not there."""

from __future__ import annotations

import importlib.util
import re
import shutil
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_LACKS = "there is no Chromium here" if CHROMIUM is None else "playwright is not installed"
with_browser = pytest.mark.skipif(CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason=_LACKS)


def watched(browser: Any, url: str, width: int = 1280, dark: bool = False) -> tuple[Any, list[str]]:
    """A page of a server, and a list to which console errors, exceptions and requests to other servers are added."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:")) else wrong.append(r.url))
    page.goto(url)
    return page, wrong


def shows(page: Any, selector: str, text: str | re.Pattern[str], seconds: float = 30) -> None:
    """Wait until an element contains a text or a match of a pattern.

    (Playwright's wait_for_function needs eval, which the pages' policy forbids.)
    """
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=1000 * seconds, use_inner_text=True)
