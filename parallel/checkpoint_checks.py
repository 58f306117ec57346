"""Checks of a checkpoint's content: digests that hold, and tensors and experts that are equal."""

from collections.abc import Hashable, Iterable
from typing import TypeVar

from coterie.core.box import Box
from coterie.core.digest import digest
from coterie.parallel.checkpoint_format import damaged
from coterie.parallel.checkpoint_reader import Advance, CheckpointReader, no_progress

T = TypeVar("T")


def check_digests(reader: CheckpointReader, advance: Advance = no_progress) -> None:
    """Compare the digest of every tensor with the manifest's.

    Raises:
        UserError: names the first tensor whose content is another.
    """
    for name, entry in reader.manifest.tensors.items():
        if reader.digest(name, advance) != int(entry.digest, 16):
            raise damaged(reader.path, f"the content of tensor {name!r} does not match its digest")


def equal_tensors(reader: CheckpointReader) -> list[list[str]]:
    """Names of tensors with equal shape, dtype and content; those of one element are left out."""
    tensors = reader.manifest.tensors.items()
    return _equal(
        ((entry.dtype, tuple(entry.shape), entry.digest), name)
        for name, entry in tensors
        if reader.whole(name).numel > 1
    )


def equal_experts(
    reader: CheckpointReader, advance: Advance = no_progress
) -> dict[str, list[list[int]]]:
    """By tensor, the experts whose weights are equal: a sign of an error, since experts start
    different and see different tokens."""
    found = {
        name: _equal((_expert_digest(reader, name, e, advance), e) for e in range(shape[0]))
        for name, shape in expert_weights(reader).items()
    }
    return {name: groups for name, groups in found.items() if groups}


def expert_weights(reader: CheckpointReader) -> dict[str, list[int]]:
    """Names and shapes of the weights of routed experts, one for each index of dimension 0."""
    tensors = reader.manifest.tensors.items()
    return {
        name: entry.shape
        for name, entry in tensors
        if name.startswith("model.") and is_expert(name)
    }


def is_expert(name: str) -> bool:
    """Whether dimension 0 of a tensor counts the experts of a layer."""
    return ".experts." in name and not name.endswith(".step")


def _expert_digest(reader: CheckpointReader, name: str, expert: int, advance: Advance) -> int:
    """Of one expert as a tensor of its own."""
    total = 0
    box = reader.whole(name).cut(0, range(expert, expert + 1))
    for piece, content in reader.pieces(name, box, advance):
        own = Box(piece.whole[1:], piece.offset[1:], piece.shape[1:])
        total += digest(content[0], own)
    return total % (1 << 64)


def _equal(items: Iterable[tuple[Hashable, T]]) -> list[list[T]]:
    """Groups of two and more that have the same key."""
    groups: dict[Hashable, list[T]] = {}
    for key, item in items:
        groups.setdefault(key, []).append(item)
    return [group for group in groups.values() if len(group) > 1]
