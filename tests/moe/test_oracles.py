"""What other projects' routers do, where ours agrees and where it knowingly does not.

Beside test_hugging_face.py, test_deepspeed.py, test_balance_losses.py, test_biased_routing.py,
test_sinkhorn_router.py and tests/models/test_mlp_router.py, which hold the rest of the comparisons.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.moe.routers.base import Routing
from coterie.moe.routers.sinkhorn import log_factors
from coterie.moe.routers.top_k import TopKConfig, TopKRouter
from coterie.moe.tokens import TokenInfo
from tests.moe.hugging_face import InDouble
from tests.moe.tiny import error, identity_router, randn, randomise

T, E = 64, 16
LIMIT = 1e-12


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    return pytest.importorskip(
        "megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed"
    )


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def dense(routing: Routing, tokens: int = T, experts: int = E) -> Tensor:
    """Combine weights by token and expert."""
    rows = routing.assignment
    weight_TE = torch.zeros(tokens, experts, dtype=rows.weight_A.dtype)
    return weight_TE.index_put((rows.token_A, rows.expert_A), rows.weight_A, accumulate=True)


def route(logits_TE: Tensor, info: TokenInfo | None = None, **settings: Any) -> Routing:
    """By given logits, in training."""
    router = identity_router(TopKConfig.model_validate(settings), logits_TE.shape[1]).train()
    routing: Routing = router(logits_TE, info or TokenInfo())
    return routing


# --- Hugging Face -------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [False, True])
def test_choices_and_weights_are_olmoes(renormalise: bool, transformers: ModuleType) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    config = transformers.OlmoeConfig(
        hidden_size=6, num_experts=E, num_experts_per_tok=4, norm_topk_prob=renormalise
    )
    theirs = OlmoeTopKRouter(config).double()
    randomise(theirs)
    ours = TopKRouter(6, E, TopKConfig(k=4, renormalise=renormalise)).double()
    ours.load_state_dict({"weight": theirs.weight})
    x_TD = randn(T, 6, seed=1)
    with InDouble():
        _, weight_TK, expert_TK = theirs(x_TD)
    truth_TE = torch.zeros(T, E, dtype=torch.float64).scatter(1, expert_TK, weight_TK)
    assert error(dense(ours(x_TD, TokenInfo())), truth_TE) < LIMIT


@pytest.mark.parametrize("k", [1, 3])
def test_choices_and_weights_are_llama_4s(k: int, transformers: ModuleType) -> None:
    """Top-k of the logits, their sigmoids as weights (there of an expert's input, not output)."""
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    config = transformers.Llama4TextConfig(
        hidden_size=6, num_local_experts=E, num_experts_per_tok=k
    )
    theirs = Llama4Router(config).double()
    randomise(theirs)
    ours = TopKRouter(6, E, TopKConfig(k=k, score="sigmoid", renormalise=False)).double()
    ours.load_state_dict({"weight": theirs.weight})
    x_TD = randn(T, 6, seed=2)
    with InDouble():
        truth_TE, _ = theirs(x_TD)
    assert error(dense(ours(x_TD, TokenInfo())), truth_TE) < LIMIT


@pytest.mark.parametrize("capacity", [2, 3, 5])
def test_capacity_of_a_sequence_is_switchs(capacity: int, transformers: ModuleType) -> None:
    """The first of each sequence stay; also both losses are theirs."""
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    rows, length, experts = 4, 12, 4
    config = transformers.SwitchTransformersConfig(
        hidden_size=6,
        num_experts=experts,
        expert_capacity=capacity,
        router_bias=False,
    )
    theirs = switch.SwitchTransformersTop1Router(config).double().eval()
    theirs.dtype = torch.float64
    randomise(theirs)
    x_BSD = randn(rows, length, 6, seed=3)
    chosen_BSE, weight_BS1, logits_BSE = theirs(x_BSD)
    ours = TopKRouter(
        6,
        experts,
        TopKConfig(
            k=1,
            renormalise=False,
            capacity_factor=capacity * experts / length,
            balance_loss=1.0,
            z_loss=1.0,
        ),
    ).double()
    ours.load_state_dict({"weight": theirs.classifier.weight})
    sequence_T = torch.arange(rows).repeat_interleave(length)
    routing = ours.train()(x_BSD.flatten(0, 1), TokenInfo(sequence_T=sequence_T))
    truth_TE = (chosen_BSE * weight_BS1).flatten(0, 1)
    assert error(dense(routing, rows * length, experts), truth_TE) < LIMIT
    assert 0 < int(routing.stats.dropped_E.sum()) == rows * length - int(chosen_BSE.sum())
    z = switch.router_z_loss_func(logits_BSE)
    assert error(routing.losses["z"], z) < LIMIT
    # a batch's mean over its sequences there, here one sequence
    one = ours(x_BSD[0], TokenInfo()).losses["balance"]
    probability_1SE = logits_BSE[:1].softmax(-1)
    with InDouble():
        truth = switch.load_balancing_loss_func(probability_1SE, probability_1SE.argmax(-1))
    assert error(one, truth) < LIMIT


# --- facts about losses and scores --------------------------------------------------------------


def test_the_switch_loss_may_fall_below_one(megatron: ModuleType) -> None:
    """One at perfect balance, but no lower bound: two tokens slightly for one expert, the third
    wholly for the other."""
    prob_TE = torch.tensor([[0.51, 0.49], [0.51, 0.49], [1e-9, 1.0]], dtype=torch.float64)
    loss = route(prob_TE.log(), k=1, balance_loss=1.0, z_loss=0.0).losses["balance"]
    right = 2 * (2 / 3 * (1.02 / 3) + 1 / 3 * (1.98 / 3))
    assert float(loss.detach()) == pytest.approx(right, rel=1e-6) and right < 0.9
    load_E = torch.tensor([2.0, 1.0], dtype=torch.float64)
    theirs = megatron.switch_load_balancing_loss_func(prob_TE, load_E, 3, 1, 2, 1.0)
    assert float(theirs) == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_mixtrals_loss_is_k_times_megatrons(
    k: int, megatron: ModuleType, transformers: ModuleType
) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_TE = randn(T, E, seed=4)
    with InDouble():
        mixtral = load_balancing_loss_func((logits_TE,), E, k)
        chosen_TE, prob_TE = megatron.compute_routing_scores_for_aux_loss(logits_TE, k, "softmax")
        loss = megatron.switch_load_balancing_loss_func(prob_TE, chosen_TE.sum(0), T, k, E, 1.0)
    assert error(mixtral, k * loss) < LIMIT
    ours = route(logits_TE, k=k, balance_loss=1.0, z_loss=0.0).losses["balance"]
    assert error(ours, loss) < LIMIT


def test_softmax_of_the_chosen_is_the_renormalised_softmax_of_all(megatron: ModuleType) -> None:
    logits_TE = randn(T, E, seed=5) * 2
    with InDouble():
        after, _ = megatron.topk_routing_with_score_function(logits_TE, 4, use_pre_softmax=False)
        before, _ = megatron.topk_routing_with_score_function(logits_TE, 4, use_pre_softmax=True)
    assert error(before / before.sum(1, keepdim=True), after) < LIMIT
    assert error(before, after) > 0.01
    assert error(dense(route(logits_TE, k=4)), after) < LIMIT
    assert error(dense(route(logits_TE, k=4, renormalise=False)), before) < LIMIT


@pytest.mark.parametrize(("k", "top_groups", "alike"), [(4, 2, True), (8, 2, False)])
def test_deepseeks_groups_are_megatrons_if_k_is_twice_the_groups(
    k: int, top_groups: int, alike: bool, megatron: ModuleType, transformers: ModuleType
) -> None:
    """Megatron adds up a group's best k / top_groups scores, DeepSeek (and we) always two."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    logits_TE = randn(T, E, seed=6)
    config = transformers.DeepseekV3Config(
        hidden_size=E,
        n_routed_experts=E,
        num_experts_per_tok=k,
        n_group=4,
        topk_group=top_groups,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
    )
    theirs = DeepseekV3TopkRouter(config).double()
    with InDouble(), torch.no_grad():
        theirs.weight.copy_(torch.eye(E))
        theirs.e_score_correction_bias.zero_()
        _, weight_TK, expert_TK = theirs(logits_TE)
        megatrons, _ = megatron.topk_routing_with_score_function(
            logits_TE, k, num_groups=4, group_topk=top_groups, score_function="sigmoid"
        )
    truth_TE = torch.zeros(T, E, dtype=torch.float64).scatter(1, expert_TK, weight_TK)
    ours = dense(route(logits_TE, k=k, score="sigmoid", groups=4, top_groups=top_groups))
    assert error(ours, truth_TE) < LIMIT
    other_T = ((megatrons > 0) != (truth_TE > 0)).any(1)
    assert int(other_T.sum()) == 0 if alike else 0 < int(other_T.sum()) < T


def test_a_group_is_as_good_as_its_two_best_scores() -> None:
    """Not as its best (that is the first group's), nor as all (the third's)."""
    probability_E = torch.tensor([0.9, 0.1, 0.1, 0.6, 0.6, 0.1, 0.39, 0.39, 0.39])
    logits_1E = torch.logit(probability_E.double())[None]
    rows = route(logits_1E, k=2, score="sigmoid", groups=3, top_groups=1).assignment
    assert rows.expert_A.tolist() == [3, 4]


def test_an_exponential_without_a_shift_overflows(megatron: ModuleType) -> None:
    """Megatron's Sinkhorn of large logits is no number, ours is that of the shifted ones."""
    logits_TE = randn(T, 8, seed=7)
    assert not bool(megatron.sinkhorn(logits_TE + 1000).isfinite().all())
    factor_E = log_factors(logits_TE + 1000, None, Axis("data"))
    chosen_T = (logits_TE + factor_E).argmax(-1)
    assert torch.equal(chosen_T, megatron.sinkhorn(logits_TE).argmax(-1))
