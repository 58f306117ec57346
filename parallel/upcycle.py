"""Writing the checkpoint of step 0 of a run that goes on from the weights of another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from coterie.comm.axis import Axes
from coterie.core.box import Box
from coterie.core.digest import pieces
from coterie.models import DecoderConfig
from coterie.models.initialise import initialise
from coterie.models.upcycle import Member, Origin
from coterie.parallel.checkpoint import complete
from coterie.parallel.checkpoint_file import Content, rank_file, write_safetensors
from coterie.parallel.checkpoint_format import damaged, find_damage
from coterie.parallel.checkpoint_plan import Chunk, assign
from coterie.parallel.checkpoint_reader import PIECE, Advance, CheckpointReader, no_progress
from coterie.parallel.checkpoint_store import partial_path


def upcycle(
    source: Path,
    folder: Path,
    made_of: dict[str, Origin],
    drawn: dict[str, Tensor],
    boxes_of_rank: Callable[[int], dict[str, Box]],
    world: int,
    dtype: torch.dtype,
    state: dict[str, Any],
    advance: Advance = no_progress,
) -> Path:
    """Write into ``folder`` the checkpoint of step 0, as ``world`` ranks would have; its path.

    ``made_of``: by name, what of the checkpoint ``source`` each weight is made of; ``drawn``: those
    weights that are new. The optimizer's state is zero. In memory is one piece of one tensor at a
    time. ``dtype``: of the weights.

    Raises:
        UserError: the source is damaged.
        OSError: the disk is full, …
    """
    if reason := find_damage(source):
        raise damaged(source, reason)
    text = json.dumps(state, allow_nan=False)
    partial = partial_path(folder, 0, token_hex(4))
    with CheckpointReader(source) as reader:
        weights = _Weights(reader, made_of, drawn)
        held = map(boxes_of_rank, range(world))
        plan = assign(
            [[Chunk.of(n, _dtype(n, dtype), box) for n, box in boxes.items()] for boxes in held]
        )
        try:
            partial.mkdir(parents=True)
            written = []
            for rank, chunks in enumerate(plan):
                if chunks:
                    contents = {chunk: weights.content(chunk, advance) for chunk in chunks}
                    written.append(write_safetensors(partial / rank_file(rank), contents))
            return complete(partial, 0, world, written, text)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def fresh(config: DecoderConfig, made_of: dict[str, Origin], seed: int) -> dict[str, Tensor]:
    """By name, the float64 values of the routers' weights that are made of nothing: those that a
    run of ``config`` starts with."""
    found: dict[str, Tensor] = {}
    for layer in range(config.layers):
        prefix = f"blocks.{layer}.moe.router"
        if not any(name.startswith(f"{prefix}.") and not o.members for name, o in made_of.items()):
            continue
        moe = config.moe_of(layer)
        router = moe.router.build(config.width, moe.experts.count, Axes()).double()
        initialise(router, seed, root=prefix)
        found |= {f"{prefix}.{name}": p.detach() for name, p in router.named_parameters()}
    return found


def _dtype(name: str, weights: torch.dtype) -> torch.dtype:
    """AdamW counts steps in float32."""
    return torch.float32 if name.endswith(".step") else weights


class _Weights:
    """The contents of the new checkpoint's tensors."""

    def __init__(
        self, reader: CheckpointReader, made_of: dict[str, Origin], drawn: dict[str, Tensor]
    ) -> None:
        self.reader = reader
        self.made_of = made_of
        self.drawn = drawn

    def content(self, chunk: Chunk, advance: Advance) -> Content:
        """``chunk`` in pieces."""
        kind, _, name = chunk.name.partition(".")
        for piece in pieces(chunk.box, max(1, PIECE // chunk.dtype.itemsize)):
            values = self._values(name, piece) if kind == "model" else torch.zeros(piece.shape)
            yield piece, values.to(chunk.dtype).contiguous()
            advance(piece.numel * chunk.dtype.itemsize)

    def _values(self, name: str, piece: Box) -> Tensor:
        origin = self.made_of[name]
        if not origin.members:
            return self.drawn[name][piece.slices]
        if not origin.stacked:
            return self._read(origin.members[0], piece) * origin.factor
        entry = Box(piece.whole[1:], piece.offset[1:], piece.shape[1:])
        members = origin.members[piece.offset[0] : piece.offset[0] + piece.shape[0]]
        return torch.stack([self._read(member, entry) for member in members]) * origin.factor

    def _read(self, member: Member, piece: Box) -> Tensor:
        found = self.reader.pieces(f"model.{member.tensor}", member.within(piece))
        return torch.cat([values.flatten() for _, values in found]).view(piece.shape)
