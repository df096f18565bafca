"""Starts the workers of a node as copies of its agent: what takes them seconds to import, and their memory, is there once.

An agent has threads and connections, which a copy must not have. So it forks a server first, while it has neither, and the server
forks the workers. It asks the server over a pair of sockets that no other process can reach. A worker is like a program that was
started: it has the environment, the signals, the session and the output of its own, it dies with the server, and the server with
the agent, however that ends.

CUDA does not work in a copy of a process that has used it, so the server is forked before anybody looks at a GPU.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from lcbench.runs.machine import signal_when_parent_dies

# Whom they reach as one of a job or of a terminal, they tell to end, or something that is the agent's or a worker's to do.
TELLING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
WAIT_EVERY_S = 0.02
STDOUT, STDERR = 1, 2
# What ps and top show: the command line is the agent's.
SERVER_NAME, RANK_NAME = "lcbench forks", "lcbench rank"
COMM = Path("/proc/self/comm")
COMM_BYTES = 15


class ServerDied(RuntimeError):
    """The fork server is gone, and its workers with it."""

    def __init__(self) -> None:
        super().__init__("the process that forks the ranks was killed, and they with it")


@dataclass(frozen=True)
class Start:
    """A worker to be started.

    Attributes:
        arguments: of the server's target.
        environment: all of its variables.
        stdout: path of the file that what it prints goes to; it is made anew.
        stderr: the same for its errors.
        name: as ``ps -o comm`` shows it, up to 15 bytes.
    """

    arguments: tuple[Any, ...]
    environment: dict[str, str]
    stdout: str
    stderr: str
    name: str


class ForkServer:
    """A copy of this process as it is now, which forks workers that run ``target``.

    Raises:
        RuntimeError: this process has used CUDA.
    """

    def __init__(self, target: Callable[..., None]) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise RuntimeError("CUDA is in use here already, and works in no copy of this process")
        self._channel, theirs = Pipe()
        _flush()
        agent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._channel.close()
            _serve(theirs, target, agent)
        theirs.close()
        self.alive = True
        # A signal's handler may raise in the main thread at any moment, and must not come between a question and its answer.
        self._asking = ThreadPoolExecutor(1, "fork server")

    def start(self, asked: Start) -> Forked:
        """Start a worker.

        Raises:
            ServerDied: there is no server any more.
        """
        return Forked(self, self._ask(asked))

    def poll(self, pid: int) -> int | None:
        """How a worker ended: its exit code, or the negative number of its signal; None while it runs."""
        try:
            code: int | None = self._ask(pid)
        except ServerDied:  # it took its workers with it
            return -signal.SIGKILL
        return code

    def close(self) -> None:
        """End the server, and with it workers that are left."""
        self.alive = False
        self._asking.shutdown()
        self._channel.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _ask(self, question: Start | int) -> Any:
        answer = self._asking.submit(self._exchange, question).result()
        if isinstance(answer, OSError):
            raise answer
        return answer

    def _exchange(self, question: Start | int) -> Any:
        try:
            self._channel.send(question)
            return self._channel.recv()
        except (EOFError, OSError) as error:
            self.alive = False
            raise ServerDied from error


class Forked:
    """A worker, as torch elastic knows processes: like a ``subprocess.Popen`` and its handler in one."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    @property
    def proc(self) -> Forked:
        return self

    def poll(self) -> int | None:
        """Exit code, or the negative number of the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.poll(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Args:
            timeout: in seconds; None waits for ever.

        Raises:
            TimeoutExpired: it goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and timeout is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout)
            time.sleep(WAIT_EVERY_S)
        return code

    def close(self, death_sig: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to its session."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, death_sig)


@contextmanager
def forking(target: Callable[..., None]) -> Iterator[ForkServer]:
    """A fork server for as long as it is needed."""
    server = ForkServer(target)
    try:
        yield server
    finally:
        server.close()


# -- in the server ------------------------------------------------------------------------------------------------------


def _serve(channel: Connection, target: Callable[..., None], agent: int) -> NoReturn:
    """Do what the agent asks for until it is gone."""
    try:
        _die_with(agent)
        _name(SERVER_NAME)
        signals = _signals_of_a_program()
        for number in TELLING:
            signal.signal(number, signal.SIG_IGN)
        # A collection in a worker would write to the pages of all that is here, and have a copy of each.
        gc.collect()
        gc.freeze()
        ended: dict[int, int] = {}
        while True:
            asked = channel.recv()
            try:
                answer: int | OSError | None = (
                    _ended(asked, ended) if isinstance(asked, int) else _forked(asked, channel, target, signals)
                )
            except OSError as error:  # the machine has no room for another process
                answer = error
            if isinstance(asked, Start) and isinstance(answer, int):
                ended.pop(answer, None)  # the number of one that ended is given again
            channel.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    _flush()
    os._exit(1)


def _ended(pid: int, ended: dict[int, int]) -> int | None:
    """How a worker ended; kept, since who asked may have been interrupted before the answer came."""
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _forked(asked: Start, channel: Connection, target: Callable[..., None], signals: dict[int, Any]) -> int:
    """The process of a new worker, once signals reach it as its own."""
    server = os.getpid()
    ready, own = os.pipe()
    pid = os.fork()
    if pid == 0:
        channel.close()
        os.close(ready)
        _work(asked, target, signals, server, own)
    os.close(own)
    os.read(ready, 1)
    os.close(ready)
    return pid


def _work(asked: Start, target: Callable[..., None], signals: dict[int, Any], server: int, ready: int) -> NoReturn:
    """Be a worker, and end without going back to what this process was. ``ready``: what the server waits for is closed."""
    code = 1
    try:
        _die_with(server)
        os.setsid()
        for number, handler in signals.items():
            signal.signal(number, handler)
        os.close(ready)
        _name(asked.name)
        for stream, path in ((STDOUT, asked.stdout), (STDERR, asked.stderr)):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(opened, stream)
            os.close(opened)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.argv = [target.__module__, *map(str, asked.arguments)]
        os.environ.clear()
        os.environ.update(asked.environment)
        target(*asked.arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            _flush()
        os._exit(code)


def _signals_of_a_program() -> dict[int, Any]:
    """What a program that this process starts does about signals: what is ignored here it ignores, and the rest it forgets."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    asks = {number: handler for number, handler in handlers.items() if number in TELLING or callable(handler)}
    default: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    return {n: handler if handler == signal.SIG_IGN else default.get(n, signal.SIG_DFL) for n, handler in asks.items()}


def _die_with(parent: int) -> None:
    """Have Linux kill this process when its parent dies: a rank would measure on beside the job that takes its cells over."""
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != parent:  # it is dead already
        os._exit(1)


def _name(name: str) -> None:
    with suppress(OSError):
        COMM.write_bytes(name.encode()[:COMM_BYTES])


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
