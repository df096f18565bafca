"""The main job on a real Slurm cluster: checked cells over nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcbench.problem import Scale
from lcbench.runs.store import Sweep
from tests.slurm.stage import lcbench
from tests.turns import due

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.wide
@pytest.mark.timeout(1800)
def test_ninety_six_ranks_on_twelve_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    """On a few cores they are slow: by its estimate the ring has some 150 s without progress, and it is measured."""
    done = lcbench(
        "sweep", "cp=ring", "cp.layout=contiguous", "mask=causal_document", "seqlen=1536", "scale=12x8", "heads=2x2x8",
        "dtype=float64",
        "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1", "measure.blocks=1", "hang.min_s=90",
        "hang.factor=1", "sweep=wide", "site=devcluster", "wait=true", "output=json", f"results={tmp_path}",
        "tracking_uri=none", environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["cells"]] == ["ok"]
    sweep = Sweep(tmp_path, "wide")
    (cell_id,) = sweep.entries()
    (attempt,) = sweep.attempts(cell_id)
    errors = attempt.checks["errors"]
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
    assert max(errors.values()) <= 1e-12
    assert len(attempt.samples["rank_forward_median_s"]) == 96
    assert attempt.provenance["slurm_job_id"]
    checked = attempt.provenance["check"]
    assert checked["fallen"] == {}
    assert len(checked["nodes"]) == 12
    assert all(checked[f"{link} GB/s"]["worst"] > 0 for link in ("allreduce", "within a node", "between nodes"))


@pytest.mark.timeout(1800)
def test_groups_of_a_mesh_on_two_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    """Attention and training steps in four context-parallel groups of two ranks, which lie on both nodes or on one each."""
    orders = due(["tp-cp-dp", "tp-dp-cp"])
    done = lcbench(
        "sweep", "-m", "workload=attention,block", "model=tiny", "layers=2", "recompute=selective",
        "mesh.tp=2", "mesh.dp=2", f"mesh.order={','.join(orders)}", "scale=2x4", "cp=ring", "mask=causal_document", "seqlen=512",
        "dtype=float64", "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1", "measure.blocks=1",
        "sweep=mesh", "site=devcluster", "wait=true", "output=json", f"results={tmp_path}",
        "tracking_uri=none", environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["cells"]] == ["ok"] * 2 * len(orders)
    sweep = Sweep(tmp_path, "mesh")
    for cell_id in sweep.entries():
        (attempt,) = sweep.attempts(cell_id)
        assert attempt.metrics["check/of_bound"] <= 1
        assert len(attempt.samples["rank_forward_median_s"]) == 8
        assert attempt.provenance["slurm_job_id"]
        # Neighbours in a group are on one node, or half of its links cross.
        crosses = attempt.config["mesh"]["order"] == "tp-dp-cp"
        assert (attempt.metrics["comm/forward/between_nodes_bytes"] > 0) == crosses, attempt.config


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("scale", "planners", "batch"),
    [
        (Scale(2, 4), ["fixed", "megatron_hybrid", "flexsp"], (768, 48, 384)),
        pytest.param(Scale(8, 8), ["megatron_hybrid"], (4096, 64, 768), marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_batches_on_nodes(
    devcluster: dict[str, str], tmp_path: Path, scale: Scale, planners: list[str], batch: tuple[int, int, int]
) -> None:  # fmt: skip
    """A batch as planners share it out among the same ranks, with the gradients' sum: what was planned is what was run."""
    tokens_of_batch, median, longest = batch
    done = lcbench(
        "sweep", "-m", "workload=batch", "workload.capacity=48", "workload.gradient_bytes=4k", "cp=ring",
        f"planner={','.join(planners)}", "mask=causal_document", "lengths=log_normal", f"lengths.median={median}",
        f"lengths.high={longest}", f"seqlen={tokens_of_batch}", f"scale={scale}", "heads=4x2x8",
        "dtype=float64", "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1",
        "measure.blocks=1", "hang.min_s=120", "hang.factor=1", "sweep=batches", "site=devcluster", "wait=true", "output=json",
        f"results={tmp_path}", "tracking_uri=none", environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["cells"]] == ["ok"] * len(planners)
    sweep = Sweep(tmp_path, "batches")
    batches, degrees = set(), {}
    for cell_id in sweep.entries():
        (attempt,) = sweep.attempts(cell_id)
        metrics, provenance = attempt.metrics, attempt.provenance
        errors = attempt.checks["errors"]
        assert {"out", "lse", "dq", "dk", "dv"} <= set(errors)
        assert max(errors.values()) <= 1e-12
        assert provenance["slurm_job_id"]
        batches.add(tuple(provenance["documents"]))
        groups = [group for micro_batch in provenance["assignment"] for group in micro_batch]
        assert sorted(document for group in groups for document in group["documents"]) == list(
            range(int(metrics["batch/documents"]))
        )
        assert metrics["batch/groups"] == len(groups)
        # Every rank took part in a micro-batch, and in those alone in which it has a group.
        at_work = [
            {number for number, groups in enumerate(provenance["assignment"]) if any(rank in group["ranks"] for group in groups)}
            for rank in range(scale.world_size)
        ]
        assert [{bar[0] for bar in bars} for bars in provenance["gantt"]] == at_work
        assert 0 <= metrics["batch/idle_share"] < 1
        assert metrics["plan/seconds"] > 0
        assert metrics["time/reduce/median_s"] > 0
        degrees[attempt.config["planner"]["name"]] = {len(group["ranks"]) for group in groups}
    (tokens,) = batches
    assert sum(tokens) == tokens_of_batch
    assert max(tokens) > scale.gpus_per_node * 48, "a document that one node does not hold"
    assert {name: len(found) > 1 for name, found in degrees.items()} == {name: name != "fixed" for name in planners}


