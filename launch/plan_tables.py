"""A plan as tables for people, and as JSON for all else."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from coterie.parallel.planner.machine import Machine
    from coterie.parallel.planner.memory import Memory
    from coterie.parallel.planner.plan import Kind, Plan
    from coterie.parallel.planner.search import Candidate, Found
    from coterie.parallel.planner.time import StepTime

_MEMORY = {
    "parameters": "weights",
    "optimizer": "moments",
    "gradients": "grads",
    "activations": "kept",
    "buffers": "buffers",
    "gathered": "gathered",
    "temporary": "inside",
}
"""Columns, by what they show of a rank's memory."""
_COLUMNS = 5  # kinds of rank that fit beside each other


def show(plan: "Plan", name: str, every_rank: bool) -> None:
    """Print the summary; ``every_rank``: and a line for each."""
    console = Console(highlight=False)
    work, machine = plan.work, plan.machine
    console.print(
        f"[bold]{name}[/bold]: {work.layout.world} ranks on {plan.nodes} nodes of {machine.name}: "
        f"{work.layout.describe()}"
    )
    console.print(
        f"a step: {work.micro_batches} micro-batches of {work.rows} × {work.sequence} tokens on "
        f"each of {work.layout.dp} data-parallel parts; {work.compute}, "
        f"recompute {work.recompute}, expert skew {work.skew:g}"
    )
    console.print(_kinds(plan))
    fits = "fits" if plan.fits else "[bold]does not fit[/bold]"
    console.print(
        f"the most on a rank is {_bytes(plan.peak)}: {fits} {_bytes(plan.machine.bytes)} "
        f"({machine.usable:.0%} of {machine.memory:.0f} GB)"
    )
    console.print(_groups(plan))
    console.print(_traffic(plan))
    if plan.routes:
        console.print(_exchange(plan))
    console.print(_time(plan.time))
    if every_rank:
        console.print(_ranks(plan))


def _kinds(plan: "Plan") -> Table:
    """A column for each kind of rank; where there are many, a line for each."""
    used = [name for name in _MEMORY if any(getattr(k.memory, name) for k in plan.kinds)]
    heads = ["ranks", "first", "stages", "dense", "expert", *(_MEMORY[n] for n in used), "peak"]
    kinds = [
        [
            str(sum(len(kind.ranks) for kind in same)),
            str(same[0].ranks[0]),
            _span([stage for k in same for stage in k.stages]),
            _number(same[0].dense),
            _number(same[0].expert),
            *(_range([getattr(k.memory, name) for k in same]) for name in used),
            _range([k.memory.peak for k in same]),
        ]
        for same in _alike(plan.kinds)
    ]
    few = len(kinds) <= _COLUMNS
    table = _table("memory, by kind of rank", show_header=not few)
    if few:
        table.add_column(justify="left")
        for _ in kinds:
            table.add_column(justify="right")
        for line in zip(heads, *kinds, strict=True):
            table.add_row(*line)
        return table
    for head in heads:
        table.add_column(head, justify="right")
    for kind in kinds:
        table.add_row(*kind)
    return table


def _table(title: str, show_header: bool = True) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=show_header,
    )


def _alike(kinds: list["Kind"]) -> Iterator[list["Kind"]]:
    """Neighbours that own as much: they differ in the micro-batches under way alone."""
    row: list[Kind] = []
    for kind in kinds:
        if row and (kind.dense, kind.expert) != (row[0].dense, row[0].expert):
            yield row
            row = []
        row.append(kind)
    if row:
        yield row


def _span(stages: list[int]) -> str:
    ordered = sorted(stages)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}–{ordered[-1]}"
    return ", ".join(map(str, ordered))


def _range(values: list[int]) -> str:
    low, high = _bytes(min(values)), _bytes(max(values))
    if low == high:
        return high
    return f"{low.split()[0]}–{high}" if low[-2:] == high[-2:] else f"{low}–{high}"


