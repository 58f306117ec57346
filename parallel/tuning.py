"""How an overlapped or fused exchange is cut, by measurement: a short sweep over one layer's
experts.

Every rank runs forward and backward passes of an expert layer of the run's size, with random
tokens, in pieces and slabs of several numbers (or with blocks that move rows, slabs and tiles), in
turns; what counts is the slowest rank's time.
The winner, which may have been lucky, then meets the plain exchange, one all-to-all there and one
back, and stays only if it is faster by more than noise: both passes together are not to be slower
for it.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.config import ExchangeConfig
from coterie.comm.exchange.overlapped import OverlappedExchange
from coterie.csrc.fused_launch import TILE_COLUMNS
from coterie.models.decoder import Recompute
from coterie.moe.assignment import Assignment, from_choices, sliced
from coterie.moe.experts import Experts
from coterie.moe.layer import MoEConfig
from coterie.parallel.config import Precision
from coterie.parallel.distributed import Ranks
from coterie.parallel.precision import autocast, parameter_dtype

PIECES, SLABS, MOST = (1, 2, 4, 8), (1, 2, 4), 8
"""What is tried where the config leaves it open; up to ``MOST`` messages for each pair of ranks."""
COMMUNICATION, FUSED_SLABS = (8, 16, 24, 32), (1, 2, 4, 8)
"""What is tried of a fused one, first all with the first of ``TILE_COLUMNS``; the other tiles only
with what is left for the last heat."""

_GAIN = 0.95  # of the plain exchange's time: less is no noise
_HEATS = ((2, 1.3), (3, 1.1), (4, 1.0))
"""Rounds of those that are left, and how many times the fastest one's time stays in after them."""
_DUEL = 7  # rounds of the winner and the plain exchange, which alone count


@dataclass(frozen=True)
class Layer:
    """One expert layer as a rank of a run sees it."""

    moe: MoEConfig
    width: int
    tokens: int
    """On this rank, in one micro-batch."""
    precision: Precision
    recompute: Recompute
    """What the backward pass computes again: hidden activations, or the layer as a whole."""


def is_open(exchange: ExchangeConfig) -> bool:
    """Whether something is left to measure."""
    cuts: dict[str, tuple[int | None, ...]] = {
        "overlapped": (exchange.pieces, exchange.slabs),
        "fused": (exchange.communication, exchange.slabs, exchange.tile_columns),
    }
    return None in cuts.get(exchange.kind, ())


def candidates(exchange: ExchangeConfig) -> list[ExchangeConfig]:
    """What is measured: first the plain exchange, then every way to cut that ``exchange`` leaves
    open."""
    ways = _fused(exchange) if exchange.kind == "fused" else _overlapped(exchange)
    none = {"communication": None, "tile_columns": None}
    plain = exchange.model_copy(update={"kind": "all_to_all", **none})
    return [plain, *(exchange.model_copy(update=way) for way in ways)]


def _overlapped(exchange: ExchangeConfig) -> list[dict[str, int]]:
    pieces = PIECES if exchange.pieces is None else (exchange.pieces,)
    slabs = SLABS if exchange.slabs is None else (exchange.slabs,)
    # what the config fixes is tried with the least of the other, however many messages that makes
    least = min(pieces) * min(slabs)
    most = max(MOST, least)
    return [{"pieces": p, "slabs": s} for p in pieces for s in slabs if p * s <= most]


def _fused(exchange: ExchangeConfig) -> list[dict[str, int]]:
    blocks = COMMUNICATION if exchange.communication is None else (exchange.communication,)
    slabs = FUSED_SLABS if exchange.slabs is None else (exchange.slabs,)
    tiles = TILE_COLUMNS if exchange.tile_columns is None else (exchange.tile_columns,)
    return [
        {"communication": b, "slabs": s, "tile_columns": t}
        for t in tiles
        for b in blocks
        for s in slabs
    ]


def measure(layer: Layer, ranks: Ranks) -> list[float]:
    """Seconds of both passes by the plain exchange and by the fastest other one of the layer's
    :func:`candidates`; inf for those that were left behind. All ranks call, and get the same."""
    try_once, ways = _trials(layer, ranks), candidates(layer.moe.exchange)

    def run(some: Sequence[int], rounds: int) -> dict[int, list[float]]:
        turns = [{n: _slowest(try_once(n), ranks) for n in some} for _ in range(rounds)]
        return {n: [turn[n] for turn in turns] for n in some}

    tiles = ways[1].tile_columns
    near = [n for n, way in enumerate(ways) if n and way.tile_columns == tiles]
    run(near, 1)  # the first time memory is new
    found: dict[int, list[float]] = {n: [] for n in range(1, len(ways))}
    for heat, (rounds, close) in enumerate(_HEATS, 1):
        if heat == len(_HEATS):
            others = _in_other_tiles(ways, near)
            run(others, 1)
            near += others
        for candidate, times in run(near, rounds).items():
            found[candidate] += times
        fastest = min(median(found[n]) for n in near)
        near = [n for n in near if median(found[n]) <= close * fastest]
    run((0,), 1)
    last = {n: median(times) for n, times in run((0, near[0]), _DUEL).items()}
    return [last.get(n, math.inf) for n in range(len(ways))]


