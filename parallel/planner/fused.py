"""What the fused exchange holds, and the experts inside its launches (see ``activations``).

Legend: V tokens that go from a rank to all others (each counts once for each rank), N rows that the
busiest rank's experts take, P rows of its pool, D width, F hidden width of a rank's experts.
"""

from dataclasses import replace

from coterie.csrc.fused_launch import Windows, across
from coterie.csrc.fused_plan import TILE, pool_rows
from coterie.parallel.planner.activations import Held, cast_weights
from coterie.parallel.planner.exchange import arriving, route_of
from coterie.parallel.planner.workload import INT, Workload

_NUMBER = 2
"""Bytes of all that its kernels read and write: bfloat16."""


def fused(work: Workload, count: int) -> Held:
    """Exchange and experts of a layer of ``count`` experts."""
    layout, width = work.layout, work.model.width
    moe = work.model.moe
    assert moe is not None
    local, hidden = count // layout.ep, moe.experts.hidden // layout.etp
    pool = pool_rows(work.held, local)
    rows, inner, act = (pool * n * _NUMBER for n in (width, 2 * hidden, hidden))
    tokens = sent(work, count) * width * _NUMBER
    weights = 3 * local * hidden * width

    kept = places(work, count) + cast_weights(work, weights) + rows
    again = inner + act  # computed in the backward pass instead
    if work.recompute != "selective":
        kept, again = kept + inner, 0
    forward = kept + 2 * tokens + act + rows  # tokens there and back; results
    partial = pool * across(moe.exchange.manner, hidden) * 4  # of the combine weights' gradient
    gradients = rows + inner + act + partial
    backward = 2 * tokens + gradients + again + rows + weights * _NUMBER
    return Held(kept, forward, backward)


def sent(work: Workload, count: int) -> int:
    """V of the mean rank."""
    return arriving(replace(work, skew=1.0), count, work.layout.ep * work.layout.etp, 1)


def places(work: Workload, count: int) -> int:
    """Where tokens come from and go to: of permute and unpermute, and the plan of a rank's pool
    (``coterie.csrc.fused_plan.Plan``)."""
    layout = work.layout
    by_nodes = route_of(work) == "nodes"
    ranks = layout.expert_node if by_nodes else layout.ep * layout.etp
    tokens, local = sent(work, count), count // layout.ep
    kept, given = 0, work.own
    if by_nodes:  # the way across comes first
        nodes = layout.ep * layout.etp // ranks
        given = arriving(replace(work, skew=1.0), count, nodes, -(-ranks // layout.etp))
        kept = (3 * given + work.own + 1) * INT
    # which token each is: a column of two; and the inverse of that
    kept += (3 * tokens + given + 1) * INT
    if layout.etp > 1 or by_nodes:  # the order in which weights were taken
        kept += (work.held if by_nodes else work.sent) * INT
    received = arriving(work, count, layout.ep * layout.etp, 1)
    pool = pool_rows(work.held, local)
    plan = 2 * (ranks + 1) * INT + (received + 1) * INT  # of sources; of visits
    plan += 2 * 4 * work.held + 3 * 4 * pool  # of rows, and of the pool's
    plan += 7 * 4 * (pool // TILE + 1) + 2 * 4 * local  # of tiles, and of experts
    return kept + plan


def windows(work: Workload, pp: int) -> int:
    """Of pipeline rank ``pp``: one for all layers, which has grown to what the mean rank sends, and
    a quarter more."""
    layers = [n for stage in work.layout.stages_of(pp) for n in work.layers(stage)]
    moe = [n for n in layers if work.model.is_moe(n)]
    if not work.fused or not moe:
        return 0
    most = max(sent(work.inside(n), work.model.experts_of(n)) for n in moe)
    return Windows.bytes_for(most + most // 4, work.model.width)
