"""Training runs of a reproduction: several at once, each in a process of its own, resumable."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def parse(description: str) -> argparse.Namespace:
    """``seeds`` and ``at_once``, from the command line."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, a core each")
    return parser.parse_args()


def publish(name: str, record: dict[str, Any], page: str) -> None:
    """Write and print what a reproduction found."""
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page)
    print(page)


def coterie(*arguments: str) -> str:
    """What the command prints; it has one thread, so that as many runs fit as there are cores.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "coterie.launch", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"coterie {' '.join(arguments)}\n{done.stdout[-500:]}{done.stderr}")
    return done.stdout


def train(config: Path, folder: Path, overrides: Sequence[str], *options: str) -> None:
    """Train ``config`` into ``folder``, or go on where it was interrupted."""
    if (folder / "config.yaml").exists():
        coterie("resume", str(folder), *overrides)
    else:
        coterie("train", str(config), *overrides, "--run-dir", str(folder), *options)


def spread(values: Sequence[float]) -> str:
    """Mean (range)."""
    return f"{statistics.mean(values):.4f} ({max(values) - min(values):.4f})"


def each(what: str, jobs: dict[str, Callable[[], Any]], at_once: int) -> dict[str, Any]:
    """The results of ``jobs`` by name, ``at_once`` at a time, with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress, ThreadPoolExecutor(at_once) as pool:
        bar = progress.add_task(what, total=len(jobs))

        def run(job: Callable[[], Any]) -> Any:
            result = job()
            progress.advance(bar)
            return result

        return dict(zip(jobs, pool.map(run, jobs.values()), strict=True))


def stored(path: Path, make: Callable[[], Any]) -> Any:
    """What the JSON file ``path`` holds; made and written first if there is none."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made))
    return json.loads(path.read_text())
