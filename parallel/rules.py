"""Which layouts are possible: each rule with its sentence, and the nearest layouts that work."""

from collections.abc import Iterator, Sequence
from math import lcm
from typing import get_args

from coterie.core.errors import UserError
from coterie.csrc.fused_launch import HIDDEN, MOST_RANKS
from coterie.models import DecoderConfig
from coterie.parallel.layout import Layout, LayoutConfig, Schedule, stage_blocks

_SIZES = ("tp", "pp", "cp", "ep", "etp", "dp_shard", "dp_replicate")
_SHOWN = 3


def layout_of(config: LayoutConfig, world: int, model: DecoderConfig) -> Layout:
    """The layout of ``world`` ranks for ``model``.

    Raises:
        UserError: it is impossible; names the rule, and what works instead.
    """
    problem = broken_rule(config, world, model)
    if problem is not None:
        raise UserError(f"{problem}{_advice(config, world, model)}")
    return _layout(config, world)


def blocks_of_stages(config: LayoutConfig, layers: int) -> tuple[range, ...]:
    """The blocks of each pipeline stage."""
    sizes = config.stages or stage_blocks(layers, config.pp * config.vpp)
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


def smallest_world(config: LayoutConfig) -> int:
    """The fewest processes that ``config`` can have."""
    stage = config.tp * config.cp * config.dp_shard * (config.dp_replicate or 1)
    if config.dp_replicate is None:
        stage = lcm(stage, config.ep * config.etp)
    return config.pp * stage


def schedule_of(config: LayoutConfig) -> Schedule:
    """The pipeline schedule, where none is named the one that fits ``vpp``."""
    return config.schedule or ("1f1b" if config.vpp == 1 else "interleaved")


def _layout(config: LayoutConfig, world: int) -> Layout:
    others = config.pp * config.tp * config.cp * config.dp_shard
    return Layout(
        tp=config.tp,
        pp=config.pp,
        vpp=config.vpp,
        schedule=schedule_of(config),
        cp=config.cp,
        ep=config.ep,
        etp=config.etp,
        dp_shard=config.dp_shard,
        dp_replicate=config.dp_replicate or world // others,
        node=config.node,
    )


def broken_rule(config: LayoutConfig, world: int, model: DecoderConfig) -> str | None:
    """The first rule that ``config`` breaks, as a sentence without its end; None: it is fine."""
    return next((p for p in _problems(config, world, model)), None)


def _problems(config: LayoutConfig, world: int, model: DecoderConfig) -> Iterator[str]:
    yield from _world(config, world)
    yield from _tensor(config, model)
    yield from _experts(config, world, model)
    yield from _pipeline(config, model)
    yield from _shared_depth(config, model)
    yield from _nodes(config, world, model)
    yield from _fused(config, world, model)


def _world(config: LayoutConfig, world: int) -> Iterator[str]:
    product = config.pp * config.tp * config.cp * config.dp_shard
    sizes = f"pp {config.pp} × tp {config.tp} × cp {config.cp} × dp_shard {config.dp_shard}"
    if world % product:
        do = "process does" if world == 1 else "processes do"
        yield f"parallel: {world} {do} not divide by {sizes} = {product}"
    elif config.dp_replicate is not None and product * config.dp_replicate != world:
        yield (
            f"parallel: {sizes} × dp_replicate {config.dp_replicate} = "
            f"{product * config.dp_replicate}, but the number of processes is {world}"
        )