def _in_other_tiles(ways: list[ExchangeConfig], near: Sequence[int]) -> list[int]:
    """Those that differ from one of ``near`` in their tiles alone."""
    cuts = [way.model_copy(update={"tile_columns": None}) for way in ways]
    return [n for n, cut in enumerate(cuts) if n not in near and cut in [cuts[m] for m in near]]


def choose(exchange: ExchangeConfig, seconds: list[float]) -> ExchangeConfig:
    """The fastest of :func:`candidates`, whose times ``seconds`` are."""
    found = candidates(exchange)
    best = min(range(len(found)), key=seconds.__getitem__)
    return found[best if seconds[best] < _GAIN * seconds[0] else 0]


def _slowest(seconds: float, ranks: Ranks) -> float:
    value = torch.tensor(seconds, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=ranks.everyone)
    return value.item()


def _trials(layer: Layer, ranks: Ranks) -> Callable[[int], float]:
    """A function that runs a candidate once with new tokens, and says how long that took."""
    moe, axes = layer.moe, ranks.axes
    dtype = parameter_dtype(layer.precision)
    with torch.device(ranks.device):
        experts = Experts(
            layer.width, moe.experts, axes.ep, axes.etp, layer.recompute == "selective"
        ).to(dtype)
    random = torch.Generator(ranks.device).manual_seed(ranks.rank)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=layer.width**-0.5, generator=random)
    exchange = _exchanges(layer, ranks)

    def run(candidate: int) -> float:
        shape = (layer.tokens, layer.width)
        x_TD, dy_TD = (
            torch.randn(shape, generator=random, dtype=dtype, device=ranks.device) for _ in range(2)
        )
        assignment = _random_rows(layer, ranks, random, dtype)
        chosen = exchange(candidate)

        def there_and_back(x_TD: Tensor) -> Tensor:
            return experts.over(chosen, x_TD, assignment)

        x_TD.requires_grad_()
        began = _now(ranks)
        with autocast(layer.precision, ranks.device):
            if layer.recompute == "full":
                y_TD = checkpoint(there_and_back, x_TD, use_reentrant=False)
            else:
                y_TD = there_and_back(x_TD)
        y_TD.backward(dy_TD.to(y_TD.dtype))
        seconds = _now(ranks) - began
        experts.zero_grad()
        return seconds

    return run


def _exchanges(layer: Layer, ranks: Ranks) -> Callable[[int], Exchange]:
    """That of each candidate."""
    found = candidates(layer.moe.exchange)
    factor = layer.moe.max_rows_factor
    if layer.moe.exchange.kind == "fused":
        return [candidate.over(ranks.axes, factor) for candidate in found].__getitem__
    # one exchange for all that differ in their cuts alone: each has a thread
    plain, overlapped = (candidate.over(ranks.axes, factor) for candidate in found[:2])
    assert isinstance(overlapped, OverlappedExchange)

    def cut(candidate: int) -> Exchange:
        if candidate == 0:
            return plain
        pieces, slabs = found[candidate].pieces, found[candidate].slabs
        assert pieces is not None and slabs is not None
        overlapped.pieces, overlapped.slabs = pieces, slabs
        return overlapped

    return cut


def _random_rows(
    layer: Layer, ranks: Ranks, random: torch.Generator, dtype: torch.dtype
) -> Assignment:
    """Every token to as many experts as the router gives it, whichever."""
    count = layer.moe.experts.count
    choices = min(count, max(1, round(layer.moe.router.rows_per_token)))
    score_TE = torch.rand(layer.tokens, count, generator=random, device=ranks.device)
    weight_TK = torch.full((layer.tokens, choices), 1 / choices, dtype=dtype, device=ranks.device)
    whole = from_choices(score_TE.topk(choices).indices, weight_TK.requires_grad_(), count)
    return sliced(whole, ranks.axes.ep.size, ranks.axes.etp.size)


def _now(ranks: Ranks) -> float:
    """When all ranks, and their devices, have come here."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    dist.barrier(ranks.everyone)
    return time.perf_counter()
