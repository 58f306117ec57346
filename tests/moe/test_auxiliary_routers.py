"""Auxiliary routers: what they compute, what they learn, and that routing by them is causal."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import Axes, expert_parallel
from coterie.models.initialise import initialise
from coterie.moe.layer import MoELayer
from coterie.moe.routers.auxiliary import AuxiliaryRouter, foresight, foresight_loss
from coterie.moe.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from coterie.moe.routers.modality import ModalityConfig
from coterie.moe.routers.sinkhorn import SinkhornConfig
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.moe.choosing import (
    Config,
    D,
    E,
    T,
    config_of,
    info_of,
    part_of_layer,
    router_of,
    weights_of,
)
from tests.moe.tiny import error, randn, randomise, tiny_layer

SETTINGS: list[dict[str, Any]] = [
    {},
    {"score": "sigmoid", "capacity_factor": 2},
    {"kind": "modality", "experts": [1, 3]},
    {"kind": "modality", "experts": [1, 1, 2], "score": "softmax", "noise": False},
]


def _config(given: dict[str, Any], auxiliary: bool = True) -> Config:
    return config_of(given, auxiliary=auxiliary)


def _info(given: dict[str, Any], seed: int) -> TokenInfo:
    return info_of(seed, modalities=len(given.get("experts", (E,))), padding=0.2)


@torch.no_grad()
def _foreseen(
    router: ExpertChoiceRouter, x_TD: Tensor, info: TokenInfo
) -> dict[tuple[int, int], float]:
    """(token, expert) → probability, by plain loops over the pairs that can be."""
    assert router.auxiliary is not None and info.modality_T is not None
    assert info.padding_T is not None
    found = {}
    for t in range(len(x_TD)):
        group = int(info.modality_T[t]) if isinstance(router.config, ModalityConfig) else 0
        if info.padding_T[t]:
            continue
        own = router.auxiliary[group]
        assert isinstance(own, AuxiliaryRouter)
        before = [float(row @ x_TD[t]) for row in own.w_in]
        hidden = [h / (1 + math.exp(-h)) for h in before]
        experts = [e for e in range(E) if router.groups[e] == group]
        for e, row in zip(experts, own.w_out, strict=True):
            logit = sum(h * float(w) for h, w in zip(hidden, row, strict=True))
            found[t, e] = 1 / (1 + math.exp(-logit))
    return found


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_evaluation_routes_by_them_and_weighs_by_the_mainrouter_of(given: dict[str, Any]) -> None:
    router, x_TD, info = router_of(_config(given)).eval(), randn(T, D, seed=1), _info(given, 1)
    routing = router(x_TD, info)
    foreseen = _foreseen(router, x_TD, info)
    taken = {pair for pair, probability in foreseen.items() if probability > 0.5}
    assert weights_of(routing).keys() == taken and 0 < len(taken) < len(foreseen)
    score_TE = torch.zeros(T, E, dtype=torch.float64)
    for group in set(router.groups):
        experts = [e for e in range(E) if router.groups[e] == group]
        logits = (x_TD @ router.weight.detach().t())[:, experts]
        softmax = router.config.score == "softmax"
        score_TE[:, experts] = logits.softmax(-1) if softmax else logits.sigmoid()
    for (t, e), weight in weights_of(routing).items():
        assert weight == pytest.approx(float(score_TE[t, e]), rel=1e-12)
    assert routing.losses == {} and routing.foresight == ()


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_training_routes_as_before_without_noise_and_adds_the_loss(given: dict[str, Any]) -> None:
    router, x_TD, info = router_of(_config(given)).train(), randn(T, D, seed=2), _info(given, 2)
    plain = router_of(_config(given, auxiliary=False)).eval()
    with torch.no_grad():
        plain.weight.copy_(router.weight)
    routing, chosen = router(x_TD, info), weights_of(plain(x_TD, info))
    assert weights_of(routing) == chosen
    asked = router.eval()(x_TD, replace(info, by_choice=True))
    assert weights_of(asked) == chosen != weights_of(router(x_TD, info))

    foreseen = _foreseen(router, x_TD, info)
    entropy = {p: -math.log(q if p in chosen else 1 - q) for p, q in foreseen.items()}
    right = sum((q > 0.5) == (p in chosen) for p, q in foreseen.items())
    total = sum(entropy.values())
    assert list(routing.losses) == ["auxiliary"] == list(router.config.loss_names)
    assert float(routing.losses["auxiliary"].detach()) == pytest.approx(total / len(foreseen))
    (seen,) = routing.foresight
    assert seen.tolist() == pytest.approx([len(foreseen), right, len(chosen), total])


def test_the_loss_leaves_all_but_the_auxiliary_routers_alone() -> None:
    router, x_TD = router_of(_config(SETTINGS[2])).train(), randn(T, D, seed=3).requires_grad_()
    router(x_TD, _info(SETTINGS[2], 3)).losses["auxiliary"].backward()
    assert x_TD.grad is None and router.weight.grad is None
    grads = [p.grad for name, p in router.named_parameters() if name.startswith("auxiliary.")]
    assert len(grads) == 4 and all(g is not None and bool(g.any()) for g in grads)


def test_a_modality_without_tokens_keeps_its_auxiliary_router_in_the_graph() -> None:
    router = router_of(_config(SETTINGS[2])).train()
    info = TokenInfo(modality_T=torch.zeros(T, dtype=torch.int64))
    router(randn(T, D, seed=4), info).losses["auxiliary"].backward()
    assert router.auxiliary is not None
    for modality, own in enumerate(router.auxiliary):
        for parameter in own.parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()) == (modality == 0)


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [1, 7, T - 1])
def test_a_prefix_is_routed_as_in_the_whole_sequence(given: dict[str, Any], length: int) -> None:
    """Expert choice is not: it fails for some prefix."""
    router, x_TD, info = router_of(_config(given)).eval(), randn(T, D, seed=5), _info(given, 5)

    def same(by_choice: bool, length: int) -> bool:
        asked = replace(info, by_choice=by_choice)
        whole = weights_of(router(x_TD, asked))
        prefix = weights_of(router(x_TD[:length], asked.map(lambda x_T: x_T[:length])))
        return prefix == pytest.approx({p: w for p, w in whole.items() if p[0] < length})

    assert same(False, length)
    assert not all(same(True, other) for other in range(1, T))


def test_later_tokens_change_nothing_before_them() -> None:
    """To the last bit, for a whole layer; expert choice changes."""
    layer = tiny_layer(_config(SETTINGS[1])).eval()
    x_TD, half = randn(T, D, seed=6), T // 2
    other_TD = torch.cat([x_TD[:half], randn(T - half, D, seed=7)])
    for by_choice in (False, True):
        info = TokenInfo(by_choice=by_choice)
        pair = [layer(tokens, info).y[:half] for tokens in (x_TD, other_TD)]
        assert torch.equal(*pair) != by_choice


def test_they_learn_a_choice_that_one_token_tells() -> None:
    """Experts take the tokens whose first number is largest: of many, those above the median."""
    config = ExpertChoiceConfig(score="sigmoid", capacity_factor=1, auxiliary=True)
    router = ExpertChoiceRouter(D, (0, 0), config).double()
    initialise(router, 0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2, D))
    assert router.auxiliary is not None
    optimizer = torch.optim.Adam(router.auxiliary.parameters(), lr=3e-2)
    x_TD = randn(512, D, seed=8)
    for _ in range(300):
        optimizer.zero_grad()
        router.train()(x_TD, TokenInfo()).losses["auxiliary"].backward()
        optimizer.step()
    (fresh,) = router.eval()(randn(512, D, seed=9), TokenInfo(by_choice=True)).foresight
    pairs, right, chosen, _ = fresh.tolist()
    assert right / pairs > 0.93 > 1 - chosen / pairs


def test_initial_weights_keep_the_scale() -> None:
    auxiliary = AuxiliaryRouter(128, 96)
    assert auxiliary.w_in.shape == (64, 128) and auxiliary.w_out.shape == (96, 64)
    initialise(auxiliary, 0)
    assert float(auxiliary.w_in.std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(auxiliary.w_out.std()) == pytest.approx(64**-0.5, rel=0.05)


def test_one_chooser_is_a_block_that_chooses_its_tokens() -> None:
    """As in mixture of depths: one logit for each token."""
    auxiliary = AuxiliaryRouter(D, 1).double()
    randomise(auxiliary)
    logits_T1 = auxiliary(randn(T, D, seed=10))
    chosen_T1 = torch.arange(T)[:, None] % 4 == 0
    open_T1 = torch.arange(T)[:, None] < T - 4
    assert logits_T1.shape == (T, 1)
    pairs, right, chosen, total = foresight(logits_T1, chosen_T1, open_T1).tolist()
    assert (pairs, chosen) == (T - 4, (T - 4) / 4) and 0 < right < pairs
    assert float(foresight_loss(logits_T1, chosen_T1, open_T1)) == pytest.approx(total / pairs)
    nobody = foresight_loss(logits_T1, chosen_T1, torch.zeros_like(open_T1))
    assert float(nobody.detach()) == 0.0


def test_routers_say_whether_they_are_causal() -> None:
    assert TopKConfig().causal and SinkhornConfig().causal
    assert TopKConfig(capacity_factor=1.0).causal
    assert not TopKConfig(capacity_factor=1.0, drop="score").causal
    assert ModalityConfig(experts=(1, 1)).causal  # each takes all tokens of its modality
    assert not ModalityConfig(experts=(1, 1), capacity_factor=0.5).causal
    assert not ModalityConfig(experts=(1, 2)).causal
    for given in SETTINGS:
        assert not _config(given, auxiliary=False).causal and _config(given).causal
        assert _config(given).foresees and not _config(given, auxiliary=False).foresees


# ---- over ranks


def _results(layer: MoELayer, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, ...]:
    """Output in evaluation; the loss, its gradients and the counts in training."""
    y_TD = layer.eval()(x_TD, info).y.detach()
    output = layer.train()(x_TD, info)
    loss, (seen,) = output.losses["auxiliary"], output.foresight
    loss.backward()
    assert isinstance(layer.router, ExpertChoiceRouter) and layer.router.auxiliary is not None
    grads = [p.grad for p in layer.router.auxiliary.parameters()]
    return (y_TD, loss.detach(), seen, *grads)  # type: ignore[return-value]


def _on_rank(rank: int, split: list[int]) -> list[tuple[Tensor, ...]]:
    axes = expert_parallel(dist.group.WORLD)
    found = []
    for given in SETTINGS:
        x_TD, info = randn(T, D, seed=11), _info(given, 11)
        mine = torch.arange(T).split(split)[rank]
        local = info.map(lambda x_T, mine=mine: x_T[mine])
        found.append(_results(part_of_layer(_config(given), axes), x_TD[mine], local))
    return found


@pytest.mark.parametrize("split", [[12, 12], [0, 24]], ids=str)
def test_two_expert_parallel_ranks_equal_one(split: list[int]) -> None:
    parts = run_ranks(2, _on_rank, split)
    for number, given in enumerate(SETTINGS):
        truth = _results(
            part_of_layer(_config(given), Axes()), randn(T, D, seed=11), _info(given, 11)
        )
        ours = [part[number] for part in parts]
        assert error(torch.cat([one[0] for one in ours]), truth[0]) < 1e-12
        for place in range(1, len(truth)):
            total = torch.stack([one[place] for one in ours]).sum(0)
            assert error(total, truth[place]) < 1e-12, (given, place)
