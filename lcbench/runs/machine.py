"""Who measures on this machine: two packs that time beside each other on the same cores or GPUs disturb each other.

A pack has a socket in Linux's abstract namespace for each device that it uses, whose name says who it is. All users of a machine
see these names, whatever their folders for temporary files, and a name is gone with the last process that holds it, however that
ended. CPU ranks take all cores, so a pack of theirs is beside any other; packs on GPUs are beside each other if they share one.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lcbench.grid.values import parse_scale
from lcbench.measure.gpus import gpus_here
from lcbench.runs.pack import Pack
from lcbench.runs.users import user_name

SHARE = "LCBENCH_SHARE_MACHINE"
DEVICES = "LCBENCH_DEVICES"
CPU = "cpu"
LISTED = Path("/proc/net/unix")
PREFIX, TURN = "lcbench", "\0lcbench.turn"
NAME_BYTES = 107
PAUSE_S = 0.5
PR_SET_PDEATHSIG = 1
# Who looks whether the machine is free has it for microseconds; somebody who holds it longer means it.
TURN_S = 10.0


@dataclass(frozen=True)
class Other:
    """A pack at work here, as its name says."""

    pack: str
    uid: int
    pid: int
    device: str
    sweep: str

    def __str__(self) -> str:
        return f"sweep {self.sweep} of {user_name(self.uid)} (pid {self.pid}) on {self.device}"


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent dies, however it does; who calls looks whether it is dead already."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def devices_of(pack: Pack) -> list[str]:
    """What a pack of this machine's uses: ``cpu``, or the GPUs."""
    gpus = None if pack.site.get("device") == CPU else gpus_here()
    chosen = (gpus or [])[: parse_scale(pack.scale).gpus_per_node]
    return [gpu["uuid"].rpartition("-")[2] for gpu in chosen] or [CPU]


def others(pack_id: str, devices: Sequence[str]) -> list[Other]:
    """Packs besides this one that are at work on the same devices."""
    try:
        lines = LISTED.read_text(errors="replace").splitlines()
    except OSError:
        return []
    names = [line.rpartition(f"@{PREFIX}/")[2].split("/") for line in lines if f"@{PREFIX}/" in line]
    found = [Other(n[0], int(n[1]), int(n[2]), n[3], n[4]) for n in names if len(n) == 5 and n[1].isdigit() and n[2].isdigit()]
    same = (o for o in found if o.pack != pack_id and (CPU in (o.device, *devices) or o.device in devices))
    return sorted(set(same), key=lambda o: (o.pid, o.device))


def beside(pack: Pack) -> list[str]:
    """Those whom this process, a rank of the pack, sees at work on the same devices, in words."""
    return [str(other) for other in others(pack.id, os.environ.get(DEVICES, CPU).split(","))]


class Claim:
    """This pack's names. ``descriptors`` are for processes that shall hold them too."""

    def __init__(self, pack: Pack) -> None:
        self._pack, self.devices = pack, devices_of(pack)
        self._held: list[socket.socket] = []

    @property
    def descriptors(self) -> list[int]:
        return [held.fileno() for held in self._held]

    @property
    def environment(self) -> dict[str, str]:
        """What its processes need to know."""
        return {DEVICES: ",".join(self.devices)}

    def take(self, *, share: bool) -> list[Other]:
        """Show that this pack is at work, unless others are; these. With ``share`` it is shown all the same."""
        with _turn():
            found = others(self._pack.id, self.devices)
            if share or not found:
                for device in self.devices:
                    sweep = re.sub(r"[^\w.-]", "_", self._pack.sweep, flags=re.ASCII)
                    name = f"\0{PREFIX}/{self._pack.id}/{os.getuid()}/{os.getpid()}/{device}/{sweep}"[:NAME_BYTES]
                    with suppress(OSError):  # another node's agent of the same pack, simulated here, has that name
                        self._held.append(_bound(name))
        return found

    def drop(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()


def shares() -> bool:
    """Whether the user lets packs measure beside others."""
    return os.environ.get(SHARE, "0") not in ("", "0")


@contextmanager
def shown(pack: Pack) -> Iterator[None]:
    """Show that this pack is at work, for a node that others gave it: whoever is there too."""
    claim = Claim(pack)
    with ExitStack() as stack:
        stack.callback(claim.drop)
        with suppress(OSError):  # no such names here
            claim.take(share=True)
        os.environ.update(claim.environment)
        yield


@contextmanager
def _turn() -> Iterator[None]:
    """One at a time looks and decides. Somebody who keeps others from it is not waited for."""
    end, held = time.monotonic() + TURN_S, None
    while held is None and time.monotonic() < end:
        try:
            held = _bound(TURN)
        except OSError:
            time.sleep(0.01)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def _bound(name: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        made.bind(name)
    except OSError:
        made.close()
        raise
    return made
