"""`coterie certify` holds runs to their hashes: killed, resumed on other layouts, tampered with."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.kill_resume import (
    SETTINGS,
    command,
    environment,
    finish,
    last_step,
    start_and_kill,
)

STEPS = 10
RUN = [
    *SETTINGS,
    "train.accumulation=2",
    f"train.steps={STEPS}",
    "train.certify_every=1",
    "optimizer.warmup=2",
    "checkpoint.every=2",
    "checkpoint.keep=20",
]
START = ["parallel.ep=2", "--nproc", "2"]
OTHERS = [
    ["parallel.ep=1", "parallel.tp=2", "parallel.pp=2", "parallel.dp_shard=1", "--nproc", "4"],
    ["parallel.ep=2", "parallel.tp=1", "parallel.pp=1", "parallel.dp_shard=2", "--nproc", "2"],
]


def train(run: Path) -> list[str]:
    return command("train", "quickstart", *RUN, "--run-dir", str(run), *START)


def certify(run: Path, *options: str) -> tuple[int, dict[str, list[dict[str, str]]], str]:
    """Exit code, JSON and stderr."""
    done = subprocess.run(
        command("certify", str(run), "--json", *options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("certify") / "calm"
    finish(train(run))
    return run


def killed_thrice(run: Path, resumes: list[list[str]], seed: int) -> None:
    """Train, and kill at three random moments; after each go on with the next of ``resumes``."""
    draw = random.Random(seed)
    line = train(run)
    for resume in resumes:
        step = min(last_step(run) + draw.randrange(1, 3), STEPS - 1)
        start_and_kill(line, run, step, saving=False, draw=draw)
        line = command("resume", str(run), *resume)
        if not (run / "config.yaml").exists():
            line = train(run)
    finish(line)


@pytest.mark.timeout(600)
def test_killed_and_resumed_on_the_same_layout(calm: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    killed_thrice(run, [START] * 3, seed=1)
    code, report, _ = certify(run, "--against", str(calm))
    assert (code, report["problems"]) == (0, [])
    _, expected, _ = certify(calm)
    by_step = {one["step"]: one for one in expected["certificates"]}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    assert {one["step"] for one in report["certificates"]} == set(by_step)
    for one in report["certificates"]:
        assert one == by_step[one["step"]]


@pytest.mark.timeout(600)
def test_killed_and_resumed_on_two_other_layouts(calm: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    killed_thrice(run, [*OTHERS, OTHERS[0]], seed=2)
    code, report, _ = certify(run, "--against", str(calm))
    assert (code, report["problems"]) == (0, [])
    _, expected, _ = certify(calm)
    by_step = {one["step"]: one for one in expected["certificates"]}
    assert {one["step"] for one in report["certificates"]} == set(by_step)
    for one in report["certificates"]:
        for name in ("samples", "rng"):
            assert one[name] == by_step[one["step"]][name]
    layouts = report["certificates"][-1]["history"]
    assert "tp 2" in layouts and "dp_shard 2" in layouts


def tampered(calm: Path, tmp_path: Path) -> tuple[Path, list[dict[str, str]]]:
    run = tmp_path / "tampered"
    shutil.copytree(calm, run)
    lines = [json.loads(line) for line in (run / "certificates.jsonl").read_text().splitlines()]
    return run, lines


def rewrite(run: Path, lines: list[dict[str, str]]) -> None:
    (run / "certificates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", ["samples", "rng", "weights", "optimizer"])
def test_a_step_that_came_out_otherwise_is_named(calm: Path, tmp_path: Path, name: str) -> None:
    run, lines = tampered(calm, tmp_path)
    rewrite(run, [*lines, {**lines[2], name: "0" * 16}])
    code, report, _ = certify(run)
    assert code == 1
    assert any(f"step 3, taken twice: {name}" in problem for problem in report["problems"])


def test_weights_may_differ_after_another_layout(calm: Path, tmp_path: Path) -> None:
    run, lines = tampered(calm, tmp_path)
    rewrite(run, [*lines, {**lines[2], "weights": "0" * 16, "history": "tp 2"}])
    assert certify(run)[0] == 0


def test_a_checkpoint_that_is_not_its_steps_is_named(calm: Path, tmp_path: Path) -> None:
    run, lines = tampered(calm, tmp_path)
    rewrite(run, [{**line, "weights": "0" * 16} if line["step"] == 4 else line for line in lines])
    code, report, _ = certify(run)
    assert code == 1
    assert report["problems"] == ["checkpoint step_00000004 does not hold what step 4 made"]


def test_a_line_cut_by_a_kill_is_left_out(calm: Path, tmp_path: Path) -> None:
    run, _ = tampered(calm, tmp_path)
    with (run / "certificates.jsonl").open("a") as file:
        file.write('{"step": 11, "samp')
    code, report, _ = certify(run)
    assert code == 0
    assert len(report["certificates"]) == STEPS


def test_nothing_to_certify_is_one_sentence(tmp_path: Path) -> None:
    code, _, stderr = certify(tmp_path / "none")
    assert code == 2
    assert "certificates.jsonl" in stderr and stderr.count("\n") == 1
