"""`coterie report`: the page of a run, as a browser shows it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from coterie.launch.main import main
from coterie.launch.report.curves import POINTS, thinned
from coterie.launch.report.loads import thinned as columns_of
from coterie.launch.report.records import LoadRecord
from coterie.parallel.exchange_time import ExchangeTime
from coterie.parallel.load import LayerLoad
from coterie.parallel.monitors import JsonLines, LoadLines, RunFacts
from coterie.parallel.step import StepReport
from tests.launch.browser import look, picture
from tests.launch.conftest import GOOD
from tests.parallel.tiny import load_of

RUN = Path("runs/shown")
HOT, NONE = 1, 2  # experts of layer 0: one with three times its share, one without rows
COLUMN = 5


def layers_of(step: int) -> dict[int, LayerLoad]:
    """Two layers of four experts; text goes to the first half of the second."""
    hot = load_of(
        [[2, 6, 0, 0], [0, 0, 0, 0]],
        dropped_E=[0, 2, 0, 0],
        tokens_M=[8, 4],
        unrouted_M=[0, 1],
        rows_R=[8, 0],
        entropy=0.5,
    )
    even = load_of([[2, 2, 0, 0], [0, 0, 2, 2]], tokens_M=[8, 4], rows_R=[4, 4], entropy=1.0)
    return {0: hot, 1: even}


def report_of(step: int, layers: Callable[[int], dict[int, LayerLoad]]) -> StepReport:
    loss = 5 - step / 100 if step != 13 else 40.0
    return StepReport(step, loss, {"balance": 0.1}, 1.0, 1e-3, 12, layers(step), 0.5, False)


def exchange_of(step: int) -> ExchangeTime:
    """Every fifth step is measured in full."""
    communication = 0.1 / step if step % 5 == 0 else None
    return ExchangeTime(0.001, 0.025 / step, 0.5 / step, communication)


def record(
    folder: Path,
    first: int,
    until: int,
    *,
    steps: int = 20,
    every: int = 1,
    layers: Callable[[int], dict[int, LayerLoad]] = layers_of,
    failure: str = "",
    layout: str = "ep 2",
    held_out: float = 4.5,
    loss: str = "loss",
    exchange: Callable[[int], ExchangeTime | None] = lambda step: None,
) -> None:
    """What a run writes that goes from one step to another."""
    monitors = [JsonLines(every), LoadLines(COLUMN)]
    for monitor in monitors:
        monitor.start(RunFacts(folder, steps, first, 17, layout, 2))
        for step in range(first + 1, until + 1):
            monitor.step(replace(report_of(step, layers), exchange=exchange(step)))
            if step % 10 == 0:
                monitor.evaluation(step, {loss: held_out, f"{loss}/text": held_out + 1})
        if failure:
            monitor.failure(until + 1, failure)
        monitor.close()


@pytest.fixture
def shown(place: Path, dataset: Path) -> Path:
    """The folder of a run of 20 steps, with nothing recorded yet."""
    RUN.mkdir(parents=True)
    tree = yaml.safe_load(GOOD.replace("DATA", str(dataset)))
    tree["train"]["steps"] = 20
    (RUN / "config.yaml").write_text(yaml.safe_dump(tree))
    return RUN


def made(capsys: pytest.CaptureFixture[str], *args: str) -> Path:
    assert main(["report", str(RUN), *args]) == 0, capsys.readouterr().err
    return Path(capsys.readouterr().out.strip())


def without_errors(page: Path, script: str = "") -> tuple[str, Any]:
    text, answer = look(page.resolve(), script)
    assert "data-error" not in text, re.search('data-error="[^"]*"', text)
    return text, answer


def points(text: str, chart: str) -> dict[str, int]:
    """How many points each line of a chart has."""
    (drawn,) = re.findall(rf'<article[^>]* id="{chart}">.*?</article>', text, re.DOTALL)
    curves = re.findall(r'<path class="curve"[^>]*>', drawn)
    found = {}
    for curve in curves:
        name, line = (re.search(rf'{key}="([^"]*)"', curve) for key in ("data-name", " d"))
        assert name and line and "NaN" not in line[1]
        found[name[1]] = len(re.findall(r"[ML]", line[1]))
    return found


def cells(text: str, chart: str) -> tuple[int, int, int]:
    """Rows, columns and drawn cells of a heat map."""
    (drawn,) = re.findall(rf'<article[^>]* id="{chart}">.*?</article>', text, re.DOTALL)
    (canvas,) = re.findall(r"<canvas[^>]*>", drawn)
    numbers = {
        key: re.search(f'data-{key}="(\\d+)"', canvas) for key in ("rows", "columns", "cells")
    }
    rows, columns, number = (int(found[1]) for found in numbers.values() if found)
    return rows, columns, number


def words(text: str) -> str:
    """What can be read, one space between words."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", bare))


