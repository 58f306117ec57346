"""Joining the processes that torchrun or SLURM started."""

import os
from pathlib import Path

import pytest

from coterie.core.errors import UserError
from coterie.launch.membership import Membership, join, slurm_port

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP = {
    "SLURM_STEP_ID": "3",
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n7",
}


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """``join`` sets torchrun's variables: they go again after each test."""
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_alone() -> None:
    assert join({}) is None


def test_torchrun() -> None:
    assert join({"RANK": "1", "WORLD_SIZE": "4"}) == Membership("torchrun", 1, 4)


def test_our_own_ranks() -> None:
    found = join({"RANK": "0", "WORLD_SIZE": "2", "COTERIE_PARENT": "1"})
    assert found == Membership("coterie", 0, 2)


def test_slurm_step() -> None:
    assert join(STEP) == Membership("SLURM", 5, 8)
    assert [os.environ[name] for name in TORCHRUN[:4]] == ["5", "8", "1", "n7"]
    assert os.environ["MASTER_PORT"] == str(slurm_port(STEP))


@pytest.mark.parametrize(
    ("facts", "per_node"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "4"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_DISTRIBUTION": "block:cyclic"}, "8"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_DISTRIBUTION": "cyclic"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,5"}, None),
        ({}, None),
    ],
)
def test_tasks_of_each_node(
    facts: dict[str, str], per_node: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    join({**STEP, **facts})
    assert os.environ.pop("LOCAL_WORLD_SIZE", None) == per_node


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_ID": "4294967290"},  # an interactive shell of salloc
        {"SLURM_STEP_ID": "4294967291"},  # the script of sbatch
    ],
)
def test_one_task_or_no_step_starts_processes_of_its_own(change: dict[str, str]) -> None:
    assert join({**STEP, **change}) is None


def test_many_hosts_are_expanded_by_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames n[07-09]" ] && printf "n07\\nn08\\n"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    join({**STEP, "SLURM_STEP_NODELIST": "n[07-09]"})
    assert os.environ["MASTER_ADDR"] == "n07"
    with pytest.raises(UserError, match=r"scontrol show hostnames x\[1\].* failed.*MASTER_ADDR"):
        join({**STEP, "SLURM_STEP_NODELIST": "x[1]"})


def test_without_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"scontrol.*not on PATH.*n\[1-2\]"):
        join({**STEP, "SLURM_STEP_NODELIST": "n[1-2]"})


def test_ports_differ_by_job_and_step_and_stay_below_ephemeral_ones() -> None:
    ports = {
        slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(1000, 1100)
        for step in range(5)
    }
    assert len(ports) == 500
    largest = slurm_port({"SLURM_JOB_ID": "67043327", "SLURM_STEP_ID": "14999"})
    assert all(15000 <= port < 32768 for port in (*ports, largest))
