"""CUDA sources compiled for the host, where ``cuda_on_host.h`` runs their kernels thread by thread.

    ops = load(CSRC / "rows.cu")  # ops.permute(...) on CPU tensors runs the CUDA kernel

Each set of sources becomes a torch library of its own, kept in ``build/on_host`` under a hash of
all that it is made of, so that test processes compile it once. Sources must register their ops with
``COTERIE_KERNELS`` and launch with ``launch`` (csrc/device.cuh).

Under AddressSanitizer and UndefinedBehaviorSanitizer the whole process has to run:
``under_sanitizers`` runs a test file again in such a one, where ``load`` compiles with them.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.csrc import loader, toolchain

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
_KEPT = ROOT / "build" / "on_host"
_SANITIZED = "COTERIE_ON_HOST_SANITIZED"
_FLAGS = ("-x", "c++", "-std=c++20", "-DCOTERIE_ON_HOST", "-g", "-fPIC", "-shared")
_OPTIMISED = ("-O2", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas")
_CHECKED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1")


@cache
def load(*sources: Path, root: Path = CSRC) -> Any:
    """``torch.ops.<library>`` with the kernels of these sources for CPU tensors. ``root``: where
    headers lie.

    Skips the test, with the reason, where there is no g++. A trap in a kernel raises RuntimeError.
    """
    library, path = compiled(sources, sanitized(), root)
    torch.ops.load_library(str(path))
    return getattr(torch.ops, library)


def compiled(sources: Iterable[Path], sanitize: bool, root: Path = CSRC) -> tuple[str, Path]:
    """The name and the file of a library of these sources; made if it is not there."""
    try:
        compiler, found = toolchain.find_compiler(), toolchain.find_torch()
    except toolchain.Skipped as skip:
        pytest.skip(f"CUDA sources on the host: {skip.reason}")
    if "clang" in compiler[0]:
        pytest.skip("CUDA sources on the host: compiled by g++ only")
    units = [HERE / "define_on_host.cpp", *sources]
    fused = [source for source in sources if source.parent.name == "fused_kernels"]
    if fused:
        fused += sorted((HERE / "ptx").glob("*.cpp"))
    flags = [*_FLAGS, *_OPTIMISED, *(_CHECKED if sanitize else ())]
    headers = [*root.rglob("*.h"), *root.rglob("*.cuh"), *HERE.rglob("*.h")]
    digest = hashlib.sha256("\0".join([*compiler, found.version, *flags]).encode())
    for path in (*units, *fused, *sorted(headers)):
        digest.update(path.read_bytes())
    library = f"coterie_on_host_{digest.hexdigest()[:12]}"
    _KEPT.mkdir(parents=True, exist_ok=True)
    output = _KEPT / f"{library}.so"
    with (_KEPT / f"{library}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            partial = output.with_suffix(".partial")
            # together: each would read torch's headers again
            one = output.with_suffix(".cpp")
            one.write_text("".join(f'#include "{path}"\n' for path in fused))
            units = [one, *(unit for unit in units if unit not in fused)]
            command = [*compiler, *flags, f"-DCOTERIE_LIBRARY={library}"]
            command += [f"-I{root}", f"-I{HERE}", "-isystem", f"{found.path}/include"]
            command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *map(str, units)]
            command += ["-o", str(partial), f"-L{found.path}/lib"]
            command += ["-ltorch", "-ltorch_cpu", "-lc10"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-8000:]
            partial.rename(output)
    return library, output


@contextmanager
def standing_in(*sources: Path) -> Iterator[None]:
    """Inside, product code runs the kernels of these sources for CPU tensors."""
    before = dict(loader._CHOSEN)
    for source in sources:
        ops = load(source)
        for op in re.findall(r'm\.impl\("(\w+)"', source.read_text()):
            loader._CHOSEN[op, "cpu"] = getattr(ops, op).default
    try:
        yield
    finally:
        loader._CHOSEN.clear()
        loader._CHOSEN.update(before)


def sanitized() -> bool:
    """Whether this process runs under the sanitizers."""
    return os.environ.get(_SANITIZED) == "1"


def in_new_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` from the root, on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def under_sanitizers(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same where ``load`` compiles with the sanitizers; skips where the compiler has none."""
    return in_new_process(
        *arguments,
        **{_SANITIZED: "1"},
        LD_PRELOAD=" ".join([_runtime("libasan.so"), _runtime("libubsan.so")]),
        # leaks are python's own; libraries of the same sources define the same names
        ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0:detect_odr_violation=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


def check_under_sanitizers(file: str, which: str = "not sanitizers and not planted") -> None:
    """Run the tests of ``file`` again under the sanitizers: ``which``, as for ``pytest -k``.

    None of them may be skipped there.
    """
    pytest_ = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = under_sanitizers(*pytest_, "-k", which, file)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and " skipped" not in told, told[-8000:]


def _runtime(name: str) -> str:
    compiler = toolchain.find_compiler()[0]
    answer = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    if not Path(answer.stdout.strip()).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return str(Path(answer.stdout.strip()).resolve())


def mutated(source: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of ``source`` in ``folder`` with ``old``, which it holds once, replaced by ``new``."""
    text = source.read_text()
    assert text.count(old) == 1, f"{source.name} holds {text.count(old)} times {old!r}"
    copy = folder / source.name
    copy.write_text(text.replace(old, new))
    return copy


def mutated_root(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of all CUDA sources in ``folder``, one of which has ``old`` replaced by ``new``."""
    for path in (*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.cu")):
        copy = folder / path.relative_to(CSRC)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    mutated(CSRC / file, (folder / file).parent, old, new)
    return folder
