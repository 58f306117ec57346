"""Where two checkpoints differ, a piece of a tensor at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coterie.core.digest import bits_of
from coterie.parallel.checkpoint_checks import is_expert
from coterie.parallel.checkpoint_reader import Advance, CheckpointReader, no_progress


@dataclass
class Difference:
    """How two tensors of one shape and dtype differ."""

    count: int = 0
    """Elements whose bits differ."""
    absolute: float = 0.0
    """The largest difference; inf where one of two is infinite or not a number."""
    relative: float = 0.0
    """The largest difference over the larger of the two magnitudes."""
    first: tuple[int, ...] = ()
    """The index of the first element that differs, in the whole tensor, and its two values."""
    values: tuple[Any, Any] = (None, None)
    experts: set[int] = field(default_factory=set)
    """The experts that differ, if dimension 0 counts experts."""


def differing(a: CheckpointReader, b: CheckpointReader) -> list[str]:
    """Names of tensors with the same shape and dtype in both, and another digest."""
    return [
        name
        for name, entry in a.manifest.tensors.items()
        if (other := b.manifest.tensors.get(name)) is not None
        and (entry.shape, entry.dtype) == (other.shape, other.dtype)
        and entry.digest != other.digest
    ]


def compare(
    a: CheckpointReader, b: CheckpointReader, name: str, advance: Advance = no_progress
) -> Difference:
    """How the tensor ``name`` differs, which must have the same shape and dtype in both."""
    found = Difference()
    pairs = zip(a.pieces(name, a.whole(name), advance), b.pieces(name, b.whole(name)), strict=True)
    for (box, x), (_, y) in pairs:
        differs = bits_of(x) != bits_of(y)
        places = differs.nonzero()
        if not len(places):
            continue
        if not found.count:
            at = tuple(places[0].tolist())
            found.first = tuple(o + i for o, i in zip(box.offset, at, strict=True))
            found.values = x[at].item(), y[at].item()
        found.count += len(places)
        absolute, relative = _largest(x[differs], y[differs])
        found.absolute = max(found.absolute, absolute)
        found.relative = max(found.relative, relative)
        if is_expert(name):
            found.experts |= {box.offset[0] + e for e in places[:, 0].unique().tolist()}
    return found


def differences_of_state(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, other value) wherever two JSON values differ; None where one has none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys((*a, *b)):
            inner = f"{key}.{name}" if key else name
            yield from differences_of_state(a.get(name), b.get(name), inner)
    elif a != b or type(a) is not type(b):
        yield key, a, b


def _largest(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Largest absolute and relative difference of elements whose bits differ."""
    x64, y64 = x.double(), y.double()
    absolute = (x64 - y64).abs()
    relative = absolute / torch.maximum(x64.abs(), y64.abs())
    relative = torch.where(absolute == 0, 0.0, relative)  # 0.0 and -0.0
    largest = [float(d.nan_to_num(nan=torch.inf).max()) for d in (absolute, relative)]
    return largest[0], largest[1]
