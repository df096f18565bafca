"""The report's page in a real browser: what it answers first, what a filter leaves, where addresses lead, by keys, in print."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.report import amounts
from lcbench.report.frame import good_rows, reported
from lcbench.report.page import Report, write_report
from lcbench.report.regret import regrets
from lcbench.runs.attempt import Failure
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from tests.browser import Browser, browser, needs_browser
from tests.report.made import made_sweep

pytestmark = [pytest.mark.slow]

VISIBLE = "[...document.querySelectorAll('#rows tr.row')].filter(r => !r.hidden).length"
TEXTS = "selector => [...document.querySelectorAll(selector)].filter(e => e.offsetParent).map(e => e.textContent)"
WIDER = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def written(big: Sweep, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, float]:
    """The report of the big sweep and the seconds of CPU that it took."""
    devices, begun = known_devices(), time.process_time()
    return write_report(big, tmp_path_factory.mktemp("report"), devices), time.process_time() - begun


@pytest.fixture(scope="module")
def page(written: tuple[Report, float]) -> Path:
    return written[0].page


@pytest.fixture
def shown(page: Path) -> Iterator[Browser]:
    """The page of the big sweep, without a network."""
    with browser(1440, 900) as b:
        b.page.context.set_offline(True)
        b.page.goto(page.as_uri())
        yield b
        assert b.complaints == []


def visit(b: Browser, page: Path, place: str) -> None:
    b.page.goto("about:blank")
    b.page.goto(f"{page.as_uri()}#{place}")


def drawn(b: Browser) -> str:
    """The words in the figure that is looked at."""
    return b.page.text_content("figure svg[role=img]") or ""


def write(tmp_path: Path, grid: list[str], **more: Any) -> Path:
    return write_report(made_sweep(tmp_path, "s", grid, **more), tmp_path / "out", known_devices()).page


# -- without a browser -----------------------------------------------------------------------------------------------


def test_512_cells_are_one_page_of_less_than_1_5_mb_written_in_less_than_15_s(written: tuple[Report, float]) -> None:
    report, seconds = written
    assert seconds < 15
    assert report.page.stat().st_size < 1.5e6
    assert (report.cells, report.figures) == (512, 0)


def test_what_is_written_has_no_nan_beside_words_that_are_missing(tmp_path: Path) -> None:
    page = write(tmp_path, ["cp=ring,usp", "seqlen=64k", "scale=1x8"], failed={"usp": Failure("oom", "out of memory", 0)})
    texts = {path.name: path.read_text() for path in page.parent.rglob("*") if path.suffix in (".md", ".csv", ".tex")}
    texts["page"] = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert len(texts) > 6
    for name, text in texts.items():
        assert not re.search(r"\bnan\b", text, re.IGNORECASE), name


def test_the_page_answers_without_scripts(page: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert re.search(r"<b>Use \w+\.</b> Over \d+ problems it takes on average 1\.\d\dx", text)
    assert text.count('<th scope="rowgroup"') == 4  # masks
    assert "--exclude node003" in text
    assert "8 of 13 failures name node003" in text


def test_figures_are_files_only_if_asked_for(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "s", ["cp=ring,usp", "mask=full,causal", "seqlen=64k,128k", "scale=1x8"])
    without = write_report(sweep, tmp_path / "without", known_devices())
    assert not {p.suffix for p in without.files} & {".png", ".pdf"}
    drawn = write_report(sweep, tmp_path / "with", known_devices(), figures=True)
    assert drawn.figures == len([p for p in drawn.files if p.suffix == ".png"]) > 1


def test_rates_of_a_cpu_are_in_a_unit_of_their_size(tmp_path: Path) -> None:
    grid = ["cp=none", "kernel=naive,flex", "seqlen=256", "heads=2x2x8", "dtype=float32"]
    page = write(tmp_path, grid, factor_of=lambda cell: 3e4, provenance={"cuda": None, "device": "Xeon"})
    text = page.read_text()
    assert "GFLOP/s per GPU" in text
    assert '"rate":{"name":"GFLOP/s","flops":1000000000.0}' in text
    rates = [float(rate) for rate in re.findall(r'"total_rate":\[([\d.]+),([\d.]+)\]', text)[0]]
    assert all(5 < rate < 50 for rate in rates)  # 400 to 600 TFLOP/s over 30,000


def test_a_sweep_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "new")
    planned = look(["cp=ring,usp", "seqlen=64k,128k", "scale=1x8"]).cells
    sweep.add([Entry(p.cell, p.skip) for p in planned], command=["x"])
    text = write_report(sweep, tmp_path / "out", known_devices()).page.read_text()
    assert "4 without a result" in text
    assert "No cell has a good result yet." in text


# -- in a browser ------------------------------------------------------------------------------------------------------


@needs_browser
def test_windows_of_one_chromium_have_neither_stores_nor_complaints_of_another(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>localStorage.seen = (localStorage.seen || '') + 'x'; console.error(localStorage.seen)</script>")
    said = []
    for _ in range(2):
        with browser() as b:
            b.page.goto(page.as_uri())
            said.append(b.complaints)
            b.page.context.set_offline(True)
    assert said == [["x"], ["x"]]


# -- first screen ----------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("width", [1440, 800])
def test_the_first_screen_says_what_to_use_by_how_much_and_of_how_many(page: Path, width: int) -> None:
    with browser(width, 900) as b:
        b.page.goto(page.as_uri())
        box = b.page.locator("#verdict").bounding_box()
        assert box["y"] + box["height"] < 900
        assert re.search(r"Use \w+\. Over \d+ problems .* 1\.\d\dx", b.page.inner_text("#verdict"))
        assert not b.page.evaluate(WIDER)
        assert b.complaints == []


@needs_browser
def test_at_1440_the_first_screen_holds_every_problem(shown: Browser) -> None:
    box = shown.page.locator("#matrix").bounding_box()
    assert box["y"] + box["height"] <= 900
    assert box["x"] + box["width"] <= 1440
    assert shown.page.locator("#matrix td a").count() == 64


@needs_browser
def test_one_problem_has_a_ranking_first_whose_first_label_is_the_winner(tmp_path: Path) -> None:
    grid = ["kernel=sdpa_flash,flash_attn3", "cp=ring,ulysses,usp", "mask=causal", "seqlen=64k", "scale=1x8"]
    page = write(tmp_path, grid, failed={"usp flash_attn3": Failure("hang", "it waits", 0)})
    best = good_rows(reported(Sweep(tmp_path, "s"))).sort_values("time/total/median_s").iloc[0]["choice"]
    with browser(1440, 900) as b:
        b.page.goto(page.as_uri())
        assert b.page.locator("#figure-ranking").count() == 1
        labels = b.page.evaluate(
            "[...document.querySelectorAll('#figure-ranking svg [aria-label^=\"y-axis tick label\"] text')].map(t => t.textContent)"
        )
        assert labels[0] == best
        assert labels[-1] == "usp + flash_attn3"
        assert b.page.locator("#figure-ranking svg [aria-label=bar] rect").count() == len(labels) - 1
        assert "✕ hang" in b.page.inner_text("#figure-ranking")
        assert best in b.page.inner_text("#verdict")
        b.page.click("#tab-heat")
        assert re.search("kernel . strategy", b.page.inner_text("#figure"))
        assert b.complaints == []


# -- filters and addresses -------------------------------------------------------------------------------------------


@needs_browser
def test_an_address_with_facets_shows_only_these_cells_and_figures(shown: Browser, page: Path) -> None:
    visit(shown, page, "mask=causal&scale=2x8")
    assert shown.page.evaluate(VISIBLE) == 32
    assert shown.page.evaluate(TEXTS, "#matrix tbody th") == ["causal", "2x8"]
    places = shown.page.evaluate(TEXTS, "#regret tbody td:nth-child(5)")
    assert len(places) == 8
    assert all(re.fullmatch(r"causal \d+k 2x8", place) for place in places)
    assert "Over these 4 problems" in shown.page.inner_text("#verdict")
    assert "by GPUs" not in shown.page.evaluate(TEXTS, "[role=tab]")
    figure = shown.page.inner_text("#figure")
    assert "causal" in figure
    assert "sliding_window" not in figure
    assert "1x8" not in figure
    shown.page.click("[data-chip='mask=full']")
    assert "mask=full" in shown.page.url
    assert shown.page.evaluate(VISIBLE) == 64
    shown.page.click("#narrowed button")
    assert "mask" not in shown.page.url
    assert shown.page.evaluate(VISIBLE) == 512
    assert shown.page.locator("#matrix td a").count() == 64  # as Python wrote it
    assert "Over 6" in shown.page.inner_text("#verdict")
    visit(shown, page, "mask=causal&scale=2x8&length=64k")
    assert not shown.page.is_visible("#verdict")  # one problem


@needs_browser
def test_under_no_filter_the_script_finds_the_regrets_and_winners_that_python_does(shown: Browser, big: Sweep) -> None:
    expected = regrets(good_rows(reported(big)))
    found = shown.page.evaluate("regretsOf(CELLS.filter(isGood))")
    assert [r["choice"] for r in found] == [r.choice for r in expected]
    for mine, its in zip(found, expected, strict=True):
        assert (mine["mean"], mine["worst"]) == pytest.approx((its.mean, its.worst), rel=1e-3)
        assert mine["worstCell"]["id"] == its.worst_cell
        assert [mine[key] for key in ("fastest", "ran", "compared", "problems")] == [
            its.fastest,
            its.ran,
            its.compared,
            its.problems,
        ]
    links = "e => [...e.querySelectorAll('td a')].map(a => a.getAttribute('href'))"
    again = shown.page.evaluate(f"({links})(h('table', {{}}, matrixOf(winnersOf(CELLS.filter(isGood)))))")
    assert again == shown.page.locator("#matrix").evaluate(links)


@needs_browser
@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("2x8", 128),
        ("ring", 64),
        ("ulysses 64k 1x8", 4),
        ("64k", 128),
        ('"ring"', 128),
        ("sliding full", 0),
        ("RING", 64),
        ("failed", 13),
    ],
)
def test_a_word_is_an_entry_or_its_beginning(shown: Browser, words: str, count: int) -> None:
    shown.page.fill("#text", words)
    assert shown.page.evaluate(VISIBLE) == count


@needs_browser
def test_rows_sort_by_what_they_mean(tmp_path: Path) -> None:
    grid = ["cp=ring", "mask=full", "seqlen=1m,64k,512k", "scale=12x8,2x8,1x8"]
    page = write(tmp_path, grid, failed={"ring sdpa_flash full 64k 2x8": Failure("oom", "out of memory", 0)})
    with browser(1440, 900) as b:
        b.page.goto(page.as_uri())

        def column(name: str) -> list[str]:
            b.page.locator("#rows thead button", has_text=re.compile(f"^{name}$")).click()
            heads = b.page.evaluate("[...document.querySelectorAll('#rows thead th')].map(e => e.textContent)")
            place = heads.index(name)
            return b.page.evaluate(
                "i => [...document.querySelectorAll('#rows tbody tr')].map(r => r.cells[i].textContent)",
                place,
            )

        assert list(dict.fromkeys(column("length"))) == ["64k", "512k", "1m"]
        assert list(dict.fromkeys(column("scale"))) == ["1x8", "2x8", "12x8"]
        b.page.locator("#rows thead button", has_text=re.compile("^time$")).click()
        seconds = b.page.evaluate("[...document.querySelectorAll('#rows tbody tr')].map(r => r.cell.total)")
        assert seconds == [None, *sorted(s for s in seconds if s is not None)]
        assert b.page.locator("#rows th[aria-sort=ascending]").inner_text() == "time"


@needs_browser
@pytest.mark.parametrize("width", [1440, 800])
def test_after_a_link_its_heading_is_below_the_bar(page: Path, width: int) -> None:
    with browser(width, 900) as b:
        b.page.goto(page.as_uri())
        for link in b.page.locator("nav a").all():
            link.click()
            section = link.get_attribute("href").removeprefix("#")
            top, bottom, y, until = b.page.evaluate(
                """id => { const bar = document.querySelector('.side').getBoundingClientRect(), wide = bar.height > innerHeight / 2;
                   const head = document.getElementById(id).querySelector('h2').getBoundingClientRect();
                   return [head.top, wide ? 0 : bar.bottom, scrollY, document.documentElement.scrollHeight - innerHeight]; }""",
                section,
            )
            assert top >= bottom, section
            assert top < bottom + 120 or y >= until - 1, section  # or the page ends before


@needs_browser
def test_the_address_of_a_cell_opens_it_and_every_failure_leads_to_one(shown: Browser, page: Path) -> None:
    links = shown.page.evaluate(
        "[...document.querySelectorAll('#causes a, #matrix a, #regret a')].map(a => a.getAttribute('href').slice(1))"
    )
    assert shown.page.evaluate("ids => ids.every(id => document.getElementById(id)?.classList.contains('row'))", links)
    failed = shown.page.evaluate("CELLS.filter(c => c.status === 'failed').map(c => `c-${c.id}`)")
    assert set(failed) <= set(links)
    good = shown.page.evaluate("CELLS.filter(isGood)[200].id")
    for cell in (good, failed[0].removeprefix("c-")):
        visit(shown, page, f"c-{cell}")
        row = shown.page.locator(f"#c-{cell}")
        assert "open" in row.get_attribute("class")
        box = row.bounding_box()
        assert 0 <= box["y"] < 900
    detail = shown.page.inner_text("tr.detail")
    assert "lcbench.logs" in detail
    assert failed[0].removeprefix("c-") in detail
    visit(shown, page, f"c-{good}")
    detail = shown.page.inner_text("tr.detail")
    assert all(
        part in detail for part in ("Phases", "Iterations by block", "Ranks", "Overlap", "Attempts", "Commands", "lcbench.rerun")
    )
    # A link out of a filter to a cell that it hides shows the cell.
    visit(shown, page, "mask=full")
    shown.page.click(f"#causes a[href='#{failed[-1]}']") if shown.page.locator(
        f"#causes a[href='#{failed[-1]}']"
    ).is_visible() else None
    hidden = shown.page.evaluate("CELLS.find(c => c.mask === 'causal').id")
    shown.page.evaluate(f"goTo('c-{hidden}')")
    assert shown.page.locator(f"#c-{hidden}").is_visible()


@needs_browser
def test_a_csv_has_the_cells_that_are_filtered(shown: Browser, page: Path) -> None:
    visit(shown, page, "mask=causal&scale=2x8&words=usp")
    with shown.page.expect_download() as got:
        shown.page.click("#csv")
    lines = Path(got.value.path()).read_text().splitlines()
    assert len(lines) == 1 + 4
    assert lines[0].split(",")[:3] == ["id", "label", "status"]
    assert all(",usp," in line for line in lines[1:])


@needs_browser
def test_whatever_results_say_is_text(tmp_path: Path) -> None:
    evil = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> =1+1"
    page = write(
        tmp_path, ["cp=ring,usp", "seqlen=64k", "scale=1x8"], failed={"usp": Failure("crash", evil, 0)}, provenance={"device": evil}
    )
    with browser(1440, 900) as b:
        b.page.goto(page.as_uri())
        b.page.locator("tr.row").nth(1).click()
        assert b.page.evaluate("window.hacked === undefined")
        assert evil in b.page.inner_text("#rows")
        assert evil in b.page.inner_text("#causes")
        assert b.page.evaluate("csvEntry('=1+1,\"x\"')") == '"\'=1+1,""x"""'
        assert b.complaints == []


