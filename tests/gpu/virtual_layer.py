"""A layer over virtual ranks: fused, of PyTorch's own bfloat16 ops, and the truth in fp64.

Legend: R ranks, T tokens of each, K choices, D width, F hidden width, E experts of all ranks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.comm.exchange.fused import passes
from coterie.comm.exchange.fused.virtual import VirtualDomain, sent
from coterie.csrc.fused import FLAG_BYTES, Manner
from coterie.moe.assignment import Assignment, from_choices

Found = dict[str, Tensor]
"""y, dx, dweight, dw_in and dw_out: of all ranks, one after the other."""


@dataclass(frozen=True)
class Layer:
    """Its size, and how tokens choose experts: "evenly", "hot" (all choose the first one too),
    "half" (the other half gets nothing)."""

    R: int
    E: int
    K: int
    T: int
    D: int
    F: int
    choice: str = "evenly"

    def inputs(self, device: torch.device) -> "Inputs":
        """Fresh ones."""

        def normal(*size: int, fan: int = 1) -> Tensor:
            drawn = torch.randn(size, device=device) / fan**0.5
            return drawn.to(torch.bfloat16)

        open_ = self.E // 2 if self.choice == "half" else self.E
        rows = []
        for _ in range(self.R):
            score_TE = torch.rand(self.T, open_, device=device)
            if self.choice == "hot":
                score_TE[:, 0] = 2
            weight_TK = torch.rand(self.T, self.K, device=device) + 0.1
            rows.append(from_choices(score_TE.topk(self.K, 1).indices, weight_TK, self.E))
        return Inputs(
            rows,
            [normal(self.T, self.D) for _ in range(self.R)],
            [normal(self.T, self.D) for _ in range(self.R)],
            normal(self.E, 2 * self.F, self.D, fan=self.D),
            normal(self.E, self.F, self.D, fan=self.F),
        )


@dataclass
class Inputs:
    rows_R: list[Assignment]
    x_RTD: list[Tensor]
    dy_RTD: list[Tensor]
    w_in_EHD: Tensor
    w_out_EFD: Tensor


class Fused:
    """The fused kernels; all ranks in one launch."""

    def __init__(self, given: Inputs) -> None:
        self.given, self.ranks = given, len(given.x_RTD)
        self.tokens, width = given.x_RTD[0].shape
        self.sent = sent(given.rows_R, self.tokens)
        capacity = max(one.token_V.numel() for one in self.sent) + 3
        self.domain = VirtualDomain(self.ranks, width, capacity, given.w_in_EHD.device)

    def run(self, manner: Manner, keep: bool = True) -> Found:
        """Windows hold NaN before both passes, but for their flags."""
        given, plans = self.given, [one.plan for one in self.sent]
        w_in = list(given.w_in_EHD.chunk(self.ranks))
        w_out = list(given.w_out_EFD.chunk(self.ranks))
        self._poison()
        made = passes.forward(
            self.domain.here(plans), self._rows(given.x_RTD), w_in, w_out, manner, keep
        )
        self._poison()
        grads = passes.backward(
            self.domain.here(plans),
            self._rows(given.dy_RTD),
            [one.hidden for one in made],
            w_in,
            w_out,
            manner,
        )
        dweight = torch.full_like(torch.cat([a.weight_A for a in given.rows_R]), float("nan"))
        for own, grad in zip(self.sent, grads, strict=True):
            dweight[own.received_N] = grad.dweight_N
        return {
            "y": self._summed([one.returned_VD for one in made]),
            "dx": self._summed([grad.dsent_VD for grad in grads]),
            "dweight": dweight,
            "dw_in": torch.cat([grad.dw_in_EHD for grad in grads]),
            "dw_out": torch.cat([grad.dw_out_EFD for grad in grads]),
        }

    def _poison(self) -> None:
        self.domain.memory[:, FLAG_BYTES:] = 0xFF  # NaN

    def _rows(self, x_RTD: list[Tensor]) -> list[Tensor]:
        return [x_TD[one.token_V] for x_TD, one in zip(x_RTD, self.sent, strict=True)]

    def _summed(self, returned_RVD: list[Tensor]) -> Tensor:
        """Of each token, over the ranks that it visited."""
        sums = []
        for returned_VD, own in zip(returned_RVD, self.sent, strict=True):
            zeros = returned_VD.new_zeros(self.tokens, returned_VD.shape[1], dtype=torch.float32)
            sums.append(zeros.index_add(0, own.token_V, returned_VD.float()).to(torch.bfloat16))
        return torch.cat(sums)


def reference(given: Inputs, dtype: torch.dtype) -> Found:
    """In float64 the truth; in bfloat16 PyTorch's own ops, weights and sums over rows in fp32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_RTD = [x.to(dtype).requires_grad_() for x in given.x_RTD]
    weights = [rows.weight_A.to(wide).requires_grad_() for rows in given.rows_R]
    w_in = given.w_in_EHD.to(dtype).requires_grad_()
    w_out = given.w_out_EFD.to(dtype).requires_grad_()
    y_RTD = []
    for x_TD, weight_A, rows in zip(x_RTD, weights, given.rows_R, strict=True):
        parts, begin = [], 0
        for expert, count in enumerate(rows.load_E.tolist()):
            own_ND = x_TD[rows.token_A[begin : begin + count]]
            gate_NF, up_NF = (own_ND @ w_in[expert].T).chunk(2, 1)
            parts.append((F.silu(gate_NF) * up_NF) @ w_out[expert])
            begin += count
        weighted_AD = torch.cat(parts).to(wide) * weight_A[:, None]
        sums_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        y_RTD.append(sums_TD.index_add(0, rows.token_A, weighted_AD).to(dtype))
    torch.autograd.backward(y_RTD, [dy.to(dtype) for dy in given.dy_RTD])

    def gradient(leaf: Tensor) -> Tensor:
        assert leaf.grad is not None
        return leaf.grad

    return {
        "y": torch.cat(y_RTD).detach(),
        "dx": torch.cat([gradient(x) for x in x_RTD]),
        "dweight": torch.cat([gradient(weight) for weight in weights]),
        "dw_in": gradient(w_in),
        "dw_out": gradient(w_out),
    }


def errors(found: Found, truth: Found) -> dict[str, tuple[float, float]]:
    """Of each: the largest error over the largest number, and the norm of all of them over that
    of the truth."""
    made = {}
    for name, true in truth.items():
        wrong = found[name].double() - true
        made[name] = (
            float(wrong.abs().max() / true.abs().max()),
            float(wrong.norm() / true.norm()),
        )
    return made
