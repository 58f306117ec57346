"""An overlapped exchange between ranks that live in one process: the oracle of the fused kernels.

Peers' buffers are ordinary tensors. Every rank has four workers, each a fixed list of steps: one
pulls rows into the pool, one computes tiles, one sums results for each token and puts them into
its own slot at the token's rank, one adds up the slots. They meet in flags alone, counters that
only rise: a step waits until its flags have their full count. Whoever runs the steps may choose any
order that respects them (:func:`execute`), and the result is the same to the bit: no sum depends on
order.

The steps, flags and orders are those of Comet (arXiv 2502.19811, section 3.2): dispatch is split by
rows, tiles start as soon as their rows are there; the way back is split by columns ("slabs"), slab
after slab over all tiles, so that the first leaves while the next is computed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from coterie.comm.exchange.base import Rows
from coterie.comm.exchange.plan import Pools, Tiles, places, pools, rounds_of, tiles

Flag = tuple[str | int, ...]
"""A counter: its kind, the rank that has it, and where it stands there."""


class Step(NamedTuple):
    """What a worker does at a time."""

    waits: tuple[tuple[Flag, int], ...]
    """Flags, and the full count of each."""
    run: Callable[[], None]
    raises: tuple[tuple[Flag, int], ...]
    """Flags that are raised afterwards, and by how much."""


class Halves(Protocol):
    """The experts of one rank, cut where Comet cuts them; in the backward pass, their gradients."""

    def first(self, expert: int, x_PD: Tensor) -> Tensor:
        """What every column of the result needs, of rows of one local expert: hidden, (P, F)."""

    def second(self, expert: int, hidden_PF: Tensor, columns: slice) -> Tensor:
        """The result's columns."""


@dataclass(frozen=True)
class VirtualRank:
    """What one rank brings."""

    x_TD: Tensor
    assignment: Rows
    experts: Halves


Workers = dict[str, list[Step]]
"""The steps of each worker, in order, by a name that says its rank."""


