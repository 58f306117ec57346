"""What the native libraries are compiled with: torch, a C++ compiler, the CUDA toolkit, CUTLASS.

Environment: ``CXX`` (compiler), ``CUDA_HOME``, ``CUTLASS_PATH`` (a folder with CUTLASS's
``include``), ``COTERIE_CUDA_ARCHS`` (default ``90a``, comma separated).

Only the standard library is imported: see build.py.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)
COMMAND = "python -m coterie.csrc.build"
_FIND = """
import importlib.metadata, importlib.util, json, sys
module, package = sys.argv[1:]
spec = importlib.util.find_spec(module)
if spec and spec.submodule_search_locations:
    path = list(spec.submodule_search_locations)[0]
    print(json.dumps({"path": path, "version": importlib.metadata.version(package)}))
"""


class Skipped(Exception):
    """A library was not built: why, in a few words, and the command that would change it."""

    def __init__(self, reason: str, fix: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason, self.fix, self.log = reason, fix, log


@dataclass(frozen=True)
class Found:
    """A package of the environment compiled for: the folder of its module and its version."""

    path: str
    version: str


@dataclass(frozen=True)
class Cutlass:
    """CUTLASS's headers: the folders to include from, and the version that they state."""

    includes: tuple[Path, ...]
    version: str


def find_package(module: str, package: str) -> Found | None:
    """A package of the environment being installed into, found without importing it.

    An isolated build hides that environment behind PYTHONPATH (pip) or behind an environment of
    its own (uv); so the interpreter is asked once as we are, once without PYTHONPATH, and the
    activated virtual environment is asked last.
    """
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    tries = [(sys.executable, dict(os.environ)), (sys.executable, bare)]
    if active := os.environ.get("VIRTUAL_ENV"):
        tries.append((f"{active}/bin/python", bare))
    for python, environment in tries:
        if not Path(python).exists():
            continue
        command = [python, "-c", _FIND, module, package]
        answer = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip():
            return Found(**json.loads(answer.stdout))
    return None


def find_torch() -> Found:
    """The torch to compile against. Raises Skipped when there is none, or one that is too old."""
    torch = find_package("torch", "torch")
    if torch is None:
        raise Skipped("torch is not installed yet", f"pip install torch && {COMMAND}")
    number = re.match(r"(\d+)\.(\d+)", torch.version)
    if number is None or tuple(map(int, number.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise Skipped(
            f"torch {torch.version} is older than {oldest}",
            f"pip install 'torch>={oldest}' && {COMMAND}",
        )
    return torch


def find_compiler() -> list[str]:
    """The C++ compiler as the start of a command line. Raises Skipped when there is none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    looked = wanted[0] if wanted else "g++, c++ or clang++"
    raise Skipped(f"no C++ compiler ({looked})", f"apt-get install g++ && {COMMAND}")


def find_cuda() -> Path:
    """The folder of the CUDA toolkit. Raises Skipped when there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    homes.append("/usr/local/cuda")
    for home in homes:
        if home is None or not os.access(f"{home}/bin/nvcc", os.X_OK):
            continue
        if Path(home, "include", "cuda_runtime.h").exists():
            return Path(home)
    raise Skipped("no CUDA toolkit (nvcc)", f"CUDA_HOME=/path/to/cuda {COMMAND}")


def cuda_archs() -> list[str]:
    """The GPU architectures to compile for, as nvcc spells them; ``90a`` is a Hopper GPU."""
    return [arch.strip() for arch in os.environ.get("COTERIE_CUDA_ARCHS", "90a").split(",")]


def find_cutlass() -> Cutlass:
    """CUTLASS's headers: of ``CUTLASS_PATH``, or else of the ``nvidia-cutlass`` package.

    Raises Skipped when there are none.
    """
    install = f"pip install --no-deps 'nvidia-cutlass>=4.2' && {COMMAND}"
    if given := os.environ.get("CUTLASS_PATH"):
        root = Path(given)
        lacking = f"CUTLASS_PATH={given} holds no include/cutlass/version.h"
        install = f"CUTLASS_PATH=/path/to/cutlass {COMMAND}"
    else:
        found = find_package("cutlass_library", "nvidia-cutlass")
        root = Path(found.path if found else "/nowhere") / "source"
        lacking = "no CUTLASS headers (the nvidia-cutlass package)"
    stated = root / "include" / "cutlass" / "version.h"
    if not stated.exists():
        raise Skipped(lacking, install)
    numbers = re.findall(r"define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", stated.read_text())
    return Cutlass((root / "include", root / "tools/util/include"), ".".join(numbers))


def version_line(compiler: str) -> str:
    """The line of ``compiler --version`` that holds the version."""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if re.search(r"\d+\.\d+", line)]
    return (lines[0] if lines else compiler).strip()
