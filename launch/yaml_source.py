"""YAML as configs are written: the scalars of YAML 1.2, and the line of every key.

PyYAML follows YAML 1.1, in which ``1e-3`` is text, ``010`` is 8, ``1:30`` is 90, ``no`` is false,
``2024-01-01`` is a date, and a repeated key silently replaces the first. Here ``1e-3`` is a number,
only ``true`` and ``false`` are boolean, and a repeated key is an error.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from coterie.core.errors import UserError

Path_ = tuple[str | int, ...]
"""Where a value is: keys, and numbers inside lists."""

_LIMIT = 100_000  # values; aliases of aliases can stand for billions


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2's core schema does, with ``_`` allowed between digits."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own protocol)


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (rf"[-+]?{_DIGITS}|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    "float": (
        rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _starts) in _PLAIN.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _starts
    )


def parse(text: str, where: str, numbered: bool = True) -> tuple[Any, dict[Path_, int]]:
    """The values in ``text``, and the line (from 1) of each key and list item.

    ``where`` begins the sentence of an error: the file's name, or the override. ``numbered``: the
    line follows it.

    Raises:
        UserError: a syntax error, a repeated key, a tag, or aliases that never end.
    """
    try:
        node = yaml.compose(text, _Loader)
        reader = _Reader(where, numbered)
        return (None if node is None else reader.value(node, ())), reader.lines
    except yaml.YAMLError as error:
        raise UserError(_syntax_error(error, where, numbered)) from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply to be a config") from error


class _Reader:
    """Turns nodes into values and notes their lines."""

    def __init__(self, where: str, numbered: bool) -> None:
        self.where = where
        self.numbered = numbered
        self.lines: dict[Path_, int] = {}
        self._left = _LIMIT

    def value(self, node: Node, path: Path_) -> Any:
        self._left -= 1
        if self._left < 0:
            raise UserError(f"{self.where}: holds more than {_LIMIT} values: is this a config?")
        match node:
            case MappingNode(tag="tag:yaml.org,2002:map"):
                return self._mapping(node, path)
            case SequenceNode(tag="tag:yaml.org,2002:seq"):
                return [self._item(item, (*path, n)) for n, item in enumerate(node.value)]
            case ScalarNode():
                return self._scalar(node)
        raise self._unknown_tag(node)

    def _item(self, node: Node, path: Path_) -> Any:
        self.lines[path] = _line(node)
        return self.value(node, path)

    def _mapping(self, node: MappingNode, path: Path_) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise self._error(key_node, "a key must be a word, not a list or a mapping")
            key = key_node.value
            here = (*path, key)
            if key in found:
                raise self._error(
                    key_node,
                    f"the key {'.'.join(map(str, here))} is given twice, "
                    f"first on line {self.lines[here]}; keep one",
                )
            self.lines[here] = _line(key_node)
            found[key] = self.value(value_node, here)
        return found

    def _scalar(self, node: ScalarNode) -> Any:
        text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
        try:
            match kind:
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
                case "float":
                    special = text.lower().replace(".inf", "inf").replace(".nan", "nan")
                    return float(special)
        except ValueError as error:
            raise self._error(node, f"'{text[:40]}' is not a number that can be read") from error
        raise self._unknown_tag(node)

    def _unknown_tag(self, node: Node) -> UserError:
        return self._error(node, f"the tag {node.tag} is not accepted; write a plain value")

    def _error(self, node: Node, what: str) -> UserError:
        return UserError(f"{_place(self.where, node.start_mark, self.numbered)}: {what}")


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _place(where: str, mark: yaml.Mark, numbered: bool) -> str:
    return f"{where}:{mark.line + 1}" if numbered else where


def _syntax_error(error: yaml.YAMLError, where: str, numbered: bool) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = " ".join(str(error.problem).split())
        hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
        place = _place(where, mark, numbered)
        return f"{place}: is not YAML: {problem}, at column {mark.column + 1}{hint}"
    problem = " ".join(str(getattr(error, "reason", error)).split())
    return f"{where}: is not YAML: {problem}"
