"""Which ranks the fused exchange waited for in a step: a slow one is named, not only felt.

Its launches note it themselves (:mod:`coterie.comm.exchange.fused.waits`); sums over launches:
layers, micro-batches and both passes.
"""

from dataclasses import dataclass

from coterie.parallel.distributed import Ranks
from coterie.parallel.tally import Totals


@dataclass(frozen=True)
class LateRanks:
    """Seconds of one step that each rank (W of the run) was waited for: means over the others that
    exchange rows with it."""

    rows_W: list[float]
    """For the rows that it sends: it came late to a launch."""
    end_W: list[float]
    """For its end: it was done late. For each launch, from when the one that waited was."""

    @property
    def each_W(self) -> list[float]:
        """Both together."""
        return [rows + end for rows, end in zip(self.rows_W, self.end_W, strict=True)]

    @property
    def figures(self) -> dict[str, float]:
        """Of the rank that was waited for the longest, by name."""
        each_W = self.each_W
        latest = max(range(len(each_W)), key=each_W.__getitem__)
        return {
            "latest_rank": latest,
            "latest_rows_ms": 1e3 * self.rows_W[latest],
            "latest_end_ms": 1e3 * self.end_W[latest],
        }


def late_ranks(totals: Totals, ranks: Ranks, by_nodes: bool) -> LateRanks | None:
    """Of a step; None: it has no such launches. ``by_nodes``: they connect ranks of a node."""
    if not totals.waits_2W.size:
        return None
    layout = ranks.layout
    together = layout.expert_node if by_nodes else layout.ep * layout.etp
    rows_W, end_W = (totals.waits_2W / max(1, together - 1)).tolist()
    return LateRanks(rows_W, end_W)
