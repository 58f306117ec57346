"""Mixtures of vector fields: contexts, experts, and what the gate may see."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from coterie.comm.axis import Axis
from coterie.models.dynamics import DynamicsConfig, DynamicsModel, relative_error
from coterie.models.ode import solve
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import randn, randomise
from tests.parallel.tiny_environments import dynamics, linear

ADAPTATIONS = ["geps", "coda"]


def _by_hand(model: DynamicsModel, xi_K: Tensor, expert: int, x_NI: Tensor) -> Tensor:
    """One expert's field for one environment, from the papers' formulas."""
    p = {name: value[expert - model.experts.first] for name, value in _named(model)}
    for i in range(model.config.layers + 1):
        w_IO, b_O = p[f"w{i}"], p[f"b{i}"]
        if model.config.adaptation == "geps":
            w_IO = w_IO + p[f"into{i}"] @ torch.diag(xi_K) @ p[f"from{i}"]
        else:
            for k, x in enumerate(xi_K):
                w_IO, b_O = w_IO + x * p[f"w_shift{i}"][k], b_O + x * p[f"b_shift{i}"][k]
        x_NI = (F.silu(x_NI) if i else x_NI) @ w_IO + b_O
    return x_NI


def _named(model: DynamicsModel) -> list[tuple[str, Tensor]]:
    return list(model.experts.named_parameters())


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("split", [False, True])
def test_fields_are_the_papers_formulas(adaptation: str, split: bool) -> None:
    model = dynamics(3, 6, adaptation=adaptation, split_contexts=split, layers=2)
    randomise(model)
    context_ED, expert_E = randn(5, 6, seed=1), torch.tensor([2, 0, 1, 0, 2])
    y_END, t_T = randn(5, 4, 2, seed=2), torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    ours = model(context_ED, expert_E, y_END, t_T)
    assert ours.shape == (5, 4, 3, 2)
    for e, m in enumerate(expert_E.tolist()):
        xi_K = context_ED[e, 2 * m : 2 * m + 2] if split else context_ED[e]
        truth = solve(
            lambda _, y, m=m, xi_K=xi_K: _by_hand(model, xi_K, m, y), y_END[e], t_T, "rk4"
        )
        assert torch.allclose(ours[e], truth, rtol=1e-11)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_all_experts_start_identical_but_layers_differ(adaptation: str) -> None:
    model = dynamics(4, 4, adaptation=adaptation, layers=2, hidden=2)
    for name, value in _named(model):
        assert value.shape[0] == 4
        assert torch.equal(value, value[:1].expand_as(value)), name
    p = dict(_named(model))
    assert not torch.equal(p["w0"], p["w1"])


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_contexts_at_zero_have_gradients_and_only_their_expert_has(adaptation: str) -> None:
    data, model = linear(), dynamics(3, 4, adaptation=adaptation)
    context_ED = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    expert_E = torch.tensor([0, 2, 0, 2, 0, 2])
    model.losses(context_ED, expert_E, data.y_ENTD, data.t_T).sum().backward()
    assert context_ED.grad is not None
    assert (context_ED.grad != 0).all()
    for name, value in _named(model):
        assert value.grad is not None
        assert not value.grad[1].any(), name
        if name.startswith(("w", "b")) and "shift" not in name:  # at ξ = 0 what adapts has none
            assert value.grad[0].any(), name
            assert value.grad[2].any(), name


@pytest.mark.parametrize("router", ["kmeans", "gradient"])
def test_routing_never_sees_the_state(router: str) -> None:
    model = dynamics(3, 4, router={"kind": router})
    routing = model.router(randn(7, 4, seed=1), TokenInfo())
    assert routing.assignment.load_E.sum() == 7
    assert routing.assignment.token_A.unique().numel() == 7
    with pytest.raises(RuntimeError):  # states have another width
        model.router(randn(7, 2, seed=1), TokenInfo())


def test_kmeans_output_is_unweighted_and_the_gradient_gate_has_a_path() -> None:
    data = linear()
    plain, gated = dynamics(3, 4), dynamics(3, 4, router={"kind": "gradient"})
    context_ED = randn(6, 4, seed=3)
    expert_E = gated.router.experts_of(context_ED)
    gated.losses(context_ED, expert_E, data.y_ENTD, data.t_T).sum().backward()
    (weight,) = gated.router.parameters()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert not list(plain.router.parameters())

    # the field is multiplied by the probability: time runs slower
    slow = gated.router.weights_of(context_ED, expert_E)
    assert slow is not None
    ours = gated(context_ED, expert_E, data.y_ENTD[:, :, 0], data.t_T)[:1]
    same = plain(context_ED[:1], expert_E[:1], data.y_ENTD[:1, :, 0], data.t_T * slow[0])
    assert torch.allclose(ours, same, rtol=1e-10)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_scores_are_every_expert_on_every_environment(adaptation: str) -> None:
    data, model = linear(), dynamics(3, 6, adaptation=adaptation, split_contexts=True)
    randomise(model, std=0.3)
    context_ED = randn(6, 6, seed=1)
    ours = model.scores(context_ED, data.y_ENTD, data.t_T)
    for m in range(3):
        truth = model.losses(context_ED, torch.full((6,), m), data.y_ENTD, data.t_T)
        assert torch.allclose(ours[:, m], truth)
    assert ours.unique().numel() == 18


def test_ranks_hold_their_experts_and_refuse_others() -> None:
    model = dynamics(4, 4, ep=Axis("ep", 1, 2))
    assert model.experts.w0.shape[0] == 2
    context_ED = torch.zeros(1, 4, dtype=torch.float64)
    model.experts.weights(context_ED, torch.tensor([3]))
    for other in (0, 1, 4):
        with pytest.raises(ValueError, match="does not hold its expert"):
            model.experts.weights(context_ED, torch.tensor([other]))
    with pytest.raises(ValueError, match="4 experts do not divide over 3 ranks"):
        dynamics(4, 4, ep=Axis("ep", 0, 3))


def test_relative_error() -> None:
    truth = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).view(2, 1, 1, 2)
    assert relative_error(truth * 1.1, truth).tolist() == pytest.approx([0.01, 0.01])
    assert relative_error(torch.zeros_like(truth), truth).tolist() == [1.0, 1.0]


def test_narrow_or_uneven_contexts_are_refused() -> None:
    with pytest.raises(ValidationError, match="width 8 are too narrow for 10 experts"):
        DynamicsConfig(experts=10, context=8)
    DynamicsConfig.model_validate({"experts": 10, "context": 8, "router": {"kind": "gradient"}})
    with pytest.raises(ValidationError, match="context 10 does not divide by experts 4"):
        DynamicsConfig(experts=4, context=10, split_contexts=True)
