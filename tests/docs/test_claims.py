"""Counts and evidence that the docs state are those of the checkout."""

from __future__ import annotations

import json
import re

from omegaconf import OmegaConf

from tests.docs.shown import ROOT

README = (ROOT / "README.md").read_text()
STATES_EVIDENCE = [ROOT / "README.md", ROOT / "docs" / "index.md"]


def values(axis: str) -> list[str]:
    """The values of an axis by their files; names that another benchmark has for one of them count once."""
    named = {path.stem: str(OmegaConf.load(path).get("name")) for path in (ROOT / "conf" / axis).glob("*.yaml")}
    return sorted(value for value, name in named.items() if value == name)


def rows(page: str, first: str) -> list[str]:
    """Names of the first column of the table whose head begins with ``first``."""
    text = (ROOT / "docs" / page).read_text().split(f"| {first} |", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `(\w+)` \|", text, re.M)


def evidence() -> dict[str, dict[str, set[str]]]:
    """By kind of GPU (a folder of results/) the kernels that were checked there and those that were timed, and strategies."""
    found: dict[str, dict[str, set[str]]] = {}
    for file in ROOT.glob("results/*/**/gpu-check.json"):
        seen = found.setdefault(file.relative_to(ROOT / "results").parts[0], {"checks": set(), "timings": set(), "cp": set()})
        told = json.loads(file.read_text())
        for kind in ("checks", "timings"):
            seen[kind] |= {row["kernel"] for row in told[kind] if row["status"] == "ok"}
    for gpu, seen in found.items():
        for file in (ROOT / "results" / gpu).glob("*/*/attempt-*.json"):
            result = json.loads(file.read_text())
            if result["status"] == "ok" and str(result["config"]["scale"]) != "1x1":
                seen["cp"].add(result["config"]["cp"]["name"])
    return found


def test_the_counts_of_the_readme_are_those_of_conf() -> None:
    strategies = values("cp")
    others = [
        s for s in strategies if str(OmegaConf.load(ROOT / "conf" / "cp" / f"{s}.yaml")["_target_"]).startswith("lcbench.cp.peers.")
    ]
    ours = len(strategies) - len(others) - len(["none"])
    told = re.search(r"(\d+) kernels \(.*?\), (\d+) strategies and (\d+) of other libraries, (\d+) masks", README)
    assert told
    assert [int(n) for n in told.groups()] == [len(values("kernel")), ours, len(others), len(values("mask"))]


def test_every_kernel_has_a_row() -> None:
    assert sorted(rows("kernels.md", "kernel")) == values("kernel")


def test_what_is_said_of_gpus_is_what_results_hold() -> None:
    """A folder of another GPU, or a kernel more, and this line has to be written anew."""
    found = evidence()
    for page in STATES_EVIDENCE:
        text = " ".join(page.read_text().replace(">", "").split())
        stated = re.search(r"What has run where(.*?)gpu-check` first", text)
        assert stated, page
        for gpu, seen in found.items():
            assert f"results/{gpu}" in stated[1]
            assert f"{len(seen['checks'])} of the {len(values('kernel'))} kernels" in stated[1], sorted(seen["checks"])
            assert f"{len(seen['cp'])} strategies" in stated[1], sorted(seen["cp"])


def test_the_words_of_the_code_are_explained() -> None:
    told = (ROOT / "docs" / "concepts.md").read_text()
    explained = {word for row in re.findall(r"^\| ([^|]+) \|", told, re.M) for word in re.split(r"[,(`) ]+", row.lower())}
    for word in (
        "shard",
        "bundle",
        "tile",
        "step",
        "side",
        "item",
        "move",
        "return",
        "session",
        "gang",
        "collector",
        "band",
        "problem",
        "choice",
    ):
        assert word in explained, word
    assert "head group" in told


def test_a_problem_is_one_thing() -> None:
    told = (ROOT / "docs" / "concepts.md").read_text()
    assert len(re.findall(r"^\| problem", told, re.M)) == 1


def test_synthetic_numbers_are_called_so_where_they_stand() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        lines = page.read_text().splitlines()
        for number, line in enumerate(lines):
            if line.startswith("<!-- prints:") and not line.startswith("<!-- prints: masks"):  # areas are counted, not measured
                wanted = (
                    "Nothing in this table is measured"
                    if line.startswith(("<!-- prints: choose", "<!-- prints: plan "))
                    else "synthetic"
                )
                assert wanted in " ".join(lines[max(0, number - 3) : number]), f"{page.name}:{number + 1}"
            if re.match(r"!\[.*\]\((docs/)?decision\.png\)", line):
                assert "synthetic" in " ".join(lines[number : number + 3]), f"{page.name}:{number + 1}"
