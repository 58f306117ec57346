"""The Runge–Kutta methods: their order, their gradients, and that trajectories keep apart."""

import math

import pytest
import torch
from torch import Tensor

from coterie.models.ode import TABLEAUS, Method, solve

ORDERS: dict[Method, int] = {"rk4": 4, "tsit5": 5}


@pytest.mark.parametrize("method", TABLEAUS)
def test_tableau_conditions(method: Method) -> None:
    """The order conditions that are sums over b and c, and those of the middle orders."""
    tableau = TABLEAUS[method]
    b, c = tableau.b, tableau.c
    for power in range(ORDERS[method]):
        total = sum(x * y**power for x, y in zip(b, c, strict=True))
        assert total == pytest.approx(1 / (power + 1), abs=1e-12)
    inner = [sum(a * c[j] for j, a in enumerate(row)) for row in tableau.a]
    assert sum(x * y for x, y in zip(b, inner, strict=True)) == pytest.approx(1 / 6, abs=1e-12)


@pytest.mark.parametrize("method", TABLEAUS)
def test_error_falls_with_the_order(method: Method) -> None:
    def field(t: float, y: Tensor) -> Tensor:
        return y * math.cos(t) - y.square() * 0.1 * t  # the time matters

    t_T = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)
    y = torch.tensor([1.0, 0.5], dtype=torch.float64)
    truth = solve(field, y, t_T, method, 512)
    errors = [float((solve(field, y, t_T, method, n) - truth).abs().max()) for n in (8, 16)]
    assert 2 ** (ORDERS[method] - 0.6) < errors[0] / errors[1] < 2 ** (ORDERS[method] + 1.4)


@pytest.mark.parametrize("method", TABLEAUS)
def test_exponential(method: Method) -> None:
    t_T = torch.tensor([1.0, 1.5, 3.0], dtype=torch.float64)  # uneven, not from 0
    y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    ours = solve(lambda _, y: -y, y, t_T, method, 20)
    assert ours.shape == (2, 3, 1)
    assert torch.allclose(ours[..., 0], y * (1 - t_T).exp(), atol=1e-6)


@pytest.mark.parametrize("method", TABLEAUS)
def test_gradients_by_finite_differences(method: Method) -> None:
    a = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    t_T = torch.linspace(0, 1, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, y: solve(lambda _, y: torch.tanh(y @ a), y, t_T, method, 2), (a, y)
    )


@pytest.mark.parametrize("method", TABLEAUS)
def test_a_trajectory_does_not_depend_on_its_company(method: Method) -> None:
    y = torch.tensor([[1.0], [50.0]], dtype=torch.float64)
    t_T = torch.linspace(0, 1, 4, dtype=torch.float64)

    def field(_: float, y: Tensor) -> Tensor:
        return -y.square()

    together, alone = solve(field, y, t_T, method), solve(field, y[:1], t_T, method)
    assert torch.equal(together[:1], alone)
