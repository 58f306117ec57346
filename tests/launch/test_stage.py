"""The second stage through the commands, and that no figure of a non-causal model passes for one of
a causal model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coterie.launch.load_config import load_config
from coterie.launch.main import main
from coterie.parallel.checkpoint import latest, read_manifest

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {"loss", "loss/text"}
NON_CAUSAL = {f"non_causal/{name}" for name in LOSSES}
FORESIGHT = {f"auxiliary/{name}" for name in ("cross_entropy", "agreement", "always_no")}


def write_config(router: dict[str, Any], **sections: Any) -> None:
    tree = yaml.safe_load(Path("good.yaml").read_text())
    tree["model"]["moe"]["router"] = router
    Path("first.yaml").write_text(yaml.safe_dump({**tree, **sections}))


@pytest.fixture
def first(place: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """A run of experts of two modalities."""
    prompts = {"batch": 8, "prompts": ["ab"]}
    write_config({"kind": "modality", "experts": [3, 1]}, evaluation=prompts)
    assert main(["train", "first.yaml", "--run-dir", "first", "--nproc", "1"]) == 0
    return capfd.readouterr().err


def records(run: str, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if key in record]


def digests(run: str) -> dict[str, Any]:
    """What the newest checkpoint holds, by name."""
    checkpoint = latest(Path(run, "checkpoints"))
    assert checkpoint is not None
    return {name: entry.digest for name, entry in read_manifest(checkpoint).tensors.items()}


def test_the_first_stage_is_not_causal_and_says_so(
    first: str, capfd: pytest.CaptureFixture[str]
) -> None:
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
    assert main(["evaluate", "first", "--non-causal", "--json"]) == 0
    losses = json.loads(capfd.readouterr().out)
    assert losses.keys() == NON_CAUSAL
    assert losses["non_causal/loss"] == pytest.approx(held_out["held_out/non_causal/loss"])
    assert main(["evaluate", "first", "--non-causal"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("non_causal/") for line in lines)


def test_the_second_stage(first: str, capfd: pytest.CaptureFixture[str]) -> None:
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


def test_a_resume_before_the_first_checkpoint_starts_from_the_same_weights(first: str) -> None:
    train = ["train", "first", "--stage", "aux", "--nproc", "1", "train.steps=2", "--run-dir"]
    assert main([*train, "one"]) == 0 and main([*train, "two"]) == 0
    for file in Path("two/checkpoints/step_00000002").iterdir():
        file.unlink()
    Path("two/checkpoints/step_00000002").rmdir()
    assert main(["resume", "two", "--nproc", "1"]) == 0
    assert digests("two") == digests("one")


def test_two_processes_say_what_one_says(first: str) -> None:
    train = ["train", "first", "--stage", "aux", "train.steps=3", "monitor.every=1"]
    assert main([*train, "--run-dir", "one", "--nproc", "1"]) == 0
    subprocess.run(
        [sys.executable, "-m", "coterie.launch", *train, "--run-dir", "two", "parallel.ep=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
    arguments: list[str], sentence: str, first: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--run-dir", "new", "--nproc", "1"]) == 2
    told = capfd.readouterr().err
    assert sentence in told and told.count("\n") == 1
    assert not Path("new").exists()


def test_a_router_that_cannot_be_made_causal_is_named(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_config({"k": 2, "capacity_factor": 1.0, "drop": "score"})
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


def test_a_stage_may_be_a_file(first: str, capfd: pytest.CaptureFixture[str]) -> None:
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


def test_blocks_that_choose_tokens_are_foreseen_too(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(Path("good.yaml").read_text())
    tree["model"]["mixture_of_depths"] = {"capacity": 0.5}
    Path("first.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "first.yaml", "--run-dir", "one", "--nproc", "1"]) == 0
    assert main(["evaluate", "one"]) == 2
    told = capfd.readouterr().err.strip()
    assert told.endswith(
        "one: mixture_of_depths looks at later tokens, so its held-out loss is not that of a "
        "causal model; train auxiliary routers, by 'coterie train one --stage aux', or ask for "
        "that figure with --non-causal"
    )
    router = "model.moe.router={kind: modality, experts: [3, 1]}"
    assert main(["train", "first.yaml", router, "--run-dir", "two", "--nproc", "1"]) == 0
    assert main(["evaluate", "two"]) == 2
    told = capfd.readouterr().err
    assert "router modality and mixture_of_depths look at later tokens" in told
    assert main(["train", "two", "--stage", "aux", "--run-dir", "three", "--nproc", "1"]) == 0
    kept, weights = digests("two"), digests("three")
    new = {name for name in weights if name.startswith("model.") and name not in kept}
    kinds = {("router.auxiliary" in name, "depths.predictor" in name) for name in new}
    assert kinds == {(True, False), (False, True)}
    assert all(weights[name] == kept[name] for name in kept if name.startswith("model."))
    capfd.readouterr()
    assert main(["evaluate", "three", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert main(["evaluate", "two", "--json", "--non-causal"]) == 0
    before = json.loads(capfd.readouterr().out)
    assert before == pytest.approx({name: found[name] for name in before})
    assert main(["generate", "three", "--prompt", "ab", "--length", "3"]) == 0
