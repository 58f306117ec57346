"""Random layers for the fused kernels, and the truth about them: plain loops in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.comm.exchange.fused import passes
from coterie.comm.exchange.fused.virtual import Sent, VirtualDomain, sent
from coterie.csrc.fused import Hidden, Manner
from coterie.moe.assignment import Assignment, from_choices

_NONE = torch.empty(0)


@dataclass
class Case:
    """A layer of ``experts`` experts on ``ranks`` ranks, each with ``tokens`` tokens."""

    ranks: int
    experts: int
    choices: int
    tokens: int
    width: int
    hidden: int
    seed: int = 0
    hot: int | None = None
    """An expert that every token chooses."""
    busy: int | None = None
    """The last rank that has tokens' rows; the others' are dropped. None: all have."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=random).bfloat16().to(self.device)

        self.x_STD = normal(self.ranks, self.tokens, self.width)
        self.dy_STD = normal(self.ranks, self.tokens, self.width)
        self.w_in_EHD = normal(self.experts, 2 * self.hidden, self.width) * self.width**-0.5
        self.w_out_EFD = normal(self.experts, self.hidden, self.width) * self.hidden**-0.5
        self.assignments = [self._assignment(rank, random) for rank in range(self.ranks)]

    @cached_property
    def sent(self) -> list[Sent]:
        """Who sends what, and everybody's plan."""
        return sent(self.assignments, self.tokens)

    def _assignment(self, rank: int, random: torch.Generator) -> Assignment:
        scores_TE = torch.rand(self.tokens, self.experts, generator=random)
        if self.hot is not None:
            scores_TE[:, self.hot] = 2
        expert_TK = scores_TE.topk(self.choices).indices.to(self.device)
        weight_TK = torch.rand(self.tokens, self.choices, generator=random).to(self.device)
        idle = self.busy is not None and rank > self.busy
        keep_TK = torch.full_like(expert_TK, not idle, dtype=torch.bool)
        return from_choices(expert_TK, weight_TK, self.experts, keep_TK if idle else None)

    def domain(self) -> VirtualDomain:
        """Windows for it, poisoned."""
        capacity = max(one.token_V.numel() for one in self.sent) + 1
        domain = VirtualDomain(self.ranks, self.width, capacity, self.device)
        for windows in domain.windows:
            windows.rows_VD.fill_(torch.nan)
            windows.home_VD.fill_(torch.nan)
        return domain


@dataclass
class Outcome:
    """What a layer gives: results and gradients."""

    y_STD: Tensor
    dx_STD: Tensor
    dweight: list[Tensor]
    dw_in_EHD: Tensor
    dw_out_EFD: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.y_STD, self.dx_STD, torch.cat(self.dweight), self.dw_in_EHD, self.dw_out_EFD]

    def errors(self, truth: "Outcome") -> list[float]:
        """Of each, the largest error over the root mean square of the truth."""
        found = []
        for mine, true in zip(self.tensors(), truth.tensors(), strict=True):
            assert mine.shape == true.shape
            assert mine.isfinite().all(), "something was read that nobody wrote"
            size = true.double().square().mean().sqrt().clamp(min=1e-30)
            found.append(
                float((mine.double() - true.double()).abs().max() / size) if mine.numel() else 0
            )
        return found


def run(
    case: Case,
    manner: Manner,
    domain: VirtualDomain | None = None,
    keep: bool = True,
    again: bool = False,
    of_weights: bool = True,
) -> Outcome:
    """Both passes of the fused kernels. ``keep``: the first product, else it is computed again;
    ``again``: rows are sent a second time for the backward pass; ``of_weights``: else their
    gradients are empty."""
    domain = domain or case.domain()
    ranks = range(case.ranks)
    plans = [one.plan for one in case.sent]
    token_V = [one.token_V for one in case.sent]
    w_in, w_out = list(case.w_in_EHD.chunk(case.ranks)), list(case.w_out_EFD.chunk(case.ranks))
    sent_VD = [case.x_STD[rank][token_V[rank]] for rank in ranks]
    results = passes.forward(domain.here(plans), sent_VD, w_in, w_out, manner, keep)
    hidden: list[Hidden] = [one.hidden for one in results]
    if again:
        hidden = passes.arrive(domain.here(plans), sent_VD, w_in, manner, keep)
    dreturned_VD = [case.dy_STD[rank][token_V[rank]] for rank in ranks]
    grads = passes.backward(
        domain.here(plans), dreturned_VD, hidden, w_in, w_out, manner, of_weights
    )

    def summed(rows_VD: list[Tensor]) -> Tensor:
        zeros = case.x_STD.new_zeros(case.x_STD.shape, dtype=torch.float32)
        for rank in ranks:
            zeros[rank].index_add_(0, token_V[rank], rows_VD[rank].float())
        return zeros

    rows = sum(one.token_A.numel() for one in case.assignments)
    dweight = torch.full((rows,), torch.nan, device=case.device)
    for one, grad in zip(case.sent, grads, strict=True):
        dweight[one.received_N] = grad.dweight_N
    return Outcome(
        summed([one.returned_VD for one in results]),
        summed([grad.dsent_VD for grad in grads]),
        list(dweight.split([one.token_A.numel() for one in case.assignments])),
        torch.cat([grad.dw_in_EHD for grad in grads if grad.dw_in_EHD is not None] or [_NONE]),
        torch.cat([grad.dw_out_EFD for grad in grads if grad.dw_out_EFD is not None] or [_NONE]),
    )


def truth(case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    """The same, expert by expert; in bfloat16 by PyTorch's own products, with sums over a token's
    rows in float32."""
    total = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [case.x_STD, case.w_in_EHD, case.w_out_EFD]
    x_STD, w_in, w_out = (x.detach().to(dtype).requires_grad_() for x in leaves)
    weights = [one.weight_A.detach().to(total).requires_grad_() for one in case.assignments]
    results = []
    for rank, (own, weight_A) in enumerate(zip(case.assignments, weights, strict=True)):
        y_TD = torch.zeros(case.x_STD.shape[1:], dtype=total, device=case.device)
        rows = own.token_A.split(own.load_E.tolist())
        shares = weight_A.split(own.load_E.tolist())
        for expert, (token, share) in enumerate(zip(rows, shares, strict=True)):
            h = x_STD[rank][token] @ w_in[expert].T
            a = F.silu(h[:, : case.hidden]) * h[:, case.hidden :]
            y = (a @ w_out[expert]).to(total)
            y_TD = y_TD.index_add(0, token, share[:, None] * y)
        results.append(y_TD)
    torch.autograd.backward(results, [dy.to(total) for dy in case.dy_STD])

    def gradient(x: Tensor) -> Tensor:
        return torch.zeros_like(x) if x.grad is None else x.grad

    return Outcome(
        torch.stack(results).detach(),
        gradient(x_STD),
        [gradient(weight) for weight in weights],
        gradient(w_in),
        gradient(w_out),
    )
