from __future__ import annotations

import gc
import os
import readline  # noqa: F401  # pytest's debugger would load it later
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.turns import goes_by_turns, is_due, is_its_turn, tell

RANKS_OF_A_TEST = "lcbench.testing.run_ranks"  # the audit event of lcbench/testing/spawn.py, which is not imported for it
ON_CLUSTER = Path(__file__).parent / "slurm"
AGENT = "lcbench.runs.agent"
TRACEBACK_CHARS = 4000
SLOW_S = 20.0  # a busy machine takes several times as long
started_ranks: list[str] = []
too_slow: list[str] = []
cases_of: Counter[str] = Counter()

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads of all on all cores would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A rank with several threads has them spin while they wait for each other, for as long as another process has their core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Our Triton kernels run on a CPU by Triton's interpreter; it decides when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Thousands of processes would each compile lcbench anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# GNU readline exports the size of a terminal that is not there, by which tables would fit themselves.
for size in ("COLUMNS", "LINES"):
    os.environ[size] = ""  # so that C's environment, too, loses what it has
    del os.environ[size]
# Whoever starts tests in the background has their children ignore Ctrl-C, and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Several tests measure at once here, and look at no time.
os.environ.setdefault("LCBENCH_SHARE_MACHINE", "1")
# Machines that run the tests are busy with other ranks; how long an example takes says nothing.
settings.register_profile("lcbench", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("lcbench")


def _hear_of_ranks(event: str, args: tuple[Any, ...]) -> None:
    if event == RANKS_OF_A_TEST or (event == "subprocess.Popen" and AGENT in map(str, args[1])):
        started_ranks.append(event)


sys.addaudithook(_hear_of_ranks)


def pytest_runtest_setup(item: pytest.Item) -> None:
    tell(item.config.getoption("--one-in"), item.config.getoption("--turn"), cases_of[item.nodeid.partition("[")[0]])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that starts ranks is marked gloo, one of the cluster slurm: the markers are what people choose tests by."""
    started_ranks.clear()
    result = yield
    if started_ranks and not any(item.iter_markers("gloo")):
        pytest.fail(f"{item.nodeid} starts ranks; mark it gloo")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its own folder holds of the errors of processes that it started."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        report.sections += tracebacks_below(folder)
    return report


def tracebacks_below(folder: Path) -> list[tuple[str, str]]:
    """The logs below a folder that hold a traceback: the name of each, and the traceback with what follows it."""
    found = []
    for log in sorted(folder.rglob("*.log")):
        before, traceback, after = log.read_text(errors="replace").partition("Traceback (most recent call last)")
        if traceback:
            found.append((str(log.relative_to(folder)), f"{before.rpartition(chr(10))[2]}{traceback}{after}"[:TRACEBACK_CHARS]))
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of each test with several cases, only every Nth")
    parser.addoption("--turn", type=int, default=0, help="which of them, so that N runs with turns in a row take every case")


def pytest_configure(config: pytest.Config) -> None:
    tell(config.getoption("--one-in"), config.getoption("--turn"))


def may_wait(item: pytest.Item) -> bool:
    """A slow test without cases comes by turns too, unless what it goes through does or it needs the cluster."""
    if "[" in item.nodeid or not isinstance(item, pytest.Function):
        return False
    marked = {mark.name for mark in item.iter_markers()}
    return "slow" in marked and "slurm" not in marked and not goes_by_turns(item.function)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    cases_of.update(item.nodeid.partition("[")[0] for item in items)
    left_out = []
    for item in items:
        case_of = item.nodeid.partition("[")[0]
        if not is_due(seen[case_of], cases_of[case_of]) or (may_wait(item) and not is_its_turn(item.nodeid)):
            left_out.append(item)
        seen[case_of] += 1
        if "devcluster" in getattr(item, "fixturenames", ()) and not any(item.iter_markers("slurm")):
            raise pytest.UsageError(f"{item.nodeid} needs the development cluster; mark it slurm")
        if any(item.iter_markers("slurm")) and ON_CLUSTER not in item.path.parents:
            raise pytest.UsageError(f"{item.nodeid} is marked slurm; make test looks for those in tests/slurm alone")
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    # Processes take one file after the other: the longest come first, so that none is begun when the others are through.
    slow = Counter(item.path for item in items if any(item.iter_markers("slow")))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What was imported stays: collections, which take a tenth of some tests' time, visit it no more, and come less often."""
    if "triton.runtime.interpreter" in sys.modules:
        import lcbench.testing.interpreter  # noqa: F401
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.duration > SLOW_S and "slow" not in report.keywords:
        too_slow.append(f"{report.nodeid} took {report.duration:.0f} s and is not marked slow")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (every := config.getoption("--one-in")) > 1:
        turn = f"turn {config.getoption('--turn') % every} of {every}"
        terminalreporter.write_line(f"of cases and of slow tests one in {every}, {turn}: --one-in 1 takes all")
    for line in too_slow:
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real MLflow server."""
    from tests.slurm.stage import Server

    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.kill()
