"""What a checkpoint holds, for people and as JSON, and what two say differently of themselves."""

import json
from collections.abc import Iterator
from typing import Any

from coterie.parallel.checkpoint import read_state
from coterie.parallel.checkpoint_checks import equal_tensors
from coterie.parallel.checkpoint_diff import differences_of_state
from coterie.parallel.checkpoint_reader import CheckpointReader

_NAMED = 3  # of a group of equal tensors


def as_tree(reader: CheckpointReader, experts: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Everything about a checkpoint; ``experts``: those that are equal, by tensor."""
    manifest, state = reader.manifest, read_state(reader.path)
    return {
        "path": str(reader.path),
        _unit(reader): manifest.step,
        "world_size": manifest.world_size,
        "layout": state.get("layout"),
        "versions": manifest.versions,
        "bytes": _totals(reader),
        "files": {name: entry.model_dump() for name, entry in manifest.files.items()},
        "tensors": {
            name: {**entry.model_dump(), "bytes": reader.nbytes(name)}
            for name, entry in manifest.tensors.items()
        },
        "equal_tensors": equal_tensors(reader),
        "equal_experts": experts,
    }


def show(reader: CheckpointReader) -> None:
    """Print a table of the tensors, and the facts about all of them."""
    from rich.console import Console
    from rich.table import Table

    manifest, saved_by, equal = reader.manifest, _saved_by(reader), equal_tensors(reader)
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "dtype", "shape"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bytes", "chunks"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("digest", no_wrap=True)
    for name, entry in manifest.tensors.items():
        shape = " × ".join(map(str, entry.shape)) or "scalar"
        size, chunks = f"{reader.nbytes(name):,}", str(len(entry.chunks))
        table.add_row(name, entry.dtype, shape, size, chunks, entry.digest)
    # not cut to the terminal's width: names and digests are there to be copied
    Console(width=1000, markup=False, highlight=False).print(table, soft_wrap=True)
    print()
    print(f"{reader.path}: {_unit(reader)} {manifest.step}")
    print(f"  saved by {saved_by}")
    for part, total in _totals(reader).items():
        print(f"  {part}: {total:,} bytes")
    for name, file in sorted(manifest.files.items()):
        print(f"  {name}: {file.size:,} bytes, sha256 {file.sha256}")
    for group in equal:
        more = f" and {len(group) - _NAMED} more" if len(group) > _NAMED else ""
        print(f"  equal: {', '.join(group[:_NAMED])}{more}")


def unlike(a: CheckpointReader, b: CheckpointReader) -> Iterator[str]:
    """A line for each difference in state, names, shapes and dtypes."""
    for key, x, y in differences_of_state(read_state(a.path), read_state(b.path)):
        yield f"{key}: {_short(x)} and {_short(y)}"
    for one, other in ((a, b), (b, a)):
        for name in one.manifest.tensors:
            if name not in other.manifest.tensors:
                yield f"{name}: only in {one.path}"
    for name, entry in a.manifest.tensors.items():
        match = b.manifest.tensors.get(name)
        if match is None:
            continue
        if entry.shape != match.shape:
            yield f"{name}: shape {entry.shape} and {match.shape}"
        elif entry.dtype != match.dtype:
            yield f"{name}: {entry.dtype} and {match.dtype}"


_PARTS = {"environments": "contexts", "router": "gate"}
"""Words for the first part of a tensor's name, where that is none itself."""


def _totals(reader: CheckpointReader) -> dict[str, int]:
    """Bytes of the model, or of its experts, contexts and gate; and of the optimizer's state."""
    found: dict[str, int] = {}
    for name in reader.manifest.tensors:
        first = name.partition(".")[0]
        part = _PARTS.get(first, first)
        found[part] = found.get(part, 0) + reader.nbytes(name)
    return {part: found[part] for part in sorted(found, key="optimizer".__eq__)}


def _unit(reader: CheckpointReader) -> str:
    """What the run's checkpoints count."""
    return "round" if "round" in read_state(reader.path) else "step"


def _saved_by(reader: CheckpointReader) -> str:
    manifest = reader.manifest
    axes = read_state(reader.path).get("layout") or {}
    sizes = {name: n for name, n in axes.items() if isinstance(n, int) and name != "world"}
    split = [f"{name} {n}" for name, n in sizes.items() if n > 1]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    processes = f"{manifest.world_size} process{'es' if manifest.world_size > 1 else ''}"
    layout = f" ({', '.join(split)})" if split else ""
    return f"{processes}{layout} with {versions}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
