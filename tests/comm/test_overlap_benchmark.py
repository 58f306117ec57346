"""benchmarks/overlap.py: runs on hosts, tells of ranks that fail, and counts as it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overlap
from benchmarks.hosts import alone, hosts, left
from benchmarks.overlaps import lab
from benchmarks.overlaps.cases import COMMUNICATION, COMPUTE, PLAIN, TUNED, Case
from benchmarks.overlaps.figures import Turn, summarise
from benchmarks.overlaps.usage import Usage


@pytest.mark.skipif(lab.missing() is not None, reason=f"hosts: {lab.missing()}")
def test_a_case_is_measured_once_and_the_hosts_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["overlap.py", "--quick", "--no-peers", "--families", "Mixtral", "--hosts", "2"]
    command += ["--rates", "1000", "--json", str(tmp_path / "overlap.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])

    def run() -> str:
        assert overlap.main() == 0, capsys.readouterr().err
        return capsys.readouterr().out

    case = Case("Mixtral", 2, 1000)
    assert case.name in run()
    (result,) = json.loads((tmp_path / "overlap.json").read_text())["results"].values()
    names = [COMPUTE, COMMUNICATION, PLAIN, "two chunks", "overlapped 2x1", TUNED]
    assert list(result["contenders"]) == names
    assert result["differs"].keys() == set(names[3:])
    for passes in result["contenders"].values():
        assert passes["both"]["ms"] > passes["forward"]["ms"] > 0
        assert 0 < passes["both"]["main"] + passes["both"]["network"] <= 1
    # a message as long as those cannot have come faster than the link lets it
    size = result["shape"]
    least = 2 * size["T"] * size["K"] / 2 * size["D"] * 4 * 8 / 1000e6
    assert result["contenders"][COMMUNICATION]["forward"]["ms"] > 0.8e3 * least
    assert "overlapped 2x1" in (tmp_path / "overlap.md").read_text()
    assert case.name not in run()
    with alone():
        assert left() == []


@pytest.mark.skipif(lab.missing() is not None, reason=f"hosts: {lab.missing()}")
def test_hosts_are_gone_afterwards_also_those_of_a_killed_process() -> None:
    killed = (
        "import os; from benchmarks.hosts import hosts\n"
        "with hosts(3) as made: print(len(made), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", killed], stdout=subprocess.PIPE, cwd=lab.ROOT)
    assert (done.returncode, done.stdout) == (-9, b"3\n")
    with pytest.raises(ZeroDivisionError), hosts(1):
        assert left() == [("netns", "coterie0"), ("link", "coterie"), ("link", "coterie0p")]
        raise ZeroDivisionError
    with alone():
        assert left() == []


def test_a_rank_that_hangs_shows_where(tmp_path: Path) -> None:
    hangs = "import faulthandler, threading; faulthandler.enable(); threading.Event().wait()"
    ranks = []
    for number, program in enumerate((hangs, "raise SystemExit('no such expert')")):
        with (tmp_path / f"output_{number}").open("w") as output:
            command = [sys.executable, "-c", program]
            ranks.append(subprocess.Popen(command, stdout=output, stderr=output, text=True))
    hung = lab.wait(ranks, time_limit=1.0)
    story = lab.story(ranks, hung, tmp_path)
    assert "rank 0 hung" in story and "threading.py" in story
    assert "rank 1 ended with exit code 1:\nno such expert" in story


def spent(wall: float, main: float, waited: float = 0.0) -> Usage:
    return Usage(wall, main, queued=wall / 10, network=wall / 5, idle=wall / 2, waited=waited)


def test_figures_of_a_pass_are_those_of_its_slowest_rank() -> None:
    def turns(*both: Usage) -> list[Turn]:
        return [{"forward": usage, "both": usage} for usage in both]

    ours = "overlapped 4x2"
    every = [
        {
            COMPUTE: turns(spent(1.0, 1.0), spent(2.0, 2.0)),
            COMMUNICATION: turns(spent(1.0, 0.0), spent(1.0, 0.0)),
            PLAIN: turns(spent(2.0, 1.0), spent(3.0, 2.0)),
            ours: turns(spent(1.0, 1.0), spent(2.0, 1.0)),
        },
        {
            COMPUTE: turns(spent(1.0, 1.0), spent(1.0, 1.0)),
            COMMUNICATION: turns(spent(2.0, 0.0), spent(2.0, 0.0)),
            PLAIN: turns(spent(3.0, 1.0), spent(4.0, 1.0)),
            ours: turns(spent(2.0, 0.5, waited=1.5), spent(2.0, 0.5, waited=0.5)),
        },
    ]
    found = summarise(every)
    assert found[COMPUTE]["both"]["ms"] == 1500 and found[PLAIN]["forward"]["ms"] == 3500
    figures = found[ours]["both"]
    assert figures["all_ms"] == [2000, 2000]
    assert figures["speed_up"] == pytest.approx((3 / 2 + 4 / 2) / 2)
    # (1 - (2 - 1) / 2, 1 - (2 - 2) / 2)
    assert figures["hidden"] == pytest.approx(0.75)
    assert figures["main"] == pytest.approx(3 / 8)  # of two cores for 4 s
    assert figures["waited"] == pytest.approx(2 / 8)
    assert figures["main"] + figures["network"] + figures["idle"] + figures["other"] == 1


def test_a_wider_layer_has_more_to_compute() -> None:
    case = Case("Phi-3.5", 2, 200)
    shape = case.first_guess(0.2)
    wider = case.better(shape, compute=0.05, communication=0.1, seconds=0.2, ratio=1.0)
    assert wider.D > shape.D and wider.F / wider.D == pytest.approx(1.5625, rel=0.01)
    assert case.better(shape, compute=0.1, communication=0.1, seconds=0.2, ratio=1.0) == shape
    longer = case.better(shape, compute=0.1, communication=0.1, seconds=0.4, ratio=1.0)
    assert longer.D == shape.D and longer.T == pytest.approx(2 * shape.T, rel=0.2)
