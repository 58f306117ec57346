"""What a GPU machine without a network is lent: wheels and prebuilt libraries, in the folder .gpu.

``prepare`` gathers them where there is a network; ``unpack`` uses them where there is none: only
the packages that the Python there lacks are installed, into ``.gpu/site``, and libraries are put
beside their sources if they were compiled from the same ones. Nothing else is touched.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ".gpu"
COMMIT = "commit"
MOST_BYTES = 60 << 20
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WITH_NEEDS = ("pydantic", "pytest", "pytest-timeout", "PyYAML", "hypothesis")
"""Fetched with all that they need."""
ALONE = ("nvidia-cutlass", "megatron-core")
"""Fetched without: they need torch, which is there, or nothing that is used."""
Run = Callable[[list[str]], Any]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def prepare(root: Path = ROOT, run: Run = _run) -> Path:
    """Fill ``.gpu`` anew. Raises RuntimeError when it is too large to carry, or lacks something."""
    folder = root / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    wheels, libraries = folder / "wheels", folder / "csrc"
    wheels.mkdir(parents=True)
    libraries.mkdir()
    run(download(wheels, WITH_NEEDS, root))
    run(download(wheels, ALONE, root, needs=False))
    missing = [name for name in (*WITH_NEEDS, *ALONE) if not _wheel(wheels, name)]
    if missing:
        raise RuntimeError(f"no wheel in {wheels} for: {', '.join(missing)}")
    prebuilt = [root / "csrc" / "build.json", *sorted((root / "csrc").glob("_*.abi3.so"))]
    for path in prebuilt:
        if path.exists():
            shutil.copy2(path, libraries)
    (folder / COMMIT).write_text(commit(root) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise RuntimeError(f"{folder} has {size >> 20} MiB; {MOST_BYTES >> 20} can be carried")
    print(f"{folder}: {size / 2**20:.1f} MiB")
    for path in sorted([*wheels.iterdir(), *libraries.iterdir()]):
        print(f"  {path.stat().st_size / 2**20:6.2f} MiB  {path.relative_to(folder)}")
    return folder


def commit(root: Path = ROOT) -> str:
    """What is measured; where there is no repository, what was told when ``.gpu`` was made."""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    told = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    kept = root / FOLDER / COMMIT
    return told or (kept.read_text().strip() if kept.exists() else "unknown")


def download(wheels: Path, names: Sequence[str], root: Path, needs: bool = True) -> list[str]:
    """pip's command for wheels of the versions that the tests use."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    constraints = ["-c", str(root / "requirements" / "constraints.txt"), "-d", str(wheels)]
    return [*pip, *target, *([] if needs else ["--no-deps"]), *constraints, *names]


def unpack(root: Path = ROOT, run: Run = _run) -> list[str]:
    """Install what this Python lacks, and put libraries in place; what was done, in words.

    ``.gpu/site`` then has to be on PYTHONPATH. Without ``.gpu`` nothing happens.
    """
    folder, done = root / FOLDER, []
    wheels = sorted((folder / "wheels").glob("*.whl"))
    lacking = [wheel for wheel in wheels if not _installed(wheel)]
    if lacking:
        site = folder / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        options = ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        run([*command, *options, *map(str, lacking)])
        done.append(f"installed into {site}: {', '.join(_name(wheel) for wheel in lacking)}")
    return done + _place_libraries(folder / "csrc", root / "csrc")


def _place_libraries(carried: Path, csrc: Path) -> list[str]:
    """Libraries that the checkout has already are left alone."""
    report = carried / "build.json"
    if not report.exists() or (csrc / "build.json").exists():
        return []
    for path in (*carried.glob("_*.abi3.so"), report):
        shutil.copy2(path, csrc)
    names = [n for n, made in json.loads(report.read_text())["libraries"].items() if made["built"]]
    return [f"libraries put in place: {', '.join(names)}"]


def _wheel(wheels: Path, name: str) -> bool:
    return any(_name(path) == _normal(name) for path in wheels.glob("*.whl"))


def _name(wheel: Path) -> str:
    return _normal(wheel.name.split("-")[0])


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _installed(wheel: Path) -> bool:
    """Whether this Python has the package, in whatever version."""
    try:
        importlib.metadata.version(_name(wheel))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