def _tensor(config: LayoutConfig, model: DecoderConfig) -> Iterator[str]:
    tp, moe = config.tp, model.moe
    split: dict[str, int | None] = {
        "model.attention.heads": model.attention.heads,
        "model.attention.kv_heads": model.attention.kv_heads,
        "model.feed_forward.hidden": model.feed_forward.hidden if model.feed_forward else None,
        "model.moe.shared.hidden": moe.shared.hidden if moe and moe.shared else None,
    }
    for name, size in split.items():
        if size is not None and size % tp:
            yield f"parallel.tp is {tp}, but {name} {size} does not divide by it"
    if -(-model.vocabulary // tp) * (tp - 1) >= model.vocabulary:
        yield f"parallel.tp is {tp}, but model.vocabulary {model.vocabulary} leaves a rank empty"


def _experts(config: LayoutConfig, world: int, model: DecoderConfig) -> Iterator[str]:
    ep, etp = config.ep, config.etp
    if model.moe is None:
        for name in ("ep", "etp"):
            if getattr(config, name) > 1:
                yield f"parallel.{name} is {getattr(config, name)}, but the model has no experts"
        return
    hidden = model.moe.experts.hidden
    key = "model.moe.experts.count" if model.expert_counts is None else "model.expert_counts:"
    for count in model.expert_counts or (model.moe.experts.count,):
        if count % ep:
            yield f"parallel.ep is {ep}, but {key} {count} does not divide by it"
    if hidden % etp:
        yield f"parallel.etp is {etp}, but model.moe.experts.hidden {hidden} does not divide by it"
    ranks = world // config.pp
    if ranks % (ep * etp):
        yield (
            f"parallel: ep {ep} × etp {etp} = {ep * etp} does not divide the {ranks} ranks of a "
            "pipeline stage"
        )
    inside = config.dp_shard * config.cp * config.tp
    if config.dp_shard > 1 and inside % (ep * etp) and (ep * etp) % inside:
        yield (
            f"parallel: with dp_shard {config.dp_shard}, ep {ep} × etp {etp} = {ep * etp} and "
            f"dp_shard × cp × tp = {inside} must be multiples one of the other"
        )


def _pipeline(config: LayoutConfig, model: DecoderConfig) -> Iterator[str]:
    stages, schedule = config.pp * config.vpp, schedule_of(config)
    if config.pp == 1:
        if config.vpp > 1 or config.stages is not None or config.schedule is not None:
            yield "parallel: vpp, stages and schedule need a pipeline, but pp is 1"
        return
    needs = {"1f1b": (1, 1), "interleaved": (2, None), "zero_bubble": (1, None), "zbv": (2, 2)}
    least, most = needs[schedule]
    if config.vpp < least or (most is not None and config.vpp > most):
        accepted = f"{least}" if most == least else f"{least} or more"
        yield f"parallel.vpp is {config.vpp}, but schedule {schedule} needs {accepted}"
    if config.stages is None:
        if model.layers < stages:
            yield (
                f"parallel: {stages} stages (pp {config.pp} × vpp {config.vpp}) need as many "
                f"blocks, but model.layers is {model.layers}"
            )
    elif len(config.stages) != stages:
        yield (
            f"parallel.stages names {len(config.stages)} stages, but pp {config.pp} × vpp "
            f"{config.vpp} = {stages}"
        )
    elif min(config.stages) < 0 or sum(config.stages) != model.layers:
        yield (
            f"parallel.stages {list(config.stages)} must be counts that sum to model.layers "
            f"{model.layers}"
        )
    elif 0 in config.stages[1:-1]:
        yield f"parallel.stages {list(config.stages)}: only the first and the last may be 0"
    if model.tie_embeddings:
        yield (
            f"parallel.pp is {config.pp}, but model.tie_embeddings needs the embedding and the "
            "output layer on one stage"
        )


def _shared_depth(config: LayoutConfig, model: DecoderConfig) -> Iterator[str]:
    if model.shared_depth > 1 and config.pp > 1 and config.schedule in ("zero_bubble", "zbv"):
        yield (
            f"parallel.schedule is {config.schedule}, which computes the gradients of weights by "
            "themselves; it cannot where blocks share their layers, as with model.shared_depth "
            f"{model.shared_depth}"
        )
    for blocks in blocks_of_stages(config, model.layers):
        if blocks and (blocks.start % model.shared_depth or blocks.stop % model.shared_depth):
            yield (
                f"parallel: a stage of the pipeline has blocks {blocks.start} to "
                f"{blocks.stop - 1}, but groups of model.shared_depth {model.shared_depth} blocks "
                "share their layers and must be on one stage"
            )


def _nodes(config: LayoutConfig, world: int, model: DecoderConfig) -> Iterator[str]:
    if model.moe is None or model.moe.exchange.route != "nodes" or config.node is None:
        return
    layout = _layout(config, world)
    node_GR = layout.groups("expert") // config.node
    shared = (node_GR == node_GR[:, :1]).sum(1).max()
    if layout.expert_node != shared:
        yield (
            f"parallel.node is {config.node}, which spreads the {layout.ep * layout.etp} ranks of "
            "ep × etp unevenly over nodes, but model.moe.exchange.route is nodes"
        )


def _fused(config: LayoutConfig, world: int, model: DecoderConfig) -> Iterator[str]:
    if model.moe is None or model.moe.exchange.kind != "fused":
        return
    hidden = model.moe.experts.hidden // config.etp
    if hidden % HIDDEN:
        yield (
            f"parallel.etp is {config.etp}, which leaves a rank {hidden} of the experts' hidden "
            f"width, but model.moe.exchange.kind fused needs multiples of {HIDDEN}"
        )
    layout = _layout(config, world)
    expert_GR = layout.groups("expert")
    ranks, by_nodes = expert_GR.shape[1], model.moe.exchange.route == "nodes"
    node_GR = expert_GR // (config.node or world)
    if not by_nodes and (node_GR != node_GR[:, :1]).any():
        yield (
            f"parallel.node is {config.node}, which spreads the {ranks} ranks of ep × etp over "
            "nodes, but model.moe.exchange.kind is fused: accepted are ranks of one node, and "
            "model.moe.exchange.route nodes"
        )
    together = layout.expert_node if by_nodes else ranks
    if together == 1 < ranks:
        yield (
            f"parallel: each node has one of the {ranks} ranks of ep × etp, so that "
            "model.moe.exchange.kind fused has none to connect: accepted is another kind"
        )
    if together > MOST_RANKS:
        yield (
            f"parallel: {together} ranks of ep × etp exchange rows with each other, but "
            f"model.moe.exchange.kind fused is for up to {MOST_RANKS}"
        )


def _advice(config: LayoutConfig, world: int, model: DecoderConfig) -> str:
    """The end of the sentence: layouts that differ from ``config`` in one key, and work."""

    def fits(name: str, value: object) -> bool:
        changed = config.model_copy(update={name: value})
        return value != getattr(config, name) and broken_rule(changed, world, model) is None

    sizes: dict[str, Sequence[int]] = {name: _divisors(world) for name in _SIZES}
    sizes["vpp"] = range(1, model.layers + 1)
    found: list[str] = []
    for name, candidates in sizes.items():
        now = getattr(config, name) or 1
        near = sorted((s for s in candidates if fits(name, s)), key=lambda s: abs(s - now))
        if near:
            found.append(f"{name} {' or '.join(map(str, sorted(near[:_SHOWN])))}")
    names = [schedule for schedule in get_args(Schedule) if fits("schedule", schedule)]
    if names:
        found.append(f"schedule {' or '.join(names)}")
    found += [f"{name} null" for name in ("schedule", "stages") if fits(name, None)]
    if found:
        return f"; what fits instead: {', or '.join(found)}"
    least = smallest_world(config)
    if broken_rule(config, least, model) is None:
        return f"; what fits instead: {least} processes"
    return "; no change of one key makes it fit"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
