"""A pipeline stage as a row of pieces that run one after the other, and what each holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from coterie.parallel.planner import activations
from coterie.parallel.planner.activations import Held
from coterie.parallel.planner.parameters import Parameter, representatives
from coterie.parallel.planner.workload import Workload

Kind = tuple[str, int]


@dataclass(frozen=True)
class Piece:
    """A half of a block, the embedding, or the head."""

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


class Pieces:
    """The pieces of a workload's stages; those of equal blocks are computed once.

    A kind: "attention", "feed forward", "block" (both), "embedding" or "head"; and the number of
    experts, 0 if that is dense or none.
    """

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
        row = [self._piece(("embedding", 0))] if number == 0 else []
        for layer in work.layers(number):
            feed = work.model.experts_of(layer)
            # of blocks that share their layers the last one's backward pass is the first
            again = (layer + 1) % work.model.shared_depth != 0
            halves: list[Kind] = [("attention", 0), ("feed forward", feed)]
            if work.recompute == "full":
                halves = [("block", feed)]
            row += [self._again(half) if again else self._piece(half) for half in halves]
        if number > 0 and row and work.layers(number):
            row[0] = self._received(row[0])
        return row + ([self._piece(("head", 0))] if number == work.layout.stages - 1 else [])

    def _piece(self, kind: Kind) -> Piece:
        if kind not in self._made:
            name, experts = kind
            self._made[kind] = _MAKERS[name](self.work, experts)
        return self._made[kind]

    def _again(self, kind: Kind) -> Piece:
        """A piece whose parameters have gradients already, but for those of its norms."""
        piece, width = self._piece(kind), self.work.model.width
        untie = self.work.model.untie
        norms = (2 if kind[0] == "block" else 1) * (untie.modalities if untie.norm else 1)
        return replace(piece, new=norms * width * self.work.whole)

    def _received(self, piece: Piece) -> Piece:
        """The first piece of a later stage: its input lies in a receive buffer."""
        stream = self.work.own * self.work.model.width * self.work.whole
        held = piece.held
        held = Held(held.kept - stream, held.forward - stream, held.backward)
        return replace(piece, held=held)


def _embedding(work: Workload, _experts: int = 0) -> Piece:
    return _with_gradients(work, activations.embedding(work), lambda p: p.unit[0] == "embedding")


def _head(work: Workload, _experts: int = 0) -> Piece:
    return _with_gradients(work, activations.head(work), lambda p: p.unit[0] == "head")


def _attention(work: Workload, _experts: int = 0) -> Piece:
    layer = 0
    return _with_gradients(
        work, activations.attention_half(work), lambda p: _half(p, layer, attention=True)
    )


def _feed(work: Workload, experts: int) -> Piece:
    model = work.model
    layer = next(n for n in range(model.layers) if model.experts_of(n) == experts)
    held = activations.moe_half(work, experts) if experts else activations.dense_half(work)
    return _with_gradients(work, held, lambda p: _half(p, layer, attention=False))


def _block(work: Workload, experts: int) -> Piece:
    """A block that keeps its input alone; its forward pass runs again before its backward pass."""
    first, second = _attention(work), _feed(work, experts)
    stream = work.own * work.model.width * work.whole
    inside = first.held.kept + second.held.kept
    held = Held(
        kept=stream,
        forward=stream + max(first.held.forward, second.held.forward),
        backward=max(
            inside + second.held.backward,
            first.held.kept + first.held.backward + second.gradients,
            first.held.kept + second.held.forward,
        )
        - stream,
    )
    gradients = first.gradients + second.gradients
    return Piece(held, gradients, gradients, max(first.largest, second.largest))


_MAKERS: dict[str, Callable[[Workload, int], Piece]] = {
    "embedding": _embedding,
    "attention": _attention,
    "feed forward": _feed,
    "block": _block,
    "head": _head,
}


def _half(parameter: Parameter, layer: int, attention: bool) -> bool:
    kind, number = parameter.unit
    if kind not in ("block", "experts") or number != layer:
        return False
    return (".attention" in parameter.name) == attention


def _with_gradients(work: Workload, held: Held, mine: Callable[[Parameter], bool]) -> Piece:
    sizes = [prod(p.part(work.layout)) * work.whole for p in representatives(work.model) if mine(p)]
    return Piece(held, sum(sizes), sum(sizes), max(sizes, default=0))
