"""The command for a GPU machine, tried without a GPU: what it carries, runs, reports and leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import carried, cases, report, steps
from benchmarks.gpu import run as command
from benchmarks.gpu.steps import Clock, Outcome, Step

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu" / "run.py"


def checkout(folder: Path, libraries: bool = True) -> Path:
    """A checkout, as far as carrying looks at it."""
    (folder / "csrc").mkdir(parents=True)
    (folder / "requirements").mkdir()
    (folder / "requirements" / "constraints.txt").write_text("pydantic==2.14.3\n")
    if libraries:
        built = {"cpu": {"built": True}, "fused": {"built": False}}
        (folder / "csrc" / "build.json").write_text(json.dumps({"libraries": built}))
        (folder / "csrc" / "_cpu.abi3.so").write_bytes(b"native")
    return folder


class Pip:
    """Notes pip's commands, and puts files where it would put wheels."""

    def __init__(self, size: int = 10, leaves_out: str = "") -> None:
        self.commands: list[list[str]] = []
        self.size, self.leaves_out = size, leaves_out

    def __call__(self, arguments: list[str]) -> None:
        self.commands.append(arguments)
        if "download" not in arguments:
            return
        target = Path(arguments[arguments.index("-d") + 1])
        for name in (*carried.WITH_NEEDS, *carried.ALONE):
            if name in arguments and name != self.leaves_out:
                wheel = target / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
                wheel.write_bytes(b"w" * self.size)


def test_what_is_carried_is_complete(tmp_path: Path) -> None:
    pip = Pip()
    folder = carried.prepare(checkout(tmp_path), pip)
    names = {path.name for path in (folder / "wheels").iterdir()}
    assert len(names) == len(carried.WITH_NEEDS) + len(carried.ALONE)
    assert {path.name for path in (folder / "csrc").iterdir()} == {"build.json", "_cpu.abi3.so"}
    for download in pip.commands:
        assert "--only-binary=:all:" in download and "3.12" in download
        assert str(tmp_path / "requirements" / "constraints.txt") in download
    assert "--no-deps" in pip.commands[1] and "--no-deps" not in pip.commands[0]
    # what coterie needs and the machine is known to lack
    assert "pydantic" in pip.commands[0] and "nvidia-cutlass" in pip.commands[1]


