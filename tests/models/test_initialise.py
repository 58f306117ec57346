"""Initial weights: all of them set, by seed and name alone."""

from itertools import product
from typing import Any

import pytest
import torch

from coterie.comm.axis import Axes, Axis
from coterie.models.config import DecoderConfig
from coterie.models.decoder import Decoder, DecoderPart
from coterie.models.initialise import initialise
from coterie.models.placement import boxes_of
from tests.models.tiny_decoder import config


def _model(
    settings: DecoderConfig,
    seed: int = 0,
    branches: int = 6,
    axes: Axes = Axes(),
    part: DecoderPart | None = None,
) -> Decoder:
    """NaN everywhere before it is initialised."""
    model = Decoder(settings, axes, part)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, seed, residual_branches=branches)
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "dense": {"moe": None, "dense_layers": []},
    "tied": {"tie_embeddings": True},
    "qk_norm": {"attention": {"heads": 4, "qk_norm": True}},
    "gates": {"attention": {"heads": 4, "gate": "head"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_set(name: str) -> None:
    for parameter_name, parameter in _model(config(**VARIANTS[name])).named_parameters():
        assert parameter.isfinite().all(), parameter_name


def test_experts_of_two_ranks_are_those_of_one() -> None:
    whole = dict(_model(config()).named_parameters())
    axes = [Axes(ep=Axis("ep", rank, 2)) for rank in range(2)]
    halves = [dict(_model(config(), axes=own).named_parameters()) for own in axes]
    for name, parameter in whole.items():
        if ".experts." in name:
            assert torch.equal(torch.cat([half[name] for half in halves]), parameter), name
        else:
            assert all(torch.equal(half[name], parameter) for half in halves), name


def test_a_part_of_a_model_has_the_numbers_of_the_whole() -> None:
    """Split over tp, ep and etp, and into stages: no element differs from the whole model's."""
    settings = config(moe={"experts": {"count": 4, "hidden": 6}, "shared": {"hidden": 6}})
    whole = dict(_model(settings).named_parameters())
    seen: dict[str, int] = {}
    parts = (DecoderPart(range(2), True, False), DecoderPart(range(2, 3), False, True))
    for rank, part in product(range(2), parts):
        axes = Axes(tp=Axis("tp", rank, 2), ep=Axis("ep", 1 - rank, 2), etp=Axis("etp", rank, 2))
        model = _model(settings, axes=axes, part=part)
        for name, box in boxes_of(model).items():
            assert torch.equal(model.get_parameter(name), whole[name][box.slices]), name
            seen[name] = seen.get(name, 0) + box.numel
    assert seen.keys() == whole.keys()
    assert sum(seen[name] < 2 * whole[name].numel() for name in whole) > 20  # really split


def test_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = dict(_model(config()).named_parameters())
    torch.manual_seed(2)
    same = dict(_model(config()).named_parameters())
    shallow = dict(_model(config(layers=2), branches=6).named_parameters())
    other = dict(_model(config(), seed=1).named_parameters())
    drawn = [name for name, p in first.items() if p.unique().numel() > 1]
    assert len(drawn) > 15
    for name, parameter in first.items():
        assert torch.equal(parameter, same[name]), name
        assert name not in shallow or torch.equal(parameter, shallow[name]), name
    for name in drawn:
        assert first[name].ne(other[name]).all(), name
    matrices = [first[name].flatten()[:60] for name in drawn]
    matrices += [expert.flatten()[:60] for expert in first["blocks.1.moe.experts.w_in_EPFD"]]
    assert torch.stack(matrices)[:, 0].unique().numel() == len(matrices) - 1  # expert 0 twice


def test_standard_deviations() -> None:
    settings = config(
        width=64,
        vocabulary=500,
        attention={"heads": 4, "kv_heads": 2, "gate": "element"},
        feed_forward={"hidden": 128},
        moe={"experts": {"count": 4, "hidden": 96}, "router": {"k": 2}, "shared": {"hidden": 80}},
    )
    model = _model(settings, branches=9)
    parameters = dict(model.named_parameters())
    expected = {
        "embedding.weight": 0.02,
        "head.weight": 64**-0.5,
        "blocks.0.attention.q.weight": 64**-0.5,
        "blocks.0.attention.k.weight": 64**-0.5,
        "blocks.0.attention.v.weight": 64**-0.5,
        "blocks.0.attention.out.weight": 64**-0.5 / 3,
        "blocks.0.attention.gate.weight": 64**-0.5,
        "blocks.0.feed_forward.w_in_PFD": 64**-0.5,
        "blocks.0.feed_forward.w_out_FD": 128**-0.5 / 3,
        "blocks.1.moe.experts.w_in_EPFD": 64**-0.5,
        "blocks.1.moe.experts.w_out_EFD": 96**-0.5 / 3,
        "blocks.1.moe.shared.w_in_PFD": 64**-0.5,
        "blocks.1.moe.shared.w_out_FD": 80**-0.5 / 3,
        "blocks.1.moe.router.weight": 0.02,
    }
    for name, std in expected.items():
        values = parameters[name].detach()
        tolerance = 4 / (2 * values.numel()) ** 0.5  # four standard errors
        assert float(values.std()) == pytest.approx(std, rel=tolerance), name
        assert abs(float(values.mean())) < 4 * std / values.numel() ** 0.5, name
    for name, values in parameters.items():
        if "norm" in name:
            assert torch.equal(values, torch.ones_like(values)), name


def test_a_tied_output_layer_keeps_the_embeddings_scale() -> None:
    tied = _model(config(tie_embeddings=True))
    assert torch.equal(tied.head.weight, _model(config()).embedding.weight)


def test_the_same_numbers_in_every_precision() -> None:
    narrow, wide = Decoder(config()), Decoder(config()).double()
    initialise(narrow, 3)
    initialise(wide, 3)
    for own, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(own, other.float())