def _groups(plan: "Plan") -> Table:
    table = _table("groups")
    for column, side in (
        ("axis", "left"),
        ("groups", "right"),
        ("ranks", "right"),
        ("first", "left"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for axis, groups in plan.groups().items():
        first = groups[0]
        shown = ", ".join(map(str, first[:6])) + (", …" if len(first) > 6 else "")
        table.add_row(axis, str(len(groups)), str(len(first)), shown)
    return table


def _traffic(plan: "Plan") -> Table:
    busiest = max(range(len(plan.collectives)), key=lambda pp: _weight(plan, pp))
    most = f" of pipeline rank {busiest}, which sends the most"
    table = _table(f"sent in a step by a rank{most if len(plan.collectives) > 1 else ''}")
    for column in ("what", "over", "how", "times", "inside the node", "to other nodes"):
        table.add_column(
            column, justify="right" if column not in ("what", "over", "how") else "left"
        )
    rows: dict[tuple[str, str, str], list[float]] = {}
    for collective in plan.collectives[busiest]:
        sent = plan.links.sent(collective)
        row = rows.setdefault((collective.what, collective.axis, collective.op), [0, 0, 0])
        row[0] += collective.count
        row[1] += collective.count * sent.node
        row[2] += collective.count * sent.network
    for (what, axis, op), (count, node, network) in rows.items():
        table.add_row(what, axis, op, f"{count:.0f}", _bytes(node), _bytes(network))
    node, network = (sum(row[n] for row in rows.values()) for n in (1, 2))
    table.add_section()
    table.add_row("all", "", "", "", _bytes(node), _bytes(network))
    return table


def _exchange(plan: "Plan") -> str:
    """Which route is the fastest, beside the others."""
    now, best = plan.route, plan.best_route
    assert best is not None
    if plan.work.fused:
        return (
            f"exchange: fused, {_seconds(plan.routes[best])} a layer and micro-batch if nothing of "
            "it were hidden; how much is hidden is not planned"
        )
    took = [f"{name} {_seconds(s)}" for name, s in plan.routes.items() if name != best]
    return (
        f"exchange: route {best} {'takes' if best == now else 'would take'} "
        f"{_seconds(plan.routes[best])} a layer and micro-batch, {', '.join(took)}"
        + ("" if best == now else f": set model.moe.exchange.route={best}")
    )


def _weight(plan: "Plan", pp: int) -> float:
    sent = [(c.count, plan.links.sent(c)) for c in plan.collectives[pp]]
    return sum(count * (s.node + 8 * s.network) for count, s in sent)


def _time(time: "StepTime") -> Table:
    table = Table(title="a step", title_justify="left", show_header=False)
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("note")
    for name, seconds, note in (
        ("compute", time.compute, "on the pipeline rank that works the longest"),
        ("communication", time.communication, "not hidden behind compute"),
        ("bubble", time.bubble, f"idle: {time.bubble_share:.1%} of the pipeline's time, all ranks"),
        ("gradients", time.gradients, "summed after the last micro-batch"),
        ("update", time.update, "norm, clipping, optimizer"),
    ):
        table.add_row(name, _seconds(seconds), note)
    table.add_section()
    rate = time.model_flops / time.total
    note = f"{rate / 1e12:,.0f} TFLOP/s over all ranks, {time.utilisation:.1%} of peak (MFU)"
    table.add_row("step", _seconds(time.total), note)
    return table


def _ranks(plan: "Plan") -> Table:
    table = Table(title="ranks", title_justify="left")
    for column in ("rank", "node", "pp", "dp", "cp", "tp", "ep", "etp", "own", "peak"):
        table.add_column(column, justify="right")
    for row in _each_rank(plan):
        at = row["coordinates"]
        table.add_row(
            str(row["rank"]),
            str(row["node"]),
            *(str(at[axis]) for axis in ("pp", "dp", "cp", "tp", "ep", "etp")),
            _number(row["dense_parameters"] + row["expert_parameters"]),
            _bytes(row["peak_bytes"]),
        )
    return table


def _each_rank(plan: "Plan") -> Iterator[dict[str, Any]]:
    kind_of = {int(rank): n for n, kind in enumerate(plan.kinds) for rank in kind.ranks}
    for rank in range(plan.work.layout.world):
        kind = plan.kinds[kind_of[rank]]
        yield {
            "rank": rank,
            "node": rank // plan.links.per_node,
            "kind": kind_of[rank],
            "coordinates": asdict(plan.work.layout.coordinates(rank)),
            "dense_parameters": kind.dense,
            "expert_parameters": kind.expert,
            "peak_bytes": kind.memory.peak,
        }


def as_json(plan: "Plan") -> dict[str, Any]:
    """Everything, for all ranks. Sizes are in bytes, times in seconds."""
    return {
        **_summary(plan),
        "groups": plan.groups(),
        "kinds": [
            {
                "ranks": kind.ranks.tolist(),
                "pipeline_rank": kind.pp,
                "stages": kind.stages,
                "dense_parameters": kind.dense,
                "expert_parameters": kind.expert,
                "memory": _memory(kind.memory),
                "sent": asdict(kind.sent),
            }
            for kind in plan.kinds
        ],
        "traffic": [
            [{**asdict(c), "sent": asdict(plan.links.sent(c))} for c in found]
            for found in plan.collectives
        ],
        "ranks": list(_each_rank(plan)),
    }


def candidate_json(candidate: "Candidate") -> dict[str, Any]:
    """A layout that a search found, as overrides and what it costs."""
    return {"overrides": overrides(candidate), **_summary(candidate.plan)}


def _summary(plan: "Plan") -> dict[str, Any]:
    work = plan.work
    return {
        "world": work.layout.world,
        "nodes": plan.nodes,
        "machine": plan.machine.model_dump(),
        "layout": asdict(work.layout),
        "blocks": work.blocks,
        "micro_batches": work.micro_batches,
        "rows": work.rows,
        "recompute": work.recompute,
        "precision": work.compute,
        "skew": work.skew,
        "peak_bytes": plan.peak,
        "fits": plan.fits,
        "exchange": {"route": plan.route, "best": plan.best_route, "seconds": plan.routes},
        "step": asdict(plan.time),
    }


def _memory(memory: "Memory") -> dict[str, int]:
    return {**asdict(memory), "peak": memory.peak}


def overrides(candidate: "Candidate") -> list[str]:
    """What to add to a command to run a layout that a search found."""
    changed = candidate.parallel.model_dump(exclude_defaults=True)
    settings = ", ".join(f"{name}: {value}" for name, value in changed.items())
    found = [f"parallel={{{settings}}}", f"train.recompute={candidate.plan.work.recompute}"]
    if candidate.plan.routes:
        found.append(f"model.moe.exchange.route={candidate.plan.route}")
    return found


def show_search(found: "Found", name: str, machine: "Machine") -> None:
    """Print the best layouts of a search."""
    console = Console(highlight=False)
    plan = found.best[0].plan
    console.print(
        f"[bold]{name}[/bold]: {plan.work.layout.world} ranks on {plan.nodes} nodes of "
        f"{machine.name}: {found.possible:,} layouts are possible, {found.fitting:,} fit"
    )
    table = Table()
    for column in ("", "layout", "recompute", "route", "step", "MFU", "bubble", "peak"):
        left = column in ("layout", "recompute", "route")
        table.add_column(column, justify="left" if left else "right")
    for place, candidate in enumerate(found.best, 1):
        plan = candidate.plan
        table.add_row(
            str(place),
            plan.work.layout.describe(),
            plan.work.recompute,
            plan.route if plan.routes else "",
            _seconds(plan.time.total),
            f"{plan.time.utilisation:.1%}",
            f"{plan.time.bubble_share:.1%}",
            _bytes(plan.peak),
        )
    console.print(table)
    console.print("the first one:", *(f"'{text}'" for text in overrides(found.best[0])))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _number(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 100_000 else f"{count:,}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
