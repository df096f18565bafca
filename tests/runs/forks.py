"""What the tests of the fork server run, in a process of its own: ``python -m tests.runs.forks <what> <folder>``."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lcbench.runs.forkserver import Forked, ForkServer, ServerDied, Start

ENDS = {
    "return": 0, "exit 0": 0, "exit 17": 17, "exit with words": 1, "raise": 1, "leave 0": 0, "leave 3": 3,
    "segfault": -signal.SIGSEGV, "abort": -signal.SIGABRT, "kill": -signal.SIGKILL, "terminate": -signal.SIGTERM,
    "interrupt": 1, "user signal": -signal.SIGUSR2,
}  # fmt: skip


def worker(what: str) -> None:
    print(f"{what} begins")
    print(f"{what} complains", file=sys.stderr)
    if what == "sleep":
        time.sleep(600)
    elif what == "tell":
        told = {
            "environment": dict(os.environ), "argv": sys.argv, "session": os.getsid(0) == os.getpid(), "parent": os.getppid(),
            "name": Path("/proc/self/comm").read_text().strip(), "hangup": int(signal.getsignal(signal.SIGHUP)),
            "random": os.urandom(4).hex(),
        }  # fmt: skip
        print(json.dumps(told))
    elif what == "exit with words":
        sys.exit("words")
    elif what.startswith("exit"):
        sys.exit(int(what.split()[1]))
    elif what.startswith("leave"):
        os._exit(int(what.split()[1]))
    elif what == "raise":
        raise ValueError("as told")
    elif what == "segfault":
        ctypes.string_at(0)
    elif what == "abort":
        os.abort()
    elif what in SIGNALS:
        os.kill(os.getpid(), SIGNALS[what])
        time.sleep(60)


SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT, "user signal": signal.SIGUSR2}


def started(server: ForkServer, folder: Path, what: str, **variables: str) -> Forked:
    out, err = (str(folder / f"{what}.{stream}") for stream in ("out", "err"))
    return server.start(Start((what,), {"PATH": os.environ["PATH"], **variables}, out, err, f"lcbench rank {len(what)}"))


def main(what: str, folder: Path) -> Any:
    """As an agent does: handlers of its own, a signal that it was started to ignore, and a variable that is nobody else's."""
    signal.signal(signal.SIGTERM, lambda *_: print("the agent's handler ran", file=sys.stderr))
    signal.signal(signal.SIGUSR2, lambda *_: print("the agent's handler ran", file=sys.stderr))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.environ["ONLY_THE_AGENT"] = "1"
    server = ForkServer(worker)
    if what == "ends":
        found = {end: started(server, folder, end) for end in ENDS}
        codes = {end: worker.wait(30) for end, worker in found.items()}
        assert codes == {end: server.poll(worker.pid) for end, worker in found.items()}  # whoever asks again hears the same
        return codes
    if what == "tell":
        one, two = (started(server, folder, "tell", RANK=rank) for rank in "01")
        return {"codes": [one.wait(30), two.wait(30)], "server": server.pid}
    sleepers = [started(server, folder, "sleep") for _ in range(3)]
    pids = [server.pid, *(sleeper.pid for sleeper in sleepers)]
    if what == "the agent is killed":
        print(json.dumps(pids), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "the server is told to end":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(server.pid, number)
        sleepers[0].close()
        return [*pids, sleepers[0].wait(30), sleepers[1].poll()]
    if what == "the server is killed":
        os.kill(server.pid, signal.SIGKILL)
        codes = [sleeper.wait(30) for sleeper in sleepers]
        try:
            started(server, folder, "sleep")
        except ServerDied as error:
            return [*pids, codes, server.alive, str(error)]
    if what == "the server is closed":
        server.close()
        return pids
    raise ValueError(what)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
