"""Layers with different numbers of experts (a pyramid)."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from coterie.models.config import DecoderConfig
from coterie.models.decoder import Decoder
from coterie.models.placement import parameter_counts
from tests.models.tiny_decoder import config, decoder, tokens

COUNTS = [2, 4, 6]
SETTINGS: dict[str, Any] = {"layers": 5, "dense_layers": [0, 2], "expert_counts": COUNTS}


def test_each_mixture_has_its_number_of_experts() -> None:
    model = decoder(config(**SETTINGS))
    stats = model(tokens(3, 8)).stats
    assert {layer: len(seen.load_E) for layer, seen in stats.items()} == {1: 2, 3: 4, 4: 6}
    for layer, count in ((1, 2), (3, 4), (4, 6)):
        moe = model.blocks[str(layer)].moe
        assert moe.experts.w_in_EPFD.shape[0] == moe.router.weight.shape[0] == count


def test_equal_counts_are_the_plain_model() -> None:
    settings: dict[str, Any] = {"layers": 5, "dense_layers": [0, 2]}
    plain = decoder(config(**settings))
    other = decoder(config(**settings, expert_counts=[4, 4, 4]))
    assert torch.equal(plain(tokens(3, 8)).x, other(tokens(3, 8)).x)


def test_what_a_token_passes() -> None:
    settings = config(**SETTINGS)
    total, active = parameter_counts(settings)
    assert total == sum(p.numel() for p in Decoder(settings).parameters())
    one_expert = 3 * 16 * 6
    assert total - active == (sum(COUNTS) - 2 * len(COUNTS)) * one_expert
    shared = config(layers=4, dense_layers=[0, 1], expert_counts=[6, 6], shared_depth=2)
    total, active = parameter_counts(shared)
    assert total - active == (6 - 2) * one_expert  # stored once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_counts": [2, 4]}, "expert_counts names 2 layers, but 3 of the 5 layers are"),
        ({"expert_counts": [1, 4, 6]}, "k 2 exceeds the 1 experts"),
        (
            {"layers": 4, "dense_layers": [], "expert_counts": [2, 2, 4, 2], "shared_depth": 2},
            r"expert_counts \[2, 2, 4, 2\]: layers 2 and 3 share their experts",
        ),
        (
            {"moe": None, "dense_layers": [], "expert_counts": [2]},
            "expert_counts needs experts, but moe is null",
        ),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    tree = {**config(layers=5, dense_layers=[0, 2]).model_dump(), **settings}
    with pytest.raises(ValidationError, match=message):
        DecoderConfig.model_validate(tree)
