"""A headless Chromium that keeps what a page complains of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Without these it looks for its maker's hosts as it starts.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
# The browser itself ended a request: its page was left, or asked for something newer. A server that fails reads otherwise.
WITHDRAWN = "net::ERR_ABORTED"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: tests/browser.sh installs Debian's, as root")


@dataclass
class Browser:
    """``page`` is Playwright's; ``complaints``: errors of its console, exceptions of its scripts, requests that failed."""

    page: Any
    complaints: list[str] = field(default_factory=list)


_shared: dict[str, Any] = {}


@contextmanager
def one_chromium() -> Iterator[None]:
    """Within, every ``browser()`` is a window of one Chromium, with cookies and a store of its own; the first starts it."""
    with ExitStack() as stack:
        _shared["stack"] = stack
        try:
            yield
        finally:
            _shared.clear()


def _launched(until: ExitStack) -> Any:
    from playwright.sync_api import sync_playwright

    chromium = until.enter_context(sync_playwright()).chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    until.callback(chromium.close)
    return chromium


@contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    with ExitStack() as own:
        if "stack" not in _shared:
            chromium = _launched(own)
        else:
            chromium = _shared.get("chromium") or _shared.setdefault("chromium", _launched(_shared["stack"]))
        context = chromium.new_context(viewport={"width": width, "height": height})
        own.callback(context.close)
        made = Browser(context.new_page())
        made.page.on("console", lambda m: made.complaints.append(m.text) if m.type == "error" else None)
        made.page.on("pageerror", lambda e: made.complaints.append(str(e)))
        made.page.on("requestfailed", lambda r: made.complaints.append(f"{r.url}: {r.failure}") if r.failure != WITHDRAWN else None)
        yield made
