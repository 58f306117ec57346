"""Compiling the native libraries: what is made anew, what is kept, and what is said of the rest.

The compilers are shell scripts that note what they were asked for; the machine code of real ones
is looked at in test_machine_code.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.csrc import build, jobs, toolchain

SOURCE = Path(build.__file__).parent
TORCH = toolchain.Found("/torch", "2.13.0")
COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "compiler $(cat FOLDER/version)"; exit; }
while [ $# -gt 1 ]; do
  [ "$1" = -c ] && basename "$2" >> FOLDER/compiled
  [ "$1" = -o ] && echo machine code > "$2"
  shift
done
cat FOLDER/says
"""
PTXAS = """\
warning #2908-D: the implicit by-copy capture of "this" is deprecated
ptxas info    : 11 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90a'
ptxas info    : Function properties for _Z5firstv
    128 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compile time = 175.020 ms
ptxas warning : Registers are spilled to local memory in function '_Z6secondv', 4 bytes
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'
ptxas info    : Function properties for _Z6secondv
    16 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CXX", "COTERIE_SKIP_NATIVE", "COTERIE_SKIP_CUDA", "COTERIE_CUDA_ARCHS")
    for name in (*names, "CUTLASS_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def build_skipping(target: Path, capfd: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    """Build where all libraries must be skipped; returns the report and what was printed."""
    for library in build.LIBRARIES:
        (target / build.library_name(library)).write_bytes(b"of an earlier build")
    report = build.build(SOURCE, target)
    assert json.loads((target / build.REPORT).read_text()) == report
    assert sorted(p.name for p in target.iterdir()) == [build.REPORT]  # no old library, no litter
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and printed.endswith("plain PyTorch is used instead\n")
    assert not any(entry["built"] for entry in report["libraries"].values())
    return report, printed


def test_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    _, line = build_skipping(tmp_path, capfd)
    assert "CPU" in line and "no C++ compiler (g++, c++ or clang++)" in line
    assert "apt-get install g++ && python -m coterie.csrc.build" in line


def test_when_told_to_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COTERIE_SKIP_NATIVE", "1")
    _, line = build_skipping(tmp_path, capfd)
    expected = "coterie: CPU and CUDA and FUSED ops skipped: COTERIE_SKIP_NATIVE=1 (to build: "
    assert line.startswith(expected)


def test_when_the_compiler_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'rows.cpp:1: error: too tired' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("COTERIE_SKIP_CUDA", "1")
    target = tmp_path / "target"
    target.mkdir()
    report, line = build_skipping(target, capfd)
    assert f"CPU ops skipped: {compiler} failed: rows.cpp:1: error: too tired" in line
    assert "CUDA and FUSED ops skipped: COTERIE_SKIP_CUDA=1" in line
    assert "too tired" in report["libraries"]["cpu"]["log"]


def test_a_bad_number_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COTERIE_SKIP_CUDA", "1")
    monkeypatch.setenv("MAX_JOBS", "two")
    _, line = build_skipping(tmp_path, capfd)
    assert "CPU ops skipped: MAX_JOBS=two is not a positive whole number" in line


def asked_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Have the interpreter that is asked for packages give this answer."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(toolchain.sys, "executable", str(python))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)


def test_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked_python(tmp_path, monkeypatch, "")
    target = tmp_path / "target"
    target.mkdir()
    _, line = build_skipping(target, capfd)
    assert "CPU and CUDA" in line
    assert "ops skipped: torch is not installed yet (to build: pip install" in line


def test_an_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_python(tmp_path, monkeypatch, '{"path": "/torch", "version": "2.10.1+cu128"}')
    with pytest.raises(toolchain.Skipped, match=r"torch 2\.10\.1\+cu128 is older than 2\.11"):
        toolchain.find_torch()
    asked_python(tmp_path, monkeypatch, '{"path": "/torch", "version": "2.11.0"}')
    assert toolchain.find_torch() == toolchain.Found("/torch", "2.11.0")


def make_cutlass(folder: Path, version: tuple[int, int, int]) -> None:
    header = folder / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    names = ("MAJOR", "MINOR", "PATCH")
    lines = [f"#define CUTLASS_{n} {v}" for n, v in zip(names, version, strict=True)]
    header.write_text("\n".join([*lines, "#define CUTLASS_VERSION ((CUTLASS_MAJOR)*100)"]))


def test_where_cutlass_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_python(tmp_path, monkeypatch, "")
    with pytest.raises(toolchain.Skipped, match="no CUTLASS headers") as lacking:
        toolchain.find_cutlass()
    assert lacking.value.fix.startswith("pip install --no-deps 'nvidia-cutlass>=4.2' && ")

    package = {"path": str(tmp_path / "package"), "version": "4.2.0.0"}
    asked_python(tmp_path, monkeypatch, json.dumps(package))
    make_cutlass(tmp_path / "package" / "source", (4, 2, 0))
    assert toolchain.find_cutlass().version == "4.2.0"

    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "own"))
    with pytest.raises(toolchain.Skipped, match=r"CUTLASS_PATH=.*own holds no include/cutlass"):
        toolchain.find_cutlass()
    make_cutlass(tmp_path / "own", (4, 5, 1))
    found = toolchain.find_cutlass()
    assert found.version == "4.5.1" and found.includes[0] == tmp_path / "own" / "include"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources for all libraries in ``csrc``, and tools that take them for compiled."""
    (tmp_path / "csrc" / "fused_kernels").mkdir(parents=True)
    shutil.copy(SOURCE / "build.py", tmp_path / "csrc")
    for name in ("a.cpp", "b.cpp", "a.h", "k.cu", "k.cuh", "fused_kernels/f.cu"):
        (tmp_path / "csrc" / name).write_text(f"// {name}\n")
    (tmp_path / "csrc" / "fused_kernels" / "f.cuh").write_text("// f\n")
    compiler, nvcc = tmp_path / "cxx", tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    for tool in (compiler, nvcc):
        tool.write_text(COMPILER.replace("FOLDER", str(tmp_path)))
        tool.chmod(0o755)
    (tmp_path / "cuda" / "include").mkdir()
    (tmp_path / "cuda" / "include" / "cuda_runtime.h").touch()
    (tmp_path / "version").write_text("1.0")
    (tmp_path / "says").write_text("")
    make_cutlass(tmp_path / "cutlass", (4, 2, 0))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "cutlass"))
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setattr(toolchain, "find_torch", lambda: TORCH)
    return tmp_path