# -- figures ---------------------------------------------------------------------------------------------------------


@needs_browser
def test_every_question_has_its_figure_and_each_says_what_it_shows(shown: Browser) -> None:
    tabs = shown.page.evaluate("[...document.querySelectorAll('[role=tab]')].map(t => t.id)")
    kinds = {"length", "gpus", "efficiency", "ranking", "heat", "memory", "pareto", "time", "roofline", "table"}
    assert {tab.removeprefix("tab-") for tab in tabs} == kinds
    for tab in tabs:
        shown.page.click(f"#{tab}")
        assert shown.page.locator("figcaption b").inner_text()
        for picture in shown.page.locator("figure svg[role=img]").all():
            said = picture.get_attribute("aria-label")
            assert re.search(r"\d", said), said
        assert len(shown.page.locator("figure svg[role=img]").all()) >= (0 if tab == "tab-table" else 1)
        kind = {"ranking": "bar", "time": "bar", "heat": "cell"}.get(tab.removeprefix("tab-"), "dot")
        # Of every choice there is a mark; a figure of words and axes alone would still say what it shows.
        assert tab == "tab-table" or shown.page.locator(f"figure svg[role=img] [aria-label={kind}] > *").count() >= 7, tab


@needs_browser
def test_a_choice_looks_the_same_in_every_figure_whatever_ran(shown: Browser) -> None:
    seen: dict[str, set[tuple[str, str]]] = {}
    for place in (
        "fig=length",
        "fig=gpus",
        "fig=efficiency",
        "fig=memory",
        "fig=roofline",
        "fig=length&.scale=8x8",
        "fig=memory&.scale=8x8",
    ):
        shown.page.evaluate(f"location.hash = '.{place}'")
        shown.page.wait_for_timeout(50)
        found = shown.page.evaluate(
            "[...document.querySelectorAll('.legend [data-choice]')].map(({dataset: d}) => [d.choice, d.color, d.symbol])"
        )
        assert len(found) == 8 - ("8x8" in place)  # ulysses cannot run there
        for choice, color, symbol in found:
            seen.setdefault(choice, set()).add((color, symbol))
    assert len(seen) == 8
    assert all(len(looks) == 1 for looks in seen.values())
    assert len(set.union(*seen.values())) == 8


