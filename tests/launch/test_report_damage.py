"""`coterie report` on records that were altered by hand: a page, or one sentence with the place."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.core.errors import UserError
from coterie.launch.load_config import load_config
from coterie.launch.main import main
from coterie.launch.report.page import write_report
from coterie.parallel.exchange_time import ExchangeTime
from coterie.parallel.load import LayerLoad
from coterie.parallel.monitors import JsonLines, LoadLines, RunFacts
from coterie.parallel.step import StepReport
from tests.launch.conftest import GOOD
from tests.parallel.tiny import load_of

FILES = ("metrics.jsonl", "load.jsonl")


def layers() -> dict[int, LayerLoad]:
    load = load_of([[2, 6, 0, 0], [0, 0, 0, 0]], tokens_M=[8, 4], rows_R=[8, 0], entropy=0.5)
    return {0: load, 1: load}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The folder of a run of four steps that failed, resumed once."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    folder.mkdir()
    tree = yaml.safe_load(GOOD.replace("DATA", str(dataset)))
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    for first in (0, 2):
        for monitor in (JsonLines(1), LoadLines(1)):
            monitor.start(RunFacts(folder, 9, first, 17, "ep 2", 2))
            for step in range(first + 1, first + 3):
                losses = {"balance": 0.1}
                took = ExchangeTime(0.001, 0.002, 0.5, 0.008)
                of_step = (2.0, losses, 1.0, 1e-3, 12, layers(), 0.5, False, took)
                monitor.step(StepReport(step, *of_step))
            monitor.evaluation(4, {"loss": 4.5, "loss/text": float("nan")})
            if first:
                monitor.failure(5, "step 5: the loss is inf")
            monitor.close()
    return folder


def report(whole: Path, folder: Path, file: str, lines: list[str]) -> None:
    """Make the page of ``whole`` with other lines in ``file``, in ``folder``."""
    folder.mkdir(exist_ok=True)
    for name in ("config.yaml", *FILES):
        shutil.copy(whole / name, folder / name)
    (folder / file).write_text("\n".join(lines))
    write_report(folder, load_config(folder / "config.yaml"), folder / "page.html")


def lines_of(whole: Path, file: str) -> list[str]:
    return (whole / file).read_text().split("\n")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything inside ``value``, the keys and indices that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inner:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


ODD = [None, True, -1, 0, 7, 1.5, 1e308, float("nan"), float("-inf"), "x", "", [], [[]], [1], {}]
ODD += [{"0": {}}, 2**53 + 1, 2**63, 10**400]


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_one_altered_line(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A value is another, is gone or is there twice, a key has another name, or text is cut."""
    file = data.draw(st.sampled_from(FILES))
    lines = lines_of(whole, file)
    at = data.draw(st.integers(0, len(lines) - 2))  # the last one is empty
    record = json.loads(lines[at])
    *groups, last = data.draw(st.sampled_from(places(record)))
    holder = record
    for key in groups:
        holder = holder[key]
    change = data.draw(st.sampled_from(["set", "set", "set", "remove", "rename", "grow", "cut"]))
    if change == "set":
        holder[last] = data.draw(st.sampled_from(ODD))
    elif change == "remove":
        del holder[last]
    elif isinstance(holder, list):
        holder.append(holder[last])
    else:
        holder[data.draw(st.sampled_from(["loss", "0", "9", "failure"]))] = holder.pop(last)
    text = json.dumps(record)
    lines[at] = text[: data.draw(st.integers(0, len(text)))] if change == "cut" else text
    try:
        report(whole, tmp_path / "run", file, lines)
    except UserError as error:
        sentence = str(error)
        assert re.match(rf"{re.escape(str(tmp_path))}/run/{re.escape(file)}:\d+: ", sentence)
        assert sentence.endswith("put the line back, or remove it"), sentence


WRONG = [
    ("metrics.jsonl", "loss", "high", "2: loss is 'high', but must be a number"),
    ("metrics.jsonl", "tokens_per_second", ..., "2: tokens_per_second is missing"),
    ("metrics.jsonl", "lr", [1], r"2: lr is \[1\], but must be a number"),
    ("metrics.jsonl", "loss", ..., "2: has none of loss, layout, failure, held_out/…"),
    ("metrics.jsonl", "step", 1.5, "2: step is 1.5, but must be a whole number, 0 or more"),
    ("metrics.jsonl", "step", True, "2: step is true, but must be a whole number, 0 or more"),
    ("load.jsonl", "steps", 0, "2: steps is 0, but must be a whole number, 1 or more"),
    ("load.jsonl", "steps", 3, "2: steps is 3, but must be at most step 2"),
    ("load.jsonl", "layers", [], r"2: layers is \[\], but must be a JSON object"),
    ("load.jsonl", "layers.1", ..., "2: has other layers or experts than the first line"),
    ("load.jsonl", "layers.1.dropped", [0], "2: layer 1: rows is .* but must be a list of 1"),
    ("load.jsonl", "layers.1.rows", [[1] * 4], "2: layer 1: rows is .* but must be a list of 2"),
    ("load.jsonl", "layers.1.tokens", [1.5, 2], "2: layer 1: tokens .* a list of whole numbers"),
    ("load.jsonl", "layers.1.entropy", "x", "2: layer 1: entropy is 'x', but must be a number"),
    ("load.jsonl", "layers.1.ranks", [], r"2: layer 1: ranks is \[\], but must be a list"),
]


@pytest.mark.parametrize(("file", "key", "value", "sentence"), WRONG)
def test_what_is_wrong_is_named(
    whole: Path, tmp_path: Path, file: str, key: str, value: Any, sentence: str
) -> None:
    lines = lines_of(whole, file)
    record = json.loads(lines[1])
    *groups, last = key.split(".")
    holder = record
    for group in groups:
        holder = holder[group]
    holder.pop(last) if value is ... else holder.update({last: value})
    lines[1] = json.dumps(record)
    with pytest.raises(UserError, match=rf"{file}:{sentence}.*: put the line back, or remove it$"):
        report(whole, tmp_path, file, lines)


@pytest.mark.parametrize("file", FILES)
def test_only_the_last_line_may_be_cut(
    whole: Path, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(whole, file)[:-1]
    for length in range(0, len(lines[-1]), 7):
        report(whole, tmp_path, file, [*lines[:-1], lines[-1][:length]])
    (tmp_path / file).write_text("\n".join([lines[0][:9], *lines[1:]]))
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{file}:1: is no JSON" in told
