"""DeepSeek-V3's balancing: a bias on the choice alone, and a loss inside each sequence."""

from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.moe.routers.top_k import TopKConfig, TopKRouter
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.moe.hugging_face import InDouble
from tests.moe.tiny import error, identity_router, randn, randomise

T, E, B, S = 40, 8, 5, 8
LIMIT = 1e-12
SEQUENCE_T = torch.arange(B).repeat_interleave(S)


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    return pytest.importorskip(
        "megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed"
    )


def _biased(config: TopKConfig, bias_E: Tensor) -> TopKRouter:
    """Its logits are its input."""
    router = identity_router(config, E)
    assert router.bias is not None
    with torch.no_grad():
        router.bias.copy_(bias_E)
    return router


def _dense(router: TopKRouter, x_TD: Tensor) -> Tensor:
    """Combine weights by token and expert."""
    rows = router(x_TD, TokenInfo()).assignment
    weight_TE = x_TD.new_zeros(len(x_TD), router.num_experts)
    weight_TE[rows.token_A, rows.expert_A] = rows.weight_A.detach()
    return weight_TE


@pytest.mark.parametrize(("groups", "top_groups", "k"), [(1, 1, 3), (4, 2, 4), (2, 1, 3)])
def test_choices_and_weights_are_those_of_hugging_face(
    groups: int, top_groups: int, k: int
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs = DeepseekV3TopkRouter(
        transformers.DeepseekV3Config(
            hidden_size=6,
            n_routed_experts=E,
            num_experts_per_tok=k,
            n_group=groups,
            topk_group=top_groups,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    ).double()
    randomise(theirs)
    theirs.e_score_correction_bias.copy_(randn(E, seed=1) * 0.5)
    config = TopKConfig(
        k=k, score="sigmoid", scale=2.5, groups=groups, top_groups=top_groups, bias_update=0.1
    )
    ours = TopKRouter(6, E, config).double()
    ours.load_state_dict({"weight": theirs.weight, "bias": theirs.e_score_correction_bias})
    x_TD = randn(T, 6, seed=2)
    with InDouble(), torch.no_grad():
        _, weight_TK, expert_TK = theirs(x_TD)
    truth = torch.zeros(T, E, dtype=torch.float64).scatter_(1, expert_TK, weight_TK)
    assert error(_dense(ours, x_TD), truth) < LIMIT
    with torch.no_grad():
        ours.bias.zero_()  # type: ignore[union-attr]
    assert error(_dense(ours, x_TD), truth) > 0.1


def test_choices_and_weights_are_those_of_megatron(megatron: ModuleType) -> None:
    """Its groups are as good as their best k / top_groups scores: ours where that is two."""
    logits, bias_E = randn(T, E, seed=3), randn(E, seed=4) * 0.3
    config = TopKConfig(k=4, score="sigmoid", groups=4, top_groups=2, scale=1.5, bias_update=0.1)
    with InDouble():
        truth, _ = megatron.topk_routing_with_score_function(
            logits,
            4,
            num_groups=4,
            group_topk=2,
            scaling_factor=1.5,
            score_function="sigmoid",
            expert_bias=bias_E,
        )
    assert error(_dense(_biased(config, bias_E), logits), truth) < LIMIT


def test_the_bias_has_no_part_in_weights_gradients_and_losses() -> None:
    """A bias that changes no choice changes nothing."""
    config = TopKConfig(k=2, bias_update=0.1, sequence_loss=0.2)
    x_TD = randn(T, E, seed=5)
    found = []
    for bias in (0.0, 3.0):
        router = _biased(config, torch.full((E,), bias)).train()
        leaf_TD = x_TD.clone().requires_grad_()
        routing = router(leaf_TD, TokenInfo(sequence_T=SEQUENCE_T))
        total = routing.assignment.weight_A.square().sum() + sum(routing.losses.values())
        total.backward()
        assert router.bias is not None and router.bias.grad is None
        found.append((routing.assignment.weight_A, leaf_TD.grad, router.weight.grad))
    for plain, shifted in zip(*found, strict=True):
        assert plain is not None and shifted is not None and torch.equal(plain, shifted)


def test_updates_follow_the_sign_of_what_is_missing() -> None:
    router = identity_router(TopKConfig(k=2, bias_update=0.25), E)
    load_E = torch.tensor([10, 0, 5, 5, 7, 3, 5, 5])
    change_E = router.updates(load_E)["bias"]
    assert change_E.tolist() == [-0.25, 0.25, 0, 0, -0.25, 0.25, 0, 0]
    assert identity_router(TopKConfig(), E).updates(load_E) == {}
    assert identity_router(TopKConfig(bias_update=0), E).updates(load_E) == {}


def test_a_skewed_router_becomes_balanced() -> None:
    router = _biased(TopKConfig(k=2, score="sigmoid", bias_update=0.02), torch.zeros(E))
    logits = randn(400, E, seed=6) + torch.linspace(-1, 1, E, dtype=torch.float64)
    skews = []
    for _ in range(100):
        load_E = router(logits, TokenInfo()).assignment.load_E
        skews.append(float(load_E.max() / load_E.double().mean()))
        assert router.bias is not None
        router.bias.data += router.updates(load_E)["bias"]
    assert skews[0] > 2 and max(skews[-10:]) < 1.15


def test_a_capacity_that_hides_overload_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_factor above 1 or null, not 1"):
        TopKConfig(bias_update=0.1, capacity_factor=1.0)
    TopKConfig(bias_update=0.1, capacity_factor=1.25)


def _sequence_loss(
    logits: Tensor, info: TokenInfo, data: Axis = Axis(), sequence: Axis = Axis(), k: int = 2
) -> Tensor:
    config = TopKConfig(k=k, score="sigmoid", balance_loss=0, z_loss=0, sequence_loss=0.3)
    router = TopKRouter(E, E, config, data, sequence).double().train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    losses = router(logits, info).losses
    assert set(losses) == {"sequence"} == set(config.loss_names)
    return losses["sequence"]


@pytest.mark.parametrize("k", [1, 3])
def test_the_sequence_loss_is_the_mean_of_megatrons_over_sequences(
    k: int, megatron: ModuleType
) -> None:
    logits = randn(T, E, seed=7) * 2
    padding_T = torch.rand(T, generator=torch.Generator().manual_seed(8)) < 0.3
    padding_T[:S] = True  # a sequence of padding alone does not count
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = _sequence_loss(ours, TokenInfo(sequence_T=SEQUENCE_T, padding_T=padding_T), k=k)
    parts = []
    for b in range(1, B):
        mine_T = (b == SEQUENCE_T) & ~padding_T
        score_TE = theirs[mine_T].sigmoid()
        prob_TE = score_TE / score_TE.sum(-1, keepdim=True)
        load_E = torch.zeros(E).scatter_add_(
            0, score_TE.topk(k).indices.flatten(), torch.ones(len(score_TE) * k)
        )
        parts.append(
            megatron.switch_load_balancing_loss_func(prob_TE, load_E, len(score_TE), k, E, 0.3)
        )
    truth = torch.stack(parts).mean()
    assert error(loss, truth) < LIMIT
    (our_gradient,) = torch.autograd.grad(loss, ours)
    (their_gradient,) = torch.autograd.grad(truth, theirs)
    assert error(our_gradient, their_gradient) < LIMIT


def _on_rank(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """The rank's share, of whole sequences and of parts of all sequences."""
    data = Axis("data", rank, world, dist.group.WORLD)
    logits = randn(T, E, seed=9)
    padding_T = torch.rand(T, generator=torch.Generator().manual_seed(9)) < 0.3
    info = TokenInfo(sequence_T=SEQUENCE_T, padding_T=padding_T)
    of_sequences = SEQUENCE_T % world == rank
    own = TokenInfo(sequence_T=SEQUENCE_T[of_sequences] // world, padding_T=padding_T[of_sequences])
    whole = _sequence_loss(logits[of_sequences], own, data)
    of_parts = torch.arange(T) % world == rank
    parts = info.map(lambda x_T: x_T[of_parts])
    split = _sequence_loss(logits[of_parts], parts, data, data)
    return whole.detach(), split.detach()


def test_shares_of_ranks_add_up() -> None:
    found = run_ranks(2, _on_rank, 2)
    logits = randn(T, E, seed=9)
    padding_T = torch.rand(T, generator=torch.Generator().manual_seed(9)) < 0.3
    truth = _sequence_loss(logits, TokenInfo(sequence_T=SEQUENCE_T, padding_T=padding_T))
    for place in (0, 1):
        assert error(sum(shares[place] for shares in found), truth) < LIMIT
