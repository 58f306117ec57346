"""What a run reports: metrics.jsonl, load.jsonl, TensorBoard's files, and the terminal."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from coterie.parallel.exchange_time import ExchangeTime
from coterie.parallel.monitors import JsonLines, LoadLines, RunFacts, TensorBoard, Terminal
from coterie.parallel.monitors.heat_map import dropped_map, heat_map, unrouted_map
from coterie.parallel.step import StepReport
from tests.parallel.tiny import load_of

LOAD = {1: [6, 0, 2, 4], 2: [4, 4]}
LAYERS = {
    1: load_of(
        [[5, 0, 1, 0], [1, 0, 1, 4]],
        dropped_E=[2, 0, 0, 1],
        tokens_M=[60, 40],
        unrouted_M=[0, 10],
        rows_R=[6, 6],
        entropy=1.5,
    ),
    2: load_of([[4, 0], [0, 4]], dropped_E=[0, 1], tokens_M=[60, 40], rows_R=[5, 3], entropy=0.5),
}


def facts(folder: Path, steps: int = 10, first: int = 0) -> RunFacts:
    return RunFacts(folder, steps, first, image_levels=5)


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        loss=5.0 - step / 8,
        router_losses={"balance": 0.25, "z": 0.5 / step},
        grad_norm=2.0,
        lr=0.125,
        tokens=100,
        layers=LAYERS,
        seconds=0.5,
        stop=False,
    )


# --- metrics.jsonl ------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_jsonl(folder: Path, first: int, until: int, every: int = 1, steps: int = 10) -> None:
    monitor = JsonLines(every)
    monitor.start(facts(folder, steps, first))
    for step in range(first + 1, until + 1):
        monitor.step(report(step))
        if step % 2 == 0:
            monitor.evaluation(step, {"loss": 4.0, "loss/text": 3.5})
    monitor.close()


def test_a_line_holds_the_step(tmp_path: Path) -> None:
    run_jsonl(tmp_path, 0, 2)
    start, first, second, evaluation = lines(tmp_path)
    assert start == {"step": 0, "layout": "one process", "ranks": 1}
    assert first == {
        "step": 1,
        "loss": 4.875,
        "router/balance": 0.25,
        "router/z": 0.5,
        "grad_norm": 2.0,
        "lr": 0.125,
        "tokens": 100,
        "tokens_per_second": 200.0,
        "skew": 2.0,
        "rank_skew": 1.25,
        "dropped": 4,
        "unrouted": 10,
        "dead": 1,
        "load": {"1": [6, 0, 2, 4], "2": [4, 4]},
    }
    assert second["step"] == 2 and second["router/z"] == 0.25
    assert evaluation == {"step": 2, "held_out/loss": 4.0, "held_out/loss/text": 3.5}


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_every_so_many_steps_and_the_last(every: int, expected: list[int], tmp_path: Path) -> None:
    run_jsonl(tmp_path, 0, 5, every, steps=5)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == expected


@pytest.mark.parametrize(
    "torn", ["", '{"step": 8, "lo', "null", "[1]", '{"loss": 3}', '{"step": "x"}', "\0\0\0"]
)
def test_after_a_resume_each_step_stands_there_once(torn: str, tmp_path: Path) -> None:
    run_jsonl(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    run_jsonl(tmp_path, 5, 10)
    found = lines(tmp_path)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in found if "held_out/loss" in line] == [2, 4, 6, 8, 10]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_of_a_step_that_is_kept_is_dropped(tmp_path: Path) -> None:
    run_jsonl(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"')
    run_jsonl(tmp_path, 3, 4)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 2, 3, 4, 4]


def test_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    monitor = JsonLines(1)
    monitor.start(facts(tmp_path))
    monitor.step(report(1))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    monitor.close()


def test_starts_and_failures_stand_there(tmp_path: Path) -> None:
    run_jsonl(tmp_path, 0, 7)
    run_jsonl(tmp_path, 5, 6)
    monitor = JsonLines(1)
    monitor.start(RunFacts(tmp_path, 10, 5, 5, layout="ep 2", ranks=2))
    monitor.step(report(6))
    monitor.failure(7, "step 7: the loss is nan")
    monitor.close()
    starts = [line for line in lines(tmp_path) if "layout" in line]
    assert [(line["step"], line["layout"], line["ranks"]) for line in starts] == [
        (0, "one process", 1),
        (5, "one process", 1),
        (5, "ep 2", 2),
    ]
    assert lines(tmp_path)[-1] == {"step": 7, "failure": "step 7: the loss is nan"}
    run_jsonl(tmp_path, 6, 7)  # the failed step is taken again
    assert not [line for line in lines(tmp_path) if "failure" in line]


WAITED = ExchangeTime(counts=0.001, exposed=0.002, step=0.5)
IN_FULL = replace(WAITED, communication=0.008)


def test_exchanges_between_ranks(tmp_path: Path) -> None:
    """Those of a step that was measured in full are told, whichever step it was."""
    monitor = JsonLines(2)
    monitor.start(facts(tmp_path))
    for step, time in enumerate((WAITED, WAITED, IN_FULL, None), 1):
        monitor.step(replace(report(step), exchange=time))
    monitor.close()
    _, *found = lines(tmp_path)
    waited = {"exchange/exposed_ms": 2.0, "exchange/exposed_share": 0.004, "exchange/counts_ms": 1}
    figures = [{k: v for k, v in line.items() if k.startswith("exchange/")} for line in found]
    assert [line["step"] for line in found] == [2, 3, 4]
    assert figures == [
        waited,
        {**waited, "exchange/communication_ms": 8.0, "exchange/hidden": 0.75},
        {},
    ]


def test_an_expert_is_dead_that_had_no_row_since_the_last_line(tmp_path: Path) -> None:
    monitor = JsonLines(2)
    monitor.start(facts(tmp_path))
    for step, rows in enumerate(([3, 0, 0], [0, 0, 3], [3, 0, 0], [3, 0, 0], [1, 1, 1]), 1):
        monitor.step(replace(report(step), layers={0: load_of([rows])}))
    monitor.step(replace(report(6), layers={0: load_of([[0, 0, 0]])}))
    monitor.close()
    assert [line["dead"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 0]


# --- load.jsonl ---------------------------------------------------------------------------------


def load_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "load.jsonl").read_text().splitlines()]


def run_load(folder: Path, first: int, until: int) -> None:
    """Expert 0 has as many rows as the step's number, and as much entropy."""
    monitor = LoadLines(4)
    monitor.start(facts(folder, 10, first))
    for step in range(first + 1, until + 1):
        of_step = {**LAYERS, 1: load_of([[step, 1], [0, 0]], tokens_M=[step, 0], entropy=step)}
        monitor.step(replace(report(step), layers=of_step))
    monitor.close()


