"""The reference exchange: one all-to-all there, one back, with the experts between."""

from typing import NamedTuple

import torch
from torch import Tensor

from coterie.comm.exchange.base import SplitExperts
from coterie.comm.exchange.between_ranks import ExchangeBetweenRanks, Trip
from coterie.comm.exchange.local import LocalExchange
from coterie.comm.exchange.rows import all_to_all_rows
from coterie.csrc.inverse import invert
from coterie.csrc.permute import permute


class AllToAllExchange(ExchangeBetweenRanks):
    """Rows go to the rank that holds their expert and come back, over any backend.

    The backward pass takes the same ways with the gradients.
    """

    def travel(self, sent_AD: Tensor, trip: Trip, experts: SplitExperts) -> Tensor:
        """All rows go, then all experts compute, then all results come."""
        received_AD = all_to_all_rows(sent_AD, trip.sent_R, trip.received_R, self.meter)
        if self.deduplicate:
            onward = self.onward or LocalExchange()
            y_AD = onward(received_AD, received_rows(trip), experts)
        else:
            y_AD = _compute(received_AD, trip.load_SL, experts)
        return all_to_all_rows(y_AD, trip.received_R, trip.sent_R, self.meter)


class ReceivedRows(NamedTuple):
    """The rows of tokens that came from other ranks; ``Rows`` for the next exchange."""

    token_A: Tensor
    expert_A: Tensor
    weight_A: Tensor
    load_E: Tensor


def received_rows(trip: Trip) -> ReceivedRows:
    """What is to be computed of the tokens that this rank receives."""
    assert trip.visit_A is not None and trip.weight_A is not None, "rows travel, not tokens"
    order_A = _by_expert(trip.load_SL)
    received_S = torch.tensor(trip.received_R, device=order_A.device)
    first_S = received_S.cumsum(0) - received_S
    token_A = trip.visit_A + first_S.repeat_interleave(trip.load_SL.sum(1))
    load_L = trip.load_SL.sum(0)
    expert_A = torch.arange(len(load_L), device=order_A.device).repeat_interleave(load_L)
    return ReceivedRows(token_A[order_A], expert_A, trip.weight_A[order_A], load_L)


def _compute(received_AD: Tensor, in_SE: Tensor, experts: SplitExperts) -> Tensor:
    """Rows arrive by (source rank, expert); experts want them by (expert, source rank)."""
    by_expert_A = _by_expert(in_SE)
    back_A = invert(by_expert_A, by_expert_A.numel())
    x_AD = permute(received_AD, by_expert_A, back_A)
    del received_AD  # a copy less while the experts compute
    y_AD = experts(x_AD, in_SE.sum(0))
    arrival_A = back_A.row_A
    return permute(y_AD, arrival_A, invert(arrival_A, arrival_A.numel()))


def _by_expert(in_SE: Tensor) -> Tensor:
    """int64 order that sorts rows from (source rank, expert) to (expert, source rank)."""
    experts_SE = torch.arange(in_SE.shape[1], device=in_SE.device).expand_as(in_SE)
    return experts_SE.flatten().repeat_interleave(in_SE.flatten()).argsort(stable=True)
