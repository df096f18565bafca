"""What policies keep of forward for backward: results that no policy changes, and bytes as formulas say."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcbench.grid.build import build, build_kernel, build_strategy
from lcbench.kernels.base import Kernel
from lcbench.masks.causal import causal
from lcbench.masks.mask import Mask
from lcbench.measure.memory import peak_bytes
from lcbench.measure.session import Gang
from lcbench.problem import Mesh, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.models import Model
from lcbench.workloads.recompute import host
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.recompute.fraction import largest
from lcbench.workloads.recompute.offload import Offload
from lcbench.workloads.recompute.sizes import LayerBytes, layer_bytes, rows_of, step_peak
from lcbench.workloads.recompute.swap import stretches
from lcbench.workloads.recompute.token_wise import TokenWise
from lcbench.workloads.sharing import whole
from lcbench.workloads.step import BlockSession
from lcbench.workloads.training import Training
from tests.turns import due
from tests.workloads import plain

CPU = torch.device("cpu")
MODEL = Model(layers=3, hidden=24, heads_q=4, heads_kv=2, head_dim=8, ffn=40, vocab=30, rope_theta=1e4, qk_norm=True)
SEQLEN, CHUNK, SEED = 50, 9, 4  # no share of the tokens of a rank is a whole number of them
SHARES = (0.0, 0.37, 1.0)


def policies() -> dict[str, Recompute]:
    """Every policy of conf/ as it is there, and those with a share at its ends and between."""
    found: dict[str, Recompute] = {name: build(load("recompute", name)) for name in names("recompute")}
    found |= {f"token_wise {share}": TokenWise(share) for share in SHARES}
    found |= {f"offload {share}": Offload(share) for share in SHARES}
    return found | {f"checkpoints {share}": Offload(share, "checkpoints") for share in SHARES}


def session_of(
    policy: Recompute, mask: Mask, strategy: str, rank: int = 0, ranks: int = 1, *, model: Model = MODEL, dtype: str = "float64",
    kernel: Kernel | None = None, groups: Groups | None = None, seqlen: int = SEQLEN, layers: int = MODEL.layers,
    mesh: Mesh | None = None, **options: Any,
) -> BlockSession:  # fmt: skip
    mesh, scale = mesh or Mesh(), Scale(1, ranks)
    problem = Problem(seqlen, mesh.heads(model.heads()), mesh.group_scale(scale), dtype, "forward_backward")
    work = Work(
        Block(model, layers, loss_chunk=CHUNK, **options), problem, lambda _: mask,
        kernel or build_kernel(load("kernel", "reference")), build_strategy(load("cp", strategy)), {}, SEED,
        recompute=policy, mesh=mesh, scale=scale,
    )  # fmt: skip
    return BlockSession(work.workload, work, 0, work.arranged(Gang(rank, ranks, CPU, groups or Groups(), [])))


def one_step(training: Training, ranks: int) -> dict[str, torch.Tensor]:
    """Loss, dx of this rank and the weights' gradients of a step."""
    passed: Any = None
    for phase in training.phases().values():
        passed = phase(passed)
    dx, loss = passed
    loss = loss.clone()
    if ranks > 1:
        dist.all_reduce(loss)
    return {"loss": loss, "dx": dx} | {name: whole(weight.grad).clone() for name, weight in training.weights().items()}


# -- results -----------------------------------------------------------------------------------------------------------


