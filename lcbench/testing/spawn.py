"""Run a function on P gloo ranks, for tests: real processes, real messages."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# Ranks are forked from a process that has imported these: importing torch, and what autograd imports at first use, takes longer
# than most of what ranks are for.
PRELOAD = [
    "lcbench.schedule.execute",
    "lcbench.workloads.attention",
    "lcbench.measure.cell",
    "lcbench.testing.spawn",
    "torch._dynamo",  # what autograd, DTensor and FSDP import when they first run
    "torch.distributed.fsdp",
    "lcbench.testing.interpreter",
    "scipy.optimize",
]
# Modules of tests import these too, and each rank imports the module that its function is in.
OF_TESTS = ("lcbench", "hypothesis", "pytest")

STARTED = "lcbench.testing.run_ranks"


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, prepare: Callable[..., Any] | None = None) -> None:
    """``function(rank, *args)`` on every rank, in the environment of the caller; an exception on any of them is raised here.

    Raises an audit event.

    ``prepare(*args)`` runs once, in a process that the ranks are forked from; they are then called with what it returns in place
    of ``args``. What every rank would find out by itself, such as plans and references, is found out there.
    """
    sys.audit(STARTED, world_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(preload())
    start = (dict(os.environ), world_size, port, function)
    if prepare is None:
        start_processes(_rank, (*start, args), nprocs=world_size, join=True, start_method="forkserver")
    else:
        start_processes(_lead, (*start, prepare, args), nprocs=1, join=True, start_method="forkserver")


def preload() -> list[str]:
    """``PRELOAD``, and what the caller has imported of ``OF_TESTS``: the first call starts the process that all ranks come from."""
    loaded = [name for name in sys.modules if name in OF_TESTS or name.startswith("lcbench.")]
    return [*PRELOAD, *loaded]


def _lead(
    _: int,
    environment: dict[str, str],
    world_size: int,
    port: int,
    function: Callable[..., Any],
    prepare: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _take(environment)
    torch.set_num_threads(1)
    prepared = (prepare(*args),)
    start_processes(_rank, (environment, world_size, port, function, prepared), nprocs=world_size, join=True, start_method="fork")


def _rank(
    rank: int, environment: dict[str, str], world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    _take(environment)
    torch.set_num_threads(1)
    gc.freeze()  # what the parent imported, which the collections before each measurement need not visit
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking torch down costs seconds where ranks share cores, and aborts now and then


def _take(environment: dict[str, str]) -> None:
    """In place of that of the process which this one is forked from, and which is as old as the first ranks."""
    os.environ.clear()
    os.environ.update(environment)
