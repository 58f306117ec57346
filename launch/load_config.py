"""A run's config from a YAML file and dotted overrides; every mistake ends in one sentence."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from coterie.core.errors import UserError
from coterie.launch.config_file import find, read_text
from coterie.launch.yaml_source import Path_, parse

if TYPE_CHECKING:  # the models import torch, which takes seconds: after the file has been read
    from coterie.core.config import Config
    from coterie.launch.config import RunConfig

C = TypeVar("C", bound="Config")


def load_config(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "RunConfig":
    """The config in the file ``name`` (or shipped under that name), with ``overrides`` applied.

    An override is ``key.sub=value``, its value YAML. Rules that need the number of processes or
    the dataset are in :mod:`coterie.launch.check`.

    Raises:
        UserError: the file, line and key at fault, what was given, and what is accepted.
    """
    source = ConfigSource.read(find(name), overrides)
    from coterie.launch.config import RunConfig

    return source.validated(RunConfig)


def changed_config(
    file: Path, tree: dict[str, Any], overrides: list[str] | tuple[str, ...]
) -> "RunConfig":
    """The config that stands in ``file`` as ``tree``, with ``overrides`` applied.

    Raises:
        UserError: as :func:`load_config`.
    """
    from coterie.launch.config import RunConfig

    source = ConfigSource(file, yaml.safe_dump(tree))
    for override in overrides:
        source.override(override)
    return source.validated(RunConfig)


def dump_config(config: "Config") -> str:
    """``config``, every default filled in, as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_config(config: "Config", path: Path) -> None:
    """Store what a run runs with; a resumed one may have new overrides, which stay.

    Raises:
        UserError: it cannot be written.
    """
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text(dump_config(config))
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


class ConfigSource:
    """The tree of values, and where each came from."""

    @classmethod
    def read(cls, file: Path, overrides: list[str] | tuple[str, ...] = ()) -> "ConfigSource":
        """What stands in ``file``, with ``overrides`` applied."""
        source = cls(file, read_text(file))
        for override in overrides:
            source.override(override)
        return source

    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        tree, self._lines = parse(text, str(file))
        if tree is None:
            raise UserError(f"{file}: is empty; a config needs at least 'model' and 'train'")
        if not isinstance(tree, dict):
            raise UserError(
                f"{file}: holds {'a list' if isinstance(tree, list) else 'one value'}, "
                "but a config is a mapping of keys such as 'model' and 'train'"
            )
        self.tree: dict[str, Any] = tree
        self._overrides: dict[Path_, str] = {}

    def override(self, text: str) -> None:
        """Apply ``key.sub=value``."""
        where = f"override '{text}'"
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals:
            raise UserError(f"{where}: write key.sub=value, such as train.seed=1")
        if not all(path):
            raise UserError(f"{where}: '{key}' is no dotted key; write it like train.seed=1")
        group = self.tree
        for depth, part in enumerate(path[:-1], 1):
            if group.get(part) is None:
                group[part] = {}
                self._overrides[path[:depth]] = where
            if not isinstance(group[part], dict):
                raise UserError(
                    f"{where}: {'.'.join(path[:depth])} is no group of keys in {self.file}, so "
                    f"nothing below it can be set; set it whole: {'.'.join(path[:depth])}=…"
                )
            group = group[part]
        group[path[-1]], _ = parse(value, where, numbered=False)
        self._overrides[path] = where
        for inner in [below for below in self._lines if below[: len(path)] == path]:
            del self._lines[inner]

    def validated(self, model: type[C]) -> C:
        """The config. Raises UserError, as :func:`load_config` does."""
        from pydantic import ValidationError

        from coterie.launch.mistakes import from_validation, non_finite, sentence
        from coterie.launch.schema import describing

        with describing(model):
            if mistakes := list(non_finite(self.tree)):
                raise UserError(sentence(mistakes, self._where))
            try:
                return model.model_validate_json(json.dumps(self.tree), strict=True)
            except ValidationError as error:
                raise UserError(sentence(from_validation(error), self._where)) from error

    def _where(self, path: Path_) -> tuple[int, str]:
        """Reading order, and ``FILE:LINE`` or the override, of the value that ``path`` is in."""
        inside = [where for at, where in self._overrides.items() if at[: len(path)] == path != at]
        if inside:  # a rule that joins several keys, some of them overridden
            return 1 << 29, f"{self.file} with {', '.join(dict.fromkeys(inside))}"
        for length in range(len(path), 0, -1):
            part = path[:length]
            if part in self._overrides:
                return 1 << 30, self._overrides[part]
            if part in self._lines:
                return self._lines[part], f"{self.file}:{self._lines[part]}"
        return 1 << 31, str(self.file)
