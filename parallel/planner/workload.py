"""What one rank works on: the sizes that every other part of a plan is computed from."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

import torch

from coterie.comm.exchange.config import Route
from coterie.models import DecoderConfig
from coterie.models.decoder import Recompute
from coterie.moe.routers.top_k import TopKConfig
from coterie.parallel.config import OptimizerKind, TrainConfig
from coterie.parallel.layout import Layout, LayoutConfig
from coterie.parallel.precision import resolve
from coterie.parallel.rules import blocks_of_stages, layout_of

Device = Literal["cpu", "cuda"]
Compute = Literal["fp32", "bf16", "fp64"]

INT = 8
"""Bytes of an index."""


@dataclass(frozen=True)
class Workload:
    """A training step as one rank sees it."""

    model: DecoderConfig
    layout: Layout
    blocks: tuple[int, ...]
    """Blocks of each pipeline stage."""
    sequence: int
    """S: tokens of a whole sequence."""
    rows: int
    """B: sequences of a micro-batch on this rank's data-parallel part."""
    micro_batches: int
    """Micro-batches in a step."""
    recompute: Recompute
    compute: Compute
    device: Device
    skew: float = 1.0
    """Rows that the busiest rank's experts receive over the even share."""
    optimizer: OptimizerKind = "adamw"
    route: Route = "rows"
    """Of the exchange."""

    @property
    def fused(self) -> bool:
        """Whether ranks exchange rows in fused kernels."""
        moe = self.model.moe
        exchanging = self.layout.ep * self.layout.etp > 1
        return moe is not None and moe.exchange.kind == "fused" and exchanging

    @property
    def whole(self) -> int:
        """Bytes of a weight, and of the residual stream."""
        return 8 if self.compute == "fp64" else 4

    @property
    def half(self) -> int:
        """Bytes of what matrix products take and give."""
        return 2 if self.compute == "bf16" else self.whole

    @property
    def autocast(self) -> bool:
        """Whether weights are cast for each use."""
        return self.compute == "bf16"

    @property
    def own(self) -> int:
        """T: tokens that the rank holds between layers."""
        return self.gathered // self.layout.tp

    @property
    def gathered(self) -> int:
        """G: tokens that it computes in attention and dense layers, gathered over tp."""
        return self.rows * self.sequence // self.layout.cp

    @property
    def sent(self) -> int:
        """A: rows that it sends to experts in one layer, one for each slice of each expert."""
        return round(self.own * self.choices) * self.layout.etp

    @property
    def received(self) -> int:
        """Rows that arrive at the busiest rank's experts in one layer."""
        exchanging = self.layout.ep * self.layout.etp > 1
        return round(self.sent * self.skew) if exchanging else self.sent

    @property
    def held(self) -> int:
        """Rows that the busiest rank holds at once: beyond ``max_rows_factor`` they come in rounds
        of the mean, and all rounds but one are computed again."""
        factor = self.model.moe.max_rows_factor if self.model.moe else None
        bounded = factor is not None and self.received > factor * self.sent
        return self.sent if bounded else self.received

    @property
    def choices(self) -> float:
        """K: experts of a token, on average."""
        return self.model.moe.router.rows_per_token if self.model.moe else 0

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of experts, and inside how many of them a token chooses."""
        router = self.model.moe.router if self.model.moe else None
        return (router.groups, router.top_groups) if isinstance(router, TopKConfig) else (1, 1)

    @property
    def head_width(self) -> int:
        """d: width of an attention head."""
        attention = self.model.attention
        return attention.head_width or self.model.width // attention.heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, over all ranks."""
        return self.model.attention.kv_heads or self.model.attention.heads

    @property
    def gates(self) -> int:
        """Gates of a token in attention, over all ranks."""
        return self.model.attention.gate_width(self.head_width)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding that the rank with most of them holds."""
        return -(-self.model.vocabulary // self.layout.tp)

    @cached_property
    def first_blocks(self) -> tuple[int, ...]:
        """The number of each stage's first block."""
        return tuple(sum(self.blocks[:stage]) for stage in range(len(self.blocks)))

    def inside(self, layer: int) -> "Workload":
        """What the attention and feed-forward of block ``layer`` work on: shorter sequences, where
        only some tokens pass it."""
        depths = self.model.depths_of(layer)
        if depths is None:
            return self
        places = depths.places(self.sequence, self.layout.tp, self.layout.cp)
        return replace(self, sequence=places)

    def layers(self, stage: int) -> range:
        """The blocks of a stage, by their number in the model."""
        first = self.first_blocks[stage]
        return range(first, first + self.blocks[stage])


def workload_of(
    model: DecoderConfig,
    parallel: LayoutConfig,
    train: TrainConfig,
    sequence: int,
    world: int,
    device: Device = "cpu",
    skew: float = 1.0,
    optimizer: OptimizerKind = "adamw",
) -> Workload:
    """What each of ``world`` ranks works on. Raises UserError when the layout is impossible."""
    layout = layout_of(parallel, world, model)
    return Workload(
        model=model,
        layout=layout,
        blocks=tuple(len(blocks) for blocks in blocks_of_stages(parallel, model.layers)),
        sequence=sequence,
        rows=train.global_batch // (train.accumulation * layout.dp),
        micro_batches=train.accumulation,
        recompute=train.recompute,
        compute=cast(Compute, resolve(train.precision, torch.device(device))),
        device=device,
        skew=skew,
        optimizer=optimizer,
        route=model.moe.exchange.travels if model.moe else "rows",
    )
