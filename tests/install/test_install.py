"""``pip install .``, ``pip install -e .`` and the checkout's root, each in a clean environment.

The environments see the packages of the one that runs the tests through a path file, so torch is
not downloaded again; pip's own build isolation is left on, and is served from a local folder.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from coterie.csrc import build

pytestmark = [pytest.mark.install, pytest.mark.timeout(600)]
ROOT = Path(build.__file__).parents[1]
FOLDERS = ("core", "csrc", "comm", "moe", "models", "data", "parallel", "launch", "configs")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "coterie.py")
HAS_COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))
ASK = """
import importlib, json, pathlib, torch
from coterie.csrc import invert, loader, permute
import coterie.core.config, coterie.csrc.loader, coterie.moe.routers
token_A = torch.tensor([1, 0, 1])
x_TD = torch.tensor([[1.0], [2.0]])
status = loader.status()[0]
print(json.dumps({
    "rows": permute(x_TD, token_A, invert(token_A, 2)).flatten().tolist(),
    "native": status.native,
    "reason": status.reason,
    "folder": str(pathlib.Path(loader.__file__).parents[1]),
}))
"""


def run(*command: str | Path, cwd: Path, path: str | None = None) -> str:
    """Run a command without the CUDA library; what it printed, stderr included."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COTERIE_", "PYTHON"))}
    environment |= {"COTERIE_SKIP_CUDA": "1", "PATH": path or environment["PATH"]}
    environment.pop("CXX", None)
    environment.pop("VIRTUAL_ENV", None)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@dataclass
class Environment:
    """A clean virtual environment, a copy of the checkout, and an empty folder to stand in."""

    python: Path
    checkout: Path
    elsewhere: Path
    wheels: Path

    def pip_install(self, *arguments: str, path: str | None = None) -> list[str]:
        """Install the copy; the lines that coterie's own build printed."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check")
        offline = ("install", "-v", "--no-index", "--find-links", self.wheels)
        printed = run(*pip, *offline, *arguments, cwd=self.checkout, path=path)
        return [x.strip() for x in printed.splitlines() if x.strip().startswith("coterie: ")]

    def ask(self, folder: Path | None = None) -> dict:
        """What a program sees that is started in ``folder`` (an empty one by default)."""
        printed = run(self.python, "-c", ASK, cwd=folder or self.elsewhere)
        answer = json.loads(printed.splitlines()[-1])
        assert answer["rows"] == [2.0, 1.0, 2.0]
        return answer


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip needs in an isolated build, fetched once."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    done = subprocess.run(
        [*pip, "--no-deps", "-d", str(folder), "setuptools>=77", "wheel", "packaging"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"no package index to take setuptools from: {done.stderr.strip()[-200:]}")
    return folder


@pytest.fixture
def environment(tmp_path: Path, wheels: Path) -> Environment:
    """Torch and the other dependencies are visible; coterie is not."""
    return make_environment(tmp_path, wheels, see_packages=True)


def make_environment(tmp_path: Path, wheels: Path, *, see_packages: bool) -> Environment:
    venv, checkout, elsewhere = tmp_path / "venv", tmp_path / "checkout", tmp_path / "elsewhere"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    if see_packages:
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "outer.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    elsewhere.mkdir()
    checkout.mkdir()
    built = shutil.ignore_patterns("*.so", build.REPORT, "__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=built)
    for file in FILES:
        shutil.copy(ROOT / file, checkout)
    return Environment(venv / "bin" / "python", checkout, elsewhere, wheels)


needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")


@needs_compiler
def test_pip_install(environment: Environment) -> None:
    # with its dependencies: the declared ones are all met by the packages the tests run on
    lines = environment.pip_install("--force-reinstall", "--no-deps", ".")
    lines += environment.pip_install("coterie")
    assert lines == [
        "coterie: CUDA and FUSED ops skipped: COTERIE_SKIP_CUDA=1 (to build: env -u "
        "COTERIE_SKIP_CUDA python -m coterie.csrc.build); plain PyTorch is used instead"
    ]
    shutil.rmtree(environment.checkout)
    answer = environment.ask()
    assert answer["native"], answer["reason"]
    package = Path(answer["folder"])
    assert package.name == "coterie" and package.is_relative_to(environment.python.parents[1])
    for shipped in (
        "configs/quickstart.yaml",
        "configs/dynamics/odebench_2.yaml",
        "launch/report/page.html",
        "launch/report/heat.js",
    ):
        assert (package / shipped).exists(), shipped
    for path in (ROOT / "csrc").rglob("*"):  # all that a later build on this machine needs
        if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"):
            assert (package / path.relative_to(ROOT)).exists(), path
    assert not (package / "__init__.py").exists()
    assert not (package.parent / "coterie.py").exists()
    script = environment.python.parent / "coterie"
    assert "Usage" in run(script, "--help", cwd=environment.elsewhere)
    shown = run(script, "config", "show", "quickstart", cwd=environment.elsewhere)
    assert "model" in shown


@needs_compiler
def test_editable_install(environment: Environment) -> None:
    environment.pip_install("--ignore-installed", "--no-deps", "-e", ".")
    answer = environment.ask()
    assert answer["native"], answer["reason"]
    assert Path(answer["folder"]) == environment.checkout
    assert (environment.checkout / "csrc" / build.library_name("cpu")).exists()
    (environment.checkout / "moe" / "added_later.py").write_text("number = 17\n")
    see = "from coterie.moe.added_later import number; print(number)"
    assert run(environment.python, "-c", see, cwd=environment.elsewhere) == "17\n"
    assert "Usage" in run(
        environment.python.parent / "coterie", "--help", cwd=environment.elsewhere
    )


@needs_compiler
def test_checkout_root(environment: Environment) -> None:
    assert environment.ask(environment.checkout)["reason"] == "not built"
    built = run(environment.python, "-m", "coterie.csrc.build", cwd=environment.checkout)
    assert f"built {build.library_name('cpu')}" in built
    answer = environment.ask(environment.checkout)
    assert answer["native"], answer["reason"]
    assert Path(answer["folder"]) == environment.checkout
    main = (environment.python, "-m", "coterie.launch", "--help")
    assert "Usage" in run(*main, cwd=environment.checkout)


def test_without_a_compiler_then_with_one(environment: Environment, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    lines = environment.pip_install("--ignore-installed", "--no-deps", ".", path=str(bare))
    assert len(lines) == 1
    reason = "no C++ compiler (g++, c++ or clang++)"
    assert f"coterie: CPU ops skipped: {reason}" in lines[0]
    answer = environment.ask()
    assert not answer["native"] and answer["reason"] == reason
    if not HAS_COMPILER:
        return
    run(environment.python, "-m", "coterie.csrc.build", cwd=environment.elsewhere)
    assert environment.ask()["native"]


def test_without_torch_the_install_still_succeeds(tmp_path: Path, wheels: Path) -> None:
    environment = make_environment(tmp_path, wheels, see_packages=False)
    lines = environment.pip_install("--no-deps", ".")
    assert len(lines) == 1
    assert "ops skipped: torch is not installed yet (to build: pip install torch && " in lines[0]
