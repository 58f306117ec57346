"""MoMa (arXiv 2407.21770) in small: 4t4i, 1t1i, 8x and dense with the same work for each token.

    python benchmarks/reproductions/moma.py [--seeds 3] [--at-once 2]

Trains, for each seed, six models on the same batches: dense; one expert for each modality (1t1i);
eight that choose among all tokens (8x); four for each modality (4t4i); the last two with the
paper's Gumbel noise on the choice in training, and without. Each token passes one expert on
average, as large as the dense feed-forward layer. Then the second stage for 8x and 4t4i, whose
experts see later tokens when they choose: auxiliary routers learn to foresee it. Writes
docs/results/moma.md, .json and .png. Runs stay in runs/reproductions/moma: interrupted, it goes on.
"""

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.layer import machine
from benchmarks.reproductions.runs import (
    RESULTS,
    ROOT,
    coterie,
    each,
    parse,
    publish,
    spread,
    stored,
    train,
)

CONFIG = Path(__file__).with_suffix(".yaml")
RUNS = ROOT / "runs" / "reproductions" / "moma"
METHODS = {
    "dense": ["model.moe=null"],
    "1t1i": ["model.moe.experts.count=2", "model.moe.router.experts=[1, 1]"],
    "8x": ["model.moe.router={kind: expert_choice, score: sigmoid, noise: true}"],
    "4t4i": [],
    "8x, no noise": ["model.moe.router={kind: expert_choice, score: sigmoid}"],
    "4t4i, no noise": ["model.moe.router.noise=false"],
}
FORESEEN = tuple(METHODS)[2:]
"""Whose experts see later tokens when they choose."""
SECOND_STAGE = ["train.steps=500", "optimizer.lr=3e-3", "optimizer.warmup=20"]
SMOOTHED = 5
"""Reports that the training loss is averaged over."""
Found = dict[str, list[dict[str, Any]]]
"""By method, for each seed: ``curve`` (training loss of each report), ``metrics`` (held-out)."""


def main() -> int:
    """The command line."""
    arguments = parse(__doc__)
    seeds = range(arguments.seeds)
    jobs = {f"{m}/{seed}": partial(measure, m, seed) for seed in seeds for m in METHODS}
    results = each("training and evaluating", jobs, arguments.at_once)
    found = {method: [results[f"{method}/{seed}"] for seed in seeds] for method in METHODS}
    draw(found, RESULTS / "moma.png")
    publish("moma", {"machine": machine(), "found": found}, page(found))
    return 0


