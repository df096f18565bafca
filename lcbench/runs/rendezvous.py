"""Where the agents of a pack meet: a socket on which node 0 listens, and a secret that only its owner's agents know.

torch elastic keeps the state of its rendezvous pickled in a TCPStore, which knows no accounts. So agents sign each state with the
secret, and refuse what another wrote before they unpickle it. Node 0 listens first and then writes the address to a file of mode
600, for which the other nodes wait. Ports lie outside of the range that the kernel gives to outgoing connections.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcbench.runs.files import write_json

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

BACKEND = "lcbench"
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT, LAST_PORT = 20000, 65535
TRIES = 100
# Nodes of a busy or oversubscribed machine answer late; a lost node is Slurm's to tell.
JOIN_S = 900.0
READ_S = 600.0
LOOK_EVERY_S = 0.2
ANY = "0.0.0.0"
DIGEST = "sha256"
DIGEST_BYTES = 32


class NoRendezvous(Exception):
    """The agents of a pack did not meet; the message names host and port."""


@dataclass(frozen=True)
class Meeting:
    """What the file of a rendezvous says. ``address``: what node 0 listens on, and what the others connect to."""

    address: str
    port: int
    secret: str

    @property
    def endpoint(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def token(self, purpose: str) -> str:
        """A word that only who has the secret can say."""
        return hmac.new(bytes.fromhex(self.secret), purpose.encode(), DIGEST).hexdigest()


@contextmanager
def meeting_of(folder: Path, incarnation: str, *, node: int, hosts: list[str]) -> Iterator[tuple[Meeting, socket.socket | None]]:
    """Where the agents of this run of a job meet; node 0 gets the socket that it listens on. The file is gone afterwards.

    Args:
        folder: the pack's.
        incarnation: of the job; a requeued one meets anew.
        hosts: the names of its nodes.

    Raises:
        NoRendezvous: no port could be had, or node 0 did not say one.
    """
    path = folder / f"rendezvous-{incarnation}.json"
    if node:
        yield _awaited(path, hosts[0]), None
        return
    address = own_address(0, hosts)
    listening = listen(address)
    port = listening.getsockname()[1]
    # Behind a wildcard, the name is what the others know.
    where = Meeting(hosts[0] if address == ANY else address, port, secrets.token_hex(32))
    try:
        write_json(path, asdict(where), private=True)
        yield where, listening
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def own_address(node: int, hosts: list[str]) -> str:
    """The one address of this node that the other nodes need: the loopback if there are none; ``ANY`` where this node's own name
    leads to the loopback and another's does not (some systems write that into /etc/hosts).
    """
    if len(hosts) == 1:
        return "127.0.0.1"
    own, *others = (_address(host) for host in (hosts[node], *hosts[:node], *hosts[node + 1 :]))
    if own is None or (_is_loopback(own) and not all(other and _is_loopback(other) for other in others)):
        return ANY
    return own


def listen(address: str) -> socket.socket:
    """A socket that listens at this address on a free port, outside of the range of outgoing connections where that is possible.

    Raises:
        NoRendezvous: there is none.
    """
    ports, why = [*_ports(), 0], ""
    for port in ports:  # 0, at last: what the kernel gives
        listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            listening.bind((address, port))
            listening.listen(2048)
            return listening
        except OSError as error:
            listening.close()
            why = f"{address}:{port}: {os.strerror(error.errno or 0)}"
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
    raise NoRendezvous(f"no rendezvous: cannot listen on {why}")


def use(meeting: Meeting, listening: socket.socket | None, *, node: int, hosts: list[str]) -> None:
    """Register this meeting as torch elastic's rendezvous backend ``BACKEND``."""
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    registry: Any = rendezvous_handler_registry
    registry._registry.pop(BACKEND, None)  # a process may run one pack after another
    address = own_address(node, hosts)
    registry.register(BACKEND, lambda parameters: _handler(parameters, meeting, listening, address, hosts[node]))


