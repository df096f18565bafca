"""Drawings for the docs, each made from the code's own data where it has any. ``make docs`` writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.cp.ring import Ring
from lcbench.grid.values import parse_heads, parse_scale
from lcbench.masks.band import Band, BandMask
from lcbench.masks.convert import block_areas
from lcbench.problem import Problem
from lcbench.schedule.adjoint import Traffic, traffic
from lcbench.schedule.layout import contiguous
from lcbench.schedule.program import Buffer, Operand, Program
from lcbench.schedule.schedule import Move, Schedule, Step, TileColumn, head_groups, rows, singles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

DOCS = Path(__file__).parents[2] / "docs"
INK, GREY, PALE = "#1f2933", "#8a94a0", "#eef2f7"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, YELLOW = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#f0e442"
OF_RANK = (BLUE, ORANGE, GREEN, PURPLE)  # Okabe and Ito's, as in reports
RANKS = 4


def figure(width: float, height: float) -> Figure:
    """An empty white figure, inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def bare(axes: Axes, width: float, height: float) -> Axes:
    """Axes without ticks, x from 0 to ``width``, y down from 0 to ``height``."""
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = PALE, size: float = 8) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.35)


def arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0, dash: str = "-"
) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.3, "linestyle": dash, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=begin, arrowprops={**style, "shrinkA": 1, "shrinkB": 1})


# -- a sweep ---------------------------------------------------------------------------------------------------------------


def sweep() -> Figure:
    """Grid, cells, packs, ranks, store, report."""
    made = figure(10, 3.5)
    axes = bare(made.subplots(), 20, 7)
    for x, title, under in (
        (0.2, "grid", "what you type"), (3.5, "cells", "one value per axis"), (7.1, "packs", "cells that share a job"),
        (10.6, "ranks", "one process per GPU"), (14.1, "store", "the truth"), (17.3, "report", "made from it"),
    ):  # fmt: skip
        axes.text(x, 0.35, title, fontsize=11, weight="bold", color=INK, va="center")
        axes.text(x, 0.95, under, fontsize=7.5, color=GREY, va="center")
    box(axes, 0.2, 2.4, 2.6, 2.4, "cp=ring,ulysses\nseqlen=64k,256k\nscale=1x8,4x8\nmask=causal", "white", 7.5)
    grid = [(cp, n, scale) for scale in ("1x8", "4x8") for cp in ("ring", "ulysses") for n in ("64k", "256k")]
    for place, (cp, length, scale) in enumerate(grid):
        box(
            axes,
            3.5,
            1.45 + 0.64 * place,
            2.9,
            0.52,
            f"{cp} causal {length} {scale}",
            BLUE + "30" if scale == "1x8" else ORANGE + "30",
            6,
        )
    for y, scale, color in ((2.0, "1x8", BLUE), (4.55, "4x8", ORANGE)):
        box(axes, 7.1, y, 2.6, 1.3, f"pack: 4 cells\nof {scale}, shortest first\n= one Slurm job", color + "30", 7)
        arrow(axes, (6.4, y + 0.65), (7.1, y + 0.65))
        arrow(axes, (9.7, y + 0.65), (10.6, y + 0.65))
        nodes = 1 if scale == "1x8" else 4
        box(axes, 10.6, y, 2.7, 1.3, "", "white")
        for node in range(nodes):
            for gpu in range(8):
                axes.add_patch(_square(10.8 + 0.3 * gpu, y + 0.15 + 0.27 * node + (0.4 if nodes == 1 else 0), 0.2, color))
        arrow(axes, (13.3, y + 0.65), (14.1, 3.4 if scale == "1x8" else 3.9))
    axes.text(
        11.95, 6.35, "per cell: check against float64,\nthen time, memory, overlap", fontsize=7, ha="center", va="center", color=INK
    )
    box(axes, 14.1, 2.4, 2.4, 2.4, "results/<sweep>/\n<cell id>/\nattempt-N.json", "white", 7.5)
    arrow(axes, (2.8, 3.6), (3.5, 3.6))
    for y, text, target in ((1.6, "report, compare", 2.1), (3.15, "status, rerun", 3.6), (4.7, "MLflow", 5.2)):
        box(axes, 17.3, y, 2.5, 1.0, text, "white", 7.5)
        arrow(axes, (16.5, 3.6), (17.3, target))
    axes.text(5.0, 6.8, "the id of a cell is a hash of its config", fontsize=7, ha="center", color=GREY)
    axes.text(15.3, 5.3, "the same command again\nruns what is missing", fontsize=7, ha="center", va="center", color=GREY)
    return made


