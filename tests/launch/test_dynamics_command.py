"""``coterie dynamics``: runs that end, are interrupted, go on; and mistakes told in a sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.core.errors import UserError
from coterie.launch.dynamics_config import DynamicsRunConfig, load_dynamics_config
from coterie.launch.dynamics_training import DynamicsRun
from coterie.launch.main import main
from coterie.launch.run_folder import check_fresh

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds that one start may take
SMALL = """\
name: small
data: {dataset: odebench_2, times: 3, test_trajectories: 2}
model: {experts: 2, context: 4, hidden: 4, layers: 1, method: rk4}
train: {rounds: 4, context_steps: 3, model_steps: 3, lr: 0.01}
precision: fp64
every: {evaluate: 2, save: 2}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with small.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    return tmp_path


def dynamics(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "coterie.launch", "dynamics", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def records(run: str, key: str = "loss") -> list[dict[str, Any]]:
    file = Path(run) / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for line in lines if key in (record := json.loads(line))]


def losses(run: str) -> list[float]:
    return [record["loss"] for record in records(run)]


def checksums(run: str, round_: int) -> dict[str, str]:
    """Of the tensor files of a checkpoint."""
    path = Path(run) / "checkpoints" / f"step_{round_:08d}" / "manifest.json"
    files = json.loads(path.read_text())["manifest"]["files"]
    return {name: f["sha256"] for name, f in files.items() if name.endswith(".safetensors")}


