"""docs/results/overlap.md and its picture, from the figures of benchmarks/overlap.py."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.overlaps.cases import (
    COMMUNICATION,
    COMPUTE,
    OVERLAPPED,
    PASSES,
    PLAIN,
    TWO_CHUNKS,
)

Record = dict[str, Any]
BALANCED = (0.4, 0.6)
"""Compute's share of the two where they are said to be about equal."""
WANTED = (0.25, 0.75)
"""Compute's share that a case is meant to have."""
PAPER = (
    ("Comet, mean speed-up of a layer", "1.96", ""),
    ("Comet, Mixtral's shape, EP 8, by number of tokens", "1.28–2.37", ""),
    ("Comet, 8 experts, top-2, 16384 tokens", "", "86.5%"),
    ("Tutel, the same", "", "68.6%"),
    ("FasterMoE, the same", "", "29.2%"),
)


def write(found: Record, out: Path) -> None:
    """overlap.md and overlap.png in ``out``."""
    if found["results"]:
        out.mkdir(parents=True, exist_ok=True)
        draw(found, out / "overlap.png")
        (out / "overlap.md").write_text(page(found))


def page(found: Record) -> str:
    """The page's text."""
    records = list(found["results"].values())
    parts = [_INTRODUCTION, _speed_ups(records), _hidden(records), _beside_the_paper(records)]
    parts += [_goals(records), _split(records), _milliseconds(records), _conditions(found, records)]
    return "\n".join(parts)


_INTRODUCTION = """\
# Rows that travel while others are computed: figures

Written by `python benchmarks/overlap.py` (`benchmarks/results/overlap.json` holds every figure).
One whole MoE layer in fp32, router included, its experts shared out over hosts: network namespaces
behind links of a set rate (`tbf`, each way, jumbo frames), gloo over TCP, one rank and one torch
thread each, scheduled as batch. Two hosts have a core each; four share two cores. All contenders
compute the same from the same weights, in turn in the same processes, with fresh inputs each round;
a pass takes as long as its slowest rank; medians over rounds, ratios taken within a round, whose
order is drawn anew each time.

- *plain*: one all-to-all there, one back (`exchange.kind: all_to_all`), in which rows go both ways
  at once (`benchmarks/both_ways.py`; gloo's own, which the last two use, often sends them one way
  after the other). Speed-ups are over it.
- *two chunks*: the pipeline of Tutel and FasterMoE: half the tokens travel, the other half is
  computed.
- *overlapped PxS*: `exchange.kind: overlapped` with P `pieces` between two ranks and S `slabs`.
  *overlapped, tuned*: what a run that leaves both open measures and takes, `all_to_all` where
  nothing is faster by 5%.
- *megatron-core*: its `MoELayer`, `SequentialMLP`, all-to-all dispatcher. *DeepSpeed*: its `MoE`
  with the same SwiGLU experts and no token dropped: all its experts carry as many rows as the
  busiest.
- *compute alone*: the plain layer with every row computed where it is, as many on each rank.
  *Communication alone*: all-to-alls of the same rows, there and back (twice with the backward
  pass).

Layers have the experts, choices and F/D of Mixtral (8, 2, 3.5), Qwen2-MoE (64, 4, 0.6875) and
Phi-3.5-MoE (16, 2, 1.5625). Width D and tokens for each rank T are chosen by a short calibration
for each case, such that compute and communication take about equally long.

![speed-up by rate](overlap.png)

Dashed: (compute + communication) / the longer of the two, each alone: the limit, were the plain
exchange to take no longer than the two.
"""


def _contenders(records: Iterable[Record]) -> list[str]:
    """The whole layers but the plain one, in order."""
    names = dict.fromkeys(name for record in records for name in record["contenders"])
    return [name for name in names if name not in (COMPUTE, COMMUNICATION, PLAIN)]


def _ours(records: Iterable[Record]) -> list[str]:
    return [name for name in _contenders(records) if name.startswith(OVERLAPPED)]


def _case(record: Record) -> str:
    return f"{record['family']}, {record['hosts']} hosts, {record['megabits']}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; all columns but the first ``left`` to the right."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows)) + "\n"


def _cells(record: Record, names: Iterable[str], show: Callable[[Record], str]) -> list[str]:
    """For each contender: forward / both passes."""
    cells = []
    for name in names:
        passes = record["contenders"].get(name)
        cells.append(" / ".join(show(passes[which]) for which in PASSES) if passes else "–")
    return cells


def _speed_ups(records: list[Record]) -> str:
    names = _contenders(records)
    rows = []
    for record in records:
        size = record["shape"]
        shares = " / ".join(f"{_share(record, which):.0%}" for which in PASSES)
        rows.append(
            [
                _case(record),
                *(str(size[letter]) for letter in "DFT"),
                shares,
                *_cells(record, names, lambda f: f"{f['speed_up']:.2f}"),
                _chosen(record["chosen"]),
            ]
        )
    headings = ["layer, hosts, Mbit/s", "D", "F", "T", "compute's share", *names, "tuned is"]
    return (
        "## Speed-up over the plain exchange\n\n"
        "Forward / forward + backward. *Compute's share*: of compute and communication, each alone."
        f"\n\n{_table(headings, rows)}"
    )


