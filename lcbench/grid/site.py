"""What a site file may say: every key with its type, and what cannot go together, before anything is submitted.

A site is kept as the plain values that its file sets; ``checked`` is the way from what was typed to these.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import string
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from lcbench.grid import values
from lcbench.grid.devices import known_devices
from lcbench.grid.paths import CONF
from lcbench.problem import Scale

# sbatch's options that lcbench sets, or that would keep it from finding its jobs: what to write instead.
OURS = {
    "array": "the packs of a scale are an array; pack.max_jobs limits how many run at once",
    "clusters": "squeue and scancel would ask another cluster; write site.env.SLURM_CONF",
    "dependency": "arrays and the collector wait for one another; begin, or hold, lets jobs start later",
    "error": "the logs of jobs lie in the folder of their sweep",
    "export": "jobs need the environment of their command; site.env sets variables",
    "export-file": "jobs need the environment of their command; site.env sets variables",
    "help": "it submits nothing",
    "job-name": "a job is found by its name; comment is free",
    "nodes": "the scale says how many",
    "ntasks": "a node has one task, which starts a worker per GPU",
    "open-mode": "a requeued job goes on with its log",
    "output": "the logs of jobs lie in the folder of their sweep",
    "parsable": "the job's number is read from what sbatch says",
    "quiet": "the job's number is read from what sbatch says",
    "signal": "a job is warned of its time limit by a signal that lcbench chooses",
    "test-only": "it submits nothing; write hydra/launcher=dry",
    "usage": "it submits nothing",
    "version": "it submits nothing",
    "wait": "sbatch would not return; write wait=true",
    "wrap": "lcbench writes the script; site.setup holds lines of it",
}
# These have keys of their own in a site; the collector's options are given under their names in sbatch.
KEYS_OF_THEIR_OWN = {
    "account": "write site.account",
    "cpus-per-task": "write site.cpus_per_task",
    "partition": "write site.partition",
    "qos": "write site.qos",
    "time": "write site.max_minutes; pack.max_minutes is the sweep's",
}
# srun's, in all their spellings.
OURS_OF_SRUN = {
    **dict.fromkeys(("output", "o", "error", "e"), "the logs of jobs lie in the folder of their sweep"),
    **dict.fromkeys(("nodes", "N"), "the scale says how many"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "a node has one task, which starts a worker per GPU"),
    **dict.fromkeys(("cpus-per-task", "c"), "write site.cpus_per_task"),
    **dict.fromkeys(("kill-on-bad-exit", "K"), "a task that dies ends the others"),
    **dict.fromkeys(("container-image", "container-mounts", "container-workdir"), "write site.container"),
}
# Variables of a job are fine; these change what Slurm's commands do.
COMMANDS_VARIABLES = re.compile(r"(SBATCH|SQUEUE|SACCT|SCANCEL|SCONTROL|SINFO)_|SLURM_CLUSTERS$")
# Slurm may warn a minute early, and a job of one minute would be warned at its start.
LEAST_MINUTES = 2
# sbatch and srun read these in the names of logs; submitit does, too.
PATTERN_CHARACTERS = "%\\"


# -- the types of values, each with what to write instead ---------------------------------------------------------------


def _text(value: Any) -> str:
    if isinstance(value, bool | int | float):
        raise ValueError(f"is no text: YAML reads it as a {_kind(value)}; write it in quotes, as in '{str(value).lower()}'")
    if not isinstance(value, str):
        raise ValueError(f"is a {_kind(value)} and no text")
    if not value.strip() or not value.isprintable():
        raise ValueError("is empty or holds characters that cannot be printed; null leaves it out")
    return value


def _maybe(check: Callable[[Any], Any]) -> Any:
    return BeforeValidator(lambda value: None if value is None else check(value))


def _lines(value: Any) -> list[str]:
    """Shell lines; a text is one."""
    if isinstance(value, str):
        value = [value]
    if value is not None and not isinstance(value, list):
        raise ValueError(f"is a {_kind(value)}; write a list of lines, as in ['module load cuda']")
    for line in value or []:
        if not isinstance(line, str):
            raise ValueError(f"holds {_shown(line)}, which YAML reads as a {_kind(line)}; write each line in quotes")
    return [line for line in value or [] if line.strip()]


def _srun_args(value: Any) -> list[str]:
    words = shlex.split(value) if isinstance(value, str) else _lines(value)
    for word in words:
        name, _, rest = word.partition("=")
        if not word.startswith("-"):
            continue
        if re.search(r"\s", name) or (len(word) > 2 and rest == "" and "=" in word):
            raise ValueError(f"holds {word!r}; write an option and its value as one word, as in --mpi=none")
        option = name.lstrip("-") if name.startswith("--") else name[1:2]
        if option in OURS_OF_SRUN:
            raise ValueError(f"holds {word!r}, which lcbench sets: {OURS_OF_SRUN[option]}")
    return words


def _whole(least: int, why: str = "") -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"is no whole number of at least {least}{why}")
        return value

    return check


def _above_zero(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError("is no number above 0")
    return value


def _one_of(*accepted: str) -> BeforeValidator:
    def check(value: Any) -> str:
        if value not in accepted or not isinstance(value, str):
            raise ValueError(f"is not one of {', '.join(accepted)}{_near(str(value), accepted)}")
        return value

    return BeforeValidator(check)


def _device(value: Any) -> str:
    accepted = ["cpu", *(str(entry["name"]) for entry in known_devices())]
    if value not in accepted:
        raise ValueError(f"is not one of null, {', '.join(accepted)}{_near(str(value), accepted)}")
    return str(value)


def _scale(value: Any) -> str:
    try:
        return str(values.parse_scale(value))
    except ValueError as error:
        raise ValueError(str(error).partition(" ")[2]) from None


def _gres(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("is a number; it is sbatch's --gres of a node, so write 'gpu:{gpus_per_node}', or null to leave it out")
    text = _text(value)
    try:
        fields = [(name, form, conversion) for _, name, form, conversion in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"is no text with a place for a number ({error}); write 'gpu:{{gpus_per_node}}'") from None
    if any(field != ("gpus_per_node", "", None) for field in fields):
        raise ValueError("has a place for something else than {gpus_per_node}; write 'gpu:{gpus_per_node}'")
    if not re.fullmatch(r"[A-Za-z][\w.:,=/{}-]*", text):
        raise ValueError("is no --gres, which begins with a name; write 'gpu:{gpus_per_node}'")
    return text


def _environment(value: Any) -> dict[str, str]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"is a {_kind(value)}; write variables, as in {{NCCL_DEBUG: WARN}}")
    found = {}
    for name, word in (value or {}).items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
            raise ValueError(f"holds {name!r}, which is no name of a variable")
        if COMMANDS_VARIABLES.match(name):
            raise ValueError(f"holds {name}, which Slurm's commands read: write sbatch's options below site.sbatch")
        if isinstance(word, bool | dict | list):
            raise ValueError(f"holds {name}: {_shown(word)}, a {_kind(word)}; write text, as in '1'")
        if word is not None:
            found[str(name)] = str(word)
    return found


def sbatch_flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """sbatch's options by their long names: a text for those that take one, True for flags. What is false or null is left out,
    but for ``requeue``, which becomes ``no-requeue``.
    """
    named = {str(key).replace("_", "-"): value for key, value in options.items()}
    if named.pop("no-requeue", None):
        named["requeue"] = False
    if named.get("requeue") is False:
        named["no-requeue"] = True
    given = {key: value for key, value in named.items() if value is not None and value is not False}
    return {key: value if value is True else str(value) for key, value in given.items()}


def _sbatch(value: Any, ours: Mapping[str, str] = {**OURS, **KEYS_OF_THEIR_OWN}) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"is a {_kind(value)}; write options of sbatch, as in {{mem: 0, exclusive: true}}")
    options = {}
    for key, word in (value or {}).items():
        option = str(key).replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
            raise ValueError(f"holds {key!r}; write the long name of an option without dashes before it, as in mem")
        # sbatch takes the beginnings of its options too.
        meant = "ntasks" if option.startswith("ntasks") else option
        full = [name for name in ours if name == meant or (len(option) > 2 and name.startswith(option))]
        if full:
            raise ValueError(f"holds {key}, which lcbench sets: {ours[meant if meant in full else full[0]]}")
        if isinstance(word, dict | list):
            raise ValueError(f"holds {key}: {_shown(word)}, a {_kind(word)}; write text as sbatch takes it, as in 'a,b'")
        if option in ("begin", "deadline") and isinstance(word, int | float):
            raise ValueError(f"holds {key}: {word}, a number to YAML, which reads 16:00 as 960; write it in quotes")
        if option in ("requeue", "no-requeue") and not isinstance(word, bool | None):
            raise ValueError(f"holds {key}: {_shown(word)}; write true or false")
        if isinstance(word, str) and (not word or not word.isprintable()):
            raise ValueError(f"holds {key} with an empty text or one that cannot be printed; null leaves it out")
        options[option] = word
    return sbatch_flags(options)


def _collector(value: Any) -> bool | dict[str, Any]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, dict):
        raise ValueError("is neither true nor false nor sbatch's options of its own, as in {partition: cpu}")
    return _sbatch(value, OURS)


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Container(_Keys):
    """Pyxis' options of a job."""

    image: Annotated[str, BeforeValidator(_text)]
    mounts: Annotated[list[str], BeforeValidator(_lines)] = []
    python: Annotated[str | None, _maybe(_text)] = None
    mount_home: bool = True


