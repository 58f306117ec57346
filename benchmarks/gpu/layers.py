"""A whole MoE layer on one rank in several ways: router, experts, and the sums of their results.

All have the same router, weights and inputs: softmax over the logits, the best K, renormalised.
Legend: T tokens, D width, F hidden width, E experts, K choices, A = T * K rows.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import Case
from benchmarks.gpu.experts import grouped_mm
from coterie.comm.exchange.fused import passes
from coterie.comm.exchange.fused.virtual import VirtualDomain, sent
from coterie.csrc.fused_launch import Manner
from coterie.moe.assignment import Assignment, from_choices


class Weights:
    """Of a layer: leaves that gather gradients."""

    def __init__(self, case: Case, device: torch.device) -> None:
        def normal(*size: int, fan: int) -> Tensor:
            made = torch.randn(size, dtype=torch.bfloat16, device=device) / fan**0.5
            return made.requires_grad_()

        self.case = case
        self.router_DE = normal(case.D, case.E, fan=case.D)
        self.w_in_EHD = normal(case.E, 2 * case.F, case.D, fan=case.D)
        self.w_out_EFD = normal(case.E, case.F, case.D, fan=case.F)

    def clear(self) -> None:
        """Drop the gradients."""
        for weight in (self.router_DE, self.w_in_EHD, self.w_out_EFD):
            weight.grad = None

    def routed(self, x_TD: Tensor) -> Assignment:
        """Which rows go to which expert."""
        score_TE = (x_TD @ self.router_DE).float().softmax(1)
        weight_TK, expert_TK = score_TE.topk(self.case.K, 1)
        return from_choices(expert_TK, weight_TK / weight_TK.sum(1, keepdim=True), self.case.E)


class Layer(ABC):
    """One way."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def __call__(self, x_TD: Tensor) -> Tensor:
        """y_TD."""
        return self.experts(x_TD, self.weights.routed(x_TD))

    @abstractmethod
    def experts(self, x_TD: Tensor, rows: Assignment) -> Tensor:
        """Weighted sums of the experts' results."""


class Fused(Layer):
    """The fused kernels, in a domain of one rank."""

    def __init__(self, weights: Weights, tokens: int, manner: Manner) -> None:
        super().__init__(weights)
        self.manner = manner
        self.domain = VirtualDomain(1, weights.case.D, tokens, weights.router_DE.device)

    def experts(self, x_TD: Tensor, rows: Assignment) -> Tensor:
        w_in_EHD, w_out_EFD = self.weights.w_in_EHD, self.weights.w_out_EFD
        return _Fused.apply(
            self.domain, self.manner, rows, x_TD, rows.weight_A, w_in_EHD, w_out_EFD
        )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        domain: VirtualDomain,
        manner: Manner,
        rows: Assignment,
        x_TD: Tensor,
        weight_A: Tensor,
        w_in_EHD: Tensor,
        w_out_EFD: Tensor,
    ) -> Tensor:
        (ours,) = sent([rows], len(x_TD))
        made = passes.forward(
            domain.here([ours.plan]), [x_TD[ours.token_V]], [w_in_EHD], [w_out_EFD], manner, True
        )
        ctx.domain, ctx.manner, ctx.sent, ctx.hidden = domain, manner, ours, made[0].hidden
        ctx.save_for_backward(w_in_EHD, w_out_EFD)
        return torch.zeros_like(x_TD).index_copy(0, ours.token_V, made[0].returned_VD)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        w_in_EHD, w_out_EFD = ctx.saved_tensors
        ours = ctx.sent
        (grads,) = passes.backward(
            ctx.domain.here([ours.plan]),
            [dy_TD[ours.token_V]],
            [ctx.hidden],
            [w_in_EHD],
            [w_out_EFD],
            ctx.manner,
        )
        dx_TD = torch.zeros_like(dy_TD).index_copy(0, ours.token_V, grads.dsent_VD)
        dweight_A = torch.empty_like(grads.dweight_N).index_copy(
            0, ours.received_N, grads.dweight_N
        )
        return None, None, None, dx_TD, dweight_A, grads.dw_in_EHD, grads.dw_out_EFD


class Grouped(Layer):
    """As torchtitan does it: rows gathered by expert, grouped products, weights applied in fp32."""

    def experts(self, x_TD: Tensor, rows: Assignment) -> Tensor:
        offset_E = rows.load_E.cumsum(0).to(torch.int32)
        h_AH = grouped_mm(x_TD[rows.token_A], self.weights.w_in_EHD.mT, offs=offset_E)
        gate_AF, up_AF = h_AH.chunk(2, 1)
        y_AD = grouped_mm(F.silu(gate_AF) * up_AF, self.weights.w_out_EFD, offs=offset_E)
        weighted_AD = (y_AD.float() * rows.weight_A[:, None]).to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, rows.token_A, weighted_AD)


class Loop(Layer):
    """Expert after expert."""

    def experts(self, x_TD: Tensor, rows: Assignment) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        parts = zip(
            rows.token_A.split(rows.load_E.tolist()),
            rows.weight_A.split(rows.load_E.tolist()),
            self.weights.w_in_EHD.unbind(),
            self.weights.w_out_EFD.unbind(),
            strict=True,
        )
        for token_N, weight_N, w_in_HD, w_out_FD in parts:
            gate_NF, up_NF = (x_TD[token_N] @ w_in_HD.T).chunk(2, 1)
            y_ND = (F.silu(gate_NF) * up_NF) @ w_out_FD
            y_TD = y_TD.index_add(0, token_N, (y_ND.float() * weight_N[:, None]).to(x_TD.dtype))
        return y_TD
