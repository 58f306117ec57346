"""Kill a run again and again, resume it, and compare it with the run that was never killed.

    python tests/launch/kill_resume.py --kills 20

Each kill takes a random process (the parent or a rank) at a random step, every other one while a
checkpoint is being written. The losses and gradient norms of every step, and the files of the last
checkpoint, must be those of the run that was never killed, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds that one start may take
SETTINGS = [
    "data.sequence=64",
    "data.documents=200",
    "model.width=64",
    "train.global_batch=4",
    "evaluation.sequences=32",
    "evaluation.every=0",
    "evaluation.prompts=[]",
    "checkpoint.every=4",
    "monitor.every=1",
]


@dataclass(frozen=True)
class Kill:
    """One kill: which process, and when."""

    victim: str
    step: int
    saving: bool

    def __str__(self) -> str:
        when = "while saving, " if self.saving else ""
        return f"{self.victim}, {when}after step {self.step}"


def command(*arguments: str) -> list[str]:
    """The command line of coterie in a process of its own."""
    return [sys.executable, "-m", "coterie.launch", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train_command(run: Path, steps: int) -> list[str]:
    settings = [*SETTINGS, f"train.steps={steps}", "optimizer.warmup=5"]
    return command("train", "quickstart", *settings, "--run-dir", str(run), "--nproc", "2")


def records(run: Path) -> list[dict[str, float]]:
    """The step lines of metrics.jsonl; a line that is being written is left out."""
    file = run / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in record:
            found.append(record)
    return found


def last_step(run: Path) -> int:
    return max((int(record["step"]) for record in records(run)), default=0)


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.partial"))


def victim_of(parent: psutil.Process, draw: random.Random) -> tuple[str, psutil.Process]:
    """The parent or one of its ranks."""
    ranks = {}
    for child in parent.children():
        ranks[f"rank {child.environ().get('RANK', '?')}"] = child
    name = draw.choice(["the parent", *sorted(ranks)])
    return name, ranks.get(name, parent)


def start_and_kill(
    line: list[str], run: Path, step: int, saving: bool, draw: random.Random
) -> Kill:
    """Start ``line``, and kill one of its processes once ``step`` is logged."""
    parent = subprocess.Popen(
        line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + LIMIT
    while last_step(run) < step or (saving and not is_saving(run)):
        if parent.poll() is not None:
            output = parent.stderr.read() if parent.stderr else ""
            raise AssertionError(f"ended before step {step} with {parent.returncode}: {output}")
        if time.monotonic() > end:
            parent.kill()
            raise AssertionError(f"step {step} was not reached within {LIMIT:.0f} s")
        time.sleep(0.002)  # polls; what is awaited is in the files
    time.sleep(draw.uniform(0, 0.05))  # anywhere inside a step or a save
    family = psutil.Process(parent.pid)
    everyone = [family, *family.children(recursive=True)]
    name, victim = victim_of(family, draw)
    victim.send_signal(signal.SIGKILL)
    parent.communicate(timeout=LIMIT)
    _, alive = psutil.wait_procs(everyone, timeout=30)
    assert not alive, f"{name} was killed, and {alive} live on"
    return Kill(name, step, saving)


def finish(line: list[str]) -> None:
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr


def kill_and_compare(folder: Path, kills: int, steps: int, seed: int) -> list[Kill]:
    """Run twice, once with ``kills`` kills; AssertionError when the runs differ in a bit."""
    draw = random.Random(seed)
    calm, killed = folder / "calm", folder / "killed"
    finish(train_command(calm, steps))

    moments = sorted(draw.randrange(1, steps - 6) for _ in range(kills))
    done = []
    for number, step in enumerate(moments):
        started = (killed / "config.yaml").exists()
        line = command("resume", str(killed)) if started else train_command(killed, steps)
        done.append(start_and_kill(line, killed, step, saving=number % 2 == 1, draw=draw))
        print(f"kill {number + 1} of {kills}: {done[-1]}", flush=True)
    finish(command("resume", str(killed)))

    expected, seen = records(calm), records(killed)
    names = ("step", "loss", "grad_norm", "router/balance", "router/z", "lr", "load")
    for one, other in zip(expected, seen, strict=True):
        for name in names:
            assert one[name] == other[name], f"step {one['step']}: {name} differs"
    assert _files(calm, steps) == _files(killed, steps), "the last checkpoints differ"
    return done


def _files(run: Path, steps: int) -> dict[str, str]:
    """Checksums of the tensor files of the last checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step_{steps:08d}" / "manifest.json").read_text())
    files = manifest["manifest"]["files"]
    return {name: f["sha256"] for name, f in files.items() if name.endswith(".safetensors")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        kill_and_compare(Path(scratch), options.kills, options.steps, options.seed)
        print(
            f"{options.kills} kills, {options.steps} steps, {time.monotonic() - began:.0f} s: "
            "every loss, gradient norm and expert load, and the last checkpoint, are bit-identical"
        )
