"""Lines of metrics.jsonl and load.jsonl: each is what a run writes, or the file is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.core.errors import UserError
from coterie.data import MODALITIES
from coterie.launch.mistakes import shown

Record = dict[str, Any]
Check = Callable[[Record, list[Record]], None]
"""Raises :class:`_Wrong` when a line is not what a run writes, given those before it."""


class _Wrong(Exception):
    """What is wrong with a line."""


def read_lines(path: Path, check: Check) -> list[Record]:
    """The lines of ``path``. The last may be cut off, as a running job or a kill leaves it.

    Raises:
        UserError: names the first line that is damaged or fails ``check``; the file cannot be read.
    """
    try:
        *whole, last = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    lines = [*whole, last] if _is_json(last) else whole
    found: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _object(line)
            check(record, found)
        except _Wrong as wrong:
            raise UserError(
                f"{path}:{number}: {wrong}, which is not what 'coterie train' writes: put the line "
                "back, or remove it"
            ) from None
        found.append(record)
    return found


def check_metrics(record: Record, _: list[Record]) -> None:
    """A line of metrics.jsonl: a step, a held-out loss, a start or a failure."""
    _whole(record, "step")
    held_out = [name for name in record if name.startswith("held_out/")]
    kinds = [kind for kind in _NEEDED if kind in record]
    if not kinds and not held_out:
        raise _Wrong(f"has none of {', '.join(_NEEDED)}, held_out/…")
    for kind in kinds:
        for name, test in _NEEDED[kind].items():
            test(record, name)
    others = [
        name
        for name in record
        if name in ("grad_norm", "lr") or name.startswith(("router/", "exchange/"))
    ]
    for name in (*held_out, *others):
        _number(record, name)


def check_load(record: Record, before: list[Record]) -> None:
    """A line of load.jsonl: counts of the same layers and experts in all lines."""
    _whole(record, "step")
    _whole(record, "steps", least=1)
    if record["steps"] > record["step"]:
        raise _Wrong(f"steps is {record['steps']}, but must be at most step {record['step']}")
    layers = _group(record, "layers")
    for layer in layers:
        _check_layer(layer, _group(layers, layer))
    sizes = _experts(record)
    if not sizes:
        raise _Wrong("has no layer")
    if before and sizes != _experts(before[0]):
        raise _Wrong("has other layers or experts than the first line")


def _check_layer(layer: str, found: Record) -> None:
    """The counts of one layer."""
    if not (layer.isascii() and layer.isdecimal() and str(int(layer)) == layer):
        raise _Wrong(f"has a layer {shown(layer)}, which is no number")
    try:
        experts = len(_counts(found, "dropped"))
        for name in ("tokens", "unrouted"):
            _counts(found, name, len(MODALITIES))
        _counts(found, "ranks")
        rows = _list(found, "rows", len(MODALITIES))
        for modality in range(len(rows)):
            _counts({"rows": rows[modality]}, "rows", experts)
        _number(found, "entropy")
    except _Wrong as wrong:
        raise _Wrong(f"layer {layer}: {wrong}") from None


def _experts(record: Record) -> dict[str, int]:
    """How many experts each layer has."""
    return {layer: len(found["dropped"]) for layer, found in record["layers"].items()}


def _is_json(line: str) -> bool:
    try:
        _object(line)
    except _Wrong:
        return False
    return True


def _object(line: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise _Wrong("is no JSON") from None
    if not isinstance(record, dict):
        raise _Wrong("is no JSON object")
    return record


def _value(record: Record, name: str) -> Any:
    if name not in record:
        raise _Wrong(f"{name} is missing")
    return record[name]


def _fail(record: Record, name: str, accepted: str) -> _Wrong:
    return _Wrong(f"{name} is {shown(record[name])}, but must be {accepted}")


_LARGEST = 2**53
"""What a run counts stays below, and sums of it fit into 64 bits."""


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _LARGEST


def _whole(record: Record, name: str, least: int = 0) -> None:
    if not _is_whole(_value(record, name), least):
        raise _fail(record, name, f"a whole number, {least} or more")


def _number(record: Record, name: str) -> None:
    value = _value(record, name)
    if not (isinstance(value, float) or _is_whole(value, -_LARGEST)):
        raise _fail(record, name, "a number")


def _text(record: Record, name: str) -> None:
    if not isinstance(_value(record, name), str):
        raise _fail(record, name, "text")


def _group(record: Record, name: str) -> Record:
    value = _value(record, name)
    if not isinstance(value, dict):
        raise _fail(record, name, "a JSON object")
    return value


def _list(record: Record, name: str, length: int | None) -> list[Any]:
    value = _value(record, name)
    if not isinstance(value, list) or not value or length not in (None, len(value)):
        raise _fail(record, name, f"a list{f' of {length}' if length else ''}")
    return value


def _counts(record: Record, name: str, length: int | None = None) -> list[int]:
    value = _list(record, name, length)
    if not all(map(_is_whole, value)):
        raise _fail(record, name, "a list of whole numbers, 0 or more")
    return value


_NEEDED: dict[str, dict[str, Callable[[Record, str], None]]] = {
    "loss": {"loss": _number, "tokens_per_second": _number},
    "layout": {"layout": _text, "ranks": _whole},
    "failure": {"failure": _text},
}
"""By the key that tells a kind of line from the others, what every line of it has."""
