"""The native libraries: those that were carried, where they are of these sources and load here;
else compiled.

    python -m benchmarks.gpu.built [--device cpu]
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import device

_LOADS = """
from coterie.csrc import loader
reasons = {name: loader._load()[name][0] for name in ("cpu", "cuda", "fused")}
print(reasons)
raise SystemExit(any(reasons.values()))
"""


def loads() -> bool:
    """Whether a new process can load all three."""
    return subprocess.run([sys.executable, "-c", _LOADS]).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    if parser.parse_args().device == "cpu":
        device.use("cpu")
        print("kernels are there, compiled for the host")
        return 0
    if loads():
        print("libraries of these sources are there")
        return 0
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    # a library that does not load here must not be kept
    for path in (*csrc.glob("_*.abi3.so"), csrc / "build.json"):
        path.unlink(missing_ok=True)
    subprocess.run([sys.executable, str(csrc / "build.py")], check=True)
    return 0 if loads() else 1


if __name__ == "__main__":
    sys.exit(main())
