"""What Hydra has composed in a process it is not asked for again, unless something that a config may look at has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from lcbench.grid import compose as made
from lcbench.grid.command_line import loader_of
from lcbench.grid.compose import compose
from lcbench.grid.expand import expand

LINES = ["cp=ring,ulysses", "mask=causal", "kernel=naive", "seqlen=64", "scale=1x2", "heads=2x2x8"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What Hydra is asked to compose."""
    found: list[list[str]] = []
    whole, axis = made._whole, made._axis

    def of_all(lines: list[str], loader: ConfigLoaderImpl) -> dict[str, Any]:
        found.append(lines)
        return whole(lines, loader)

    def of_one(name: str, lines: list[str], loader: ConfigLoaderImpl) -> tuple[Any, str | None]:
        found.append(lines)
        return axis(name, lines, loader)

    monkeypatch.setattr(made, "_whole", of_all)
    monkeypatch.setattr(made, "_axis", of_one)
    return found


def test_the_same_plan_is_composed_once_and_is_the_same(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcbench.grid.compose._composed", {})
    first = expand(LINES, loader_of(None))
    before = len(asked)
    assert before
    monkeypatch.setenv("LCBENCH_TEST", "what no config asks for")
    again = expand(LINES, loader_of(None))
    assert len(asked) == before
    assert [p.cell.id for p in again.cells] == [p.cell.id for p in first.cells]
    assert (again.options, again.site) == (first.options, first.site)
    expand(["cp=usp", *LINES[1:]], loader_of(None))
    assert asked[before:] == [["cp=usp"]]


def test_what_one_does_with_a_config_another_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    one = compose(["cp=ring"], loader_of(None))
    one["cp"]["name"] = one["site"]["name"] = "changed"
    other = compose(["cp=ring"], loader_of(None))
    assert other["cp"]["name"] == "ring"
    assert other["site"]["name"] != "changed"


@pytest.mark.slow
def test_another_environment_and_another_folder_of_configs_are_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "conf" / "cp"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("_target_: lcbench.cp.ring.Ring\nname: ${oc.env:LCBENCH_TEST}\nlayout: zigzag\n")
    loader, found = loader_of(str(tmp_path / "conf")), []
    for name in ("one", "other", "one"):
        monkeypatch.setenv("LCBENCH_TEST", name)
        found.append(compose(["cp=mine"], loader)["cp"]["name"])
    assert found == ["one", "other", "one"]
    with pytest.raises(ValueError, match="mine"):
        compose(["cp=mine"], loader_of(None))
    (tmp_path / "second" / "cp").mkdir(parents=True)
    (tmp_path / "second" / "cp" / "mine.yaml").write_text("_target_: lcbench.cp.ring.Ring\nname: second\nlayout: zigzag\n")
    assert compose(["cp=mine"], loader_of(str(tmp_path / "second")))["cp"]["name"] == "second"
