"""From a run's config to its parts: ranks, data, model."""

import os
from pathlib import Path

from coterie.comm.exchange.config import ExchangeConfig
from coterie.comm.exchange.fused.windows import check_usable, symmetric_memory
from coterie.csrc.fused_launch import FLAG_BYTES
from coterie.data import DataConfig, TokenDataset, open_dataset, prepare
from coterie.launch.config import RunConfig
from coterie.parallel.distributed import Ranks, agreed, on_nodes, start
from coterie.parallel.model import ParallelModel
from coterie.parallel.precision import parameter_dtype, resolve
from coterie.parallel.rules import blocks_of_stages, layout_of


def join(config: RunConfig, world: int) -> Ranks:
    """Check that ``world`` processes can run ``config``, and join them. UserError when not."""
    moe = config.model.moe
    exchange = ExchangeConfig() if moe is None else moe.exchange
    by_nodes = exchange.route == "nodes" or exchange.kind == "fused"
    parallel = on_nodes(config.parallel) if by_nodes else config.parallel
    layout = layout_of(parallel, world, config.model)
    ranks = start(layout, config.train.timeout, fused=exchange.kind == "fused")
    _check_fused(exchange, ranks)
    return ranks


def _check_fused(exchange: ExchangeConfig, ranks: Ranks) -> None:
    """Raises UserError on all ranks where one cannot run fused kernels, or does not reach others'
    memory."""
    group = exchange.fused_over(ranks.axes)
    if group is not None:
        agreed(ranks, check_usable)
        agreed(ranks, lambda: symmetric_memory(group, FLAG_BYTES, ranks.device))


def cache() -> Path:
    """Where what can be made again is kept: $COTERIE_CACHE, else ~/.cache/coterie."""
    return Path(os.environ.get("COTERIE_CACHE", Path.home() / ".cache" / "coterie"))


def data_cache() -> Path:
    """Of this, where built-in corpora are."""
    return cache() / "data"


def open_data(config: DataConfig, ranks: Ranks) -> tuple[TokenDataset, TokenDataset]:
    """(training, held-out) datasets; rank 0 builds the built-in corpus first if need be.

    Raises:
        UserError: on all ranks.
    """

    def opened() -> tuple[TokenDataset, TokenDataset]:
        path = prepare(config, data_cache())
        return open_dataset(path, "train"), open_dataset(path, "held_out")

    # on other machines the others may have to build it for themselves
    agreed(ranks, lambda: opened() if ranks.rank == 0 else None)
    return agreed(ranks, opened)


def build_model(config: RunConfig, ranks: Ranks) -> ParallelModel:
    """The initialised model: this rank's part of it, on its device."""
    precision = resolve(config.train.precision, ranks.device)
    return ParallelModel(
        config.model,
        blocks_of_stages(config.parallel, config.model.layers),
        ranks,
        config.train.recompute,
        parameter_dtype(precision),
        config.train.seed,
    )
