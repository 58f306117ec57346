"""SMoE-Dropout (arXiv 2303.01610) in small: held-out loss against the number of experts.

    python benchmarks/reproductions/smoe_dropout.py [--seeds 3] [--at-once 2]

Trains, for each seed, three models of the same size on the same batches: experts behind a random
router that never learns, with k growing from 8 to 16; experts behind a learned router with k 8 and
a balance loss; one dense feed-forward layer as wide as all experts. The first two are then
evaluated with 1, 2, 4, 8, 12 and 16 experts for each token. Writes
docs/results/smoe_dropout.md, .json and .png.
Runs stay in runs/reproductions/smoe_dropout: interrupted, it goes on where it was.
"""

import itertools
import json
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
RUNS = ROOT / "runs" / "reproductions" / "smoe_dropout"
NUMBERS = (1, 2, 4, 8, 12, 16)
TRAINED_WITH = 8
"""k of the learned router."""
METHODS = {
    "random, k 8 → 16": [],
    "learned, k 8": [
        f"model.moe.router={{kind: top_k, k: {TRAINED_WITH}, renormalise: true}}",
    ],
    "dense": ["model.moe=null"],
}
COLOURS = dict(zip(METHODS, ("tab:blue", "tab:orange", "tab:grey"), strict=True))
Losses = dict[str, list[dict[str, float]]]
"""By method, for each seed: the held-out loss by k (as text); of the dense model under ''."""


def main() -> int:
    """The command line."""
    arguments = parse(__doc__)
    jobs = {
        f"{method}/{seed}": partial(losses, method, seed)
        for seed in range(arguments.seeds)
        for method in METHODS
    }
    results = each("training and evaluating", jobs, arguments.at_once)
    found: Losses = {
        method: [results[f"{method}/{seed}"] for seed in range(arguments.seeds)]
        for method in METHODS
    }
    draw(found, RESULTS / "smoe_dropout.png")
    publish("smoe_dropout", {"machine": machine(), "found": found}, page(found))
    return 0


def losses(method: str, seed: int) -> dict[str, float]:
    """Held-out loss by k of one method and seed."""
    folder = RUNS / f"{list(METHODS).index(method)}-{seed}"
    overrides = [*METHODS[method], f"train.seed={seed}"]

    def make() -> dict[str, float]:
        train(CONFIG, folder, overrides)
        if method == "dense":
            return {"": json.loads(coterie("evaluate", str(folder), "--json"))["loss"]}
        wanted = ",".join(map(str, NUMBERS))
        by_k = json.loads(coterie("evaluate", str(folder), "--json", "--k", wanted))
        return {k: metrics["loss"] for k, metrics in by_k.items()}

    result: dict[str, float] = stored(folder / "losses.json", make)
    return result


def draw(found: Losses, path: Path) -> None:
    """Loss against k: the mean as a line, seeds as dots."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="experts for each token", ylabel="held-out loss, nats")
    for method, seeds in found.items():
        colour = COLOURS[method]
        if method == "dense":
            mean = statistics.mean(seed[""] for seed in seeds)
            axes.axhline(mean, color=colour, linestyle="--", label=method)
            continue
        for seed in seeds:
            axes.plot(NUMBERS, [seed[str(k)] for k in NUMBERS], ".", color=colour, alpha=0.6)
        axes.plot(NUMBERS, means(seeds), color=colour, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(NUMBERS, [str(k) for k in NUMBERS])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)


def means(seeds: list[dict[str, float]]) -> list[float]:
    """Over seeds, by k."""
    return [statistics.mean(seed[str(k)] for seed in seeds) for k in NUMBERS]


def page(found: Losses) -> str:
    """The table, the paper's claim and ours."""
    random, learned, _ = METHODS
    falls = sum(strictly_falls(seed) for seed in found[random])
    worsens = sum(seed["16"] > seed[str(TRAINED_WITH)] for seed in found[learned])
    count = len(found[random])
    best = " or ".join(
        sorted({min(seed, key=seed.__getitem__) for seed in found[learned]}, key=int)
    )
    rows = "\n".join(row(method, seeds) for method, seeds in found.items())
    head = " | ".join(f"k {k}" for k in NUMBERS)
    return f"""# SMoE-Dropout: held-out loss against the number of experts

`python benchmarks/reproductions/smoe_dropout.py --seeds {count}`

`benchmarks/reproductions/smoe_dropout.yaml`: 4 layers of width 128, each with 16 experts of 64
(GELU), on the built-in corpus. Nats per token on held-out data: the mean over {count} seeds, and in
brackets the largest less the smallest.

| | {head} |
|---|{"---|" * len(NUMBERS)}
{rows}

![Loss against k](smoe_dropout.png)

**The paper's claim** (arXiv 2303.01610): with a random router that is never trained and a k that
grows, the loss falls with every further expert at inference ("self-slimmable"); a learned router
saturates, or gets worse, past the k it was trained with.

**Here**: behind the random router the loss falls with every step of k in {falls} of {count} seeds.
Behind the learned one, trained with k {TRAINED_WITH}, it is worse with 16 experts than with
{TRAINED_WITH} in {worsens} of {count} seeds, and best with k {best}.
"""


def strictly_falls(by_k: dict[str, float]) -> bool:
    """Whether each larger k has a smaller loss."""
    values = [by_k[str(k)] for k in NUMBERS]
    return all(later < before for before, later in itertools.pairwise(values))


def row(method: str, seeds: list[dict[str, float]]) -> str:
    """One line of the table."""
    if method == "dense":
        return f"| {method} | " + " | " * (len(NUMBERS) - 1) + f"{spread([s[''] for s in seeds])} |"
    cells = [spread([seed[str(k)] for seed in seeds]) for k in NUMBERS]
    return f"| {method} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