def _square(x: float, y: float, side: float, color: str) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), side, side, facecolor=color, edgecolor="none")


# -- a ring ----------------------------------------------------------------------------------------------------------------


def ring_schedule() -> tuple[Schedule, Problem]:
    problem = Problem(
        seqlen=1024, heads=parse_heads("8x8x64"), scale=parse_scale(f"1x{RANKS}"), dtype="bfloat16", direction="forward_backward"
    )
    return Ring("contiguous").schedule(problem, BandMask.of(1024, 1024, [Band(0, 1024, 0, 1024)])), problem


def ring() -> Figure:
    """Four ranks, four steps: whose keys and values each rank uses and passes on, read off the schedule."""
    schedule, _ = ring_schedule()
    made = figure(10, 2.8)
    places = ((1.7, 1.45), (4.3, 1.45), (4.3, 4.05), (1.7, 4.05))  # of the ranks, clockwise
    for number, (step, axes) in enumerate(zip(schedule.steps, made.subplots(1, len(schedule.steps)), strict=True)):
        bare(axes, 6, 5)
        axes.text(3, 0.15, f"step {number}", fontsize=10, weight="bold", ha="center", va="center", color=INK)
        for tile in step.tiles:
            rank, held = int(tile[TileColumn.RANK]), int(tile[TileColumn.K])
            x, y = places[rank]
            box(axes, x - 0.8, y - 0.65, 1.6, 1.3, "", "white")
            axes.text(x, y - 0.32, f"rank {rank}: q{tile[TileColumn.Q]}", fontsize=7.5, ha="center", va="center", color=INK)
            axes.add_patch(_bar(x - 0.6, y + 0.03, 1.2, 0.44, OF_RANK[held]))
            axes.text(x, y + 0.25, f"k{held} v{held}", fontsize=7.5, ha="center", va="center", color="white", weight="bold")
        for move in step.moves:
            for source, target, shard, _ in move.rows.tolist():
                (x0, y0), (x1, y1) = places[source], places[target]
                dx, dy = np.sign(x1 - x0), np.sign(y1 - y0)
                arrow(axes, (x0 + 0.82 * dx, y0 + 0.68 * dy), (x1 - 0.82 * dx, y1 - 0.68 * dy), OF_RANK[shard])
        if not step.moves:
            axes.text(3, 2.75, "nothing moves", fontsize=7, ha="center", va="center", color=GREY)
    return made


def _bar(x: float, y: float, width: float, height: float, color: str, **options: Any) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=color, **{"edgecolor": "none", **options})


# -- bands -----------------------------------------------------------------------------------------------------------------


def bands() -> Figure:
    """One band with its six numbers, and three masks with the edges of their bands."""
    made = figure(10, 3.3)
    first, *others = made.subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
    one = Band(2, 14, 3, 15, -3, 4)
    _band_mask(first, BandMask.of(16, 16, [one]), [one])
    first.set_title("one band: q0 ≤ q < q1, k0 ≤ k < k1,\nlo ≤ k - q ≤ hi", fontsize=8.5)
    for text, x, y, color in (
        (f"q0 = {one.q0}", 0.2, one.q0 + 0.4, INK), (f"q1 = {one.q1}", 0.2, one.q1 + 0.6, INK),
        (f"k0 = {one.k0}", one.k0, 0.9, INK), (f"k1 = {one.k1}", one.k1 - 2.2, 0.9, INK),
        (f"k - q = lo = -{-one.lo}", 3.4, 12.7, VERMILION), (f"k - q = hi = {one.hi}", 9.6, 3.4, GREEN),
    ):  # fmt: skip
        first.text(x, y, text, fontsize=7, color=color, va="center")
    named = {
        "sliding_window, left 4:\none band": [Band(0, 16, 0, 16, -4, 0)],
        "causal_document, 6+7+3 tokens:\na band per document": [Band(a, b, a, b, hi=0) for a, b in ((0, 6), (6, 13), (13, 16))],
        "attention_sink, sink 3, left 4:\ntwo bands, no pair twice": [Band(0, 16, 0, 16, -4, 0), Band(5, 16, 0, 3, hi=-5)],
    }
    for axes, (title, parts) in zip(others, named.items(), strict=True):
        _band_mask(axes, BandMask.of(16, 16, parts), parts)
        axes.set_title(title, fontsize=8)
    return made


