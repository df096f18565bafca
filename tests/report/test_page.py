"""The report's page in a real browser: no complaint, figures that show, tables that sort and filter."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcbench.grid.devices import known_devices
from lcbench.report.page import write_report
from tests.browser import browser, needs_browser
from tests.report.made import made_sweep
from tests.report.test_report import CP

pytestmark = [needs_browser, pytest.mark.slow]


def test_a_report_opened_from_disk_shows_sorts_and_filters_without_complaint(tmp_path: Path) -> None:
    page_path = write_report(made_sweep(tmp_path, "s", CP), tmp_path / "out", known_devices()).page
    with browser() as b:
        b.page.context.set_offline(True)
        b.page.goto(page_path.as_uri())
        assert b.page.title() == "s: lcbench"
        shown = b.page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 100)")
        assert len(shown) >= 5
        assert all(shown)
        rates = "[...document.querySelectorAll('#t-winners tbody tr')].map(r => parseFloat(r.cells[5].textContent))"
        before = b.page.evaluate(rates)
        b.page.locator("#t-winners thead th").nth(5).click()
        assert b.page.evaluate(rates) == sorted(before)
        b.page.locator("#t-winners thead th").nth(5).click()
        assert b.page.evaluate(rates) == sorted(before, reverse=True)
        b.page.locator("[data-table=t-cells]").fill("ulysses causal")
        visible = b.page.locator("#t-cells tbody tr:visible")
        assert visible.count() == 4
        assert all("ulysses" in row and "causal" in row for row in visible.all_inner_texts())
        assert b.complaints == []
