from __future__ import annotations

import pytest

from lcbench.grid.cell import Cell
from lcbench.grid.values import parse_dtype, parse_heads, parse_option, parse_scale, parse_tokens
from lcbench.problem import Heads, Scale, format_tokens


@pytest.mark.parametrize(
    ("text", "tokens"), [("64k", 65536), ("1m", 1 << 20), ("512", 512), (4096, 4096), (1e6, 1000000), ("1_000", 1000), ("2K", 2048)]
)
def test_tokens(text: object, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["64q", "0", "-4k", "010", "1.5k", "", None, True, "k", 1.5, "1e6x"])
def test_bad_tokens_are_named_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="such as 512, 64k or 1m") as caught:
        parse_tokens(text)
    assert "\n" not in str(caught.value)


def test_scale_heads_and_dtype() -> None:
    assert parse_scale("12x8") == Scale(12, 8)
    assert parse_heads("32x8x128") == Heads(32, 8, 128)
    assert parse_dtype("bf16") == "bfloat16"
    for parse, text in (
        (parse_scale, "0x8"),
        (parse_scale, "8"),
        (parse_heads, "3x2x8"),
        (parse_heads, "4x4"),
        (parse_dtype, "fp8"),
    ):
        with pytest.raises(ValueError, match=str(text)):
            parse(text)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tuple[str, ...] | list[str] | None, "a list of names, such as [a,b], null"),
        (list[int], "a list of whole numbers"),
        (tuple[float, ...], "a list of numbers"),
        (int | None, "a whole number, null"),
    ],
)
def test_what_an_option_takes_is_said_as_it_is(kind: object, words: str) -> None:
    with pytest.raises(ValueError, match=r"cp\.x=ring") as caught:
        parse_option("ring", "cp.x", kind)
    assert str(caught.value) == f"cp.x=ring is not one of {words}"


def test_cell_id_depends_on_the_config_alone() -> None:
    config = {"seqlen": 1, "scale": "1x1"}
    assert Cell.from_config(config).id == Cell.from_config(dict(reversed(config.items()))).id
    assert Cell.from_config(config).id != Cell.from_config({**config, "seqlen": 2}).id
    assert [format_tokens(n) for n in (65536, 1 << 20, 1000)] == ["64k", "1m", "1000"]
