"""The memory of a rank over a step: what is always there, and the peak as the schedule runs."""

from collections import defaultdict
from dataclasses import asdict, dataclass

from coterie.parallel.planner.activations import modalities
from coterie.parallel.planner.attention_activations import rotations
from coterie.parallel.planner.fused import windows
from coterie.parallel.planner.muon import matrices, muon_bytes, orthogonalising
from coterie.parallel.planner.parameters import UnitSize, unit_sizes, units_of
from coterie.parallel.planner.pieces import Pieces, Stage
from coterie.parallel.planner.schedule import order
from coterie.parallel.planner.traffic import flat_gradients
from coterie.parallel.planner.workload import INT, Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank when it holds the most in a step."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    """What micro-batches under way keep for their backward passes."""
    buffers: int
    """The step's batches, the rotation's tables, the tokens of modalities, the pipeline's buffers
    for receiving, and the fused exchange's windows."""
    gathered: int
    """Parameters that FSDP has gathered."""
    temporary: int
    """What lives inside the piece of work that makes the peak."""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def memory(work: Workload, pp: int, pieces: Pieces | None = None) -> Memory:
    """The peak of pipeline rank ``pp``: of its ranks the one with the largest parts and the most
    rows (see ``Workload.skew``)."""
    pieces = pieces or Pieces(work)
    held = {stage: pieces.stage(stage) for stage in work.layout.stages_of(pp)}
    sizes = _sizes(work, pp)
    sharded = sum(unit.sharded for unit in sizes) * work.whole
    static = _Static(
        parameters=sharded,
        optimizer=sum(unit.moments(work) for unit in sizes) * work.whole,
        buffers=batches(work)
        + rotations(work)
        + modalities(work)
        + receive_buffers(work, pp)
        + windows(work, pp),
    )
    peaks = [
        *_while_running(work, pp, held, static, sizes),
        _while_summing(work, pp, static, sizes),
        _while_updating(work, pp, static, sizes),
    ]
    return max(peaks, key=lambda peak: peak.peak)


@dataclass(frozen=True)
class _Static:
    parameters: int
    optimizer: int
    buffers: int

    def at(self, gradients: int, activations: int, gathered: int, temporary: int) -> Memory:
        return Memory(
            self.parameters,
            self.optimizer,
            gradients,
            activations,
            self.buffers,
            gathered,
            temporary,
        )


def _sizes(work: Workload, pp: int) -> list[UnitSize]:
    sizes = unit_sizes(work.model, work.layout)
    return [sizes[u] for stage in work.layout.stages_of(pp) for u in units_of(work, stage)]


def _while_running(
    work: Workload, pp: int, held: dict[int, Stage], static: _Static, sizes: list[UnitSize]
) -> list[Memory]:
    """The memory inside each forward and backward pass that could make the peak."""
    sharded = work.layout.shard > 1
    gathered = _gathered(work, pp)
    kept: dict[int, int] = defaultdict(int)
    seen: set[int] = set()
    peaks = []
    for action in order(work.layout, work.micro_batches)[pp]:
        stage = held[action.stage]
        live = sum(kept.values())
        gradients = sum(_gradients(work, held[s], sizes) for s in seen)
        if action.kind == "F":
            peaks.append(static.at(gradients, live, gathered, stage.forward))
            kept[action.stage] += stage.kept
            continue
        if action.kind == "W":
            made = 0 if action.stage in seen else stage.gradients
            peaks.append(static.at(gradients, live, gathered, made))
        else:
            first = action.stage not in seen and not (sharded and work.layout.pp == 1)
            temporary = stage.first_backward if first else stage.backward
            peaks.append(static.at(gradients, live, gathered, temporary))
        if action.kind == "I":
            kept[action.stage] += stage.split
        else:
            kept[action.stage] -= stage.kept + (stage.split if action.kind == "W" else 0)
            seen.add(action.stage)
    return peaks


def _gathered(work: Workload, pp: int) -> int:
    """Bytes of parameters that FSDP has gathered while a step runs."""
    layout, sizes = work.layout, unit_sizes(work.model, work.layout)
    whole = [
        sizes[unit].whole * work.whole
        for stage in layout.stages_of(pp)
        for unit in units_of(work, stage)
        if (layout.expert_shard if unit[0] == "experts" else layout.shard) > 1
    ]
    if layout.pp > 1:  # a stage stays gathered until its last backward pass
        return sum(whole)
    # one unit at work, the next on its way
    return sum(sorted(whole, reverse=True)[:2])


def _gradients(work: Workload, stage: Stage, sizes: list[UnitSize]) -> int:
    """Bytes of gradients that stay between backward passes."""
    if work.layout.shard > 1 and work.layout.pp == 1:
        return sum(unit.trained for unit in sizes) * work.whole
    return stage.gradients


def _while_summing(work: Workload, pp: int, static: _Static, sizes: list[UnitSize]) -> Memory:
    """After the last micro-batch: gradients are summed over replicas, small ones in flat copies."""
    gradients = sum(unit.trained for unit in sizes) * work.whole
    return static.at(gradients, 0, 0, flat_gradients(work, pp))


def _while_updating(work: Workload, pp: int, static: _Static, sizes: list[UnitSize]) -> Memory:
    """In the update: Muon gathers one parameter's matrices at a time and iterates on them."""
    gradients = sum(unit.trained for unit in sizes) * work.whole
    elements = max((orthogonalising(p, work) for p in matrices(work, pp)), default=0)
    return static.at(gradients, 0, 0, elements * muon_bytes(work))


_BATCH = 4 * INT + 1
"""Bytes of a token in a batch: tokens, targets, modality, segment, padding."""
_INFO = 3 * INT
"""What a micro-batch's facts add: sequence, position and key."""


def batches(work: Workload) -> int:
    """All micro-batches of the step, and the facts of the one under way."""
    tokens = work.rows * work.sequence
    return tokens * (_BATCH * work.micro_batches + _INFO)


def receive_buffers(work: Workload, pp: int) -> int:
    """The pipeline's, for the activations and gradients of all micro-batches of each stage."""
    layout = work.layout
    if layout.pp == 1:
        return 0
    stream = work.own * (work.model.width + work.model.carried) * work.whole
    if work.model.auxiliary:  # no pipeline: one micro-batch at a time, and nothing comes back
        return stream * any(stage > 0 for stage in layout.stages_of(pp))
    ends = sum((stage > 0) + (stage < layout.stages - 1) for stage in layout.stages_of(pp))
    return ends * work.micro_batches * stream
