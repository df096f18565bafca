"""Reports: every figure where its question arises, numbers that are those of the store, one page that needs nothing else."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from lcbench.commands import results
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.grid.labels import labels
from lcbench.report import published
from lcbench.report.drawing import Drawn
from lcbench.report.figures import all_figures
from lcbench.report.frame import over_seeds, rate_of, reported
from lcbench.report.page import HERE, LIBRARIES, write_report
from lcbench.report.parts import least_bytes, split
from lcbench.report.tables import rate_tables
from lcbench.report.winners import winners
from lcbench.runs.attempt import Failure
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from tests.report.made import made_sweep

CP = [
    "cp=ring,ulysses,usp", "mask=full,causal", "seqlen=null", "seqlen_per_rank=8k", "scale=1x8,2x8,4x8,12x8", "heads=64x8x128",
]  # fmt: skip
KERNELS = ["kernel=sdpa_flash,flash_attn3", "cp=none", "mask=full,causal,sliding_window", "seqlen=8k,32k", "heads=64x8x128"]


def good(sweep: Sweep) -> pd.DataFrame:
    frame = reported(sweep)
    return frame[frame["status"] == "ok"]


def figures(sweep: Sweep) -> dict[str, Drawn]:
    return {f.name: f for f in all_figures(reported(sweep), known_devices(), {"between nodes": 45.0})}


@pytest.mark.slow
def test_a_sweep_over_scales_has_scaling_heat_map_split_and_roofline(tmp_path: Path) -> None:
    drawn = figures(made_sweep(tmp_path, "cp", CP))
    kinds = {figure.kind for figure in drawn.values()}
    assert kinds == {"rate-by-gpus", "efficiency", "mask-by-strategy", "ranking", "time-split", "roofline", "phases-by-gpus"}
    assert "rate-by-gpus_weak-8k" in drawn


@pytest.mark.slow
def test_a_sweep_of_kernels_has_lengths_memory_and_mask_by_kernel(tmp_path: Path) -> None:
    drawn = figures(made_sweep(tmp_path, "kernels", KERNELS))
    kinds = {figure.kind for figure in drawn.values()}
    assert kinds == {"rate-by-length", "memory-by-length", "mask-by-kernel", "roofline", "phases-by-length"}


@pytest.mark.slow
def test_published_figures_are_drawn_beside_the_same_problem_only_and_say_what_they_are(tmp_path: Path) -> None:
    drawn = figures(made_sweep(tmp_path, "same", KERNELS))
    beside = drawn["phases-by-length_1x1"].caption
    assert "not the paper's own runs" in beside
    assert "mean over ranks" in beside
    assert not any("not the paper" in figure.caption for figure in drawn.values() if figure.kind == "rate-by-length")
    heads = figures(made_sweep(tmp_path, "heads", [*KERNELS[:-1], "heads=32x8x128"]))
    assert "not the paper" not in heads["phases-by-length_1x1"].caption
    assert "not the paper" in figures(made_sweep(tmp_path, "cp", CP))["phases-by-gpus_weak-8k"].caption
    cpu = made_sweep(tmp_path, "cpu", KERNELS, provenance={"device": "Intel(R) Xeon(R)", "cuda": None})
    assert "not the paper" not in figures(cpu)["phases-by-length_1x1"].caption


def test_published_data_is_whole() -> None:
    kernels, strategies = published.kernels(), published.strategies()
    assert len(strategies) == 8 * 2 * 2 * 4
    assert strategies["cp"].nunique() == 8
    fa3 = kernels[(kernels["kernel"] == "FA3") & (kernels["mask"] == "causal_document") & (kernels["phase"] == "backward")]
    assert dict(zip(fa3["seqlen"], fa3["tflops_per_gpu"], strict=True)) == {8192: 320, 32768: 425}
    assert not kernels.isna().any().any()
    assert kernels["tflops_per_gpu"].between(5, 989).all()


GRID = ["cp=ring,ulysses", "mask=causal", "seqlen=64k,128k", "scale=1x8"]


def times_of(ratio: float) -> Callable[[Cell], float]:
    """Factors that make ring's time, on average, ``ratio`` times that of ulysses, whatever rate ``made_sweep`` gives each."""
    rate = {cp: 400 + zlib.crc32(f"{cp} sdpa_flash".encode()) % 200 for cp in ("ring", "ulysses")}
    return lambda cell: rate[cell.config["cp"]["name"]] / 500 * (ratio if cell.config["cp"]["name"] == "ring" else 1.0)


