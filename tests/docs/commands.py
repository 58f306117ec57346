"""Runs the command lines that the documentation shows, in a small form.

A handler knows each program that may be shown. A line that none knows is an error, never skipped.
Commands run in this process with what they were given plus :data:`SMALL`, in one process instead of
several (joining and starting ranks has tests of its own, in tests/launch).
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch
from urllib.request import urlopen

from coterie.launch.main import main
from tests.docs.blocks import ROOT, blocks

SMALL = (
    "parallel.ep=1",
    "parallel.tp=1",
    "train.steps=2",
    "train.global_batch=4",
    "optimizer.warmup=1",
    "data.documents=60",
    "model.layers=2",
    "model.width=32",
    "model.attention.heads=2",
    "evaluation.every=0",
    "evaluation.batch=4",
    "evaluation.sequences=4",
    "monitor.heat_map_every=2",
)
"""Replaces what makes the shown runs long. Comes last, so it wins."""

SMALL_DYNAMICS = (
    "parallel.ep=1",
    "train.context_steps=1",
    "train.model_steps=1",
    "data.times=3",
    "data.test_trajectories=2",
)
"""The same for ``coterie dynamics``."""


class DocumentationError(AssertionError):
    """A shown command that cannot be checked, or does not work."""


def lines(text: str) -> list[tuple[int, str]]:
    """(line number, command) of every ``sh`` block; comments and empty lines are none."""
    return [
        (block.line + offset, line)
        for block in blocks(text, "sh")
        for offset, line in enumerate(block.text.splitlines())
        if shlex.split(line, comments=True)
    ]


def run(line: str) -> None:
    """Run one command in the working directory; raises DocumentationError unless it succeeds."""
    words = shlex.split(line, comments=True)
    handler = HANDLERS.get(words[0])
    if handler is None:
        raise DocumentationError(f"no handler knows the program {words[0]!r}")
    handler(words[1:])


def _make(targets: list[str]) -> None:
    """Dry: the target exists and its recipe can be read; what it would run is checked below."""
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise DocumentationError(done.stderr)
    for command in re.findall(r"\.venv/bin/(coterie train[^;\n]*)", done.stdout):
        run(command)


def _source(words: list[str]) -> None:
    """``make setup`` makes the virtual environment that is activated."""
    done = subprocess.run(["make", "-Bn", "setup"], cwd=ROOT, capture_output=True, text=True)
    folder, _, script = words[0].rpartition("/bin/")
    if script != "activate" or f"-m venv {folder} " not in done.stdout:
        raise DocumentationError(f"make setup does not make {words[0]}")


def _coterie(words: list[str]) -> None:
    words = list(words)
    if words[0] in ("train", "resume", "upcycle"):
        if "--nproc" in words:
            at = words.index("--nproc")
            _check_processes(words, int(words[at + 1]))
            del words[at : at + 2]
        words += [*_small(words), "--nproc", "1"]
    if words[0] == "dynamics":
        words = _small_dynamics(words)
    if words[0] == "generate":
        words += ["--length", "8"]
    shown = StringIO()
    with redirect_stdout(shown):
        code = main(words)
    differ = words[:2] == ["checkpoint", "diff"] and code == 1  # as its page says
    if code and not differ:
        raise DocumentationError(f"exit code {code}")
    trains = {"train", "resume"} & set(words[:2])
    if not trains and not shown.getvalue().strip():
        raise DocumentationError("nothing was printed")


def _small_dynamics(words: list[str]) -> list[str]:
    """The command in its small form, once what is shown was checked."""
    from coterie.launch.dynamics_config import check_dynamics_world, load_dynamics_config

    if words[1] == "adapt":
        words[words.index("--steps") + 1] = "2"
    if words[1] not in ("train", "resume"):
        return words
    if "--nproc" in words:
        at = words.index("--nproc")
        shown = load_dynamics_config(words[2], [word for word in words[3:] if "=" in word])
        check_dynamics_world(shown, int(words[at + 1]))
        del words[at : at + 2]
    rounds = "train.rounds=3" if words[1] == "resume" else "train.rounds=2"
    return [*words, *SMALL_DYNAMICS, rounds]


def _small(words: list[str]) -> list[str]:
    """What to add to the overrides in ``words``."""
    given = [word for word in words if "=" in word]
    small = [s for s in SMALL if not (s.startswith("data.documents") and _has_data(given))]
    if words[0] == "resume" and any(word.startswith("train.steps=") for word in given):
        small[small.index("train.steps=2")] = "train.steps=3"  # longer, as the line says
    return small


def _has_data(given: list[str]) -> bool:
    return any(word.startswith("data.path=") for word in given)


def _check_processes(words: list[str], world: int) -> None:
    """The shown config, unshortened, can run in so many processes."""
    overrides = [word for word in words[2:] if "=" in word]
    config = f"{words[1]}/config.yaml" if words[0] == "resume" else words[1]
    with redirect_stdout(StringIO()):
        code = main(["config", "show", config, *overrides, "--nproc", str(world)])
    if code:
        raise DocumentationError(f"{words[1]} cannot run in {world} processes")


def _torchrun(words: list[str]) -> None:
    """torchrun's own parser accepts its options; what it would start runs as its rank 0 of 1."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    if not options.module or options.training_script != "coterie.launch":
        raise DocumentationError("only torchrun … -m coterie.launch is known")
    rest = list(options.training_script_args)
    _check_processes(rest, int(options.nproc_per_node))
    with patch.dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"):
        if code := main([*rest, *_small(rest)]):
            raise DocumentationError(f"exit code {code}")


def _srun(words: list[str]) -> None:
    """The config can run in as many processes as SLURM would start."""
    at = words.index("coterie")
    nodes, tasks = (
        int(words[words.index(option) + 1]) for option in ("--nodes", "--ntasks-per-node")
    )
    if words[at + 1] != "train":
        raise DocumentationError("only srun … coterie train is known")
    _check_processes(words[at + 1 :], nodes * tasks)


def _tensorboard(words: list[str]) -> None:
    """TensorBoard finds runs in the folder, and answers."""
    from tensorboard import program

    if not list(Path(words[words.index("--logdir") + 1]).rglob("events.out.tfevents.*")):
        raise DocumentationError("there is nothing to show")
    server = program.TensorBoard()
    server.configure(argv=["tensorboard", *words, "--port", "0", "--load_fast", "false"])
    with urlopen(server.launch(), timeout=30) as answer:
        if answer.status != 200:
            raise DocumentationError(f"TensorBoard answers {answer.status}")


def _python(words: list[str]) -> None:
    """A script of this repository."""
    with patch.object(sys, "argv", words):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise DocumentationError(f"exit code {end.code}") from end
    if not Path(words[-1]).is_file():
        raise DocumentationError(f"{words[-1]} was not written")


HANDLERS: dict[str, Callable[[list[str]], None]] = {
    "make": _make,
    "source": _source,
    "coterie": _coterie,
    "torchrun": _torchrun,
    "srun": _srun,
    "tensorboard": _tensorboard,
    "python": _python,
}


def make_place(folder: Path) -> None:
    """A working directory that looks like the checkout to the commands."""
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
