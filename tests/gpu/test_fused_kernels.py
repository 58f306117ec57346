"""The fused kernels on a GPU: their errors against fp64, and equal bits every time."""

import secrets
from dataclasses import replace

import pytest
import torch

from coterie.csrc.fused_launch import TILE_COLUMNS, Manner
from tests.fused_layer import Fused, Layer, check_errors, errors, reference
from tests.gpu.conftest import ON_HOST

LAYERS = [
    Layer(R=1, E=8, K=1, T=333, D=64, F=128),
    Layer(R=1, E=128, K=8, T=517, D=512, F=384),
    Layer(R=2, E=8, K=2, T=1001, D=1024, F=1792),
    Layer(R=2, E=64, K=6, T=260, D=320, F=640, hot=0),
    Layer(R=4, E=16, K=4, T=129, D=192, F=128, half=True),
    Layer(R=4, E=64, K=4, T=777, D=2048, F=1408),
    Layer(R=8, E=8, K=2, T=511, D=576, F=896, hot=0),
    Layer(R=8, E=128, K=8, T=255, D=2048, F=768),
    Layer(R=8, E=32, K=3, T=1, D=64, F=128),
    Layer(R=8, E=64, K=8, T=67, D=448, F=256, half=True),
]
TOYS = [
    Layer(R=1, E=2, K=1, T=5, D=64, F=128),
    Layer(R=2, E=4, K=2, T=9, D=64, F=128, half=True),
]
MANNERS = [Manner(), Manner(communication=2, slabs=1), Manner(communication=40, slabs=8)]
TILES = TILE_COLUMNS[-1:] if ON_HOST else TILE_COLUMNS


def named(layer: Layer) -> str:
    return f"{layer.R} ranks, {layer.E} experts, k {layer.K}, {layer.T}x{layer.D}x{layer.F}"


@pytest.mark.parametrize("layer", TOYS if ON_HOST else LAYERS, ids=named)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
def test_no_more_than_twice_the_error_of_pytorchs_ops(
    layer: Layer, keep: bool, device: torch.device
) -> None:
    fresh = layer if ON_HOST else replace(layer, seed=secrets.randbelow(2**31))
    print(fresh)
    given = fresh.inputs(device)
    truth = reference(given, torch.float64)
    plain = errors(reference(given, torch.bfloat16), truth)
    fused = Fused(given)
    for columns in TILES:
        ours = errors(fused.run(Manner(tile_columns=columns), keep), truth)
        print(named(layer), columns, {name: (ours[name], plain[name]) for name in truth})
        check_errors(ours, plain)


@pytest.mark.parametrize("layer", (TOYS if ON_HOST else LAYERS)[-2:], ids=named)
@pytest.mark.parametrize("tile_columns", TILES)
def test_the_manner_changes_no_bit(layer: Layer, tile_columns: int, device: torch.device) -> None:
    fused = Fused(layer.inputs(device))
    manners = [manner._replace(tile_columns=tile_columns) for manner in MANNERS]
    first = fused.run(manners[0])
    for manner in manners[1:]:
        for name, found in fused.run(manner).items():
            assert torch.equal(found, first[name]), (name, manner)


@pytest.mark.parametrize("tile_columns", TILES)
def test_a_thousand_times_the_same_bits(tile_columns: int, device: torch.device) -> None:
    layer = TOYS[-1] if ON_HOST else Layer(R=4, E=16, K=4, T=150, D=256, F=256)
    fused = Fused(layer.inputs(device))
    manners = [manner._replace(tile_columns=tile_columns) for manner in MANNERS]
    first = fused.run(manners[0])
    unequal = torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(3 if ON_HOST else 1000):
        again = fused.run(manners[turn % len(manners)])
        for name, found in again.items():
            unequal += (found.view(torch.uint8) != first[name].view(torch.uint8)).sum()
    assert not unequal.item()
