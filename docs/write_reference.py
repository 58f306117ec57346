"""Write the tables of all settings, docs/reference.md and docs/dynamics_reference.md, from the
config models.

python docs/write_reference.py
"""

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `coterie` of this checkout

from coterie.launch.dynamics_config import DynamicsRunConfig
from coterie.launch.schema import Key, all_keys, describing

FILE = Path(__file__).with_name("reference.md")
DYNAMICS_FILE = Path(__file__).with_name("dynamics_reference.md")

_INTRODUCTION = """\
# Reference: every setting of a config

Written by `docs/write_reference.py` from the config models; change those, not this file.
`coterie config schema` prints the same in the terminal. How configs work:
[configuration.md](configuration.md).
"""


_DYNAMICS_INTRODUCTION = """\
# Reference: every setting of `coterie dynamics`

Written by `docs/write_reference.py` from the config models; change those, not this file.
`coterie dynamics schema` prints the same in the terminal. What they are for:
[mixer.md](mixer.md).
"""


def reference() -> str:
    """The whole page, as Markdown."""
    return _page(_INTRODUCTION)


def dynamics_reference() -> str:
    """That of ``coterie dynamics``."""
    with describing(DynamicsRunConfig):
        return _page(_DYNAMICS_INTRODUCTION)


def _page(introduction: str) -> str:
    keys = list(all_keys())
    groups = {key.name: key for key in keys if _is_group(key)}
    sections = [introduction]
    for group, members in groupby(_by_group(keys), key=_parent):
        sections.append(_section(group, groups.get(group), list(members)))
    return "\n".join(sections)


def _by_group(keys: list[Key]) -> list[Key]:
    """The scalars, those of a group together, groups in the order of their first mention."""
    order = {name: place for place, name in enumerate(dict.fromkeys(map(_parent, keys)))}
    return sorted((key for key in keys if not _is_group(key)), key=lambda k: order[_parent(k)])


def _is_group(key: Key) -> bool:
    return key.accepts.startswith("a group of keys")


def _parent(key: Key) -> str:
    return key.name.rpartition(".")[0]


def _section(name: str, group: Key | None, members: list[Key]) -> str:
    lines = [f"## `{name}`" if name else "## Top level", ""]
    if group is not None:
        optional = " May be null (the default)." if group.accepts.endswith("or null") else ""
        lines += [group.description + optional, ""]
    lines += ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for key in members:
        default = "**required**" if key.default is None else f"`{key.default}`"
        cells = (f"`{key.name}`", key.accepts, default, key.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for file, text in ((FILE, reference()), (DYNAMICS_FILE, dynamics_reference())):
        file.write_text(text)
        print(f"wrote {file}")
