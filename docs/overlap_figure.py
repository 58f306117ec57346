"""The picture of docs/overlap.md: when one rank of two computes, and when rows arrive at it.

python docs/overlap_figure.py docs/images/overlap.png

Needs root and iproute2: two hosts, a core each, behind links of 200 Mbit/s (benchmarks/hosts.py).
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RATE = 200
EXPERTS, CHOICES, WIDTH, HIDDEN, TOKENS = 8, 2, 512, 1408, 1024
TURNS = 5
EXCHANGES = {
    "all_to_all": {"kind": "all_to_all"},
    "overlapped, 4 pieces": {"kind": "overlapped", "pieces": 4, "slabs": 1},
}
SAMPLER = """
import sys, time
with open(sys.argv[1], "w", buffering=1) as out:
    while True:
        lines = open("/proc/net/dev").read().splitlines()
        received = next(line.split()[1] for line in lines if line.split()[0] == "eth0:")
        out.write(f"{time.perf_counter()} {received}\\n")
        time.sleep(0.002)
"""


def rank(folder: Path) -> None:
    """One rank: passes of one layer's experts by each exchange in turn, the last ones written."""
    import torch
    import torch.distributed as dist

    from coterie.comm.axis import expert_parallel
    from coterie.comm.exchange.config import ExchangeConfig
    from coterie.comm.gloo import schedule_as_batch
    from coterie.moe.experts import Experts, ExpertsConfig

    torch.set_num_threads(1)
    schedule_as_batch()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    assert dist.group.WORLD is not None
    axes = expert_parallel(dist.group.WORLD)
    experts = Experts(WIDTH, ExpertsConfig(count=EXPERTS, hidden=HIDDEN), axes.ep)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    exchanges = {
        name: ExchangeConfig.model_validate(config).over(axes) for name, config in EXCHANGES.items()
    }
    found = {}
    for _ in range(TURNS):
        for name, exchange in exchanges.items():
            found[name] = passes(exchange, experts)
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()


def passes(exchange: Any, experts: Any) -> dict[str, Any]:
    """When the passes began and ended, and the spans of all products."""
    import torch
    import torch.distributed as dist

    from coterie.moe.assignment import from_choices

    x_TD = torch.randn(TOKENS, WIDTH).requires_grad_()
    expert_TK = torch.rand(TOKENS, EXPERTS).topk(CHOICES).indices
    weight_TK = torch.full((TOKENS, CHOICES), 1 / CHOICES, requires_grad=True)
    assignment = from_choices(expert_TK, weight_TK, EXPERTS)
    products: list[tuple[float, float]] = []
    with ExitStack() as patches:
        for name in ("mm", "mm_into"):
            patches.enter_context(recorded(f"coterie.moe.grouped_ffn.{name}", products))
        dist.barrier()
        began = time.perf_counter()
        y_TD = experts.over(exchange, x_TD, assignment)
        middle = time.perf_counter()
        y_TD.backward(torch.ones_like(y_TD))
        ended = time.perf_counter()
    dist.barrier()
    return {"began": began, "middle": middle, "ended": ended, "products": products}


@contextmanager
def recorded(name: str, spans: list[tuple[float, float]]) -> Iterator[None]:
    """Note when the function of this name runs."""
    module, _, attribute = name.rpartition(".")
    function: Callable[..., Any] = getattr(sys.modules[module], attribute)

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **options)
        spans.append((began, time.perf_counter()))
        return result

    with patch(name, timed):
        yield


def measure(folder: Path) -> None:
    """Run both ranks on hosts of their own, and note how many bytes arrive at the first."""
    from benchmarks.hosts import hosts, shape

    with hosts(2) as made, (folder / "output").open("w") as output:
        shape(made, RATE)
        sampler = made[0].start(
            [sys.executable, "-c", SAMPLER, str(folder / "bytes")], 1, {}, output
        )
        ranks = [
            host.start(
                [sys.executable, __file__, "rank", str(folder)],
                host.number,
                {
                    "RANK": str(host.number),
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": made[0].address,
                    "MASTER_PORT": "29512",
                    "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                },
                output,
            )
            for host in made
        ]
        try:
            codes = [process.wait(timeout=120) for process in ranks]
        finally:
            for process in (*ranks, sampler):
                process.kill()
        if any(codes):
            raise SystemExit((folder / "output").read_text())


def draw(folder: Path, path: Path) -> None:
    """Two lanes for each exchange: the network's rate, and the products."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    found = json.loads((folder / "rank_0.json").read_text())
    samples = np.loadtxt(folder / "bytes")
    at, megabits = samples[1:, 0], 8e-6 * np.diff(samples[:, 1]) / np.diff(samples[:, 0])
    figure, panels = plt.subplots(len(found), 1, figsize=(9, 4.2), sharex=True)
    for panel, (name, passes) in zip(panels, found.items(), strict=True):
        began = passes["began"]
        inside = (at > began - 0.02) & (at < passes["ended"] + 0.02)
        panel.fill_between(
            1e3 * (at[inside] - began),
            megabits[inside].clip(0, 1.2 * RATE),
            step="pre",
            color="#e8b04a",
            lw=0,
        )
        spans = [(1e3 * (a - began), 1e3 * (b - a)) for a, b in passes["products"]]
        panel.broken_barh(spans, (-0.55 * RATE, 0.4 * RATE), color="#2f6f9f")
        middle, end = (1e3 * (passes[key] - began) for key in ("middle", "ended"))
        for edge, what in ((middle, "forward"), (end, "backward")):
            panel.axvline(edge, color="black", lw=0.8, ls=":")
            panel.annotate(
                f"{what} ends: {edge:.0f} ms", (edge, 1.7 * RATE), ha="right", va="top",
                xytext=(-3, 0), textcoords="offset points", fontsize=8,
            )  # fmt: skip
        panel.set_ylim(-0.65 * RATE, 1.75 * RATE)
        panel.set_yticks([-0.35 * RATE, RATE / 2], ["products", "rows arriving"], fontsize=8)
        panel.set_title(name, fontsize=9, loc="left")
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(path: Path) -> None:
    """Measure, and write the picture."""
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name))
        draw(Path(name), path)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
