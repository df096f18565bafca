"""Commands in processes of their own that have third-party libraries already: loading those takes most of a short command's time.

A server loads them once and forks a process per command. That process has the command's words, folder, environment and files for
output, imports lcbench afresh, and ends as Python ends. What is about signals, about what is loaded, or about the start of Python
itself starts a Python of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from lcbench.grid.paths import REPOSITORY

# What planning loads; torch, MLflow and pandas, which a plan does not load, are left to who asks for them.
LOADED = (
    "numpy.ma", "numpy.f2py", "scipy.optimize", "scipy.special", "hydra.conf", "hydra.utils", "hydra._internal.hydra",
    "hydra._internal.utils", "hydra.experimental.callback", "omegaconf", "pydantic.dataclasses", "pydantic.types", "yaml",
    "rich.table", "rich.console", "filelock", "zoneinfo",
)  # fmt: skip
SERVER = f"""
import importlib, json, os, runpy, sys, warnings
for name in {LOADED!r}:
    importlib.import_module(name)
path = sys.path[1:]
while line := sys.stdin.readline():
    asked = json.loads(line)
    if not (child := os.fork()):
        for fd, file in enumerate((os.devnull, asked["out"], asked["err"])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND if fd else os.O_RDONLY), fd)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.path[:] = [os.getcwd(), *filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep)), *path]
        sys.argv = ["", *asked["words"]]
        if action := asked["env"].get("PYTHONWARNINGS"):
            warnings.simplefilter(action)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
"""


def lcbench(
    command: str, *words: str, cwd: Path = REPOSITORY, env: dict[str, str] | None = None, together: bool = False
) -> subprocess.CompletedProcess[str]:
    """``python -m lcbench.COMMAND WORDS``, as `subprocess.run` runs it with captured text.

    Args:
        together: stdout and stderr are one, which is stdout.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        asked = {
            "module": f"lcbench.{command}", "words": words, "cwd": str(cwd), "env": dict(os.environ) if env is None else env,
            "out": str(out), "err": str(out if together else err),
        }  # fmt: skip
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([f"lcbench.{command}", *words], code, out.read_text(), err.read_text())


@cache
def _server() -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # each command has its own
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=REPOSITORY, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # which closes its input, and so ends it
    return server
