"""The exchange inside an NVLink domain, in fused kernels (Comet, arXiv 2502.19811).

Tokens travel once to each rank that has experts for them; tiles are computed once their rows are
there, and the sums of a token's results are put into the memory of the rank that sent it, slab of
columns by slab, while the next one is computed. csrc/fused.py has the launches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm import nccl
from coterie.comm.exchange.base import SplitExperts
from coterie.comm.exchange.between_ranks import ExchangeBetweenRanks, Trip
from coterie.comm.exchange.fused import passes
from coterie.comm.exchange.fused.waits import Waits
from coterie.comm.exchange.fused.windows import Domain, domain_of
from coterie.csrc import fused_plan
from coterie.csrc.fused import Hidden
from coterie.csrc.fused_launch import MOST_RANKS, Here, Manner
from coterie.csrc.fused_plan import Plan

_MANNER = Manner()


class FusedExchange(ExchangeBetweenRanks):
    """Rows cross while experts compute, in the same launch, all in bfloat16.

    For SwiGLU experts; widths as :mod:`coterie.csrc.fused` accepts them. ``manner``: how launches
    are worked off. Equal inputs give equal bits. It has no meters: ranks wait for each other inside
    kernels, which note that in ``waits``. NCCL groups that run beside it on other streams need the
    options of :mod:`coterie.comm.nccl`.

    Raises:
        ValueError: more ranks than a domain has.
    """

    def __init__(
        self,
        group: ProcessGroup,
        max_rows_factor: float | None = None,
        manner: Manner = _MANNER,
        domain: Callable[[ProcessGroup, int], Domain] = domain_of,
    ) -> None:
        super().__init__(group, max_rows_factor, deduplicate=True)
        if self.ranks > MOST_RANKS:
            raise ValueError(f"fused exchange: {self.ranks} ranks, up to {MOST_RANKS} fit")
        self.manner = manner
        self.domain = domain
        self.meters = ()
        self.waits = (Waits(group),)

    def travel(self, sent_VD: Tensor, trip: Trip, experts: SplitExperts) -> Tensor:
        """One launch there and one back."""
        if experts.activation != "swiglu":
            raise ValueError(f"fused experts: swiglu is accepted, not {experts.activation}")
        assert trip.visit_A is not None and trip.weight_A is not None
        w_in_EHD, w_out_EFD = experts.weights()
        plan = fused_plan.plan(
            trip.load_SL, trip.visit_A, trip.weight_A, trip.received_R, trip.begin_S, self.rank
        )
        manner = _spared(self.manner, sent_VD.device)
        domain = self.domain(self.group, sent_VD.shape[1])
        way = _Way(domain, plan, trip.most, manner, self.waits[0])
        sent_VD = sent_VD.to(w_in_EHD.dtype)
        keeps = _Keeps(torch.is_grad_enabled(), experts.keeps)
        home = not self.again.on
        returned_VD: Tensor = _Fused.apply(
            sent_VD, trip.weight_A, w_in_EHD, w_out_EFD, way, keeps, home
        )
        return returned_VD


def _spared(manner: Manner, device: torch.device) -> Manner:
    """``manner`` with as many blocks as leave room for NCCL, unless it says how many."""
    if manner.blocks or device.type != "cuda":
        return manner
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return manner._replace(blocks=count - nccl.SPARED)


class _Way(NamedTuple):
    """What all launches for a trip share."""

    domain: Domain
    plan: Plan
    most: int
    manner: Manner
    waits: Waits

    def here(self) -> list[Here]:
        """This rank, for the next dispatch."""
        noted_2R = self.waits.of_launch(self.plan.begin_S.device)
        return [self.domain.here(self.plan, self.most)._replace(waits_2R=noted_2R)]


class _Keeps(NamedTuple):
    """For the backward pass."""

    rows: bool
    hidden: bool
    """The first product as well."""


class _Fused(torch.autograd.Function):
    """``home``: results are wanted; else what is returned is to be left alone."""

    @staticmethod
    def forward(
        ctx: Any, sent_VD: Tensor, weight_A: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor,
        way: _Way, keeps: _Keeps, home: bool,
    ) -> Tensor:  # fmt: skip
        keep = keeps.rows and any(ctx.needs_input_grad)
        sent, w_in, w_out = [sent_VD], [w_in_EHD], [w_out_EFD]
        keep_hidden = keep and keeps.hidden
        if home:
            done = passes.forward(way.here(), sent, w_in, w_out, way.manner, keep_hidden)
            ((returned_VD, hidden),) = done
        else:
            (hidden,) = passes.arrive(way.here(), sent, w_in, way.manner, keep_hidden)
            returned_VD = torch.empty_like(sent_VD)
        if keep:
            ctx.save_for_backward(w_in_EHD, w_out_EFD, hidden.x_PD, hidden.h_PH)
        ctx.way, ctx.weight_dtype = way, weight_A.dtype
        return returned_VD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dreturned_VD: Tensor) -> tuple[Tensor | None, ...]:
        way: _Way = ctx.way
        w_in_EHD, w_out_EFD, x_PD, h_PH = ctx.saved_tensors
        hidden = Hidden(x_PD, h_PH, x_PD.new_empty(0))
        of_weights = any(ctx.needs_input_grad[2:4])  # else they are frozen
        (grad,) = passes.backward(
            *(way.here(), [dreturned_VD], [hidden], [w_in_EHD], [w_out_EFD]),
            *(way.manner, of_weights),
        )
        dweight_A = grad.dweight_N.to(ctx.weight_dtype)
        return grad.dsent_VD, dweight_A, grad.dw_in_EHD, grad.dw_out_EFD, None, None, None
