"""Makes words that come from results harmless where they are shown: names, causes and hosts are text, never markup or commands."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

# Of Unicode: controls, which steer a terminal, formats, which turn the direction of writing, line ends, and halves of pairs.
INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Cs"}
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last: full width, as Excel reads too
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?%?|[-+]?(inf|nan)|-")
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def printable(text: Any) -> str:
    """A text in which characters that a terminal obeys or does not show are spelled out: ESC is ``\\x1b``, a line end ``\\n``."""
    return "".join(_spelled(c) if unicodedata.category(c) in INVISIBLE else c for c in str(text))


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def plain(text: Any, style: str = "") -> Text:
    """For rich's tables: text, whose brackets are no markup."""
    from rich.text import Text

    return Text(printable(text), style=style)


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: one line of text, with an apostrophe before text that a spreadsheet would read as a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) and not NUMBER.fullmatch(text) else text


def markdown(text: Any) -> str:
    """Text for a cell of a Markdown table: one line, in which HTML, links, pictures, code and cell borders have no effect."""
    escaped = re.sub(r"([\\|`*\[\]~])", r"\\\1", printable(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def latex(text: Any) -> str:
    """Text of a LaTeX document."""
    return "".join(LATEX.get(c, c) for c in printable(text))