def measure(method: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one model, with its second stage."""
    folder = RUNS / f"{method.replace(', no noise', '-calm')}-{seed}"

    def make() -> dict[str, Any]:
        train(CONFIG, folder, [*METHODS[method], f"train.seed={seed}"])
        metrics = json.loads(coterie("evaluate", str(folder), "--non-causal", "--json"))
        if method in FORESEEN:
            second = folder.with_name(f"{folder.name}-aux")
            train(folder, second, SECOND_STAGE, "--stage", "aux")
            metrics |= json.loads(coterie("evaluate", str(second), "--json"))
        return {"curve": training_losses(folder), "metrics": metrics}

    result: dict[str, Any] = stored(folder / "result.json", make)
    return result


def training_losses(folder: Path) -> list[float]:
    """Of each report, in order; what a resumed run did again counts once."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    by_step = {record["step"]: record["loss"] for record in records if "loss" in record}
    return [by_step[step] for step in sorted(by_step)]


def etas(found: Found, method: str) -> list[float | None]:
    """η for each seed: the steps after which the dense model first has its final training loss over
    those that ``method`` needs for it, at equal work for each step; None: it never gets there."""
    result: list[float | None] = []
    for dense, sparse in zip(found["dense"], found[method], strict=True):
        goal = smooth(dense["curve"])[-1]
        theirs, ours = (
            np.nonzero(smooth(run["curve"]) <= goal)[0] + SMOOTHED for run in (dense, sparse)
        )
        result.append(int(theirs[0]) / int(ours[0]) if len(ours) else None)
    return result


def smooth(losses: list[float]) -> npt.NDArray[np.float64]:
    """Means over SMOOTHED reports; the first ends with the report of that number."""
    return np.convolve(losses, np.ones(SMOOTHED) / SMOOTHED, "valid")


def draw(found: Found, path: Path) -> None:
    """Training losses over the run, and held-out losses by modality."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2)
    for method, runs in found.items():
        mean = np.mean([smooth(run["curve"]) for run in runs], 0)
        curves.plot(np.linspace(0, 1, len(mean)), mean, label=method)
    low = min(smooth(run["curve"])[-1] for runs in found.values() for run in runs)
    curves.set(xlabel="part of the run", ylabel="training loss, nats", ylim=(low - 0.05, low + 0.6))
    curves.legend()
    for column, modality in enumerate(("image", "text")):
        for number, (method, runs) in enumerate(found.items()):
            values = [held_out(method, run, modality) for run in runs]
            x = column + (number - (len(found) - 1) / 2) * 0.14
            bars.plot([x] * len(values), values, ".", color=f"C{number}")
            bars.hlines(statistics.mean(values), x - 0.05, x + 0.05, color=f"C{number}")
    bars.set_xticks([0, 1], ["image", "text"])
    bars.set_ylabel("held-out loss, nats (causal)")
    figure.savefig(path, dpi=150)


def held_out(method: str, run: dict[str, Any], modality: str, causal: bool = True) -> float:
    """Held-out loss of a run; where experts choose, by auxiliary routers or by their choice."""
    prefix = "non_causal/" if method in FORESEEN and not causal else ""
    value: float = run["metrics"][f"{prefix}loss/{modality}"]
    return value


def page(found: Found) -> str:
    """The table, the paper's claims and ours."""
    count = len(found["dense"])
    rows = "\n".join(row(found, method) for method in METHODS)
    agreements = [
        run["metrics"]["auxiliary/agreement"] for method in FORESEEN for run in found[method]
    ]
    return f"""# MoMa: modality-aware experts against one pool, and against dense

`python benchmarks/reproductions/moma.py --seeds {count}`

`benchmarks/reproductions/moma.yaml`: 4 layers of width 64, experts of 256 (SwiGLU), on the built-in
corpus of captioned digits and prose. All have the same work for each token. Nats per token, the
mean over {count} seeds, and in brackets the largest less the smallest. *By choice*: experts choose
among the tokens of the whole batch, later ones too, as in training; this is no loss of a causal
model. *Causal*: auxiliary routers choose. *No noise*: without the Gumbel noise that the paper adds
to the choice in training. η: how many times fewer steps than the dense model it takes to reach the
dense model's final training loss, by seed; –: it never does.

| | image, by choice | text, by choice | image, causal | text, causal | agreement (always no) | η |
|---|---|---|---|---|---|---|
{rows}

![Training and held-out losses](moma.png)

**The paper's claims** (arXiv 2407.21770, 1.4B parameters, 1T tokens), and how often they hold here:

| claim | seeds |
|---|---|
{claims(found)}

Auxiliary routers agree with expert choice on {min(agreements):.3f} to {max(agreements):.3f} of all
pairs of token and expert (goal: at least .95).
"""


def row(found: Found, method: str) -> str:
    """One line of the table."""
    runs = found[method]
    cells = []
    for causal in (False, True):
        for modality in ("image", "text"):
            own = method in FORESEEN or causal  # the others choose nothing: they are causal
            values = [held_out(method, run, modality, causal) for run in runs]
            cells.append(spread(values) if own else "")
    if method in FORESEEN:
        metrics = [run["metrics"] for run in runs]
        agreement, no = (
            statistics.mean(m[f"auxiliary/{name}"] for m in metrics)
            for name in ("agreement", "always_no")
        )
        cells.append(f"{agreement:.3f} ({no:.3f})")
    else:
        cells.append("")
    eta = ", ".join("–" if value is None else f"{value:.2f}" for value in etas(found, method))
    return f"| {method} | {' | '.join(cells)} | {eta} |"


def claims(found: Found) -> str:
    """For each claim of the paper, in how many seeds it holds."""
    count = len(found["dense"])

    def holds(better: str, worse: str, modality: str) -> int:
        pairs = zip(found[better], found[worse], strict=True)
        return sum(held_out(better, b, modality) < held_out(worse, w, modality) for b, w in pairs)

    def faster(method: str) -> int:
        return sum((eta or 0) > 1 for eta in etas(found, method))

    lines = [("1t1i is better than dense on images", holds("1t1i", "dense", "image"))]
    for noise in ("", ", no noise"):
        ours, pool = f"4t4i{noise}", f"8x{noise}"
        lines += [
            (f"{ours}: better than 8x on images (causal)", holds(ours, pool, "image")),
            (f"{ours}: worse than 8x on text (causal)", holds(pool, ours, "text")),
            (f"{ours}: better than dense on images (causal)", holds(ours, "dense", "image")),
            (f"{ours}: trains faster than dense (η > 1; theirs 3.7)", faster(ours)),
            (f"{pool}: trains faster than dense (η > 1; theirs 3.0)", faster(pool)),
        ]
    return "\n".join(f"| {claim} | {times} of {count} |" for claim, times in lines)


if __name__ == "__main__":
    sys.exit(main())