def test_what_is_too_large_or_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no wheel in .* for: pytest-timeout"):
        carried.prepare(checkout(tmp_path / "a"), Pip(leaves_out="pytest-timeout"))
    with pytest.raises(RuntimeError, match=r"60 can be carried"):
        carried.prepare(checkout(tmp_path / "b"), Pip(size=carried.MOST_BYTES // 4))


def test_only_what_is_lacking_is_installed(tmp_path: Path) -> None:
    root = checkout(tmp_path, libraries=False)
    wheels = root / carried.FOLDER / "wheels"
    wheels.mkdir(parents=True)
    for name in ("pytest-1.0-py3-none-any.whl", "coterie_lacks_this-1.0-py3-none-any.whl"):
        (wheels / name).touch()
    pip = Pip()
    (told,) = carried.unpack(root, pip)
    assert told.endswith(": coterie-lacks-this")
    (install,) = pip.commands
    assert "--no-index" in install and str(root / ".gpu" / "site") in install
    assert str(wheels / "pytest-1.0-py3-none-any.whl") not in install


def test_libraries_are_put_where_there_are_none(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    carried.prepare(root, Pip())
    assert not any("libraries" in line for line in carried.unpack(root, Pip()))
    for path in (root / "csrc").iterdir():
        path.unlink()
    assert "libraries put in place: cpu" in carried.unpack(root, Pip())
    assert (root / "csrc" / "_cpu.abi3.so").read_bytes() == b"native"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def said(results: Path) -> dict[str, Any]:
    return dict(json.loads((results / "gpu.json").read_text()))


def test_a_failing_step_is_reported_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    figures = tmp_path / "machine.json"
    measured = f"open({str(figures)!r}, 'w').write('[{{\"gpu\": \"measured before\"}}]')"
    planned = [
        Step("machine", python(f"{measured}; import time; time.sleep(60)"), 2, figures),
        Step("tests", python("print('one is wrong'); raise SystemExit(3)"), 60),
        Step("layer", python("print('fine')"), 60),
    ]
    assert command.measure("cpu", 5, tmp_path / "results", planned) == 1
    for folder in (tmp_path / "results", out):
        found = said(folder)
        status = [step["status"] for step in found["steps"]]
        assert status == ["out of time", "failed", "done"]
        assert "one is wrong\n\n(exit status 3)" in found["steps"][1]["told"]
        # what was measured before a step was stopped is kept
        assert found["figures"]["machine"] == [{"gpu": "measured before"}]
        page = (folder / "gpu.md").read_text()
        assert "measured before" in page and "one is wrong" in page


def test_no_step_begins_when_time_is_over(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    step = Step("layer", python(f"open({str(ran)!r}, 'w')"), 60)
    outcome = steps.run(step, Clock(steps.SPARE + 1), ROOT, os.environ, least=15)
    assert outcome.status == "not run" and "1 seconds" in outcome.told and not ran.exists()


def test_a_step_ends_with_all_that_it_started(tmp_path: Path) -> None:
    mark = f"coterie-{os.getpid()}-{time.monotonic_ns()}"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; \
time.sleep(300)', '{mark}'])"
    begin = time.monotonic()
    outcome = steps.run(Step("layer", python(child), 3), Clock(60), ROOT, os.environ, least=1)
    assert outcome.status == "out of time" and time.monotonic() - begin < 20
    for _ in range(100):  # the kernel takes a moment
        if not any(mark.encode() in line for line in command_lines()):
            return
        time.sleep(0.1)
    pytest.fail("what the step had started runs on")


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            yield path.read_bytes()


def test_what_was_measured_is_kept_when_the_run_is_ended(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.gpu import run
from benchmarks.gpu.steps import Step
wait = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(300)"]
done = [sys.executable, "-c", "pass"]
steps = [Step("build", done, 60), Step("tests", wait, 200), Step("layer", done, 60)]
raise SystemExit(run.measure("cpu", 5, Path({str(tmp_path)!r}), steps))
"""
    process = subprocess.Popen(python(code))
    try:
        for _ in range(600):
            if (tmp_path / "gpu.json").exists():
                break
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
    finally:
        process.kill()
    status = [step["status"] for step in said(tmp_path)["steps"]]
    assert status == ["done", "cut off", "not run"]


@pytest.mark.timeout(700)  # on a busy machine, with the kernels to be compiled
def test_everything_but_the_device_works(tmp_path: Path) -> None:
    """All programs on the host, at toy sizes."""
    arguments = ["--device", "cpu", "--results", str(tmp_path), "--minutes", "9"]
    names = ["build", "machine", "tests", "products", "link", "layer", "memcheck"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments, "--steps", *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = said(tmp_path)
    assert [step["name"] for step in found["steps"]] == names
    passes = [(record["pass"], record["GB/s"]) for record in found["figures"]["link"]]
    assert passes == [(which, rate) for which in ("forward", "backward") for rate in (25, None)]
    (layer,) = found["figures"]["layer"]
    assert layer["difference from the loop"] < 0.02
    page = (tmp_path / "gpu.md").read_text()
    assert "Tried on the host" in page and page == report.page(found)
    for heading in ("Machine", "Products", "Emulated link", "Whole layer", "What was asked for"):
        assert f"## {heading}" in page


def test_steps_and_results_are_asked_for_in_words(tmp_path: Path) -> None:
    for arguments, words in (
        (["--device", "cpu"], "name a folder with --results"),
        ([], "has no torch that sees a GPU"),
        (["--results", str(tmp_path), "--steps", "linc"], "no step linc; there are build, machine"),
    ):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *arguments],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2 and words in done.stderr


def test_the_report_holds_figures_against_what_was_asked_for() -> None:
    def link(case: str, which: str, rate: int | None, comm: float, fused: float) -> dict[str, Any]:
        ms = {"T_comp": 2.0, "T_comm": comm, "T_fused": fused, "2 chunks": 3.0, "4 chunks": 2.8}
        return {
            "case": case,
            "pass": which,
            "GB/s": rate,
            "ms": ms,
            "TFLOP/s": 250 / fused,
            "eta": 1.0,
            "hidden": 1 - (fused - 2) / comm,
            "over serial": (2 + comm) / fused,
            "over chunks": 2.8 / fused,
            "communication": 8,
            "slabs": 4,
            "tile columns": 128,
        }

    comet, qwen3 = cases.COMET.name, cases.QWEN3.name
    found = {
        "device": "cuda",
        "steps": [vars(Outcome("tests", "done")), vars(Outcome("memcheck", "failed", 3, "hazard"))],
        "figures": {
            "link": [
                link(comet, "forward", 160, 1.0, 2.1),
                link(comet, "forward", None, 0.1, 2.0),
                link(qwen3, "forward", 360, 2.0, 2.5),
            ]
        },
    }
    page = report.page(found)
    assert "| 8, 4, 128 |" in page
    assert "| hidden, Comet's setting, forward | ≥ 86.5% | 160: 90.0% |" in page
    assert "least 1.12× (Qwen3-30B-like, forward, 360 GB/s)" in page
    assert "| Qwen3-30B-like forward, 360 GB/s | 233 TFLOP/s | 100 TFLOP/s |" in page
    assert "| Qwen3-30B-like backward, 360 GB/s | 209 TFLOP/s | not measured |" in page
    assert "memcheck failed, racecheck not run" in page
    assert "Tried on the host" not in page


def test_on_the_gpu_it_is_the_layers_of_the_papers() -> None:
    names = {step.name for step in command.steps("cuda", Path("/nowhere"))}
    assert {"memcheck", "racecheck", "tests", "products", "link", "layer"} <= names
    (watched,) = (s for s in command.steps("cuda", Path("/x")) if s.name == "racecheck")
    assert watched.command[0] == "compute-sanitizer" and "racecheck" in watched.command
    assert cases.COMET.ranks * cases.COMET.tokens == 16384 and cases.COMET.E == 8
    assert {case.ranks for case in cases.LINK} == {8}