def test_a_run_reports_evaluates_and_adapts(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dynamics", "train", "small.yaml"]) == 0
    told = capsys.readouterr().err
    assert "2 families, 10 environments of 4 trajectories; 2 experts" in told
    assert "round 4/4  loss" in told and "round 2: held-out relative MSE" in told
    found = records("runs/small")
    assert [record["round"] for record in found] == [1, 2, 3, 4]
    for record in found:  # an update after steps 5, 10, 15 and 20
        assert record["gate_updates"] + sum(record["gate_failures"].values()) == 1
        assert 0.5 <= record["routing_accuracy"] <= 1 and record["experts_in_use"] in (1, 2)
    held_out = records("runs/small", "held_out/mean")
    assert [record["round"] for record in held_out] == [2, 4]

    assert main(["dynamics", "evaluate", "runs/small", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["round"] == 4 and len(shown["environments"]) == 10
    assert shown["mean"]["relative_mse"]["mean"] == pytest.approx(held_out[-1]["held_out/mean"])
    assert shown["routing_accuracy"] == found[-1]["routing_accuracy"]
    each = [row["relative_mse"] for row in shown["environments"]]
    assert shown["mean"]["relative_mse"]["mean"] == pytest.approx(sum(each) / 10)
    assert main(["dynamics", "evaluate", "runs/small", "--round", "2", "--json"]) == 0
    earlier = json.loads(capsys.readouterr().out)["mean"]["relative_mse"]
    assert earlier["mean"] == pytest.approx(held_out[0]["held_out/mean"])

    assert main(["dynamics", "adapt", "runs/small", "--steps", "30", "--json"]) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert adapted["mean"]["relative_mse"]["mean"] < adapted["mean"]["unadapted"]["mean"]
    assert len(adapted["environments"]) == 10
    assert main(["dynamics", "adapt", "runs/small", "--steps", "0"]) == 0
    table = capsys.readouterr().out
    assert "van_der_pol" in table and "relative MSE" in table and "their family's expert" in table


def _until(process: subprocess.Popen[str], run: str, rounds: int) -> None:
    """Polls for what is awaited, which is in the files."""
    end = time.monotonic() + LIMIT
    while len(records(run)) < rounds:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.timeout(900)
def test_killed_and_interrupted_it_goes_on_bit_for_bit(place: Path) -> None:
    """On two processes: SIGKILL to the first start, SIGINT to the second, the third to the end. One
    process gets the same losses, and goes on with what two have saved."""
    settings = ["train.rounds=16", "every.save=1", "every.evaluate=0", "parallel.ep=2"]
    calm = dynamics("train", "small.yaml", *settings, "--run-dir", "calm")
    subprocess.run(calm, env=environment(), check=True, timeout=LIMIT, capture_output=True)

    lines = [
        dynamics("train", "small.yaml", *settings, "--run-dir", "stopped"),
        dynamics("resume", "stopped"),
    ]
    for line, number, rounds in zip(lines, (signal.SIGKILL, signal.SIGINT), (2, 4), strict=True):
        process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
        try:
            _until(process, "stopped", rounds)
            process.send_signal(number)
            told = process.communicate(timeout=LIMIT)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "SIGINT: saving a checkpoint and leaving" in told
    assert "go on with: coterie dynamics resume stopped" in told and "Traceback" not in told
    saved = sorted(Path("stopped/checkpoints").glob("step_*"))[-1]
    assert int(saved.name[5:]) == len(records("stopped")) < 16

    done = subprocess.run(
        dynamics("resume", "stopped"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert "going on after round" in done.stderr
    keys = ("round", "loss", "gate_updates", "gate_failures", "routing_accuracy", "experts_in_use")
    for one, other in zip(records("calm"), records("stopped"), strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]
    assert checksums("calm", 16) == checksums("stopped", 16)

    assert main(["dynamics", "train", "small.yaml", *settings[:-1], "--run-dir", "one"]) == 0
    assert losses("calm") == pytest.approx(losses("one"), rel=1e-9)
    assert main(["dynamics", "resume", "calm", "train.rounds=17", "parallel.ep=1"]) == 0
    assert [record["round"] for record in records("calm")] == list(range(1, 18))


MISTAKES = {
    "narrow": (
        ["train", "small.yaml", "model.experts=6"],
        ["contexts of width 4 are too narrow for 6 experts", "at least 5", "narrow_contexts"],
    ),
    "ep": (["train", "small.yaml", "parallel.ep=3"], ["experts is 2", "parallel.ep 3"]),
    "nproc": (
        ["train", "small.yaml", "parallel.ep=2", "--nproc", "3"],
        ["3 processes cannot have parallel.ep 2"],
    ),
    "empty round": (
        ["train", "small.yaml", "train.context_steps=0", "train.model_steps=0"],
        ["both 0"],
    ),
    "misspelt": (
        ["train", "small.yaml", "train.gate_evry=3"],
        ["no key train.gate_evry", "did you mean 'train.gate_every'"],
    ),
    "of the other command": (
        ["train", "small.yaml", "optimizer.lr=3"],
        ["no key optimizer", "accepts name, data, model, train"],
    ),
    "a kind of router": (
        ["train", "small.yaml", "model.router.kind=top_k"],
        ["model.router.kind is 'top_k'", "kmeans or gradient"],
    ),
    "no shipped config": (["train", "odebnch_2"], ["no config 'odebnch_2'", "odebench_2"]),
    "no run": (["resume", "nothing"], ["nothing: there is no such run"]),
    "a run of train": (
        ["evaluate", "other"],
        ["other: is of 'coterie train'; what takes such runs: 'coterie resume'"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Path("other").mkdir()
    Path("other/config.yaml").write_text("model: {}")
    arguments, parts = MISTAKES[name]
    assert main(["dynamics", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("coterie: ") and told.count("\n") == 1
    assert all(part in told for part in parts), told
    assert not Path("runs").exists()


def test_a_folder_takes_one_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["small.yaml", "train.rounds=1", "--run-dir"]
    assert main(["dynamics", "train", *quick, "mine"]) == 0
    assert main(["dynamics", "train", *quick, "mine"]) == 2
    assert "mine: holds a run already" in capsys.readouterr().err
    with pytest.raises(UserError, match="'coterie dynamics resume mine'"):
        check_fresh(Path("mine"))  # also for a run of the other kind
    before = Path("mine/dynamics.yaml").read_text()
    assert main(["dynamics", "resume", "mine", "data.seed=7", "train.rounds=2"]) == 2
    assert "data.seed is 7, but was 0 in the checkpoint" in capsys.readouterr().err
    assert Path("mine/dynamics.yaml").read_text() == before
    Path("other").mkdir()
    Path("other/config.yaml").write_text("model: {}")
    assert main(["dynamics", "train", *quick, "other"]) == 2
    assert "other: holds a run already" in capsys.readouterr().err
    assert main(["dynamics", "adapt", "mine", "--round", "7"]) == 2
    assert "no checkpoint of step 7; there are: 1" in capsys.readouterr().err


def test_other_commands_know_such_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dynamics", "train", "small.yaml", "train.rounds=1", "--run-dir", "mine"]) == 0
    capsys.readouterr()
    checkpoint = "mine/checkpoints/step_00000001"
    for words, what in (
        (["evaluate", "mine"], "mine"),
        (["generate", "mine", "--prompt", "a"], "mine"),
        (["resume", "mine"], "mine"),
        (["train", "mine", "--stage", "aux"], "mine"),
        (["report", "mine"], "mine"),
        (["upcycle", "mine", "quickstart", "--run-dir", "new"], checkpoint),
        (["checkpoint", "reshard", checkpoint, "new", "--world", "2"], checkpoint),
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"coterie: {what}: is of 'coterie dynamics train'; what takes"), told
        assert told.endswith("'coterie dynamics evaluate' and 'coterie dynamics adapt'\n")
    assert not Path("new").exists()

    assert main(["checkpoint", "inspect", "mine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["round"] == 1
    run = DynamicsRun.build(load_dynamics_config("mine/dynamics.yaml"))
    experts = 8 * sum(p.numel() for p in run.trainer.model.experts.parameters())
    gate = 8 * (2 * 4 + 5 * 2 + 1) + 1  # centroids, weights, attempts, whether it is warm
    contexts = 10 * 4 * 8
    counts = 4 * sum(name.endswith(".step") for name in found["tensors"])
    assert found["bytes"] == {
        "contexts": contexts + 10 * 8,  # and the expert of each
        "experts": experts,
        "gate": gate,
        "optimizer": 2 * (experts + contexts) + counts,
    }
    assert main(["checkpoint", "inspect", "mine"]) == 0
    told = capsys.readouterr().out
    assert f"{checkpoint}: round 1" in told and f"  gate: {gate} bytes" in told


def test_centroids_that_there_are_not(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = ["model.router={kind: gradient}", "train.rounds=1"]
    assert main(["dynamics", "train", "small.yaml", *gate]) == 0
    assert main(["dynamics", "adapt", "runs/small", "--start", "centroid"]) == 2
    assert "use --start zero" in capsys.readouterr().err


def test_narrow_contexts_are_told_with_the_accuracy(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts on a line in three clusters: the gate never chooses the middle one."""
    line_E = torch.tensor([-1.0] * 4 + [0.0] * 2 + [1.0] * 4)[:, None]
    build = DynamicsRun.build

    def placed(*arguments: Any) -> DynamicsRun:
        run = build(*arguments)
        run.trainer.environments.set_contexts(line_E)
        return run

    monkeypatch.setattr(DynamicsRun, "build", placed)
    narrow = ["model.experts=3", "model.context=1", "train.rounds=1", "train.lr=0.0001"]
    router = "model.router={kind: kmeans, start: spread, narrow_contexts: true}"
    assert main(["dynamics", "train", "small.yaml", *narrow, router]) == 0
    told = capsys.readouterr().err
    assert told.count("warning: the gate sends only 80% of the environments") == 1
    assert "width 1 are too narrow for 3 experts (at least 2)" in " ".join(told.split())
    assert records("runs/small")[0]["gate_accuracy"] == pytest.approx(0.8)


def test_a_loss_that_is_not_finite_ends_the_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dynamics", "train", "small.yaml", "train.lr=1e6", "data.times=20"]) == 1
    told = capsys.readouterr().err
    assert "the loss is nan" in told or "the loss is inf" in told
    assert "a lower train.lr" in told and "Traceback" not in told


def test_shipped_configs_and_schema(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (ROOT / "configs" / "dynamics").glob("*.yaml"):
        assert isinstance(load_dynamics_config(file.stem), DynamicsRunConfig)
    assert main(["dynamics", "schema", "train.gate_every"]) == 0
    assert "train.gate_every" in capsys.readouterr().out
    assert main(["config", "schema", "train.global_batch"]) == 0
    assert "train.global_batch" in capsys.readouterr().out
    assert main(["dynamics", "schema", "train.global_batch"]) == 2
