"""Token counts that are meant for long sequences, brought down to the size of a check."""

from __future__ import annotations

from typing import Any

from lcbench.grid.values import parse_tokens


def tokens_of(value: Any) -> int | None:
    """An option of a mask as a token count; None where it is none."""
    if isinstance(value, bool | float) or value is None:
        return None
    try:
        return parse_tokens(value)
    except ValueError:
        return None


def shrunk(tokens: int, seqlen: int) -> int:
    """1k is to be about a third of a small sequence, 64 and 128 some tokens; their order is kept."""
    return min(tokens, max(2, round(seqlen * (tokens / 8192) ** 0.5)))
