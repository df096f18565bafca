"""Document lengths: always exactly the sequence, seeded, of the distribution they name; profiles and their fitting."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hydra.utils import get_object
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lcbench.grid.build import check_options
from lcbench.grid.command_line import look
from lcbench.grid.paths import CONF, REPOSITORY
from lcbench.grid.values import axis_values, parse_tokens
from lcbench.masks.band import DoesNotFit
from lcbench.masks.lengths import Explicit, Fixed, Histogram, Lengths, LogNormal, Uniform, document_bounds, fit
from lcbench.testing.masks import load
from tests.commands import lcbench

DRAWING = axis_values(CONF, "lengths")  # those that do not wait for lengths of the user's
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


@pytest.mark.parametrize("name", DRAWING)
def test_shipped_lengths_fill_a_million_tokens(name: str) -> None:
    config = check_options("lengths", load("lengths", name))
    options = {k: v for k, v in config.items() if k not in ("name", "_target_")}
    bounds = document_bounds(1 << 20, get_object(config["_target_"])(**options), (0, 0))
    assert bounds[-1] == 1 << 20


def probabilities(config: dict[str, Any]) -> dict[int, float]:
    """Of every length that a value of the axis draws, written from what its options mean."""
    config = check_options("lengths", config)
    name = config["_target_"].rpartition(".")[2]
    if name == "Fixed":
        return {config["length"]: 1.0}
    if name == "Uniform":
        return dict.fromkeys(range(config["low"], config["high"] + 1), 1 / (config["high"] - config["low"] + 1))
    if name == "LogNormal":
        normal = NormalDist(math.log(config["median"]), config["sigma"])
        below = [0.0, *(normal.cdf(math.log(n + 0.5)) for n in range(1, config["high"])), 1.0]  # rounded to n or less
        return {n + 1: b - a for n, (a, b) in enumerate(pairwise(below))}
    if name == "Packed":  # of the documents of its stream, before a pack cuts them
        every = sum(config["documents"])
        return {length: count / every for length, count in zip(config["lengths"], config["documents"], strict=True)}
    found: dict[int, float] = {}
    for (low, high), weight in zip(pairwise(config["edges"]), config["weights"], strict=True):
        # A share of the documents, or of the tokens, of which a longer document has more.
        tokens = sum(range(low, high)) / (high - low) if config["by"] == "tokens" else 1.0
        found |= dict.fromkeys(range(low, high), weight / (high - low) / tokens)
    total = sum(found.values())
    return {n: share / total for n, share in found.items()}


def stated(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("name", DRAWING)
def test_the_average_that_the_docs_state_is_the_one_that_is_drawn(name: str) -> None:
    config = load("lengths", name)
    shares = probabilities(config)
    exact = sum(n * share for n, share in shares.items())
    (row,) = re.findall(rf"^\| `{name}`.*\| ([\d,.]+) \|$", (REPOSITORY / "docs" / "masks.md").read_text(), re.MULTILINE)
    assert stated(row) == pytest.approx(exact, abs=0.5)
    options = {k: v for k, v in check_options("lengths", config).items() if k not in ("name", "_target_")}
    drawn = get_object(config["_target_"])(**options).sample(1 << 28, np.random.default_rng(0))
    spread = math.sqrt(sum((n - exact) ** 2 * share for n, share in shares.items()) / len(drawn))
    assert drawn.mean() == pytest.approx(exact, abs=5 * spread + 1e-9)
    assert min(shares) <= drawn.min() <= drawn.max() <= max(shares)


@pytest.mark.slow
def test_comments_of_profiles_state_what_is_drawn() -> None:
    comments = {n: " ".join(re.findall(r"^# (.*)$", (CONF / "lengths" / f"{n}.yaml").read_text(), re.MULTILINE)) for n in DRAWING}
    for name in ("web_text", "long_text_64k", "long_text_512k"):
        exact = sum(n * share for n, share in probabilities(load("lengths", name)).items())
        (said,) = re.findall(r"[Dd]rawn are ([\d,]+) tokens on average", comments[name])
        assert stated(said) == round(exact)
    # web_text: the weights are the log-normal's of the stated mean and sigma, per 1,000 documents; what is left out is the rest.
    web, config = comments["web_text"], load("lengths", "web_text")
    (mean,), (sigma,) = re.findall(r"taken as ([\d,]+) tokens", web), re.findall(r"sigma ([\d.]+),", web)
    normal = NormalDist(math.log(stated(mean)) - float(sigma) ** 2 / 2, float(sigma))
    shares = [1000 * (normal.cdf(math.log(b)) - normal.cdf(math.log(a))) for a, b in pairwise(config["edges"])]
    assert config["weights"] == pytest.approx(shares, abs=0.06)
    ((below, edge, above, top, rest),) = re.findall(
        r"the ([\d.]+) below (\d+) and the ([\d.]+) above (\w+) tokens are left out: ([\d.]+)\.", web
    )
    assert (int(edge), parse_tokens(top)) == (config["edges"][0], config["edges"][-1] - 1)
    assert float(below) == pytest.approx(1000 * normal.cdf(math.log(config["edges"][0])), abs=0.05)
    assert float(above) == pytest.approx(1000 * (1 - normal.cdf(math.log(config["edges"][-1]))), abs=0.05)
    assert float(rest) == pytest.approx(sum(config["weights"]))
    assert float(rest) == pytest.approx(1000 - float(below) - float(above), abs=0.1)
    # Long texts: the split, where the long part begins and ends, its doublings, and that the short part is web_text's log-normal.
    for name in ("long_text_64k", "long_text_512k"):
        said, config = comments[name], load("lengths", name)
        ((long, short),) = re.findall(r"(\d+) % of the tokens from long documents and (\d+) % short", said)
        ((end, low, high),) = re.findall(
            r"up to (\w+), the long part has as many tokens in each doubling from (\w+) to (\w+)\.", said
        )
        weight = {n: n * share for n, share in probabilities(config).items()}
        total = sum(weight.values())
        assert 100 * sum(w for n, w in weight.items() if n >= parse_tokens(low)) / total == pytest.approx(float(long), abs=0.05)
        assert 100 * sum(w for n, w in weight.items() if n < parse_tokens(end)) / total == pytest.approx(float(short), abs=0.05)
        assert max(weight) == parse_tokens(high)
        edges, weights = config["edges"], config["weights"]
        doublings = [w for a, w in zip(edges, weights, strict=False) if a >= parse_tokens(low)]
        assert doublings == [21.0] * len(doublings)
        assert [a for a in edges if a >= parse_tokens(low)][:-1] == [parse_tokens(low) << i for i in range(len(doublings))]
        bucket = [normal_token_share(normal, float(sigma), a, b) for a, b in pairwise(a for a in edges if a <= parse_tokens(end))]
        assert weights[: len(bucket)] == pytest.approx([float(short) * share / sum(bucket) for share in bucket], abs=0.006)


def normal_token_share(normal: NormalDist, sigma: float, low: int, high: int) -> float:
    """The tokens of a log-normal are log-normal too, their logarithm moved by sigma squared."""
    moved = NormalDist(normal.mean + sigma**2, sigma)
    return moved.cdf(math.log(high)) - moved.cdf(math.log(low))


def test_long_profiles_draw_long_tokens() -> None:
    for name, low, high in (("long_text_64k", 8192, 65536), ("long_text_512k", 65536, 524288)):
        config = load("lengths", name)
        sizes = np.diff(document_bounds(1 << 27, Histogram(config["edges"], config["weights"], config["by"]), (0, 0)))[:-1]
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
    run = ["lengths", str(path), "--name", "mine", "--conf", str(conf)]
    done = lcbench(*run)
    assert done.returncode == 0, done.stderr
    assert "lengths=mine" in done.stdout
    config = OmegaConf.to_container(OmegaConf.load(conf / "lengths" / "mine.yaml"))
    assert isinstance(config, dict)
    assert config["name"] == "mine"
    assert sum(config["weights"]) == 60
    plan = look(["mask=document", "lengths=mine", "--config-dir", str(conf)])
    assert plan.cells[0].cell.config["mask"]["lengths"]["name"] == "mine"
    again = lcbench(*run)
    assert again.returncode == 2
    assert "mine.yaml is there" in again.stderr
    path.write_text("12\nabc\n")
    bad = lcbench(*run[:-3], "other", *run[-2:])
    assert bad.returncode == 2
    assert "line 2: length=abc is no token count" in bad.stderr
    assert not (conf / "lengths" / "other.yaml").exists()
    assert (CONF / "lengths" / "web_text.yaml").exists()