def test_the_winner_has_a_margin_and_says_if_it_is_noise(tmp_path: Path) -> None:
    quiet = winners(good(made_sweep(tmp_path, "quiet", GRID, noise=0.001, factor_of=times_of(1.1))))
    assert [(w.verdict, w.why) for w in quiet] == [("clear", "")] * 2
    assert all(w.margin is not None and w.margin.value > 1 and w.p < 0.05 for w in quiet)
    assert all(re.fullmatch(r"\+\d+\.\d % \(\d+\.\d to \d+\.\d\)", w.slower) for w in quiet)
    loud = winners(good(made_sweep(tmp_path, "loud", GRID, noise=1.0)))
    assert any((w.verdict, w.why) == ("close", "within the noise") for w in loud)
    (alone,) = winners(good(made_sweep(tmp_path, "alone", ["seqlen=64k", "scale=1x8"])))
    assert (alone.verdict, alone.why, alone.slower) == ("only one ran", "", "")


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("run_to_run", [0.0, 0.012])
@pytest.mark.slow
def test_a_difference_of_three_in_a_thousand_is_never_clear(tmp_path: Path, blocks: int, run_to_run: float) -> None:
    grid = [*GRID[:2], "seqlen=range(16384,540672,16384)", GRID[3]]
    sweep = made_sweep(tmp_path, "s", grid, noise=1e-4, run_to_run=run_to_run, blocks=blocks, factor_of=times_of(1.003))
    found = winners(good(sweep))
    assert len(found) == 32
    assert {w.verdict for w in found} == {"close"}
    if blocks == 1:
        assert all("run-to-run noise not measured" in w.why for w in found)
    elif not run_to_run:  # it is known to the tenth of a percent, and matters to nobody
        assert {w.why for w in found} == {"less than 2%"}


def test_run_to_run_noise_that_was_not_measured_leaves_large_differences_clear_and_is_said(tmp_path: Path) -> None:
    for ratio, verdict in ((1.05, "close"), (1.5, "clear")):
        old = made_sweep(tmp_path, str(ratio), GRID, noise=1e-3, blocks=1, factor_of=times_of(ratio))
        assert {(w.verdict, w.why) for w in winners(good(old))} == {(verdict, "run-to-run noise not measured")}
        assert all("run-to-run noise not measured" in w.row()["verdict"] for w in winners(good(old)))


def test_a_margin_of_several_times_is_said_as_such(tmp_path: Path) -> None:
    (winner, _) = winners(good(made_sweep(tmp_path, "s", GRID, factor_of=times_of(4.4))))
    assert re.fullmatch(r"4\.[34]\dx \(4\.[234]\dx to 4\.[3456]\dx\)", winner.row()["next is slower by"])


def test_a_verdict_names_the_choice_that_it_rests_on(tmp_path: Path) -> None:
    frame = good(made_sweep(tmp_path, "three", ["cp=ring,ulysses,usp", "mask=causal", "seqlen=64k", "scale=1x8"], noise=0.001))
    ranked = frame.sort_values("time/total/median_s")
    last = ranked.index[-1]
    frame.at[last, "timed/total"] = replace(frame.at[last, "timed/total"], sigma=3.0)  # slow, and nobody knows how slow
    (winner,) = winners(frame)
    assert winner.margin is not None
    assert winner.margin.low > 1  # ahead of the next, beyond its noise
    assert (winner.verdict, winner.why) == ("close", f"within the noise of {ranked.iloc[-1]['choice']}")


@pytest.mark.slow
def test_figures_say_whether_run_to_run_noise_was_measured(tmp_path: Path) -> None:
    grid = ["cp=ring,ulysses,usp", "mask=causal", "seqlen=64k,128k", "scale=1x8"]
    old = made_sweep(tmp_path, "old", grid, noise=0.001, blocks=1)
    assert "without the run-to-run noise, which was not measured" in figures(old)["rate-by-length_1x8"].caption
    # Cells whose job ended before their second block have the noise of the others.
    new = made_sweep(tmp_path, "old", [*grid[:2], "seqlen=256k,512k", grid[3]], noise=0.001)
    assert all(w.known for w in winners(good(new)))
    assert "Bars: 95 % interval with run-to-run noise." in figures(new)["rate-by-length_1x8"].caption


