"""``coterie plan`` as a user types it."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coterie.launch.main import main
from coterie.launch.plan_command import machine_names

ROOT = Path(__file__).resolve().parents[2]
LARGE = [
    "deepseek_v3_like",
    "--world",
    "1024",
    "parallel={pp: 16, ep: 64, dp_shard: 64}",
    "train.accumulation=64",
    "train.recompute=full",
    "evaluation.batch=256",
]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_all_of_1024_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *LARGE)
    assert [row["rank"] for row in plan["ranks"]] == list(range(1024))
    assert sorted(rank for kind in plan["kinds"] for rank in kind["ranks"]) == list(range(1024))
    for axis, groups in plan["groups"].items():
        assert sorted(rank for group in groups for rank in group) == list(range(1024)), axis
    stored = sum(row["dense_parameters"] + row["expert_parameters"] for row in plan["ranks"])
    # 671 billion parameters, less DeepSeek-V3's MLA and multi-token prediction, each stored once
    assert 0.65e12 < stored < 0.70e12
    assert plan["nodes"] == 128 and plan["fits"]
    assert 0.2 < plan["step"]["bubble_share"] < 0.3


def test_1024_ranks_take_less_than_10_seconds_of_processor_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "coterie.launch", "plan", *LARGE]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "good.yaml", "--world", "2", "--machine", "cpu", "--ranks"]) == 0
    shown = capsys.readouterr().out
    for part in ("2 ranks on 1 nodes", "dp_replicate 2", "memory", "all-reduce", "update", "MFU"):
        assert part in shown
    assert "does not fit" not in shown


def test_skew_costs_memory_and_time(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("good.yaml", "--world", "2", "parallel.ep=2", "--machine", "cpu")
    even = planned(capsys, *arguments)
    hot = planned(capsys, *arguments, "--skew", "1.8")
    assert hot["peak_bytes"] > even["peak_bytes"]
    assert hot["step"]["total"] > even["step"]["total"]
    assert hot["step"]["model_flops"] == even["step"]["model_flops"]


def test_search_ranks_layouts_that_work(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "configs" / "machines" / "cpu.yaml").read_text()
    Path("swift.yaml").write_text(text.replace("latency: 9880.0", "latency: 0"))
    arguments = ("good.yaml", "--world", "4", "--machine", "swift.yaml")
    found = planned(capsys, *arguments, "--search")
    assert found["fitting"] <= found["possible"]
    steps = [best["step"]["total"] for best in found["best"]]
    assert steps == sorted(steps) and len(steps) == 5
    for best in found["best"]:
        again = planned(capsys, *arguments, *best["overrides"])
        assert again["step"] == best["step"] and again["peak_bytes"] == best["peak_bytes"]
        assert again["exchange"] == best["exchange"]
        assert again["exchange"]["route"] == (again["exchange"]["best"] or "rows")
        named = [text for text in best["overrides"] if "route" in text]
        assert bool(named) == bool(again["exchange"]["seconds"])
    assert {best["exchange"]["best"] for best in found["best"]} - {None, "rows"}


def test_the_best_route_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ("--world", "16", "--nodes", "2", "parallel={ep: 16}", "model.layers=4")
    batch = ("train.global_batch=16", "train.accumulation=1", "evaluation.batch=16")
    arguments = ("deepseek_v3_like", *ranks, *batch)
    rows = planned(capsys, *arguments)
    seconds = rows["exchange"]["seconds"]
    assert (rows["exchange"]["route"], rows["exchange"]["best"]) == ("rows", "nodes")
    assert seconds["nodes"] < seconds["tokens"] < seconds["rows"]
    nodes = planned(capsys, *arguments, "model.moe.exchange.route=nodes")
    assert nodes["exchange"] == {"route": "nodes", "best": "nodes", "seconds": seconds}
    assert nodes["step"]["total"] < rows["step"]["total"]
    axes = {c["axis"] for found in nodes["traffic"] for c in found if c["op"] == "all-to-all"}
    assert axes == {"expert_across", "expert_node"}

    def said(*more: str) -> str:
        assert main(["plan", *arguments, *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert f"exchange: route nodes would take {seconds['nodes'] * 1e3:.1f} ms" in (shown := said())
    assert "set model.moe.exchange.route=nodes" in shown
    for name in ("rows", "tokens"):
        assert f"{name} {seconds[name] * 1e3:.1f} ms" in shown
    assert "exchange: route nodes takes" in (shown := said("model.moe.exchange.route=nodes"))
    assert "set model.moe" not in shown
    assert main(["plan", "good.yaml", "--world", "2"]) == 0
    assert "exchange" not in capsys.readouterr().out  # between one rank


def test_nodes_as_a_route_need_even_nodes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("good.yaml", "--world", "4", "parallel.ep=4", "model.moe.exchange.route=nodes")
    said = refused(capsys, *arguments, "parallel.node=3")
    assert "parallel.node is 3, which spreads the 4 ranks" in said
    six = ("--world", "6", "--nodes", "2", "parallel.ep=2", "train.global_batch=6")
    assert "which spreads the 2 ranks" in refused(capsys, *arguments, *six, "evaluation.batch=6")
    assert planned(capsys, *arguments, "--nodes", "2")["exchange"]["route"] == "nodes"
    assert planned(capsys, *arguments, "--nodes", "1")["exchange"]["route"] == "tokens"


def test_mistakes_end_in_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "parallel.ep is 3, but model.moe.experts.count 4 does not divide by it"
    assert rule in refused(capsys, "good.yaml", "--world", "3", "parallel.ep=3")
    assert "'h101'" not in (
        said := refused(capsys, "good.yaml", "--world", "2", "--machine", "h101")
    )
    assert "did you mean 'h100'?" in said and all(name in said for name in machine_names())
    assert "cannot be spread" in refused(capsys, "good.yaml", "--world", "4", "--nodes", "3")
    Path("bad.yaml").write_text("name: mine\ndevice: abacus\n")
    assert "bad.yaml: device" in refused(
        capsys, "good.yaml", "--world", "2", "--machine", "bad.yaml"
    )
    small = Path("small.yaml")
    text = (ROOT / "configs" / "machines" / "cpu.yaml").read_text()
    small.write_text(text.replace("memory: 12.6", "memory: 0.00001"))
    said = refused(capsys, "good.yaml", "--world", "2", "--machine", "small.yaml", "--search")
    assert "fits" in said and "use more processes" in said


@pytest.mark.parametrize("name", machine_names())
def test_shipped_machines_are_read(name: str, place: Path, capsys: Any) -> None:
    plan = planned(capsys, "good.yaml", "--world", "2", "--machine", name)
    assert plan["machine"]["memory"] > 1 and plan["step"]["total"] > 0
