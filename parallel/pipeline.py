"""Micro-batches through the stages of a pipeline, by torch's schedules.

The schedules send activations and their gradients only; a loss that a router adds on the way joins
the graph of its own stage (:func:`with_loss`). Losses are shares of the step's: nothing is divided
by the number of micro-batches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from coterie.parallel.model import ParallelModel

_MULTI = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """``x``, whose backward pass also gives ``loss`` (a scalar) the gradient one."""
    return _WithLoss.apply(x, loss)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = torch.empty((), dtype=loss.dtype, device=loss.device)
        return x.clone()  # a stage's output is detached in place, which a view does not allow

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        return dx, torch.ones_like(ctx.like)


class Pipeline:
    """The schedule of one shape of micro-batches."""

    def __init__(
        self, model: ParallelModel, micro_batches: int, activations: tuple[int, ...]
    ) -> None:
        """``activations``: their shape between stages, of one micro-batch on this rank."""
        layout, device = model.ranks.layout, model.ranks.device
        dtype = next(model.parameters()).dtype
        between = torch.empty(activations, dtype=dtype, device="meta", requires_grad=True)
        tokens = torch.empty(activations[:2], dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=dtype, device="meta", requires_grad=True)
        last = layout.stages - 1
        stages: list[Any] = [
            PipelineStage(
                stage,
                number,
                layout.stages,
                device,
                input_args=tokens if number == 0 else between,
                output_args=loss if number == last else between,
                group=model.ranks.groups["pp"],
            )
            for number, stage in zip(model.stage_numbers, model.each_stage(), strict=True)
        ]
        self.first, self.last = 0 in model.stage_numbers, last in model.stage_numbers
        self.micro_batches = micro_batches
        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti
        if layout.schedule == "1f1b":
            self._schedule = Schedule1F1B(
                stages[0], micro_batches, loss_fn=_as_it_is, scale_grads=False
            )
        else:
            self._schedule = _MULTI[layout.schedule](
                stages, micro_batches, loss_fn=_as_it_is, scale_grads=False
            )

    def step(self, tokens_BS: Tensor) -> None:
        """Forward and backward of all micro-batches; ``tokens_BS``: of all of them in one."""
        micro = torch.arange(self.micro_batches)
        inputs = (tokens_BS,) if self.first else ()
        target: dict[str, Any] = {"target": micro, "losses": []} if self.last else {}
        self._schedule.step(*inputs, micro=micro, return_outputs=False, **target)


def _as_it_is(loss: Tensor, _target: Tensor) -> Tensor:
    return loss.sum()