@needs_browser
def test_a_failed_cell_leaves_its_class_and_panels_share_their_axis(shown: Browser, page: Path) -> None:
    visit(shown, page, ".fig=length")
    assert drawn(shown).count("✕ oom") == 4
    assert shown.page.locator("figure svg[role=img] [aria-label='y-axis tick label']").count() == 1  # one axis for four panels
    titles = drawn(shown)
    assert all(mask in titles for mask in ("full", "causal", "sliding_window", "causal_document(long_text_64k)"))
    shown.page.select_option("[data-pick=show]", "relative to the best")
    assert ".show=relative" in shown.page.url
    best = shown.page.evaluate("d3.max(linePoints(CELLS.filter(c => c.scale === '1x8'), 'seqlen', 'total', true), p => p.y)")
    assert best == pytest.approx(100)


@needs_browser
def test_a_choice_without_the_fewest_gpus_is_no_100_percent_of_them(shown: Browser, page: Path) -> None:
    visit(shown, page, ".fig=efficiency")
    said = drawn(shown)
    assert "tokenring (from 16)" in said
    hollow = shown.page.evaluate(
        "[...document.querySelectorAll('figure [aria-label=dot] *')].filter(e => e.getAttribute('fill') === 'var(--back)').length"
    )
    assert hollow == 3  # tokenring on 16, 32 and 64 GPUs


