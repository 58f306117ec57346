"""The training loop: exact resume, other layouts, signals, and what is due when."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from coterie.core.errors import UserError
from coterie.launch import training
from coterie.launch.config import RunConfig
from coterie.parallel.checkpoint import latest, list_checkpoints, read_state
from coterie.parallel.checkpoint_format import step_of
from coterie.parallel.distributed import Ranks
from coterie.parallel.finite import NonFiniteError
from coterie.parallel.monitors import Monitor
from coterie.parallel.run_state import model_parts
from coterie.parallel.step import StepReport
from coterie.parallel.trainer import Trainer
from tests.distributed import Ranks as Processes
from tests.distributed import run_ranks
from tests.parallel.tiny import (
    ALONE,
    Recorder,
    bits_differ,
    checkpointer_of,
    decoder_of,
    join,
    relative_error,
    state_of,
    tiny_config,
    trainer_of,
    write_data,
)

STEPS, HALF = 12, 6


def config_of(data: Path, precision: str = "fp32", **train: Any) -> RunConfig:
    settings = {"steps": STEPS, "global_batch": 8, "accumulation": 2, "seed": 3, **train}
    return tiny_config(
        data,
        train={"precision": precision, **settings},
        optimizer={"lr": 1e-2, "warmup": 2},
        checkpoint={"every": HALF},
        evaluation={"batch": 4, "every": 4},
    )


@contextmanager
def started(
    config: RunConfig, ranks: Ranks, folder: Path, *others: Monitor
) -> Iterator[tuple[Trainer, Recorder]]:
    recorder = Recorder()
    with checkpointer_of(config, folder, ranks) as checkpointer:
        yield trainer_of(config, ranks, checkpointer, [recorder, *others]), recorder


def straight(config: RunConfig, ranks: Ranks, folder: Path) -> tuple[Recorder, dict[str, Tensor]]:
    with started(config, ranks, folder) as (trainer, recorder):
        assert trainer.run(folder).finished
        return recorder, state_of(trainer)


def resumed(
    config: RunConfig, ranks: Ranks, folder: Path, run: Path
) -> tuple[Recorder, dict[str, Tensor]]:
    """From the middle checkpoint of ``run`` to the end, in ``folder``."""
    with started(config, ranks, folder) as (trainer, recorder):
        trainer.restore(run / "checkpoints" / f"step_{HALF:08d}")
        assert trainer.step == trainer.sampler.consumed == HALF
        assert trainer.run(folder).finished
        return recorder, state_of(trainer)


def differences(config: RunConfig, ranks: Ranks, folder: Path) -> list[str]:
    """What differs in a single bit between a run and its second half run again."""
    whole, end = straight(config, ranks, folder / "straight")
    again, end_again = resumed(config, ranks, folder / "resumed", folder / "straight")
    assert [r["step"] for r in whole.reports] == list(range(1, STEPS + 1))
    assert whole.reports[0]["loss"] > whole.reports[-1]["loss"]
    found = bits_differ(end_again, end)
    if again.reports != whole.reports[HALF:]:
        found.append("reports")
    if again.evaluations != [(s, m) for s, m in whole.evaluations if s > HALF]:
        found.append("evaluations")
    return found


def test_resume_is_exact_alone(data: Path, tmp_path: Path) -> None:
    assert differences(config_of(data), ALONE, tmp_path) == []


def test_the_comparison_can_fail(data: Path, tmp_path: Path) -> None:
    """Forgotten moments, and a forgotten sampler, are seen."""
    right = Trainer.restore

    def without_moments(self: Trainer, checkpoint: Path) -> None:
        right(self, checkpoint)
        for state in self.optimizer.adamw.state.values():
            state["exp_avg_sq"].zero_()

    def without_place(self: Trainer, checkpoint: Path) -> None:
        right(self, checkpoint)
        self.sampler.seed += 1

    for number, wrong in enumerate((without_moments, without_place)):
        with patch.object(Trainer, "restore", wrong):
            found = differences(config_of(data), ALONE, tmp_path / str(number))
        assert "reports" in found and len(found) > 40


def two_ranks(rank: int, data: Path, folder: Path) -> tuple[list[str], list[Any]]:
    ranks = join(2, 2)
    found = differences(config_of(data), ranks, folder / "exact")
    # for another layout, in double
    recorder, end = straight(config_of(data, "fp64"), ranks, folder / "double")
    torch.save(end, folder / f"end{rank}.pt")
    return found, recorder.reports


def test_resume_is_exact_on_two_ranks_and_on_another_layout(data: Path, tmp_path: Path) -> None:
    (found, reports), (also_found, reports_too) = run_ranks(2, two_ranks, data, tmp_path)
    assert found == also_found == []
    assert reports == reports_too

    config = config_of(data, "fp64")
    recorder, end = resumed(config, ALONE, tmp_path / "alone", tmp_path / "double")
    shards = [torch.load(tmp_path / f"end{rank}.pt") for rank in (0, 1)]
    for name, tensor in end.items():
        parts = [shard[name] for shard in shards]
        expert = ".experts." in name and tensor.dim() >= 3
        there = torch.cat(parts) if expert else parts[0]
        assert relative_error(tensor, there) < 1e-12, name
    for ours, theirs in zip(recorder.reports, reports[HALF:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
        assert ours["load"] == theirs["load"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "the sampler's seed was 3 and is now 4; set it back"),
        ({"global_batch": 4}, "the global batch was 8 and is now 4; set it back"),
        ({}, "the dataset's fingerprint was .* the dataset was changed"),
    ],
    ids=["seed", "global batch", "dataset"],
)
def test_what_may_not_change(
    changed: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with started(config_of(data, steps=HALF), ALONE, tmp_path / "run") as (trainer, _):
        trainer.run(tmp_path / "run")
    other = data if changed else write_data(tmp_path / "data", seed=1)
    with (
        started(config_of(other, **changed), ALONE, tmp_path / "again") as (trainer, _),
        pytest.raises(UserError, match=message),
    ):
        trainer.restore(tmp_path / "run" / "checkpoints" / f"step_{HALF:08d}")


# --- what is due when ---------------------------------------------------------------------------


class _Images(Monitor):
    def __init__(self) -> None:
        self.seen: list[tuple[int, list[str]]] = []
        self.started: list[tuple[Path, int, int, int]] = []
        self.closed = 0

    def start(self, facts: Any) -> None:
        self.started.append((facts.folder, facts.steps, facts.first_step, facts.image_levels))

    def images(self, step: int, images: dict[str, Any]) -> None:
        self.seen.append((step, list(images)))

    def close(self) -> None:
        self.closed += 1


def test_evaluations_images_and_checkpoints_come_when_due(data: Path, tmp_path: Path) -> None:
    images = _Images()
    with started(config_of(data, steps=10), ALONE, tmp_path, images) as (trainer, recorder):
        trainer.draw_images = lambda model: {"a": np.zeros((2, 2), dtype=np.int64)}
        outcome = trainer.run(tmp_path)
        found = list_checkpoints(tmp_path / "checkpoints")
    assert [step for step, _ in recorder.evaluations] == [4, 8, 10]
    assert images.seen == [(4, ["a"]), (8, ["a"]), (10, ["a"])]
    assert images.started == [(tmp_path, 10, 0, 3)] and images.closed == 1
    assert [step_of(path) for path in found] == [6, 10]
    assert (outcome.step, outcome.finished) == (10, True)
    assert outcome.metrics == recorder.evaluations[-1][1]
    assert outcome.metrics.keys() == {"loss", "loss/text", "loss/image"}
    state = read_state(found[0])
    assert state["step"] == state["sampler"]["consumed"] == 6
    assert state["config"]["train"]["steps"] == 10
    rates = [report["lr"] for report in recorder.reports]
    assert rates[0] == pytest.approx(0.005) and rates[1] == 0.01 and rates[-1] < 0.002


def test_every_zero_is_after_the_last_step_only(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    with started(config, ALONE, tmp_path) as (trainer, recorder):
        trainer.run(tmp_path)
        found = list_checkpoints(tmp_path / "checkpoints")
    assert [step for step, _ in recorder.evaluations] == [3]
    assert [step_of(path) for path in found] == [3]


def test_monitors_are_closed_when_a_step_fails(data: Path, tmp_path: Path) -> None:
    images = _Images()
    with started(config_of(data), ALONE, tmp_path, images) as (trainer, _):
        head: Any = decoder_of(trainer.model).head
        head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.run(tmp_path)
    assert images.closed == 1


@pytest.mark.parametrize("event", ["step", "evaluation"])
def test_a_report_that_cannot_be_written_is_a_sentence(
    event: str, data: Path, tmp_path: Path
) -> None:
    full = _Images()

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(full, event, write)
    with (
        started(config_of(data), ALONE, tmp_path, full) as (trainer, _),
        pytest.raises(UserError, match=rf"reported in {tmp_path}: No space left on device$"),
    ):
        trainer.run(tmp_path)
    assert full.closed == 1


class _Failing(Recorder):
    """Hears of the failure; the weights are spoilt after its step."""

    def __init__(self, spoil: Callable[[], None]) -> None:
        super().__init__()
        self.spoil = spoil
        self.failures: list[tuple[int, str]] = []

    def step(self, report: StepReport) -> None:
        super().step(report)
        if report.step == 2:
            self.spoil()

    def failure(self, step: int, reason: str) -> None:
        self.failures.append((step, reason))
        raise OSError(28, "No space left on device")  # must not hide the failure


def test_monitors_hear_of_the_step_that_failed(data: Path, tmp_path: Path) -> None:
    heard = _Failing(
        lambda: model_parts(trainer.model)["model.head.weight"].tensor.fill_(torch.nan)
    )
    with (
        started(config_of(data), ALONE, tmp_path, heard) as (trainer, _),
        pytest.raises(NonFiniteError) as raised,
    ):
        trainer.run(tmp_path)
    assert heard.failures == [(3, str(raised.value))]
    assert "step 3: the loss is nan" in str(raised.value)


# --- signals ------------------------------------------------------------------------------------


class _At(Monitor):
    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.at, self.act = step, act

    def step(self, report: StepReport) -> None:
        if report.step == self.at:
            self.act()


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    before = handlers()
    at_two = _At(2, lambda: signal.raise_signal(number))
    with started(config_of(data), ALONE, tmp_path, at_two) as (trainer, recorder):
        outcome = trainer.run(tmp_path)
        saved = latest(tmp_path / "checkpoints")
    assert (outcome.step, outcome.finished) == (3, False)
    assert len(recorder.reports) == 3
    assert saved is not None and step_of(saved) == 3
    assert handlers() == before


def test_a_second_signal_acts_at_once(data: Path, tmp_path: Path) -> None:
    before = handlers()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with (
        started(config_of(data), ALONE, tmp_path, _At(2, twice)) as (trainer, recorder),
        pytest.raises(KeyboardInterrupt),
    ):
        trainer.run(tmp_path)
    assert len(recorder.reports) == 2 and trainer.step == 2
    assert handlers() == before


class _Progress(Monitor):
    """Tells the test which step is done."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def step(self, report: StepReport) -> None:
        self.file.write_text(str(report.step))


