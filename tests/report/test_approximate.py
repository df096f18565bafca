"""What approximates wins over nothing exact, however fast it is, and stands beside the winner with its distance."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from lcbench.advice.answers import predicted_table, reasons
from lcbench.advice.ranking import MAY_WIN, rank
from lcbench.advice.sizing import Limits, sizable, smallest
from lcbench.commands.compare import main as compare_command
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.predict.predictor import Predictor
from lcbench.report.comparison import compare, side_of
from lcbench.report.frame import APPROXIMATE, closest, good_rows, rank_of, ranked, reported
from lcbench.report.front import front_of
from lcbench.report.page import write_report
from lcbench.report.palette import styles
from lcbench.report.publishing import summary_of
from lcbench.report.regret import regrets, verdict
from lcbench.report.table import by_problem, cells_table, summary
from lcbench.report.trace import rows_of, served
from lcbench.report.winners import winners
from lcbench.runs.predictions import Source
from lcbench.runs.store import Sweep
from tests.report.made import made_sweep

GRID = ["kernel=flash_attn3", "mask=causal", "seqlen=64k,128k,256k", "scale=1x8", "heads=8x8x64", "direction=forward", "site=plain"]
SLOWER = {"ring ": 1.0, "ulysses ": 1.5, "star ": 0.2, "apb": 0.3}  # star and apb are the fastest by far
OFF = {"star": 0.41, "apb": 0.13}

BOLD_CELL = r"\x1b\[1m[0-9a-f]{12}"


def far(cell: Cell) -> float | None:
    return OFF.get(cell.config["cp"]["name"])


def even(cell: Cell) -> float:
    """The factor that makes times of all strategies those of ``SLOWER``."""
    return next(factor for name, factor in SLOWER.items() if name in f"{cell.label} ")


def sweep_of(root: Path, cp: str, *words: str, name: str = "s", distance: Callable[[Cell], float | None] = far) -> Sweep:
    return made_sweep(root, name, [f"cp={cp}", *GRID, *words], factor_of=even, distance_of=distance, noise=0.001, run_to_run=0.0005)


def said(sweep: Sweep) -> str:
    seen = sweep.look()
    return printed(cells_table(seen, "s"), summary(sweep, seen, seen.records) or "")


def printed(*what: RenderableType) -> str:
    """With what makes words bold."""
    file = io.StringIO()
    Console(width=200, file=file, force_terminal=True, color_system="standard").print(*what)
    return file.getvalue()


def plainly(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("distance", [1e-6, 0.13, 2.0])
@pytest.mark.slow
def test_the_fastest_wins_only_where_it_is_exact(tmp_path: Path, distance: float) -> None:
    cp = "ring,ulysses,star"
    off = sweep_of(tmp_path, cp, name="off", distance=lambda c: distance if c.config["cp"]["name"] == "star" else None)
    for name, none in (("exact", None), ("zero", 0.0)):
        exact = sweep_of(tmp_path, cp, name=name, distance=lambda c, none=none: none)  # type: ignore[misc]
        assert {w.choice for w in winners(good_rows(reported(exact)))} == {"star"}
    found = winners(good_rows(reported(off)))
    assert [(w.choice, w.next_choice, w.verdict) for w in found] == [("ring", "ulysses", "clear")] * 3
    for winner in found:
        assert re.fullmatch(rf"star \(approximate\) takes 0\.\d+x the time, distance {distance:.2g}", winner.approximate), winner


def test_regret_is_over_the_best_exact_choice_and_names_what_approximates_last(tmp_path: Path) -> None:
    found = regrets(good_rows(reported(sweep_of(tmp_path, "star,ulysses,apb,ring"))))
    assert [r.choice.split("(")[0].strip() for r in found] == ["ring", "ulysses", "apb", "star"]
    assert [r.approximate for r in found] == [False, False, True, True]
    assert [r.distance for r in found] == [None, None, 0.13, 0.41]
    assert [r.fastest for r in found] == [3, 0, 0, 0]
    assert found[0].mean == 1.0 < found[1].mean
    assert max(r.mean for r in found[2:]) < 1.0
    text = verdict(found)
    assert text is not None
    assert text.startswith("Use ring. Over 3 problems")
    assert re.search(r"No rivals, as they approximate: apb.*distance up to 0\.13 .*, star.*, distance up to 0\.41 \(0", text), text
    # One exact choice has no rival, whatever approximates beside it.
    assert verdict(regrets(good_rows(reported(sweep_of(tmp_path, "star,ring", name="one"))))) is None


def test_what_approximates_is_in_the_order_of_its_distance_not_of_its_time(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "star,ulysses,apb,ring", "seqlen=64k")
    (problem,) = by_problem(sweep.look().records)
    names = {c: r.entry.cell.config["cp"]["name"] for c, r in sweep.look().records.items()}
    assert [names[c] for c in problem] == ["ring", "ulysses", "apb", "star"]
    assert problem[list(problem)[3]] < problem[list(problem)[2]] < 1  # star is sooner done, and further off
    good = good_rows(reported(sweep))
    assert [name.split("(")[0].strip() for name in ranked(good)["choice"]] == ["ring", "ulysses", "apb", "star"]
    assert set(closest(good, [])["what_cp"]) == {"ring", "ulysses"}
    # As close to the digits that are shown: the fastest first, exactness that nobody knows last.
    keys = {
        "slow": rank_of(2.0, 0.131, approximate=True), "fast": rank_of(1.0, 0.134, approximate=True),
        "unknown": rank_of(0.1, None, approximate=True), "exact": rank_of(9.0, 0.0, approximate=False),
    }  # fmt: skip
    assert sorted(keys, key=keys.__getitem__) == ["exact", "fast", "slow", "unknown"]


@pytest.mark.slow
def test_where_nothing_exact_ran_nothing_wins(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "star,apb")
    good = good_rows(reported(sweep))
    assert len(good) == 6
    assert winners(good) == regrets(good) == []
    assert summary_of(sweep, sweep.look()).tags["lcbench.verdict"] == "Nothing exact ran."
    assert not re.search(BOLD_CELL, said(sweep))
    assert all(math.isnan(ratio) for problem in by_problem(sweep.look().records) for ratio in problem.values())
    assert "vs best" not in said(sweep)


def test_the_terminal_ranks_by_the_best_exact_choice_and_says_what_approximates(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "star,ulysses,ring", "seqlen=64k")
    (problem,) = by_problem(sweep.look().records)
    names = {c: r.entry.cell.config["cp"]["name"] for c, r in sweep.look().records.items()}
    ratios = {names[c]: ratio for c, ratio in problem.items()}
    assert list(ratios) == ["ring", "ulysses", "star"]
    assert ratios["star"] < 1 == ratios["ring"] < ratios["ulysses"]
    assert len(re.findall(BOLD_CELL, said(sweep))) == 1
    text = plainly(said(sweep))
    assert "approximate, distance 0.41" in text
    assert re.search(r"fastest for causal 64k 1x8: ring \(ulysses", text)
    assert re.search(r"no rival for causal 64k 1x8: star \(approximate\) takes 0\.\d+x the time, distance 0\.41", text)


def test_the_server_is_told_of_exact_winners(tmp_path: Path) -> None:
    few, many = (
        sweep_of(tmp_path, "star,ulysses,ring", "seqlen=64k", name="few"),
        sweep_of(tmp_path, "star,ulysses,ring", name="many"),
    )
    tag = summary_of(few, few.look()).tags["lcbench.verdict"]
    assert tag.startswith("causal 64k 1x8: ring is fastest")
    assert "No rival: star (approximate) takes" in tag
    assert summary_of(many, many.look()).tags["lcbench.verdict"].startswith("Use ring.")


@pytest.mark.slow
def test_the_page_and_its_tables_say_it(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "star,ulysses,ring")
    page = write_report(sweep, tmp_path / "report", known_devices()).page
    text = page.read_text()
    assert "star (approximate), distance up to 0.41" in text
    assert not re.search(r"<b>[^<]*star", text)
    table = (tmp_path / "report" / "tables" / "winners.csv").read_text().splitlines()
    assert table[0].endswith(",no rival")
    assert all("star (approximate) takes" in line and ",ring," in line for line in table[1:])
    plain = write_report(sweep_of(tmp_path, "ulysses,ring", name="t"), tmp_path / "plain", known_devices()).page
    shown = plain.read_text().partition('id="how"')[0].partition("<section")[2]
    assert "approximate" not in shown
    assert "no rival" not in (tmp_path / "plain" / "tables" / "winners.csv").read_text()


def test_a_front_is_of_exact_choices_and_a_choice_keeps_its_colour(tmp_path: Path) -> None:
    frame = reported(sweep_of(tmp_path, "star,ring", "seqlen=64k", "scale=1x4,1x8"))
    front = front_of(good_rows(frame))
    assert set(front["choice"][front["front"]]) == {"ring"}
    assert set(front["choice"]) == {"ring", f"star{APPROXIMATE}"}
    exact = reported(sweep_of(tmp_path, "star,ring", "seqlen=64k", "scale=1x4,1x8", name="exact", distance=lambda c: None))
    assert styles(frame)[f"star{APPROXIMATE}"] == styles(exact)["star"]


def test_exact_and_approximate_results_are_not_compared_as_equals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    star, ring = sweep_of(tmp_path, "star", name="a"), sweep_of(tmp_path, "ring", name="b")
    again = sweep_of(tmp_path, "star", name="c")
    sides = [side_of(s, ["cp"]) for s in (star, ring, again)]
    found = compare(sides[0], sides[1])
    assert not found.cells
    assert set(found.only_a.values()) == {"there exact, here approximate, distance 0.41"}
    assert set(found.only_b.values()) == {"there approximate, distance 0.41, here exact"}
    assert len(compare(sides[0], sides[2]).cells) == 3
    assert compare_command(["a", "b", "--across", "cp", "--json", "--results", str(tmp_path)]) != 0
    assert len(json.loads(capsys.readouterr().out)["only_a"]) == 3


def test_a_trace_is_served_fastest_by_what_is_exact(tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl"
    file.write_text("".join(json.dumps({"prefix": 0, "new": new, "concurrency": 1}) + "\n" for new in (4096, 4096, 8192)))
    grid = ["kernel=flash_attn3", "mask=causal", "scale=1x8", "heads=8x8x64", "direction=forward", "site=plain", f"trace={file}"]
    sweep = made_sweep(tmp_path, "s", ["cp=star,ring,ulysses", *grid], factor_of=even, distance_of=far, noise=0.001)
    found = served(sweep, sweep.look())
    assert [s.cell.config["cp"]["name"] for s in found] == ["star", "ring", "ulysses"]
    assert found[0].fastest is found[1].time
    assert [s.slower == "" for s in found] == [False, True, False]
    assert [s.approximate for s in found] == ["approximate, distance 0.41", "", ""]
    assert rows_of(found)[0]["what"].endswith(", approximate, distance 0.41")


# -- predictions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "approximate"), [("1x2", ""), ("1x4", "approximate"), ("2x4", "approximate")])
def test_a_prediction_asks_the_strategy(scale: str, approximate: str) -> None:
    grid = ["kernel=flash_attn3", "mask=causal", "seqlen=64k", "heads=8x8x64", "direction=forward", "site=plain", f"scale={scale}"]
    source = Source(Predictor.of("h100"), "digest")
    found = {p.cell.config["cp"]["name"]: source.predict(p.cell, "s") for p in look(["cp=star,ring", *grid]).cells}
    assert {a.status for a in found.values()} == {"predicted"}
    # Of two ranks the second sees the first block, its anchor, and its own: all keys.
    assert (found["star"].approximate, found["ring"].approximate) == (approximate, "")


def test_choose_races_and_sizes_by_exact_choices(tmp_path: Path) -> None:
    grid = ["kernel=flash_attn3", "mask=causal", "seqlen=64k", "heads=8x8x64", "direction=forward", "site=plain", "scale=1x8"]
    ranked = rank(look(["cp=star,apb,ring,ulysses", *grid]).cells, Predictor.of("h100"))
    fates = {c.cell.config["cp"]["name"]: c.fate for c in ranked}
    assert fates == {"star": "approximates", "apb": "approximates", "ring": "may win", "ulysses": "may win"}
    star = next(c for c in ranked if c.cell.config["cp"]["name"] == "star")
    assert star.prediction is not None
    assert star.prediction.seconds < min(c.prediction.seconds for c in ranked if c.prediction and c.fate in MAY_WIN)
    assert {c.cell.config["cp"]["name"] for c in sizable(ranked)} == {"ring", "ulysses"}
    chosen = smallest(ranked, Limits(seconds=1e3))
    assert chosen is not None
    assert chosen.fate == "may win"
    assert "star" not in printed(predicted_table(ranked, Predictor.of("h100")))
    lines = [line for line in reasons(ranked) if "approximates" in line]
    assert len(lines) == 2
    assert any(re.fullmatch(r"no rival, as it approximates: .*star.*, predicted .*s", line) for line in lines), lines
