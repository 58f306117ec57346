"""The second stage through the commands, and that no figure of a non-causal model passes for one of
a causal model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coterie.launch.load_config import load_config
from coterie.launch.main import main
from tests.launch.stages import (
    FORESIGHT,
    LOSSES,
    NON_CAUSAL,
    coterie_train,
    digests,
    evaluated,
    write_config,
)

ROOT = Path(__file__).resolve().parents[2]


def train_first() -> None:
    """A run of experts of two modalities."""
    prompts = {"batch": 8, "prompts": ["ab"]}
    write_config("first", {"kind": "modality", "experts": [3, 1]}, evaluation=prompts)
    assert coterie_train("first.yaml", "--run-dir", "first") == 0


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.fixture
def first(place: Path, copies: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """That run, trained once for all tests."""
    if not (copies / "first").exists():
        train_first()
        shutil.copytree("first", copies / "first")
        shutil.copy("first.yaml", copies)
        capfd.readouterr()
    else:
        shutil.copytree(copies / "first", "first")
        shutil.copy(copies / "first.yaml", "first.yaml")


def records(run: str, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if key in record]


def test_the_first_stage_is_not_causal_and_says_so(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_first()
    first = capfd.readouterr().err
    assert "router modality looks at later tokens, so losses are not those of a causal" in first
    assert "evaluation.prompts are not continued" in first
    assert "held-out non_causal/loss" in first and "held-out loss" not in first
    assert "make it causal: coterie train first --stage aux" in first
    (held_out,) = records("first", "held_out/non_causal/loss")
    assert held_out.keys() == {"step", *(f"held_out/{name}" for name in NON_CAUSAL)}
    shown = EventAccumulator("first/tensorboard").Reload().Tags()
    assert {tag for tag in shown["scalars"] if "held_out" in tag} == held_out.keys() - {"step"}
    assert not [tag for tag in shown["images"] if tag.startswith("generated")]

    assert main(["evaluate", "first"]) == 2
    told = capfd.readouterr()
    assert not told.out and told.err.strip() == (
        "coterie: first: router modality looks at later tokens, so its held-out loss is not that "
        "of a causal model; train auxiliary routers, by 'coterie train first --stage aux', or ask "
        "for that figure with --non-causal"
    )
    assert main(["generate", "first", "--prompt", "ab"]) == 2
    assert "cannot generate, which is without later tokens; train aux" in capfd.readouterr().err
    losses = evaluated("first", capfd, "--non-causal")
    assert losses.keys() == NON_CAUSAL
    assert losses["non_causal/loss"] == pytest.approx(held_out["held_out/non_causal/loss"])
    assert main(["evaluate", "first", "--non-causal"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("non_causal/") for line in lines)


def test_the_second_stage(first: None, capfd: pytest.CaptureFixture[str]) -> None:
    train = ["train", "first", "--stage", "aux", "--run-dir", "second", "--nproc", "1"]
    assert main([*train, "train.steps=10", "monitor.every=1", "checkpoint.every=5"]) == 0
    told = capfd.readouterr().err
    assert "held-out loss" in told and "auxiliary/agreement" in told
    config, before = load_config("second/config.yaml"), load_config("first/config.yaml")
    assert config.name == "tiny-aux" and config.data == before.data
    assert config.stage is not None and config.stage.step == 2
    assert config.stage.weights == str(Path("first").resolve())
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.final_lr, optimizer.decay) == (1e-4, 0.01, "linear")
    assert optimizer.warmup == 2

    kept, weights = digests("first"), digests("second")
    moved = {name for name in weights if name not in kept or weights[name] != kept[name]}
    names = {name for name in weights if name.startswith("model.") and "auxiliary" not in name}
    assert names and not names & moved
    assert {name for name in moved if name.startswith("model.")} == {
        f"model.blocks.{layer}.moe.router.auxiliary.{modality}.{side}"
        for layer in range(2)
        for modality in range(2)
        for side in ("w_in", "w_out")
    }
    assert all("router.auxiliary" in name for name in weights if name.startswith("optimizer."))

    steps = records("second", "router/auxiliary")
    assert len(steps) == 10 and steps[-1]["router/auxiliary"] < steps[0]["router/auxiliary"]
    rates = [5e-5, 1e-4, 1e-4 * (1 - 0.99 * 7 / 8)]
    assert [steps[n]["lr"] for n in (0, 1, -1)] == pytest.approx(rates)
    (held_out,) = records("second", "held_out/loss")
    assert held_out.keys() == {"step", *(f"held_out/{n}" for n in LOSSES | NON_CAUSAL | FORESIGHT)}
    (alone,) = records("first", "held_out/non_causal/loss")
    name = "held_out/non_causal/loss"
    assert held_out[name] == pytest.approx(alone[name]) != held_out["held_out/loss"]

    assert main(["evaluate", "second", "--json"]) == 0
    metrics = json.loads(capfd.readouterr().out)
    assert metrics == pytest.approx({n: held_out[f"held_out/{n}"] for n in metrics})
    assert metrics.keys() == LOSSES | NON_CAUSAL | FORESIGHT
    assert main(["generate", "second", "--prompt", "ab", "--length", "3"]) == 0
    assert main(["resume", "second", "train.steps=11"]) == 0
    capfd.readouterr()


def test_a_resume_before_the_first_checkpoint_starts_from_the_same_weights(first: None) -> None:
    train = ["train", "first", "--stage", "aux", "--nproc", "1", "train.steps=2", "--run-dir"]
    assert main([*train, "one"]) == 0 and main([*train, "two"]) == 0
    for file in Path("two/checkpoints/step_00000002").iterdir():
        file.unlink()
    Path("two/checkpoints/step_00000002").rmdir()
    assert main(["resume", "two", "--nproc", "1"]) == 0
    assert digests("two") == digests("one")


def test_two_processes_say_what_one_says(first: None) -> None:
    train = ["train", "first", "--stage", "aux", "train.steps=3", "monitor.every=1"]
    assert main([*train, "--run-dir", "one", "--nproc", "1"]) == 0
    subprocess.run(
        [sys.executable, "-m", "coterie.launch", *train, "--run-dir", "two", "parallel.ep=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    for name in ("router/auxiliary", "held_out/loss", "held_out/auxiliary/cross_entropy"):
        one, two = ([record[name] for record in records(run, name)] for run in ("one", "two"))
        assert one and two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["first", "--stage", "two"], "--stage is 'two', but must be aux"),
        (["nothing", "--stage", "aux"], "nothing: there is no such run"),
        (["runs/done", "--stage", "aux"], "runs/done: its model is causal as it is"),
        (
            ["first", "--stage", "aux", "model.moe.router.capacity_factor=0.5"],
            "is another than this one; only model.moe.router.auxiliary may differ",
        ),
        (["first", "--stage", "aux", "stage.step=1"], "has no checkpoint of step 1"),
        (["first.yaml", "model.moe.router.auxiliary=true"], "need each other"),
        (["first.yaml", "stage={weights: first}"], "need each other"),
    ],
)
def test_mistakes(
    arguments: list[str], sentence: str, first: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--run-dir", "new", "--nproc", "1"]) == 2
    told = capfd.readouterr().err
    assert sentence in told and told.count("\n") == 1
    assert not Path("new").exists()


def test_a_router_that_cannot_be_made_causal_is_named(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_config("first", {"k": 2, "capacity_factor": 1.0, "drop": "score"})
    assert main(["train", "first.yaml", "--run-dir", "first", "--nproc", "1"]) == 0
    told = capfd.readouterr().err
    assert "router top_k looks at later tokens" in told and "measure it: coterie evaluate" in told
    for command in (["evaluate", "first", "--k", "1"], ["evaluate", "first"]):
        assert main(command) == 2
        told = capfd.readouterr().err
        assert told.strip().endswith("causal model; ask for that figure with --non-causal")
    assert main(["evaluate", "first", "--k", "1", "--non-causal"]) == 0
    assert "non_causal/loss" in capfd.readouterr().out
    assert main(["train", "first", "--stage", "aux"]) == 2
    assert "which no auxiliary router can foresee" in capfd.readouterr().err


def test_a_stage_may_be_a_file(first: None, capfd: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load(Path("first.yaml").read_text())
    tree["model"]["moe"]["router"]["auxiliary"] = True
    Path("second.yaml").write_text(yaml.safe_dump({**tree, "stage": {"weights": "first"}}))
    assert main(["train", "second.yaml", "--run-dir", "second", "--nproc", "1"]) == 0
    again = ["train", "second", "--stage", "aux", "--run-dir", "third"]
    capfd.readouterr()
    assert main(again) == 2
    assert "is a run of stage aux itself; go on with it by 'coterie resume second'" in (
        capfd.readouterr().err
    )