def test_a_line_sums_the_steps_since_the_last(tmp_path: Path) -> None:
    run_load(tmp_path, 0, 10)
    found = load_lines(tmp_path)
    assert [(line["step"], line["steps"]) for line in found] == [(4, 4), (8, 4), (10, 2)]
    assert found[0]["layers"]["1"] == {
        "rows": [[10, 4], [0, 0]],
        "dropped": [0, 0],
        "tokens": [10, 0],
        "unrouted": [0, 0],
        "ranks": [14],
        "entropy": 3.0,  # (1² + 2² + 3² + 4²) / 10
    }
    assert found[2]["layers"]["2"] == {
        "rows": [[8, 0], [0, 8]],
        "dropped": [0, 2],
        "tokens": [120, 80],
        "unrouted": [0, 0],
        "ranks": [10, 6],
        "entropy": 0.5,
    }


def test_after_a_resume_each_step_is_counted_once(tmp_path: Path) -> None:
    run_load(tmp_path, 0, 7)  # stopped: the window under way is written
    assert [(line["step"], line["steps"]) for line in load_lines(tmp_path)] == [(4, 4), (7, 3)]
    run_load(tmp_path, 7, 9)
    run_load(tmp_path, 8, 10)  # killed: the checkpoint was of step 8
    found = load_lines(tmp_path)
    assert [(line["step"], line["steps"]) for line in found] == [(4, 4), (7, 3), (8, 1), (10, 2)]
    assert sum(line["layers"]["1"]["rows"][0][0] for line in found) == sum(range(11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load.jsonl"]


def test_a_dense_model_has_no_load(tmp_path: Path) -> None:
    monitor = LoadLines(1)
    monitor.start(facts(tmp_path))
    monitor.step(replace(report(1), layers={}))
    monitor.close()
    assert not list(tmp_path.iterdir())


# --- TensorBoard --------------------------------------------------------------------------------


def run_tensorboard(folder: Path, first: int, until: int, steps: int = 5) -> None:
    monitor = TensorBoard(every=2, heat_map_every=4)
    monitor.start(facts(folder, steps, first))
    for step in range(first + 1, until + 1):
        monitor.step(report(step))
    monitor.evaluation(until, {"loss": 4.0, "loss/image": 3.5})
    monitor.images(until, {"a digit two": np.array([[0, 1], [3, 4]])})
    monitor.close()


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def picture(event: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


def test_scalars_can_be_read_back(tmp_path: Path) -> None:
    run_tensorboard(tmp_path, 0, 5)
    found = events(tmp_path)
    points = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    assert points == {
        "train/loss": {2: 4.75, 4: 4.5, 5: 4.375},
        "train/grad_norm": dict.fromkeys((2, 4, 5), 2.0),
        "train/lr": dict.fromkeys((2, 4, 5), 0.125),
        "train/tokens_per_second": dict.fromkeys((2, 4, 5), 200.0),
        "router/balance": dict.fromkeys((2, 4, 5), 0.25),
        "router/z": {2: 0.25, 4: 0.125, 5: pytest.approx(0.1)},
        "router/skew": dict.fromkeys((2, 4, 5), 2.0),
        "router/rank_skew": dict.fromkeys((2, 4, 5), 1.25),
        "router/dropped": dict.fromkeys((2, 4, 5), 4.0),
        "router/unrouted": dict.fromkeys((2, 4, 5), 10.0),
        "router/dead": dict.fromkeys((2, 4, 5), 1.0),
        **{
            f"router/{name}/layer {layer}": dict.fromkeys((2, 4, 5), value)
            for name, *values in (
                ("entropy", 1.5, 0.5),
                ("skew", 2.0, 1.0),
                ("rank_skew", 1.0, 1.25),
                ("dropped", 3.0, 1.0),
                ("dead", 1.0, 0.0),
                ("unrouted text", 0.0, 0.0),
                ("unrouted image", 10.0, 0.0),
            )
            for layer, value in zip((1, 2), values, strict=True)
        },
        "held_out/loss": {5: 4.0},
        "held_out/loss/image": {5: 3.5},
    }


def test_scalars_of_exchanges_between_ranks(tmp_path: Path) -> None:
    monitor = TensorBoard(every=2, heat_map_every=4)
    monitor.start(facts(tmp_path))
    for step, time in enumerate((WAITED, WAITED, IN_FULL, None), 1):
        monitor.step(replace(report(step), exchange=time))
    monitor.close()
    found = events(tmp_path)
    tags = [tag for tag in found.Tags()["scalars"] if tag.startswith("exchange/")]
    points = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in tags}
    assert points == {
        "exchange/exposed_ms": dict.fromkeys((2, 3), 2.0),
        "exchange/exposed_share": dict.fromkeys((2, 3), pytest.approx(0.004)),
        "exchange/counts_ms": dict.fromkeys((2, 3), 1.0),
        "exchange/communication_ms": {3: 8.0},
        "exchange/hidden": {3: 0.75},
    }


def test_pictures_can_be_read_back(tmp_path: Path) -> None:
    run_tensorboard(tmp_path, 0, 5)
    found = events(tmp_path)
    expected = {
        "load": heat_map(LOAD),
        "load/text": heat_map({1: [5, 0, 1, 0], 2: [4, 0]}),
        "load/image": heat_map({1: [1, 0, 1, 4], 2: [0, 4]}),
        "dropped": dropped_map(LAYERS),
        "unrouted": unrouted_map(LAYERS, ("text", "image")),
        "ranks": heat_map({1: [6, 6], 2: [5, 3]}, "rank"),
    }
    assert set(found.Tags()["images"]) == {"generated/a digit two", *expected}
    for name, right in expected.items():
        events_of_name = found.Images(name)
        assert [event.step for event in events_of_name] == [4, 5]
        for event in events_of_name:  # sums of four steps, and of one
            np.testing.assert_array_equal(picture(event), right)
    (drawn,) = found.Images("generated/a digit two")
    assert drawn.step == 5
    grey = picture(drawn)
    assert grey.shape == (32, 32, 3)
    levels = np.array([[0, 63], [191, 255]]).repeat(16, 0).repeat(16, 1)
    np.testing.assert_array_equal(grey, np.stack([levels] * 3, -1))


def test_what_did_not_occur_is_not_drawn(tmp_path: Path) -> None:
    monitor = TensorBoard(1, 1)
    monitor.start(facts(tmp_path))
    monitor.step(replace(report(1), layers={0: load_of([[3, 0], [0, 0]], tokens_M=[3, 0])}))
    monitor.close()
    assert sorted(events(tmp_path).Tags()["images"]) == ["load", "load/text"]


def test_after_a_resume_each_point_is_there_once(tmp_path: Path) -> None:
    run_tensorboard(tmp_path, 0, 8, steps=20)  # the checkpoint was of step 5
    run_tensorboard(tmp_path, 5, 12, steps=20)
    found = events(tmp_path)
    assert [e.step for e in found.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [e.step for e in found.Images("load")] == [4, 8, 12]
    assert [e.step for e in found.Scalars("held_out/loss")] == [12]


# --- the heat map -------------------------------------------------------------------------------


def colour(value: float) -> npt.NDArray[np.uint8]:
    return np.round(np.array(matplotlib.colormaps["coolwarm"](value))[:3] * 255).astype(np.uint8)


def area(image_HWC: npt.NDArray[np.uint8], shade: npt.NDArray[np.uint8]) -> int:
    return int((abs(image_HWC.astype(int) - shade).max(-1) <= 1).sum())


EVEN, NONE, TWICE = colour(0.5), colour(0.0), colour(1.0)


def test_heat_map_shows_rows_over_the_even_share() -> None:
    image = heat_map({0: [5, 5, 5, 5]})
    assert image.dtype == np.uint8 and image.shape[2] == 3
    cell = area(image, EVEN) / 4
    assert cell > 100
    np.testing.assert_array_equal(image, heat_map({0: [80, 80, 80, 80]}))
    hot = heat_map({0: [10, 0, 5, 5]})
    for shade, cells in ((TWICE, 1), (NONE, 1), (EVEN, 2)):
        assert area(hot, shade) / cell == pytest.approx(cells, rel=0.1)
    # twice the share and more look alike
    assert area(heat_map({0: [20, 0, 0, 0]}), TWICE) / cell == pytest.approx(1, rel=0.1)


def test_heat_map_of_layers_with_different_numbers_of_experts() -> None:
    full = heat_map({0: [3, 3, 3, 3], 4: [1, 1, 1, 1]})
    ragged = heat_map({0: [3, 3], 4: [1, 1, 1, 1]})
    assert full.shape == ragged.shape
    assert area(ragged, EVEN) / area(full, EVEN) == pytest.approx(6 / 8, rel=0.03)
    white = np.array([255, 255, 255])
    missing = area(ragged, white) - area(full, white)
    assert missing / (area(full, EVEN) / 8) == pytest.approx(2, rel=0.1)
    taller = heat_map({layer: [1, 1] for layer in range(9)})
    assert taller.shape[0] > full.shape[0]
    assert heat_map({0: [0, 0]}).shape[2] == 3  # no rows at all


def test_maps_of_losses_show_parts_of_all() -> None:
    reds = matplotlib.colormaps["Reds"]
    layers = {0: load_of([[3, 4], [0, 0]], dropped_E=[1, 0], tokens_M=[8, 2], unrouted_M=[2, 2])}
    cell = area(heat_map({0: [5, 5]}), EVEN) / 2
    for image, parts in (
        (dropped_map(layers), (0.25, 0.0)),
        (unrouted_map(layers, ("text", "image")), (0.25, 1.0)),
    ):
        for part in parts:
            shade = np.round(np.array(reds(part))[:3] * 255).astype(np.uint8)
            assert area(image, shade) / cell == pytest.approx(1, rel=0.1)


# --- the terminal -------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=40), every=3)
    terminal.start(facts(tmp_path, steps=7))
    for step in range(1, 8):
        terminal.step(report(step))
    terminal.evaluation(7, {"loss": 4.0, "loss/text": 3.5})
    terminal.message("[bold]not markup[/bold] " + "x" * 60)
    terminal.close()
    assert out.getvalue().splitlines() == [
        f"step {step}/7  loss {loss}  200 tokens/s  skew 2.00  dropped 16.7%  unrouted 5.0%  dead 1"
        for step, loss in ((3, 4.625), (6, "4.250"), (7, 4.125))
    ] + [
        "step 7: held-out loss 4.000  loss/text 3.500 (nats per token)",
        "[bold]not markup[/bold] " + "x" * 60,
    ]


def test_only_what_is_lost_is_told(tmp_path: Path) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=80), every=1)
    terminal.start(facts(tmp_path, steps=2))
    terminal.step(replace(report(1), layers={}))
    terminal.step(replace(report(2), layers={0: load_of([[3, 3]], tokens_M=[6])}))
    terminal.close()
    assert out.getvalue().splitlines() == [
        f"step {step}/2  loss {loss}  200 tokens/s  skew 1.00"
        for step, loss in ((1, 4.875), (2, "4.750"))
    ]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=120, force_terminal=True, color_system=None))
    terminal.start(facts(tmp_path, steps=7, first=3))
    for step in range(4, 7):
        terminal.step(report(step))
    terminal.message("by the way")
    terminal.close()
    drawn = out.getvalue()
    assert "step 3/7" in drawn and "step 6/7" in drawn
    assert "loss 4.250  200 tokens/s  skew 2.00" in drawn
    assert "by the way" in drawn and "dead" not in drawn  # fewer steps than make a window
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")  # the cursor is shown again
