"""Which exchange brings rows to the experts and back."""

from typing import Literal

from pydantic import Field

from coterie.comm.axis import Axis
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.local import LocalExchange
from coterie.comm.exchange.overlapped import OverlappedExchange
from coterie.core.config import Config


class ExchangeConfig(Config):
    """How rows get to experts on other ranks, and back."""

    kind: Literal["all_to_all", "overlapped"] = "all_to_all"
    """One all-to-all there and one back; or rows in pieces, each computed once it is there."""
    pieces: int = Field(default=4, ge=1)
    """`overlapped`: pieces of the rows between any two ranks."""
    ahead: int = Field(default=2, ge=1)
    """`overlapped`: pieces that a rank asks for before they are there (not on NCCL)."""

    def over(self, expert: Axis, max_rows_factor: float | None = None) -> Exchange:
        """The exchange between the ranks of ``expert``."""
        if expert.group is None:
            return LocalExchange()
        if self.kind == "overlapped":
            return OverlappedExchange(expert.group, max_rows_factor, self.pieces, self.ahead)
        return AllToAllExchange(expert.group, max_rows_factor)
