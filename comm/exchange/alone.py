"""How long an exchange's rows travel when nobody computes: as many are sent once more.

What part of that time ranks waited (:mod:`coterie.comm.exchange.meter`) was not hidden.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from coterie.comm.exchange.meter import Shipment, Stopwatch
from coterie.comm.exchange.rows import start_all_to_all


def seconds_alone(shipments: Sequence[Shipment], group: ProcessGroup) -> float:
    """How long as many rows travel, one shipment after the other by all-to-all, when nobody
    computes. All ranks of the group call."""
    watch = Stopwatch()
    for sent_R, received_R, like in shipments:
        sent_AD = like.new_ones(sum(sent_R), like.shape[1])  # zeros would have no memory yet
        received_AD = like.new_empty(sum(received_R), like.shape[1])
        dist.barrier(group)
        with watch.running(like.device):
            for work in start_all_to_all(received_AD, sent_AD, received_R, sent_R, group):
                work.wait()
    return watch.take()
