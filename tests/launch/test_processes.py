"""The local ranks: real processes that fail, hang, are killed and are interrupted."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.core.errors import UserError
from coterie.launch.processes import Ended, _Group, run_ranks
from coterie.launch.ranked import _tell

ROOT = Path(__file__).resolve().parents[2]

# A rank: does not import torch, so that it starts at once. `say` writes a file for the test.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
from coterie.core.errors import UserError
from coterie.launch import child
from coterie.launch.main import _fail
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
def say(name, text=""):
    partial = folder / f".{name}.{rank}"
    partial.write_text(text)
    partial.rename(folder / f"{name}.{rank}")
def wait_for(*names):
    while not all((folder / name).exists() for name in names):
        time.sleep(0.01)
def guarded(work):
    try:
        work()
    except Exception as error:
        sys.exit(_fail(error))
def together(error):  # both fail at the same moment
    say("ready"); wait_for("ready.0", "ready.1")
    raise error
child.attach()
say("pid", str(os.getpid()))
"""

RunRanks = Callable[..., Ended]


def tell(ended: Ended, run_dir: Path) -> int:
    """What `coterie train` tells of its ranks."""
    return _tell(ended, run_dir)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRanks:
    """``ranks(body, world, …)``: run a script as that many ranks; afterwards all must be gone."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(
        body: str,
        world: int = 2,
        grace: float = 5.0,
        leave: float = 5.0,
        prelude: str = PRELUDE,
    ) -> Ended:
        script = tmp_path / "rank.py"
        script.write_text(prelude + textwrap.dedent(body))
        ended = run_ranks([sys.executable, str(script), str(tmp_path)], world, grace, leave)
        for file in tmp_path.glob("pid.*"):
            assert gone(int(file.read_text()))
        return ended

    return run


def gone(pid: int) -> bool:
    """Neither running nor a zombie of ours."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


class Meanwhile:
    """Runs ``work`` in a thread for a ``with`` block."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._thread.join()


def test_each_rank_finds_its_place(
    ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ranks("say('env', json.dumps(dict(os.environ)))", world=3) == Ended(None, False)
    found = [json.loads((tmp_path / f"env.{rank}").read_text()) for rank in range(3)]
    assert [env["RANK"] for env in found] == [env["LOCAL_RANK"] for env in found] == list("012")
    assert {env["WORLD_SIZE"] for env in found} == {"3"}
    assert len({env["MASTER_PORT"] for env in found}) == 1
    assert {env["OMP_NUM_THREADS"] for env in found} == {
        str(max(1, len(os.sched_getaffinity(0)) // 3))
    }


def test_threads_that_the_user_set_stay(
    ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    ranks("say('threads', os.environ['OMP_NUM_THREADS'])", world=1)
    assert (tmp_path / "threads.0").read_text() == "5"


def test_a_killed_rank_ends_the_others_and_is_named(
    ranks: RunRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    ended = ranks(
        """
        if rank == 1:
            wait_for("pid.0", "pid.2")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """,
        world=3,
    )
    assert time.monotonic() - start < 5
    assert tell(ended, tmp_path) == 1
    err = capsys.readouterr().err
    assert err.startswith("coterie: rank 1 was ended by SIGKILL") and err.count("\n") == 1
    assert "nothing was saved yet" in err


def test_the_sentence_says_how_to_resume(
    ranks: RunRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert tell(ranks("sys.exit(rank * 7)"), tmp_path) == 1
    expected = f"coterie: rank 1 ended with exit code 7; go on with: coterie resume {tmp_path}\n"
    assert capsys.readouterr().err == expected


def test_a_rank_that_ignores_sigterm_is_killed(ranks: RunRanks) -> None:
    ended = ranks(
        """
        if rank == 1:
            wait_for("deaf.0")
            sys.exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("deaf")
        time.sleep(60)
        """,
        grace=0.2,
    )
    assert ended.failure is not None and (ended.failure.rank, ended.failure.code) == (1, 1)


def test_a_mistake_that_all_ranks_meet_is_told_once(
    ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = ranks('guarded(lambda: together(UserError("data.path: it is not there")))')
    with pytest.raises(UserError, match=r"^data\.path: it is not there$"):
        tell(ended, tmp_path)
    assert capfd.readouterr().err == ""


def test_one_traceback_of_an_error_that_all_ranks_meet(
    ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = ranks('guarded(lambda: together(RuntimeError("a bug")))')
    assert tell(ended, tmp_path) == 1
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1 and err.count("RuntimeError: a bug") == 1
    assert "failed as shown above" in err.splitlines()[-1]


def test_a_rank_that_reported_but_cannot_exit_is_ended(ranks: RunRanks) -> None:
    ended = ranks(
        """
        if rank == 0:
            child.report(UserError("stuck in a destructor"))
        time.sleep(60)
        """
    )
    assert ended.failure is not None and ended.failure.text == "stuck in a destructor"


@pytest.mark.parametrize(
    ("codes", "said", "rank"),
    [
        ({0: 1, 1: -9}, [], 1),  # a kill breaks the others' connections
        ({0: 1, 1: -9}, [0], 1),
        ({0: 1, 1: 1}, [1, 0], 1),  # the first to say so
        ({0: None, 1: 3}, [], 1),
        ({0: 0, 1: None}, [], None),
    ],
)
def test_the_cause_is_blamed_not_the_consequence(
    codes: dict[int, int | None], said: list[int], rank: int | None
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        group = _Group(ours, grace=1.0)
        for number in said:
            theirs.send(json.dumps({"rank": number, "code": 1, "text": "lost peer"}).encode())
        group._read_reports()
        failure = group._first_failure(codes)
    assert (failure.rank if failure else None) == rank


def test_other_output_passes_through(ranks: RunRanks, capfd: pytest.CaptureFixture[str]) -> None:
    ranks("print('out', rank, flush=True); print('err', rank, file=sys.stderr)", world=1)
    seen = capfd.readouterr()
    assert "out 0" in seen.out and "err 0" in seen.err


def test_ctrl_c_reaches_each_rank_once(
    ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        wait_until(lambda: all((tmp_path / f"ready.{rank}").exists() for rank in range(2)))
        os.kill(os.getpid(), signal.SIGINT)

    with Meanwhile(interrupt):
        ended = ranks(
            """
            count = []
            signal.signal(signal.SIGINT, lambda *_: count.append(1))
            child.report_training()
            say("ready")
            while not count:
                time.sleep(0.01)
            time.sleep(0.3)
            say("interrupts", str(len(count)))
            sys.exit(130)
            """
        )
    assert ended == Ended(None, True)
    assert [(tmp_path / f"interrupts.{rank}").read_text() for rank in range(2)] == ["1", "1"]
    (tmp_path / "config.yaml").write_text("")
    assert tell(ended, tmp_path) == 130
    err = capfd.readouterr().err
    assert "SIGINT: saving a checkpoint and leaving" in err
    assert f"interrupted; go on with: coterie resume {tmp_path}\n" in err


@pytest.fixture
def interrupted(ranks: RunRanks, tmp_path: Path) -> RunRanks:
    """``ranks``, sent SIGINT once both have said that they are ready."""

    def run(body: str, **settings: float) -> Ended:
        def interrupt() -> None:
            wait_until(lambda: all((tmp_path / f"ready.{rank}").exists() for rank in range(2)))
            os.kill(os.getpid(), signal.SIGINT)

        with Meanwhile(interrupt):
            return ranks(body, **settings)

    return run


@pytest.mark.parametrize("leave_with", ["sys.exit(130)", "guarded(lost_peer)", "time.sleep(60)"])
def test_ctrl_c_ends_a_rank_that_waits_for_the_others_in_its_start_up(
    leave_with: str, interrupted: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = interrupted(
        f"""
        def lost_peer():
            raise RuntimeError("connection closed by peer")
        if rank == 1:
            child.report_training()  # one rank alone cannot save a checkpoint
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in C++, where Python hears nothing
            say("ready")
            time.sleep(60)
        say("ready")
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            {leave_with}
        """,
        grace=0.3,
        leave=60.0,
    )
    assert ended == Ended(None, True)
    assert tell(ended, tmp_path) == 130
    err = capfd.readouterr().err
    assert "SIGINT: leaving, training had not begun\n" in err
    assert "checkpoint" not in err and "Traceback" not in err


TRAINING = """
count = []
signal.signal(signal.SIGINT, lambda *_: count.append(1))
child.report_training()
say("ready")
while not count:
    time.sleep(0.01)
