"""One command for a GPU machine: build, tests, sanitizers and benchmarks, inside nine minutes.

    python benchmarks/gpu/run.py [--minutes 9] [--results benchmarks/results] [--steps NAME ...]
    python benchmarks/gpu/run.py prepare      gather .gpu, for a machine without a network
    python benchmarks/gpu/run.py --device cpu --results DIR       try the command without a GPU

``make gpu`` is the first of them. The Python has a torch with CUDA; what else it lacks comes from
``.gpu``. gpu.json and gpu.md are written after each step, and to $OUT too where that is set: what
has been measured is kept whatever happens then. docs/gpu.md says what the figures mean.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder: its modules are no top-level ones

from benchmarks.gpu import carried, report  # noqa: E402
from benchmarks.gpu.steps import Clock, Cut, Outcome, Step, run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LEAST = 15.0
"""Seconds for which it is worth starting a step."""


def steps(device: str, work: Path) -> list[Step]:
    """In the order in which they matter; limits in seconds, together more than there is."""

    def module(name: str) -> list[str]:
        command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--device", device]
        return [*command, "--json", str(work / f"{name}.json")]

    def benchmark(name: str, limit: float) -> Step:
        return Step(name, module(name), limit, work / f"{name}.json")

    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"] if device == "cuda" else []

    def watched(tool: str, limit: float) -> Step:
        watch = [*sanitizer, "--tool", tool] if sanitizer else []
        return Step(tool, [*watch, *module("small")], limit)

    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    chosen = ["-k", "not time_out and not symmetric"] if device == "cpu" else []
    return [
        Step("build", [sys.executable, "-m", "benchmarks.gpu.built", "--device", device], 240),
        benchmark("machine", 40),
        Step("tests", [*pytest, "-rs", "tests/gpu", *chosen], 150),
        benchmark("products", 80),
        benchmark("link", 150),
        benchmark("layer", 110),
        watched("memcheck", 90),
        watched("racecheck", 90),
    ]


def environment(device: str) -> dict[str, str]:
    """Of all steps."""
    paths = [str(ROOT), str(ROOT / carried.FOLDER / "site"), os.environ.get("PYTHONPATH", "")]
    given = {**os.environ, "PYTHONPATH": ":".join(path for path in paths if path)}
    given |= {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if device == "cpu":
        given["COTERIE_GPU_TESTS"] = "cpu"
    return given


class Report:
    """gpu.json and gpu.md, written anew after each step."""

    def __init__(self, results: Path, device: str, planned: list[Step]) -> None:
        self.results, self.planned = results, planned
        self.found: dict[str, Any] = {"device": device, "steps": [], "figures": {}}
        results.mkdir(parents=True, exist_ok=True)

    def add(self, outcome: Outcome) -> None:
        self.found["steps"].append(asdict(outcome))
        print(f"== {outcome.name}: {outcome.status} ({outcome.seconds:.0f} s)", flush=True)
        if outcome.status != "done":
            print(outcome.told, flush=True)
        self.write()

    def write(self) -> None:
        """With the figures of all steps so far, one that was cut off included."""
        for step in self.planned:
            if step.figures and step.figures.exists():
                self.found["figures"][step.name] = json.loads(step.figures.read_text())
        pages = {
            "gpu.json": json.dumps(self.found, indent=1) + "\n",
            "gpu.md": report.page(self.found),
        }
        out = os.environ.get("OUT")
        for folder in (self.results, *([Path(out)] if out else [])):
            for name, text in pages.items():
                partial = folder / f".{name}"
                partial.write_text(text)
                partial.replace(folder / name)


def measure(device: str, minutes: float, results: Path, planned: list[Step]) -> int:
    """All steps; 0 when all of them are done."""
    clock = Clock(60 * minutes)
    told = Report(results, device, planned)
    left = list(planned)
    before = signal.signal(signal.SIGTERM, _cut)
    try:
        for line in carried.unpack() if device == "cuda" else []:
            print(f"== {line}", flush=True)
        while left:
            outcome = run(left[0], clock, ROOT, environment(device), LEAST)
            left.pop(0)
            told.add(outcome)
    except (Cut, KeyboardInterrupt):
        for step in left:
            status = "cut off" if step is left[0] else "not run"
            told.add(Outcome(step.name, status, told="the run was ended"))
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"== {results / 'gpu.md'}", flush=True)
    return int(any(step["status"] != "done" for step in told.found["steps"]))


def _sees_a_gpu() -> bool:
    """Asked in a process of its own, which leaves nothing on the device."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask], stderr=subprocess.DEVNULL).returncode == 0


def _cut(number: int, frame: FrameType | None) -> None:
    raise Cut(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("measure", "prepare"), default="measure")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--results", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these alone")
    given = parser.parse_args()
    if given.what == "prepare":
        carried.prepare()
        return 0
    if given.results is None:
        if given.device == "cpu":
            parser.error("--device cpu measures nothing: name a folder with --results")
        if not _sees_a_gpu():
            parser.error(
                f"{sys.executable} has no torch that sees a GPU; --device cpu tries the programs"
            )
        given.results = RESULTS
    with tempfile.TemporaryDirectory() as name:
        planned = steps(given.device, Path(name))
        known = [step.name for step in planned]
        if unknown := sorted(set(given.steps or ()) - set(known)):
            parser.error(f"no step {', '.join(unknown)}; there are {', '.join(known)}")
        planned = [step for step in planned if step.name in (given.steps or known)]
        return measure(given.device, given.minutes, given.results, planned)


if __name__ == "__main__":
    sys.exit(main())
