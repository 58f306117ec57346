"""Simulated environments: their counts, their equations, and that seeds decide them."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from coterie.data.environments import (
    _RECIPES,
    DatasetName,
    EnvironmentsConfig,
    _odebench,
    generate,
)
from coterie.data.systems import ODEBENCH, Family

SHAPES = {
    # dataset: families, environments to train on and to adapt to, trajectories, times, state
    "odebench_2": (2, 10, 10, 4, 20, 2),
    "odebench_10a": (10, 50, 50, 4, 20, 2),
    "odebench_10b": (10, 160, 160, 4, 20, 2),
    "lotka_volterra": (1, 9, 4, 4, 20, 2),
    "glycolytic": (1, 9, 4, 32, 20, 7),
    "selkov": (1, 21, 6, 4, 11, 2),
}


@pytest.mark.parametrize("dataset", SHAPES)
def test_counts(dataset: DatasetName) -> None:
    families, train, adapt, trajectories, times, state = SHAPES[dataset]
    config = EnvironmentsConfig(dataset=dataset)
    for which, environments in (("train", train), ("adapt", adapt)):
        data = generate(config, which)  # type: ignore[arg-type]
        assert data.y_ENTD.shape == (environments, trajectories, times, state)
        assert data.y_ENTD.dtype == torch.float64
        assert data.y_ENTD.isfinite().all()
        assert data.t_T.shape == (times,)
        assert data.t_T[0] == 0
        assert (data.t_T.diff() > 0).all()
        sizes = data.family_E.bincount().tolist()
        assert sizes == [environments // families] * families
        assert len(data.names) == families
    config = EnvironmentsConfig(dataset=dataset, test_trajectories=7)
    assert generate(config, test=True).y_ENTD.shape == (train, 7, times, state)
    assert EnvironmentsConfig().test_trajectories == 32


def test_the_first_times_alone() -> None:
    whole, cut = (generate(EnvironmentsConfig(times=times)) for times in (None, 7))
    assert torch.equal(cut.t_T, whole.t_T[:7])
    assert torch.allclose(cut.y_ENTD, whole.y_ENTD[:, :, :7], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dataset", ["odebench_2", "selkov"])
def test_the_seed_decides_all(dataset: DatasetName) -> None:
    config = EnvironmentsConfig(dataset=dataset)
    np.random.seed(1)
    first = generate(config).y_ENTD
    np.random.seed(2)
    assert torch.equal(generate(config).y_ENTD, first)
    other = generate(config.model_copy(update={"seed": 1})).y_ENTD
    assert not torch.isclose(first[:, :, 0], other[:, :, 0]).any()


def test_training_and_test_share_environments_but_no_trajectory() -> None:
    recipe = _RECIPES["odebench_2"]
    config = EnvironmentsConfig(test_trajectories=4)
    train, test = generate(config), generate(config, test=True)
    assert not torch.isclose(train.y_ENTD[:, :, 0], test.y_ENTD[:, :, 0]).any()
    for data in (train, test):
        _follow_their_equations(data.y_ENTD.numpy(), recipe.parameters("train", 0, 1), 5)


def _follow_their_equations(y_ENTD: np.ndarray, parameters: np.ndarray, first: int) -> None:
    """Each predator–prey trajectory, solved by itself with another method."""
    t_eval = np.linspace(0, 5, 20)
    for environment, (a, b, c, d) in enumerate(parameters):
        for y_TD in y_ENTD[first + environment]:

            def right_side(_: float, y: np.ndarray, a=a, b=b, c=c, d=d) -> list[float]:  # type: ignore[no-untyped-def]
                return [a * y[0] - b * y[0] * y[1], -c * y[1] + d * y[0] * y[1]]

            truth = solve_ivp(right_side, (0, 5), y_TD[0], "RK45", t_eval, rtol=1e-9, atol=1e-11).y
            assert np.abs(y_TD.T - truth).max() < 1e-6


@pytest.mark.parametrize("family", range(10))
def test_parameters_to_adapt_to_are_from_a_wider_range(family: int) -> None:
    recipe = _odebench(10, 16)
    middle = np.array(list(ODEBENCH.values())[family].parameters)
    train, adapt = (
        np.concatenate([recipe.parameters(which, seed, family) / middle for seed in range(40)])
        for which in ("train", "adapt")
    )
    assert 0.9 <= train.min() < 0.91 < 1.09 < train.max() <= 1.1
    assert 0.8 <= adapt.min() < 0.82 < 1.18 < adapt.max() <= 1.2


def test_listed_parameters() -> None:
    def of(dataset: DatasetName, which: str) -> np.ndarray:
        return _RECIPES[dataset].parameters(which, 0, 0)  # type: ignore[arg-type]

    assert sorted(map(tuple, of("lotka_volterra", "train"))) == [
        (a, b) for a in (0.5, 0.75, 1.0) for b in (0.5, 0.75, 1.0)
    ]
    assert set(of("glycolytic", "train")[:, 0]) == {80.0, 90.0, 100.0}
    regimes = of("selkov", "train").reshape(3, 7)
    assert np.allclose(regimes[:, [0, -1]], [[-1, -0.25], [-0.1, 0.1], [0.25, 1]])
    for dataset in ("lotka_volterra", "glycolytic", "selkov"):
        train, adapt = of(dataset, "train"), of(dataset, "adapt")
        assert adapt.max(0)[0] > train.max(0)[0]
        assert not {tuple(row) for row in train} & {tuple(row) for row in adapt}


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        # what each system conserves, from its parameters and state
        ("pendulum", lambda y, c: y[1] ** 2 / 2 - c[0] * np.cos(y[0])),
        ("predator_prey", lambda y, c: c[3] * y[0] - c[2] * np.log(y[0]) + c[1] * y[1]
         - c[0] * np.log(y[1])),
        ("bead_on_hoop", lambda y, c: y[1] ** 2 / 2 - np.sin(y[0]) ** 2 / 2 - c[0] * np.cos(y[0])),
        ("sir", lambda y, c: y[0] + y[1] - c[1] / c[0] * np.log(y[0])),
    ],
)  # fmt: skip
def test_conserved_quantities(name: str, quantity) -> None:  # type: ignore[no-untyped-def]
    data = generate(EnvironmentsConfig(dataset="odebench_10a"))
    index = list(ODEBENCH).index(name)
    parameters = _RECIPES["odebench_10a"].parameters("train", 0, index)
    for y_NTD, c in zip(data.y_ENTD[5 * index : 5 * index + 5].numpy(), parameters, strict=True):
        value_NT = quantity(y_NTD.transpose(2, 0, 1), c)
        assert np.ptp(value_NT, axis=1).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "c", "point"),
    [
        # fixed points worked out by hand
        ("competition", [3.0, 2.0, 2.0], [1.0, 1.0]),
        ("double_well", [0.18], [1.0, 0.0]),
        ("brusselator", [3.0, 1.5], [1.0, 2.0]),
        ("schnakenberg", [0.25, 0.75], [1.0, 0.75]),
        ("damped_oscillator", [4.5, 0.43], [0.0, 0.0]),
        ("van_der_pol", [0.43], [0.0, 0.0]),
    ],
)
def test_fixed_points(name: str, c: list[float], point: list[float]) -> None:
    family: Family = ODEBENCH[name]
    assert np.allclose(family.right_side(np.array(point), np.array(c)), 0)
    nearby = family.right_side(np.add(point, [0.1, 0.05]), np.array(c))
    assert np.abs(nearby).max() > 1e-3


def test_selkov_and_glycolytic_derivatives() -> None:
    selkov = _RECIPES["selkov"].families["selkov"].right_side
    # x' = -x + ay + x²y and y' = b - ay - x²y with a = 0.1
    assert np.allclose(selkov(np.array([2.0, 3.0]), [0.5]), [10.3, 0.5 - 12.3])
    y = np.array([1.0, 0.5, 0.1, 0.2, 0.15, 1.0, 0.05])
    ours = _RECIPES["glycolytic"].families["glycolytic"].right_side(y, [100.0, 1.0])
    by_hand = [-47.5, 100 - 2.55 - 0.9, 2.55 - 4.8, 4.8 - 3 - 1.95, 2.55 - 3 - 0.9]
    by_hand += [-100 + 9.6 - 1.28, 0.195 - 0.09]
    assert np.allclose(ours, by_hand)