class Budget(_Keys):
    """What a sweep may take before it asks."""

    hours: Annotated[float | None, _maybe(_above_zero)] = None
    gpu_hours: Annotated[float | None, _maybe(_above_zero)] = None


class LocalSite(_Keys):
    """This machine."""

    launcher: str  # one that there is: ``checked`` looks
    name: Annotated[str | None, _maybe(_text)] = None
    device: Annotated[str | None, _maybe(_device)] = None
    scale: Annotated[str | None, _maybe(_scale)] = None
    budget: Budget | None = None
    max_minutes: Annotated[int | None, _maybe(_whole(LEAST_MINUTES, ": a shorter job is warned of its end at its start"))] = None
    check: Annotated[str, _one_of("stop", "warn")] = "stop"
    share_gpu: bool = False
    publish: Annotated[str, _one_of("nodes", "login")] = "nodes"
    tracking_uri: Annotated[str | None, _maybe(_text)] = None
    env: Annotated[dict[str, str], BeforeValidator(_environment)] = {}


class ClusterSite(LocalSite):
    """A cluster."""

    partition: Annotated[str | None, _maybe(_text)] = None
    account: Annotated[str | None, _maybe(_text)] = None
    qos: Annotated[str | None, _maybe(_text)] = None
    max_array: Annotated[int | None, _maybe(_whole(1))] = None
    cpus_per_task: Annotated[int | None, _maybe(_whole(1))] = None
    gpus: Annotated[str | None, _maybe(_gres)] = None
    sbatch: Annotated[dict[str, Any], BeforeValidator(_sbatch)] = {}
    srun_args: Annotated[list[str], BeforeValidator(_srun_args)] = []
    setup: Annotated[list[str], BeforeValidator(_lines)] = []
    container: Container | None = None
    collector: Annotated[bool | dict[str, Any], BeforeValidator(_collector)] = True