def test_a_choice_is_named_by_what_differs_and_a_problem_is_not_split_by_it(tmp_path: Path) -> None:
    grid = ["cp=usp", "cp.ulysses_degree=2,4", "reduce_dtype=float32,input", "seqlen=64k", "scale=1x8", "mask=causal_document"]
    frame = reported(made_sweep(tmp_path, "s", grid))
    assert set(frame["choice"]) == {f"usp(ulysses_degree={d}) + {t}" for d in (2, 4) for t in ("float32", "input")}
    assert frame["problem"].nunique() == 1
    assert set(frame["what_mask"]) == {"causal_document(web_text)"}


def test_rates_by_mean_over_ranks_are_those_of_shorter_times(tmp_path: Path) -> None:
    frame = good(made_sweep(tmp_path, "s", ["seqlen=64k", "scale=1x8"]))
    assert frame["total_by_mean"].iloc[0] == pytest.approx(frame["compute/tflops_per_gpu"].iloc[0] / 0.97, rel=0.02)
    rate = rate_of(frame.iloc[0])
    assert rate.low <= rate.value <= rate.high


@pytest.mark.slow
def test_the_parts_of_an_iteration_add_up_to_it(tmp_path: Path) -> None:
    frame = good(made_sweep(tmp_path, "s", CP))
    parts = split(frame)
    assert parts is not None
    assert (parts >= 0).all().all()
    assert parts.sum(axis=1).to_numpy() == pytest.approx(frame.loc[parts.index, "time/total/median_s"].to_numpy(), rel=0.05)


def test_least_bytes_by_hand() -> None:
    row = {"dtype": "bfloat16", "tokens_per_rank": 10, "num_heads_q": 4, "num_heads_kv": 2, "head_dim": 8, "direction": "forward"}
    assert least_bytes(row) == 2 * (2 * 320 + 2 * 160)  # q and out, k and v
    # Those again, with dout and dq, dk and dv.
    assert least_bytes(row | {"direction": "forward_backward"}) == 2 * (960 + 960 + 2 * 320 + 2 * 160)


@pytest.mark.slow
def test_tables_have_the_papers_layout_in_three_formats(tmp_path: Path) -> None:
    hang = Failure("oom", "out of memory", 0)
    sweep = made_sweep(tmp_path, "s", CP, failed={"ring sdpa_flash causal 768k": hang})
    tables = {t.name: t for t in rate_tables(reported(sweep))}
    # 8k tokens per GPU make one length for each scale.
    assert {name for name in tables if "by-gpus" in name} == {f"{phase}-by-gpus_8k" for phase in ("total", "forward", "backward")}
    assert {"total-by-length_1x8", "total-by-length_12x8"} <= set(tables)
    table = tables["forward-by-gpus_8k"]
    assert list(table.rows.index) == ["ring", "ulysses", "usp"]
    assert list(table.rows.columns) == [(mask, ranks) for mask in ("full", "causal") for ranks in (8, 16, 32, 96)]
    assert table.rows.loc["ring", ("causal", 96)] == "oom"
    assert table.rows.loc["ulysses", ("full", 96)] == "-"
    latex = table.text("tex")
    assert all(word in latex for word in (r"\toprule", r"\multicolumn{4}{c}{full}", r"\bottomrule"))
    lines = table.text("md").splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert table.text("csv").count("\n") == 4
    with pytest.raises(ValueError, match="md, csv, tex"):
        table.text("doc")


class Outside(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith(("data:", "#"))]


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_says_what_did_not_run(tmp_path: Path) -> None:
    hang = Failure("hang", "rank 3 <waits> for rank 4", 3)
    sweep = made_sweep(tmp_path, "s", CP, failed={"usp sdpa_flash full 64k": hang})
    report = write_report(sweep, tmp_path / "out", known_devices())
    text = report.page.read_text()
    parser = Outside()
    parser.feed(text)
    assert parser.found == []
    for library in LIBRARIES:
        text = text.replace((HERE / "vendor" / library).read_text(), "")
    assert not re.search(r"https?://", text)
    assert "rank 3 &lt;waits&gt; for rank 4" in text
    assert "cannot split 64 query heads evenly over 96 ranks" in text
    assert all(count in text for count in ("21 ok", ">1 failed<", ">2 cannot run<"))
    assert {p.suffix for p in report.files} == {".html", ".md", ".csv", ".tex"}
    assert all(p.stat().st_size > 0 for p in report.files)


