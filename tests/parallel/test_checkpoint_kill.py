"""No kill, full disk or second run costs a checkpoint that was complete."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.core.errors import UserError
from coterie.core.random import generator
from coterie.parallel.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    latest,
    list_checkpoints,
    load_tensors,
    read_state,
    verify,
)
from coterie.parallel.checkpoint_format import step_of
from coterie.parallel.part import Part
from tests.distributed import RankFailure, Ranks, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def wholes(tensors: dict[str, Tensor]) -> dict[str, Part]:
    return {name: Part.whole(tensor) for name, tensor in tensors.items()}


def tensors_of(step: int) -> dict[str, Tensor]:
    """What the checkpoint of ``step`` holds."""
    source = generator("kill test", step)
    return {
        "experts": torch.randn(4, 500, generator=source),
        "router": torch.randn(64, generator=source),
        "step": torch.tensor(step),
    }


def check(path: Path) -> int:
    """The checkpoint is undamaged, and holds what belongs to its step; returns the step."""
    verify(path)
    step = step_of(path)
    wanted = tensors_of(step)
    into = {name: torch.zeros_like(x) for name, x in wanted.items()}
    load_tensors(path, wholes(into))
    assert all(torch.equal(into[name], x) for name, x in wanted.items())
    assert read_state(path) == {"step": step}
    return step


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]


# -- killed ---------------------------------------------------------------------------------------


def _die_at_event(rank: int, folder: Path, step: int, deadly: int) -> int:
    """Save, and SIGKILL this process at its ``deadly``-th system call on the folder."""
    seen = 0
    watching = True

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if not watching or event not in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
            return
        seen += 1
        if seen == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda descriptor: (count("open", ()), fsync(descriptor))[1]  # type: ignore[assignment]
    with Checkpointer(folder, CheckpointConfig(keep=1, asynchronous=False)) as checkpointer:
        sys.addaudithook(count)
        checkpointer.save(step, wholes(tensors_of(step)), {"step": step})
    watching = False
    return seen


@pytest.mark.parametrize("step", [2, 1], ids=["the-next-step", "the-same-step-again"])
def test_killed_at_every_system_call_of_a_save(tmp_path: Path, step: int) -> None:
    with Checkpointer(tmp_path / "before", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, wholes(tensors_of(1)), {"step": 1})
    steps = []
    for deadly in range(1, 100):
        folder = tmp_path / f"killed_at_{deadly}"
        shutil.copytree(tmp_path / "before", folder)
        try:
            run_ranks(1, _die_at_event, folder, step, deadly)
            break
        except RankFailure as failure:
            assert "exit code -9" in str(failure)
        Checkpointer(folder, CheckpointConfig()).close()  # the next start
        assert hidden(folder) == []
        newest = latest(folder)
        assert newest is not None
        steps.append(check(newest))
        assert all(check(path) for path in list_checkpoints(folder))
    assert len(steps) > 15
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, step)


def _save_on_and_on(rank: int, folder: Path, pipe: Path) -> None:
    with Checkpointer(folder, CheckpointConfig(keep=2), dist.new_group()) as checkpointer:
        newest = latest(folder)
        step = 0 if newest is None else step_of(newest)
        started = os.open(pipe, os.O_WRONLY)
        while True:
            step += 1
            parts = wholes(tensors_of(step))
            box = parts["experts"].box.cut(0, range(2 * rank, 2 * rank + 2))
            parts["experts"] = Part(parts["experts"].tensor[box.slices], box)
            checkpointer.save(step, parts, {"step": step})
            if rank == 0:
                os.write(started, b".")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "checkpoints", tmp_path / "started"
    os.mkfifo(pipe)
    dice = random.Random(0)
    last, partials = 0, 0
    for _ in range(10):
        with (
            Ranks(2, _save_on_and_on, folder, pipe) as ranks,
            pipe.open("rb", buffering=0) as started,
        ):
            for _ in range(dice.randint(1, 5)):
                assert started.read(1), ranks.output(0) + ranks.output(1)
            time.sleep(dice.uniform(0, 0.02))  # where in the save the kill falls
            ranks.kill(dice.randint(0, 1))
        partials += bool(hidden(folder))
        if (newest := latest(folder)) is not None:
            assert check(newest) >= last
            last = step_of(newest)
    assert last > 5
    assert partials > 0  # some kills did fall into a save
    Checkpointer(folder, CheckpointConfig()).close()
    assert hidden(folder) == []
    assert check(folder / f"step_{last:08d}") == last


# -- two runs in one folder -----------------------------------------------------------------------


def test_a_live_runs_folder_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / ".step_00000007.abcd.partial"
    partial.mkdir()
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "f.write('process 42 on host7'); f.flush(); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=r"a run is still writing .* \(process 42 on host7\)"):
            Checkpointer(tmp_path, CheckpointConfig())
        assert partial.exists()
        other.kill()
    Checkpointer(tmp_path, CheckpointConfig()).close()
    assert not partial.exists()


def test_closing_gives_the_folder_back(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    attempt = [sys.executable, "-c", _TRY_LOCK, str(tmp_path / ".lock")]
    assert subprocess.run(attempt, check=False).returncode == 1
    checkpointer.close()
    checkpointer.close()
    assert subprocess.run(attempt, check=False).returncode == 0


_TRY_LOCK = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(1)
"""


