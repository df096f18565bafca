"""Files of measured times: what each form becomes, and what bad ones are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lcbench.commands.fit import main
from lcbench.masks.band import BandMask
from lcbench.predict import tables
from lcbench.predict.machines import machine_of
from lcbench.predict.observations import CellMemory, CellTime, CollectiveTime, KernelTime
from tests.slurm.stage import ROOT

H100, H200 = machine_of("h100"), machine_of("h200")
CALLS = "gpu,framework,kernel,op,batch,tokens,q_heads,kv_heads,head_dim,bytes,unit,latency,gpus"


def test_calls_of_kernels_and_collectives(tmp_path: Path) -> None:
    path = tmp_path / "whatever.txt"
    path.write_text(f"{CALLS}\nH100 SXM,mine,fa3,prefill causal,3,1000,16,2,64,,us,250,1\n"
                    "H100 SXM,NCCL,NCCL,alltoall,,,,,,4e6,ms,0.5,4\n"
                    "H100 SXM,x,fa3,decode,1,1000,16,2,64,,ms,1,1\nB200,x,fa3,prefill causal,1,1000,16,2,64,,ms,1,1\n")  # fmt: skip
    found = tables.read(path, H100)
    kernel, collective = found.observations
    assert isinstance(kernel, KernelTime)
    assert isinstance(collective, CollectiveTime)
    assert (kernel.kernel, kernel.seconds, kernel.backward) == ("flash_attn3", pytest.approx(250e-6), False)
    assert kernel.tiles.pairs.tolist() == [3 * 1000 * 1001 / 2]
    assert kernel.tiles.pieces.tolist() == [3]
    assert (collective.operation, collective.block, collective.ranks, collective.seconds) == ("all_to_all", 1e6, 4, 0.5e-3)
    assert dict(found.left_out) == {"decode: no strategy does that": 1, "of B200": 1}


@pytest.mark.parametrize("name", ["Ring P2P", "ring_p2p"])
@pytest.mark.parametrize("mask", ["full-doc", "document", "full_document"])
def test_published_rows_by_either_style_of_names(tmp_path: Path, name: str, mask: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"gpu,strategy,mask,world_size,tokens_per_gpu,heads,dtype,phase,tflops_per_gpu\n"
                    f"H100,{name},{mask},4,2048,16x4x128,bfloat16,forward,200\nH100,{name},{mask},16,2048,16x4x128,bfloat16,forward,150\n"
                    f"H100,nobody's,{mask},4,2048,16x4x128,bfloat16,forward,9\n")  # fmt: skip
    found = tables.read(path, H100, ranks=8)
    (seen,) = found.observations
    assert isinstance(seen, CellTime)
    assert seen.cell.label.startswith("ring flash_attn3 document(packed_quarters) 8k 1x4")
    assert seen.cell.config["cp"]["layout"] == "documents"
    assert set(seen.phases) == {"forward"}
    assert [(row.cell.scale.world_size, row.tflops) for row in found.rows] == [(4, 200), (16, 150)]
    assert dict(found.left_out) == {"nobody's: no strategy does that": 1}


def test_what_gpu_check_writes(tmp_path: Path) -> None:
    """Of the first rows of a file that is kept."""
    path = tmp_path / "check.json"
    known = json.loads((ROOT / "results" / "h200" / "gpu-check.json").read_text())
    path.write_text(json.dumps(known | {"timings": known["timings"][:8]}))
    rows = [row for row in known["timings"][:8] if row["status"] == "ok"]
    found = tables.read(path, H200)
    times = {(o.kernel, o.backward, o.seconds) for o in found.observations if isinstance(o, KernelTime)}
    assert len(times) == sum(f"time/{phase}/median_s" in row["metrics"] for row in rows for phase in ("forward", "backward"))
    peaks = [(o.cell.words["kernel"], o.peak_bytes) for o in found.observations if isinstance(o, CellMemory)]
    assert peaks == [(row["kernel"], row["metrics"]["memory/peak_bytes"]) for row in rows]
    assert (rows[0]["kernel"], False, rows[0]["metrics"]["time/forward/median_s"]) in times
    assert not tables.read(path, H100).observations


def test_names_are_names() -> None:
    """Every published name is one cell, and every GPU a machine's."""
    names = tables.names()
    assert all(machine_of(device).device == device for device in names["gpus"].values())
    every = [name for strategy in names["strategies"].values() for name in strategy["names"]]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "is nothing to fit on: its columns are"),
        ("", "is nothing to fit on: its columns are none"),
        ("{", "line 1"),
        ('{"timings": []}', "it has no provenance"),
        (f"{CALLS}\nH100 SXM,x,fa3,prefill causal,1,many,16,2,64,,ms,1,1\n", "line 2: tokens=many is no number above 0"),
        (f"{CALLS}\nH100 SXM,x,fa3,prefill causal,1,1000,16,2,64,,h,1,1\n", "line 2: unit=h is none of ms, us, s"),
        (f"{CALLS}\nB200,x,fa3,prefill causal,1,1000,16,2,64,,ms,1,1\n", "is of machine=h100: 1 rows of B200"),
        ("cp,mask,world_size,phase,tflops_per_gpu\nUSP,round,8,forward,1\n", "line 2: mask=round phase=forward is none of"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    path = tmp_path / "table"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        main([str(path), "--machine", "h100", "--results", str(tmp_path)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.csv", "--machine", "h100"], "nowhere.csv is no file, no sweep"),
        (["shipped", "--machine", "h1000"], "machine=h1000 is none of"),
        (["shipped", "--machine", "h100", "--gpus", "0"], "--gpus 0 is less than 1"),
        (["shipped", "--machine", "h100", "--kernel", "fast"], "--kernel fast is none of"),
        (["shipped", "--machine", "h100", "--fit", "x", "--out", "y"], "write one of them"),
    ],
)
def test_bad_words_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*words, "--results", str(tmp_path)])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_is_fitted_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "calls.csv", tmp_path / "a.fit.json"
    lines = [
        f"H100 SXM,x,fa3,prefill causal,{b},{n},16,2,64,,ms,{1e-9 * b * n * n + 0.02:.6f},1"
        for b in (1, 2)
        for n in (512, 3000, 9000)
    ]
    path.write_text("\n".join([CALLS, *lines]))
    assert main([str(path), "--machine", "h100", "--out", str(out), "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "fa3 prefill causal" in shown.out
    assert f"written to {out}" in shown.err
    found = json.loads(out.read_text())
    assert found["kernels"][0]["kernel"] == "flash_attn3"
    assert main([str(path), "--machine", "h100", "--json", "--results", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_packs_hold_no_document_longer_than_a_quarter() -> None:
    from lcbench.masks.document import document
    from lcbench.masks.lengths import Packed

    lengths = Packed([30, 500, 5000], [5, 3, 1], parts=4)
    masks = [document(4000, seed=(7, draw), lengths=lengths) for draw in range(6)]
    sizes = np.concatenate([mask.bands[:, 1] - mask.bands[:, 0] for mask in masks])
    assert sizes.max() == 1000
    assert all(isinstance(mask, BandMask) and int((mask.bands[:, 1] - mask.bands[:, 0]).sum()) == 4000 for mask in masks)
    # 5 x 30 + 3 x 500 + 5 x 1000 of 6,650 tokens are in quarters.
    assert sizes[sizes == 1000].sum() / sizes.sum() == pytest.approx(5000 / 6650, abs=0.15)
    with pytest.raises(ValueError, match="must be as many"):
        Packed([1, 2], [1])
