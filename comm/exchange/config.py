"""Which exchange brings rows to the experts and back."""

from typing import Literal

from pydantic import Field
from torch.distributed import ProcessGroup

from coterie.comm.axis import Axes
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.local import LocalExchange
from coterie.comm.exchange.overlapped import OverlappedExchange
from coterie.core.config import Config

Route = Literal["rows", "tokens", "nodes"]

_PIECES, _SLABS = 2, 1  # where nothing was measured


class ExchangeConfig(Config):
    """How rows get to experts on other ranks, and back."""

    kind: Literal["all_to_all", "overlapped"] = "all_to_all"
    """One all-to-all there and one back; or in pieces, each computed once it is there."""
    route: Route = "rows"
    """What travels: `rows`, one for each choice of a token; `tokens`, once to each rank that has
    experts for it, whose results come back as one sum; `nodes`, once to each node and from there to
    its ranks (see `parallel.node`)."""
    pieces: int | None = Field(default=None, ge=1)
    """`overlapped`: pieces of what travels between any two ranks. Null, here or in `slabs`: what is
    fastest in a short measurement at the start of a run, which may be `all_to_all`."""
    slabs: int | None = Field(default=None, ge=1)
    """`overlapped`: runs of columns in which the results of a piece are computed and sent."""
    ahead: int = Field(default=2, ge=1)
    """`overlapped`: pieces that a rank asks for before they are there (not on NCCL)."""

    def over(self, axes: Axes, max_rows_factor: float | None = None) -> Exchange:
        """The exchange between the ranks of ``axes.expert``."""
        if axes.expert.group is None:
            return LocalExchange()
        across, inside = axes.expert_across.group, axes.expert_node.group
        if self.route == "nodes" and across is not None and inside is not None:
            onward = AllToAllExchange(inside, max_rows_factor, deduplicate=True)
            return self._between(across, None, onward)
        return self._between(axes.expert.group, max_rows_factor)

    def _between(
        self, group: ProcessGroup, max_rows_factor: float | None, onward: Exchange | None = None
    ) -> Exchange:
        deduplicate = self.route != "rows"
        if self.kind == "all_to_all":
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