if rank == 0:
    sys.exit(130)
"""


def test_a_rank_that_still_saves_may_finish(interrupted: RunRanks, tmp_path: Path) -> None:
    body = f"""{TRAINING}
first = int((folder / "pid.0").read_text())
try:
    while True:
        os.kill(first, 0)
        time.sleep(0.01)
except ProcessLookupError:  # the parent has seen it leave
    say("saved")
sys.exit(130)
"""
    assert interrupted(body, grace=0.0, leave=60.0) == Ended(None, True)
    assert (tmp_path / "saved.1").exists()


def test_a_rank_that_does_not_leave_with_the_others_is_killed(
    interrupted: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = interrupted(f"{TRAINING}\ntime.sleep(60)", grace=60.0, leave=0.3)
    assert tell(ended, tmp_path) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("coterie: rank 1 had not left 0.3 s after another one and was killed; ")


def test_a_second_ctrl_c_kills_and_blames_nobody(
    ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt_twice() -> None:
        wait_until((tmp_path / "ready.0").exists)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until((tmp_path / "heard.0").exists)
        os.kill(os.getpid(), signal.SIGINT)

    with Meanwhile(interrupt_twice):
        ended = ranks(
            """
            signal.signal(signal.SIGINT, lambda *_: say("heard"))
            child.report_training()
            say("ready")
            while True:
                time.sleep(0.01)
            """,
            world=1,
        )
    assert ended == Ended(None, True)
    assert tell(ended, tmp_path) == 130
    assert capfd.readouterr().err.splitlines()[-1].startswith("coterie: interrupted; ")


def test_ctrl_c_before_a_rank_is_ready_is_kept(ranks: RunRanks, tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_until((tmp_path / "early.0").exists)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # for a signal that is not blocked to end it
        (tmp_path / "go").touch()

    late = PRELUDE.replace("child.attach()", "say('early'); wait_for('go'); say('alive')")
    with Meanwhile(interrupt):
        ended = ranks(
            """
            try:
                child.attach()
            except KeyboardInterrupt:
                say("kept")
                sys.exit(130)
            """,
            world=1,
            prelude=late,
        )
    assert ended == Ended(None, True)
    assert (tmp_path / "alive.0").exists() and (tmp_path / "kept.0").exists()


def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(PRELUDE + "time.sleep(60)")
    command = [sys.executable, str(script), str(tmp_path)]
    parent = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            f"from coterie.launch.processes import run_ranks; run_ranks({command!r}, 2)",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        files = [tmp_path / f"pid.{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() for file in files))
    finally:
        parent.kill()
        parent.wait()
    pids = [int(file.read_text()) for file in files]
    wait_until(lambda: all(ended_or_zombie(pid) for pid in pids), 5.0)


def ended_or_zombie(pid: int) -> bool:
    """An orphan's zombie is for init to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_signal_handlers_are_put_back(ranks: RunRanks) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGCHLD)]
    ranks("pass", world=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGCHLD)] == before
