"""A random layer over virtual ranks: by the fused kernels, of PyTorch's own ops, and the truth.

Legend: R ranks, T tokens of each, K choices, D width, F hidden width, E experts of all ranks,
X tokens of all ranks, A rows of all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.comm.exchange.fused import passes
from coterie.comm.exchange.fused.virtual import VirtualDomain, sent
from coterie.csrc.fused_launch import FLAG_BYTES, Here, Manner
from coterie.moe.assignment import Assignment, from_choices

Found = dict[str, Tensor]
"""y, dx, dweight, dw_in and dw_out: of all ranks, one after the other."""
Errors = dict[str, tuple[float, float]]
"""Of each the largest error over the root mean square of the truth, and norm over norm."""


@dataclass(frozen=True)
class Layer:
    """Its size, and how tokens choose experts: evenly, where nothing else is said."""

    R: int
    E: int
    K: int
    T: int
    D: int
    F: int
    hot: int | None = None
    """An expert that all tokens choose."""
    half: bool = False
    """The second half of the experts gets nothing."""
    busy: int | None = None
    """The last rank that sends its tokens; the others drop theirs. None: all send, -1: nobody."""
    seed: int = 0

    def inputs(self, device: torch.device | str = "cpu") -> "Inputs":
        """The same ones every time."""
        random = torch.Generator(device).manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=random, device=device).bfloat16()

        return Inputs(
            normal(self.R, self.T, self.D),
            normal(self.R, self.T, self.D),
            normal(self.E, 2 * self.F, self.D) * self.D**-0.5,
            normal(self.E, self.F, self.D) * self.F**-0.5,
            [self._assignment(rank, random) for rank in range(self.R)],
        )

    def _assignment(self, rank: int, random: torch.Generator) -> Assignment:
        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=random, device=random.device)

        score_TE = uniform(self.T, self.E // 2 if self.half else self.E)
        if self.hot is not None:
            score_TE[:, self.hot] = 2
        expert_TK = score_TE.topk(self.K).indices
        idle = self.busy is not None and rank > self.busy
        keep_TK = torch.zeros_like(expert_TK, dtype=torch.bool) if idle else None
        return from_choices(expert_TK, uniform(self.T, self.K), self.E, keep_TK)


@dataclass
class Inputs:
    x_RTD: Tensor
    dy_RTD: Tensor
    w_in_EHD: Tensor
    w_out_EFD: Tensor
    rows_R: list[Assignment]


class Fused:
    """The fused kernels; all ranks in one launch. ``domain``: one that has served before."""

    def __init__(self, given: Inputs, domain: VirtualDomain | None = None) -> None:
        self.given = given
        ranks, self.tokens, width = given.x_RTD.shape
        self.sent = sent(given.rows_R, self.tokens)
        capacity = max(one.token_V.numel() for one in self.sent) + 1
        self.domain = domain or VirtualDomain(ranks, width, capacity, given.x_RTD.device)
        self.w_in = list(given.w_in_EHD.chunk(ranks))
        self.w_out = list(given.w_out_EFD.chunk(ranks))

    def here(self) -> list[Here]:
        """All ranks, for the next dispatch. Windows hold NaN, but for their flags."""
        self.domain.memory[:, FLAG_BYTES:] = 0xFF
        return self.domain.here([one.plan for one in self.sent])

    def run(
        self, manner: Manner, keep: bool = True, again: bool = False, of_weights: bool = True
    ) -> Found:
        """Both passes. ``keep``: the first product, else it is computed again; ``again``: rows are
        sent a second time for the backward pass; ``of_weights``: else their gradients are empty."""
        x_VD, dy_VD = self._rows(self.given.x_RTD), self._rows(self.given.dy_RTD)
        made = passes.forward(self.here(), x_VD, self.w_in, self.w_out, manner, keep)
        hidden = [one.hidden for one in made]
        if again:
            hidden = passes.arrive(self.here(), x_VD, self.w_in, manner, keep)
        grads = passes.backward(
            self.here(), dy_VD, hidden, self.w_in, self.w_out, manner, of_weights
        )
        weight_A = torch.cat([rows.weight_A for rows in self.given.rows_R])
        dweight_A = torch.full_like(weight_A, torch.nan)
        for own, grad in zip(self.sent, grads, strict=True):
            dweight_A[own.received_N] = grad.dweight_N
        return {
            "y": self._summed([one.returned_VD for one in made]),
            "dx": self._summed([grad.dsent_VD for grad in grads]),
            "dweight": dweight_A,
            "dw_in": _joined([grad.dw_in_EHD for grad in grads]),
            "dw_out": _joined([grad.dw_out_EFD for grad in grads]),
        }

    def _rows(self, x_RTD: Tensor) -> list[Tensor]:
        return [x_TD[one.token_V] for x_TD, one in zip(x_RTD, self.sent, strict=True)]

    def _summed(self, returned_RVD: Sequence[Tensor]) -> Tensor:
        both = zip(returned_RVD, self.sent, strict=True)
        return torch.cat([summed(rows_VD, own.token_V, self.tokens) for rows_VD, own in both])


def summed(returned_VD: Tensor, token_V: Tensor, tokens: int) -> Tensor:
    """What came back for each token, over the ranks that it visited: (T, D) float32."""
    zeros_TD = returned_VD.new_zeros(tokens, returned_VD.shape[1], dtype=torch.float32)
    return zeros_TD.index_add(0, token_V, returned_VD.float())


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None] or [torch.empty(0)])


def reference(given: Inputs, dtype: torch.dtype) -> Found:
    """Expert by expert: in float64 the truth. In bfloat16 PyTorch's own ops, with all rows of an
    expert in one product; combine weights and sums over a token's rows stay in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = given.x_RTD.shape[1]
    token_A = torch.cat([rows.token_A + tokens * rank for rank, rows in enumerate(given.rows_R)])
    expert_A = torch.cat([rows.expert_A for rows in given.rows_R])
    weight_A = torch.cat([rows.weight_A for rows in given.rows_R]).to(wide).requires_grad_()
    x_XD = given.x_RTD.flatten(0, 1).to(wide).requires_grad_()
    w_in, w_out = (w.detach().to(dtype).requires_grad_() for w in (given.w_in_EHD, given.w_out_EFD))
    y_XD = torch.zeros_like(x_XD)
    for expert, (w_in_HD, w_out_FD) in enumerate(zip(w_in.unbind(), w_out.unbind(), strict=True)):
        own_N = (expert_A == expert).nonzero()[:, 0]
        token_N = token_A[own_N]
        gate_NF, up_NF = (x_XD[token_N].to(dtype) @ w_in_HD.T).chunk(2, 1)
        y_ND = (F.silu(gate_NF) * up_NF) @ w_out_FD
        y_XD = y_XD.index_add(0, token_N, weight_A[own_N, None] * y_ND.to(wide))
    y_XD.backward(given.dy_RTD.flatten(0, 1).to(wide))
    leaves = {"dx": x_XD, "dweight": weight_A, "dw_in": w_in, "dw_out": w_out}
    return {"y": y_XD.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def errors(found: Found, truth: Found) -> Errors:
    """Of what was found; all that the truth names has to be there, and finite."""
    made = {}
    for name, true in truth.items():
        own = found[name]
        assert own.shape == true.shape
        assert own.isfinite().all(), f"{name}: something was read that nobody wrote"
        wrong, norm = own.double() - true, true.norm().clamp(min=1e-30)
        largest = wrong.abs().max() * true.numel() ** 0.5 if true.numel() else 0.0
        made[name] = (float(largest / norm), float(wrong.norm() / norm))
    return made


def check_errors(ours: Errors, plain: Errors) -> None:
    """They are at most twice ``plain``, those of PyTorch's own ops."""
    for name, own in ours.items():
        for mine, theirs in zip(own, plain[name], strict=True):
            assert mine <= 2 * theirs + 1e-6, (
                f"{name}: an error of {mine:.3g} is more than twice PyTorch's, {theirs:.3g}"
            )
