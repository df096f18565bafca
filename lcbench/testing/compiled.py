"""Triton kernels compiled for GPUs that are not here, and what they take of one, as tests ask for it.

Compiling is for a process of its own, since tests run Triton's interpreter, and for code from a file, since Triton reads the source
of its functions. Registers and spills are what the ``ptxas`` that comes with Triton reports, which needs no driver.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def rows_of(program: str, folder: Path) -> list[dict[str, Any]]:
    """What a program prints, an object in JSON on each line. Its argument is the folder, which it may write to.

    Raises:
        AssertionError: it failed.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)  # which would not compile
    file = folder / "compile.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, file, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def taken(made: Any, capability: int, folder: Path) -> dict[str, Any]:
    """What a compiled kernel takes: bytes of shared memory, beside those that there are, registers of a thread, spilled bytes, and
    whether it has matrix products of tensor cores and asynchronous copies."""
    import triton

    from lcbench.kernels.triton_shapes import SHARED

    ptx, text = folder / "kernel.ptx", made.asm["ptx"]
    ptx.write_text(text)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = f"sm_{capability}{'a' if capability >= 90 else ''}"
    done = subprocess.run([assembler, "-v", "--gpu-name", target, ptx, "-o", "/dev/null"], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    spilled, registers = re.search(r"(\d+) bytes spill stores", said), re.search(r"Used (\d+) registers", said)
    assert spilled, said
    assert registers, said
    return {
        "shared": made.metadata.shared, "room": SHARED[divmod(capability, 10)] << 10, "spilled": int(spilled[1]),
        "registers": int(registers[1]), "mma": "mma" in text, "asynchronous": "cp.async" in text,
    }  # fmt: skip
