"""Document lengths of a file: batches, a stream, what is wrong in a file, and the cells that it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.grid.build import build_mask, cell_mask
from lcbench.grid.command_line import look
from lcbench.masks.band import DoesNotFit
from lcbench.masks.lengths import FromFile, document_bounds

BATCHES = "# a step\n300\n200 # long\n\n\n50\n# its second half\n450\n\n600\n"
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> str:
        path = tmp_path / "lengths.txt"
        path.write_text(text)
        return str(path)

    return written


def drawn(file: str, seqlen: int, draw: int) -> list[int]:
    return np.diff(document_bounds(seqlen, FromFile(file), (7, draw))).tolist()


def test_blank_lines_separate_batches_and_comments_do_not(write: Write) -> None:
    file = write(BATCHES)
    assert [drawn(file, 500, draw) for draw in range(3)] == [[300, 200], [50, 450], [500]]
    with pytest.raises(DoesNotFit, match=r"^lengths.file has 3 batches, and mask.samples wants a batch 4$"):
        drawn(file, 500, 3)
    with pytest.raises(DoesNotFit, match=r"^batch 2 of lengths.file has 500 tokens, fewer than seqlen=501$"):
        drawn(file, 501, 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 100))
@pytest.mark.slow
def test_draws_of_a_stream_are_all_of_its_tokens_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seqlen: int
) -> None:
    path = tmp_path_factory.mktemp("stream") / "lengths.txt"
    path.write_text("\n".join(map(str, lengths)))
    count = sum(lengths) // seqlen
    ends = {end for draw in range(count) for end in draw * seqlen + document_bounds(seqlen, FromFile(str(path)), (0, draw))}
    read = count * seqlen
    assert ends - {0} == {end for end in np.cumsum(lengths).tolist() if end < read} | set(range(seqlen, read + 1, seqlen))
    with pytest.raises(
        DoesNotFit, match=f"^lengths.file has {sum(lengths)} tokens, and draw {count + 1} of seqlen={seqlen} ends at"
    ):
        document_bounds(seqlen, FromFile(str(path)), (0, count))


@pytest.mark.parametrize("line", ["0", "-3", "1.5", "64k", "ten", "12 13", "9999999999999", "\u0663"])
def test_a_line_that_is_no_length_is_refused_by_its_number(write: Write, line: str) -> None:
    file = write(f"# lengths\n12\n{line}\n")
    with pytest.raises(
        ValueError, match=rf"^{file}, line 3: length={line} is no whole number of tokens of at least 1, such as 4096$"
    ):
        FromFile(file)
    with pytest.raises(ValueError, match=rf"lengths.txt, line 3: length={line} is no whole number"):
        look(["mask=causal_document", "lengths=file", f"lengths.file={file}", "seqlen=12"])


def test_a_file_without_lengths_or_no_file_is_refused(write: Write) -> None:
    for text in ("", "\n \n", "# nothing\n"):
        with pytest.raises(ValueError, match="holds no lengths; write one per line"):
            FromFile(write(text))
    with pytest.raises(ValueError, match=r"^lengths.file=nowhere.txt is no file$"):
        look(["mask=causal_document", "lengths=file", "lengths.file=nowhere.txt"])


def test_a_cell_is_of_the_content_of_its_file_wherever_that_is(write: Write, tmp_path: Path) -> None:
    file = write(BATCHES)
    words = ["mask=causal_document", "mask.samples=3", "lengths=file", "seqlen=500"]
    (planned,) = look([*words, f"lengths.file={file}"]).cells
    assert planned.skip is None
    bounds = [0, 300, 500, 0, 50, 500, 0, 500]
    ends = [end for draw in range(3) for end in sorted({0, *cell_mask(planned.cell, draw).bands[:, 1].tolist()})]
    assert ends == bounds
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text(BATCHES)
    (same,) = look([*words, f"lengths.file={elsewhere}"]).cells
    assert same.cell.id == planned.cell.id
    elsewhere.write_text(BATCHES.replace("50", "70"))
    (other,) = look([*words, f"lengths.file={elsewhere}", "seqlen=300"]).cells
    assert other.cell.id != planned.cell.id
    elsewhere.unlink()
    with pytest.raises(ValueError, match=r"elsewhere.txt of file has changed since this cell was planned; plan it anew$"):
        build_mask(same.cell.config["mask"], 500, same.cell.heads, 0)


def test_every_batch_of_a_cell_is_looked_at_before_it_runs(write: Write) -> None:
    words = ["mask=causal_document", "lengths=file", f"lengths.file={write(BATCHES)}", "seqlen=600", "mask.samples=1,3"]
    reasons = [planned.skip for planned in look(words).cells]
    assert reasons == ["mask causal_document: batch 1 of lengths.file has 500 tokens, fewer than seqlen=600"] * 2
    (planned,) = look([*words[:3], "seqlen=500", "mask.samples=4"]).cells
    assert planned.skip == "mask causal_document: lengths.file has 3 batches, and mask.samples wants a batch 4"
