"""A run on a full disk ends in a sentence, keeps what was complete, and goes on with more room."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coterie.parallel.checkpoint import list_checkpoints, verify
from tests.launch.kill_resume import command, environment


def coterie(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=120
    )


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of ``size``; yields a function that gives it another size."""
    at.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(at)])
    if made.returncode:
        pytest.skip("mounting a size-limited file system needs root")
    try:
        yield (
            lambda new: (
                subprocess.run(["mount", "-o", f"remount,size={new}", str(at)], check=True) and None
            )
        )
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(place: Path, processes: int) -> None:
    run = place / "disk" / "run"
    many = ["train.steps=30", "checkpoint.every=1", "checkpoint.keep=100", "monitor.every=1"]
    train = ["train", "good.yaml", *many, "--run-dir", str(run), "--nproc", str(processes)]
    with small_disk(place / "disk", "2m") as resize:
        full = coterie(*train)
        assert full.returncode == 2, full.stderr
        sentences = [line for line in full.stderr.splitlines() if "No space left" in line]
        assert len(sentences) == 1 and "Traceback" not in full.stderr, full.stderr
        kept = list_checkpoints(run / "checkpoints")
        assert kept, "no checkpoint fitted: the disk of this test is too small"
        for checkpoint in kept:
            verify(checkpoint)

        resize("64m")
        again = coterie("resume", str(run))
        assert again.returncode == 0, again.stderr
        assert list_checkpoints(run / "checkpoints")[-1].name == "step_00000030"