def _handler(
    parameters: RendezvousParameters, meeting: Meeting, listening: socket.socket | None, address: str, host: str
) -> RendezvousHandler:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStateError, RendezvousStoreInfo
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    key = bytes.fromhex(meeting.token("state"))

    class SignedBackend(C10dRendezvousBackend):
        name = BACKEND

        def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
            result = super().set_state(hmac.digest(key, state, DIGEST) + state, token)
            return None if result is None else (result[0], result[1], result[0] == state)

        def _decode_state(self, base64_state: bytes) -> tuple[bytes, Any] | None:
            found = super()._decode_state(base64_state)
            if found is None:
                return None
            said, state = found[0][:DIGEST_BYTES], found[0][DIGEST_BYTES:]
            if not hmac.compare_digest(said, hmac.digest(key, state, DIGEST)):
                raise RendezvousStateError(f"somebody else wrote into the rendezvous at {meeting.endpoint}")
            return state, found[1]

    class Handler(DynamicRendezvousHandler):
        def next_rendezvous(self) -> RendezvousInfo:
            # Otherwise a new gang meets the keys of the dead one, and gloo connects to addresses that are gone.
            self._bootstrap_store_info = self._shared_tcp_store_server = None
            store.set(f"lcbench/address/{host}", host if address == ANY else address)
            found = super().next_rendezvous()
            # Nodes are called by their names, by which they are sorted, and listen at one address each.
            gang = found.bootstrap_store_info
            assert gang is not None
            at = store.get(f"lcbench/address/{gang.master_addr}").decode()
            return RendezvousInfo(found.store, found.rank, found.world_size, RendezvousStoreInfo(at, gang.master_port))

        def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
            """For the ranks of one gang, on a port of its own."""
            return _store_on(listen(address))

    try:
        if listening is not None:
            store = _store_on(listening)
        else:
            store = TCPStore(
                meeting.address, meeting.port, is_master=False, timeout=timedelta(seconds=READ_S), wait_for_workers=False
            )
        backend = SignedBackend(store, parameters.run_id)
    except (RuntimeError, ValueError) as error:
        raise NoRendezvous(f"no rendezvous at {meeting.endpoint}: {innermost(error)}") from error
    return Handler.from_backend(
        parameters.run_id, store, backend, parameters.min_nodes, parameters.max_nodes, host,
        RendezvousTimeout(timedelta(seconds=JOIN_S)), keep_alive_interval=10, keep_alive_max_attempt=30,
    )  # fmt: skip


def _store_on(listening: socket.socket) -> TCPStore:
    """A store that serves this socket, and a client of it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = listening.getsockname()[:2]
    return TCPStore(
        "127.0.0.1" if address == ANY else address, port, is_master=True, timeout=timedelta(seconds=READ_S),
        wait_for_workers=False, master_listen_fd=listening.detach(),
    )  # fmt: skip


def _ports() -> list[int]:
    """Candidate ports in random order, because other agents on this machine look for one too."""
    low, high = LAST_PORT + 1, LAST_PORT
    with suppress(OSError, ValueError):
        low, high = (int(word) for word in EPHEMERAL.read_text().split())
    outside = [port for port in range(FIRST_PORT, LAST_PORT + 1) if not low <= port <= high]
    return random.SystemRandom().sample(outside, min(TRIES, len(outside)))


def _address(host: str) -> str | None:
    """What a name leads to from here."""
    with suppress(OSError):
        found = sorted(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), key=lambda entry: entry[0] != socket.AF_INET)
        return str(found[0][4][0])
    return None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _awaited(path: Path, host: str) -> Meeting:
    """What node 0 says, once it does."""
    end = time.monotonic() + JOIN_S
    while time.monotonic() < end:
        with suppress(OSError, ValueError, TypeError):
            os.listdir(path.parent)  # so that a network file system looks again
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
                status = os.fstat(file.fileno())
                # Who may write into the folder could have put another file there.
                if status.st_uid == path.parent.stat().st_uid and not status.st_mode & 0o077:
                    return Meeting(**json.load(file))
        time.sleep(LOOK_EVERY_S)
    raise NoRendezvous(f"no rendezvous: {host} did not say within {JOIN_S:.0f} s where it listens")


def innermost(error: BaseException) -> str:
    """The first cause of an exception, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
