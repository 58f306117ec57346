"""docs/results/mixer.md and its picture, from the figures of benchmarks/mixer.py."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Record = dict[str, Any]
METHODS = ("MixER", "MixER, spread", "one expert", "naive mixture")
DATASETS = {"odebench_2": "2 families × 5", "odebench_10a": "10 families × 5"}
_COLOURS = dict(zip(METHODS, ("tab:blue", "tab:blue", "tab:orange", "tab:green"), strict=True))


def write(found: dict[str, Any], out: Path) -> None:
    """mixer.md and mixer.svg in ``out``."""
    records = found["cases"]
    if not records:
        return
    _picture(records, out / "mixer.svg")
    parts = [
        _INTRODUCTION,
        _comparison(found),
        _recovery(records, found["settings"]),
        _gate(found.get("gate", {})),
        _layouts(found.get("layouts", [])),
        _cost(found),
    ]
    (out / "mixer.md").write_text("\n".join(parts))


_INTRODUCTION = """\
# MixER: claims and figures

Written by `python benchmarks/mixer.py` ([mixer.json](mixer.json) holds every figure). The idea and
the commands are in [mixer.md](../mixer.md).

![training losses, test losses and contexts](mixer.svg)

Left and middle: test loss of each seed, and training losses of all. Right: the contexts of one run
on two families, projected to a plane; the colour is the family, the mark the expert.
"""


def chosen(records: list[Record], dataset: str, method: str, adaptation: str) -> list[Record]:
    """The seeds of one case, in order."""
    wanted = (dataset, method, adaptation)
    mine = [r for r in records if (r["dataset"], r["method"], r["adaptation"]) == wanted]
    return sorted(mine, key=lambda r: r["seed"])


def _comparison(found: dict[str, Any]) -> str:
    lines = [
        "## Test loss beside one expert and a naive mixture",
        "",
        "Relative MSE on held-out trajectories, mean over environments; GEPS contexts. *Naive*: a",
        "linear gate on the context, trained by gradient (top-1, weighted by its probability).",
        "*Adapted*: unseen environments, "
        f"{found.get('adaptation_steps', 100)} steps, contexts from 0 (from the best centroid).",
        "Seeds set environments, trajectories, weights and batches; all methods take the same",
        "steps, with the default settings but lr 0.003.",
        "",
    ]
    for dataset, title in DATASETS.items():
        settings = found["settings"][dataset]
        lines += [
            f"### {title} (`{dataset}`), {settings['rounds']} rounds",
            "",
            "| method | seeds | test loss, each seed | mean | final training loss | routing "
            "accuracy | experts in use | adapted |",
            "|---|---|---|---:|---|---|---|---|",
        ]
        means = {}
        for method in METHODS:
            mine = chosen(found["cases"], dataset, method, "geps")
            mine = [r for r in mine if r["seed"] < 3]
            if not mine:
                continue
            tests = [r["test"]["mean"] for r in mine]
            means[method, tuple(r["seed"] for r in mine)] = statistics.mean(tests)
            lines.append(
                f"| {method} | {_listed(str(r['seed']) for r in mine)} | "
                f"{_listed(f'{x:.3g}' for x in tests)} | {statistics.mean(tests):.3g} | "
                f"{_listed(f'{r_last(r):.3g}' for r in mine)} | "
                f"{_listed(_routing(r) for r in mine)} | "
                f"{_listed(str(r['experts']) for r in mine)} | {_listed(map(_adapted, mine))} |"
            )
        lines += ["", _verdict(found["cases"], dataset), ""]
    return "\n".join(lines)


def r_last(record: Record) -> float:
    """Mean training loss of the last five rounds."""
    return statistics.mean(record["train"][-5:])


def _routing(record: Record) -> str:
    return "–" if record["method"] == "one expert" else f"{record['routing'][-1]:.2f}"


def _adapted(record: Record) -> str:
    zero, centroid = (record["adapted"].get(start) for start in ("zero", "centroid"))
    if record["method"] == "one expert" or centroid is None:
        return f"{zero:.2g}"
    return f"{zero:.2g} ({centroid:.2g})"


def _verdict(records: list[Record], dataset: str) -> str:
    """The paper's claim beside ours, over the seeds that all methods finished."""
    ours = [m for m in METHODS[:2] if chosen(records, dataset, m, "geps")]
    if not ours:
        return "No seed of MixER is finished here yet."
    method = ours[0] if dataset == "odebench_2" else ours[-1]
    by_seed = {
        name: {r["seed"]: r for r in chosen(records, dataset, name, "geps")}
        for name in (method, *METHODS[2:])
    }
    common = sorted(set.intersection(*(set(found) for found in by_seed.values())))
    if not common:
        return "No seed is finished by all three methods yet."
    lines = [
        "**The paper's claim**: on loosely related families MixER trains to a lower loss than a "
        "naive mixture and than one expert. **Here**, by seed:"
    ]
    for rival in METHODS[2:]:
        for what, value in (("training", r_last), ("test", lambda r: r["test"]["mean"])):
            ratios = [value(by_seed[method][s]) / value(by_seed[rival][s]) for s in common]
            lower = sum(ratio < 1 for ratio in ratios)
            lines.append(
                f"{what} loss {lower} of {len(common)} times below {rival}'s (ratios "
                f"{_listed(f'{ratio:.2f}' for ratio in ratios)});"
            )
    return "\n".join(lines)[:-1] + "."


