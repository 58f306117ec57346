"""How an exchange is cut, where the config leaves it open: measured once, and then remembered."""

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from coterie.comm.exchange.config import ExchangeConfig
from coterie.launch.tuning import remembered
from coterie.parallel import tuning
from coterie.parallel.tuning import candidates, choose, is_open
from tests.launch.kill_resume import command, environment

OPEN = ExchangeConfig(kind="overlapped")


def test_what_is_left_open_is_tried() -> None:
    plain, *cuts = candidates(OPEN)
    assert plain.kind == "all_to_all"
    assert {(cut.pieces, cut.slabs) for cut in cuts} == {
        (1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)
    }  # fmt: skip
    _, *cuts = candidates(ExchangeConfig(kind="overlapped", pieces=3))
    assert [(cut.pieces, cut.slabs) for cut in cuts] == [(3, 1), (3, 2)]
    _, *cuts = candidates(ExchangeConfig(kind="overlapped", slabs=16))
    assert [(cut.pieces, cut.slabs) for cut in cuts] == [(1, 16)]


def test_what_is_left_open_of_a_fused_one() -> None:
    plain, *ways = candidates(ExchangeConfig(kind="fused"))
    assert plain.kind == "all_to_all"
    assert len(ways) == 32 and {(w.communication, w.slabs, w.tile_columns) for w in ways} == {
        (blocks, slabs, columns)
        for blocks in (8, 16, 24, 32)
        for slabs in (1, 2, 4, 8)
        for columns in (128, 256)
    }
    plain, *ways = candidates(ExchangeConfig(kind="fused", communication=5, tile_columns=128))
    assert [(way.communication, way.slabs) for way in ways] == [(5, 1), (5, 2), (5, 4), (5, 8)]
    assert {way.tile_columns for way in ways} == {128}
    # a resumed run reads from its config what was chosen
    for one in (plain, *ways):
        assert ExchangeConfig.model_validate(one.model_dump()) == one
    assert is_open(ExchangeConfig(kind="fused", communication=5, slabs=3))
    assert not is_open(ExchangeConfig(kind="fused", communication=5, slabs=3, tile_columns=256))


@pytest.mark.parametrize(("fastest", "chosen"), [(0.5, True), (0.94, True), (0.96, False)])
def test_all_to_all_stays_unless_it_is_slower(fastest: float, chosen: bool) -> None:
    found = candidates(OPEN)
    seconds = [1.0, *(2.0 for _ in found[1:])]
    seconds[5] = fastest
    assert choose(OPEN, seconds) == (found[5] if chosen else found[0])


def test_the_luckiest_of_the_heats_must_win_the_duel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by candidate and turn: 3 is as fast as it gets in the heats, and slow afterwards."""
    count = len(candidates(OPEN))
    turns = dict.fromkeys(range(count), 0)
    lucky = 3

    def trial(candidate: int) -> float:
        turns[candidate] += 1
        if candidate == 0:
            return 1.0
        if candidate == lucky:
            return 0.1 if turns[lucky] <= 10 else 1.2
        return 0.5 + candidate

    monkeypatch.setattr(tuning, "_trials", lambda layer, ranks: trial)
    monkeypatch.setattr(tuning, "_slowest", lambda seconds, ranks: seconds)
    layer: Any = SimpleNamespace(moe=SimpleNamespace(exchange=OPEN))
    ranks: Any = None
    seconds = tuning.measure(layer, ranks)
    assert seconds[0] == 1.0 and seconds[lucky] == 1.2
    assert all(math.isinf(time) for n, time in enumerate(seconds) if n not in (0, lucky))
    assert choose(OPEN, seconds).kind == "all_to_all"
    assert turns[lucky] == 1 + 2 + 3 + 4 + 7 and turns[0] == 1 + 7
    assert {turns[n] for n in range(1, count) if n != lucky} == {1 + 2}  # far off after a heat


def test_other_tiles_are_tried_by_the_best_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 128 columns all are twice as fast; four of 16 come so far as to be tried with them."""
    fused = ExchangeConfig(kind="fused")
    found = candidates(fused)
    turns = dict.fromkeys(range(len(found)), 0)

    def trial(candidate: int) -> float:
        turns[candidate] += 1
        way = found[candidate]
        if way.kind == "all_to_all":
            return 10.0
        assert way.communication and way.slabs
        return (1 + way.slabs / 100 + (way.communication != 24)) * (way.tile_columns or 0) / 256

    monkeypatch.setattr(tuning, "_trials", lambda layer, ranks: trial)
    monkeypatch.setattr(tuning, "_slowest", lambda seconds, ranks: seconds)
    layer: Any = SimpleNamespace(moe=SimpleNamespace(exchange=fused))
    ranks: Any = None
    seconds = tuning.measure(layer, ranks)
    chosen = choose(fused, seconds)
    assert (chosen.communication, chosen.slabs, chosen.tile_columns) == (24, 1, 128)
    narrow = {n: count for n, count in turns.items() if count and found[n].tile_columns == 128}
    assert {found[n].communication for n in narrow} == {24}
    best = found.index(chosen)
    assert narrow.pop(best) == 1 + 4 + 7 and list(narrow.values()) == [1 + 4] * 3


@pytest.fixture
def overlapped(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """good.yaml on two ranks with an exchange that is to be measured; returns the cache."""
    tree = yaml.safe_load(Path("good.yaml").read_text())
    tree["model"]["moe"]["exchange"] = {"kind": "overlapped"}
    tree["parallel"] = {"ep": 2}
    Path("good.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("COTERIE_CACHE", str(place / "cache"))
    return place / "cache" / "exchange"


def run(*arguments: str) -> str:
    """What the command tells, on two ranks."""
    line = command(*arguments, "--nproc", "2")
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def trained(name: str) -> tuple[dict[str, Any], str]:
    """(the exchange in the run's config, what it told)"""
    told = run("train", "good.yaml", "--run-dir", name)
    config = yaml.safe_load(Path(name, "config.yaml").read_text())
    return config["model"]["moe"]["exchange"], told


def test_measured_once(overlapped: Path) -> None:
    first, told = trained("one")
    assert "measuring which exchange" in told
    assert first["kind"] == "all_to_all" or first["pieces"] * first["slabs"] <= 8
    (file,) = overlapped.iterdir()
    times = [found["seconds"] for found in json.loads(file.read_text())["measured"]]
    assert len(times) == len(candidates(OPEN)) and all(time is None or time > 0 for time in times)

    # what the file says is believed: the slowest is the fastest now
    tree = json.loads(file.read_text())
    tree["measured"][9]["seconds"] = 1e-9
    file.write_text(json.dumps(tree))
    second, told = trained("two")
    assert second == tree["measured"][9]["exchange"]
    assert "measuring" not in told
    assert "overlapped, 8 pieces, 1 slab: 1e-06 ms" in told and f"(measured before: {file})" in told

    # a run that goes on is cut as it was, whatever the cache says
    file.unlink()
    assert "measuring" not in run("resume", "two", "train.steps=4")
    assert not list(overlapped.iterdir())


@pytest.mark.parametrize(
    "damage", [None, "", "{", "{}", "[]", '{"measured": [{"seconds": 1}]}', '{"measured": [1]}']
)
def test_a_damaged_memory_is_none(tmp_path: Path, damage: str | None) -> None:
    if damage is not None:
        (tmp_path / "file").write_text(damage)
    assert remembered(tmp_path / "file", OPEN) is None
