"""The exchange that a run gets where its config leaves it to a measurement, which is remembered.

What was measured is kept in the cache by the shape of the layer, rounded up, and by what it ran on;
what was chosen stands in the run's own config, so that a resumed run rounds as it did before.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from coterie.comm.exchange.config import ExchangeConfig
from coterie.comm.objects import from_rank_zero
from coterie.launch.assemble import cache
from coterie.launch.config import RunConfig
from coterie.parallel.distributed import Ranks
from coterie.parallel.precision import resolve
from coterie.parallel.tuning import Layer, candidates, choose, is_open, measure

_CLUSTER = ("SLURM_CLUSTER_NAME", "SLURM_JOB_PARTITION", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What tells one network from another, where anything does."""


def tuned(config: RunConfig, ranks: Ranks, say: Callable[[str], None]) -> RunConfig:
    """``config`` with an exchange that leaves nothing open; ``say`` tells the user how it was
    found. All ranks call."""
    moe = config.model.moe
    if moe is None or ranks.axes.expert.group is None:
        return config
    if not is_open(moe.exchange):
        if moe.exchange.kind == "fused":
            say(f"exchange: {_in_words(moe.exchange)} (as the config says)")
        return config
    layer = _layer(config, ranks)
    file = cache() / "exchange" / f"{_digest(layer, ranks)}.json"
    seconds = from_rank_zero(lambda: remembered(file, moe.exchange), ranks.control)
    how = f"measured before: {file}"
    if seconds is None:
        say("measuring which exchange is the fastest for an expert layer of this run")
        seconds, how = measure(layer, ranks), "measured now"
        if ranks.rank == 0:
            _remember(file, layer, ranks, seconds)
    chosen = choose(moe.exchange, seconds)
    model = config.model.model_copy(update={"moe": moe.model_copy(update={"exchange": chosen})})
    say(_sentence(layer, seconds, chosen, how))
    return config.model_copy(update={"model": model})


def _layer(config: RunConfig, ranks: Ranks) -> Layer:
    moe, layout, train = config.model.moe, ranks.layout, config.train
    assert moe is not None
    sequences = train.global_batch // (train.accumulation * layout.dp)
    tokens = sequences * config.data.sequence // (layout.cp * layout.tp)
    return Layer(
        moe,
        config.model.width,
        tokens,
        resolve(train.precision, ranks.device),
        train.recompute,
    )


def _key(layer: Layer, ranks: Ranks) -> dict[str, Any]:
    """All that a measurement depends on, as far as it can be known."""
    layout, moe = ranks.layout, layer.moe
    cuda = ranks.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "world": layout.world,
        "node": layout.node,
        "ep": layout.ep,
        "etp": layout.etp,
        "tokens": 1 << max(0, layer.tokens - 1).bit_length(),
        "cluster": [os.environ.get(name) for name in _CLUSTER],
        "width": layer.width,
        "experts": moe.experts.model_dump(mode="json"),
        "rows_per_token": moe.router.rows_per_token,
        "max_rows_factor": moe.max_rows_factor,
        "exchange": moe.exchange.model_dump(mode="json"),
        "precision": layer.precision,
        "recompute": layer.recompute,
    }


def _processor() -> str:
    """What the first processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)


def _digest(layer: Layer, ranks: Ranks) -> str:
    text = json.dumps(_key(layer, ranks), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remembered(file: Path, exchange: ExchangeConfig) -> list[float] | None:
    """Seconds of each candidate for ``exchange``; None where there is no such file, or a damaged
    one."""
    try:
        measured = [found["seconds"] for found in json.loads(file.read_text())["measured"]]
        seconds = [math.inf if each is None else float(each) for each in measured]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seconds if len(seconds) == len(candidates(exchange)) else None


def _remember(file: Path, layer: Layer, ranks: Ranks, seconds: list[float]) -> None:
    """Replaces the file at once, so that another run never reads half of it. A cache that cannot
    be written costs the next run a measurement, and this one nothing."""
    measured = [
        {
            "exchange": exchange.model_dump(mode="json"),
            "seconds": time if math.isfinite(time) else None,  # not measured to the end
        }
        for exchange, time in zip(candidates(layer.moe.exchange), seconds, strict=True)
    ]
    text = json.dumps({"key": _key(layer, ranks), "measured": measured}, indent=1)
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text)
        unfinished.replace(file)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()


def _sentence(layer: Layer, seconds: list[float], chosen: ExchangeConfig, how: str) -> str:
    found, kind = candidates(layer.moe.exchange), layer.moe.exchange.kind
    plain, best = seconds[0], min(seconds[1:])
    if chosen.kind == "all_to_all":
        return (
            f"exchange: all_to_all, {1e3 * plain:.3g} ms for both passes of a layer; {kind} at "
            f"best {1e3 * best:.3g} ({how})"
        )
    return (
        f"exchange: {_in_words(chosen)}: {1e3 * seconds[found.index(chosen)]:.3g} ms for both "
        f"passes of a layer; all_to_all {1e3 * plain:.3g} ({how})"
    )


def _in_words(exchange: ExchangeConfig) -> str:
    slabs = _count(exchange.slabs, "slab")
    if exchange.kind == "overlapped":
        return f"overlapped, {_count(exchange.pieces, 'piece')}, {slabs}"
    moves = "moves" if exchange.communication == 1 else "move"
    blocks = f"{_count(exchange.communication, 'block')} {moves} rows"
    return f"fused, {blocks}, {slabs}, tiles of {exchange.tile_columns} columns"


def _count(number: int | None, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
