"""Writing a checkpoint as a run of another layout would have written it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

from coterie.core.box import Box
from coterie.core.errors import UserError, nearest
from coterie.parallel.checkpoint import complete
from coterie.parallel.checkpoint_file import (
    WrittenFile,
    rank_file,
    tensor_entries,
    write_safetensors,
)
from coterie.parallel.checkpoint_format import damaged, find_damage, read_state, step_of
from coterie.parallel.checkpoint_plan import Chunk, assign
from coterie.parallel.checkpoint_reader import Advance, CheckpointReader, no_progress
from coterie.parallel.checkpoint_store import partial_path


def reshard(
    source: Path,
    destination: Path,
    boxes_of_rank: Callable[[int], dict[str, Box]],
    world: int,
    *,
    state: dict[str, Any] | None = None,
    advance: Advance = no_progress,
) -> Path:
    """Write the checkpoint ``source`` as ``destination``: for each of ``world`` ranks the file that
    it would have written, byte for byte; returns ``destination``.

    ``boxes_of_rank``: what a rank holds of each tensor, by name. ``state``: what to say of the run
    (default: what the source says). The digests of what was written are compared with the source's.
    In memory is one piece of one tensor at a time. A kill leaves at most a hidden folder beside
    ``destination``; an exception (Ctrl-C too) nothing.

    Raises:
        UserError: the source is damaged, or does not hold what the ranks do; the destination
            exists or is of another step.
        OSError: the disk is full, …
    """
    step = step_of(source)
    if step_of(destination) != step:
        raise UserError(f"{destination} is not named after step {step}, which {source} is of")
    if destination.exists():
        raise UserError(f"{destination} exists already; give another destination")
    if reason := find_damage(source):
        raise damaged(source, reason)
    text = json.dumps(read_state(source) if state is None else state, allow_nan=False)
    with CheckpointReader(source) as reader:
        plan = assign([_chunks(reader, boxes_of_rank(rank)) for rank in range(world)])
        _check_complete(reader, {chunk.name for chunks in plan for chunk in chunks})
        partial = partial_path(destination.parent, step, token_hex(4))
        try:
            partial.mkdir(parents=True)
            written = _write(reader, partial, plan, advance)
            return complete(partial, step, world, written, text)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _chunks(reader: CheckpointReader, boxes: dict[str, Box]) -> list[Chunk]:
    tensors = reader.manifest.tensors
    for name, box in boxes.items():
        if name not in tensors:
            raise UserError(
                f"checkpoint {reader.path} has no tensor {name!r}, which its model has"
                f"{nearest(name, tensors)}"
            )
        if list(box.whole) != tensors[name].shape:
            raise UserError(
                f"tensor {name!r} has shape {tensors[name].shape} in checkpoint {reader.path} "
                f"and {list(box.whole)} in its model"
            )
    return [Chunk.of(name, reader.dtype(name), box) for name, box in boxes.items()]


def _check_complete(reader: CheckpointReader, held: set[str]) -> None:
    for name in reader.manifest.tensors:
        if name not in held:
            raise UserError(
                f"checkpoint {reader.path} holds tensor {name!r}, which its model does not have"
                f"{nearest(name, held)}"
            )


def _write(
    reader: CheckpointReader, partial: Path, plan: list[list[Chunk]], advance: Advance
) -> list[WrittenFile]:
    """A file for each rank that has something to write."""
    written = []
    for rank, chunks in enumerate(plan):
        if chunks:
            contents = {chunk: reader.pieces(chunk.name, chunk.box, advance) for chunk in chunks}
            written.append(write_safetensors(partial / rank_file(rank), contents))
    for name, entry in tensor_entries(written).items():
        if entry.digest != reader.manifest.tensors[name].digest:
            raise damaged(reader.path, f"the content of tensor {name!r} does not match its digest")
    return written
