"""The two parts of a layer's time, each alone: the work without the way, the way without it."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.base import Rows, SplitExperts
from coterie.comm.exchange.local import LocalExchange
from coterie.comm.exchange.rows import start_all_to_all
from coterie.moe.assignment import Assignment


class StayingRows:
    """An exchange that sends nothing: each row is computed by the expert of this rank that has the
    place of the one it was meant for. As many rows, on as many experts, for each rank."""

    meters = ()
    waits = ()

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: SplitExperts) -> Tensor:
        load_RL = assignment.load_E.unflatten(0, (self.ranks, -1))
        expert_A = assignment.expert_A % load_RL.shape[1]
        order_A = expert_A.argsort(stable=True)
        own = Assignment(
            assignment.token_A[order_A],
            expert_A[order_A],
            assignment.weight_A[order_A],
            load_RL.sum(0),
        )
        return LocalExchange()(x_TD, own, experts)


class TravellingRows:
    """The all-to-alls of a layer, there and back, of rows that nobody computes."""

    def __init__(self, group: ProcessGroup, width: int) -> None:
        self.group, self.width = group, width

    def prepare(self, load_E: Tensor) -> None:
        """``load_E``: rows of this rank for each expert."""
        ranks = self.group.size()
        sent_R = load_E.unflatten(0, (ranks, -1)).sum(1)
        received_R = torch.empty_like(sent_R)
        dist.all_to_all_single(received_R, sent_R, group=self.group)
        self.sent_R, self.received_R = sent_R.tolist(), received_R.tolist()
        self.here_AD = torch.randn(sum(self.sent_R), self.width)
        self.there_AD = torch.empty(sum(self.received_R), self.width)

    def travel(self) -> None:
        """One way and the other."""
        group = self.group
        here_AD, there_AD = self.here_AD, self.there_AD
        for work in start_all_to_all(there_AD, here_AD, self.received_R, self.sent_R, group):
            work.wait()
        for work in start_all_to_all(here_AD, there_AD, self.sent_R, self.received_R, group):
            work.wait()