@needs_browser
def test_memory_has_ticks_of_powers_of_two_and_the_device(shown: Browser, page: Path) -> None:
    visit(shown, page, ".fig=memory")
    ticks = shown.page.evaluate(
        "[...document.querySelectorAll('figure svg [aria-label=\"y-axis tick label\"] text')].map(t => t.textContent)"
    )
    assert len(ticks) >= 3
    assert all(float(tick).hex().startswith("0x1.0000000000000p") for tick in ticks)
    assert "= … (8)" in drawn(shown)
    assert "The device has 74.5 GiB (dashed)" in shown.page.inner_text("figcaption")


@needs_browser
def test_published_figures_are_drawn_beside_the_same_problem_only(tmp_path: Path) -> None:
    kernels = ["kernel=sdpa_flash,flash_attn3", "cp=none", "mask=full,causal", "seqlen=8k,32k", "site=plain"]
    for heads, beside in (("64x8x128", True), ("32x8x128", False)):
        page = write(tmp_path / heads, [*kernels, f"heads={heads}"])
        with browser(1440, 900) as b:
            b.page.goto(f"{page.as_uri()}#.fig=length&.phase=forward")
            assert ("publ. FA3" in drawn(b)) is beside
            assert ("not the paper's own runs" in b.page.inner_text("figcaption")) is beside


