"""A loss or gradient that is not finite stops the run before the weights are touched, by name."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coterie.data import Batch
from coterie.models import Decoder
from coterie.parallel.distributed import Ranks
from coterie.parallel.micro_batch import cross_entropy_sum, token_info
from coterie.parallel.precision import Precision, autocast


class NonFiniteError(Exception):
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
    forward, backward = _diagnose(model, batches, ranks, precision, seed)
    found = [(forward, backward)]
    if ranks.world > 1:
        found = [(None, None)] * ranks.world
        dist.all_gather_object(found, (forward, backward), group=ranks.control)
    what = "the loss" if not math.isfinite(loss) else "the gradient norm"
    raise NonFiniteError(
        f"step {step}: {what} is {loss if not math.isfinite(loss) else norm}; {_origin(found)}; "
        "the weights were not changed"
    )


def _origin(found: list[tuple[str | None, str | None]]) -> str:
    """Where it began: the forward pass of some rank if any, else its backward pass."""
    for direction, place in (("forward", 0), ("backward", 1)):
        where = [f"{f[place]} on rank {rank}" for rank, f in enumerate(found) if f[place]]
        if where:
            return f"first seen in the {direction} pass at {', '.join(where)}"
    return "it overflowed only in the sum over ranks"


def _diagnose(
    model: Decoder, batches: list[Batch], ranks: Ranks, precision: Precision, seed: int
) -> tuple[str | None, str | None]:
    """(the first place whose output is not finite, the first whose gradient is not), here."""
    model.zero_grad(set_to_none=True)
    with _watched(model) as seen:
        for batch in batches:
            with autocast(precision, ranks.device):
                output = model(batch.tokens_BS, token_info(batch, seed))
                loss = cross_entropy_sum(output.logits_BSV, batch.targets_BS)
            (loss + sum(output.losses.values())).backward()
    backward = None
    # the backward pass goes through the model from its end: the last bad place is where it began
    for name, module in _places(model):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if not all(bool(g.isfinite().all()) for g in gradients):
            backward = name
    model.zero_grad(set_to_none=True)
    return (seen[0] if seen else None), backward


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
