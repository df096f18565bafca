"""Who measures on this machine: seen by all its users, gone with the last process of a pack."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lcbench.runs import machine
from lcbench.runs.machine import Claim, beside, others, shown
from lcbench.runs.pack import Pack
from lcbench.runs.users import user_name
from tests.runs.test_corrupt import SETTINGS


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests measure on this machine, too."""
    word = secrets.token_hex(4)
    monkeypatch.setattr(machine, "PREFIX", f"test-{word}")
    monkeypatch.setattr(machine, "TURN", f"\0test-{word}.turn")


def pack(number: int, device: str | None = "cpu", scale: str = "1x2", sweep: str = "my sweep") -> Pack:
    return Pack(f"p{number}", sweep, "/nowhere", "local", scale, (), {}, {}, 5, replace(SETTINGS, site={"device": device}))


def gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(machine, "gpus_here", lambda: [{"uuid": f"GPU-1234-{name}"} for name in names])


def test_packs_of_cpu_ranks_wait_for_each_other() -> None:
    first, second = Claim(pack(1)), Claim(pack(2))
    assert not first.take(share=False)
    (other,) = second.take(share=False)
    assert str(other) == f"sweep my_sweep of {user_name(os.getuid())} (pid {os.getpid()}) on cpu"
    assert not second.descriptors
    assert not others("p1", ["cpu"])  # oneself is no other
    first.drop()
    assert not second.take(share=False)
    second.drop()
    assert not others("p3", ["cpu"])


def test_packs_on_gpus_wait_for_those_on_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, "a", "b", "c", "d")
    claims = [Claim(pack(1, None))]
    assert claims[0].devices == ["a", "b"]
    assert not claims[0].take(share=False)
    gpus(monkeypatch, "c", "d")  # what CUDA_VISIBLE_DEVICES leaves
    claims.append(Claim(pack(2, "h100")))
    assert not claims[1].take(share=False)
    gpus(monkeypatch, "b", "c")
    claims.append(Claim(pack(3, None)))
    assert [other.pack for other in claims[2].take(share=False)] == ["p1", "p2"]
    claims.append(Claim(pack(4, "cpu")))  # ranks on GPUs need cores, too
    assert {other.pack for other in claims[3].take(share=False)} == {"p1", "p2"}
    for claim in claims:
        claim.drop()


def test_who_shares_the_machine_is_seen_by_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Claim(pack(1)), Claim(pack(2, sweep="ü/a" * 90))
    assert not first.take(share=False)
    assert len(second.take(share=True)) == 1
    (seen,) = beside(pack(1))
    assert seen.startswith("sweep __a__a")
    assert len(beside(pack(2))) == 1
    assert len(beside(pack(3))) == 2
    second.drop()
    assert not beside(pack(1))
    first.drop()
    monkeypatch.delenv(machine.DEVICES, raising=False)
    with shown(pack(5)):
        assert os.environ[machine.DEVICES] == "cpu"
        with shown(pack(5)):  # two nodes of a development cluster
            assert [other.pack for other in others("p6", ["cpu"])] == ["p5"]
    monkeypatch.delenv(machine.DEVICES)
    assert not others("p6", ["cpu"])


def test_a_pack_is_at_work_as_long_as_one_of_its_processes() -> None:
    claim = Claim(pack(1))
    claim.take(share=False)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=claim.descriptors) as agent:
        claim.drop()  # however its command ended
        assert others("p2", ["cpu"])
        agent.kill()
        agent.wait()
    assert not others("p2", ["cpu"])


def test_names_of_strangers_block_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TURN_S", 0.1)
    strange = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(4)]
    for held, name in zip(strange, ("/a", "/p/x/y/cpu/s", "/p/1/2/cpu/s/t", ".turn"), strict=True):
        held.bind(f"\0{machine.PREFIX}{name}")
    claim = Claim(pack(1))
    assert not claim.take(share=False)
    claim.drop()
    for held in strange:
        held.close()
    monkeypatch.setattr(machine, "LISTED", tmp_path / "none")
    assert not others("p2", ["cpu"])
