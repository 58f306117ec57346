"""Install the top-level folders as the sub-packages of ``coterie``, and compile the native ops.

The folder ``moe/`` becomes ``coterie.moe``, and so on; a new sub-package needs no entry here, only
its ``__init__.py``. The YAML files of ``configs/`` are installed beside them, in
``coterie/configs``. Metadata and dependencies are in pyproject.toml; how the native code is
compiled, in csrc/build.py.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FOLDERS = ("core", "csrc", "comm", "moe", "models", "data", "parallel", "launch")
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402  (the package coterie.csrc imports torch, which an isolated build lacks)


def packages() -> list[str]:
    """Every package below the top-level folders, found by its ``__init__.py``."""
    found = []
    for folder in FOLDERS:
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            found.append(".".join(("coterie", *init.parent.relative_to(ROOT).parts)))
    return found


class BuildNative(build_ext):
    """Compile what can be compiled; the install goes on without the rest."""

    def run(self) -> None:
        """Build into the wheel, or beside the sources for an editable install."""
        build.build(ROOT / "csrc", self._target())

    def get_outputs(self) -> list[str]:
        """The files that a wheel must hold; an editable install finds them in the checkout."""
        names = [build.REPORT, *map(build.library_name, build.LIBRARIES)]
        return [str(path) for name in names if (path := self._target() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is built in one place to be linked from another."""
        return {}

    def _target(self) -> Path:
        if self.inplace or self.editable_mode:
            return ROOT / "csrc"
        return Path(self.build_lib, "coterie", "csrc")


setup(
    packages=[*packages(), "coterie.configs"],
    package_dir={f"coterie.{folder}": folder for folder in (*FOLDERS, "configs")},
    package_data={
        "coterie.csrc": [*build.SOURCES.values(), *build.HEADERS["fused"]],
        "coterie.configs": ["**/*.yaml"],
        "coterie.launch.report": ["page.*", "*.js"],
    },
    include_package_data=False,
    # Names the libraries so that the wheel is marked for this platform; BuildNative makes them.
    ext_modules=[Extension("coterie.csrc._cpu", [], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
