"""From a config's validation errors to one sentence."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from coterie.core.errors import nearest
from coterie.launch import schema
from coterie.launch.yaml_source import Path_

_BOOLEAN_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false"}


@dataclass(frozen=True)
class Mistake:
    """What is wrong with one value."""

    path: Path_
    sentence: str


def non_finite(value: Any, path: Path_ = ()) -> Iterator[Mistake]:
    """Infinities and NaN, which pass many a bound and end in NaN weights."""
    match value:
        case dict():
            for key, inner in value.items():
                yield from non_finite(inner, (*path, key))
        case list():
            for number, inner in enumerate(value):
                yield from non_finite(inner, (*path, number))
        case float() if not math.isfinite(value):
            field = schema.at(path)
            accepted = f", only {schema.in_words(field)}" if field is not None else ""
            yield Mistake(path, f"{dotted(path)} is {value}, which is not accepted{accepted}")


def from_validation(error: ValidationError) -> list[Mistake]:
    """One for each error; a key that is missing because it is misspelt counts once."""
    details: list[dict[str, Any]] = [
        {**detail, "loc": schema.keys_of(detail["loc"]), "tagged": detail["loc"]}
        for detail in error.errors(include_url=False)
    ]
    found = [_mistake(detail) for detail in details]
    misspelt = {
        (*detail["loc"][:-1], close)
        for detail in details
        if detail["type"] == "extra_forbidden" and (close := _closest(detail["tagged"]))
    }
    missing = {detail["loc"] for detail in details if detail["type"] == "missing"}
    return [m for m in found if not (m.path in misspelt and m.path in missing)]


def sentence(mistakes: list[Mistake], where: Callable[[Path_], tuple[int, str]]) -> str:
    """The first mistake, and how many more there are.

    ``where``: for a path, its rank in reading order and the start of the sentence.
    """
    first = min(mistakes, key=lambda mistake: where(mistake.path)[0])
    more = len(mistakes) - 1
    also = f" (and {more} more mistake{'s' * (more > 1)})" if more else ""
    return f"{where(first.path)[1]}: {first.sentence}{also}"


def shown(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    match value:
        case dict():
            return "a group of keys"
        case str():
            text = f"'{value}'"
        case _:
            text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…{text[-1]}"


def dotted(path: Path_) -> str:
    """``model.moe.router.k``"""
    return ".".join(map(str, path))


def _mistake(detail: Any) -> Mistake:
    path, given, field = detail["loc"], detail["input"], schema.at(detail["tagged"])
    key = dotted(path) or "the config"
    match detail["type"]:
        case "extra_forbidden":
            return Mistake(path, _unknown(path, detail["tagged"]))
        case "missing" if field is not None:
            about = field.get("description", "").split("\n")[0].rstrip(".")
            about = f" ({about})" if about else ""
            return Mistake(path, f"{key} is missing: give {schema.in_words(field)}{about}")
        case "union_tag_invalid":
            kinds = schema.kinds(field or {})
            tag = detail["ctx"]["tag"]
            return Mistake(
                (*path, "kind"),
                f"{key}.kind is {shown(tag)}, but must be {' or '.join(kinds)}"
                f"{nearest(tag, kinds)}",
            )
        case "value_error":
            return Mistake(path, f"{key + ': ' if path else ''}{detail['ctx']['error']}")
    accepted = detail["msg"][0].lower() + detail["msg"][1:] if field is None else ""
    if field is not None:
        accepted = f"must be {schema.in_words(field)}"
    return Mistake(path, f"{key} is {shown(given)}, but {accepted}{_hint(given, field)}")


def _hint(given: Any, field: schema.Schema | None) -> str:
    accepted = schema.in_words(field) if field is not None else ""
    match given:
        case str() if given.lower() in _BOOLEAN_WORDS and "true or false" in accepted:
            return f": in YAML 1.2 '{given}' is text, write {_BOOLEAN_WORDS[given.lower()]}"
        case str() if field is not None and schema.choices(field):
            return nearest(given, schema.choices(field))
        case str() if "number" in accepted and _is_number(given):
            return ": without quotes"
        case float() if given.is_integer() and "whole number" in accepted and abs(given) < 2**53:
            return f": write {int(given)}"
        case bool() | int() | float() if "text" in accepted:
            return ": put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _closest(path: Path_) -> str:
    """The key of the same group nearest in spelling, or ''."""
    tail = nearest(str(path[-1]), schema.member_names(path[:-1]))
    return tail.split("'")[1] if tail else ""


def _unknown(path: Path_, tagged: Path_) -> str:
    group, name = path[:-1], str(path[-1])
    start = f"there is no key {dotted(path)}"
    if close := _closest(tagged):
        return f"{start}; did you mean '{dotted((*group, close))}'?"
    elsewhere = [key.name for key in schema.all_keys() if key.name.rpartition(".")[2] == name]
    if elsewhere:
        return f"{start}; did you mean {_either(elsewhere[:3])}?"
    holder = dotted(group) or "a config"
    return f"{start}; {holder} accepts {', '.join(schema.member_names(tagged[:-1]))}"


def _either(names: list[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
