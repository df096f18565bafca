"""Pictures of masks, drawn from exact counts of pairs per pixel: true at any length, with no S x S points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import BandMask
from lcbench.masks.convert import block_areas
from lcbench.masks.mask import Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXELS = 512
GAMMA = 0.4
LETTERS = 24  # across a picture of characters, which are twice as high as wide
EMPTY_HALF = 0.25  # from here on a pixel above or below an empty one is drawn as half a block
# Shades, and half a block each for the upper and the lower pixel.
BLOCKS, ASCII = (("░", "▒", "▓", "█"), ("▀", "▄")), ((".", ":", "+", "#"), ("^", "_"))


def shades(mask: Mask, pixels: int = PIXELS) -> NDArray[np.float64]:
    """Share of unmasked pairs in each pixel, queries down, keys across; a block map's is the mean over its maps."""
    parts = [mask] if isinstance(mask, BandMask) else [mask.bands(i) for i in range(mask.maps)]
    rows, columns = min(pixels, mask.num_q), min(pixels, mask.num_k)
    q_edges = np.arange(rows + 1) * mask.num_q // rows
    k_edges = np.arange(columns + 1) * mask.num_k // columns
    image = np.zeros((rows, columns))
    for part in parts:
        row, column, area = block_areas(part, q_edges, k_edges)
        image[row, column] += area
    return image / (np.outer(np.diff(q_edges), np.diff(k_edges)) * len(parts))


def drawn(mask: Mask, letters: int = LETTERS, *, ascii_only: bool = False) -> list[str]:
    """A mask in lines of ``letters`` characters, half as many of them, queries down, keys across; fewer for a mask of fewer tokens.

    A character is two pixels, one above the other: half a block where one of them is empty, else a shade of how many pairs count.
    It is blank only where none does.
    """
    ramp, (upper, lower) = ASCII if ascii_only else BLOCKS
    pixels = shades(mask, letters)
    if len(pixels) % 2:
        pixels = np.vstack([pixels, np.zeros_like(pixels[:1])])

    def letter(above: float, below: float) -> str:
        if above == below == 0:
            return " "
        if not (above and below) and max(above, below) >= EMPTY_HALF:
            return upper if above else lower
        return ramp[min(len(ramp) - 1, int((above + below) / 2 * len(ramp)))]

    return ["".join(map(letter, *pair)) for pair in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True)]


def draw(mask: Mask, title: str, axes: Axes) -> None:
    """Queries down, keys across, darker where more of a pixel's pairs count, and never too light to see."""
    axes.imshow(shades(mask) ** GAMMA, cmap="Blues", vmin=0, vmax=1, extent=(0, mask.num_k, mask.num_q, 0), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([0, mask.num_k])
    axes.set_yticks([0, mask.num_q])
    axes.tick_params(labelsize=7)


def save(pictures: list[tuple[Mask, str]], path: Path, columns: int = 6) -> None:
    """One picture, or a gallery; the format follows the file's suffix (png, pdf, svg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    side = 4.5 if len(pictures) == 1 else 2.3
    figure = Figure(figsize=(side * columns, side * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (mask, title) in zip(grid, pictures, strict=False):
        draw(mask, title, axes)
    for axes in grid[len(pictures) :]:
        axes.set_axis_off()
    grid[0].set_xlabel("keys", fontsize=8)
    grid[0].set_ylabel("queries", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
