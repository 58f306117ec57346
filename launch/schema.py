"""What a config may hold, read off the pydantic models: for error sentences and the reference."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from coterie.core.config import Config
from coterie.launch.config import RunConfig

Schema = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str
    """Dotted, as in an override."""
    accepts: str
    """In words: ``a whole number ≥ 1``."""
    default: str | None
    """As YAML; None: the key is compulsory in its group."""
    description: str


_described: ContextVar[type[Config]] = ContextVar("described", default=RunConfig)


@contextmanager
def describing(model: type[Config]) -> Iterator[None]:
    """Inside, the config is a ``model``; outside, that of ``coterie train``."""
    token = _described.set(model)
    try:
        yield
    finally:
        _described.reset(token)


def run_schema() -> Schema:
    """The JSON Schema of a run's config."""
    return _schema(_described.get())


@cache
def _schema(model: type[Config]) -> Schema:
    return model.model_json_schema()


def all_keys(schema: Schema | None = None, prefix: str = "") -> Iterator[Key]:
    """Every setting below ``schema`` (default: the whole config), groups before their members.

    Where a group is of several kinds, a setting of one of them says so.
    """
    schema = run_schema() if schema is None else schema
    several = kinds(schema)
    if several:
        described = _members(groups(schema)[0])["kind"]["description"]
        yield Key(f"{prefix}kind", " or ".join(several), json.dumps(several[0]), described)
    for group in groups(schema):
        kind = f"`{_kind(group)}`: " if several else ""
        compulsory = group.get("required", ())
        for name, field in group["properties"].items():
            if several and name == "kind":
                continue
            default = None if name in compulsory else _default(field)
            described = field.get("description", _group_description(field)).replace("``", "`")
            description = " ".join(described.split())
            yield Key(prefix + name, in_words(field), default, kind + description)
            yield from all_keys(field, f"{prefix}{name}.")


def at(path: tuple[str | int, ...]) -> Schema | None:
    """The schema of the value at ``path``; None when there is no such key.

    Parts of pydantic's error locations that are no keys (the ``kind`` of a group) are passed over.
    """
    schema = run_schema()
    for part in path:
        schema = _resolve(schema)
        inner = [group["properties"][part] for group in groups(schema) if part in _members(group)]
        if inner:
            schema = inner[0]
        elif isinstance(part, int):
            items = next((s for s in _options(schema) if s.get("type") == "array"), None)
            if items is None:
                return None
            fixed = items.get("prefixItems", [])
            schema = fixed[part] if part < len(fixed) else items.get("items", {})
        elif part in kinds(schema):
            schema = next(group for group in groups(schema) if _kind(group) == part)
        else:
            return None
    return schema


def keys_of(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """``path`` without its parts that are no keys: the kinds of groups."""
    kept: list[str | int] = []
    for depth, part in enumerate(path):
        parent = at(path[:depth])
        if parent is None or part not in kinds(parent):
            kept.append(part)
    return tuple(kept)


def kinds(schema: Schema) -> list[str]:
    """Where a group may be of several kinds, their names, the default first; else none."""
    found = groups(schema)
    return [_kind(group) for group in found] if len(found) > 1 else []


def _kind(group: Schema) -> str:
    return str(_members(group)["kind"]["const"])


def member_names(path: tuple[str | int, ...]) -> list[str]:
    """The keys of the group at ``path``; none when it is no group."""
    schema = at(path)
    if schema is None:
        return []
    return list(dict.fromkeys(name for g in groups(schema) for name in _members(g)))


def in_words(schema: Schema) -> str:
    """What a value may be: ``a whole number ≥ 1 or null``."""
    if groups(schema):
        words = ["a group of keys"]
        words += ["null" for option in _options(schema) if option.get("type") == "null"]
        return " or ".join(words)
    return " or ".join(_one_in_words(option) for option in _options(schema)) or "any value"


def choices(schema: Schema) -> list[str]:
    """The accepted words, where only some are; else none."""
    return [
        str(choice)
        for option in _options(schema)
        for choice in option.get("enum", [option["const"]] if "const" in option else [])
    ]


def groups(schema: Schema) -> list[Schema]:
    """The mappings that ``schema`` stands for: none for a scalar, several for a choice of kinds."""
    return [option for option in _options(schema) if "properties" in option]


def _options(schema: Schema) -> list[Schema]:
    """The alternatives of a union, references followed."""
    schema = _resolve(schema)
    union = schema.get("anyOf") or schema.get("oneOf")
    return [found for option in union for found in _options(option)] if union else [schema]


def _resolve(schema: Schema) -> Schema:
    while "$ref" in schema:
        schema = run_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _members(group: Schema) -> Schema:
    members: Schema = group["properties"]
    return members


def _group_description(field: Schema) -> str:
    found = groups(field)
    return str(found[0].get("description", "")) if found else ""


def _default(field: Schema) -> str:
    if groups(field) and field.get("default") is not None:
        return ""  # shown by the group's members
    return json.dumps(field.get("default"), ensure_ascii=False)


def _one_in_words(schema: Schema) -> str:
    if "enum" in schema or "const" in schema:
        return " or ".join(choices(schema))
    match schema.get("type"):
        case "integer":
            return f"a whole number{_bounds(schema)}"
        case "number":
            return f"a number{_bounds(schema)}"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "string":
            pattern = schema.get("pattern")
            return f"text that matches {pattern}" if pattern else "text"
        case "array" if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])} values: " + ", ".join(
                map(in_words, schema["prefixItems"])
            )
        case "array":
            item = in_words(schema.get("items", {}))
            return "a list, each item " + item
    return "any value"


def _bounds(schema: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_plain(schema[bound])}" for bound, sign in signs.items() if bound in schema]
    return " " + " and ".join(found) if found else ""


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