def test_a_sweep_without_a_good_cell_still_has_a_report(tmp_path: Path) -> None:
    broken = made_sweep(tmp_path, "s", ["seqlen=64k", "scale=1x8"], failed={"": Failure("crash", "it broke", 0)})
    report = write_report(broken, tmp_path / "out", known_devices())
    assert "it broke" in report.page.read_text()
    assert report.figures == 0


def test_cells_from_different_environments_are_warned_of(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "s", ["cp=ring", "seqlen=64k", "scale=1x8"])
    made_sweep(tmp_path, "s", ["cp=usp", "seqlen=64k", "scale=1x8"], provenance={"device": "NVIDIA A100"})
    text = write_report(sweep, tmp_path / "out", known_devices()).page.read_text()
    assert "device differs between cells (NVIDIA A100, NVIDIA H100 80GB HBM3)" in text


@pytest.mark.slow
def test_seeds_are_one_line_and_the_median_is_drawn(tmp_path: Path) -> None:
    frame = reported(made_sweep(tmp_path, "s", [*KERNELS, "seed=range(5)"]))
    one = over_seeds(frame)
    assert len(one) * 5 == len(frame)
    for _, rows in frame.groupby(["choice", "what_mask", "seqlen"]):
        assert rows["time/total/median_s"].median() in set(one["time/total/median_s"])
    assert len(winners(frame)) == 3 * 2 * 5
    assert {w.setting for w in winners(frame)} == {f"heads 64x8x128, seed {seed}" for seed in range(5)}


def test_cells_that_share_a_label_are_told_apart_by_what_differs() -> None:
    cells = [p.cell for p in look(["cp=usp", "cp.ulysses_degree=2,4", "dtype=float16,bfloat16", "seqlen=64k", "scale=1x8"]).cells]
    cells += [p.cell for p in look(["cp=ring", "seqlen=64k", "scale=1x8"]).cells]
    named = labels(cells)
    assert len(set(named.values())) == 5
    assert "usp sdpa_flash causal 64k 1x8 cp.ulysses_degree=2 dtype=float16" in named.values()
    assert "ring sdpa_flash causal 64k 1x8" in named.values()
    heads = labels(p.cell for p in look(["heads=8x8x64,16x8x64", "seqlen=64k", "scale=1x8"]).cells)
    assert {label.partition("1x8 ")[2] for label in heads.values()} == {"heads=8x8x64", "heads=16x8x64"}


@pytest.mark.parametrize("also", [["seqlen=64k,128k"], ["seqlen=64k", "mask=causal,causal_document"], ["seqlen=64k", "seed=1,2"]])
@pytest.mark.slow
def test_what_there_is_no_word_for_is_empty_and_never_nan(tmp_path: Path, also: list[str]) -> None:
    grid = ["cp=ring,ulysses,none", "kernel=sdpa_flash", "scale=1x8,1x1", "heads=12x4x64", *also]  # 12 heads over 8 ranks: skipped
    sweep = made_sweep(tmp_path, "s", grid, failed={"ring": Failure("oom", "out of memory", 0)})
    planned = [Entry(p.cell, p.skip) for p in look([*grid, "dtype=float16"]).cells]
    sweep.add(planned, command=grid)  # never tried
    frame = reported(sweep)
    assert set(frame["status"]) == {"ok", "failed", "skipped", "missing"}
    for text in ("failure", "cause", "no_speed", "device", "nodes", "host", "slurm_job_id", "commit"):
        assert all(isinstance(value, str) for value in frame[text]), text
    page = re.sub(
        r"(?s)<(script|style).*?</\1>|base64,[^\"]*", "", write_report(sweep, tmp_path / "out", known_devices()).page.read_text()
    )
    shown = [page, *(path.read_text() for path in (tmp_path / "out" / "tables").iterdir())]
    for form in ("csv", "json"):
        for attempts in ("newest", "all"):
            out = tmp_path / f"{attempts}.{form}"
            assert results.main(["s", "--out", str(out), "--attempts", attempts, "--results", str(tmp_path)]) == 0
            shown.append(out.read_text())
    for text in shown:
        assert not re.search(r"(?i)\bnan\b", text), re.search(r"(?i).{80}\bnan\b.{80}", text)
