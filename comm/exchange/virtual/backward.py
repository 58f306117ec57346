"""The backward pass: gradients of results to the experts, gradients of tokens back.

With y = Σ p · expert(x), a row carries its token's dy, without p. Its expert finds from it da', the
gradient of its hidden a but for p, and dp = ⟨da', a⟩, which is ⟨dy, expert(x)⟩: no result of the
forward pass is kept. Then da = p · da'; dx is split by columns and summed, unweighted, on the way
back, as results are.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from coterie.comm.exchange.virtual.forward import Forward
from coterie.comm.exchange.virtual.group import Tile
from coterie.comm.exchange.virtual.passes import Pass, Raises, for_owners
from coterie.comm.exchange.virtual.steps import Step


class Backward(Pass):
    """Gradients of ``forward``, which has run, given those of each rank's result.

    Plan, flags and order are the forward pass's. A fifth worker adds up the gradients of the
    experts' weights, for which nobody waits: it fills the time that the others leave. It takes the
    tiles in their order, whenever they are computed.
    """

    def __init__(self, forward: Forward, dy_TD: list[Tensor]) -> None:
        group = forward.group
        super().__init__(group, dy_TD)
        self.forward = forward
        self.dp_P = group.poisoned_pools()
        self.dh_PH = list(map(_poisoned, forward.h_PH))
        self.pa_PF = list(map(_poisoned, forward.a_PF))
        """p · a."""
        weights = [rank.assignment.weight_A for rank in group.ranks]
        self.dp_A = list(map(_poisoned, weights))
        """For each of a rank's rows a place that the holder of its expert writes."""
        self.dweight_A = list(map(_poisoned, weights))
        self.dw_in_LHD = [torch.zeros_like(rank.experts.w_in_LHD) for rank in group.ranks]
        self.dw_out_LFD = [torch.zeros_like(rank.experts.w_out_LFD) for rank in group.ranks]

    @property
    def dx_TD(self) -> list[Tensor]:
        """The gradient of each rank's tokens."""
        return self.sum_TD

    def first(self, rank: int, tile: Tile) -> None:
        """dp, dh, and what the gradients of the experts' weights need."""
        experts, rows = self.group.ranks[rank].experts, tile.rows
        p_P1 = self.forward.weight_P[rank][rows, None]
        da_PF = self.pool_PD[rank][rows] @ experts.w_out_LFD[tile.expert].T
        dh_PH, a_PF = experts.activation.backward(da_PF, self.forward.h_PH[rank][rows])
        self.dp_P[rank][rows] = (da_PF * a_PF).sum(1)
        self.dh_PH[rank][rows] = p_P1 * dh_PH
        self.pa_PF[rank][rows] = p_P1 * a_PF

    def first_raises(self, rank: int, tile: Tile) -> Raises:
        """For the gradients of combine weights and of experts."""
        return ((("hidden", rank, tile.number), 1), *for_owners(tile, "dp", rank))

    def second(self, rank: int, tile: Tile, columns: slice) -> Tensor:
        """dx of the rows."""
        w_in_HD = self.group.ranks[rank].experts.w_in_LHD[tile.expert]
        return self.dh_PH[rank][tile.rows] @ w_in_HD[:, columns]

    def row_sums(self, rank: int, place_A: Tensor, columns: slice) -> Tensor:
        """p is in them already."""
        return self.result_PD[rank][place_A, columns]

    def kinds(self) -> dict[str, Callable[[int], Iterator[Step]]]:
        """With the fifth."""
        return {**super().kinds(), "weights": self.weights}

    def weights(self, rank: int) -> Iterator[Step]:
        """Gradients of the experts' weights, tile by tile."""
        for tile in self.group.tiles[rank]:
            waits = ((("hidden", rank, tile.number), 1),)
            yield Step(waits, partial(self._add_weights, rank, tile), ())

    def _add_weights(self, rank: int, tile: Tile) -> None:
        rows = tile.rows
        x_PD, dy_PD = self.forward.pool_PD[rank][rows], self.pool_PD[rank][rows]
        self.dw_in_LHD[rank][tile.expert] += self.dh_PH[rank][rows].T @ x_PD
        self.dw_out_LFD[rank][tile.expert] += self.pa_PF[rank][rows].T @ dy_PD

    def put(self, rank: int) -> Iterator[Step]:
        """First each row's dp to its rank, one number a row; then as forward."""
        for owner, tiles in self.owners(rank):
            waits = ((("dp", rank, owner), tiles),)
            yield Step(waits, partial(self._put_dp, rank, owner), ((("put dp", owner), 1),))
        yield from super().put(rank)

    def _put_dp(self, rank: int, owner: int) -> None:
        sent_A = self.group.sent_A(owner, rank)
        self.dp_A[owner][sent_A] = self.dp_P[rank][self.group.place_A[owner][sent_A]]

    def reduce(self, rank: int) -> Iterator[Step]:
        """First the combine weights' gradients, once all of them are there."""
        waits = ((("put dp", rank), len(self.holders(rank))),)
        yield Step(waits, partial(self._take_dp, rank), ())
        yield from super().reduce(rank)

    def _take_dp(self, rank: int) -> None:
        self.dweight_A[rank].copy_(self.dp_A[rank])


def _poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan, requires_grad=False)