# -- numbers, keys, print, dark --------------------------------------------------------------------------------------


@needs_browser
def test_numbers_are_for_people_and_the_scripts_are_those_of_python(shown: Browser) -> None:
    words = shown.page.inner_text("body")
    assert not re.search(r"\de\+0", words)
    assert not re.search(r"\bnan\b|undefined|\bnull\b|NaN", words)
    assert "number" not in (shown.page.locator("#environment td", has_text="2.13.0").get_attribute("class") or "")
    values = [0, 0.000123, 0.00123, 0.5, 0.9996, 1, 4.5, 61.27, 999.6, 1023.9 * 1024, 3340.4, 999999, 1234567, 5.5e9, 8e10, 3e-7]
    for script, python in (
        ("digits", amounts.digits), ("seconds", amounts.duration), ("bytes", amounts.size), ("percent", amounts.percent),
        ("times", amounts.times),
        ("more", amounts.more),
    ):  # fmt: skip
        assert shown.page.evaluate(f"values => values.map(v => {script}(v))", values) == [python(v) for v in values], script


@needs_browser
def test_by_keys_alone_one_sorts_opens_a_cell_and_turns_to_a_figure(shown: Browser) -> None:
    keys = shown.page.keyboard
    shown.page.locator("#rows thead button").nth(1).focus()
    keys.press("Tab")
    keys.press("Enter")
    assert shown.page.locator("#rows th[aria-sort=ascending]").count() == 1
    shown.page.locator("#rows .twist").first.focus()
    keys.press("Enter")
    assert shown.page.locator("tr.detail").count() == 1
    shown.page.locator("[role=tab][aria-selected=true]").focus()
    keys.press("ArrowRight")
    assert shown.page.evaluate("document.activeElement.id") == "tab-gpus"
    assert shown.page.locator("#figure-gpus").count() == 1
    shown.page.locator("[data-chip='scale=2x8']").focus()
    keys.press("Enter")
    assert shown.page.evaluate("document.activeElement.dataset.chip") == "scale=2x8"
    assert shown.page.evaluate(VISIBLE) == 128
    assert shown.page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")


@needs_browser
def test_it_prints_on_a4_and_is_dark_where_that_is_wished(page: Path) -> None:
    with browser(1047, 740) as b:  # A4 landscape without its margins, at 96 dots per inch
        b.page.emulate_media(media="print")
        b.page.goto(page.as_uri())
        assert not b.page.evaluate(WIDER)
        rights = "[...document.querySelectorAll('table')].filter(t => t.offsetParent).map(t => t.getBoundingClientRect().right)"
        assert max(b.page.evaluate(rights)) <= 1048
        assert not b.page.locator(".side").is_visible()
        b.page.emulate_media(media="screen", color_scheme="dark")
        back, text = b.page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        assert max(map(int, re.findall(r"\d+", back))) < 60 < 200 < min(map(int, re.findall(r"\d+", text)))
        assert b.complaints == []


def test_the_block_is_json_that_a_browser_reads(page: Path) -> None:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    data = json.loads(block)
    assert len(data["cells"]["id"]) == 512
    assert not set(block) & {"<", ">", "&"}
    assert set(data["styles"]) == set(data["cells"]["choice"][0])
