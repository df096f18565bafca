"""Every mask of conf/mask: against its own one-line formula, its own area, its converters; aliases; the paper's four mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from lcbench.grid.build import build_mask, get_object
from lcbench.masks.band import Band, BandMask, DoesNotFit
from lcbench.masks.band_file import band_file
from lcbench.masks.block import BlockMap
from lcbench.masks.block_causal import block_causal
from lcbench.masks.convert import varlen
from lcbench.masks.dilated_window import dilated_window
from lcbench.masks.document import document
from lcbench.masks.flex import block_mask, mask_mod
from lcbench.masks.global_sliding_window import global_sliding_window
from lcbench.masks.lengths import Explicit, Uniform, document_bounds
from lcbench.masks.prefix_lm_causal import prefix_lm_causal
from lcbench.masks.sliding_window import sliding_window
from lcbench.masks.star_attention import star_attention
from lcbench.problem import Heads
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import aliases, every_mask, load, names, small, small_config
from lcbench.testing.shrink import tokens_of

HEADS = Heads(4, 2, 8)
LENGTHS = [1, 2, 7, 64, 101]

Index = Any  # a torch tensor or a NumPy array of indices


def bounds_of(config: dict[str, Any], seqlen: int) -> np.ndarray:
    lengths = config["lengths"]
    return document_bounds(seqlen, Uniform(lengths["low"], lengths["high"]), (0, 0))


def formula(name: str, config: dict[str, Any], seqlen: int) -> Callable[[Index, Index], Index]:
    """(q, k) -> whether the pair counts: what a person would write into FlexAttention."""
    if "lengths" in config:
        bounds = torch.from_numpy(bounds_of(config, seqlen))
        owner = torch.searchsorted(bounds, torch.arange(seqlen), right=True) - 1
        start, last = bounds[owner], len(bounds) - 2
    if name == "temporal_graph":
        bounds = torch.from_numpy(document_bounds(seqlen, Uniform(config["low"], config["high"]), (0, 0)))
        owner = torch.searchsorted(bounds, torch.arange(seqlen), right=True) - 1
    c: dict[str, Any] = config
    if name.startswith("prefix_lm"):
        random = np.random.default_rng((0, 0) if name == "prefix_lm_causal" else (0, 0, 1))
        top = seqlen if name == "prefix_lm_causal" else int(bounds[1])
        prefix = c["prefix"] or int(random.integers(1, top + 1))
    formulas: dict[str, Callable[[Index, Index], Index]] = {
        "full": lambda q, k: q == q,
        "causal": lambda q, k: k <= q,
        "sliding_window": lambda q, k: (k <= q) & (k >= q - c["left"]),
        "sliding_window_full": lambda q, k: (k <= q + c["right"]) & (k >= q - c["left"]),
        "document": lambda q, k: owner[q] == owner[k],
        "causal_document": lambda q, k: (owner[q] == owner[k]) & (k <= q),
        "share_question": lambda q, k: ((owner[q] == owner[k]) | (owner[k] == 0)) & (k <= q),
        "causal_blockwise": lambda q, k: ((owner[q] == owner[k]) | (owner[q] == last)) & (k <= q),
        "prefix_lm_causal": lambda q, k: (k < prefix) | (k <= q),
        "prefix_lm_document": lambda q, k: (owner[q] == owner[k]) & ((k - start[k] < prefix) | (k <= q)),
        "global_sliding_window": lambda q, k: (
            (q < c["global_tokens"]) | (k < c["global_tokens"]) | ((k <= q + c["right"]) & (k >= q - c["left"]))
        ),
        "block_causal": lambda q, k: k // c["block_size"] <= q // c["block_size"],
        "block_causal_document": lambda q, k: (
            (owner[q] == owner[k]) & ((k - start[k]) // c["block_size"] <= (q - start[q]) // c["block_size"])
        ),
        "attention_sink": lambda q, k: (k <= q) & ((k < c["sink"]) | (k >= q - c["left"])),
        "dilated_window": lambda q, k: (k <= q) & (k >= q - c["left"]) & ((q - k) % c["dilation"] == 0),
        "star_attention": lambda q, k: (
            (k <= q) & ((q >= seqlen - c["query"]) | (k // c["block_size"] == q // c["block_size"]) | (k < c["anchor"]))
        ),
        "dual_scope": lambda q, k: ((k <= q + c["right"]) & (k >= q - c["left"])) | (k % c["every"] < c["global_size"]),
        "temporal_graph": lambda q, k: (owner[q] == owner[k]) & (k <= q),
    }
    return formulas[name]


STATIC = [n for n in names() if not n.startswith("block_") or n.startswith("block_causal")]
WITH_FORMULA = [n for n in STATIC if n != "band_file"]


@pytest.mark.parametrize("name", WITH_FORMULA)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_static_masks_equal_flex_masks_of_their_one_line_formula(name: str, seqlen: int, tmp_path: Path) -> None:
    config = small_config(name, seqlen, HEADS, tmp_path)
    if name == "star_attention" and seqlen < config["query"]:
        with pytest.raises(DoesNotFit, match="longer than seqlen"):
            small(name, seqlen, HEADS, tmp_path)
        return
    mask = small(name, seqlen, HEADS, tmp_path)
    wanted = formula(name, config, seqlen)
    dense = create_mask(lambda b, h, q, k: wanted(q, k), 1, 1, seqlen, seqlen, device="cpu")[0, 0].numpy()
    assert isinstance(mask, BandMask)
    assert (dense_heads(mask, 1)[0] == dense).all()
    assert mask.area == dense.sum()
    assert mask.overlap() is None


# Zero where an option may be zero, one, even, odd, as long as a sequence, longer than any.
VALUES = (1, 2, 3, 4, 5, 12, 13, 14, 1 << 40)
OPTIONS = {
    name: [
        option for option, value in load("mask", name).items() if tokens_of(value) is not None and option not in ("samples", "name")
    ]
    + ["prefix"] * name.startswith("prefix_lm")
    for name in WITH_FORMULA
}


def settings(name: str, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pair of values of every pair of options, the others as they are."""
    parameters = signature(get_object(config["_target_"])).parameters
    values = {o: (0, *VALUES) if "NonNegative" in str(parameters[o].annotation) else VALUES for o in OPTIONS[name]}
    for one, other in combinations_with_replacement(values, 2):
        for first, second in product(values[one], values[other]):
            if one != other or first == second:
                yield {one: first, other: second}


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if options])
def test_options_do_what_they_say_at_any_value(name: str, tmp_path: Path) -> None:
    """Small, even, odd and large ones, against the one-line formula point by point."""
    tried = 0
    for seqlen in (1, 12, 13):
        base = small_config(name, seqlen, HEADS, tmp_path)
        q, k = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None, :]
        for changed in settings(name, base):
            config = {**base, **changed}
            if refused(name, config, seqlen):
                with pytest.raises(ValueError, match="|".join(f"{option}=" for option in OPTIONS[name])):
                    build_mask(config, seqlen, HEADS, 0)
                continue
            mask = build_mask(config, seqlen, HEADS, 0)
            wanted = formula(name, config, seqlen)(q, k).expand(seqlen, seqlen).numpy()
            assert (dense_heads(mask, 1)[0] == wanted).all(), (seqlen, changed)
            tried += 1
    assert tried >= 14


