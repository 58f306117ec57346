"""A loss or gradient that is not finite stops the run before the weights are touched, by name."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.comm.objects import gather_objects
from coterie.core.errors import RunError
from coterie.data import Batch
from coterie.models import Decoder
from coterie.parallel.distributed import Ranks
from coterie.parallel.gradients import expert_parameters
from coterie.parallel.micro_batch import cross_entropy_sum, token_info
from coterie.parallel.precision import Precision, autocast


class NonFiniteError(RunError):
    """The sentence that names rank, layer and step."""


def require_finite(
    loss: float,
    norm: float,
    step: int,
    model: Decoder,
    batches: list[Batch],
    ranks: Ranks,
    precision: Precision,
    seed: int,
) -> None:
    """Raise NonFiniteError on every rank when the global ``loss`` or ``norm`` is not finite.

    Both are sums over ranks, so every rank sees the same. Only then is the step run once more,
    with each block watched, to find where it began.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    found = gather_objects(_diagnose(model, batches, ranks, precision, seed), ranks.control)
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


def _diagnose(
    model: Decoder, batches: list[Batch], ranks: Ranks, precision: Precision, seed: int
) -> _Found:
    """Run the step again on this rank, with every place of the model watched."""
    model.zero_grad(set_to_none=True)
    with _watched(model) as seen:
        for batch in batches:
            with autocast(precision, ranks.device):
                output = model(batch.tokens_BS, token_info(batch, seed))
                loss = cross_entropy_sum(output.logits_BSV, batch.targets_BS)
            total = loss + sum(output.losses.values())
            if not bool(total.isfinite()):
                seen.append("the loss")
            total.backward()
    experts = {id(p) for p in expert_parameters(model)}
    found = _Found(
        forward=seen[0] if seen else None,
        dense=_last_bad_gradient(model, lambda p: id(p) not in experts),
        experts=_last_bad_gradient(model, lambda p: id(p) in experts),
    )
    model.zero_grad(set_to_none=True)
    return found


def _last_bad_gradient(model: Decoder, chosen: Callable[[nn.Parameter], bool]) -> str | None:
    """The backward pass goes through the model from its end: there it began."""
    last = None
    for name, module in _places(model):
        gradients = [p.grad for p in module.parameters() if p.grad is not None and chosen(p)]
        if not all(bool(g.isfinite().all()) for g in gradients):
            last = name
    return last


def _places(model: Decoder) -> list[tuple[str, nn.Module]]:
    """The model's parts in the order of the forward pass."""
    blocks = [(f"layer {n}", block) for n, block in enumerate(model.blocks)]
    return [("the embedding", model.embedding), *blocks, ("the output layer", model.head)]


@contextmanager
def _watched(model: Decoder) -> Iterator[list[str]]:
    """The names of the places whose output was not finite, in order, filled by forward hooks."""
    seen: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not bool(first.isfinite().all()):
                seen.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in _places(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