# -- one site -----------------------------------------------------------------------------------------------------------


@cache
def _launchers() -> dict[str, dict[str, Any]]:
    """The launchers of conf/ by name, with what their files say."""
    files = sorted((CONF / "hydra" / "launcher").glob("*.yaml"))
    return {path.stem: dict(OmegaConf.to_container(OmegaConf.load(path))) for path in files}  # type: ignore[arg-type]


def runs_here(launcher: str) -> bool:
    """Whether a launcher's packs are processes on this machine; one that is not in conf/ is of a scheduler."""
    return bool(_launchers().get(launcher, {}).get("here"))


def predicts(launcher: str) -> bool:
    """Whether a launcher measures nothing, but predicts on a machine of conf/machine; one that is not in conf/ measures."""
    return bool(_launchers().get(launcher, {}).get("predicts"))


def checked(site: Any, launchers: Collection[str] = ()) -> dict[str, Any]:
    """A site's values, each of its type: what the file sets and nothing else.

    Args:
        launchers: names of launchers besides those of conf/: the user's own.

    Raises:
        ValueError: a key that there is not, or a value that is none; one line.
    """
    if not isinstance(site, dict):
        raise ValueError(f"site={_shown(site)} is no site; choose a file of conf/site, as in site=plain")
    launcher, known = site.get("launcher"), sorted({*_launchers(), *launchers})
    if launcher is None or launcher not in known:
        said = f"site.launcher={_shown(launcher)} is not one of" if "launcher" in site else "site.launcher is missing; write one of"
        raise ValueError(f"{said} {', '.join(known)}{_near(str(launcher), known)}")
    kind = LocalSite if runs_here(launcher) else ClusterSite
    try:
        return kind.model_validate(site).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(_complaint(kind, first, launcher)) from None


