"""What commands print, as docs show it. ``make docs`` writes what each command prints here into the block below its marker::

    <!-- prints: status first | head 12, tail 2 -->
    ```text
    ...
    ```

The sweeps of these commands are synthetic: their numbers are drawn, not measured, and the docs say so where they show them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lcbench.commands.lengths import main as write_profile
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.runs.attempt import Failure
from lcbench.runs.launch import settings_of
from tests.report.made import NODE_FAILURE, SOCKET_FAILURE, made_sweep

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- prints: (.+?) \| head (\d+), tail (\d+) -->\n\n?```text\n)(.*?)(?=```)", re.S)
COLUMNS = 118
LEFT_OUT = "..."
PASSING = re.compile(r"starting ━|^not published|^dashboard:|^estimated")  # a bar that is drawn over; what asks a server or a clock
CHOOSE = ["+experiment=choose", "scale=4x8", "heads=32x8x128", "mask=causal_document", "seqlen=256k", "site=plain"]
SCALING = ["+experiment=scaling", "cp=ring,usp", "mask=causal", "scale=1x8,2x8,4x8,8x8", "site=plain"]
CHANGED = ["cp=ring,ulysses,usp", "mask=causal", "seqlen=64k,256k", "scale=2x8", "kernel=flash_attn3", "site=plain"]
FIRST = ["cp=ring,ulysses,usp", "mask=causal", "seqlen=64k,256k,1m", "scale=4x8", "kernel=flash_attn3", "site=plain"]
OUT_OF_MEMORY = Failure("oom", "CUDA out of memory. Tried to allocate 16.00 GiB", 0)
FAILED = {
    "ring flash_attn3 causal 256k 4x8": NODE_FAILURE, "usp flash_attn3 causal 256k 4x8": SOCKET_FAILURE,
    "ulysses flash_attn3 causal 1m 4x8": OUT_OF_MEMORY,
}  # fmt: skip
KERNELS = {"flash_attn3": 1.0, "flash_attn4": 1.04, "cudnn": 1.06, "te_fused": 1.1, "flash_attn2": 1.6, "sdpa_flash": 1.65}


def make_sweeps(folder: Path) -> None:
    """The synthetic sweeps that the docs' commands look at, below ``folder / "results"``, and a file of document lengths."""
    results = folder / "results"
    made_sweep(results, "choose", CHOOSE, factor_of=_of_kernel, run_to_run=0.006)
    made_sweep(results, "scaling", SCALING, factor_of=_of_scale, run_to_run=0.006)
    for number, name in enumerate(("before", "after")):
        made_sweep(results, name, CHANGED, seed=number, run_to_run=0.006, slower={"ring ": 1.09} if number else None)
    made_sweep(results, "first", FIRST, failed=FAILED, launch=launch(FIRST))
    make_files(folder)


def make_files(folder: Path) -> None:
    """Below ``folder`` a mask of bands, a server's trace, a file of document lengths, and the profile ``mine`` made of it."""
    passes = [(8192, 1, 32)] * 60 + [(2048, 1, 8)] * 30 + [(0, 3000, 1)] * 8 + [(4096, 512, 1)] * 2
    lines = [json.dumps(dict(zip(("prefix", "new", "concurrency"), line, strict=True))) for line in passes]
    (folder / "day.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.json").write_text(
        json.dumps({"seqlen": 4096, "bands": [[0, 4000, 0, 4096, None, 0], [4000, 4096, 0, 1024, None, None]]})
    )
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6.5, 1.3, 2000).astype(int), 16, 32768)
    (folder / "lengths.txt").write_text("\n".join(map(str, lengths)) + "\n")
    write_profile([str(folder / "lengths.txt"), "--name", "mine", "--conf", str(folder / "conf"), "--force"])


def launch(grid: list[str]) -> dict[str, object]:
    """As of a sweep that was only planned: whoever runs its cells again plans them."""
    return {"launcher": "dry", "settings": settings_of(look(grid)).__dict__, "by": "test"}


def _of_kernel(cell: Cell) -> float:
    return KERNELS.get(cell.config["kernel"]["name"], 2.0)


def _of_scale(cell: Cell) -> float:
    """A ring loses more with each doubling of the nodes."""
    each = 0.3 if cell.config["cp"]["name"] == "ring" else 0.06
    return float(1 + each * np.log2(cell.problem.scale.nodes))


def prints(told: str, folder: Path) -> list[str]:
    """The lines that ``python -m lcbench.<told>`` prints in ``folder``, whose path is left out of them."""
    environment = {
        **os.environ, "COLUMNS": str(COLUMNS), "PYTHONPATH": f"{ROOT}:{ROOT / 'launchers'}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONWARNINGS": "ignore", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    environment.pop("LCBENCH_SITE", None)
    name, *words = shlex.split(told)
    command = [sys.executable, "-m", f"lcbench.{name}", *words]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode not in (0, 1) or "Traceback" in done.stdout:
        raise RuntimeError(f"{told}: exit code {done.returncode}\n{done.stdout}")
    return [line.rstrip() for line in done.stdout.replace(f"{folder}/", "").splitlines() if not PASSING.search(line)]


def cut(lines: list[str], head: int, tail: int) -> str:
    """The first and the last lines, and dots between them where some are left out."""
    if len(lines) <= head + tail:
        return "\n".join(lines)
    return "\n".join([*lines[:head], LEFT_OUT, *lines[len(lines) - tail :]])


def renewed(text: str, ask: Callable[[str], list[str]]) -> str:
    """A page with every block as its command prints it now."""
    return BLOCK.sub(lambda found: f"{found[1]}{cut(ask(found[2]), int(found[3]), int(found[4]))}\n", text)


def pages() -> list[Path]:
    """Pages with such blocks."""
    return [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if BLOCK.search(page.read_text())]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        desk = Path(folder)
        make_sweeps(desk)
        for page in pages():
            page.write_text(renewed(page.read_text(), lambda command: prints(command, desk)))
            print(f"{page.relative_to(ROOT)}: what its commands print")
    return 0


if __name__ == "__main__":
    sys.exit(main())
