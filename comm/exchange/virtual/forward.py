"""The forward pass: tokens to experts, weighted results back."""

from torch import Tensor

from coterie.comm.exchange.virtual.group import Tile, VirtualGroup
from coterie.comm.exchange.virtual.passes import Pass


class Forward(Pass):
    """y = Σ over a token's rows of weight · expert(x).

    The pools of rows, of their weights and of first products stay for the backward pass; results
    are not needed there.
    """

    def __init__(self, group: VirtualGroup) -> None:
        super().__init__(group, [rank.x_TD for rank in group.ranks])
        experts = group.ranks[0].experts
        self.weight_P = group.poisoned_pools()
        self.h_PH = group.poisoned_pools(experts.w_in_LHD.shape[1])
        self.a_PF = group.poisoned_pools(experts.w_out_LFD.shape[1])

    @property
    def y_TD(self) -> list[Tensor]:
        """The result of each rank."""
        return self.sum_TD

    def pull_rows(self, rank: int, source: int, tile: Tile) -> None:
        """With their weights."""
        super().pull_rows(rank, source, tile)
        sent_A = self.group.sent_A(source, rank, tile.rows)
        weight_A = self.group.ranks[source].assignment.weight_A.detach()
        self.weight_P[rank][self.group.place_A[source][sent_A]] = weight_A[sent_A]

    def first(self, rank: int, tile: Tile) -> None:
        """The first product and the activation."""
        experts = self.group.ranks[rank].experts
        h_PH = self.pool_PD[rank][tile.rows] @ experts.w_in_LHD[tile.expert].T
        self.h_PH[rank][tile.rows] = h_PH
        self.a_PF[rank][tile.rows] = experts.activation.forward(h_PH)

    def second(self, rank: int, tile: Tile, columns: slice) -> Tensor:
        """The second product."""
        w_out_FD = self.group.ranks[rank].experts.w_out_LFD[tile.expert]
        return self.a_PF[rank][tile.rows] @ w_out_FD[:, columns]

    def row_sums(self, rank: int, place_A: Tensor, columns: slice) -> Tensor:
        """Results, weighted."""
        return self.weight_P[rank][place_A, None] * self.result_PD[rank][place_A, columns]
