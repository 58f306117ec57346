"""From a run's config to its parts: ranks, data, model."""

import os
from pathlib import Path

import torch

from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.data import DataConfig, TokenDataset, open_dataset, prepare
from coterie.launch.config import RunConfig
from coterie.models import Decoder, initialise
from coterie.parallel.distributed import Ranks, agreed, start
from coterie.parallel.layout import layout_of
from coterie.parallel.precision import parameter_dtype, resolve


def join(config: RunConfig, world: int) -> Ranks:
    """Check that ``world`` processes can run ``config``, and join them. UserError when not."""
    moe = config.model.moe
    layout = layout_of(config.parallel, world, moe.experts.count if moe else None)
    return start(layout, config.train.timeout)


def data_cache() -> Path:
    """Where built-in corpora are kept: $COTERIE_CACHE, else ~/.cache/coterie."""
    default = Path.home() / ".cache" / "coterie"
    return Path(os.environ.get("COTERIE_CACHE", default)) / "data"


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


def build_model(config: RunConfig, ranks: Ranks) -> Decoder:
    """The initialised model on this rank's device, with this rank's experts."""
    exchange: Exchange | None = None
    if ranks.expert_group is not None and ranks.layout.ep > 1:
        exchange = AllToAllExchange(ranks.expert_group)
    with torch.device("meta"):
        model = Decoder(config.model, exchange, ranks.data_group, config.train.recompute)
    precision = resolve(config.train.precision, ranks.device)
    model = model.to(parameter_dtype(precision)).to_empty(device=ranks.device)
    initialise(model, config.train.seed, residual_branches=2 * config.model.layers)
    return model
