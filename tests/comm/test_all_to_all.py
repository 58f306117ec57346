"""Experts spread over 1, 2 and 4 gloo ranks give the numbers of one process, in float64."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import Axes, expert_parallel
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.rows import start_all_to_all
from coterie.moe.layer import MoELayer
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.moe.tiny import error, randn, tiny_layer

D, E = 6, 4
LIMIT = 1e-12
NEVER = -30.0


@dataclass(frozen=True)
class Case:
    """Tokens on each rank and what their first E columns, the logits, forbid."""

    tokens: tuple[int, int, int, int] = (7, 3, 5, 2)
    closed: tuple[int, ...] = ()
    """Experts that nobody chooses."""
    closed_to_rank_0: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """By world size: experts that the tokens of rank 0 do not choose."""
    router: dict[str, Any] = field(default_factory=dict)
    padding: bool = False


CASES = {
    "uneven": Case(),
    "an expert without rows": Case(closed=(1,)),
    "rank 0's tokens all go elsewhere": Case(
        closed_to_rank_0={2: (0, 1), 4: (0, 1)}, tokens=(6, 4, 0, 3)
    ),
    "the first rank has no tokens": Case(tokens=(0, 9, 4, 4)),
    "the last ranks have no tokens": Case(tokens=(9, 0, 0, 0)),
    "nobody has tokens": Case(tokens=(0, 0, 0, 0)),
    "all to one expert": Case(closed=(0, 1, 3), router={"k": 1, "renormalise": False}),
    "padding and drops": Case(
        padding=True, router={"capacity_factor": 0.8, "score": "sigmoid", "scale": 2.5}
    ),
    "every expert of every token": Case(router={"k": 4}),
}


def _inputs(case: Case, world: int) -> list[tuple[Tensor, TokenInfo, Tensor]]:
    """For each rank x_TD, facts of its tokens, and the gradient of its output."""
    parts = []
    for rank in range(world):
        tokens = case.tokens[rank]
        x_TD = randn(tokens, D, seed=10 + rank)
        x_TD[:, list(case.closed)] = NEVER
        if rank == 0:
            x_TD[:, list(case.closed_to_rank_0.get(world, ()))] = NEVER
        padding_T = torch.arange(tokens) % 3 == 1 if case.padding else None
        sequence_T = torch.arange(tokens) // 2
        info = TokenInfo(padding_T=padding_T, sequence_T=sequence_T)
        parts.append((x_TD, info, randn(tokens, D, seed=20 + rank)))
    return parts


def _layer(case: Case, axes: Axes | None = None) -> MoELayer:
    """Every rank draws the weights of all experts and keeps its own."""
    config = TopKConfig.model_validate({"balance_loss": 0.4, "z_loss": 0.3, **case.router})
    whole = tiny_layer(config, width=D, experts=E, shared=3)
    with torch.no_grad():
        whole.router.weight.copy_(torch.eye(E, D))
    if axes is None:
        return whole.train()
    layer = tiny_layer(config, width=D, experts=E, shared=3, axes=axes)
    mine = slice(layer.experts.first, layer.experts.first + E // axes.ep.size)
    state = whole.state_dict()
    for name in ("experts.w_in_EPFD", "experts.w_out_EFD"):
        state[name] = state[name][mine]
    layer.load_state_dict(state)
    return layer.train()


def _step(layer: MoELayer, x_TD: Tensor, info: TokenInfo, dy_TD: Tensor) -> dict[str, Tensor]:
    """Outputs, losses, loads and every gradient of one training step."""
    x_TD = x_TD.clone().requires_grad_()
    out = layer(x_TD, info)
    ((out.y * dy_TD).sum() + out.losses["balance"] + out.losses["z"]).backward()
    assert x_TD.grad is not None
    result = {"y": out.y.detach(), "dx": x_TD.grad, "load": out.stats.load_E}
    result |= {f"loss {name}": loss.detach() for name, loss in out.losses.items()}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        result[f"d {name}"] = parameter.grad
    return result


def _on_rank(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    results = {}
    for name, case in CASES.items():
        layer = _layer(case, expert_parallel(group))
        assert isinstance(layer.exchange, AllToAllExchange)
        assert layer.experts.w_in_EPFD.shape[0] == E // world
        results[name] = _step(layer, *_inputs(case, world)[rank])
    return results


def _asked_and_sent(rank: int, world: int) -> list[str]:
    told = []

    def noted(name: str) -> Any:
        plain = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            told.append(name)
            return plain(*args, **kwargs)

        return patch.object(dist, name, call)

    sent_AD, received_AD = torch.ones(world, 2), torch.empty(world, 2)
    group = dist.group.WORLD
    assert group is not None
    with noted("irecv"), noted("isend"):
        for work in start_all_to_all(received_AD, sent_AD, [1] * world, [1] * world, group):
            work.wait()
    return told


def test_ranks_ask_before_they_send() -> None:
    """Else a question waits behind rows on the same connection."""
    for told in run_ranks(4, _asked_and_sent, 4):
        assert told == ["irecv"] * 3 + ["isend"] * 3


@cache
def _spread(world: int) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(world, _on_rank, world)


def _one_process(case: Case, world: int) -> dict[str, Tensor]:
    parts = _inputs(case, world)
    info = TokenInfo(
        padding_T=torch.cat([p.padding_T for _, p, _ in parts if p.padding_T is not None])
        if case.padding
        else None,
        sequence_T=torch.cat(
            [
                p.sequence_T + 100 * r
                for r, (_, p, _) in enumerate(parts)
                if p.sequence_T is not None
            ]
        ).unique(return_inverse=True)[1],
    )
    x_TD = torch.cat([x for x, _, _ in parts])
    dy_TD = torch.cat([dy for _, _, dy in parts])
    return _step(_layer(case), x_TD, info, dy_TD)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_spread_experts_equal_one_process(world: int, name: str) -> None:
    ranks = [results[name] for results in _spread(world)]
    truth = _one_process(CASES[name], world)
    assert truth.keys() == ranks[0].keys()
    for key, true in truth.items():
        if key in ("y", "dx") or "experts." in key:
            ours = torch.cat([rank[key] for rank in ranks])
        else:  # shares of the losses, of replicated weights' gradients, and of the loads
            ours = torch.stack([rank[key] for rank in ranks]).sum(0)
        assert error(ours, true) <= LIMIT, key


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_cases_are_what_their_names_say(world: int) -> None:
    loads = {name: _one_process(case, world)["load"] for name, case in CASES.items()}
    assert (loads["uneven"] > 0).all()
    assert loads["uneven"].unique().numel() > 1
    assert loads["an expert without rows"][1] == 0
    assert loads["all to one expert"].tolist() == [0, 0, sum(CASES["uneven"].tokens[:world]), 0]
    assert not loads["nobody has tokens"].any()
    if world > 1:
        away = _spread(world)[0]["rank 0's tokens all go elsewhere"]["load"]
        assert not away[: E // world].any()
        assert away.any()
