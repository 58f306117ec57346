"""What Muon's update costs: matrices gathered, iterated on, one parameter at a time."""

from collections.abc import Iterator
from math import prod

from coterie.parallel.layout import Layout
from coterie.parallel.muon import STEPS
from coterie.parallel.planner.parameters import Parameter, parameters, units_of
from coterie.parallel.planner.workload import Workload


def matrices(work: Workload, pp: int) -> list[Parameter]:
    """The parameters of a pipeline rank that Muon updates."""
    if work.optimizer != "muon":
        return []
    mine = {unit for stage in work.layout.stages_of(pp) for unit in units_of(work, stage)}
    return [p for p in parameters(work.model) if p.unit in mine and p.of_muon]


def muon_bytes(work: Workload) -> int:
    """Of an element that it iterates on: bfloat16 on CUDA, elsewhere the weights' own kind."""
    return 2 if work.device == "cuda" and work.compute != "fp64" else work.whole


def gatherings(parameter: Parameter, layout: Layout) -> Iterator[tuple[str, int]]:
    """(axis, elements of the result) of each gathering, in their order: of what cuts through
    matrices, FSDP's shards first."""
    shape = list(parameter.part(layout))
    matrix = len(shape) - 2
    expert = parameter.kind == "expert"
    shards = layout.expert_shard if expert else layout.shard
    dim = parameter.shard_dim(layout)
    if shards > 1 and dim >= matrix:
        # what is gathered is padded to equal parts
        padded = -(-shape[dim] // shards) * shards * prod(shape) // shape[dim]
        yield "expert_shard" if expert else "shard", padded
    elif shards > 1:
        shape[dim] = -(-shape[dim] // shards)
    for dim, axis in parameter.cuts:
        if dim >= matrix and getattr(layout, axis) > 1:
            shape[dim] = parameter.shape[dim]
            yield axis, prod(shape)


def _stack(parameter: Parameter, layout: Layout) -> tuple[int, int, int]:
    """(number, shorter side, longer side) of a rank's matrices once they are whole."""
    leading = list(parameter.part(layout)[:-2])
    shards = layout.expert_shard if parameter.kind == "expert" else layout.shard
    dim = parameter.shard_dim(layout)
    if dim < len(leading):
        leading[dim] = -(-leading[dim] // shards)
    return prod(leading), min(parameter.shape[-2:]), max(parameter.shape[-2:])


def orthogonalising(parameter: Parameter, work: Workload) -> int:
    """Elements that live at once in an iteration: the update and the matrices before and after a
    step, their Gram matrices and the polynomial of these."""
    number, short, long = _stack(parameter, work.layout)
    return number * (3 * short * long + 2 * short * short)


def newton_schulz_flops(parameter: Parameter, work: Workload) -> float:
    """Multiplications and additions of an update's products."""
    number, short, long = _stack(parameter, work.layout)
    return STEPS * number * (4.0 * short * short * long + 2.0 * short**3)
