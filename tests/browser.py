"""A headless Chromium that keeps what a page complains of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Without these it looks for its maker's hosts as it starts.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: tests/browser.sh installs Debian's, as root")


@dataclass
class Browser:
    """``page`` is Playwright's; ``complaints``: errors of its console, exceptions of its scripts, requests that failed."""

    page: Any
    complaints: list[str] = field(default_factory=list)


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        made = Browser(chromium.new_page(viewport={"width": width, "height": height}))
        made.page.on("console", lambda m: made.complaints.append(m.text) if m.type == "error" else None)
        made.page.on("pageerror", lambda e: made.complaints.append(str(e)))
        made.page.on("requestfailed", lambda r: made.complaints.append(f"{r.url}: {r.failure}"))
        yield made
        chromium.close()
