"""gpu.md from gpu.json: what was asked for, what was measured, and what was not.

python -m benchmarks.gpu.report benchmarks/results/gpu.json
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SHELLS = ("shell 256", "shell 128")
"""The fused kernels' products, by the columns of their tiles."""
COMET = "Comet's setting"
"""In the name of its case."""
OPEN = "not measured"


def page(found: Record) -> str:
    """The whole report."""
    figures = {name: found["figures"].get(name, []) for name in PARTS}
    lines = ["# What was measured on a GPU", ""]
    if found["device"] != "cuda":
        lines += ["**Tried on the host: the times below say nothing.**", ""]
    lines += ["`make gpu` made this page; [docs/gpu.md](../../docs/gpu.md) says what it means.", ""]
    for name, part in PARTS.items():
        if figures[name]:
            lines += [*part(figures[name]), ""]
    lines += ["## What was asked for", "", *_bars(found, figures), ""]
    lines += ["## Steps", "", *_steps(found["steps"])]
    return "\n".join(lines) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    made = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return made + [f"| {' | '.join(row)} |" for row in rows]


def _machine(records: list[Record]) -> list[str]:
    rows = [
        (key, f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", "; "))
        for key, value in records[0].items()
    ]
    return ["## Machine", "", *table(("", ""), rows)]


def _products(records: list[Record]) -> list[str]:
    rows = []
    for record in records:
        for product, rates in record["TFLOP/s"].items():
            rates = {name: f"{rate:.0f}" for name, rate in rates.items()}
            whole = product == "all six"
            rows.append(
                (
                    record["case"],
                    product,
                    *(rates[name] for name in (*SHELLS, "each", "one", "grouped")),
                    f"{record['of cuBLAS']:.0%}" if whole else "",
                    f"{record['of grouped']:.0%}" if whole else "",
                )
            )
    heads = ("layer", "product", *(f"fused {shell}" for shell in SHELLS), "cuBLAS, each expert")
    heads = (*heads, "cuBLAS, one product", "grouped_mm", "of cuBLAS", "of grouped_mm")
    return ["## Products, TFLOP/s", "", *table(heads, rows)]


def _link(records: list[Record]) -> list[str]:
    rows = []
    for record in records:
        ms = record["ms"]
        rows.append(
            (
                record["case"],
                record["pass"],
                str(record["GB/s"] or "∞"),
                *(f"{ms[name]:.3f}" for name in ("T_comp", "T_comm", "T_fused")),
                f"{record['eta']:.0%}",
                f"{record['hidden']:.1%}",
                f"{record['over serial']:.2f}×",
                *(f"{ms[name] / ms['T_fused']:.2f}×" for name in ("2 chunks", "4 chunks")),
                f"{record['TFLOP/s']:.0f}",
                f"{record['communication']}, {record['slabs']}, {record['tile columns']}",
            )
        )
    heads = ("layer", "pass", "GB/s", "T_comp, ms", "T_comm", "T_fused", "η", "hidden")
    heads = (*heads, "over serial", "over 2 chunks", "over 4", "TFLOP/s", "blocks, slabs, columns")
    return ["## Emulated link, one rank of eight", "", *table(heads, rows)]


def _layers(records: list[Record]) -> list[str]:
    rows = [
        (
            record["case"],
            name,
            f"{record['forward, ms'][name]:.2f}",
            f"{ms:.2f}",
            f"{record['TFLOP/s'][name]:.0f}",
            f"{ms / record['ms'][record['ours']]:.2f}×",
        )
        for record in records
        for name, ms in record["ms"].items()
    ]
    heads = ("layer", "way", "forward, ms", "forward + backward, ms", "TFLOP/s", "time / ours")
    lines = ["## Whole layer, one rank", "", *table(heads, rows)]
    left_out = {pair for record in records for pair in record["left out"].items()}
    return [*lines, "", *(f"Left out: {name} ({why})." for name, why in sorted(left_out))]


PARTS = {"machine": _machine, "products": _products, "link": _link, "layer": _layers}


def _bars(found: Record, figures: dict[str, list[Record]]) -> list[str]:
    """What was asked for beside what was measured."""
    status = {step["name"]: step["status"] for step in found["steps"]}
    link, products, layer = figures["link"], figures["products"], figures["layer"]
    finite = [record for record in link if record["GB/s"]]
    comet = [record for record in finite if COMET in record["case"]]
    forward = [record for record in comet if record["pass"] == "forward"]
    qwen3 = {r["pass"]: r for r in link if "Qwen3" in r["case"] and r["GB/s"] == 360}
    # where communication takes about as long as computing, to hide it all would be twice as fast
    balanced = [r for r in finite if 0.5 <= r["ms"]["T_comm"] / r["ms"]["T_comp"] <= 2]
    rows = [
        ("tests/gpu", "pass", status.get("tests", "not run")),
        ("memcheck, racecheck", "clean", _told(status, "memcheck", "racecheck")),
        ("fused shell of cuBLAS", "≥ 90% each", _each(products, "of cuBLAS", ".0%")),
        ("fused shell of grouped_mm", "≥ 100% each", _each(products, "of grouped", ".0%")),
        ("hidden, Comet's setting, forward", "≥ 86.5%", _each(forward, "hidden", ".1%", "GB/s")),
        ("over serial", "> 1× everywhere", _least(finite, "over serial")),
        ("over the better chunks", "> 1× everywhere", _least(finite, "over chunks")),
        ("over serial, balanced", "1.96×, and 1.42×", _most(balanced, "over serial")),
        ("Qwen3-30B-like forward, 360 GB/s", "233 TFLOP/s", _rate(qwen3, "forward")),
        ("Qwen3-30B-like backward, 360 GB/s", "209 TFLOP/s", _rate(qwen3, "backward")),
        ("whole layer, others / ours", "> 1× each", _others(layer)),
    ]
    return table(("what", "asked for", "measured"), rows)


def _told(status: dict[str, str], *names: str) -> str:
    return ", ".join(f"{name} {status.get(name, 'not run')}" for name in names)


def _each(records: list[Record], key: str, how: str, by: str = "case") -> str:
    return ", ".join(f"{r[by]}: {r[key]:{how}}" for r in records) or OPEN


def _least(records: list[Record], key: str) -> str:
    if not records:
        return OPEN
    one = min(records, key=lambda record: record[key])
    return f"least {one[key]:.2f}× ({one['case']}, {one['pass']}, {one['GB/s']} GB/s)"


def _most(records: list[Record], key: str) -> str:
    if not records:
        return OPEN
    one = max(records, key=lambda record: record[key])
    return f"most {one[key]:.2f}× ({one['case']}, {one['pass']}, {one['GB/s']} GB/s)"


def _rate(records: dict[str, Record], which: str) -> str:
    return f"{records[which]['TFLOP/s']:.0f} TFLOP/s" if which in records else OPEN


def _others(records: list[Record]) -> str:
    ratios = [(r["case"], name, x) for r in records for name, x in r["others / ours"].items()]
    return ", ".join(f"{case}, {name}: {x:.2f}×" for case, name, x in ratios) or OPEN


def _steps(steps: list[Record]) -> list[str]:
    lines = table(
        ("step", "came to", "seconds"),
        [(step["name"], step["status"], f"{step['seconds']:.0f}") for step in steps],
    )
    for step in steps:
        told = step["told"].strip()
        if step["status"] == "not run":
            lines += ["", f"{step['name']} was not run: {told}."]
        elif step["name"] == "tests" or step["status"] != "done":
            lines += ["", f"{step['name']} ended with:", "", "```", *told.splitlines()[-40:], "```"]
    return lines


def main() -> None:
    print(page(json.loads(Path(sys.argv[1]).read_text())), end="")


if __name__ == "__main__":
    main()