def refused(name: str, c: dict[str, Any], seqlen: int) -> bool:
    return {
        "prefix_lm_causal": lambda: c["prefix"] is not None and c["prefix"] > seqlen,
        "star_attention": lambda: c["anchor"] > c["block_size"] or c["query"] > seqlen,
        "dual_scope": lambda: c["global_size"] >= c["every"],
        "dilated_window": lambda: c["left"] // c["dilation"] >= 1024,
        "temporal_graph": lambda: c["low"] > c["high"],
    }.get(name, lambda: False)()


@pytest.mark.parametrize("name", every_mask())
@pytest.mark.parametrize("seqlen", [64, 101])
def test_flex_forms_agree_with_the_dense_mask(name: str, seqlen: int, tmp_path: Path) -> None:
    mask = small(name, seqlen, HEADS, tmp_path)
    dense = torch.from_numpy(np.array(dense_heads(mask, HEADS.q)))
    mod = mask_mod(mask, torch.device("cpu"), HEADS.q)
    assert torch.equal(create_mask(mod, 1, HEADS.q, seqlen, seqlen, device="cpu")[0].bool(), dense)
    built = block_mask(mask, torch.device("cpu"), HEADS.q, block=16)
    pointwise = create_block_mask(mod, 1, HEADS.q, seqlen, seqlen, device="cpu", BLOCK_SIZE=16)
    heads = built.kv_num_blocks.shape[1]  # one table where heads do not differ
    assert torch.equal(built.to_dense().expand(1, HEADS.q, -1, -1), pointwise.to_dense())
    edge = seqlen // 16  # torch counts a block that is cut short as whole, which no kernel may skip the mask of
    for kind in ("kv", "full_kv"):
        for head in range(heads):
            for row in range(edge):
                mine, theirs = (
                    set(getattr(m, f"{kind}_indices")[0, head, row, : getattr(m, f"{kind}_num_blocks")[0, head, row]].tolist())
                    - {edge}
                    for m in (built, pointwise)
                )
                assert mine == theirs, (kind, head, row)