def check_results(rank: int, ranks: int, folder: Path) -> None:
    groups, mask = Groups(), causal(SEQLEN)
    want = torch.load(folder / "want.pt")
    for strategy in due(("none",) if ranks == 1 else ("ring", "ulysses", "groupcast")):
        found: dict[str, dict[str, torch.Tensor]] = {}
        moved: dict[str, int] = {}
        for name, policy in policies().items():
            session = session_of(policy, mask, strategy, rank, ranks, groups=groups)
            assert session.refused is None, f"{strategy} {name}: {session.refused}"
            training = session.training
            got = found[name] = one_step(training, ranks)
            rows = torch.from_numpy(training.stack.attention.run.tokens)
            for key, exact in want.items():
                exact = exact[rows] if key == "dx" else exact
                error = float((got[key] - exact).abs().max() / exact.abs().max())
                assert error < 1e-12, f"{strategy} {name}: {key} is off by {error}"
            holds = training.recompute.host_bytes
            again = one_step(training, ranks)
            assert all(torch.equal(got[key], again[key]) for key in got), f"{strategy} {name}"
            assert training.recompute.host_bytes == holds, f"{strategy} {name}: a second step took more of the host's memory"
            moved[name] = holds
            check_kept(training, f"{ranks} ranks, {strategy} {name}")
        for one, other in (("token_wise 0.0", "full"), ("token_wise 1.0", "offload 1.0"), ("offload 0.0", "none")):
            assert all(torch.equal(found[one][key], found[other][key]) for key in want), f"{strategy}: {one} is not {other}"
        assert moved["token_wise 1.0"] == moved["offload 1.0"] > moved["token_wise 0.37"] > moved["token_wise 0.0"] > 0
        assert moved["offload 0.0"] == moved["checkpoints 0.0"] == moved["full"] == 0


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_policy_changes_no_result_and_keeps_what_its_formula_says(ranks: int, tmp_path: Path) -> None:
    mask = causal(SEQLEN)
    training = session_of(build(load("recompute", "none")), mask, "none").training
    weights = {key: weight.detach() for key, weight in training.weights().items()}
    torch.save(plain.step(MODEL, weights, training.x, training.labels, dense_heads(mask, MODEL.heads_q)), tmp_path / "want.pt")
    run_ranks(ranks, check_results, ranks, tmp_path)


def check_shared(rank: int, ranks: int) -> None:
    """Policies under weights that ranks share: the same as with none."""
    mask, groups = causal(SEQLEN), Groups()
    for strategy, mesh, fsdp in due([("ulysses", Mesh(), True), ("none", Mesh(tp=2), False), ("none", Mesh(dp=2), True)]):
        made = {
            name: session_of(policy, mask, strategy, rank, ranks, groups=groups, mesh=mesh, fsdp=fsdp)
            for name, policy in policies().items()
            if name in ("none", "token_wise", "token_wise 0.0", "token_wise 0.37", "offload 0.37", "checkpoints 1.0")
        }
        found = {name: one_step(session.training, ranks) for name, session in made.items()}
        for name, got in found.items():
            for key, exact in found["none"].items():
                error = float((got[key] - exact).abs().max() / exact.abs().max())
                assert error < 1e-12, f"{strategy} {mesh} fsdp={fsdp} {name}: {key} is off by {error}"
            again = one_step(made[name].training, ranks)
            assert all(torch.equal(got[key], again[key]) for key in got), f"{strategy} {mesh} fsdp={fsdp} {name}"


@pytest.mark.gloo
@pytest.mark.slow
def test_what_moves_is_the_same_under_weights_that_ranks_share() -> None:
    run_ranks(2, check_shared, 2)


# -- bytes -------------------------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Knows the memory of all tensors that operations make.

    Args:
        before: tensors that are there already, and may go.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._before = dict(map(memory_of, before))
        self._made: dict[StorageWeakRef, int] = {}
        self._other: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._other |= {memory_of(x)[0] for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)} - self._made.keys()
        found = func(*args, **kwargs or {})
        made = (memory_of(x) for x in tree_leaves(found) if isinstance(x, torch.Tensor))
        self._made |= {ref: size for ref, size in made if ref not in self._other}
        return found

    def more(self) -> int:
        """Bytes that are there now, above those that were there before."""
        gc.collect()
        made = sum(size for ref, size in self._made.items() if not ref.expired())
        return made - sum(size for ref, size in self._before.items() if ref.expired())


def memory_of(x: torch.Tensor) -> tuple[StorageWeakRef, int]:
    return StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()


def layer_of(training: Training) -> LayerBytes:
    buffers, finals = training.stack.attention.run.keeps()
    dtype = str(training.x.dtype).removeprefix("torch.")
    return layer_bytes(MODEL, len(training.x), dtype, fused_norms=False, finals=finals, buffers=buffers)


