"""One real rank of a domain on one GPU, at full size: its peers are windows filled beforehand.

Rows are pulled, so a peer need do nothing but have them in its window. The flags by which peers
would say so are set to an epoch that never comes, so nothing is waited for but the rows' own way;
``Manner.pace`` makes that as slow as a link. Results go to the peers' windows in the same way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case
from coterie.comm.exchange.fused.virtual import VirtualDomain, sent
from coterie.csrc import fused
from coterie.csrc.fused_launch import (
    FLAG_BYTES,
    MOST_RANKS,
    Here,
    Manner,
    launch,
    table_row,
)
from coterie.moe.assignment import from_choices

_FAR = 1 << 30
"""An epoch that flags say has come."""


def routed(case: Case, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Random choices (T, K) and their weights, of each rank; experts are chosen alike."""
    found = []
    for _ in range(case.ranks):
        choice_TK = torch.rand(case.tokens, case.E, device=device).topk(case.K).indices
        found.append((choice_TK, torch.rand(case.tokens, case.K, device=device)))
    return found


class LoneRank:
    """Rank 0 of ``case.ranks``, its plan, and windows of all of them with random rows."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        assignments = [from_choices(*chosen, case.E) for chosen in routed(case, device)]
        all_sent = sent(assignments, case.tokens)
        self.plan = all_sent[0].plan
        capacity = max(one.token_V.numel() for one in all_sent)
        self.domain = VirtualDomain(case.ranks, case.D, capacity, device)
        flags = self.domain.memory[0][:FLAG_BYTES].view(torch.int32)
        flags[: 2 * MOST_RANKS] = _FAR
        self.here = [Here(self.plan, self.domain.windows[0], 1)]
        # no visits: a combine that brings nothing home
        silent = self.plan._replace(before_S1=torch.zeros_like(self.plan.before_S1))
        self.silent = [Here(silent, self.domain.windows[0], 1)]
        self.rows = self.plan.place_N.numel()
        self.load = self.plan.span_L2[:, 1].tolist()
        before = self.plan.before_S1.tolist()
        self.remote = before[-1] - before[1]
        """Visits from other ranks: rows that cross, each way."""
        self.x_PD = self._pool(case.D)
        self.refresh()

    @property
    def bytes(self) -> int:
        """That cross, each way."""
        return self.remote * self.case.D * 2

    def refresh(self) -> None:
        """Fresh random rows in all windows and in the pool."""
        for windows in self.domain.windows:
            windows.rows_VD.normal_()
        self.x_PD.normal_()
        # padding is zero
        self.x_PD[self.plan.source_P[: self.x_PD.shape[0]] < 0] = 0

    def weights(self, hidden: int) -> tuple[Tensor, Tensor]:
        """Random w_in_EHD and w_out_EFD of its experts, with this hidden width."""
        experts, width = self.case.experts, self.case.D
        w_in = self._normal(experts, 2 * hidden, width) / width**0.5
        return w_in, self._normal(experts, hidden, width) / hidden**0.5

    def pool(self, width: int) -> Tensor:
        """Random rows of the pool; those of padding too."""
        return self._pool(width).normal_()

    def _pool(self, width: int) -> Tensor:
        return torch.empty(self.plan.pool_rows, width, dtype=torch.bfloat16, device=self.device)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=self.device)


def gradient_of_hidden(
    here: Sequence[Here], dy_PD: Tensor, w_out_EFD: Tensor, h_PH: Tensor, manner: Manner
) -> tuple[Tensor, Tensor]:
    """dh_PH and a_PF as :func:`fused.dispatch_backward` computes them, of rows in the pool already.

    Training has no use for that launch, so csrc/fused.py has no name for it.
    """
    (one,) = here
    pool, hidden = one.plan.pool_rows, w_out_EFD.shape[1]
    dh_PH, a_PF = torch.empty_like(h_PH), w_out_EFD.new_empty(pool, hidden)
    partial_PN = fused._partial(one, w_out_EFD, manner)
    row = table_row(
        one, manner, w_out_EFD, hidden, arrival=True, pool_PD=dy_PD, hidden_PH=h_PH, act_PF=a_PF,
        grad_PH=dh_PH, partial_PN=partial_PN,
    )  # fmt: skip
    launch("fused_dispatch_backward", [[row]], manner, 0)
    return dh_PH, a_PF
