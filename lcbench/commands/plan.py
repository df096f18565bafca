"""Plan the training step of a model on some GPUs: for each layer tensor and context parallelism, ZeRO and recomputation.

Words are a sweep's: model, seqlen, mask, kernel, dtype; cp= and recompute= say what the search may take. nodes= says how many
nodes, or scale= all ranks; global_batch=, memory_gib=, max_tp=, max_cp=, max_pp= bound it. Nothing is measured: all is predicted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcbench.advice.planned import Told
from lcbench.advice.planning import plan
from lcbench.advice.sizing import GIB
from lcbench.advice.ways import Asked
from lcbench.commands.arguments import add_plan_arguments, command_parser
from lcbench.commands.sweep import with_site
from lcbench.grid import build
from lcbench.grid.command_line import loader_of
from lcbench.grid.expand import Plan as Grid
from lcbench.grid.expand import expand
from lcbench.grid.overrides import key_of
from lcbench.grid.values import parse_int, parse_number
from lcbench.predict.machines import HERE, machine_of_site
from lcbench.predict.predictor import Predictor
from lcbench.problem import Scale
from lcbench.report.ending import OK, SOME_FAILED, bad_input
from lcbench.report.fitted import console
from lcbench.workloads.recompute.base import OnDevice

EXAMPLES = """
python -m lcbench.plan model=llama3_8b nodes=4 seqlen=256k
python -m lcbench.plan model=llama3_70b nodes=4 seqlen=64k kernel=flash_attn3 machine=h200 cp=none,ring max_tp=2 max_pp=2
python -m lcbench.plan model=llama3_8b scale=1x8 seqlen=64k memory_gib=40 cp=ring,ulysses output=json
"""
DEGREES = ("tp", "cp", "pp")
# Words of this command, which no sweep has.
OWN = ("machine", "nodes", "global_batch", "memory_gib", *(f"max_{name}" for name in DEGREES))
DEFAULTS = {"cp": "none,ring,ulysses,usp,allgather", "recompute": "none,selective,full", "workload.optimizer": "adamw"}
DECIDED = ("mesh", "mesh.tp", "mesh.dp", "mesh.order", "workload", "layers", "workload.layers", "workload.fsdp")  # by the search
MACHINE, PER_NODE = "h100", 8  # of a plan where the site has no GPUs and no machine is named
BATCH_TOKENS = 4 << 20  # of a step where nobody says global_batch: what Llama 3 405B began with (arXiv 2407.21783, section 3.4.1)
RESERVE = 0.08  # of a device's memory: the driver's, NCCL's, and what the allocator cannot use


def main(arguments: list[str]) -> int:
    parser = command_parser("plan", __doc__, EXAMPLES)
    add_plan_arguments(parser, "model=... nodes=... seqlen=..., and machine=..., global_batch=..., memory_gib=...")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="of python -m lcbench.fit; without it predictions are guesses")
    options = parser.parse_args(arguments)
    with bad_input():
        own, grid = _read(options.overrides, options.config_dir)
        output = str(grid.options["output"])
        machine = own.get("machine") or _machine(grid)
        predictor = Predictor.of(machine, options.fit)
        asked = _asked(own, grid, predictor)
        terminal = console(stderr=output == "json", quiet=output == "quiet")
        found = plan(asked, predictor)
        if not found.rivals:
            raise ValueError(f"nothing of this can be run: {next(iter(found.refused), 'no degrees were left')}")
    told = Told(asked, found, predictor)
    if found.plan is not None:
        terminal.print(told.table())
    for line in told.lines():
        terminal.print(line, markup=False, soft_wrap=True)
    terminal.print(told.rivals())
    for line in told.reasons():
        terminal.print(line, markup=False, soft_wrap=True, style="dim")
    if output == "json":
        print(json.dumps(told.as_dict(), indent=1))
    return OK if found.plan is not None else SOME_FAILED


def _read(words: Sequence[str], folders: Sequence[Path]) -> tuple[dict[str, str], Grid]:
    """This command's own words by name, and the cells of all others.

    Raises:
        ValueError: a word that is no override, or that says what the search decides.
    """
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is no override; write <axis>=<value>, such as model=llama3_8b, nodes=4 or seqlen=256k")
    own = {key_of(word): word.partition("=")[2] for word in words if key_of(word) in OWN}
    given = [word for word in words if key_of(word) not in OWN]
    said = {key_of(word) for word in given}
    for word in given:
        if key_of(word) in DECIDED:
            raise ValueError(
                f"{word} is not for a plan, which is of all layers of a model and chooses degrees and sharding itself; max_tp=,"
                " max_cp= and max_pp= bound them"
            )
    if "nodes" in own and "scale" in said:
        raise ValueError(f"nodes={own['nodes']} and scale= are two ways to say one thing; write one of them")
    if len(folders) > 1:
        raise ValueError(f"--config-dir is given {len(folders)} times; put the files into one folder")
    lines = with_site(["workload=block", *given, *(f"{key}={value}" for key, value in DEFAULTS.items() if key not in said)])
    return own, expand(lines, loader_of(str(folders[0]) if folders else None)).with_lengths()


def _machine(grid: Grid) -> str:
    """The site's; of one without GPUs ``MACHINE``."""
    found = machine_of_site(grid.site)
    return MACHINE if found == HERE else found


