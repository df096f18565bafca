"""Inputs of a file: rows are those of the tensors, and what cannot be is one line before anything runs."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.inputs import file as module
from lcbench.inputs.base import Wanted
from lcbench.inputs.file import File
from lcbench.problem import Batch, Heads, Mesh, Problem, Requests, Scale
from lcbench.testing.masks import load

CPU, TOKENS, HEADS = torch.device("cpu"), 700, Heads(4, 2, 16)
BASE = ["mask=causal", "heads=4x2x16", "scale=1x2", "seqlen=512", "site=plain", "inputs=file"]


def problem(seqlen: int = TOKENS, heads: Heads = HEADS, dtype: str = "float64", batch: Batch | None = None) -> Problem:
    return Problem(seqlen, heads, Scale(1, 1), dtype, "forward_backward", batch=batch)


def layer(number: int, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16, heads: Heads = HEADS) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    sizes = {"q": (heads.q, heads.dim), "k": (heads.kv, heads.dim), "v": (heads.kv, heads.v)}
    return {f"layers.{number}.{n}": torch.randn(tokens, *size, generator=random).to(dtype) for n, size in sizes.items()}


def saved(path: Path, *layers: dict[str, torch.Tensor]) -> str:
    save_file({name: x for each in layers for name, x in each.items()}, path)
    return str(path)


@pytest.fixture
def captured(tmp_path: Path) -> str:
    return saved(tmp_path / "captured.safetensors", layer(0), layer(1), layer(5, dtype=torch.float32))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("number", [0, 5])
def test_any_rows_of_any_heads_are_those_of_the_tensor(
    captured: str, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOGETHER", 64)
    whole = layer(number, dtype=torch.float32 if number == 5 else torch.bfloat16)[f"layers.{number}.{name}"]
    for tokens in (np.arange(TOKENS), np.arange(3, TOKENS, 8), np.random.default_rng(0).permutation(TOKENS)[:99], np.arange(0)):
        for heads in (None, range(1, 2)):
            for dtype in (torch.float64, torch.bfloat16):
                of = problem(dtype=str(dtype).removeprefix("torch."))
                found = File(captured, number).draw(Wanted(name, tokens, of, 1, CPU, heads=heads))
                assert torch.equal(found, whole[tokens][:, (heads or range(whole.shape[1])).start :][:, : found.shape[1]].to(dtype))


def test_rows_are_read_by_slices_and_never_whole(captured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    asked: list[slice] = []

    class Rows:
        def __getitem__(self, where: tuple[slice, ...]) -> torch.Tensor:
            asked.append(where[0])
            return torch.zeros(where[0].stop - where[0].start, 2, 16)

    class Opened:
        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_slice(self, name: str) -> Rows:
            assert name == "layers.0.k"
            return Rows()

    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: Opened())
    monkeypatch.setattr(module, "TOGETHER", 64)
    File(captured).draw(Wanted("k", np.arange(300, 400), problem(), 1, CPU))
    assert [(each.start, each.stop) for each in asked] == [(300, 320), (320, 384), (384, 400)]


def test_other_layers_of_a_workload_are_those_that_follow(captured: str) -> None:
    of = problem()
    found = File(captured).draw(Wanted("k", np.arange(TOKENS), of, 1, CPU, layer=1))
    assert torch.equal(found, layer(1)["layers.1.k"].double())
    assert [File(captured, first).layers(of) for first in (0, 1, 5)] == [2, 1, 1]


def test_dout_is_not_in_a_file(captured: str) -> None:
    assert File(captured).draw(Wanted("dout", np.arange(8), problem(), 1, CPU)).shape == (8, 4, 16)


# -- what is refused -------------------------------------------------------------------------------------------------


def header(path: Path, **tensors: Any) -> str:
    text = json.dumps(tensors).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    return str(path)


def entry(shape: list[int], dtype: str = "F8_E4M3") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, 1]}


def test_a_bad_file_is_one_line(tmp_path: Path, captured: str) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors in here")
    short = tmp_path / "short.safetensors"
    short.write_bytes(Path(captured).read_bytes()[:-10])
    flat = {name: x.flatten(1) for name, x in layer(0).items()}
    apart = {**layer(0), "layers.0.k": layer(0)["layers.0.k"][:9].clone()}
    eight = {f"layers.0.{n}": entry([1, 1, 1]) for n in "qkv"}
    cases = {
        "is no file of safetensors": str(text),
        "is cut short": str(short),
        "has no tensor layers.3.q; it has q, k and v of layers 0, 1, 5": captured,
        "700x64 BF16, and not tokens x heads x dim": saved(tmp_path / "flat.safetensors", flat),
        "do not go together": saved(tmp_path / "apart.safetensors", apart),
        "F8_E4M3, and not of a type among": header(tmp_path / "eight.safetensors", **eight),
        "its header is none": header(tmp_path / "odd.safetensors", x=[1]),
        "has 1 bytes": header(tmp_path / "sizes.safetensors", **{"layers.0.q": entry([1, 1, 1], "F32")}),
        "cannot be read": str(tmp_path / "none"),
    }
    for reason, path in cases.items():
        with pytest.raises(ValueError, match=r"inputs\.file=") as caught:
            File(path, 3 if path == captured else 0)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"inputs.layer=-1 is no"):
        File(captured, -1)


def test_a_problem_that_it_does_not_have_is_refused_with_the_reason(captured: str) -> None:
    one, batch = File(captured), Batch((Requests(2, 8, 8),))
    assert one.unsupported(problem()) is None
    assert one.unsupported(problem(64)) is None
    assert one.unsupported(problem(1024)) == "layer 0 of the file has 700 tokens, and the cell 1024"
    assert "heads=4x2x16, and the cell heads=8x2x16" in str(one.unsupported(problem(heads=Heads(8, 2, 16))))
    assert "batch=2q8" in str(one.unsupported(problem(16, batch=batch)))
    assert "latent" in str(one.unsupported(problem(heads=Heads(4, 1, 16, 8, latent=True))))
    assert "2 groups" in str(one.misfit(Mesh(tp=2)))
    assert one.misfit(Mesh()) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "number"), [("q", math.nan), ("k", math.inf), ("v", -math.inf)])
def test_what_is_no_number_is_found_before_anything_runs(
    tmp_path: Path, dtype: torch.dtype, name: str, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOGETHER", 64)
    tensors = layer(0, dtype=dtype)
    tensors[f"layers.0.{name}"][130, 1, 7] = number
    one = File(saved(tmp_path / "wrong.safetensors", tensors, layer(1)))
    assert f"layers.0.{name} of the file has {number:g} at token 130 of head 1" in str(one.unsupported(problem()))
    assert one.unsupported(problem(130)) is None
    assert File(one.file, 1).unsupported(problem()) is None


def test_what_the_type_of_a_cell_does_not_hold_is_refused(tmp_path: Path) -> None:
    tensors = {name: x.clamp(-9, 9) for name, x in layer(0, dtype=torch.float64).items()}
    tensors["layers.0.k"][3, 0, 0] = -1e6
    one = File(saved(tmp_path / "large.safetensors", tensors))
    assert "has -1e+06 at token 3 of head 0, which is no number of dtype=float16" in str(one.unsupported(problem(dtype="float16")))
    assert [one.unsupported(problem(dtype=dtype)) for dtype in ("bfloat16", "float32", "float64")] == [None] * 3
    for dtype, most in module.MOST.items():
        assert most == torch.finfo(getattr(torch, dtype)).max


def test_a_plan_reads_headers_without_torch(captured: str) -> None:
    loaded = "assert not {'torch', 'safetensors'} & set(sys.modules)"
    code = f"import sys; from lcbench.inputs.file import File; File({captured!r}); {loaded}"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- cells -----------------------------------------------------------------------------------------------------------


def cells(*words: str) -> list[tuple[Cell, str | None]]:
    return [(each.cell, each.skip) for each in look([*BASE, *words]).cells]


def test_layers_are_cells_and_the_content_is_pinned(captured: str, tmp_path: Path) -> None:
    found = cells(f"inputs.file={captured}", "inputs.layer=0,5", "-m")
    assert [reason for _, reason in found] == [None, None]
    assert len({cell.id for cell, _ in found}) == 2
    other = tmp_path / "elsewhere.safetensors"
    other.write_bytes(Path(captured).read_bytes())
    assert cells(f"inputs.file={other}")[0][0].id == found[0][0].id  # by content, not by path
    assert isinstance(build.build_inputs(found[0][0].config), File)
    content = bytearray(Path(captured).read_bytes())
    content[-1] ^= 1
    Path(captured).write_bytes(content)
    with pytest.raises(ValueError, match="has changed since this cell was planned"):
        build.build_inputs(found[0][0].config)


def test_a_large_file_is_digested_once(captured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    for cell, _ in cells(f"inputs.file={captured}", "inputs.layer=0,1,5", "seqlen=64,128", "-m"):
        build.build_inputs(cell.config)
    assert read == [captured]


def test_what_cannot_run_is_skipped_with_the_reason(captured: str) -> None:
    assert "the cell 1024" in str(cells(f"inputs.file={captured}", "seqlen=1k")[0][1])
    assert "2 groups" in str(cells(f"inputs.file={captured}", "mesh.tp=2")[0][1])
    prefill = ["workload=chunked_prefill", "workload.chunk=128", "direction=forward", f"inputs.file={captured}"]
    assert cells(*prefill, "layers=2")[0][1] is None
    assert cells(*prefill, "layers=3")[0][1] == "inputs file: it has inputs of 2 such layers, and workload.layers=3"


@pytest.mark.parametrize("name", ["gaussian", "structured"])
def test_a_workload_that_makes_its_own_queries_says_so(name: str) -> None:
    words = [word for word in BASE if word not in ("inputs=file", "heads=4x2x16")]
    for more in (["workload=block", "model=tiny", "layers=1"], ["workload=denoise", "heads=4x4x16", "direction=forward"]):
        reason = look([*words, *more, f"inputs={name}"]).cells[0].skip
        assert (reason is None) == (name == "gaussian"), reason
        assert name == "gaussian" or "makes its queries, keys and values itself" in str(reason)


def test_gaussian_inputs_are_not_said(captured: str) -> None:
    words = [word for word in BASE if word != "inputs=file"]
    (plain,), (said,) = look(words).cells, look([*words, "inputs=gaussian"]).cells
    assert "inputs" not in plain.cell.config
    assert plain.cell.id == said.cell.id
    assert "inputs=structured" in look([*words, "inputs=structured"]).cells[0].cell.label
    assert load("inputs", "structured")["critical"] == 0.1


# -- the recipe of the docs ------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Grouped-query attention that repeats its keys, as models do."""

    def __init__(self, random: torch.Generator) -> None:
        super().__init__()
        self.weights = [torch.randn(64, count * 16, generator=random) / 8 for count in (4, 2, 2)]
        self.given: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.unflatten(x @ weight, -1, (-1, 16)).transpose(1, 2) for weight in self.weights)
        self.given = [each[0].transpose(0, 1) for each in (q, k, v)]
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(Layer(random) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for one in self.layers:
            x = one(x)
        return x


def test_the_recipe_of_the_docs_captures_what_attention_is_given(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(recipe, names)
    model, path, before = Tiny(), tmp_path / "captured.safetensors", torch.nn.functional.scaled_dot_product_attention
    names["capture"](model, str(path), 2, {0, 2}, x=torch.randn(1, 90, 64, generator=torch.Generator().manual_seed(1)))
    assert torch.nn.functional.scaled_dot_product_attention is before
    for number in (0, 2):
        one = File(str(path), number)
        assert one.unsupported(problem(90)) is None
        for name, given in zip("qkv", model.layers[number].given, strict=True):
            assert torch.equal(one.draw(Wanted(name, np.arange(90), problem(90), 1, CPU)), given.double())
    with pytest.raises(ValueError, match=r"has no tensor layers\.1\.q"):
        File(str(path), 1)