def until_told(rank: int, data: Path, folder: Path) -> tuple[int, bool, int]:
    progress = _Progress(folder / f"progress{rank}")
    config = config_of(data, steps=100_000)
    with started(config, join(2, 2), folder, progress) as (trainer, recorder):
        outcome = trainer.run(folder)
    assert recorder.reports[-1]["stop"]
    return outcome.step, outcome.finished, len(recorder.reports)


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)], ids=["SIGTERM 1", "SIGINT 0"]
)
def test_a_signal_to_one_rank_ends_all_after_the_same_step(
    number: int, rank: int, data: Path, tmp_path: Path
) -> None:
    with Processes(2, until_told, data, tmp_path) as processes:
        progress = tmp_path / f"progress{rank}"
        while not progress.exists():
            assert all(process.is_alive() for process in processes.processes)
            time.sleep(0.02)
        os.kill(processes.processes[rank].pid, number)
        first, second = processes.results()
    step, finished, reports = first
    assert first == second
    assert not finished and reports == step >= 1
    saved = latest(tmp_path / "checkpoints")
    assert saved is not None and step_of(saved) == step


# --- as the command runs it ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "slowdown", "warned"),
    [("bf16", 300.0, True), ("bf16", 1.1, False), ("fp32", 300.0, False), ("auto", 300.0, False)],
)
def test_slow_bf16_is_told(
    precision: str,
    slowdown: float,
    warned: bool,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training, "bf16_slowdown", lambda: slowdown)
    outcome = training.train(config_of(data, precision, steps=2), tmp_path / "run")
    assert outcome.finished and outcome.metrics["loss"] == pytest.approx(5.6, abs=0.5)
    told = capsys.readouterr().err
    line = (
        "warning: train.precision is bf16, whose matrix products are 300 times slower than fp32 "
        "on this CPU; `train.precision=auto` runs in fp32 here\n"
    )
    assert (line in told) == warned
    assert ("warning" in told) == warned
    used = {"auto": "fp32"}.get(precision, precision)
    assert f"1 process on cpu in {used}\n" in told


def test_train_then_resume_with_more_steps(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training.train(config_of(data, steps=3), run)
    outcome = training.resume(config_of(data, steps=5), run, None)
    assert (outcome.step, outcome.finished) == (5, True)
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [3, 5]
    with pytest.raises(UserError, match="no checkpoint of step 4; there are: 3, 5"):
        training.resume(config_of(data, steps=6), run, 4)