def _band_mask(axes: Axes, mask: BandMask, parts: list[Band]) -> None:
    """The pairs that count, by their exact count per pixel; the rectangle of each band dashed, its bounding diagonals drawn."""
    edges = np.arange(mask.num_q + 1)
    row, column, area = block_areas(mask, edges, edges)
    for q, k, count in zip(row, column, area, strict=True):
        if count:
            axes.add_patch(_bar(k + 0.06, q + 0.06, 0.88, 0.88, BLUE, alpha=0.55))
    for part in parts:
        axes.add_patch(
            _bar(part.k0, part.q0, part.k1 - part.k0, part.q1 - part.q0, "none", edgecolor=INK, linestyle="--", linewidth=1)
        )
        for bound, there, color in ((part.lo, part.cuts_below, VERMILION), (part.hi, part.cuts_above, GREEN)):
            if there:  # along the outer edge of the pairs with k - q = bound
                edge = bound if color == VERMILION else bound + 1
                q = np.array([max(part.q0, part.k0 - edge), min(part.q1, part.k1 - edge)])
                axes.plot(q + edge, q, color=color, linewidth=1.8)
    axes.set_xlim(0, mask.num_k)
    axes.set_ylim(mask.num_q, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("keys →", fontsize=8)
    axes.set_ylabel("← queries", fontsize=8)


# -- overlap ---------------------------------------------------------------------------------------------------------------

PARTS = {"forward": (10.0, 6.0, 12.0), "backward": (23.0, 14.0, 26.0)}  # computing, communicating, the whole: an example, ms


def overlap() -> Figure:
    """What the whole, computing alone and communicating alone say of a phase: what is hidden and what is exposed."""
    made = figure(9, 2.9)
    axes = made.subplots()
    at = 0.0
    for name, (compute, communication, whole) in PARTS.items():
        hidden = compute + communication - whole
        for y, begin, length, height, color, text in (
            (0.0, 0.0, compute, 0.7, BLUE, "computing alone"), (1.0, 0.0, communication, 0.7, ORANGE, "sending alone"),
            (2.0, 0.0, compute, 0.45, BLUE, f"the whole: {whole:g} ms"), (2.45, compute - hidden, hidden, 0.25, ORANGE, ""),
            (2.0, compute, whole - compute, 0.7, VERMILION, ""),
        ):  # fmt: skip
            axes.add_patch(_bar(at + begin, y + 0.12, length, height, color))
            axes.text(
                at + begin + 0.3, y + 0.13 + height / 2, text, fontsize=7.5, va="center", color=INK if color == ORANGE else "white"
            )
        axes.text(
            at, 3.3, f"{name}: exposed = {whole:g} - {compute:g} = {whole - compute:g} ms;\n"
            f"efficiency = ({compute:g} + {communication:g} - {whole:g}) / {communication:g} = {hidden / communication:.2f}",
            fontsize=8, va="top", color=INK,
        )  # fmt: skip
        axes.text(at + whole + 0.15, 2.47, "exposed", fontsize=7.5, va="center", color=VERMILION)
        at += whole + 4
    axes.text(0, -0.35, "an example, not a measurement; ms", fontsize=7.5, color=GREY, va="center")
    bare(axes, at, 4.3)
    axes.set_ylim(4.3, -0.6)
    return made


# -- adjoint ---------------------------------------------------------------------------------------------------------------


def tree_traffic() -> Traffic:
    """Of the tree in ``adjoint``: rank 0's keys and values go to ranks 1 and 2 in step 0, from rank 2 to rank 3 in step 1."""
    heads, keys = head_groups(parse_heads("1x1x8"), 1), 0
    users = np.array([[1, 2], [3, 3]])
    steps = [Step(rows([0], 0, [0], keys), (Move("kv", rows([0, 0], [1, 2], keys, 0)),))]
    steps.append(Step(rows(users[0], 0, users[0], keys), (Move("kv", rows([2], [3], keys, 0)),)))
    steps.append(Step(rows([3], 0, [3], keys)))
    return traffic(Schedule.of(RANKS, contiguous(64, RANKS), np.arange(RANKS), heads, singles(RANKS), tuple(steps)), backward=True)


def adjoint() -> Figure:
    """The tree that the moves of an item make; which way values and gradients go in backward."""
    moves = tree_traffic()
    made = figure(9, 3.2)
    places = {0: (3.0, 1.0), 1: (1.4, 2.7), 2: (4.6, 2.7), 3: (4.6, 4.4)}
    panels = (
        ("forward: keys and values", ["kv"], True, BLUE), ("backward: values come back", ["kv"], False, BLUE),
        ("backward: gradients go up the tree", ["dkv", "final_dkv"], False, VERMILION),
    )  # fmt: skip
    for axes, (title, kinds, forward, color) in zip(made.subplots(1, 3), panels, strict=True):
        bare(axes, 6, 5.2)
        axes.text(3, 0.1, title, fontsize=9, weight="bold", ha="center", va="center", color=INK)
        for transfer in moves.transfers:
            if transfer.kind not in kinds or (transfer.begin < moves.steps) != forward:
                continue
            for source, target, *_ in transfer.rows.tolist():
                (x0, y0), (x1, y1) = places[source], places[target]
                length = float(np.hypot(x1 - x0, y1 - y0))
                dx, dy = 0.5 * (x1 - x0) / length, 0.5 * (y1 - y0) / length
                bend = 0.35 if {source, target} == {0, 3} else 0.0
                arrow(axes, (x0 + dx, y0 + dy), (x1 - dx, y1 - dy), color, bend)
                when = f"t{transfer.begin}" if transfer.begin == transfer.end else f"t{transfer.begin} to {transfer.end}"
                aside = -1.0 if bend else 0.16 + 0.1 * (x1 != x0)
                axes.text((x0 + x1) / 2 + aside, (y0 + y1) / 2, when, fontsize=7.5, color=color, va="center", ha="left")
        for rank, (x, y) in places.items():
            axes.add_patch(_circle(x, y))
            axes.text(x, y, str(rank), fontsize=10, ha="center", va="center", color=INK, weight="bold")
        axes.text(places[0][0] + 0.55, places[0][1] - 0.1, "owner", fontsize=7, color=GREY, va="center")
    return made


def _circle(x: float, y: float) -> Patch:
    from matplotlib.patches import Circle

    return Circle((x, y), 0.42, facecolor=PALE, edgecolor=INK, linewidth=0.8)


# -- program ---------------------------------------------------------------------------------------------------------------

LABELS = {"kv": "k v of shard", "dkv": "dk dv of shard", "q": "q of shard"}


def program_buffers() -> tuple[Program, list[tuple[str, Buffer]], Traffic]:
    """Rank 0's program of a ring of four, its buffers with what each holds, and the ring's traffic."""
    schedule, problem = ring_schedule()
    moves = traffic(schedule, backward=True)
    made = Program(schedule, moves, problem, 0)
    found = [(_label(operand), buffer) for operand, lives in made._lives.items() for buffer in lives]
    staged = {
        id(m.staging): ("arriving " + m.kind, m.staging) for step in made.steps for m in (*step.sends, *step.receives) if m.staging
    }
    return made, [*found, *staged.values()], moves


def _label(operand: Operand) -> str:
    return f"{LABELS.get(operand.kind, operand.kind + ' of')} {','.join(map(str, operand.bundle))}"


def program() -> Figure:
    """The slots of rank 0 over time, each with the buffers that use it one after the other."""
    made, buffers, moves = program_buffers()
    drawn = figure(10, 0.5 + 0.62 * (len(made.slots) + 1))
    axes = drawn.subplots()
    times = len(made.steps)
    for label, buffer in buffers:
        color = BLUE if label.startswith("k v") else VERMILION if label.startswith("dk") else GREY
        axes.add_patch(_bar(buffer.birth + 0.04, buffer.slot + 0.12, buffer.death - buffer.birth + 0.92, 0.76, color))
        text = label if buffer.death > buffer.birth else label.replace(" of shard", "").replace(" of", "")
        axes.text(
            (buffer.birth + buffer.death + 1) / 2, buffer.slot + 0.5, text, fontsize=7, color="white", ha="center", va="center"
        )
    axes.axvline(moves.steps, color=INK, linewidth=1)
    for x, text in ((moves.steps / 2, "forward"), (moves.steps + (times - moves.steps) / 2, "backward")):
        axes.text(x, -0.25, text, fontsize=8.5, weight="bold", ha="center", va="center", color=INK)
    axes.set_xlim(0, times)
    axes.set_ylim(len(made.slots), -0.5)
    axes.set_xticks([t + 0.5 for t in range(times)], [f"time {t}" for t in range(times)], fontsize=7)
    axes.set_yticks(
        [s + 0.5 for s in range(len(made.slots))],
        [f"slot {s}, {size // 1024} KiB" for s, size in enumerate(made.slots)],
        fontsize=7,
    )
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    return drawn


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "sweep": sweep, "ring": ring, "bands": bands, "overlap": overlap, "adjoint": adjoint, "program": program,
}  # fmt: skip


def main(folder: Path = DOCS) -> int:
    for name, draw in DRAWINGS.items():
        draw().savefig(folder / f"{name}.png", metadata={"Software": None})
    print(f"{', '.join(f'{name}.png' for name in DRAWINGS)} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
