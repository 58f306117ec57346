"""What counting the load costs: steps with it and without, in turn, in one process.

    python benchmarks/telemetry.py [--rounds 60] [--json benchmarks/results/telemetry.json]

Without: no entropy, no counts by modality, nothing summed, brought over ranks or written to
load.jsonl; only rows by expert, which the exchange needs. Two sizes: whole training steps of
configs/quickstart.yaml, and one large layer forward and backward. Printed: medians of processor
time; what the functions that count take by themselves; and the difference of neighbouring steps,
which also has what counting does to caches, and the machine's noise. Both as parts of a step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.layer import machine
from coterie.data import MODALITIES, Batch, Vocabulary, collate
from coterie.launch.assemble import build_model
from coterie.launch.load_config import load_config
from coterie.models import DecoderConfig, initialise
from coterie.moe import MoELayer
from coterie.moe import layer as moe_layer
from coterie.moe.stats import LayerStats, RoutingStats
from coterie.moe.tokens import TokenInfo
from coterie.parallel import step as parallel_step
from coterie.parallel.distributed import Ranks
from coterie.parallel.layout import Layout
from coterie.parallel.monitors import LoadLines, RunFacts
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.step import StepSettings, train_step
from coterie.parallel.tally import Tally, Totals

COUNTING: tuple[tuple[Any, str], ...] = (
    (torch.special, "entr"),
    (moe_layer, "layer_stats"),
    (Tally, "routing"),
    (Tally, "_with_ranks"),
    (LoadLines, "step"),
)
Run = Callable[[int], None]
"""One step, by its number."""


@contextmanager
def uncounted() -> Iterator[None]:
    """What a step would be that counts nothing."""
    nothing = torch.zeros(1, dtype=torch.int64)

    def stats(routed: RoutingStats, *_: Any) -> LayerStats:
        return LayerStats(**vars(routed), load_ME=nothing, tokens_M=nothing, unrouted_M=nothing)

    def losses_alone(self: Tally, losses: dict[str, Tensor], _: Any) -> None:
        for name, value in losses.items():
            self.count(f"router.{name}", value)

    def numbers_alone(self: Tally) -> Totals:
        self.layers.clear()
        return counted(self)

    counted = Tally.over_ranks
    with ExitStack() as stack:
        for owner, name, instead in (
            (torch.special, "entr", lambda prob_TE: prob_TE.new_zeros(1)),
            (moe_layer, "layer_stats", stats),
            (Tally, "routing", losses_alone),
            (Tally, "over_ranks", numbers_alone),
            (LoadLines, "step", lambda *_: None),
            (parallel_step, "update_frozen", lambda *_: None),
        ):
            stack.enter_context(patch.object(owner, name, instead))
        yield


@contextmanager
def clocked() -> Iterator[list[float]]:
    """Processor seconds of each call of what counts."""
    found: list[float] = []

    def timed(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            start = time.process_time()
            result = right(*args)
            found.append(time.process_time() - start)
            return result

        return wrapper

    with ExitStack() as stack:
        for owner, name in COUNTING:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield found


def quickstart(folder: Path) -> Run:
    """Training steps of the quick start's model, on tokens drawn at random."""
    config = load_config("quickstart")
    ranks = Ranks(0, torch.device("cpu"), Layout())
    model = build_model(config, ranks)
    optimizer = Optimizer(model, config.optimizer)
    settings = StepSettings("fp32", config.optimizer.clip, config.train.seed)
    batch, monitor = _batch(config.train.global_batch, config.data.sequence), LoadLines(100)
    monitor.start(RunFacts(folder, 1 << 30, 0, 17))

    def run(number: int) -> None:
        monitor.step(train_step(model, optimizer, [batch], number + 1, settings))

    return run


def large_layer(folder: Path) -> Run:
    """A layer of 64 experts, 6 for each of 4096 tokens, width 512, hidden 128."""
    moe = {"experts": {"count": 64, "hidden": 128}, "router": {"k": 6}}
    config = DecoderConfig.model_validate(
        {"vocabulary": 2, "width": 512, "layers": 1, "attention": {"heads": 8}, "moe": moe}
    )
    layer = MoELayer(512, config.moe_of(0))
    initialise(layer, seed=0)
    ranks, monitor = Ranks(0, torch.device("cpu"), Layout()), LoadLines(100)
    monitor.start(RunFacts(folder, 1 << 30, 0, 17))
    x_TD, modality_T = torch.randn(4096, 512), torch.arange(4096) % 2
    info = TokenInfo(
        modality_T=modality_T, modalities=len(MODALITIES), padding_T=torch.arange(4096) % 8 == 0
    )

    def run(number: int) -> None:
        layer.zero_grad()
        tally = Tally(config, ranks)
        output = layer(x_TD.clone().requires_grad_(), info)
        tally.routing(output.losses, {0: output.stats})
        (output.y.sum() + sum(output.losses.values())).backward()
        layers = tally.over_ranks().layers
        monitor.step(parallel_step.StepReport(number, 0, {}, 0, 0, 1, layers, 1, False))

    return run


def _batch(rows: int, sequence: int) -> Batch:
    vocabulary = Vocabulary()
    tokens = np.random.default_rng(0).integers(0, vocabulary.pad, (rows, sequence + 1))
    number_B = np.arange(rows)
    return collate(tokens.astype(np.uint16), vocabulary, number_B, number_B)


def measure(run: Run, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each step, counted and not, in turn, and of counting alone."""
    seconds: dict[str, list[float]] = {"with": [], "without": [], "counting": []}
    for number in range(rounds + 3):
        # each goes first in every other round
        for kind in ("with", "without") if number % 2 else ("without", "with"):
            with ExitStack() as stack:
                if kind == "without":
                    stack.enter_context(uncounted())
                start = time.process_time()
                run(number)
                if number >= 3:
                    seconds[kind].append(time.process_time() - start)
        with clocked() as calls:
            run(number)
        if number >= 3:
            seconds["counting"].append(sum(calls))
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds, and the cost as a part of the step without counting."""
    plain = statistics.median(seconds["without"])
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    return {
        "with_ms": statistics.median(seconds["with"]) * 1e3,
        "without_ms": plain * 1e3,
        "counting_ms": statistics.median(seconds["counting"]) * 1e3,
        "cost": statistics.median(seconds["counting"]) / plain,
        "difference": statistics.median(a - b for a, b in pairs) / plain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    table = Table(title="counting the load")
    for heading in ("size", "ms with", "ms without", "ms counting", "cost", "difference"):
        table.add_column(heading, justify="left" if heading == "size" else "right")
    for name, make in (("quick start, step", quickstart), ("E 64, k 6, T 4096", large_layer)):
        with tempfile.TemporaryDirectory() as folder:
            row = results[name] = summarise(measure(make(Path(folder)), options.rounds))
        times = [f"{row[key]:.2f}" for key in ("with_ms", "without_ms", "counting_ms")]
        table.add_row(name, *times, f"{row['cost']:.2%}", f"{row['difference']:.2%}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(
            json.dumps(
                {"machine": machine(), "rounds": options.rounds, "results": results}, indent=1
            )
        )


if __name__ == "__main__":
    main()
