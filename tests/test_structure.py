"""The rooms of the code and the arrows between them: every file, and every import in it, wherever it stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest to the highest: a room may import what is below it, and itself.
ROOMS = (
    "problem", "redact", "masks", "inputs", "planners", "kernels", "selectors", "schedule", "cp", "measure", "workloads", "grid",
    "predict", "runs", "report", "advice", "launchers", "commands", "entries",
)  # fmt: skip
# What is below a room and still none of its business.
STRANGERS = {
    "masks": {"redact"}, "inputs": {"redact"}, "selectors": {"redact", "planners", "inputs"},
    "planners": {"redact"}, "kernels": {"redact"}, "schedule": {"redact"}, "cp": {"redact"},
    "measure": {"redact"}, "workloads": {"redact"},
    # Reached by the files in conf/hydra/launcher only.
    "commands": {"launchers"}, "entries": {"launchers"},
}  # fmt: skip
ENTRY_LINES = 10  # of a module that python -m names: a docstring, two imports, and the call


@cache
def modules() -> dict[str, Path]:
    """Every module of the code by its name."""
    found = {}
    for top in (ROOT / "lcbench", ROOT / "launchers" / "hydra_plugins"):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


@cache
def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(tree(module)))


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports anywhere: at its top, in functions, and for type checkers only."""
    used: set[str] = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            used |= {name if (name := f"{node.module}.{a.name}") in modules() else str(node.module) for a in node.names}
    return frozenset(used)


def room_of(module: str) -> str:
    """The room of a module; ``entries``: what ``python -m lcbench.<command>`` names."""
    parts = module.split(".")
    if parts[0] == "hydra_plugins":
        return "launchers"
    if parts[-1] == "__main__" or (len(parts) == 2 and parts[1] not in ROOMS and modules()[module].name != "__init__.py"):
        return "entries"
    return parts[1] if len(parts) > 1 else "lcbench"


def of_room(room: str) -> Iterator[str]:
    return (module for module in modules() if room_of(module) == room)


def test_arrows_point_down() -> None:
    allowed = {room: {*ROOMS[: ROOMS.index(room) + 1], "lcbench"} - STRANGERS.get(room, set()) for room in ROOMS}
    wrong = [
        f"{module} imports {used}" for room in ROOMS for module in of_room(room) for used in imports(module)
        if used in modules() and room_of(used) not in allowed[room]
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in modules()} <= {*ROOMS, "testing", "lcbench"}


def test_nothing_but_testing_imports_testing() -> None:
    assert not [m for m in modules() if room_of(m) != "testing" and any(used.startswith("lcbench.testing") for used in imports(m))]


def test_nothing_in_lcbench_names_launchers() -> None:
    """Launchers come by the ``_target_`` of a file in conf/hydra/launcher."""
    for module, path in modules().items():
        assert room_of(module) == "launchers" or "hydra_plugins." not in path.read_text(), module


def test_modules_import_one_another_in_no_circle() -> None:
    graph = {module: {used for used in imports(module) if used in modules() and used != module} for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_commands_are_in_their_room_and_their_entries_short() -> None:
    entries = {m.removesuffix(".__main__").split(".")[-1]: m for m in of_room("entries") if m != "lcbench.__main__"}
    commands = {path.stem for path in (ROOT / "lcbench" / "commands").glob("*.py") if "\ndef main(" in path.read_text()}
    assert set(entries) == commands
    for name, module in entries.items():
        assert len(modules()[module].read_text().splitlines()) <= ENTRY_LINES, module
        assert f"lcbench.commands.{name}" in imports(module)


# Besides peers: the engines, what makes its communicators known, messages, those of runs that are no schedules, and what a model's
# weights are shared by.
TALKERS = {
    "lcbench.schedule.execute", "lcbench.schedule.scan", "lcbench.schedule.groups", "lcbench.schedule.messages", "lcbench.cp.base",
    "lcbench.cp.exchange",
    "lcbench.workloads.sharing", "lcbench.workloads.traffic", "lcbench.workloads.reshard", "lcbench.workloads.step_check",
}  # fmt: skip


def test_only_execute_weights_and_the_measuring_side_talk_to_other_ranks() -> None:
    found = {
        module for room in ("masks", "kernels", "schedule", "cp", "workloads", "grid") for module in of_room(room)
        if not module.startswith("lcbench.cp.peers.") and any(used.startswith("torch.distributed") for used in imports(module))
    }  # fmt: skip
    assert found == TALKERS


def test_ranks_wait_for_others_in_one_place() -> None:
    """By its name the judge of a hang knows a rank that waits (``runs/failure.py``)."""
    found = {
        module for module in TALKERS | set(of_room("measure")) for node in nodes(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "wait"
    }  # fmt: skip
    assert found == {"lcbench.schedule.messages"}


def test_launchers_know_nothing_of_attention() -> None:
    for path in (ROOT / "launchers").rglob("*.py"):
        found = re.findall(r"attention|seqlen|\bmask|kernel|ulysses|causal", path.read_text(), re.I)
        assert not found, f"{path.name}: {found}"


def test_no_package_init_in_the_plugin_namespace() -> None:
    assert not (ROOT / "launchers" / "hydra_plugins" / "__init__.py").exists()
    assert (ROOT / "launchers" / "hydra_plugins" / "lcbench" / "__init__.py").exists()


def test_functions_are_short() -> None:
    """Lines from ``def`` to the end."""
    lengths = {
        f"{module}.{node.name}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for module in modules()
        for node in nodes(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    ordered = sorted(lengths.values())
    assert ordered[len(ordered) // 2] <= 7
    assert ordered[9 * len(ordered) // 10] <= 22
    long = {name: lines for name, lines in lengths.items() if lines > 60}
    assert not long, long


def test_no_hash_that_differs_between_processes_is_used() -> None:
    """Python's own hash of a text or of bytes is another in each process that is no fork, so it tells ranks of two nodes apart."""
    wrong = []
    for module in modules():
        own = [node for node in nodes(module) if isinstance(node, ast.FunctionDef) and node.name == "__hash__"]
        fine = {node for function in own for node in ast.walk(function)}
        calls = [node for node in nodes(module) if isinstance(node, ast.Call) and node not in fine]
        wrong += [f"{module}:{node.lineno}" for node in calls if isinstance(node.func, ast.Name) and node.func.id == "hash"]
    assert not wrong


def test_folders_of_tests_are_packages() -> None:
    """Of two modules with one name in folders that are none, pytest imports the first only."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
