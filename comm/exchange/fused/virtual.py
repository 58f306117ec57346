"""All ranks of a domain on one device: virtual ranks, for tests and benchmarks of the kernels.

Windows are ordinary tensors; a launch stands for all ranks at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.comm.exchange.base import Rows
from coterie.comm.exchange.visits import visits
from coterie.csrc import fused_plan
from coterie.csrc.fused_launch import Here, Windows
from coterie.csrc.fused_plan import Plan


class Sent(NamedTuple):
    """What one rank sends, and the plan of what it receives."""

    token_V: Tensor
    """int64: the token of each row that it sends, by rank that it goes to."""
    received_N: Tensor
    """int64: which of all ranks' rows, one rank's after the other's, each received row is."""
    plan: Plan


class VirtualDomain:
    """``ranks`` ranks of ``width`` on one device, with room for ``capacity`` rows to be sent."""

    def __init__(self, ranks: int, width: int, capacity: int, device: torch.device | str) -> None:
        self.ranks = ranks
        self.epoch = 0
        size = -(-Windows.bytes_for(capacity, width) // 1024) * 1024
        self.memory = torch.zeros(ranks, size, dtype=torch.uint8, device=device)
        """Each rank's window; zeros: flags begin there."""
        address_R = torch.tensor([own.data_ptr() for own in self.memory], device=device)
        self.windows = [Windows.of(own, address_R, capacity, width) for own in self.memory]

    def here(self, plans: Sequence[Plan]) -> list[Here]:
        """All ranks, for the next dispatch and its combine."""
        self.epoch += 1
        return [
            Here(plan, windows, self.epoch)
            for plan, windows in zip(plans, self.windows, strict=True)
        ]


def sent(assignments: Sequence[Rows], tokens: int, run: int = 8) -> list[Sent]:
    """Of each rank's assignment of ``tokens`` tokens. Waits for the device."""
    ranks = len(assignments)
    load_SRL = torch.stack([rows.load_E for rows in assignments]).unflatten(1, (ranks, -1))
    rows_SR = load_SRL.sum(2).tolist()
    own_S = [
        visits(rows.token_A, rows_R, tokens)
        for rows, rows_R in zip(assignments, rows_SR, strict=True)
    ]
    visits_SR = [own.count_R.tolist() for own in own_S]
    first_S = [0]
    for rows in assignments:
        first_S.append(first_S[-1] + rows.token_A.numel())
    found = []
    for rank in range(ranks):
        parts = [
            slice(sum(rows_SR[source][:rank]), sum(rows_SR[source][: rank + 1]))
            for source in range(ranks)
        ]
        plan = fused_plan.plan(
            load_SRL[:, rank],
            torch.cat([own.visit_A[part] for own, part in zip(own_S, parts, strict=True)]),
            torch.cat([rows.weight_A[part] for rows, part in zip(assignments, parts, strict=True)]),
            [visits_R[rank] for visits_R in visits_SR],
            [sum(visits_R[:rank]) for visits_R in visits_SR],
            rank,
            run,
        )
        received_N = torch.cat(
            [
                torch.arange(first + part.start, first + part.stop, device=load_SRL.device)
                for first, part in zip(first_S, parts, strict=False)
            ]
        )
        found.append(Sent(own_S[rank].token_B, received_N, plan))
    return found
