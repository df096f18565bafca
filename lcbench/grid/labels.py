"""What to call cells among each other: what a label leaves out and differs between them is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lcbench.grid.cell import Cell, flat_options


def labels(cells: Iterable[Cell]) -> dict[str, str]:
    """By id what to call cells among each other: those that share a label are told apart by what differs between them."""
    several = list(cells)
    told = told_apart(several)
    return {cell.id: " ".join(filter(None, [cell.label, told[cell.id]])) for cell in several}


def told_apart(cells: Iterable[Cell]) -> dict[str, str]:
    """By id what differs between cells of the same label; empty for a label that only one has."""
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(cell.label, []).append(cell)
    found = {}
    for members in alike.values():
        flat = [cell.flat for cell in members] if len(members) > 1 else [{}]
        differing = _differing(flat)
        # What heads consist of says nothing that they do not.
        differing = [k for k in differing if not (k.startswith(("num_heads", "head_dim")) and "heads" in differing)]
        for cell, values in zip(members, flat, strict=True):
            found[cell.id] = " ".join(_said(values, differing))
    return found


def words_of(cells: Iterable[Cell], axis: str) -> dict[str, str]:
    """By id the word of an axis, with those of its options in brackets that differ between cells of the same word."""
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(cell.word(axis), []).append(cell)
    found = {}
    for word, members in alike.items():
        flat = [flat_options(cell, axis) for cell in members]
        differing = _differing(flat)
        for cell, values in zip(members, flat, strict=True):
            said = ", ".join(_said(values, differing))
            bracket = f"{word[:-1]}, {said})" if word.endswith(")") else f"{word}({said})"
            found[cell.id] = bracket if said else word
    return found


def _said(values: dict[str, object], keys: Sequence[str]) -> list[str]:
    """These options, without those that are at their default, of which a config says nothing."""
    return [f"{k}={values[k]}" for k in keys if values.get(k) is not None]


def _differing(flat: Sequence[dict[str, object]]) -> list[str]:
    """Keys of which these have not all the same value."""
    return [k for k in dict.fromkeys(k for one in flat for k in one) if any(one.get(k) != flat[0].get(k) for one in flat)]
