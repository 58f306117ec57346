"""Rows to the experts, results back and summed: what forward and backward pass share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from coterie.comm.exchange.plan import rounds_of
from coterie.comm.exchange.virtual.group import Tile, VirtualGroup
from coterie.comm.exchange.virtual.steps import Flag, Step, Workers

Raises = tuple[tuple[Flag, int], ...]


class Pass(ABC):
    """One pass of an exchange. Buffers are poisoned: what is read too early is NaN.

    Every rank has four workers: one pulls rows into the pool, one computes tiles, one sums results
    for each token and puts them into its own slot at the token's rank, one adds up the slots.
    """

    def __init__(self, group: VirtualGroup, token_TD: list[Tensor]) -> None:
        """``token_TD``: what each rank has for each of its tokens; a row carries its token's."""
        self.group = group
        self.token_TD = token_TD
        ranks, width = len(token_TD), token_TD[0].shape[1]
        self.pool_PD = group.poisoned_pools(width)
        self.result_PD = group.poisoned_pools(width)
        self.slot_RTD = [own_TD.new_full((ranks, *own_TD.shape), torch.nan) for own_TD in token_TD]
        self.sum_TD = [torch.full_like(own_TD, torch.nan) for own_TD in token_TD]
        """What each rank is left with."""

    @abstractmethod
    def first(self, rank: int, tile: Tile) -> None:
        """Of a tile, what every column of its result needs."""

    def first_raises(self, rank: int, tile: Tile) -> Raises:
        """Flags for who else needs it."""
        return ()

    @abstractmethod
    def second(self, rank: int, tile: Tile, columns: slice) -> Tensor:
        """The result's columns."""

    @abstractmethod
    def row_sums(self, rank: int, place_A: Tensor, columns: slice) -> Tensor:
        """What rows of the pool, which are done, add to their tokens' sums."""

    def kinds(self) -> dict[str, Callable[[int], Iterator[Step]]]:
        """The steps of each kind of worker, by rank."""
        return {"pull": self.pull, "compute": self.compute, "put": self.put, "reduce": self.reduce}

    def workers(self) -> Workers:
        """The steps of all workers of all ranks."""
        return {
            f"{kind} {rank}": list(steps(rank))
            for rank in range(len(self.group.ranks))
            for kind, steps in self.kinds().items()
        }

    def pull(self, rank: int) -> Iterator[Step]:
        """Rows into the pool: a step for each tile's rows from each rank, in rounds."""
        for source in rounds_of(rank, len(self.group.ranks)):
            for tile in self.group.tiles[rank]:
                if rows := tile.rows_S[source]:
                    run = partial(self.pull_rows, rank, source, tile)
                    yield Step((), run, ((("rows", rank, tile.number), rows),))

    def pull_rows(self, rank: int, source: int, tile: Tile) -> None:
        """A tile's rows from one rank."""
        sent_A = self.group.sent_A(source, rank, tile.rows)
        token_A = self.group.ranks[source].assignment.token_A[sent_A]
        self.pool_PD[rank][self.group.place_A[source][sent_A]] = self.token_TD[source][token_A]

    def compute(self, rank: int) -> Iterator[Step]:
        """All first halves in tile order, then slab by slab all second halves."""
        for tile in self.group.tiles[rank]:
            waits = ((("rows", rank, tile.number), sum(tile.rows_S)),)
            yield Step(waits, partial(self.first, rank, tile), self.first_raises(rank, tile))
        for slab in range(len(self.group.columns)):
            for tile in self.group.tiles[rank]:
                raises = for_owners(tile, "done", rank, slab)
                yield Step((), partial(self._second, rank, tile, slab), raises)

    def _second(self, rank: int, tile: Tile, slab: int) -> None:
        columns = self.group.columns[slab]
        self.result_PD[rank][tile.rows, columns] = self.second(rank, tile, columns)

    def put(self, rank: int) -> Iterator[Step]:
        """Sums for each token into this rank's slot at the token's."""
        for slab in range(len(self.group.columns)):
            for owner, tiles in self.owners(rank):
                waits = ((("done", rank, slab, owner), tiles),)
                run = partial(self._put_sums, rank, owner, slab)
                yield Step(waits, run, ((("put", owner, slab), 1),))

    def owners(self, rank: int) -> Iterator[tuple[int, int]]:
        """Ranks that sent rows to ``rank``, itself last, and how many tiles have some of them."""
        for owner in reversed(rounds_of(rank, len(self.group.ranks))):
            if tiles := sum(tile.rows_S[owner] > 0 for tile in self.group.tiles[rank]):
                yield owner, tiles

    def _put_sums(self, rank: int, owner: int, slab: int) -> None:
        """A token's rows are summed in the order of experts."""
        columns, sent_A = self.group.columns[slab], self.group.sent_A(owner, rank)
        row_AD = self.row_sums(rank, self.group.place_A[owner][sent_A], columns)
        slot_TD = self.slot_RTD[owner][rank]
        slot_TD[:, columns] = torch.zeros_like(slot_TD[:, columns]).index_add_(
            0, self.group.ranks[owner].assignment.token_A[sent_A], row_AD
        )

    def reduce(self, rank: int) -> Iterator[Step]:
        """The slots' sum, in the order of ranks."""
        holders = self.holders(rank)
        for slab in range(len(self.group.columns)):
            waits = ((("put", rank, slab), len(holders)),)
            yield Step(waits, partial(self._sum_slots, rank, slab, holders), ())

    def holders(self, rank: int) -> Tensor:
        """The ranks that ``rank`` sent rows to."""
        return self.group.holder_A[rank].unique()

    def _sum_slots(self, rank: int, slab: int, holders: Tensor) -> None:
        columns = self.group.columns[slab]
        self.sum_TD[rank][:, columns] = self.slot_RTD[rank][holders][..., columns].sum(0)


def for_owners(tile: Tile, *flag: str | int) -> Raises:
    """Raise a flag by 1 for each rank that some of the tile's rows come from."""
    return tuple(((*flag, owner), 1) for owner, rows in enumerate(tile.rows_S) if rows)