def test_a_run_is_drawn_as_it_was(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(shown, 0, 20)
    page = made(capsys)
    assert page == shown / "report.html"
    text, _ = without_errors(page)
    assert points(text, "loss") == {"training": 20, "held-out": 2, "held-out text": 2}
    for chart, name in (
        ("throughput", "throughput"),
        ("grad_norm", "gradient norm"),
        ("lr", "learning rate"),
        ("router", "balance"),
    ):
        assert points(text, chart) == {name: 20}
    assert cells(text, "experts") == (4, 4, 16)  # experts × columns
    assert cells(text, "layers") == (2, 4, 8)
    for figure in ("skew", "rank_skew", "entropy", "dropped", "unrouted", "dead"):
        assert cells(text, figure) == (2, 4, 8), figure
    read = words(text)
    for said in (
        "tiny",
        "finished, 20 steps",
        "training loss 4.8000 step 20",
        "held-out loss 4.5000 step 20, text 5.500",
        "2 layers, width 16",
        "4 of hidden width 16 in 2 layers",
        "top_k, 2 experts for a token",
        "2 processes: ep 2",
        "nats per token",
        "Experts of layer 0 over time, all tokens",
        "All layers, steps 16 to 20, all tokens",
    ):
        assert said in read, said
    # nothing is told of exchanges that there are not
    assert not re.search("hidden(?! width)|waiting for|between ranks", read)


def test_exchanges_between_ranks_are_drawn(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(shown, 0, 20, exchange=exchange_of)
    text, _ = without_errors(made(capsys))
    assert points(text, "exchange") == {
        "waiting for rows": 20,
        "waiting for counts": 20,
        "rows alone": 4,
    }
    assert points(text, "hidden") == {"hidden": 4}
    read = words(text)
    assert "hidden 75% of the way of rows between ranks, step 20" in read
    assert "all_to_all, waiting for rows 5.0% of a step (median)" in read
    assert "Communication that was hidden" in read


PROBE = """
  const canvas = (id) => document.querySelector(`#${id} canvas`);
  const spot = (id, row, column, columns) => {
    const box = canvas(id).getBoundingClientRect();
    const rows = +canvas(id).dataset.rows;
    const left = 52, right = 8, below = 24;
    return [left + (box.width - left - right) * (column + 0.5) / columns,
      (box.height - below) / rows * (row + 0.4)];
  };
  const colour = (id, row, column, columns) => {
    const [x, y] = spot(id, row, column, columns);
    return [...canvas(id).getContext("2d").getImageData(
      x * devicePixelRatio, y * devicePixelRatio, 1, 1).data].slice(0, 3);
  };
  const hover = (id, row, column, columns, kind = "pointermove") => {
    const [x, y] = spot(id, row, column, columns), box = canvas(id).getBoundingClientRect();
    canvas(id).dispatchEvent(new MouseEvent(kind, { clientX: box.left + x, clientY: box.top + y }));
    return document.getElementById("tip").textContent;
  };
  const titles = () => ["experts", "layers"].map(
    (id) => document.querySelector(`#${id} h3`).textContent);
"""


def test_cells_have_their_colour_and_their_numbers(
    shown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(shown, 0, 20)
    _, answer = without_errors(
        made(capsys),
        PROBE
        + """
        const colours = [0, 1, 2].map((expert) => colour("experts", expert, 1, 4));
        const even = colour("layers", 1, 0, 4);
        const said = [hover("experts", 1, 1, 4), hover("experts", 2, 3, 4),
          hover("layers", 1, 3, 4), hover("dropped", 0, 2, 4),
          hover("rank_skew", 0, 0, 4), hover("entropy", 0, 0, 4),
          hover("unrouted", 0, 0, 4), hover("dead", 0, 0, 4)];
        const before = titles();
        hover("layers", 1, 0, 4, "click");
        const picked = titles();
        document.querySelectorAll("#modality button")[2].click();
        const image = [titles(), hover("experts", 3, 0, 4), canvas("experts").dataset.cells,
          hover("unrouted", 0, 0, 4)];
        document.getElementById("layer").value = "0";
        document.getElementById("layer").dispatchEvent(new Event("change"));
        const empty = canvas("experts").dataset.cells;
        document.getElementById("column").value = "0";
        document.getElementById("column").dispatchEvent(new Event("input"));
        const svg = document.querySelector("#loss svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new MouseEvent("pointermove", {
          clientX: box.left + 52 + (box.width - 64) * 13 / 20, clientY: box.top + 50 }));
        const curve = document.getElementById("tip").textContent;
        return { colours, even, said, before, picked, image, empty, last: titles(), curve };
        """,
    )
    mean, hot, none = answer["colours"]
    assert answer["even"] == mean == [241, 240, 236]  # exactly its share
    assert hot[0] > hot[2] + 80 and none == [29, 33, 38]
    assert answer["said"] == [
        "layer 0, expert 1, steps 6 to 10\n3.00 × the mean\n30 of 40 rows, all tokens",
        "layer 0, expert 2, steps 16 to 20\nno rows\n0 of 40 rows, all tokens",
        "layer 1, expert 3, steps 16 to 20\n1.00 × the mean\n10 of 40 rows, all tokens",
        "layer 0, steps 11 to 15\n20.0%",
        "layer 0, steps 1 to 5\n2.00 × the mean",
        "layer 0, steps 1 to 5\n36.1%",  # .5 / ln 4
        "layer 0, steps 1 to 5\n8.33%",
        "layer 0, steps 1 to 5\n2 experts",
    ]
    assert answer["before"][0] == "Experts of layer 0 over time, all tokens"
    assert answer["picked"][0] == "Experts of layer 1 over time, all tokens"
    titles, said, number, unrouted = answer["image"]
    assert titles == [
        "Experts of layer 1 over time, image tokens",
        "All layers, steps 16 to 20, image tokens",
    ]
    assert said == "layer 1, expert 3, steps 1 to 5\n2.00 × the mean\n10 of 20 rows, image tokens"
    assert number == "16" and unrouted == "layer 0, steps 1 to 5\n25.0%"
    assert answer["empty"] == "0"  # no image has a row in layer 0: nothing to share out
    assert answer["last"][1] == "All layers, steps 1 to 5, image tokens"
    assert answer["curve"].startswith("step 13\ntraining: 40\nheld-out: 4.5 (step 10)")


def test_light_and_dark(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(shown, 0, 20)
    page = made(capsys).resolve()
    light, dark = picture(page), picture(page, dark=True)
    assert np.median(light) > 235 and np.median(dark) < 40
    for image in (light, dark):
        assert len(np.unique(image.astype(int) @ [1, 256, 65536])) > 100  # drawn, not blank


def test_a_real_run(place: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["train.steps=6", "monitor.every=1", "monitor.heat_map_every=2"]
    assert main(["train", "good.yaml", *settings, "--run-dir", str(RUN), "--nproc", "1"]) == 0
    capsys.readouterr()
    text, _ = without_errors(made(capsys, "--out", "here/page.html"))
    assert Path("here/page.html").exists() and not (RUN / "report.html").exists()
    assert points(text, "loss")["training"] == 6
    assert cells(text, "experts") == (4, 3, 12)
    assert 'id="rank_skew"' not in text  # one rank alone cannot be skewed
    assert "finished, 6 steps" in words(text) and "one process" in words(text)
    lines = [json.loads(line) for line in (RUN / "load.jsonl").read_text().splitlines()]
    tokens = [sum(layer["tokens"]) for line in lines for layer in line["layers"].values()]
    assert len(tokens) == 6 and sum(tokens) > 0
    for line in lines:
        for layer in line["layers"].values():
            assert sum(map(sum, layer["rows"])) == 2 * sum(layer["tokens"])


def test_a_run_that_was_resumed_and_failed(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(shown, 0, 13)
    record(shown, 10, 16)
    record(
        shown, 12, 17, layout="ep 4", failure="step 18: the loss is <nan>", held_out=float("nan")
    )
    text, _ = without_errors(made(capsys))
    read = words(text)
    assert "stopped: step 18: the loss is &lt;nan&gt;" in read
    assert "2 times, after step 10, 12" in read and "2 processes: ep 4" in read
    assert points(text, "loss") == {"training": 17, "held-out": 1, "held-out text": 1}
    assert len(re.findall('class="resume"', text)) == 2 * 5  # in each chart
    assert cells(text, "experts")[:2] == (4, 4)  # to 5, 10, 12 (cut off), 15 and 17


def test_losses_of_a_model_that_is_not_causal_say_so(
    shown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(shown, 0, 20, loss="non_causal/loss")
    text, _ = without_errors(made(capsys))
    curves = {"training": 20, "non-causal held-out": 2, "non-causal held-out text": 2}
    assert points(text, "loss") == curves
    assert "non-causal held-out loss 4.5000 step 20, text 5.500" in words(text)


def test_thousands_of_steps_fit(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Thinned out: nothing is lost of rows and of peaks."""
    draw = np.random.default_rng(0)

    drawn = [load_of(draw.integers(0, 9999, (2, 64)).tolist(), tokens_M=[9, 9]) for _ in range(7)]
    record(shown, 0, 3000, layers=lambda step: {3: drawn[step % 7], 5: drawn[step % 5]})
    page = made(capsys)
    assert page.stat().st_size < 3_000_000
    text, _ = without_errors(page)
    assert 700 < points(text, "loss")["training"] <= POINTS
    rows, columns, number = cells(text, "experts")
    assert rows == 64 and 60 < columns <= 160 and number == rows * columns
    data = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert data is not None
    shown_tree = json.loads(data[1])
    total = np.zeros((2, 2, 64), dtype=np.int64)
    for line in (shown / "load.jsonl").read_text().splitlines():
        layers = json.loads(line)["layers"]
        total += np.array([layers["3"]["rows"], layers["5"]["rows"]])
    np.testing.assert_array_equal(np.array(shown_tree["load"]["rows"]).sum(-1), total)
    assert max(shown_tree["charts"][0]["curves"][0]["high"]) == 40  # one step's peak
    assert shown_tree["load"]["layers"] == [3, 5]


def test_a_large_model_has_fewer_columns(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    load = load_of(draw.integers(100_000, 999_999, (2, 256)).tolist(), tokens_M=[9, 9])
    record(shown, 0, 300, steps=300, layers=lambda step: dict.fromkeys(range(24), load), every=20)
    page = made(capsys)
    assert 1_000_000 < page.stat().st_size < 3_000_000
    text, _ = without_errors(page)
    found = cells(text, "layers")
    assert found == (24, 256, 24 * 256)
    assert 10 < cells(text, "experts")[1] < 60


def test_points_stand_for_their_neighbours() -> None:
    few = thinned([(step, float(step)) for step in range(POINTS)])
    assert few["x"] == few["y"] == list(range(POINTS)) and "low" not in few
    many = thinned([(step, float(step % 7 == 0)) for step in range(1, 2 * POINTS + 2)])
    assert len(many["x"]) <= POINTS and many["x"][-1] == 2 * POINTS + 1
    assert set(many["low"]) == {0.0} and set(many["high"]) <= {0.0, 1.0}
    assert thinned([]) == {"x": [], "y": []}


def test_layouts_are_not_added_up(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def layers(ranks: int) -> Callable[[int], dict[int, LayerLoad]]:
        return lambda step: {
            0: load_of([[4, 4], [0, 0]], tokens_M=[8, 0], rows_R=[8] + [0] * ranks)
        }

    record(shown, 0, 10, layers=layers(0))
    record(shown, 10, 20, layers=layers(3))
    _, answer = without_errors(
        made(capsys), PROBE + 'return [0, 3].map((column) => hover("rank_skew", 0, column, 4));'
    )
    assert answer == [
        "layer 0, steps 1 to 5\n1.00 × the mean",
        "layer 0, steps 16 to 20\n4.00 × the mean",
    ]


def test_columns_join_neighbours_of_one_layout() -> None:
    def of(step: int, ranks: int) -> LoadRecord:
        return LoadRecord(step, 5, {0: load_of([[step]], rows_R=[step] + [0] * (ranks - 1))})

    records = [of(5, 1), of(10, 1), of(15, 4), of(20, 4), of(25, 4)]
    joined = columns_of(records, 1)
    assert [(one.first, one.step, one.layers[0].rows) for one in joined] == [
        (1, 10, 15),
        (11, 25, 60),
    ]
    assert [one.layers[0].rows_R.size for one in joined] == [1, 4]
    assert [one.step for one in columns_of(records, 3)] == [10, 20, 25]


def test_a_dense_model_has_no_heat_maps(
    shown: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load((shown / "config.yaml").read_text())
    tree["model"] |= {"moe": None, "feed_forward": {"hidden": 8}}
    (shown / "config.yaml").write_text(yaml.safe_dump(tree))
    record(shown, 0, 20, layers=lambda step: {})
    text, _ = without_errors(made(capsys))
    assert "<canvas" not in text and points(text, "loss")["training"] == 20
    assert "A dense model: it has no experts" in words(text)
    assert "none: a dense model" in words(text)


def test_a_run_of_an_older_version(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without starts and without load.jsonl."""
    lines = [{"step": n, "loss": 2.0, "tokens_per_second": 9.0, "lr": 1.0} for n in (10, 20)]
    torn = '{"step": 21, "lo'
    (shown / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), torn]))
    text, _ = without_errors(made(capsys))
    assert points(text, "loss") == {"training": 2} and "<canvas" not in text
    assert "was not recorded (yet)" in words(text) and "Layout" not in words(text)
    assert 'id="grad_norm"' not in text


def test_names_are_no_markup(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load((shown / "config.yaml").read_text())
    tree["data"]["path"] = "</script><b>bold"
    (shown / "config.yaml").write_text(yaml.safe_dump(tree))
    record(shown, 0, 5)
    text, answer = without_errors(made(capsys), "return document.querySelectorAll('b').length;")
    assert "&lt;/script&gt;&lt;b&gt;bold" in text
    assert answer == text.count("no rows</span>")  # those of the legends


def test_nothing_is_fetched(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(shown, 0, 5)
    text = made(capsys).read_text()
    addresses = set(re.findall(r"(?:https?:)?//[a-z][^\s\"'<>]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    assert not re.search(r"\b(src|href|import|fetch)\s*[=(]", text)


def test_a_broken_script_is_noticed(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(shown, 0, 5)
    page = made(capsys)
    page.write_text(page.read_text().replace("showLoad(run.load);", "showLode(run.load);"))
    with pytest.raises(AssertionError, match="showLode is not defined"):
        without_errors(page)


@pytest.mark.parametrize(
    ("lines", "args", "sentence"),
    [
        (None, [], r"metrics\.jsonl: there is no such file, so nothing was recorded yet"),
        ('{"step": 0, "layout": "ep 2", "ranks": 2}', [], "holds no step yet"),
        ("GOOD", ["--out", "empty"], "--out empty: is a directory; give the name of an HTML file"),
        (
            "GOOD",
            ["--out", "file/page.html"],
            "--out file/page.html: file is a file; give a name in a dir",
        ),
        ("LOAD", [], r"load\.jsonl:1: layer 0: dropped is missing, which is not what 'coterie"),
    ],
)
def test_mistakes_are_one_sentence(
    lines: str | None,
    args: list[str],
    sentence: str,
    shown: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if lines in ("GOOD", "LOAD"):
        record(shown, 0, 5)
        if lines == "LOAD":
            (shown / "load.jsonl").write_text('{"step": 5, "steps": 5, "layers": {"0": {}}}')
    elif lines is not None:
        (shown / "metrics.jsonl").write_text(lines)
    assert main(["report", str(RUN), *args]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(sentence, said), said


def test_there_must_be_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/none"]) == 2
    assert "runs/none: there is no such run; there are runs in" in capsys.readouterr().err
