"""Which part of each parameter a module holds: the parts of all ranks are the whole."""

from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from coterie.comm.axis import Axes, Axis
from coterie.core.box import Box
from coterie.models.decoder import Decoder
from coterie.models.placement import box_of, boxes_of, cuts_of, parameter_counts
from tests.models.tiny_decoder import config

SETTINGS: dict[str, Any] = {
    "width": 8,
    "vocabulary": 23,  # tp does not divide it
    "attention": {"heads": 4, "kv_heads": 4, "qk_norm": True, "gate": "head"},
    "moe": {"experts": {"count": 4, "hidden": 12}, "shared": {"hidden": 8}, "shared_gate": True},
}
TP, EP, ETP = (1, 2, 4), (1, 2, 4), (1, 3)


def part(tp: Axis, ep: Axis, etp: Axis) -> Decoder:
    with torch.device("meta"):
        return Decoder(config(**SETTINGS), Axes(tp=tp, ep=ep, etp=etp))


def axes(name: str, size: int) -> list[Axis]:
    return [Axis(name, rank, size) for rank in range(size)]


@pytest.mark.parametrize(("tp", "ep", "etp"), list(product(TP, EP, ETP)))
def test_the_boxes_of_all_ranks_tile_every_parameter(tp: int, ep: int, etp: int) -> None:
    whole = {name: tuple(p.shape) for name, p in part(Axis(), Axis(), Axis()).named_parameters()}
    held = {name: np.zeros(shape, dtype=np.int64) for name, shape in whole.items()}
    places = list(product(axes("tp", tp), axes("ep", ep), axes("etp", etp)))
    copies = {name: len(places) for name in whole}
    for number, place in enumerate(places):
        model = part(*place)
        boxes, cuts = boxes_of(model), cuts_of(model)
        assert boxes.keys() == whole.keys()
        for name, parameter in model.named_parameters():
            box = boxes[name]
            assert box.whole == whole[name] and box.shape == tuple(parameter.shape)
            held[name][box.slices] += 1
            if number == 0:
                copies[name] //= prod(cut.axis.size for cut in cuts[name])
    for name, times in held.items():
        assert (times == copies[name]).all(), name


def test_what_is_split_over_which_axis() -> None:
    split = {
        name: [(cut.dim, cut.axis.name, cut.length) for cut in cuts]
        for name, cuts in cuts_of(part(*(Axis(n, 0, 2) for n in ("tp", "ep", "etp")))).items()
        if cuts
    }
    block, experts = "blocks.1.attention", "blocks.1.moe.experts"
    assert split["embedding.weight"] == split["head.weight"] == [(0, "tp", 23)]
    assert split[f"{block}.q.weight"] == split[f"{block}.k.weight"] == [(0, "tp", 8)]
    assert split[f"{block}.gate.weight"] == [(0, "tp", 4)]
    assert split[f"{block}.out.weight"] == [(1, "tp", 8)]
    assert split[f"{experts}.w_in_EPFD"] == [(0, "ep", 4), (2, "etp", 12)]
    assert split[f"{experts}.w_out_EFD"] == [(0, "ep", 4), (1, "etp", 12)]
    assert split["blocks.1.moe.shared.w_in_PFD"] == [(1, "tp", 8)]
    assert split["blocks.0.feed_forward.w_out_FD"] == [(0, "tp", 12)]
    assert not [
        name for name in split if "norm" in name or "router" in name or "shared_gate" in name
    ]


def test_a_box_selects_and_is_cut() -> None:
    x = torch.arange(24).view(4, 6)
    box = Box.all_of((4, 6)).cut(1, range(2, 5)).cut(0, range(1, 4))
    assert (box.offset, box.shape, box.numel) == ((1, 2), (3, 3), 9)
    assert torch.equal(x[box.slices], x[1:4, 2:5])
    again = box.cut(1, range(1, 3))  # counted from the box's own beginning
    assert torch.equal(x[again.slices], x[1:4, 3:5])
    assert Box.all_of((4, 6)).cut(0, range(4, 4)).numel == 0


def test_one_parameter_alone() -> None:
    model = part(Axis("tp", 1, 2), Axis("ep"), Axis("etp"))
    assert model.head is not None
    assert box_of(model.head, "weight") == Box((23, 8), (12, 0), (11, 8))
    assert box_of(model.blocks["0"].attention_norm, "weight") == Box.all_of((8,))


def test_a_tied_parameter_has_one_box() -> None:
    with torch.device("meta"):
        model = Decoder(config(**SETTINGS, tie_embeddings=True), Axes(tp=Axis("tp", 1, 2)))
    assert "head.weight" not in boxes_of(model)
    assert boxes_of(model)["embedding.weight"] == Box((23, 8), (12, 0), (11, 8))


def test_parameters_are_counted_whole_and_for_a_token() -> None:
    total, active = parameter_counts(config(**SETTINGS))
    model = Decoder(config(**SETTINGS))
    assert total == sum(p.numel() for p in model.parameters())
    one_expert = 3 * 8 * 12
    assert total - active == 2 * (4 - 2) * one_expert  # two layers, two of four experts
    dense = config(moe=None, dense_layers=[])
    assert len(set(parameter_counts(dense))) == 1
