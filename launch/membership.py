"""Where this process stands when something else started it: torchrun, SLURM, or coterie itself."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from coterie.core.errors import UserError

_NOT_STEPS = {str((1 << 32) - code) for code in (4, 5, 6)}  # SLURM's extern, batch, interactive


@dataclass(frozen=True)
class Membership:
    """This process's place in a run of several."""

    starter: str
    """``torchrun``, ``SLURM`` or ``coterie``."""
    rank: int
    world: int


def join(environment: Mapping[str, str] | None = None) -> Membership | None:
    """The run that this process is part of, or None when it was started on its own.

    In a SLURM step, torchrun's variables are set for :func:`coterie.parallel.distributed.start`.

    Raises:
        UserError: the variables contradict each other.
    """
    found = os.environ if environment is None else environment
    if "RANK" in found and "WORLD_SIZE" in found:
        starter = "coterie" if "COTERIE_PARENT" in found else "torchrun"
        rank, world = _number(found, "RANK"), _number(found, "WORLD_SIZE")
        if rank >= world:
            raise UserError(
                f"RANK is {rank}, but WORLD_SIZE is {world}: ranks are 0 to {world - 1}"
            )
        return Membership(starter, rank, world)
    for have, lack in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if have in found:
            raise UserError(
                f"the environment has {have} but not {lack}: set both (torchrun does), or neither"
            )
    return _join_slurm(found)


def _join_slurm(found: Mapping[str, str]) -> Membership | None:
    step = found.get("SLURM_STEP_ID")
    if step is None or step in _NOT_STEPS or "SLURM_PROCID" not in found:
        return None
    world = _number(found, "SLURM_NTASKS")
    if world == 1:
        return None  # one task is no group: it may start processes of its own
    rank = _number(found, "SLURM_PROCID")
    if per_node := _tasks_per_node(found):
        os.environ["LOCAL_WORLD_SIZE"] = per_node
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(_number(found, "SLURM_LOCALID")),
        MASTER_ADDR=found.get("MASTER_ADDR") or _first_host(found),
        MASTER_PORT=found.get("MASTER_PORT") or str(slurm_port(found)),
    )
    return Membership("SLURM", rank, world)


def _tasks_per_node(found: Mapping[str, str]) -> str | None:
    """How many tasks each node of the step has, where all have as many and are numbered node by
    node."""
    if not found.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        return None
    alike = re.fullmatch(r"(\d+)(\(x\d+\))?", found.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return alike and alike[1]


def slurm_port(found: Mapping[str, str]) -> int:
    """The same on all nodes, another for each job and step, and outside the ports that Linux hands
    out (32768 and up)."""
    return 15000 + (_number(found, "SLURM_JOB_ID") * 7 + _number(found, "SLURM_STEP_ID")) % 15000


def _first_host(found: Mapping[str, str]) -> str:
    nodes = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_JOB_NODELIST", "")
    if not any(sign in nodes for sign in "[,"):
        if nodes:
            return nodes
        raise UserError(
            "the SLURM step has no SLURM_STEP_NODELIST: set MASTER_ADDR to rank 0's host"
        )
    if shutil.which("scontrol") is None:
        raise UserError(
            "scontrol, which expands SLURM's host list, is not on PATH: set MASTER_ADDR to "
            f"rank 0's host, one of {nodes}"
        )
    answer = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60
    )
    if answer.returncode or not answer.stdout.strip():
        raise UserError(
            f"`scontrol show hostnames {nodes}` failed ({answer.stderr.strip()}): set MASTER_ADDR "
            "to rank 0's host"
        )
    return answer.stdout.split()[0]


def _number(found: Mapping[str, str], name: str) -> int:
    text = found.get(name, "")
    if not text.isascii() or not text.isdigit():
        raise UserError(f"the environment's {name} is '{text}', but must be a whole number ≥ 0")
    return int(text)


def join_quietly() -> Membership | None:
    """As :func:`join`, None where the variables are wrong: for messages about other errors."""
    try:
        return join()
    except UserError:
        return None