def _chosen(exchange: Record) -> str:
    overlapped = exchange["kind"] == "overlapped"
    return f"{exchange['pieces']}x{exchange['slabs']}" if overlapped else "plain"


def _room(record: Record, which: str) -> float:
    """The part of communication that there is room to hide, about: in which the core is idle when
    nothing else runs, and as long as there is compute to hide behind."""
    compute, alone = (record["contenders"][part][which] for part in (COMPUTE, COMMUNICATION))
    return float(min(alone["idle"], compute["ms"] / alone["ms"]))


def _share(record: Record, which: str) -> float:
    """Compute's, of compute and communication."""
    compute, communication = (
        record["contenders"][name][which]["ms"] for name in (COMPUTE, COMMUNICATION)
    )
    share: float = compute / (compute + communication)
    return share


def _hidden(records: list[Record]) -> str:
    names = [PLAIN, *_contenders(records)]
    rows = [
        [
            _case(r),
            " / ".join(f"{_room(r, which):.0%}" for which in PASSES),
            *_cells(r, names, lambda f: f"{f['hidden']:.0%}"),
        ]
        for r in records
    ]
    return (
        "## Hidden communication\n\n"
        "1 − (time − compute alone) / communication alone; below 0 where a layer takes longer\n"
        "than the two one after the other: copies count too, and gloo's threads on the core.\n"
        "*Room*: what the network needs of the core (kernel, gloo's threads) when nothing else\n"
        "runs cannot be hidden behind work there, nor can more time than compute takes. It is an\n"
        "estimate, from other turns than what it is held against: some figures are above it.\n"
        f"\n{_table(['layer, hosts, Mbit/s', 'room', *names], rows)}"
    )


def _beside_the_paper(records: list[Record]) -> str:
    rows = [[f"*paper*: {what}", "8 × H800", ups, hidden] for what, ups, hidden in PAPER]
    for hosts in sorted({record["hosts"] for record in records}):
        mine = [record for record in records if record["hosts"] == hosts]
        for name in _contenders(mine):
            for which, said in PASSES.items():
                found = [r["contenders"][name][which] for r in mine if name in r["contenders"]]
                ups = [f["speed_up"] for f in found]
                hidden = statistics.mean(f["hidden"] for f in found)
                mean = math.exp(statistics.mean(map(math.log, ups)))
                spread = f"{mean:.2f} ({min(ups):.2f}–{max(ups):.2f})"
                rows.append([f"{name}, {said}", f"{hosts} hosts, CPU", spread, f"{hidden:.0%}"])
    headings = ["", "on", "speed-up over no overlap", "hidden"]
    return (
        "## Beside the paper\n\n"
        "Comet (arXiv 2502.19811) measures forward passes on 8 GPUs with NVLink, against Megatron\n"
        "and others; ours are processors behind a slow network, against the plain exchange. They\n"
        "stand side by side to be read, not to be subtracted. Ours: the geometric mean over all\n"
        "rates and layers (lowest–highest).\n"
        f"\n{_table(headings, rows, left=2)}"
    )


def _goals(records: list[Record]) -> str:
    low, high = BALANCED
    rows = []
    for name in _ours(records):
        for hosts in sorted({record["hosts"] for record in records}):
            found = [
                (record, which, record["contenders"][name][which])
                for record in records
                for which in PASSES
                if record["hosts"] == hosts and name in record["contenders"]
            ]
            equal = [f for record, which, f in found if low <= _share(record, which) <= high]
            fast = sum(f["speed_up"] >= 1.5 for f in equal)
            well = sum(f["hidden"] >= 0.8 for f in equal)
            nearly = sum(
                f["hidden"] >= 0.8 * _room(record, which)
                for record, which, f in found
                if low <= _share(record, which) <= high
            )
            slower = sum(f["speed_up"] < 1 for _, _, f in found)
            rows.append(
                [
                    name,
                    str(hosts),
                    f"{fast} of {len(equal)}",
                    f"{well} of {len(equal)}",
                    f"{nearly} of {len(equal)}",
                    f"{slower} of {len(found)}",
                ]
            )
    headings = ["", "hosts", "at least 1.5×", "at least 80% hidden", "80% of the room", "slower"]
    return (
        "## Goals\n\n"
        f"All but *slower* (than the plain exchange) where compute is {low:.0%} to {high:.0%} of\n"
        "the two; forward and both passes count as two. *80% of the room*: of what there is\n"
        f"room to hide, see above.\n\n{_table(headings, rows)}"
    )


