"""Blocks that share their layers (WideNet): a model of copies, whose gradients add up."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from coterie.models import DecoderConfig
from coterie.models.placement import boxes_of
from tests.models.tiny_decoder import config, decoder, tokens
from tests.moe.tiny import error

SETTINGS: dict[str, Any] = {"layers": 6, "dense_layers": [4, 5]}
DEPTH = 2


def shared_name(name: str) -> str:
    """The name of a copy's parameter in the model whose blocks share."""
    words = name.split(".")
    if words[0] == "blocks" and not words[2].endswith("_norm"):
        words[1] = str(int(words[1]) // DEPTH * DEPTH)
    return ".".join(words)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_of_all_copies_add_up(recompute: Any) -> None:
    shared = decoder(config(**SETTINGS, shared_depth=DEPTH), recompute=recompute).train()
    copies = decoder(config(**SETTINGS)).train()
    with torch.no_grad():
        for number, norm in enumerate(p for n, p in shared.named_parameters() if "norm" in n):
            norm.add_(0.1 * (number + 1))  # each block's own
    weights = dict(shared.named_parameters())
    assert len(weights) < len(dict(copies.named_parameters()))
    with torch.no_grad():
        for name, parameter in copies.named_parameters():
            parameter.copy_(weights[shared_name(name)])
    results = [model(tokens(3, 8)) for model in (shared, copies)]
    for out in results:
        (out.x.square().mean() + sum(out.losses.values())).backward()
    ours, right = results
    assert error(ours.x, right.x) < 1e-13
    assert ours.stats.keys() == right.stats.keys() == {0, 1, 2, 3}  # by layer, not by router
    for layer, stats in right.stats.items():
        assert torch.equal(ours.stats[layer].load_E, stats.load_E)
    assert not torch.equal(ours.stats[0].load_E, ours.stats[1].load_E)
    sums: dict[str, Tensor] = {}
    for name, parameter in copies.named_parameters():
        assert parameter.grad is not None
        sums[shared_name(name)] = sums.get(shared_name(name), 0) + parameter.grad
    assert sums.keys() == weights.keys() == boxes_of(shared).keys()
    for name, total in sums.items():
        assert weights[name].grad is not None
        assert error(weights[name].grad, total) < 1e-12, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 6, "shared_depth": 4}, "layers 6 must be a multiple of shared_depth 4"),
        (
            {"layers": 6, "dense_layers": [0, 3], "shared_depth": 2},
            r"dense_layers \[0, 3\]: of 2 blocks that share .* 0 and 1 are not of the same kind",
        ),
    ],
)
def test_groups_must_fit(settings: dict[str, Any], message: str) -> None:
    tree = {**config().model_dump(), **settings}
    with pytest.raises(ValidationError, match=message):
        DecoderConfig.model_validate(tree)
