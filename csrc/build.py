"""Compile the native libraries: ``python -m coterie.csrc.build``. setup.py calls the same code.

Three libraries are made beside this file, against torch's stable ABI: ``_cpu`` (any C++20
compiler), ``_cuda`` (nvcc; no GPU is needed, nor a CUDA build of torch) and ``_fused`` (nvcc and
CUTLASS's headers; for Hopper GPUs only). What cannot be built is skipped. A library whose sources
have not changed since is kept: where the compilers and torch are the same too, and where one of
them is missing. The outcome is written to ``build.json``, because pip hides what a successful
build prints, with what each file took to compile and what its kernels use.

Environment: ``CXX``, ``CUDA_HOME``, ``CUTLASS_PATH``, ``COTERIE_CUDA_ARCHS`` (see toolchain.py),
``MAX_JOBS`` (see jobs.py), ``COTERIE_SKIP_NATIVE=1``, ``COTERIE_SKIP_CUDA=1``.

This file imports neither torch nor, but as a part of coterie, coterie: under pip's build isolation
neither can be imported.
"""

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from coterie.csrc import jobs, toolchain
    from coterie.csrc.toolchain import COMMAND, Skipped
else:  # setup.py, or a script: the files beside this one
    import jobs
    import toolchain
    from toolchain import COMMAND, Skipped

LIBRARIES = ("cpu", "cuda", "fused")
REPORT = "build.json"
SOURCES = {"cpu": "*.cpp", "cuda": "*.cu", "fused": "fused_kernels/*.cu"}
HEADERS = {"cpu": ["*.h"], "cuda": ["*.h", "*.cuh"]}
HEADERS["fused"] = [*HEADERS["cuda"], "fused_kernels/*.h", "fused_kernels/*.cuh"]
_OLDEST = "".join(f"{part:02x}" for part in toolchain.OLDEST_TORCH)
_FLAGS = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION=0x{_OLDEST}000000000000"]
_CPU_FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math"]
_CUDA_FLAGS = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "-lineinfo", "-Xptxas=-v"]
_FUSED_FLAGS = [*_CUDA_FLAGS, "-DNDEBUG", "--expt-relaxed-constexpr"]
_HOPPER = "90a"
# the PTX too: tests run it on the host
_WITH_PTX = f"-gencode=arch=compute_{_HOPPER},code=compute_{_HOPPER}"


@dataclass(frozen=True)
class Recipe:
    """How to make one library, and with what."""

    compile: list[str]  # the command for one source, up to its name
    link: list[str]  # the command for the library, up to the objects' names
    needed: list[str]  # the torch libraries, at the end of that
    made_with: dict[str, Any]  # what, when it changes, asks for compiling anew
    archs: list[str]  # GPU architectures


def library_name(library: str) -> str:
    """The file name of one of ``LIBRARIES``."""
    return f"_{library}.abi3.so"


def sources(folder: Path, library: str) -> list[Path]:
    """The files that are compiled into ``library``."""
    return sorted(folder.glob(SOURCES[library]))


def source_hash(folder: Path, library: str) -> str:
    """A hash of the sources of ``library``, their headers and this file, which has the flags."""
    headers = [path for pattern in HEADERS[library] for path in folder.glob(pattern)]
    digest = hashlib.sha256()
    for path in [*sources(folder, library), *sorted(headers), folder / "build.py"]:
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_recipe(folder: Path, library: str) -> Recipe:
    """How to make ``library`` here. Raises Skipped when it is not to be, or a tool is missing."""
    unwanted = ["COTERIE_SKIP_NATIVE", *(["COTERIE_SKIP_CUDA"] if library != "cpu" else [])]
    for name in unwanted:
        if os.environ.get(name) == "1":
            raise Skipped(f"{name}=1", f"env -u {name} {COMMAND}")
    if sys.platform != "linux":
        raise Skipped(f"native code is built on Linux only, not on {sys.platform}", "use Linux")
    if not sources(folder, library):
        raise Skipped(f"no sources ({SOURCES[library]})", "")
    return {"cpu": _cpu_recipe, "cuda": _cuda_recipe, "fused": _fused_recipe}[library]()


def _cpu_recipe() -> Recipe:
    torch, compiler = toolchain.find_torch(), toolchain.find_compiler()
    flags = [*_FLAGS, *_CPU_FLAGS]
    return Recipe(
        compile=[*compiler, *flags, "-isystem", f"{torch.path}/include", "-c"],
        link=[*compiler, "-shared"],
        needed=[f"-L{torch.path}/lib", "-ltorch", "-ltorch_cpu", "-lc10"],
        made_with={**_tools(torch, compiler[0]), "flags": flags},
        archs=[],
    )


def _cuda_recipe() -> Recipe:
    return _nvcc_recipe(_CUDA_FLAGS, toolchain.cuda_archs())


def _fused_recipe() -> Recipe:
    if _HOPPER not in toolchain.cuda_archs():
        raise Skipped(
            f"COTERIE_CUDA_ARCHS has no {_HOPPER}, and the fused kernels are for Hopper GPUs only",
            f"COTERIE_CUDA_ARCHS={_HOPPER} {COMMAND}",
        )
    return _nvcc_recipe([*_FUSED_FLAGS, _WITH_PTX], [_HOPPER], with_cutlass=True)


