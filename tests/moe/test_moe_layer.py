"""The layer as a whole, on one process: plain loops, symmetries, zeros and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from coterie.moe.activations import ActivationName
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import error, randn, randomise, tiny_layer

T, D, E = 10, 6, 4
ACTIVATIONS: tuple[ActivationName, ...] = ("swiglu", "gelu", "relu2", "reglu")


def feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """One expert, with autograd's own derivatives; ``w_in`` is H × D."""
    h = x @ w_in.t()
    if activation in ("swiglu", "reglu"):
        half = h.shape[-1] // 2
        gate, up = h[..., :half], h[..., half:]
        gate = gate * torch.sigmoid(gate) if activation == "swiglu" else F.relu(gate)
        return (gate * up) @ w_out
    if activation == "gelu":
        return (h * 0.5 * (1 + torch.erf(h / 2**0.5))) @ w_out
    return F.relu(h) ** 2 @ w_out


def plain_layer(layer: MoELayer, x_TD: Tensor, activation: str, k: int) -> Tensor:
    """Softmax, the k best renormalised, one token and one expert at a time."""
    outputs = []
    for x in x_TD:
        prob = (layer.router.weight @ x).softmax(0)
        best = prob.argsort(descending=True)[:k]
        y = torch.zeros_like(x)
        for e in best.tolist():
            w_in, w_out = layer.experts.w_in_EPFD[e].flatten(0, 1), layer.experts.w_out_EFD[e]
            y = y + prob[e] / prob[best].sum() * feed_forward(x, w_in, w_out, activation)
        if layer.shared is not None:
            w_in, w_out = layer.shared.w_in_PFD.flatten(0, 1), layer.shared.w_out_FD
            own = feed_forward(x, w_in, w_out, activation)
            if layer.shared_gate_D is not None:
                own = own * torch.sigmoid(layer.shared_gate_D @ x)
            y = y + own
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shared", [None, "plain", "gated"])
def test_output_and_gradients_equal_plain_loops(
    activation: ActivationName, shared: str | None
) -> None:
    layer = tiny_layer(
        TopKConfig(k=3),
        activation=activation,
        shared=3 if shared else None,
        shared_gate=shared == "gated",
    )
    x_TD = randn(T, D, seed=1).requires_grad_()
    leaves = [x_TD, *layer.parameters()]
    y_TD = layer(x_TD.view(2, 5, D)).y
    truth_TD = plain_layer(layer, x_TD, activation, 3)
    assert y_TD.shape == (2, 5, D)
    assert error(y_TD.view(T, D), truth_TD) < 1e-13
    dy_TD = randn(T, D, seed=2)
    ours = torch.autograd.grad(y_TD, leaves, dy_TD.view(2, 5, D))
    for own, true in zip(ours, torch.autograd.grad(truth_TD, leaves, dy_TD), strict=True):
        assert error(own, true) < 1e-12


def test_permuting_tokens_permutes_outputs() -> None:
    layer = tiny_layer(TopKConfig(k=2, capacity_factor=0.6, drop="score"), shared=3).train()
    x_TD = randn(T, D, seed=3)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    plain, permuted = layer(x_TD), layer(x_TD[order])
    assert int(plain.stats.dropped_E.sum()) > 0
    assert error(permuted.y, plain.y[order]) < 1e-13
    for name, loss in plain.losses.items():
        assert error(permuted.losses[name], loss) < 1e-13


def test_renaming_experts_changes_nothing_but_the_order_of_loads() -> None:
    layer = tiny_layer(TopKConfig(k=2)).train()
    x_TD = randn(T, D, seed=4)
    plain = layer(x_TD)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (layer.router.weight, *layer.experts.parameters()):
            parameter.copy_(parameter[order].clone())
    renamed = layer(x_TD)
    assert error(renamed.y, plain.y) < 1e-13
    assert torch.equal(renamed.stats.load_E, plain.stats.load_E[order])