def test_block_mask_at_a_million_tokens_needs_no_points() -> None:
    mask = sliding_window(1 << 20, left=4096, right=0)
    built = block_mask(mask, torch.device("cpu"), block=4096)
    assert built.full_kv_num_blocks is not None
    assert built.kv_num_blocks[0, 0, :4].tolist() == [1, 2, 2, 2]
    assert built.full_kv_num_blocks.sum() == 0


@pytest.mark.parametrize(("alias", "name"), aliases().items())
def test_an_alias_is_the_same_cell(alias: str, name: str) -> None:
    assert load("mask", alias) == load("mask", name)


def test_longca_counted_the_two_sided_window_by_half() -> None:
    one_sided, both = sliding_window(4096, left=64, right=0).area, sliding_window(4096, left=64, right=64).area
    assert both == 2 * one_sided - 4096  # the diagonal is not counted twice


def test_longca_counted_the_global_window_by_half() -> None:
    q, k = np.ogrid[:300, :300]
    wanted = int(((q < 20) | (k < 20) | (abs(q - k) <= 10)).sum())
    assert global_sliding_window(300, global_tokens=20, left=10, right=10).area == wanted


def test_longca_put_one_token_too_many_into_the_prefix() -> None:
    mask = prefix_lm_causal(10, seed=(0, 0), prefix=4)
    assert list(dense_heads(mask, 1)[0, 0]) == [True] * 4 + [False] * 6
    assert mask.area == 55 + 6


@pytest.mark.parametrize("seqlen", [1, 512, 1024, 1025])
def test_longca_masked_everything_in_windows_longer_than_the_sequence(seqlen: int) -> None:
    causal_area = seqlen * (seqlen + 1) // 2
    assert sliding_window(seqlen, left=1024, right=0).area == causal_area
    assert sliding_window(seqlen, left=1024, right=1024).area == seqlen * seqlen


def test_block_causal_is_two_varlen_calls_not_a_staircase() -> None:
    assert len(varlen(block_causal(8192, block_size=64))) == 2
    assert len(varlen(document(8192, seed=(0, 0), lengths=Uniform(1, 64)))) == 1


def test_draws_differ_and_repeat(tmp_path: Path) -> None:
    for name in names():
        config = small_config(name, 101, HEADS, tmp_path)
        if "samples" not in config:
            continue
        areas = [dense_heads(small(name, 101, HEADS, tmp_path, seed=seed), HEADS.q) for seed in (0, 0, 1)]
        assert (areas[0] == areas[1]).all(), name
        assert (areas[0] != areas[2]).any(), name


def test_custom_masks_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mask.json"

    def write(content: object) -> str:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    good = {"seqlen": 8, "bands": [[0, 8, 0, 8, None, 0]]}
    assert list(band_file(8, file=write(good))) == [Band(0, 8, 0, 8, -7, 0)]
    with pytest.raises(DoesNotFit, match="8 tokens, seqlen is 9"):
        band_file(9, file=write(good))
    for content, words in (
        ("nonsense", "does not hold"),
        ({"bands": []}, "seqlen"),
        ({"seqlen": 8, "bands": [[0, 8, 0, 8]]}, "six whole numbers|IndexError"),
        ({"seqlen": 8, "bands": [[0, 9, 0, 8, None, None]]}, r"\[0, 9, 0, 8\] is empty or leaves"),
        ({"seqlen": 8, "bands": [[0, 8, 0, 8, None, 0], [3, 5, 2, 8, None, None]]}, "disjoint"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            band_file(8, file=write(content))
        assert not isinstance(caught.value, DoesNotFit)


def test_options_that_no_length_can_satisfy_are_refused_and_lengths_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match=r"anchor=9 is longer than mask\.block_size=8"):
        star_attention(64, block_size=8, anchor=9, query=1)
    with pytest.raises(ValueError, match="at most 1024"):
        dilated_window(1 << 16, left=4096, dilation=2)
    with pytest.raises(DoesNotFit, match="prefix=65 is longer than seqlen=64"):
        prefix_lm_causal(64, seed=(0, 0), prefix=65)
    with pytest.raises(DoesNotFit, match="add up to 9 tokens, seqlen is 10"):
        document(10, seed=(0, 0), lengths=Explicit([4, 5]))


def test_block_maps_are_of_the_kind_they_say(tmp_path: Path) -> None:
    dynamic = [n for n in names() if n not in STATIC]
    assert len(dynamic) >= 5
    for name in dynamic:
        assert isinstance(small(name, 64, HEADS, tmp_path), BlockMap), name
