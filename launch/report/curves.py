"""Curves of a run, thinned out to what a screen can show."""

from collections.abc import Iterable, Sequence
from typing import Any

from coterie.launch.report.lines import Record
from coterie.launch.report.records import HELD_OUT, Records

POINTS = 800
"""A curve has at most so many."""
_LARGEST = 1e300
"""Of a number that is drawn: neighbours are added up."""
_EXCHANGE = {
    "exposed": "waiting for rows",
    "counts": "waiting for counts",
    "communication": "rows alone",
}

Curve = dict[str, Any]
"""``name``, and by point ``x`` (the step), ``y`` and, where several points became one, ``low`` and
``high``."""


def charts(records: Records) -> list[dict[str, Any]]:
    """All charts of the page, in order; those without a point are left out."""
    steps = records.steps
    measured = dict.fromkeys(name for record in records.evaluations for name in record)
    losses = [curve("training", steps, "loss")]
    losses += [
        curve(name.replace(loss, title).replace("/", " "), records.evaluations, name)
        for loss, title in HELD_OUT.items()
        for name in measured
        if name.startswith(loss)
    ]
    router = dict.fromkeys(
        name for record in steps for name in record if name.startswith("router/")
    )
    found = [
        _chart("loss", "Loss", "nats per token", losses),
        _chart(
            "throughput",
            "Throughput",
            "tokens per second",
            [curve("throughput", steps, "tokens_per_second")],
            zero=True,
        ),
        _chart(
            "grad_norm",
            "Gradient norm, before clipping",
            "",
            [curve("gradient norm", steps, "grad_norm")],
            zero=True,
        ),
        _chart("lr", "Learning rate", "", [curve("learning rate", steps, "lr")], zero=True),
        _chart(
            "router",
            "Router losses, coefficients applied",
            "nats per token",
            [curve(name.removeprefix("router/"), steps, name) for name in router],
            zero=True,
        ),
        _chart(
            "exchange",
            "Exchange of rows between ranks",
            "milliseconds of a step",
            [curve(title, steps, f"exchange/{name}_ms") for name, title in _EXCHANGE.items()],
            zero=True,
        ),
        _chart(
            "hidden",
            "Communication that was hidden",
            "part of all",
            [curve("hidden", steps, "exchange/hidden")],
            zero=True,
        ),
    ]
    return [chart for chart in found if chart["curves"]]


def curve(name: str, records: Iterable[Record], key: str) -> Curve:
    """The values of ``key`` by step. What is not finite is left out."""
    points = [
        (record["step"], float(record[key]))
        for record in records
        if key in record and abs(record[key]) < _LARGEST
    ]
    return {"name": name, **thinned(points)}


def thinned(points: Sequence[tuple[int, float]]) -> dict[str, list[float]]:
    """At most ``POINTS`` points: each the mean of its neighbours, with the lowest and the highest
    of them where it stands for several. The last step stays."""
    each = max(1, -(-len(points) // POINTS))
    groups = [points[max(0, end - each) : end] for end in range(len(points), 0, -each)][::-1]
    found: dict[str, list[float]] = {
        "x": [group[-1][0] for group in groups],
        "y": [_short(sum(y for _, y in group) / len(group)) for group in groups],
    }
    if each > 1:
        found["low"] = [_short(min(y for _, y in group)) for group in groups]
        found["high"] = [_short(max(y for _, y in group)) for group in groups]
    return found


def _chart(
    identity: str, title: str, unit: str, curves: list[Curve], zero: bool = False
) -> dict[str, Any]:
    """``zero``: the vertical axis begins there."""
    drawn = [one for one in curves if one["x"]]
    return {"id": identity, "title": title, "unit": unit, "curves": drawn, "zero": zero}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
