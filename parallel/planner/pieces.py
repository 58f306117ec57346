"""A pipeline stage as a row of pieces that run one after the other, and what each holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from coterie.parallel.planner import activations
from coterie.parallel.planner.activations import Held
from coterie.parallel.planner.attention_activations import attention_half
from coterie.parallel.planner.feed_forward_activations import dense_half, moe_half
from coterie.parallel.planner.parameters import Parameter, representatives
from coterie.parallel.planner.workload import Workload

Kind = tuple[str, int, bool]
"""The name of a piece; the number of experts, 0 if that is dense or none; whether only some tokens
pass the block."""


@dataclass(frozen=True)
class Piece:
    """A half of a block, what chooses its tokens, the embedding, or the head."""

    held: Held
    gradients: int
    """Bytes of the gradients of its parameters, before FSDP."""
    new: int
    """Of these, what no piece has made before it: later pieces may share its parameters."""
    largest: int
    """Of the largest of these."""


@dataclass(frozen=True)
class Stage:
    """What a stage holds of one micro-batch, in bytes."""

    kept: int
    """From its forward to its backward pass."""
    forward: int
    """The most inside the forward pass, beyond what was there before it."""
    first_backward: int
    """The most inside a step's first backward pass, beyond what was there before it: gradients
    appear."""
    backward: int
    """The same for a later one: gradients are added to those there."""
    gradients: int
    split: int
    """Where the backward pass is split: the gradient of the logits, which the weights' part needs
    too."""


_NOTHING = Held()


class Pieces:
    """The pieces of a workload's stages; those of equal blocks are computed once."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self._made: dict[Kind, Piece] = {}

    def stage(self, number: int) -> Stage:
        """What stage ``number`` holds."""
        pieces = self._row(number)
        kept = forward = 0
        for piece in pieces:
            forward = max(forward, kept + piece.held.forward)
            kept += piece.held.kept
        # the last piece's result, until it is handed on
        first, later, live, made = 0, 0, kept, 0
        for piece in reversed(pieces):
            made += piece.new
            first = max(first, live + piece.held.backward + made + piece.gradients - piece.new)
            later = max(later, live + piece.held.backward + piece.gradients)
            live -= piece.held.kept
        last = number == self.work.layout.stages - 1
        split = activations.logits(self.work) if last else 0
        return Stage(kept, forward, first - kept, later - kept, made, split)

    def _row(self, number: int) -> list[Piece]:
        work = self.work
        row = [self._piece(("embedding", 0, False))] if number == 0 else []
        for layer in work.layers(number):
            feed = work.model.experts_of(layer)
            some = work.model.depths_of(layer) is not None
            # of blocks that share their layers the last one's backward pass is the first
            again = (layer + 1) % work.model.shared_depth != 0
            kinds: list[Kind] = [("attention", 0, some), ("feed forward", feed, some)]
            if some:
                kinds = [("choosing", 0, True), *kinds, ("adding", 0, True)]
            if work.recompute == "full":
                kinds = [("block", feed, some)]
            row += [self._again(kind) if again else self._piece(kind) for kind in kinds]
        if number > 0 and row and work.layers(number):
            row[0] = self._received(row[0])
        return row + ([self._piece(("head", 0, False))] if number == work.layout.stages - 1 else [])

    def _piece(self, kind: Kind) -> Piece:
        if kind not in self._made:
            name, experts, some = kind
            self._made[kind] = _MAKERS[name](self.work, experts, some)
        return self._made[kind]

    def _again(self, kind: Kind) -> Piece:
        """A piece whose parameters have gradients already, but for what is the block's own."""
        piece, width = self._piece(kind), self.work.model.width
        name, _, some = kind
        untie = self.work.model.untie
        norms = {"block": 2, "attention": 1, "feed forward": 1}.get(name, 0)
        norms *= untie.modalities if untie.norm else 1
        norms *= not self.work.model.auxiliary
        chooses = some and name in ("block", "choosing")
        router = self._piece(("choosing", 0, True)).gradients if chooses else 0
        return replace(piece, new=norms * width * self.work.whole + router)

    def _received(self, piece: Piece) -> Piece:
        """The first piece of a later stage: its input lies in a receive buffer."""
        if self.work.model.auxiliary:  # it keeps none, or one of its own
            return piece
        stream = self.work.own * self.work.model.width * self.work.whole
        held = piece.held
        held = Held(held.kept - stream, held.forward - stream, held.backward)
        return replace(piece, held=held)


