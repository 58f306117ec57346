"""Which part of each parameter a module holds, by what the module says it cuts."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn

from coterie.comm.axis import Cut
from coterie.core.box import Box
from coterie.models.config import DecoderConfig
from coterie.models.decoder import Block, Decoder
from coterie.models.untied import UNTIED
from coterie.moe.experts import Experts


def cuts_of(model: nn.Module) -> dict[str, tuple[Cut, ...]]:
    """By name, how each parameter of ``model`` is cut; those held whole have none."""
    cuts: dict[str, tuple[Cut, ...]] = {name: () for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        own: dict[str, tuple[Cut, ...]] = getattr(module, "cuts", {})
        for name, cut in own.items():
            full = f"{prefix}.{name}" if prefix else name
            if full in cuts:  # a tied parameter has one name only
                cuts[full] = cut
    return cuts


def boxes_of(model: nn.Module) -> dict[str, Box]:
    """By name, the box of each parameter of ``model`` that its module holds, before any sharding
    of data-parallel ranks."""
    cuts = cuts_of(model)
    return {name: _box(tuple(p.shape), cuts[name]) for name, p in model.named_parameters()}


def box_of(module: nn.Module, parameter: str) -> Box:
    """The box of one parameter of ``module``."""
    own: dict[str, tuple[Cut, ...]] = getattr(module, "cuts", {})
    return _box(tuple(module.get_parameter(parameter).shape), own.get(parameter, ()))


def _box(shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> Box:
    whole = list(shape)
    for cut in cuts:
        whole[cut.dim] = cut.length
    box = Box.all_of(tuple(whole))
    for cut in cuts:
        box = box.cut(cut.dim, cut.axis.part(cut.length))
    return box


def parameter_counts(config: DecoderConfig) -> tuple[int, int]:
    """Parameters of the whole model, and of those the ones that one token passes, on average."""
    with torch.device("meta"):
        model = Decoder(config)
    shares = {p: 0.0 if name.startswith("blocks.") else 1.0 for name, p in model.named_parameters()}
    for block in cast(Iterable[Block], model.blocks.values()):
        depths = config.depths_of(block.layer)
        for name, p in block.named_parameters():
            mine = depths.capacity if depths and not name.startswith("depths.") else 1.0
            shares[p] = max(shares[p], mine)  # blocks may share it
    for layer, experts in _mixtures(model):
        assert config.moe is not None
        for p in experts.parameters():
            shares[p] *= config.moe.router.rows_per_token / config.experts_of(layer)
    untied = (module for module in model.modules() if isinstance(module, UNTIED))
    for p in {p for module in untied for p in module.parameters()}:
        shares[p] /= config.untie.modalities
    total = sum(p.numel() for p in shares)
    return total, round(sum(p.numel() * share for p, share in shares.items()))


def _mixtures(model: Decoder) -> Iterator[tuple[int, Experts]]:
    """(layer, experts) of each; of blocks that share them the first."""
    seen: set[nn.Module] = set()
    for block in cast(Iterable[Block], model.blocks.values()):
        if block.moe is not None and block.moe not in seen:
            seen.add(block.moe)
            yield block.layer, block.moe.experts