def _recovery(records: list[Record], settings: dict[str, Any]) -> str:
    lines = [
        "## Recovery of planted families",
        "",
        f"`odebench_2`, {settings['odebench_2']['rounds']} rounds from contexts at 0 and experts",
        "that are all alike. Routing accuracy at the end, and the round in which it was first 1.0,",
        "seed by seed.",
        "",
        "| contexts | recovered | by seed |",
        "|---|---|---|",
    ]
    for adaptation in ("geps", "coda"):
        mine = chosen(records, "odebench_2", "MixER", adaptation)
        if not mine:
            lines.append(f"| {adaptation} | not measured | |")
            continue
        right = sum(r["routing"][-1] == 1.0 for r in mine)
        each = (f"{r['seed']}: {r['routing'][-1]:.2f} ({r['first_right'] or '–'})" for r in mine)
        lines.append(f"| {adaptation} | {right} of {len(mine)} | {_listed(each)} |")
    origin = chosen(records, "odebench_10a", "MixER", "geps")
    spread = chosen(records, "odebench_10a", "MixER, spread", "geps")
    lines.append("")
    if spread:
        told = _listed(f"{r['seed']}: {r['routing'][-1]:.2f}" for r in spread)
        lines.append(f"Ten families, first centroids spread: routing accuracy by seed {told}.")
    for record in origin:
        told = _listed(f"{count} × {reason}" for reason, count in record["gate"].items())
        lines.append(
            f"With the paper's first centroids near 0 (`start: origin`), seed {record['seed']}: "
            f"{record['routing'][-1]:.2f}; updates of the gate: {told}."
        )
    return "\n".join(lines) + "\n"


def _gate(accuracies: dict[str, float]) -> str:
    if not accuracies:
        return ""
    lines = [
        "## Narrow contexts",
        "",
        "Ten well-separated clusters of five environments, gate fitted by least squares on one-hot",
        "targets: the fraction of environments that it sends to their cluster's expert (20 draws).",
        "From a width of experts − 1 on it is 1; below, whole clusters are masked.",
        "",
        "| width | " + " | ".join(accuracies) + " |",
        "|---|" + "---:|" * len(accuracies),
        "| accuracy | " + " | ".join(f"{x:.2f}" for x in accuracies.values()) + " |",
    ]
    return "\n".join(lines) + "\n"


def _layouts(found: list[Record]) -> str:
    if not found:
        return ""
    lines = [
        "## Layouts",
        "",
        "Three rounds of `odebench_2` with four experts in fp64, by `coterie dynamics train`.",
        "",
        "| processes | training losses | test loss | contexts differ by |",
        "|---|---|---|---|",
    ]
    for record in found:
        losses = _listed(f"{x:.15f}" for x in record["train"])
        differ = f"{record['contexts_differ_by']:.1g}"
        lines.append(f"| {record['ep']} | {losses} | {record['test']:.15f} | {differ} |")
    return "\n".join(lines) + "\n"


def _cost(found: dict[str, Any]) -> str:
    seconds = sum(record["seconds"] for record in found["cases"])
    count = len(found["cases"])
    return (
        "## Cost\n\n"
        f"{count} runs, {seconds / 60:.0f} minutes of one core, other programs' load included "
        f"(torch {found['machine'].get('torch', '?')}).\n"
    )


def _listed(words: Any) -> str:
    return ", ".join(words)


def _picture(records: list[Record], path: Path) -> None:
    figure, (losses, curves, plane) = plt.subplots(1, 3, figsize=(12, 3.6))
    _draw_tests(losses, records)
    for method in METHODS:
        for record in chosen(records, "odebench_2", method, "geps")[:3]:
            label = method if record["seed"] == 0 else None
            colour = _COLOURS[method]
            curves.plot(record["train"], color=colour, alpha=0.7, linewidth=1, label=label)
    curves.set(yscale="log", xlabel="round", title="training loss, 2 families")
    curves.legend(frameon=False, fontsize=8)
    mine = chosen(records, "odebench_2", "MixER", "geps")
    if mine:
        _draw_plane(plane, mine[0])
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_tests(ax: Axes, records: list[Record]) -> None:
    labels = []
    for dataset, title in DATASETS.items():
        for method in METHODS:
            mine = [r for r in chosen(records, dataset, method, "geps") if r["seed"] < 3]
            if not mine:
                continue
            tests = [r["test"]["mean"] for r in mine]
            ax.scatter([len(labels)] * len(tests), tests, color=_COLOURS[method], s=18)
            labels.append(f"{method}\n{title.split(' families')[0]} families")
    ax.set_xticks(range(len(labels)), labels, rotation=60, fontsize=7)
    ax.set(yscale="log", title="test loss (relative MSE)")


def _draw_plane(ax: Axes, record: Record) -> None:
    context_ED = np.array(record["contexts"])
    centred_ED = context_ED - context_ED.mean(0)
    _, _, axes = np.linalg.svd(centred_ED, full_matrices=False)
    for (x, y), family, expert in zip(
        centred_ED @ axes[:2].T, record["family"], record["expert"], strict=True
    ):
        ax.scatter(x, y, color=f"C{family}", marker="os^v"[expert % 4], s=40)
    ax.set(title=f"contexts after training (seed {record['seed']})")


if __name__ == "__main__":
    raise SystemExit("run: python benchmarks/mixer.py")
