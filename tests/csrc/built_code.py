"""The kernels of this checkout as they were built: what the build reports, machine code and PTX."""

import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from coterie.csrc import build, toolchain

SOURCE = Path(build.__file__).parent


def report(library: str) -> dict[str, Any]:
    """What the build's report says of each .cu file; skips where a tool is missing."""
    entry = build.read_report(SOURCE).get(library, {"built": False, "reason": "not built"})
    if not entry["built"]:
        try:
            build.find_recipe(SOURCE, library)
        except toolchain.Skipped as lack:
            absent = not (SOURCE / build.SOURCES[library]).parent.exists()
            assert absent or not lack.reason.startswith("no sources"), lack.reason
            pytest.skip(lack.reason)
        pytest.fail(f"{library} could be built here, but was not: {entry['reason']}")
    assert entry["sources"] == build.source_hash(SOURCE, library), f"run {toolchain.COMMAND}"
    assert list(entry["files"]) == [path.name for path in build.sources(SOURCE, library)]
    return dict(entry["files"])


@cache
def machine_code(library: str) -> str:
    """The instructions of all kernels of a library, as cuobjdump prints them."""
    return _cuobjdump(library, "-sass")


def extract_ptx(library: str, folder: Path) -> list[Path]:
    """The PTX of each .cu file of a library, written to ``folder``: ``<its name>.*.ptx``."""
    _cuobjdump(library, "-xptx", "all", folder=folder)
    return sorted(folder.glob("*.ptx"))


def _cuobjdump(library: str, *options: str, folder: Path | None = None) -> str:
    report(library)
    tool = _tool()
    done = subprocess.run(
        [tool, *options, SOURCE / build.library_name(library)],
        cwd=folder,
        env={**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _tool() -> Path:
    """cuobjdump, of the CUDA toolkit or of its pip package."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, packages)]
    found = shutil.which("cuobjdump", path=os.pathsep.join(places))
    if found is None:
        pytest.skip("no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    return Path(found)
