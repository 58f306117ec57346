"""The commands as a user types them, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from coterie.launch import doctor
from coterie.launch.config_file import shipped_names
from coterie.launch.main import app, main

ROOT = Path(__file__).resolve().parents[2]


def commands(group: typer.core.TyperGroup) -> Iterator[list[str]]:
    """The words of each command, those of sub-groups included."""
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        yield from ([name, *words] for words in commands(command)) if inner else [[name]]


COMMANDS = list(commands(typer.main.get_command(app)))


def coterie(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coterie.launch", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_describes_everything(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example:  coterie {' '.join(command)}" in " ".join(shown.split("\n"))
    assert "Usage: coterie" in shown


def test_the_commands_are_all_there() -> None:
    assert ["train"] in COMMANDS and ["upcycle"] in COMMANDS and ["dynamics", "adapt"] in COMMANDS


def test_overrides_are_explained_by_settings_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, example, schema in (
        (["train"], "train.steps=100", "coterie config schema"),
        (["dynamics", "train"], "train.rounds=50", "coterie dynamics schema"),
    ):
        assert main([*words, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"such as {example}" in shown and f"All settings: {schema}" in shown


def test_help_of_train_names_the_shipped_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shipped_names() and all(name in shown for name in shipped_names())


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from coterie.launch.main import main; main(['train', '--help']); "
        "main(['train', 'no.yaml']); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_what_starts_the_ranks_imports_nothing_that_only_ranks_need(place: Path) -> None:
    """Else each command would take twice as long to begin."""
    code = (
        "import sys; from coterie.launch import main, ranked; "
        "ranked.run_ranks = lambda *_: sys.exit(', '.join({'torch._dynamo', 'sympy', "
        "'torch.distributed.tensor', 'torch.distributed.checkpoint', 'matplotlib', 'tensorboard'} "
        "& set(sys.modules)) or 77); main.main(sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (["train", "good.yaml"], ["resume", "runs/done"]):
        command = [sys.executable, "-c", code, *words, "--nproc", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 77, done.stderr


def test_two_ranks_meet_and_their_mistake_is_told_once(place: Path, dataset: Path) -> None:
    shutil.copytree(dataset, "cut")
    shard = next(Path("cut").glob("train-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-10])  # only the ranks look at shards, having met
    done = coterie("train", "good.yaml", "--nproc", "2", "parallel.ep=2", "data.path=cut")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"coterie: {shard}: is cut short" in done.stderr
    assert not Path("runs/tiny/config.yaml").exists()


def test_ctrl_c_while_two_ranks_train_saves_a_checkpoint(place: Path) -> None:
    command = ["train", "good.yaml", "--nproc", "2", "train.steps=1000000", "monitor.every=1"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "coterie.launch", *command, "evaluation.every=0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = Path("runs/tiny/metrics.jsonl")
        while not metrics.exists() or '"loss"' not in metrics.read_text():  # both took a step
            assert parent.poll() is None
            time.sleep(0.01)
        parent.send_signal(signal.SIGINT)
        err = parent.communicate(timeout=60)[1]
    finally:
        parent.kill()
    assert parent.returncode == 130
    assert "SIGINT: saving a checkpoint and leaving" in err and "Traceback" not in err
    assert list(Path("runs/tiny/checkpoints").glob("step_*/manifest.json"))


def test_a_closed_pipe_is_no_error(place: Path) -> None:
    script = f"{sys.executable} -m coterie.launch config schema --json | head -c 10"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, shell=True, env=environment, capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout) == 10


def test_data_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for number in range(20):
        Path(f"texts/{number}.txt").write_text(f"text number {number} " * 20)
    Path("texts/20.bin").write_text("")
    assert main(["data", "build", "texts", "built", "--sequence", "64"]) == 0
    seen = capsys.readouterr()
    assert "1 files of other kinds" in seen.err and "sequence 64, vocabulary 277" in seen.out
    assert main(["data", "verify", "built"]) == 0
    assert "built: train is as it was built" in capsys.readouterr().out
    shard = next(Path("built").glob("train-*.npy"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["data", "verify", "built"]) == 2
    assert str(shard) in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    topics = {finding["topic"] for finding in found}
    native = {"ops on cpu", "ops on cuda", "fused kernels"}
    assert {"Python", "torch", "gloo", "nccl", "CPU", *native, "apex", "disk"} <= topics
    assert {finding["state"] for finding in found} <= {"ok", "gap"}

    monkeypatch.setattr(doctor, "_COMPULSORY", ("numpy", "no-such-package"))
    assert main(["doctor"]) == 1
    assert "pip install no-such-package" in capsys.readouterr().out


@pytest.mark.parametrize(("modules", "state"), [(("optimizers",), "ok"), ((), "gap")])
def test_doctor_tells_the_two_apexes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], state: str
) -> None:
    for name in ("", *modules):
        (tmp_path / "apex" / name).mkdir(exist_ok=True, parents=True)
        (tmp_path / "apex" / name / "__init__.py").write_text("")
    info = tmp_path / "apex-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    finding = doctor._apex()
    assert finding.state == state and ("uninstall" in finding.fix) == (state == "gap")


def test_a_refused_resume_leaves_the_runs_config_as_it_was(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = place / "mine"
    assert main(["train", "good.yaml", "--run-dir", str(run), "--nproc", "1"]) == 0
    before = (run / "config.yaml").read_bytes()
    assert main(["resume", str(run), "train.global_batch=16", "train.steps=6"]) == 2
    assert "was 8 and is now 16" in capfd.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    assert main(["resume", str(run), "train.steps=4"]) == 0
    assert "steps: 4" in (run / "config.yaml").read_text()


def test_evaluate_refuses_other_data_than_the_run_had(
    place: Path, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = place / "mine"
    assert main(["train", "good.yaml", "--run-dir", str(run), "--nproc", "1"]) == 0
    other = place / "other"
    shutil.copytree(dataset, other)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(dataset), str(other)))
    assert main(["evaluate", str(run)]) == 0  # a copy is the same data

    source = place / "pages"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.txt").write_text(f"page {number} " * 20)
    shutil.rmtree(other)
    assert main(["data", "build", str(source), str(other), "--sequence", "32"]) == 0
    assert main(["evaluate", str(run)]) == 2
    assert "fingerprint" in capfd.readouterr().err
