"""Provenance: which code a number is from, also where git says something else or nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from lcbench.grid.build import build_kernel, build_strategy
from lcbench.measure import environment
from lcbench.measure.environment import git_state, libraries, modules_of, versions
from lcbench.testing.masks import load
from lcbench.testing.masks import names as values


def git(folder: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={"PATH": os.environ["PATH"], "HOME": str(folder)})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout in the place of ours."""
    folder = tmp_path / "around" / "checkout"
    for name in ("lcbench/a.py", "conf/kernel/a.yaml", "launchers/b.py", "docs/c.md", ".gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("__pycache__/\n*.log\nmine*\n" if name == ".gitignore" else "first\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        git(folder, *command)
    use(folder, monkeypatch)
    return folder


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "REPOSITORY", folder)
    settings = ("-c", f"safe.directory={folder}", *environment.GIT_SETTINGS[2:])
    monkeypatch.setattr(environment, "GIT_SETTINGS", settings)


def clean(state: dict[str, Any]) -> bool:
    return len(state["commit"] or "") == 40 and state["dirty"] is False and state["diff_sha256"] is None


def test_what_the_commit_does_not_have_makes_it_dirty(checkout: Path) -> None:
    first = git_state()
    assert clean(first)
    (checkout / "lcbench" / "__pycache__").mkdir()
    (checkout / "lcbench" / "__pycache__" / "a.pyc").write_text("x")
    (checkout / "lcbench" / "notes.log").write_text("x")  # ignored, and nothing loads it
    (checkout / "docs" / "new.md").write_text("x")
    assert clean(git_state())
    hashes = {None}
    for name in (
        "lcbench/mine.py",
        "lcbench/sub/new.py",
        "conf/kernel/mine.yaml",
        "launchers/x.txt",
        "lcbench/fast.so",
        "numpy.py",
    ):
        path = checkout / name
        path.parent.mkdir(exist_ok=True)
        for text in ("one", "two"):
            path.write_text(text)
            state = git_state()
            assert state["dirty"] is True, name
            hashes.add(state["diff_sha256"])
        path.unlink()
    assert len(hashes) == 13
    for change in ("lcbench/a.py", "docs/c.md"):
        (checkout / change).write_text("s\xe4cond\n", encoding="latin-1")
        assert git_state()["dirty"] is True
        git(checkout, "checkout", "-q", ".")
    assert git_state()["sources_sha256"] == git_state()["sources_sha256"]


def test_a_checkout_told_to_overlook_changes_is_dirty_all_the_same_and_is_not_written(checkout: Path) -> None:
    git(checkout, "update-index", "--assume-unchanged", "lcbench/a.py")
    (checkout / "lcbench" / "a.py").write_text("changed\n")
    (checkout / "lcbench" / "new.py").write_text("added, not committed\n")
    git(checkout, "add", "lcbench/new.py")
    before = {p: p.stat().st_mtime_ns for p in checkout.rglob("*")}
    assert git_state()["dirty"] is True
    assert {p: p.stat().st_mtime_ns for p in checkout.rglob("*")} == before


