"""Triton kernels compiled for GPUs that are not here, and what they take of one, as tests ask for it.

Compiling is for a process of its own, since tests run Triton's interpreter, and for code from a file, since Triton reads the source
of its functions. Registers and spills are what the ``ptxas`` that comes with Triton says as it assembles them, without a driver.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# What ptxas said of each kernel, by its hash: of one that was compiled before it says nothing again.
_said: dict[str, str] = {}


def rows_of(program: str, folder: Path) -> list[dict[str, Any]]:
    """What a program prints, an object in JSON on each line.

    Raises:
        AssertionError: it failed.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DUMP_PTXAS_LOG": "1"}
    environment.pop("TRITON_INTERPRET", None)  # which would not compile
    file = folder / "compile.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def taken(source: Any, capability: int, options: dict[str, Any]) -> dict[str, Any]:
    """What a kernel (an ``ASTSource``) takes once it is compiled, for programs of ``rows_of``: bytes of shared memory, beside those
    that there are, registers of a thread, spilled bytes, the instruction of its tensor cores ("" for none), and whether it has
    asynchronous copies, by the TMA or at all."""
    import triton
    from triton.backends.compiler import GPUTarget

    from lcbench.kernels.triton_shapes import SHARED

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    said = _said.setdefault(made.hash, printed.getvalue())
    spilled, registers = re.search(r"(\d+) bytes spill stores", said), re.search(r"Used (\d+) registers", said)
    assert spilled, f"ptxas said nothing of spills: {said!r}"
    assert registers, f"ptxas said nothing of registers: {said!r}"
    text = made.asm["ptx"]
    return {
        "shared": made.metadata.shared, "room": SHARED[divmod(capability, 10)] << 10, "spilled": int(spilled[1]),
        "registers": int(registers[1]), "mma": "wgmma" if "wgmma" in text else "mma" if "mma.sync" in text else "",
        "asynchronous": "cp.async" in text, "by_tma": "cp.async.bulk.tensor" in text,
    }  # fmt: skip
