"""The docs as a site: it builds without a warning, needs nothing from elsewhere, and its search finds what is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import browser, needs_browser
from tests.docs.shown import ROOT

pytest.importorskip("material", reason="mkdocs-material is not installed: make setup")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_page_of_the_docs_is_in_it(site: Path) -> None:
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")}
    built = {
        str(page.relative_to(site).with_suffix("")).replace("decisions/index", "decisions/README") for page in site.rglob("*.html")
    }
    assert built == pages | {"404"}
    menu = (site / "index.html").read_text()
    for part in ("Start", "Use", "Understand", "Extend"):
        assert re.search(rf">\s*{part}\s*<", menu), part


@pytest.mark.slow
def test_no_page_takes_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="?(https?:[^" >]+)', page.read_text())
        assert not loaded, page.name


@pytest.mark.slow
@needs_browser
def test_search_works_from_files(site: Path) -> None:
    with browser() as b:
        asked: list[str] = []
        b.page.on("request", lambda request: asked.append(request.url))
        b.page.goto((site / "index.html").as_uri())
        b.page.locator(".md-search__input").click()
        b.page.keyboard.type("groupcast", delay=50)
        b.page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
        assert b.page.locator(".md-search-result__link").count() > 0
        assert not b.complaints
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