def _open_and_report(rank: int, folder: Path) -> str:
    try:
        Checkpointer(folder, CheckpointConfig(), dist.new_group())
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_hear_that_the_folder_is_taken(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        first, second = run_ranks(2, _open_and_report, tmp_path)
    assert first == second
    assert "a run is still writing checkpoints" in first


# -- no space, no permission ----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    with Checkpointer(folder, CheckpointConfig(keep=2)) as checkpointer:
        checkpointer.save(1, wholes(tensors_of(1)), {"step": 1})
        checkpointer.save(2, wholes({"large": torch.zeros(2**19)}), {"step": 2})
        with pytest.raises(UserError) as error:
            checkpointer.save(3, wholes(tensors_of(3)), {"step": 3})
        assert "step 2 could not be written to" in str(error.value)
        assert "No space left on device" in str(error.value)
        assert f"the last complete one is {folder / 'step_00000001'}" in str(error.value)
        assert hidden(folder) == []  # the space is free again
        assert [check(path) for path in list_checkpoints(folder)] == [1]
        checkpointer.save(3, wholes(tensors_of(3)), {"step": 3})
    assert [check(path) for path in list_checkpoints(folder)] == [1, 3]


def test_disk_full_for_the_state_or_the_manifest_only(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    with Checkpointer(folder, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(1, wholes(tensors_of(1)), {"step": 1})
        with pytest.raises(UserError, match="No space left on device"):
            checkpointer.save(2, wholes(tensors_of(2)), {"text": "x" * 2**20})
        many = {
            f"a name that fills the manifest and the file {i}": torch.zeros(1) for i in range(3000)
        }
        with pytest.raises(UserError, match="No space left on device"):
            checkpointer.save(3, wholes(many), {"step": 3})
    assert [check(path) for path in list_checkpoints(folder)] == [1]


def _fill_from_rank_1(rank: int, folder: Path) -> list[str]:
    """Rank 1's shard is too large for the disk; rank 0 has none, since on the disk that rank 1
    filled it would fail as well."""
    messages = []
    with Checkpointer(folder, CheckpointConfig(), dist.new_group()) as checkpointer:
        checkpointer.save(1, wholes(tensors_of(1)), {"step": 1})
        mine = {"large": torch.zeros(2**19)} if rank == 1 else {}
        checkpointer.save(2, wholes(mine), {})
        try:
            checkpointer.wait()
        except UserError as error:
            messages.append(str(error))
        checkpointer.save(3, wholes(tensors_of(3)), {"step": 3})
    return messages


def test_disk_full_for_one_rank_of_two(small_disk: Path) -> None:
    first, second = run_ranks(2, _fill_from_rank_1, small_disk)
    assert first == second
    assert "(rank 1: No space left on device)" in first[0]
    assert [check(path) for path in list_checkpoints(small_disk)] == [1, 3]


def test_read_only_disk(small_disk: Path) -> None:
    with Checkpointer(small_disk, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(1, wholes(tensors_of(1)), {"step": 1})
        remount = ["mount", "-o", "remount,ro,size=1M", str(small_disk)]
        checkpointer.close()
        subprocess.run(remount, check=True)
        with pytest.raises(UserError, match=r"could not be written to .*Read-only file system"):
            checkpointer.save(2, wholes(tensors_of(2)), {"step": 2})
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*: Read-only file system"):
        Checkpointer(small_disk, CheckpointConfig())
    assert [check(path) for path in list_checkpoints(small_disk)] == [1]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*: File exists"):
        Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