def _embedding(work: Workload, _experts: int = 0, _some: bool = False) -> Piece:
    return _with_gradients(work, activations.embedding(work), lambda p: p.unit[0] == "embedding")


def _head(work: Workload, _experts: int = 0, _some: bool = False) -> Piece:
    return _with_gradients(work, activations.head(work), lambda p: p.unit[0] == "head")


def _attention(work: Workload, _experts: int = 0, some: bool = False) -> Piece:
    held = attention_half(work.inside(_layer(work, some)))
    return _with_gradients(work, held, lambda p: _part(p, 0) == "attention")


def _feed(work: Workload, experts: int, some: bool) -> Piece:
    layer = _layer(work, some, experts)
    inside = work.inside(layer)
    held = moe_half(inside, experts) if experts else dense_half(inside)
    foreseen = _NOTHING
    if work.model.moe is not None and work.model.moe.router.foresees and experts:
        foreseen = activations.foreseeing(inside, experts, among=experts)
    return _with_gradients(work, held, lambda p: _part(p, layer) == "feed forward", foreseen)


def _choosing(work: Workload, _experts: int = 0, _some: bool = True) -> Piece:
    layer = _layer(work, some=True)
    depths = work.model.depths_of(layer)
    foreseen = _NOTHING
    if depths is not None and depths.foresees:
        foreseen = activations.foreseeing(work, 1)
    held = activations.choosing(work, layer)
    return _with_gradients(work, held, lambda p: _part(p, layer) == "depths", foreseen)


def _adding(work: Workload, _experts: int = 0, _some: bool = True) -> Piece:
    held = activations.adding(work, _layer(work, some=True))
    return _with_gradients(work, held, lambda p: False)


def _block(work: Workload, experts: int, some: bool) -> Piece:
    """A block that keeps its input alone; its forward pass runs again before its backward pass."""
    parts = [_attention(work, 0, some), _feed(work, experts, some)]
    if some:
        parts = [_choosing(work), *parts, _adding(work)]
    stream = work.own * work.model.width * work.whole
    kept = backward = made = 0
    for part in parts:
        backward = max(backward, kept + part.held.forward)
        kept += part.held.kept
    forward = stream + max(part.held.forward for part in parts)
    live = kept
    for part in reversed(parts):
        backward = max(backward, live + part.held.backward + made)
        live -= part.held.kept
        made += part.gradients
    if kept == 0:  # without anything to train
        return Piece(Held(0, forward, 0), 0, 0, 0)
    held = Held(kept=stream, forward=forward, backward=backward - stream)
    return Piece(held, made, made, max(part.largest for part in parts))


_MAKERS: dict[str, Callable[[Workload, int, bool], Piece]] = {
    "embedding": _embedding,
    "choosing": _choosing,
    "attention": _attention,
    "feed forward": _feed,
    "adding": _adding,
    "block": _block,
    "head": _head,
}


def _layer(work: Workload, some: bool, experts: int | None = None) -> int:
    """The first block that some tokens pass, or all; with so many experts."""
    model = work.model
    return next(
        layer
        for layer in range(model.layers)
        if (model.depths_of(layer) is not None) == some
        and experts in (None, model.experts_of(layer))
    )


def _part(parameter: Parameter, layer: int) -> str | None:
    """The piece of block ``layer`` that ``parameter`` belongs to; None: it is another's."""
    kind, number = parameter.unit
    if kind not in ("block", "experts") or number != layer:
        return None
    if ".depths." in parameter.name:
        return "depths"
    return "attention" if ".attention" in parameter.name else "feed forward"


def _with_gradients(
    work: Workload, held: Held, mine: Callable[[Parameter], bool], foreseen: Held = _NOTHING
) -> Piece:
    """``foreseen``: of its auxiliary router, all that is left of ``held`` where these alone are
    trained."""
    if work.model.auxiliary:
        held = Held(foreseen.kept, held.forward + foreseen.kept, foreseen.backward)
    trained = [p for p in representatives(work.model) if mine(p) and not p.frozen]
    sizes = [prod(p.part(work.layout)) * work.whole for p in trained]
    return Piece(held, sum(sizes), sum(sizes), max(sizes, default=0))