def check_kept(training: Training, where: str) -> None:
    """What a forward leaves in memory, on the device and on the host, is as the formula says to the byte."""
    layer, started, layers = layer_of(training), training.recompute, len(training.stack.layers)
    held = started.policy.kept(layer)
    made = Made(getattr(training.stack.attention.run, "_slots", ()))
    with made:
        passed = training.forward()
    want = layers * held.device - held.inputs + held.passing + layer.x.bytes
    assert made.more() == want, f"{where}: {made.more()} bytes are kept, {want} by the formula"
    assert started.host_bytes == layers * held.host, f"{where}: {started.host_bytes} bytes on the host"
    assert started.metrics().get("offload/forward/bytes", 0) == layers * held.host, where
    del passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_a_layer_saves(dtype: str, qk_norm: bool) -> None:
    """Counted by autograd's hooks: every tensor once, without weights and positions."""
    model = Model(2, 24, 4, 2, 8, 40, 30, 1e4, qk_norm=qk_norm)
    training = session_of(
        build(load("recompute", "none")), causal(SEQLEN), "none", model=model, dtype=dtype, layers=2,
    ).training  # fmt: skip
    known = {x.untyped_storage().data_ptr() for x in (*training.weights().values(), *training.stack.rope)}
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x):
        passed = training.forward()
    counted = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in known)
    assert counted == 2 * layer_bytes(model, SEQLEN, dtype, fused_norms=False).all
    assert passed


def test_a_fused_norm_saves_its_input_and_a_number_a_row() -> None:
    """As on CUDA, by hand."""
    model = Model(2, 24, 4, 2, 8, 40, 30, 1e4, qk_norm=False)
    found = layer_bytes(model, 10, "bfloat16", fused_norms=True, finals=[(7, 2)], buffers=[100])
    before = 4 + 2 * 24 + 2 * (32 + 2 * 16)  # the norm's number, what it gives, q, k and v
    after = 2 * 24 + 4 + 2 * 24 + 4 * 2 * 40
    results = 10 * (2 * 32 + 4 * 4) + 7 * (2 * 16 + 4 * 2)
    assert found.saves_x
    assert found.all == 10 * (2 * 24 + before + after) + results + 100
    assert found.share(0.5) == 5 * (2 * 24 + before + after) + 5 * (2 * 32 + 4 * 4) + 4 * (2 * 16 + 4 * 2) + 50


BIG = Model(layers=3, hidden=192, heads_q=4, heads_kv=2, head_dim=32, ffn=768, vocab=64, rope_theta=1e4)
TOKENS = 2048


def check_peaks(rank: int) -> None:
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is the system's at once, so resident is what is used
    mask = causal(TOKENS)
    for name, policy in due(policies().items()):
        session = session_of(
            policy, mask, "none", model=BIG, dtype="float32", kernel=build_kernel(load("kernel", "sdpa_flash")), seqlen=TOKENS,
        )  # fmt: skip
        training, step = session.training, partial(one_step_only, session.training)
        step()  # what is made once is there
        for weight in training.weights().values():
            weight.grad = None
        measured = peak_bytes(step, CPU)
        layer = layer_bytes(BIG, TOKENS, "float32", fused_norms=False)
        kept = training.recompute.policy.kept
        formula = step_peak(BIG, layer, kept, layers=BIG.layers, dtype="float32", loss_chunk=CHUNK)
        assert measured is not None
        assert measured > 40 << 20, f"{name}: {measured} bytes are too few to tell"
        assert 0.9 < measured / formula < 1.1, f"{name}: {measured / 1e6:.1f} MB, {formula / 1e6:.1f} MB by the formula"
        plan = training.planned()
        assert plan is not None
        planned = plan.peak
        assert 0.8 < measured / planned < 1.1, f"{name}: {measured / 1e6:.1f} MB, {planned / 1e6:.1f} MB planned"


def one_step_only(training: Training) -> None:
    passed: Any = None
    for phase in training.phases().values():
        passed = phase(passed)


@pytest.mark.slow
@pytest.mark.gloo
def test_the_peak_of_a_step_is_within_a_tenth_of_its_formula() -> None:
    run_ranks(1, check_peaks)


# -- options and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Offload(ratio=1.5), "recompute.ratio=1.5 is not from 0 to 1"),
        (lambda: Offload(ratio=float("nan")), "recompute.ratio=nan is not from 0 to 1"),
        (lambda: Offload(what="weights"), "recompute.what=weights is none of activations, checkpoints"),  # type: ignore[arg-type]
        (lambda: TokenWise(-0.1), "recompute.fraction=-0.1 is not from 0 to 1"),
    ],
)
def test_bad_options(made: Any, said: str) -> None:
    with pytest.raises(ValueError, match="^" + said.replace(".", r"\.")):
        made()