def _nvcc_recipe(flags: list[str], archs: list[str], *, with_cutlass: bool = False) -> Recipe:
    torch, home = toolchain.find_torch(), toolchain.find_cuda()
    nvcc = [f"{home}/bin/nvcc", "-ccbin", toolchain.find_compiler()[-1]]
    for_archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags = [*_FLAGS, *flags, *for_archs]
    made_with = {**_tools(torch, nvcc[0]), "flags": flags}
    includes = ["-isystem", f"{torch.path}/include"]
    if with_cutlass:
        cutlass = toolchain.find_cutlass()
        made_with["cutlass"] = cutlass.version
        for folder in cutlass.includes:
            includes += ["-isystem", str(folder)]
    # the current stream is asked of libtorch_cuda by a weak symbol, which only resolves when
    # libtorch.so, which brings it, stays among the needed libraries
    needed = [f"-L{torch.path}/lib", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
    return Recipe(
        compile=[*nvcc, *flags, *includes, "-c"],
        link=[*nvcc, *for_archs, "-shared", "-cudart", "static"],
        needed=[*needed, "-lc10"],
        made_with=made_with,
        archs=archs,
    )


def _tools(torch: toolchain.Found, compiler: str) -> dict[str, Any]:
    return {"torch": torch.version, "compiler": toolchain.version_line(compiler)}


def build(source: Path, target: Path) -> dict[str, Any]:
    """Compile the sources in ``source`` into ``target``; returns what ``build.json`` holds.

    Nothing here stops an install: a library that cannot be built is removed from ``target``, with
    the reason in the report. Prints one line to stderr when anything was skipped.
    """
    target.mkdir(parents=True, exist_ok=True)
    before = read_report(target)
    report: dict[str, Any] = {"libraries": {}}
    for library in LIBRARIES:
        report["libraries"][library] = _make(library, source, target, before.get(library, {}))
    (target / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if line := skipped_line(report):
        print(line, file=sys.stderr, flush=True)
    return report


def read_report(folder: Path) -> dict[str, Any]:
    """What the report in ``folder`` says of each library; {} when nothing was built there."""
    path = folder / REPORT
    return dict(json.loads(path.read_text())["libraries"]) if path.exists() else {}


def _make(library: str, source: Path, target: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Make or keep one library; what the report says of it."""
    output = target / library_name(library)
    hashed = source_hash(source, library)
    unchanged = output.exists() and before.get("built") and before.get("sources") == hashed
    try:
        recipe = find_recipe(source, library)
        if not unchanged or before["made_with"] != recipe.made_with:
            files = _compile(recipe, sources(source, library), output)
            print(f"built {output.name} with {recipe.made_with['compiler']}", flush=True)
            made = {"archs": recipe.archs, "made_with": recipe.made_with, "files": files}
            return {"built": True, "sources": hashed, **made}
    except jobs.Failed as failure:
        return _left_out(output, Skipped(str(failure), COMMAND, failure.log[-8000:]))
    except Skipped as lack:
        if not unchanged:
            return _left_out(output, lack)
    print(f"kept {output.name}", flush=True)
    return before


def _left_out(output: Path, why: Skipped) -> dict[str, Any]:
    output.unlink(missing_ok=True)
    return {"built": False, "reason": why.reason, "fix": why.fix, "log": why.log}


def _compile(recipe: Recipe, files: list[Path], output: Path) -> dict[str, Any]:
    """Compile the files, side by side, and link them; what each took, and its kernels' figures.

    A library in use is replaced, never overwritten. Raises jobs.Failed.
    """
    partial = output.with_suffix(f".{os.getpid()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects = [str(folder / f"{path.name}.o") for path in files]
        units = [
            [*recipe.compile, str(path), "-o", unit]
            for path, unit in zip(files, objects, strict=True)
        ]
        try:
            done = jobs.run_all(units, folder)
            link = [*recipe.link, *objects, "-o", str(partial), *recipe.needed]
            jobs.run(link, folder / "link.log")
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    return {
        path.name: {
            "seconds": unit.seconds,
            "memory": unit.memory,
            **(jobs.kernel_figures(unit.log) if path.suffix == ".cu" else {}),
        }
        for path, unit in zip(files, done, strict=True)
    }


def skipped_line(report: dict[str, Any]) -> str:
    """One line on what was not built, why, and the command that would build it; '' if nothing."""
    whys: dict[tuple[str, str], list[str]] = {}
    for library, entry in report["libraries"].items():
        if not entry["built"]:
            whys.setdefault((entry["reason"], entry["fix"]), []).append(library.upper())
    parts = [
        f"{' and '.join(libraries)} ops skipped: {reason}{f' (to build: {fix})' if fix else ''}"
        for (reason, fix), libraries in whys.items()
    ]
    return f"coterie: {'; '.join(parts)}; plain PyTorch is used instead" if parts else ""


def main() -> int:
    """Build beside this file; 0 when at least the CPU library was built."""
    here = Path(__file__).resolve().parent
    if not os.access(here, os.W_OK):
        print(f"coterie: cannot write to {here}", file=sys.stderr)
        return 2
    report = build(here, here)
    for entry in report["libraries"].values():
        if log := entry.get("log"):
            print(log, file=sys.stderr)
    return 0 if report["libraries"]["cpu"]["built"] else 1


if __name__ == "__main__":
    sys.exit(main())