@pytest.mark.timeout(1800)
def test_a_search_brings_its_rounds_to_the_cluster_and_the_same_command_goes_on(devcluster: dict[str, str], tmp_path: Path) -> None:
    words = [
        "cp=ring,none", "kernel=sdpa_math", "mask=causal", "scale=2x1,1x1", "heads=2x2x8", "dtype=float32", "search=max_seqlen",
        "search.from=592", "search.to=720", "search.gib=0.03", "measure.warmup=0", "measure.min_iterations=1",
        "measure.max_iterations=1", "measure.blocks=1", "sweep=longest", "site=devcluster", "output=json", f"results={tmp_path}",
        "tracking_uri=none",
    ]  # fmt: skip
    done = lcbench("sweep", *words, environment=devcluster)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads(done.stdout)["answers"]
    assert {answer["end"] for answer in answers} <= {"found", "none fits", "all fit", "cannot run"}
    assert all(answer["cells"] <= 8 for answer in answers)
    sweep = Sweep(tmp_path, "longest")
    attempts = {cell: len(sweep.attempts(cell)) for cell in sweep.entries()}
    again = lcbench("sweep", *words, environment=devcluster)
    assert json.loads(again.stdout)["answers"] == answers
    assert attempts == {cell: len(sweep.attempts(cell)) for cell in sweep.entries()}


