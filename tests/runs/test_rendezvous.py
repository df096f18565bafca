"""The rendezvous: on a free port, for those who know the secret, on no more addresses than are needed."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from lcbench.runs import rendezvous
from lcbench.runs.files import write_json
from lcbench.runs.rendezvous import ANY, Meeting, NoRendezvous, _handler, _ports, listen, meeting_of, own_address

PARAMETERS: Any = SimpleNamespace(run_id="7.0.word", min_nodes=1, max_nodes=1, get_as_int=lambda *_: None)


def test_a_taken_port_is_left_and_none_is_of_the_range_of_outgoing_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = (int(word) for word in rendezvous.EPHEMERAL.read_text().split())
    assert not [port for port in _ports() if low <= port <= high]
    first, second = (listen("127.0.0.1") for _ in range(2))
    taken, port = first.getsockname()[1], second.getsockname()[1]
    second.close()
    monkeypatch.setattr(rendezvous, "_ports", lambda: [taken, port])
    with listen("127.0.0.1") as found:
        assert found.getsockname() == ("127.0.0.1", port)
        with listen("127.0.0.1") as last:  # all are taken: what the kernel gives
            assert last.getsockname()[1] not in (taken, port)
    first.close()
    with pytest.raises(NoRendezvous, match=r"cannot listen on 192\.0\.2\.1:\d+: Cannot assign"):
        listen("192.0.2.1")


def test_the_range_of_outgoing_connections_may_be_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "range"
    monkeypatch.setattr(rendezvous, "EPHEMERAL", said)
    assert len(_ports()) == rendezvous.TRIES  # none is known
    said.write_text("1024\t65535\n")
    assert not _ports()
    with listen("127.0.0.1") as found:
        assert found.getsockname()[1]
    said.write_text("20003 65535")
    assert sorted(_ports()) == [20000, 20001, 20002]


def test_a_node_listens_where_the_others_reach_it_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"a": "10.0.0.1", "b": "10.0.0.2", "own": "127.0.1.1", "here": "127.0.0.1", "too": "127.0.0.1"}
    monkeypatch.setattr(rendezvous, "_address", names.get)
    assert own_address(0, ["a"]) == own_address(0, ["nobody"]) == "127.0.0.1"
    assert [own_address(node, ["a", "b"]) for node in range(2)] == ["10.0.0.1", "10.0.0.2"]
    assert own_address(0, ["own", "b"]) == ANY
    assert [own_address(node, ["here", "too"]) for node in range(2)] == ["127.0.0.1"] * 2
    assert own_address(0, ["nobody", "b"]) == ANY
    assert own_address(0, ["here", "nobody"]) == ANY


def test_the_file_is_private_whatever_the_umask_and_gone_at_the_end(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with meeting_of(tmp_path, "7.0", node=0, hosts=["n1"]) as (meeting, listening):
            (path,) = tmp_path.iterdir()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.name == "rendezvous-7.0.json"
            assert listening is not None
            assert listening.getsockname() == (meeting.address, meeting.port)
            assert meeting.secret not in meeting.token("run id")
            with meeting_of(tmp_path, "7.0", node=1, hosts=["n1"]) as (same, none):
                assert (same, none) == (meeting, None)
            listening.close()
    finally:
        os.umask(before)
    assert not list(tmp_path.iterdir())


def test_other_nodes_wait_for_the_file_of_their_own_run_and_believe_no_open_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = json.dumps(vars(Meeting("10.0.0.1", 20001, "00")))
    (tmp_path / "rendezvous-7.0.json").write_text(said)  # of the run before
    open_to_all = tmp_path / "rendezvous-7.1.json"
    open_to_all.write_text(said)
    open_to_all.chmod(0o644)
    monkeypatch.setattr(rendezvous, "JOIN_S", 0.5)
    with pytest.raises(NoRendezvous, match="n1 did not say"), meeting_of(tmp_path, "7.1", node=1, hosts=["n1", "n2"]):
        pass
    open_to_all.unlink()
    open_to_all.symlink_to(tmp_path / "rendezvous-7.0.json")
    with pytest.raises(NoRendezvous, match="n1 did not say"), meeting_of(tmp_path, "7.1", node=1, hosts=["n1", "n2"]):
        pass
    monkeypatch.setattr(rendezvous, "JOIN_S", 30.0)
    open_to_all.unlink()
    threading.Timer(0.3, lambda: write_json(open_to_all, json.loads(said), private=True)).start()
    with meeting_of(tmp_path, "7.1", node=1, hosts=["n1", "n2"]) as (meeting, _):
        assert meeting.endpoint == "10.0.0.1:20001"


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('PWNED').touch()",)


@pytest.mark.slow
def test_what_another_wrote_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """He reaches the port, and finds the key by listing all."""
    from base64 import b64encode

    from torch.distributed.elastic.rendezvous.api import RendezvousStateError

    monkeypatch.chdir(tmp_path)
    with meeting_of(tmp_path, "7.0", node=0, hosts=["n1"]) as (meeting, listening):
        handler = _handler(PARAMETERS, meeting, listening, "127.0.0.1", "n1")
        info = handler.next_rendezvous()
        gang = info.bootstrap_store_info
        assert gang is not None
        assert (info.rank, info.world_size, gang.master_addr) == (0, 1, "127.0.0.1")
        again = handler.next_rendezvous().bootstrap_store_info
        assert again is not None
        assert again.master_port != gang.master_port  # a gang meets no keys of the one before
        assert not handler.is_closed()
        stranger = TCPStore(meeting.address, meeting.port, is_master=False, wait_for_workers=False)
        (key,) = (k for k in stranger.list_keys() if k.endswith("torch.rendezvous.7.0.word"))
        state = pickle.dumps(Bomb())
        for forged in (state, b"\0" * 32 + state, b""):
            stranger.set(key.removeprefix("/"), b64encode(forged).decode())
            handler._state_holder._last_sync_time = -1.0  # type: ignore[attr-defined]  # as if a second had passed
            with pytest.raises(RendezvousStateError, match=rf"somebody else wrote into the rendezvous at {meeting.endpoint}"):
                handler.is_closed()
        handler._stop_heartbeats()  # type: ignore[attr-defined]
    assert not (tmp_path / "PWNED").exists()


def test_a_failure_to_connect_names_host_and_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "READ_S", 1.0)
    with listen("127.0.0.1") as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NoRendezvous, match=re.escape(f"no rendezvous at 127.0.0.1:{port}: ")):
        _handler(PARAMETERS, Meeting("127.0.0.1", port, "00"), None, "127.0.0.1", "n2")


def test_nothing_else_listens() -> None:
    with listen("127.0.0.1") as listening:
        port = listening.getsockname()[1]
        store = rendezvous._store_on(listening.dup())
        for line in (line for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]):
            local, state = line.split()[1], line.split()[3]
            assert state != "0A" or not local.endswith(f":{port:04X}") or local == f"0100007F:{port:04X}"
        store.set("a", "b")
        assert store.get("a") == b"b"


def test_ipv6() -> None:
    try:
        with listen("::1") as found:
            assert Meeting(*found.getsockname()[:2], "").endpoint.startswith("[::1]:")
    except (OSError, NoRendezvous):
        pytest.skip("no IPv6 here")
    assert socket.has_ipv6