def unknown_key(key: str, keys: Iterable[str] = tuple(ClusterSite.model_fields)) -> str:
    """What is wrong with a key that a site has not, and what to write."""
    option = key.replace("_", "-")
    known = sorted(keys)
    if option == "gres":
        return f"site has no key {key!r}: write site.gpus, which is sbatch's --gres"
    if reason := {**OURS, **KEYS_OF_THEIR_OWN}.get("ntasks" if option.startswith("ntasks") else option):
        return f"site has no key {key!r}: {reason}"
    near = _near(key, known)
    if not near and option in _options_that_submitit_knows():
        return f"site has no key {key!r}: it is an option of sbatch, so write it below sbatch, as +site.sbatch.{option}=..."
    more = "" if near or "sbatch" not in known else "; other options of sbatch go below sbatch, as +site.sbatch.mem=0"
    return f"site has no key {key!r}; it has {', '.join(known)}{near}{more}"


def _complaint(kind: type[LocalSite], error: Any, launcher: str) -> str:
    """One line on what pydantic found first."""
    where, value, of = list(error["loc"]), error["input"], error["type"]
    path = ".".join(["site", *map(str, where)])
    if of == "extra_forbidden" and len(where) == 1:
        if where[0] in ClusterSite.model_fields:
            return f"site.{where[0]} means nothing with launcher: {launcher}; it is for those of schedulers"
        return unknown_key(str(where[0]), kind.model_fields)
    if of == "extra_forbidden":
        known = sorted((Container if where[0] == "container" else Budget).model_fields)
        return f"site.{where[0]} has no key {where[1]!r}; it has {', '.join(known)}{_near(str(where[1]), known)}"
    if of == "missing":
        return f"{path} is missing"
    if of == "bool_type":
        return f"{path}={_shown(value)} is neither true nor false"
    if of.startswith(("model_", "dict_")):
        example = "{image: " + value + "}" if where == ["container"] and isinstance(value, str) else "{...}"
        return f"{path}={_shown(value)} is a {_kind(value)} and has keys of its own; write {where[-1]}: {example}"
    said = error["msg"].removeprefix("Value error, ")
    # A mapping is named by the entry that is wrong: the others may be long, or secret.
    return f"{path} {said}" if isinstance(value, dict) and said.startswith("holds") else f"{path}={_shown(value)} {said}"


def _options_that_submitit_knows() -> set[str]:
    from submitit import SlurmExecutor

    return {key.replace("_", "-") for key in SlurmExecutor._valid_parameters()}


# -- what cannot go together --------------------------------------------------------------------------------------------