class VirtualExchange:
    """One exchange between ``ranks``. Buffers are poisoned: what is read too early is NaN.

    ``tile`` rows and ``slabs`` runs of columns (as even as they can be) are computed at a time.
    """

    def __init__(self, ranks: Sequence[VirtualRank], tile: int = 128, slabs: int = 1) -> None:
        self.ranks = ranks
        self.tile = tile
        width = ranks[0].x_TD.shape[1]
        edges = [width * slab // slabs for slab in range(slabs + 1)]
        self.columns = [slice(*pair) for pair in pairwise(edges)]
        load_SE = torch.stack([rank.assignment.load_E for rank in ranks])
        self.pools: Pools = pools(load_SE, align=tile)
        self.tiles: list[Tiles] = []
        """Of each rank."""
        for rank in range(len(ranks)):
            rows_L = self.pools.rows_RLS[rank].sum(1)
            self.tiles.append(tiles(self.pools, rank, tile, int((-(-rows_L // tile)).sum())))
        self.place_A = [
            places(self.pools, load_E, rank, int(load_E.sum()))
            for rank, load_E in enumerate(load_SE)
        ]
        local = load_SE.shape[1] // len(ranks)
        self.holder_A = [rank.assignment.expert_A // local for rank in ranks]
        """Of each rank's rows: the rank that holds the expert."""

        nan = torch.nan
        sizes = self.pools.size_R.tolist()
        self.pool_PD = [
            rank.x_TD.new_full((size, width), nan) for rank, size in zip(ranks, sizes, strict=True)
        ]
        self.result_PD = [torch.full_like(pool, nan) for pool in self.pool_PD]
        self.hidden: list[dict[int, Tensor]] = [{} for _ in ranks]
        self.slot_RTD = [rank.x_TD.new_full((len(ranks), *rank.x_TD.shape), nan) for rank in ranks]
        self.y_TD = [torch.full_like(rank.x_TD, nan) for rank in ranks]

    def workers(self) -> Workers:
        """The steps of all workers of all ranks."""
        found: Workers = {}
        for rank in range(len(self.ranks)):
            found[f"pull {rank}"] = list(self._pull(rank))
            found[f"compute {rank}"] = list(self._compute(rank))
            found[f"put {rank}"] = list(self._put(rank))
            found[f"reduce {rank}"] = list(self._reduce(rank))
        return found

    def _pull(self, rank: int) -> Iterator[Step]:
        """Rows into the pool: a step for each tile's rows from each rank, in rounds."""
        found = self.tiles[rank]
        rows_QS = found.rows_QS.tolist()
        for source in rounds_of(rank, len(self.ranks)):
            for number, rows_S in enumerate(rows_QS):
                if rows := rows_S[source]:
                    yield Step(
                        (),
                        partial(self._pull_rows, rank, source, number),
                        ((("rows", rank, number), rows),),
                    )

    def _pull_rows(self, rank: int, source: int, number: int) -> None:
        found = self.tiles[rank]
        first = int(found.first_Q[number])
        sent_A = self.holder_A[source] == rank
        place_A = self.place_A[source]
        mine_A = sent_A & (place_A >= first) & (place_A < first + int(found.rows_QS[number].sum()))
        sender = self.ranks[source]
        self.pool_PD[rank][place_A[mine_A]] = sender.x_TD[sender.assignment.token_A[mine_A]]

    def _compute(self, rank: int) -> Iterator[Step]:
        """All first halves in tile order, then slab by slab all second halves."""
        rows_QS = self.tiles[rank].rows_QS
        for number, rows in enumerate(rows_QS.sum(1).tolist()):
            yield Step(((("rows", rank, number), rows),), partial(self._first, rank, number), ())
        for slab in range(len(self.columns)):
            for number, rows_S in enumerate(rows_QS.tolist()):
                done = [((("done", rank, slab, s)), 1) for s, rows in enumerate(rows_S) if rows]
                yield Step((), partial(self._second, rank, number, slab), tuple(done))

    def _rows(self, rank: int, number: int) -> tuple[int, slice]:
        """A tile's local expert and its rows in the pool."""
        found = self.tiles[rank]
        first = int(found.first_Q[number])
        return int(found.expert_Q[number]), slice(first, first + int(found.rows_QS[number].sum()))

    def _first(self, rank: int, number: int) -> None:
        expert, rows = self._rows(rank, number)
        experts = self.ranks[rank].experts
        self.hidden[rank][number] = experts.first(expert, self.pool_PD[rank][rows])

    def _second(self, rank: int, number: int, slab: int) -> None:
        expert, rows = self._rows(rank, number)
        columns, hidden = self.columns[slab], self.hidden[rank][number]
        result = self.ranks[rank].experts.second(expert, hidden, columns)
        self.result_PD[rank][rows, columns] = result

    def _put(self, rank: int) -> Iterator[Step]:
        """Sums for each token into this rank's slot at the token's; other ranks come first."""
        tiles_S = (self.tiles[rank].rows_QS > 0).sum(0).tolist()
        others_first = [(rank + j) % len(self.ranks) for j in range(1, len(self.ranks) + 1)]
        for slab in range(len(self.columns)):
            for owner in others_first:
                waits = ((("done", rank, slab, owner), tiles_S[owner]),)
                if tiles_S[owner]:
                    run = partial(self._put_sums, rank, owner, slab)
                    yield Step(waits, run, ((("put", owner, slab), 1),))

    def _put_sums(self, rank: int, owner: int, slab: int) -> None:
        """Σ weight · result over a token's rows on ``rank``, in the order of experts."""
        rows, columns = self.ranks[owner].assignment, self.columns[slab]
        mine_A = self.holder_A[owner] == rank
        weighted = self.result_PD[rank][self.place_A[owner][mine_A], columns]
        weighted = weighted * rows.weight_A.detach()[mine_A, None]
        slot_TD = self.slot_RTD[owner][rank]
        slot_TD[:, columns] = torch.zeros_like(slot_TD[:, columns]).index_add_(
            0, rows.token_A[mine_A], weighted
        )

    def _reduce(self, rank: int) -> Iterator[Step]:
        """The slots' sum, in the order of ranks."""
        holders = self.holder_A[rank].unique()
        for slab in range(len(self.columns)):
            waits = ((("put", rank, slab), len(holders)),)
            yield Step(waits, partial(self._sum_slots, rank, slab, holders), ())

    def _sum_slots(self, rank: int, slab: int, holders: Tensor) -> None:
        columns = self.columns[slab]
        self.y_TD[rank][:, columns] = self.slot_RTD[rank][holders][..., columns].sum(0)


def execute(workers: Workers, pick: Callable[[list[str]], str]) -> None:
    """Run all steps; of the workers that need not wait, ``pick`` names the next.

    Raises RuntimeError, with what each worker waits for, when none can go on.
    """
    flags: Counter[Flag] = Counter()
    at = dict.fromkeys(workers, 0)
    while left := {
        name: steps[at[name]] for name, steps in workers.items() if at[name] < len(steps)
    }:
        free = [name for name, step in left.items() if ready(step, flags)]
        if not free:
            waits = "; ".join(f"{name} for {step.waits}" for name, step in left.items())
            raise RuntimeError(f"no worker can go on: {waits}")
        name = pick(free)
        left[name].run()
        flags.update(dict(left[name].raises))
        at[name] += 1


def ready(step: Step, flags: Counter[Flag]) -> bool:
    """Whether all that ``step`` waits for is there."""
    return all(flags[flag] >= count for flag, count in step.waits)
