"""Document lengths: always exactly the sequence, seeded, of the distribution they name; profiles and their fitting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import get_object
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lcbench.grid.build import check_options
from lcbench.grid.paths import CONF
from lcbench.masks.band import DoesNotFit
from lcbench.masks.lengths import Explicit, Fixed, Histogram, Lengths, LogNormal, Uniform, document_bounds, fit
from lcbench.sweep import look
from lcbench.testing.masks import load, names

DISTRIBUTIONS = st.one_of(
    st.builds(Fixed, st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(0, 20)).map(lambda t: Uniform(t[0], t[0] + t[1])),
    st.builds(LogNormal, st.integers(1, 30), st.floats(0.1, 3), st.integers(30, 99)),
    st.builds(lambda by: Histogram([1, 3, 9, 27], [5.0, 0.0, 1.0], by), st.sampled_from(["documents", "tokens"])),
)


@given(DISTRIBUTIONS, st.integers(1, 300), st.integers(0, 5))
def test_documents_always_fill_the_sequence_exactly(lengths: Lengths, seqlen: int, seed: int) -> None:
    bounds = document_bounds(seqlen, lengths, (seed, 0))
    assert bounds[0] == 0
    assert bounds[-1] == seqlen
    assert (np.diff(bounds) >= 1).all()
    assert (document_bounds(seqlen, lengths, (seed, 0)) == bounds).all()


def test_distributions_are_what_they_say() -> None:
    sizes = {}
    for name, lengths in {
        "uniform": Uniform(10, 20),
        "log": LogNormal(500, 1.0, 100000),
        "documents": Histogram([1, 11, 101, 1001], [8, 1, 1]),
        "tokens": Histogram([1, 11, 101, 1001], [1, 1, 2], "tokens"),
    }.items():
        sizes[name] = np.diff(document_bounds(4_000_000, lengths, (1, 0)))[:-1]
    assert (sizes["uniform"].min(), sizes["uniform"].max()) == (10, 20)
    assert np.median(sizes["log"]) == pytest.approx(500, rel=0.05)
    assert np.log(sizes["log"]).std() == pytest.approx(1, rel=0.05)
    counts = np.histogram(sizes["documents"], [1, 11, 101, 1001])[0] / len(sizes["documents"])
    assert counts == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    tokens = np.histogram(sizes["tokens"], [1, 11, 101, 1001], weights=sizes["tokens"])[0] / sizes["tokens"].sum()
    assert tokens == pytest.approx([0.25, 0.25, 0.5], abs=0.01)


@pytest.mark.parametrize("name", [n for n in names("lengths") if n != "explicit"])
def test_shipped_lengths_fill_a_million_tokens(name: str) -> None:
    config = check_options("lengths", load("lengths", name))
    options = {k: v for k, v in config.items() if k not in ("name", "_target_")}
    bounds = document_bounds(1 << 20, get_object(config["_target_"])(**options), (0, 0))
    assert bounds[-1] == 1 << 20


def test_profiles_have_the_shape_that_their_source_gives() -> None:
    def drawn(name: str) -> np.ndarray:
        config = load("lengths", name)
        return np.diff(document_bounds(1 << 27, Histogram(config["edges"], config["weights"], config["by"]), (0, 0)))[:-1]

    web = drawn("web_text")
    assert web.mean() == pytest.approx(1100, rel=0.05)
    assert web.max() <= 12288
    for name, low, high in (("long_text_64k", 8192, 65536), ("long_text_512k", 65536, 524288)):
        sizes = drawn(name)
        assert sizes.max() <= high
        assert sizes[sizes >= low].sum() / sizes.sum() == pytest.approx(0.63, abs=0.04)


def test_explicit_lengths_must_add_up() -> None:
    assert document_bounds(9, Explicit([4, 5]), (0, 0)).tolist() == [0, 4, 9]
    with pytest.raises(DoesNotFit, match="9 tokens, seqlen is 10"):
        document_bounds(10, Explicit([4, 5]), (0, 0))


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=60))
def test_a_fit_counts_every_document_and_draws_inside_what_was_seen(lengths: list[int]) -> None:
    found = fit(lengths)
    assert sum(found.weights) == len(lengths)
    for a, b, weight in zip(found.edges, found.edges[1:], found.weights, strict=False):
        assert weight == sum(a <= n < b for n in lengths)
    drawn = found.sample(1000, np.random.default_rng(0))
    assert min(lengths) <= drawn.min()
    assert drawn.max() <= max(lengths)


def test_the_fit_command_writes_a_value_of_the_axis(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("120\n4096\n\n77\n" * 20)
    conf = tmp_path / "conf"
    run = [sys.executable, "-m", "lcbench.lengths", str(path), "--name", "mine", "--conf", str(conf)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lengths=mine" in done.stdout
    config = OmegaConf.to_container(OmegaConf.load(conf / "lengths" / "mine.yaml"))
    assert isinstance(config, dict)
    assert config["name"] == "mine"
    assert sum(config["weights"]) == 60
    plan = look(["mask=document", "lengths=mine", "--config-dir", str(conf)])
    assert plan.cells[0].cell.config["mask"]["lengths"]["name"] == "mine"
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 2
    assert "mine.yaml is there" in again.stderr
    path.write_text("12\nabc\n")
    bad = subprocess.run([*run[:-3], "other", *run[-2:]], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "line 2: 'abc'" in bad.stderr
    assert not (conf / "lengths" / "other.yaml").exists()
    assert (CONF / "lengths" / "web_text.yaml").exists()