def test_a_tarball_has_no_commit_and_says_which_sources(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_git = git_state()
    git(checkout.parent, "init", "-q")  # another repository around it
    git(checkout.parent, "commit", "-qm", "theirs", "--allow-empty")
    shutil.rmtree(checkout / ".git")
    state = git_state()
    assert (state["commit"], state["dirty"], state["diff_sha256"]) == (None, None, None)
    assert "not a git repository" in state["why_no_commit"]
    assert state["sources_sha256"] == with_git["sources_sha256"]
    (checkout / "lcbench" / "a.py").write_text("changed\n")
    assert git_state()["sources_sha256"] != with_git["sources_sha256"]
    # As a wheel.
    site = tmp_path / "site-packages"
    shutil.copytree(checkout / "lcbench", site / "lcbench")
    use(site, monkeypatch)
    installed = git_state()
    assert installed["commit"] is None
    (site / "lcbench" / "a.py").write_text("changed again\n")
    assert git_state()["sources_sha256"] != installed["sources_sha256"]


def test_the_environment_of_the_user_names_no_other_repository(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-qm", "theirs", "--allow-empty")
    expected = git_state()
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    assert git_state() == expected


def test_worktrees_and_submodules_have_commits_of_their_own(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = git_state()
    git(checkout, "worktree", "add", "-q", str(tmp_path / "tree"))
    use(tmp_path / "tree", monkeypatch)
    assert git_state() == main
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(checkout), "inner")
    git(outer, "commit", "-qm", "outer")
    use(outer / "inner", monkeypatch)
    assert git_state() == main
    shutil.rmtree(checkout / ".git")  # what the worktree pointed to is gone
    use(tmp_path / "tree", monkeypatch)
    assert git_state()["commit"] is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_checkout_of_another_owner_has_its_commit(checkout: Path) -> None:
    expected = git_state()
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 5, 60)
    assert git_state() == expected
    assert clean(expected)


def test_without_git_the_sources_are_named(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    state = git_state()
    assert state["commit"] is None
    assert state["why_no_commit"].startswith("git does not run")
    assert len(state["sources_sha256"]) == 64


def test_code_from_elsewhere_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "own_package_of_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "fast.py").write_text("one")
    (tmp_path / "own_module_of_kernels.py").write_text("one")
    targets = ["own_package_of_kernels.fast.Fast", "own_module_of_kernels.Fast", "lcbench.kernels.naive.Naive", "not_there.X"]
    first = modules_of(targets)
    assert sorted(first) == ["not_there", "own_module_of_kernels", "own_package_of_kernels"]
    (package / "fast.py").write_text("two")
    (tmp_path / "own_module_of_kernels.py").write_text("two")
    second = modules_of(targets)
    assert [first[name] == second[name] for name in sorted(first)] == [True, False, False]


def installed(folder: Path, name: str, version: str, origin: str | None = None) -> None:
    """A distribution as installers leave it."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if origin:
        (place / "direct_url.json").write_text(origin)


def test_every_library_of_a_kernel_or_peer_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = versions(torch.device("cpu"))
    assert {"python", "torch", "numpy", "hydra-core", "submitit", "mlflow", "triton"} <= set(here)
    wanted = libraries()
    assert {"flash-attn-3", "flash-attn-4", "nvidia-cudnn-frontend", "ring-flash-attn", "yunchang", "magi-attention"} <= wanted
    for number, name in enumerate(sorted(wanted - set(here))):
        installed(tmp_path, name, f"1.{number}.0+local")
    monkeypatch.syspath_prepend(tmp_path)
    found = versions(torch.device("cpu"))
    assert wanted <= set(found)
    assert all(found[name].endswith("+local") for name in wanted - set(here))


def test_what_calls_a_library_says_which() -> None:
    """A kernel or peer whose library may be missing is one whose library has a version to record."""
    kernels, peers = (build_kernel(load("kernel", name)) for name in values("kernel")), map(build, values("cp"))
    for user in (*kernels, *peers):
        module = import_module(type(user).__module__)
        if hasattr(module, "CALLS") or hasattr(module, "_calls") or getattr(user, "missing", lambda: None)():
            assert type(user).libraries, type(user).__name__  # type: ignore[attr-defined]


def build(name: str) -> Any:
    return build_strategy(load("cp", name))


def test_a_library_from_a_repository_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = '{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef0123"}}'
    installed(tmp_path, "flash_attn_3", "3.0.0b1", origin)
    monkeypatch.syspath_prepend(tmp_path)
    assert versions(torch.device("cpu"))["flash-attn-3"] == "3.0.0b1 at 0123456789ab"


def test_what_others_kernels_use_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_kernels.py").write_text("class Theirs:\n    libraries = ('their-library',)\n")
    (tmp_path / "their_broken.py").write_text("raise TypeError('no')\n")
    installed(tmp_path, "their-library", "7")
    monkeypatch.syspath_prepend(tmp_path)
    assert versions(torch.device("cpu"), ["their_kernels.Theirs", "their_broken.Broken"])["their-library"] == "7"
