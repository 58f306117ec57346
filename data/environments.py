"""Trajectories of dynamical systems in many environments, drawn from a seed and solved by SciPy.

An environment is a system of equations with parameters of its own. For each dataset there are
environments to train on and others, with parameters from a wider range, to adapt to; and for both,
trajectories to learn from and others to be tested on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy.integrate import solve_ivp
from torch import Tensor

from coterie.core.config import Config
from coterie.core.random import key
from coterie.data.systems import GLYCOLYTIC, LOTKA_VOLTERRA, ODEBENCH, SELKOV, Array, Family

DatasetName = Literal[
    "odebench_2", "odebench_10a", "odebench_10b", "lotka_volterra", "glycolytic", "selkov"
]
Which = Literal["train", "adapt"]
_SCALE = {"train": (0.9, 1.1), "adapt": (0.8, 1.2)}


class EnvironmentsConfig(Config):
    """Simulated environments of dynamical systems."""

    dataset: DatasetName = "odebench_2"
    """Families and how many environments of each: odebench_2 2 × 5, odebench_10a 10 × 5,
    odebench_10b 10 × 16; and one family each, lotka_volterra 9, glycolytic 9, selkov 21."""
    test_trajectories: int = Field(default=32, ge=1)
    """Trajectories of each environment that are held out."""
    times: int | None = Field(default=None, ge=2)
    """Only the first so many times of each trajectory; null: all."""
    seed: int = 0
    """Of parameters and initial states."""


@dataclass(frozen=True)
class Environments:
    """E environments, N trajectories of each, at the same T times; the state has D components."""

    t_T: Tensor
    """float64, increasing from 0."""
    y_ENTD: Tensor
    """float64; at time 0 the initial states."""
    family_E: Tensor
    """int64: the system of equations, from 0."""
    names: tuple[str, ...]
    """Of the families."""


@dataclass(frozen=True)
class _Recipe:
    families: dict[str, Family]
    parameters: Callable[[Which, int, int], Array]
    """(which, seed, family) → parameters of its environments, environments × parameters."""
    horizon: float
    times: int
    trajectories: int


def generate(
    config: EnvironmentsConfig, which: Which = "train", *, test: bool = False
) -> Environments:
    """The environments to train on or to adapt to: their training or ``test`` trajectories.

    The same config gives the same environments, in both; train and test differ in initial states.
    """
    recipe = _RECIPES[config.dataset]
    times = np.linspace(0.0, recipe.horizon, recipe.times)[: config.times]
    trajectories = config.test_trajectories if test else recipe.trajectories
    solved, labels = [], []
    for index, (name, family) in enumerate(recipe.families.items()):
        parameters = recipe.parameters(which, config.seed, index)
        rng = _rng(config.seed, config.dataset, which, "test" if test else "train", name)
        shape = (len(parameters), trajectories, len(family.low))
        solved.append(
            _solve(family, parameters, rng.uniform(family.low, family.high, shape), times)
        )
        labels += [index] * len(parameters)
    return Environments(
        torch.from_numpy(times),
        torch.from_numpy(np.concatenate(solved)),
        torch.tensor(labels),
        tuple(recipe.families),
    )


def _rng(*parts: int | str) -> np.random.Generator:
    return np.random.default_rng(key("environments", *parts))


def _solve(family: Family, parameters: Array, initial: Array, times: Array) -> Array:
    """(environments, trajectories, times, state): all in one system, which SciPy solves at once."""
    c = parameters.T[:, :, None]
    shape = initial.transpose(2, 0, 1).shape

    def right_side(_: float, flat: Array) -> Array:
        y = flat.reshape(shape)
        return np.stack(np.broadcast_arrays(*family.right_side(y, c))).ravel()

    flat = initial.transpose(2, 0, 1).ravel()
    solution = solve_ivp(right_side, (0.0, times[-1]), flat, "DOP853", times, rtol=1e-9, atol=1e-11)
    if not solution.success:
        raise RuntimeError(f"the equations could not be solved: {solution.message}")
    return solution.y.reshape(*shape, len(times)).transpose(1, 2, 3, 0).copy()


def _scaled(families: dict[str, Family], environments: int) -> Callable[[Which, int, int], Array]:
    """Each parameter times a factor of its own: 0.9–1.1, to adapt to 0.8–1.2."""

    def parameters(which: Which, seed: int, family: int) -> Array:
        name = list(families)[family]
        middle = np.array(families[name].parameters)
        rng = _rng(seed, which, "parameters", name, environments)
        return middle * rng.uniform(*_SCALE[which], (environments, len(middle)))

    return parameters


def _listed(train: list[tuple[float, ...]], adapt: list[tuple[float, ...]]) -> Callable[..., Array]:
    return lambda which, seed, family: np.array(train if which == "train" else adapt)


def _odebench(families: int, environments: int) -> _Recipe:
    chosen = dict(list(ODEBENCH.items())[:families])
    return _Recipe(chosen, _scaled(chosen, environments), horizon=5.0, times=20, trajectories=4)


def _selkov_grid() -> list[tuple[float, ...]]:
    """Seven values of b in each regime: below, around and above zero."""
    ranges = ((-1.0, -0.25), (-0.1, 0.1), (0.25, 1.0))
    return [(float(b),) for low, high in ranges for b in np.linspace(low, high, 7)]


_RECIPES: dict[str, _Recipe] = {
    "odebench_2": _odebench(2, 5),
    "odebench_10a": _odebench(10, 5),
    "odebench_10b": _odebench(10, 16),
    "lotka_volterra": _Recipe(
        {"lotka_volterra": LOTKA_VOLTERRA},
        _listed(list(product((0.5, 0.75, 1.0), repeat=2)), list(product((0.625, 1.125), repeat=2))),
        horizon=9.5,
        times=20,
        trajectories=4,
    ),
    "glycolytic": _Recipe(
        {"glycolytic": GLYCOLYTIC},
        _listed(
            list(product((100.0, 90.0, 80.0), (1.0, 0.75, 0.5))),
            list(product((75.0, 105.0), (0.45, 1.05))),
        ),
        horizon=0.95,
        times=20,
        trajectories=32,
    ),
    "selkov": _Recipe(
        {"selkov": SELKOV},
        _listed(_selkov_grid(), [(b,) for b in (-1.25, -0.65, -0.05, 0.02, 0.6, 1.2)]),
        horizon=40.0,
        times=11,
        trajectories=4,
    ),
}