def _asked(own: Mapping[str, str], grid: Grid, predictor: Predictor) -> Asked:
    """Raises:
    ValueError: bad input.
    """
    cells = [planned.cell for planned in grid.cells]
    searched = ("cp", "recompute", "scale")
    alike = {json.dumps({k: v for k, v in cell.config.items() if k not in searched}, sort_keys=True) for cell in cells}
    # What runs on one rank only has one where nobody says the scale.
    scales = list(dict.fromkeys(cell.scale for cell in cells if cell.config["cp"]["name"] != "none")) or [cells[0].scale]
    if len(alike) > 1 or len(scales) > 1:
        raise ValueError("a plan is of one problem: write one value of every axis but cp and recompute")
    problem = cells[0].problem
    if problem.batch is not None or not problem.backward:
        said = f"batch={problem.batch}" if problem.batch is not None else f"direction={problem.direction}"
        raise ValueError(f"{said} is no training step: a plan is of one, with direction=forward_backward and a seqlen")
    for cell in cells:
        if not isinstance(build.build_recompute(cell.config), OnDevice):
            name = cell.config["recompute"]["name"]
            raise ValueError(
                f"recompute={name} moves activations to the host, which a plan does not share among layers; write some of none,"
                " selective, full, attention_out"
            )
    scale = _scale(own, scales[0], grid, predictor)
    batch = parse_int(own.get("global_batch", max(1, BATCH_TOKENS // problem.seqlen)), "global_batch", least=1)
    most = {name: parse_int(own[f"max_{name}"], f"max_{name}", least=1) for name in DEGREES if f"max_{name}" in own}
    return Asked(tuple(cells), scale, batch, _budget(own, predictor), most)


def _scale(own: Mapping[str, str], said: Scale, grid: Grid, predictor: Predictor) -> Scale:
    if "nodes" not in own:
        return said
    here = machine_of_site(grid.site) == predictor.machine.name
    return Scale(parse_int(own["nodes"], "nodes", least=1), said.gpus_per_node if here else PER_NODE)


def _budget(own: Mapping[str, str], predictor: Predictor) -> float:
    if "memory_gib" in own:
        return parse_number(own["memory_gib"], "memory_gib") * GIB
    if not predictor.machine.memory_bytes:
        name = predictor.machine.name
        raise ValueError(f"machine={name} has no memory of its own; write what a rank may have, such as memory_gib=4")
    return (1 - RESERVE) * predictor.machine.memory_bytes