def check_fit(site: Mapping[str, Any], scales: Iterable[Scale], max_minutes: int | None, folder: Path) -> None:
    """Whether a site's jobs can run what is asked for: its scales, below a time limit, with results in ``folder``.

    Raises:
        ValueError: they cannot; one line.
    """
    if runs_here(site["launcher"]):
        return
    if max_minutes is not None and max_minutes < LEAST_MINUTES:
        raise ValueError(
            f"pack.max_minutes={max_minutes} is less than {LEAST_MINUTES}: a shorter Slurm job is warned of its end at its start"
        )
    check_path(folder)
    options = site.get("sbatch") or {}
    if site.get("gpus") and "gres" in options:
        raise ValueError("site.sbatch holds gres, and site.gpus sets it too; write one of them, and null for the other")
    for scale in dict.fromkeys(scales):
        for key, text in (("gpus", site.get("gpus")), ("sbatch.gpus-per-node", options.get("gpus-per-node"))):
            got = None if text is None else _gpus_of(text.format(gpus_per_node=scale.gpus_per_node), key)
            if got is not None and got < scale.gpus_per_node:
                more = ", with {gpus_per_node} for the number" if key == "gpus" else ""
                raise ValueError(f"site.{key}={text} gives a node {got} GPUs, and scale={scale} needs {scale.gpus_per_node}{more}")
        cpus = site.get("cpus_per_task")
        if (cpus or 1) < scale.gpus_per_node:
            raise ValueError(
                f"site.cpus_per_task={_shown(cpus)} gives a node's task {cpus or 1} CPUs, and with scale={scale} it starts "
                f"{scale.gpus_per_node} workers; write the CPUs of a node"
            )


def check_path(folder: Path) -> None:
    """Whether jobs can keep their logs below a folder.

    Raises:
        ValueError: Slurm would write them somewhere else.
    """
    for part in folder.parts:
        if set(part) & set(PATTERN_CHARACTERS) or not part.isprintable():
            raise ValueError(
                f"{part!r} in {str(folder)!r}: Slurm reads % and \\ in the names of logs as patterns; choose another results "
                f"folder or name of the sweep"
            )


def _gpus_of(text: str, key: str) -> int | None:
    """GPUs of a node by a text such as ``gpu:h100:8``, or ``h100:8``; None where it does not say."""
    if key == "gpus":
        parts = [
            part.split(":") for part in text.replace("gres/", "").replace("=", ":").split(",") if re.match(r"(gres/)?gpu\b", part)
        ]
        if not parts:
            return None
    else:
        parts = [["gpu", *part.split(":")] for part in text.split(",")]
    numbers = [part[-1] if part[-1][:1].isdigit() else "1" for part in parts]
    return sum(map(int, numbers)) if all(n.isdigit() for n in numbers) else None


def lost_without_requeue(site: Mapping[str, Any]) -> str:
    """What a site that does not let Slurm requeue its jobs gives up; empty for every other."""
    if "no-requeue" not in sbatch_flags(site.get("sbatch") or {}):
        return ""
    goes_on = "the collector, or whoever waits, submits the rest anew, and it queues again"
    if site.get("collector", True) is False:
        goes_on = "the rest waits for python -m lcbench.collect, or for the same command"
    return (
        f"site.sbatch.requeue=false: a job that is preempted, loses a node, or comes to its time limit is not requeued; {goes_on}"
    )


# -- the site of the person who calls -----------------------------------------------------------------------------------


def site_of_caller(name: str) -> dict[str, Any]:
    """The site of that name in conf/, or else that of LCBENCH_SITE; nothing where there is neither, or it cannot be read."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    here = {path.stem for path in (CONF / "site").glob("*.yaml")}
    chosen = next((n for n in (name, os.environ.get("LCBENCH_SITE")) if n in here), None)
    if chosen is None:
        return {}
    loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
    try:
        site = loader.load_configuration("config", [f"site={chosen}"], run_mode=RunMode.RUN).site
        found = OmegaConf.to_container(site, resolve=True)
    except Exception:
        return {}
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}


def _near(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if text.isprintable() else repr(text)


def _kind(value: Any) -> str:
    return {bool: "truth value", int: "number", float: "number", list: "list", dict: "mapping", str: "text"}.get(
        type(value), "null"
    )