def _split(records: list[Record]) -> str:
    shares = ("main", "network", "idle", "other", "queued", "waited")
    rows = []
    for record in records:
        for name in (PLAIN, TWO_CHUNKS, *_ours(records)):
            if name in record["contenders"]:
                figures = record["contenders"][name]["both"]
                says = figures | {"waited": None} if name == TWO_CHUNKS else figures
                cells = ["" if says[s] is None else f"{says[s]:.0%}" for s in shares]
                rows.append([_case(record), name, *cells])
    headings = ["layer, hosts, Mbit/s", "", "layer", "gloo", "idle", "other", "queued", "waited"]
    return (
        "## Waiting for the wire, and for the processor\n\n"
        "Forward + backward. Of the cores' time: *layer*, the main threads (experts, copies);\n"
        "*gloo*, all other threads of the ranks (TCP, and copies into and out of it), on the same\n"
        "cores; *idle*, the core has nothing to do: it waits for the **wire**; *other*: the\n"
        "kernel itself, and other programs. Of the main threads' time: *queued*, it could have\n"
        "run, but its core was busy otherwise: it waits for the **processor**; *waited*: the\n"
        "exchange stood still for messages, whichever was the cause.\n"
        f"\n{_table(headings, rows, left=2)}"
    )


def _milliseconds(records: list[Record]) -> str:
    names = [COMPUTE, COMMUNICATION, PLAIN, *_contenders(records)]
    rows = []
    for record in records:
        alone = [record["contenders"][name] for name in (COMPUTE, COMMUNICATION)]
        serial = " / ".join(f"{sum(part[which]['ms'] for part in alone):.0f}" for which in PASSES)
        cells = _cells(record, names, lambda f: f"{f['ms']:.0f}")
        rows.append([_case(record), *cells[:2], serial, *cells[2:]])
    headings = ["layer, hosts, Mbit/s", *names[:2], "their sum", *names[2:]]
    return f"## Milliseconds\n\nForward / forward + backward.\n\n{_table(headings, rows)}"


def _conditions(found: Record, records: list[Record]) -> str:
    machine = found["machine"]
    rounds = sorted({record["rounds"] for record in records})
    worst = max(max(record["differs"].values()) for record in records)
    minutes = sum(record["seconds"] for record in records) / 60
    lines = [
        "## Conditions\n",
        f"{machine['cpu']}, torch {machine['torch']}; {len(records)} cases of "
        f"{', '.join(map(str, rounds))} rounds, {minutes:.0f} minutes. Outputs and gradients of",
        "inputs and weights of all contenders differ from the plain exchange's by at most "
        f"{worst:.0e} of their norm (fp32).",
    ]
    others = [
        statistics.median(passes["both"]["other"] for passes in record["contenders"].values())
        for record in records
    ]
    lines.append(
        "The kernel and other programs took, by case (the median over contenders), "
        f"{min(others):.0%} to {max(others):.0%} of the\ncores' time. Where that is much, the "
        "machine was not idle."
    )
    low, high = WANTED
    outside = [
        f"{_case(r)} ({_share(r, which):.0%}, {PASSES[which]})"
        for r in records
        for which in PASSES
        if not low <= _share(r, which) <= high
    ]
    if outside:
        lines.append(
            f"Compute's share is not between {low:.0%} and {high:.0%} in {'; '.join(outside)}: no "
            "layer of a size within the calibration's limits has it."
        )
    left_out = {name: why for record in records for name, why in record["left_out"].items()}
    lines += [f"Left out: {name}: {why}." for name, why in left_out.items()]
    return "\n".join(lines) + "\n"


def draw(found: Record, path: Path) -> None:
    """Speed-up over the plain exchange by rate: a column for each layer, a row for each number of
    hosts and pass."""
    records = list(found["results"].values())
    families = list(dict.fromkeys(record["family"] for record in records))
    counts = sorted({record["hosts"] for record in records})
    lines = [(hosts, which) for hosts in counts for which in PASSES]
    size = (3.2 * len(families) + 2.2, 2.3 * len(lines) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(lines), len(families), squeeze=False, sharey=True)
    for row, (hosts, which) in zip(panels, lines, strict=True):
        for panel, family in zip(row, families, strict=True):
            mine = [r for r in records if (r["family"], r["hosts"]) == (family, hosts)]
            _panel(panel, mine, which, _contenders(records))
            panel.set_title(f"{family}, {hosts} hosts, {PASSES[which]}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("Mbit/s")
    for row in panels:
        row[0].set_ylabel("speed-up")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _panel(panel: Axes, records: list[Record], which: str, names: list[str]) -> None:
    rates = [record["megabits"] for record in records]
    panel.axhline(1, color="black", linewidth=0.8)
    limits = [1 / max(_share(r, which), 1 - _share(r, which)) for r in records]
    panel.plot(rates, limits, "--", color="grey", linewidth=1)
    for number, name in enumerate(names):
        points = [
            (r["megabits"], r["contenders"][name][which]["speed_up"])
            for r in records
            if name in r["contenders"]
        ]
        if not points:
            continue
        style = "o-" if name.startswith(OVERLAPPED) else "s:"
        panel.plot(*zip(*points, strict=True), style, color=f"C{number}", label=name, markersize=4)
    panel.set_xscale("log")
    panel.set_xticks(rates, map(str, rates))
    panel.minorticks_off()