def check_refusals(rank: int, ranks: int) -> None:
    mask, groups = causal(SEQLEN), Groups()
    host.free_bytes = lambda: 10_000 if rank == ranks - 1 else 1 << 40  # the process ends with this
    for name in ("token_wise", "token_wise 0.37", "offload"):
        refused = session_of(policies()[name], mask, "ring", rank, ranks, groups=groups).refused
        assert refused is not None, name
        assert re.match(r"activations of \d\.\d\d GiB go to the memory of a host that has room for 0\.00 GiB", refused), refused
        assert session_of(policies()["full"], mask, "ring", rank, ranks, groups=groups).refused is None


@pytest.mark.gloo
@pytest.mark.slow
def test_all_ranks_refuse_what_does_not_fit_one_host() -> None:
    run_ranks(2, check_refusals, 2)


def test_room_is_what_the_groups_of_a_job_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the node has 8 GiB, the job 3 GiB of which 1 GiB is in use, a quarter of that as a cache that can go."""
    memory, own, gib = tmp_path / "meminfo", tmp_path / "cgroup", 1 << 30
    memory.write_text(f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n")
    for name, path in (("MEMORY", memory), ("OWN_GROUPS", own), ("GROUPS", tmp_path / "groups")):
        monkeypatch.setattr(host, name, path)
    assert host.free_bytes() == 8 * gib  # without control groups

    def limits(folder: Path, files: tuple[str, str, str], allowed: str, used: int, cache: int) -> None:
        folder.mkdir(parents=True)
        for name, text in zip(files, (allowed, str(used), f"anon 5\n{files[2]} {cache}\n"), strict=True):
            (folder / ("memory.stat" if name == files[2] else name)).write_text(text)

    second = "memory.max", "memory.current", "inactive_file"
    own.write_text("0::/slurm/job_7/step_0\n")
    limits(tmp_path / "groups/slurm/job_7", second, str(3 * gib), gib, gib // 4)
    limits(tmp_path / "groups/slurm/job_7/step_0", second, "max", gib, 0)
    assert host.free_bytes() == 2 * gib + gib // 4
    own.write_text("12:cpuset:/slurm\n11:memory:/slurm/job_7\n")
    first = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    limits(tmp_path / "groups/memory/slurm/job_7", first, str(2 * gib), gib, 0)
    assert host.free_bytes() == gib


class Library:
    """A run whose saved tensors are known to its library alone."""

    resumes = False


def test_what_a_library_keeps_to_itself_is_refused() -> None:
    refused = {name for name, policy in policies().items() if policy.refuses(Library())}  # type: ignore[arg-type]
    keep = {"none", "full", *(f"checkpoints {share}" for share in SHARES)}
    assert refused == policies().keys() - keep


def test_a_pass_ends_with_the_next() -> None:
    training = session_of(TokenWise(0.5), causal(SEQLEN), "none").training
    _, old = training.forward()
    _, new = training.forward()
    new.sum().backward()
    with pytest.raises(RuntimeError, match="another pass has begun since"):
        old.sum().backward()


# -- parts -------------------------------------------------------------------------------------------------------------


@given(
    always=st.floats(0, 1e12), other=st.floats(0, 1e12), hides=st.floats(1, 1e12), holds=st.floats(1, 1e12)
)  # fmt: skip
def test_the_fraction_is_the_largest_that_fits(always: float, other: float, hides: float, holds: float) -> None:
    if always > holds:
        with pytest.raises(ValueError, match="more than"):
            largest(always, other, hides, holds)
        return
    fraction, hidden = largest(always, other, hides, holds)
    assert hidden == (always <= hides)
    if not hidden:
        assert fraction == 0
        return
    room = min(hides, holds)
    assert fraction == pytest.approx(min(1.0, (room - always) / other) if other > 1e-9 * room else 1.0, abs=1e-6)


@given(st.data())
def test_stretches_are_all_of_a_tensor_in_place(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    x = torch.zeros(shape).permute(*data.draw(st.permutations(range(len(shape)))))
    x = x[data.draw(st.integers(0, len(x) - 1)) :]
    for stretch in stretches(x):
        assert stretch.is_contiguous()
        stretch.add_(1)
    assert bool((x == 1).all())


@given(st.floats(0, 1), st.integers(0, 1000))
def test_rows_of_a_share_and_of_the_rest_are_all(share: float, rows: int) -> None:
    assert 0 <= rows_of(share, rows) <= rows
    assert (rows_of(0.0, rows), rows_of(1.0, rows)) == (0, rows)