def compiled(tree: Path) -> str:
    """Build beside the sources; the names of the files that were compiled."""
    (tree / "compiled").write_text("")
    build.build(tree / "csrc", tree / "csrc")
    return " ".join((tree / "compiled").read_text().split())


ALL = "a.cpp b.cpp k.cu f.cu"


def test_every_source_is_compiled_once_by_itself(tree: Path) -> None:
    assert compiled(tree) == ALL
    for library in build.LIBRARIES:
        assert (tree / "csrc" / build.library_name(library)).read_text() == "machine code\n"
    assert compiled(tree) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.cpp", "a.cpp b.cpp"),
        ("new.cpp", "a.cpp b.cpp new.cpp"),
        ("a.h", ALL),
        ("build.py", ALL),
        ("new.cu", "k.cu new.cu"),
        ("k.cuh", "k.cu f.cu"),
        ("fused_kernels/new.cu", "f.cu new.cu"),
        ("fused_kernels/f.cuh", "f.cu"),
    ],
)
def test_only_what_changed_is_made_anew(tree: Path, name: str, expected: str) -> None:
    compiled(tree)
    with (tree / "csrc" / name).open("a") as source:
        source.write("// changed\n")
    assert compiled(tree) == expected
    assert compiled(tree) == ""


def test_other_tools_make_all_anew(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(tree)
    (tree / "version").write_text("2.0")
    assert compiled(tree) == ALL
    monkeypatch.setattr(toolchain, "find_torch", lambda: toolchain.Found("/torch", "2.14.0"))
    assert compiled(tree) == ALL
    shutil.rmtree(tree / "cutlass")
    make_cutlass(tree / "cutlass", (4, 3, 0))
    assert compiled(tree) == "f.cu"
    monkeypatch.setenv("COTERIE_CUDA_ARCHS", "90a,100")
    assert compiled(tree) == "k.cu"  # the fused kernels are compiled for Hopper only, as before


def test_a_lost_library_is_made_anew(tree: Path) -> None:
    compiled(tree)
    (tree / "csrc" / build.library_name("cuda")).unlink()
    assert compiled(tree) == "k.cu"


def test_carried_libraries_are_kept_where_there_are_no_tools(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiled(tree)
    before = build.read_report(tree / "csrc")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "find_cuda", raises(toolchain.Skipped("no nvcc", "find it")))
    monkeypatch.setattr(toolchain, "find_torch", raises(toolchain.Skipped("no torch", "find it")))
    capfd.readouterr()
    assert compiled(tree) == ""
    assert build.read_report(tree / "csrc") == before
    assert capfd.readouterr().err == ""

    with (tree / "csrc" / "fused_kernels" / "f.cu").open("a") as source:
        source.write("// changed\n")
    assert compiled(tree) == ""
    after = build.read_report(tree / "csrc")
    assert after["cuda"] == before["cuda"] and not after["fused"]["built"]
    assert not (tree / "csrc" / build.library_name("fused")).exists()


def raises(error: Exception):
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize("lacking", ["cutlass", "arch", "sources"])
def test_fused_kernels_are_skipped_alone(
    tree: Path,
    lacking: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if lacking == "cutlass":
        shutil.rmtree(tree / "cutlass")
        reason = f"CUTLASS_PATH={tree}/cutlass holds no include/cutlass/version.h"
    elif lacking == "arch":
        monkeypatch.setenv("COTERIE_CUDA_ARCHS", "80,100a")
        reason = "COTERIE_CUDA_ARCHS has no 90a, and the fused kernels are for Hopper GPUs only"
    else:
        (tree / "csrc" / "fused_kernels" / "f.cu").unlink()
        reason = "no sources (fused_kernels/*.cu)"
    assert compiled(tree) == "a.cpp b.cpp k.cu"
    assert capfd.readouterr().err.startswith(f"coterie: FUSED ops skipped: {reason}")


def test_hopper_is_the_only_target_of_the_fused_kernels(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_CUDA_ARCHS", "80,90a")
    archs = {name: build.find_recipe(tree / "csrc", name).archs for name in build.LIBRARIES}
    assert archs == {"cpu": [], "cuda": ["80", "90a"], "fused": ["90a"]}
    command = build.find_recipe(tree / "csrc", "fused").compile
    codes = [f"-gencode=arch=compute_90a,code={code}" for code in ("compute_90a", "sm_90a")]
    assert [word for word in command if "arch" in word] == codes


def test_what_ptxas_says_is_kept(tree: Path) -> None:
    (tree / "says").write_text(PTXAS)
    compiled(tree)
    entry = build.read_report(tree / "csrc")["fused"]["files"]["f.cu"]
    assert entry.pop("memory") > 0 and entry.pop("seconds") >= 0
    assert entry == {
        "kernels": 2,
        "registers": 255,
        "stack": 128,
        "spills": 24,
        "warnings": [line for line in PTXAS.splitlines() if "C7510" in line or "spilled" in line],
    }


@pytest.mark.parametrize(
    ("wanted", "gigabytes", "expected"),
    [("", 1000, 6), ("3", 1000, 3), ("50", 1000, 50), ("", 9, 2), ("3", 9, 2), ("", 1, 1)],
)
def test_jobs_that_cores_and_memory_allow(
    wanted: str, gigabytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", wanted)
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(jobs, "available_bytes", lambda: gigabytes << 30)
    assert jobs.number_at_a_time() == expected


def test_available_memory_is_the_machines() -> None:
    psutil = pytest.importorskip("psutil")
    assert 0.5 < jobs.available_bytes() / psutil.virtual_memory().available < 2


WAIT_FOR_THE_OTHER = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
until = time.monotonic() + 20
while not pathlib.Path(sys.argv[2]).exists():
    if time.monotonic() > until: sys.exit("error: alone")
    time.sleep(0.01)
"""


def test_jobs_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "number_at_a_time", lambda: 2)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    wait = [sys.executable, "-c", WAIT_FOR_THE_OTHER]
    assert len(jobs.run_all([[*wait, a, b], [*wait, b, a]], tmp_path)) == 2


def test_memory_is_that_of_the_children_too(tmp_path: Path) -> None:
    allocate = "import time; kept = bytearray(400 << 20); print('done')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {allocate!r}])"
    done = jobs.run([sys.executable, "-c", outer], tmp_path / "log")
    assert done.log == "done\n"
    assert 400 << 20 < done.memory < 4000 << 20
    assert done.seconds > 0


def test_as_a_script_it_needs_neither_torch_nor_coterie(tree: Path) -> None:
    for name in ("jobs.py", "toolchain.py"):
        shutil.copy(SOURCE / name, tree / "csrc")
    isolated = [sys.executable, "-E", "-S", str(tree / "csrc" / "build.py")]
    environment = {**os.environ, "COTERIE_SKIP_NATIVE": "1"}
    done = subprocess.run(isolated, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("coterie: CPU and CUDA and FUSED ops skipped"), done.stderr