@pytest.mark.timeout(1800)
def test_serving_on_two_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    """A decode step, a prompt and both together, with the cache over both nodes."""
    done = lcbench(
        "sweep", "-m", "workload=serving", "cp=kvp,pcp", "batch=4q1s256,q128,q64_4q1s128", "direction=forward", "scale=2x4",
        "kernel=naive", "mask=causal", "heads=4x2x16", "dtype=float64", "measure.warmup=0", "measure.min_iterations=1",
        "measure.max_iterations=1", "measure.blocks=1", "sweep=serving", "site=devcluster", "wait=true", "output=json",
        f"results={tmp_path}", "tracking_uri=none", environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["cells"]] == ["ok"] * 6
    sweep = Sweep(tmp_path, "serving")
    sent = {}
    for cell_id, entry in sweep.entries().items():
        (attempt,) = sweep.attempts(cell_id)
        errors = attempt.checks["errors"]
        assert {"out", "lse"} <= set(errors)
        assert max(errors.values()) <= 1e-12
        assert len(attempt.samples["rank_forward_median_s"]) == 8
        assert attempt.provenance["slurm_job_id"]
        metrics = attempt.metrics
        assert metrics["serving/us_per_token"] == pytest.approx(
            1e6 * metrics["time/forward/median_s"] / metrics["serving/new_tokens"]
        )
        assert metrics["comm/forward/between_nodes_bytes"] > 0
        sent[attempt.config["cp"]["name"], attempt.config["batch"]] = metrics["serving/bytes_sent_per_token"]
        assert entry.cell.id == cell_id
    # Of four decoded tokens ranks 0 to 3 own one each: 7 queries and, for those of others, results of 4 heads in float64.
    assert sent["kvp", "4q1s256"] == 7 * 4 * 16 * 8 / 4 + 3 * 4 * (16 * 8 + 8) / 4
    assert sent["pcp", "4q1s256"] == pytest.approx(7 * 4 * 256 / 8 * 2 * 32 * 8 / 4)


@pytest.mark.timeout(1800)
def test_sparse_and_linear_strategies_on_two_nodes(devcluster: dict[str, str], tmp_path: Path) -> None:
    """Strategies of attention that chooses its mask and of linear attention, in one sweep whose other products are skipped."""
    chosen = due([("sparse_heads", "lasp"), ("sparse_sequence", "lasp2"), ("sparse_hybrid", "zeco")])
    sparse, linear = ({"ulysses", *names} for names in zip(*chosen, strict=True))
    done = lcbench(
        "sweep", "-m", "workload=sparse_attention,linear_attention", "selector=oracle", "selector.q_block=16",
        "selector.k_block=16", "kernel=naive,chunked", f"cp={','.join(sorted(sparse | linear))}",
        "scale=2x4", "mask=causal", "seqlen=300", "heads=8x8x8", "dtype=float64", "measure.warmup=0",
        "measure.min_iterations=1", "measure.max_iterations=1", "measure.blocks=1", "sweep=operators", "site=devcluster",
        "wait=true", "output=json", f"results={tmp_path}", "tracking_uri=none", environment=devcluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = Sweep(tmp_path, "operators")
    found = {}
    for cell_id, entry in sweep.entries().items():
        attempts = sweep.attempts(cell_id)
        assert (entry.skip is None) == (len(attempts) == 1)
        if entry.skip is not None:
            continue
        (attempt,) = attempts
        found[attempt.config["workload"]["name"], attempt.config["cp"]["name"]] = attempt
        assert attempt.status == "ok", attempt.failure
        assert attempt.metrics["check/of_bound"] <= 1
        assert {"out", "dq", "dk", "dv"} <= set(attempt.checks["errors"])
        assert max(attempt.checks["errors"].values()) <= 1e-12
        assert len(attempt.samples["rank_backward_median_s"]) == 8
        assert attempt.provenance["slurm_job_id"]
    assert set(found) == {("sparse_attention", cp) for cp in sparse} | {("linear_attention", cp) for cp in linear}
    measured = [found["sparse_attention", cp].metrics for cp in sparse]
    # All choose the same blocks, the best ones there are.
    assert len({(each["select/recall"], each["select/density"]) for each in measured}) == 1
    assert all(each["select/recall"] == pytest.approx(each["select/oracle_recall"]) for each in measured)
    state = 8 * 8 * 8 * 8  # heads, numbers of a state of one, bytes of a number
    formulas = {"lasp": state, "zeco": state, "lasp2": 7 * (state + 8 * 8 * 8)}
    for cp in linear - {"ulysses"}:
        assert found["linear_attention", cp].metrics["comm/forward/bytes"] == formulas[cp]
