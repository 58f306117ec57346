"""A loss or gradient that is not finite stops the run before the weights are touched, by name."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.comm.objects import gather_objects
from coterie.core.errors import RunError
from coterie.parallel.model import ParallelModel, local


class NonFiniteError(RunError):
    """The sentence that names rank, layer and step."""


def require_finite(
    loss: float, norm: float, step: int, model: ParallelModel, again: Callable[[], None]
) -> None:
    """Raise NonFiniteError on every rank when the global ``loss`` or ``norm`` is not finite.

    Both are sums over ranks, so every rank sees the same. Only then ``again`` runs the step's
    forward and backward passes once more, with each block watched, to find where it began.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = gather_objects(_diagnose(model, again), model.ranks.control)
    what = "the loss" if not math.isfinite(loss) else "the gradient norm"
    raise NonFiniteError(
        f"step {step}: {what} is {loss if not math.isfinite(loss) else norm}; {_origin(found)}; "
        "the weights were not changed"
    )


@dataclass(frozen=True)
class _Found:
    """Where this rank first met a number that is not finite; None: nowhere."""

    forward: str | None
    dense: str | None
    """A gradient of a parameter that sees this rank's own tokens alone."""
    experts: str | None
    """A gradient of an expert, which other ranks' tokens may have spoilt."""


def _origin(found: list[_Found]) -> str:
    """Where it began: the forward pass of some rank if any, else its backward pass."""
    for direction, kind in (("forward", "forward"), ("backward", "dense"), ("backward", "experts")):
        places = [getattr(f, kind) for f in found]
        where = [f"{place} on rank {rank}" for rank, place in enumerate(places) if place]
        if where:
            return f"first seen in the {direction} pass at {', '.join(where)}"
    return "it overflowed only in the sum over ranks"


def _diagnose(model: ParallelModel, again: Callable[[], None]) -> _Found:
    """Run the step again on this rank, with every place of the model watched."""
    model.zero_grad(set_to_none=True)
    with _watched(model) as seen:
        again()
    experts = {name for name, place in model.places.items() if place.expert}
    found = _Found(
        forward=seen[0] if seen else None,
        dense=_last_bad_gradient(model, lambda name: name not in experts),
        experts=_last_bad_gradient(model, lambda name: name in experts),
    )
    model.zero_grad(set_to_none=True)
    return found


def _last_bad_gradient(model: ParallelModel, chosen: Callable[[str], bool]) -> str | None:
    """The backward pass goes through the model from its end: there it began."""
    bad = [
        name
        for name, p in model.named()
        if chosen(name) and p.grad is not None and not bool(local(p.grad).isfinite().all())
    ]
    last = None
    for prefix, place, _ in _places(model):
        if any(name.startswith(prefix) for name in bad):
            last = place
    return last


def _places(model: ParallelModel) -> Iterator[tuple[str, str, nn.Module]]:
    """(prefix of its parameters, name, module) of the model's parts here, in forward order."""
    for decoder in model.decoders:
        if decoder.embedding is not None:
            yield "embedding.", "the embedding", decoder.embedding
        for number, block in decoder.blocks.items():
            yield f"blocks.{number}.", f"layer {number}", block
        if decoder.head is not None:
            yield "head.", "the output layer", decoder.head


@contextmanager
def _watched(model: ParallelModel) -> Iterator[list[str]]:
    """The names of the places whose output was not finite, in order, filled by forward hooks."""
    seen: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not bool(first.isfinite().all()):
                seen.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for _, name, module in _places(model)]
    handles += [watch("the loss", s) for s in model.each_stage() if s.decoder.head is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