@pytest.mark.parametrize("shared", [None, 3])
def test_tokens_without_a_row_get_exactly_the_shared_experts_output(shared: int | None) -> None:
    layer = tiny_layer(TopKConfig(k=1, capacity_factor=0.5, renormalise=False), shared=shared)
    x_TD = randn(T, D, seed=5).requires_grad_()
    padding_T = torch.zeros(T, dtype=torch.bool)
    padding_T[[0, 4]] = True
    info = TokenInfo(padding_T=padding_T)
    rows = layer.router(x_TD, info).assignment
    unrouted = torch.ones(T, dtype=torch.bool)
    unrouted[rows.token_A] = False
    assert int(unrouted.sum()) > 2  # padding and drops
    y_TD = layer(x_TD, info).y
    own_TD = torch.zeros_like(x_TD) if layer.shared is None else layer.shared(x_TD)
    assert torch.equal(y_TD[unrouted], own_TD[unrouted])
    assert y_TD[~unrouted].ne(own_TD[~unrouted]).any(1).all()
    (dx_TD,) = torch.autograd.grad(y_TD.sum(), x_TD)
    if shared is None:
        assert not dx_TD[unrouted].any()
    assert dx_TD[~unrouted].any(1).all()


def _crowded(activation: ActivationName, **router: Any) -> tuple[MoELayer, Tensor]:
    """Expert 0 gets every token, expert 1 none."""
    config = TopKConfig.model_validate({"k": 2, "balance_loss": 0.3, "z_loss": 0.2, **router})
    layer = tiny_layer(config, activation=activation, shared=3, shared_gate=True).train()
    x_TD = randn(T, D, seed=6)
    x_TD[:, 0] = 1.0
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.tensor([4.0, -4.0, 0.0, 0.0])
    load = layer(x_TD).stats.load_E.tolist()
    assert load[0] == T
    assert load[1] == 0
    return layer, x_TD


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "router", [{}, {"score": "sigmoid", "scale": 2.5}, {"renormalise": False}], ids=str
)
def test_gradients_by_finite_differences(
    activation: ActivationName, router: dict[str, Any]
) -> None:
    layer, x_TD = _crowded(activation, **router)
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def outputs(x_TD: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        out = functional_call(layer, dict(zip(names, parameters, strict=True)), (x_TD,))
        return out.y, *out.losses.values()

    assert torch.autograd.gradcheck(outputs, (x_TD.requires_grad_(), *values))


def test_an_expert_without_rows_has_a_zero_gradient() -> None:
    layer, x_TD = _crowded("swiglu")
    layer(x_TD).y.sum().backward()
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        assert not weight.grad[1].any()
        assert weight.grad[0].any()


def test_no_tokens_at_all() -> None:
    layer = tiny_layer(TopKConfig(k=2, capacity_factor=1.0), shared=3).train()
    x_TD = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    out = layer(x_TD)
    assert out.y.shape == (0, D)
    (out.y.sum() + sum(out.losses.values())).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputed_hidden_activations_change_no_bit(activation: ActivationName) -> None:
    config = MoEConfig.model_validate(
        {
            "experts": {"count": E, "hidden": 5, "activation": activation},
            "shared": {"hidden": 3, "activation": activation},
        }
    )
    results = []
    for recompute in (False, True):
        layer = MoELayer(D, config, recompute=recompute).double()
        randomise(layer)
        x_TD = randn(T, D, seed=8).requires_grad_()
        kept: list[Tensor] = []

        def keep(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y_TD = layer(x_TD).y
        hidden = {parts * width for parts in (1, 2) for width in (3, 5)} - {D}
        wide = [x for x in kept if x.dim() == 2 and x.shape[1] in hidden and x.is_floating_point()]
        assert bool(wide) != recompute
        dy_TD = randn(T, D, seed=9)
        results.append([y_TD, *torch.autograd.grad(y_TD, [x_TD, *layer.parameters()], dy_TD)])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
