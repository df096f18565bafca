"""Cells without a result: which share a cause, which node several name, and the command that helps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd
import pytest

from lcbench.commands import results
from lcbench.report.causes import HELP, Unwell, by_node, causes, grouped, nodes_of, suspects
from lcbench.report.frame import reported
from lcbench.runs.attempt import FAILURE_CLASSES, Failure
from lcbench.runs.store import Sweep
from tests.report.made import made_sweep

SWEEP = Sweep(Path("results").absolute(), "s")


@pytest.mark.slow
def test_failures_of_one_node_name_it_with_the_command_that_leaves_it_out(big: Sweep, big_frame: pd.DataFrame) -> None:
    (suspect,) = suspects(big_frame, big)
    assert (suspect.node, len(suspect.cells), suspect.failed) == ("node003", 8, 13)
    assert set(suspect.kinds) == {"node-fail", "nccl"}
    assert suspect.says == "8 of 13 failures name node003."
    assert shlex.split(suspect.command)[:6] == ["python", "-m", "lcbench.rerun", "--failed", "big", "--exclude"]
    assert "--exclude node003" in suspect.command


@pytest.mark.slow
def test_cells_are_grouped_by_cause_the_most_frequent_first(big: Sweep, big_frame: pd.DataFrame) -> None:
    found = causes(big_frame, big)
    assert [(c.kind, len(c.cells)) for c in found if c.status == "failed"] == [
        ("nccl", 5),
        ("oom", 4),
        ("node-fail", 3),
        ("timeout", 1),
    ]
    assert [(c.status, len(c.cells)) for c in found][-1] == ("skipped", 16)
    assert sum(len(c.cells) for c in found) == 29
    by_kind = {c.kind: c for c in found}
    assert by_kind["node-fail"].nodes == by_kind["nccl"].nodes == ("node003",)
    assert by_kind["oom"].command == ""
    assert by_kind["oom"].help
    assert all(cell in set(big_frame["cell"]) for c in found for cell in c.cells)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rank 3: NCCL error: socket node003<41873>", "rank 11: NCCL error: socket node003<52210>"),
        ("CUDA out of memory. Tried to allocate 16.00 GiB", "CUDA out of memory. Tried to allocate 512.00 MiB"),
        ("rank 0 was killed by SIGSEGV: bash (pid 42): Killed", "rank 7 was killed by SIGSEGV: bash (pid 9): Killed"),
    ],
)  # fmt: skip
def test_ranks_ports_and_sizes_do_not_tell_causes_apart(one: str, other: str) -> None:
    (cause,) = grouped([Unwell("a", "failed", "x", one), Unwell("b", "failed", "x", other)], SWEEP)
    assert (cause.cause, cause.cells) == (one, ("a", "b"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("node003: GPU 5 fell off the bus (Xid 79)", "node003: GPU 5 fell off the bus (Xid 31)"), ("node1: x", "node2: x")],
)
def test_what_tells_causes_apart_does(one: str, other: str) -> None:
    assert len(grouped([Unwell("a", "failed", "node-fail", one), Unwell("b", "failed", "node-fail", other)], SWEEP)) == 2


@pytest.mark.parametrize(
    ("kind", "cause", "nodes"),
    [
        ("nccl", "rank 3: DistBackendError: NCCL error: last error: socket gpu-a12<41873>", ("gpu-a12",)),
        ("nccl", "socket worker<41873>, then socket n07.cluster.local<9>", ("worker", "n07.cluster.local")),
        ("nccl", "rank 3: connection to 10.0.0.7<41873> failed", ()),
        ("node-fail", "the check of its nodes: login: 3 of 8 GPUs; n04: GPU 5 is in use: 9 MiB taken", ("login", "n04")),
        ("crash", "srun: error: node17: task 3: Killed", ("node17",)),
        ("node-fail", "Batch job 42 failed on node017", ("node017",)),
        ("crash", "rank 3: ValueError: cuda0: bad, on rank 5", ()),
        ("crash", "rank 3: KeyError: 'x1'", ()),
        ("oom", "node003: out of memory", ()),
        ("numerics", "out: row1: 3e-3 above the bound; dq2: 1", ()),
        ("crash", "", ()),
    ],
)  # fmt: skip
def test_nodes_are_found_by_where_they_stand(kind: str, cause: str, nodes: tuple[str, ...]) -> None:
    assert nodes_of(Unwell("a", "failed", kind, cause)) == nodes
    assert nodes_of(Unwell("a", "skipped", kind, cause)) == ()


def test_a_node_that_one_cell_names_is_no_suspect() -> None:
    cells = [
        Unwell("a", "failed", "nccl", "socket n1<1>"),
        Unwell("b", "failed", "nccl", "socket n2<1>"),
        Unwell("c", "lost", "nccl", "socket n2<2>"),
    ]
    assert [s.node for s in by_node(cells, SWEEP)] == ["n2"]


def test_every_class_of_failure_says_what_helps() -> None:
    assert set(HELP) == set(FAILURE_CLASSES)
    for kind in FAILURE_CLASSES:
        (cause,) = grouped([Unwell("a", "failed", kind, "words")], SWEEP)
        assert cause.help or kind == "unsupported"
        assert not cause.command or cause.command.startswith("python -m lcbench.")


def test_commands_name_sweeps_that_need_care(tmp_path: Path) -> None:
    (cause,) = grouped([Unwell("a", "failed", "nccl", "x")], Sweep(tmp_path / "my results", "-odd"))
    assert shlex.split(cause.command) == [
        "python", "-m", "lcbench.rerun", "--failed=-odd", "--results", str(tmp_path / "my results")
    ]  # fmt: skip


def test_a_frame_of_results_has_causes_too_and_one_of_none_has_none(tmp_path: Path) -> None:
    made_sweep(tmp_path, "s", ["cp=ring,usp", "seqlen=64k", "scale=1x8"], failed={"usp": Failure("nccl", "socket n1<7>")})
    (cause,) = causes(results.load(tmp_path, "s"))
    assert (cause.status, cause.kind, cause.nodes) == ("failed", "nccl", ("n1",))
    assert cause.command == "python -m lcbench.rerun --failed s"
    assert causes(pd.DataFrame()) == suspects(pd.DataFrame()) == []
    good = made_sweep(tmp_path, "good", ["cp=ring", "seqlen=64k", "scale=1x8"])
    assert causes(reported(good), good) == []
