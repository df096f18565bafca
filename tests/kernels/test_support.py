"""The support matrix: of this machine, of others, and as docs show it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcbench.commands.kernels import main

DOCS = Path(__file__).parents[2] / "docs"


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str, str, str], dict[str, object]]:
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {(row["kernel"], row["mask"], row["dtype"], row["direction"]): row for row in found}


def test_matrix_says_native_grouped_or_no_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(
        capsys, "kernel=sdpa_flash,flash_attn2,flashinfer,triton_block_sparse", "mask=causal,block_causal", "--platform", "h200"
    )
    assert len(found) == 4 * 2 * 4 * 2
    assert found["flash_attn2", "causal", "bfloat16", "forward"]["support"] == "native"
    grouped = found["flash_attn2", "block_causal", "bfloat16", "forward_backward"]
    assert (grouped["support"], grouped["calls"]) == ("grouped", 2)
    assert "not float64" in str(found["flash_attn2", "causal", "float64", "forward"]["reason"])
    assert found["flashinfer", "causal", "bfloat16", "forward"]["support"] == "native"
    assert "no backward" in str(found["flashinfer", "causal", "bfloat16", "forward_backward"]["reason"])
    assert "block masks only" in str(found["triton_block_sparse", "causal", "bfloat16", "forward"]["reason"])


def test_linear_attention_has_no_masks(capsys: pytest.CaptureFixture[str]) -> None:
    """Its kernels are no rows of the matrix; who names one is told why."""
    found = rows(capsys, "kernel=chunked,naive", "mask=causal", "heads=4x2x64", "seqlen=128")
    assert found["naive", "causal", "float32", "forward"]["support"] == "native"
    told = {row["reason"] for (kernel, *_), row in found.items() if kernel == "chunked"}
    assert told == {"is for linear attention, which has no masks (workload=linear_attention)"}


def test_this_machine_counts_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "kernel=sdpa_flash,flash_attn2", "mask=causal", "heads=4x2x64", "seqlen=128")
    assert found["sdpa_flash", "causal", "float32", "forward_backward"]["support"] == "native"
    assert found["flash_attn2", "causal", "bfloat16", "forward"]["support"] == "no"


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "h200"])
def test_docs_show_the_matrix_as_it_is(platform: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--platform", platform, "--markdown"]) == 0
    assert capsys.readouterr().out == (DOCS / f"support-{platform}.md").read_text(), "run make docs"


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--platform", "h2000"])
    assert "--platform h2000 is not one of this, cpu, a100" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["kernel=flesh"])
    assert "kernel=flesh is not one of" in capsys.readouterr().err
