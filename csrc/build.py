"""Compile the native libraries: ``python -m coterie.csrc.build``. setup.py calls the same code.

Two libraries are made beside this file, against torch's stable ABI: ``_cpu`` (rows.cpp and
swiglu.cpp, any C++20 compiler) and ``_cuda`` (rows.cu, nvcc; no GPU is needed, nor a CUDA build of
torch). What cannot be built is skipped, and its plain PyTorch twin is used. The outcome is written
to ``build.json``, because pip hides what a successful build prints.

Environment: ``CXX`` (compiler), ``CUDA_HOME``, ``COTERIE_CUDA_ARCHS`` (default ``90a``, comma
separated), ``COTERIE_SKIP_NATIVE=1``, ``COTERIE_SKIP_CUDA=1``.

This file imports neither torch nor coterie: under pip's build isolation neither can be imported.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = ("rows.h", "cpu.h", "rows.cpp", "swiglu.cpp", "rows.cu")
LIBRARIES = ("cpu", "cuda")
REPORT = "build.json"
OLDEST_TORCH = (2, 11)
COMMAND = "python -m coterie.csrc.build"
_TARGET = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
_FIND_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
if spec and spec.submodule_search_locations:
    path = list(spec.submodule_search_locations)[0]
    print(json.dumps({"path": path, "version": importlib.metadata.version("torch")}))
"""


class Skipped(Exception):
    """A library was not built: why, in a few words, and the command that would change it."""

    def __init__(self, reason: str, fix: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason, self.fix, self.log = reason, fix, log


@dataclass(frozen=True)
class Torch:
    """The torch to compile against: its package folder and its version."""

    path: str
    version: str


def library_name(device: str) -> str:
    """The file name of the library for ``device``, one of ``LIBRARIES``."""
    return f"_{device}.abi3.so"


def source_hash(folder: Path) -> str:
    """A hash of the native sources and of this file, to tell when libraries are out of date."""
    digest = hashlib.sha256()
    for name in (*SOURCES, "build.py"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def find_torch() -> Torch:
    """The torch of the environment being installed into. Raises Skipped when there is none.

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
        answer = subprocess.run(
            [python, "-c", _FIND_TORCH], env=environment, cwd="/", capture_output=True, text=True
        )
        if answer.returncode == 0 and answer.stdout.strip():
            return _checked(Torch(**json.loads(answer.stdout)))
    raise Skipped("torch is not installed yet", f"pip install torch && {COMMAND}")


def _checked(torch: Torch) -> Torch:
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


def cpu_command(source: Path, output: Path, torch: Torch) -> list[str]:
    """The command that compiles the C++ sources."""
    units = [str(source / name) for name in SOURCES if name.endswith(".cpp")]
    return [
        *find_compiler(),
        *[
            "-O3",
            "-std=c++20",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-fno-trapping-math",
        ],
        *[_TARGET, "-isystem", f"{torch.path}/include", *units],
        *["-o", str(output), f"-L{torch.path}/lib", "-ltorch", "-ltorch_cpu", "-lc10"],
    ]


def cuda_command(source: Path, output: Path, torch: Torch) -> list[str]:
    """The command that compiles rows.cu for each architecture in ``COTERIE_CUDA_ARCHS``."""
    if os.environ.get("COTERIE_SKIP_CUDA") == "1":
        raise Skipped("COTERIE_SKIP_CUDA=1", f"env -u COTERIE_SKIP_CUDA {COMMAND}")
    home, compiler = find_cuda(), find_compiler()
    # the current stream is asked of libtorch_cuda by a weak symbol, which only resolves when
    # libtorch.so, which brings it, stays among the needed libraries
    return [
        *[f"{home}/bin/nvcc", "-ccbin", compiler[-1], "-O3", "-std=c++20", "-shared", "-lineinfo"],
        *["-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static", "-DUSE_CUDA", _TARGET],
        *[f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs()],
        *["-isystem", f"{torch.path}/include", str(source / "rows.cu"), "-o", str(output)],
        *[f"-L{torch.path}/lib", "-Xlinker", "--no-as-needed"],
        *["-ltorch", "-ltorch_cpu", "-lc10"],
    ]


def _compile(command: list[str], output: Path) -> None:
    """Run a compiler; a library in use is replaced, never overwritten."""
    print(shlex.join(command), flush=True)
    partial = Path(command[command.index("-o") + 1])
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            log = done.stderr + done.stdout
            error = next((x for x in log.splitlines() if "error" in x.lower()), "no message")
            raise Skipped(f"{command[0]} failed: {error.strip()[:200]}", COMMAND, log[-8000:])
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def build(source: Path, target: Path) -> dict[str, Any]:
    """Compile the sources in ``source`` into ``target``; returns what ``build.json`` holds.

    Nothing here stops an install: a library that cannot be built is removed from ``target``, with
    the reason in the report. Prints one line to stderr when anything was skipped.
    """
    target.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"sources": source_hash(source), "torch": None, "libraries": {}}
    makers = {"cpu": cpu_command, "cuda": cuda_command}
    for device in LIBRARIES:
        output = target / library_name(device)
        try:
            torch = _preconditions()
            report["torch"] = torch.version
            command = makers[device](source, output.with_suffix(f".{os.getpid()}"), torch)
            _compile(command, output)
            entry = {"built": True, "compiler": _version(command[0])}
            if device == "cuda":
                entry["archs"] = cuda_archs()
        except Skipped as skip:
            output.unlink(missing_ok=True)
            entry = {"built": False, "reason": skip.reason, "fix": skip.fix, "log": skip.log}
        report["libraries"][device] = entry
    (target / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if line := skipped_line(report):
        print(line, file=sys.stderr, flush=True)
    return report


def _preconditions() -> Torch:
    if os.environ.get("COTERIE_SKIP_NATIVE") == "1":
        raise Skipped("COTERIE_SKIP_NATIVE=1", f"env -u COTERIE_SKIP_NATIVE {COMMAND}")
    if sys.platform != "linux":
        raise Skipped(f"native code is built on Linux only, not on {sys.platform}", "use Linux")
    return find_torch()


def skipped_line(report: dict[str, Any]) -> str:
    """One line on what was not built, why, and the command that would build it; '' if nothing."""
    whys: dict[tuple[str, str], list[str]] = {}
    for device, entry in report["libraries"].items():
        if not entry["built"]:
            whys.setdefault((entry["reason"], entry["fix"]), []).append(device.upper())
    parts = [
        f"{' and '.join(devices)} ops skipped: {reason} (to build: {fix})"
        for (reason, fix), devices in whys.items()
    ]
    return f"coterie: {'; '.join(parts)}; plain PyTorch is used instead" if parts else ""


def _version(compiler: str) -> str:
    """The line of ``compiler --version`` that holds the version."""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if re.search(r"\d+\.\d+", line)]
    return (lines[0] if lines else compiler).strip()


def main() -> int:
    """Build beside this file; 0 when at least the CPU library was built."""
    here = Path(__file__).resolve().parent
    if not os.access(here, os.W_OK):
        print(f"coterie: cannot write to {here}", file=sys.stderr)
        return 2
    report = build(here, here)
    for device, entry in report["libraries"].items():
        if entry["built"]:
            print(f"built {library_name(device)} with {entry['compiler']}, torch {report['torch']}")
        elif entry["log"]:
            print(entry["log"], file=sys.stderr)
    return 0 if report["libraries"]["cpu"]["built"] else 1


if __name__ == "__main__":
    sys.exit(main())
