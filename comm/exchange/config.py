"""Which exchange brings rows to the experts and back."""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch.distributed import ProcessGroup

from coterie.comm.axis import Axes
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.fused.exchange import FusedExchange
from coterie.comm.exchange.local import LocalExchange
from coterie.comm.exchange.overlapped import OverlappedExchange
from coterie.core.config import Config
from coterie.csrc.fused_launch import MOST_SLABS, Manner

Route = Literal["rows", "tokens", "nodes"]

_PIECES, _SLABS = 2, 1  # where nothing was measured
_FUSED = Manner()  # there as well


class ExchangeConfig(Config):
    """How rows get to experts on other ranks, and back."""

    kind: Literal["all_to_all", "overlapped", "fused"] = "all_to_all"
    """One all-to-all there and one back; or in pieces, each computed once it is there; or, between
    Hopper GPUs that NVLink connects, in fused kernels, which move rows while they compute."""
    route: Route = "rows"
    """What travels: `rows`, one for each choice of a token; `tokens`, once to each rank that has
    experts for it, whose results come back as one sum; `nodes`, once to each node and from there to
    its ranks (see `parallel.node`). With kind `fused`, which is for ranks of one node, `rows` means
    `tokens`; with `nodes` it is inside each node, and an all-to-all is across."""
    pieces: int | None = Field(default=None, ge=1)
    """`overlapped`: pieces of what travels between any two ranks. Null, here or in `slabs`: what is
    fastest in a short measurement at the start of a run, which may be `all_to_all`."""
    slabs: int | None = Field(default=None, ge=1)
    """`overlapped`, `fused`: runs of columns in which results are computed and sent; with `fused`
    up to 16."""
    communication: int | None = Field(default=None, ge=1)
    """`fused`: blocks (of one for each multiprocessor) that move rows before they compute. Null:
    measured, as `pieces` is."""
    tile_columns: Literal[128, 256] | None = None
    """`fused`: columns of a tile, which a block computes at a time; it has 128 rows. 256 read less
    for each product, 128 waste less where a width is no multiple of 256. Null: measured, as
    `pieces` is."""
    ahead: int = Field(default=2, ge=1)
    """`overlapped`: pieces that a rank asks for before they are there (not on NCCL)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "fused" and self.slabs is not None and self.slabs > MOST_SLABS:
            raise ValueError(
                f"slabs is {self.slabs}, but with kind fused up to {MOST_SLABS} are accepted"
            )
        if self.kind == "fused" and self.pieces is not None:
            raise ValueError(
                "pieces is for kind overlapped; with kind fused accepted are communication, slabs "
                "and tile_columns"
            )
        for name in ("communication", "tile_columns"):
            if self.kind != "fused" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for kind fused, but kind is {self.kind}")
        return self

    @property
    def travels(self) -> Route:
        """What travels in fact."""
        return "tokens" if self.kind == "fused" and self.route == "rows" else self.route

    def fused_over(self, axes: Axes) -> ProcessGroup | None:
        """The ranks that fused kernels connect; None: they connect none."""
        if self.kind != "fused":
            return None
        inside_nodes = self.route == "nodes" and axes.expert_across.group is not None
        return (axes.expert_node if inside_nodes else axes.expert).group

    def over(self, axes: Axes, max_rows_factor: float | None = None) -> Exchange:
        """The exchange between the ranks of ``axes.expert``."""
        if axes.expert.group is None:
            return LocalExchange()
        across, inside = axes.expert_across.group, axes.expert_node.group
        if self.route == "nodes" and across is not None and inside is not None:
            onward = self._inside(inside, max_rows_factor)
            return self._between(across, None, onward)
        if self.fused_over(axes) is not None:
            return self._inside(axes.expert.group, max_rows_factor)
        return self._between(axes.expert.group, max_rows_factor)

    def _inside(self, group: ProcessGroup, max_rows_factor: float | None) -> Exchange:
        """Where no exchange follows."""
        if self.kind != "fused":
            return AllToAllExchange(group, max_rows_factor, deduplicate=True)
        return FusedExchange(group, max_rows_factor, self.manner)

    @property
    def manner(self) -> Manner:
        """`fused`: how its launches are worked off."""
        return Manner(
            self.communication or _FUSED.communication,
            slabs=self.slabs or _FUSED.slabs,
            tile_columns=self.tile_columns or _FUSED.tile_columns,
        )

    def _between(
        self, group: ProcessGroup, max_rows_factor: float | None, onward: Exchange | None = None
    ) -> Exchange:
        deduplicate = self.route != "rows"
        if self.kind != "overlapped":
            return AllToAllExchange(group, max_rows_factor, deduplicate, onward)
        return OverlappedExchange(
            group,
            max_rows_factor,
            deduplicate,
            onward,
            self.pieces or _PIECES,
            self.slabs or _SLABS,
            self.ahead,
        )
