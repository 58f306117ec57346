"""Families of ordinary differential equations: right-hand sides, parameters, initial states.

Two-dimensional systems of ODEBench (arXiv 2310.05573), written as there, and the three systems
that adaptation methods are compared on: Lotka–Volterra and the glycolytic oscillator (CoDA,
arXiv 2202.01889), Sel'kov's model (NCF, arXiv 2405.02154).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RightSide = Callable[[Any, Any], list[Any]]
"""(states, parameters) → derivatives, each a list of arrays that broadcast together."""


@dataclass(frozen=True)
class Family:
    """One system of equations; environments differ in its parameters."""

    right_side: RightSide
    parameters: tuple[float, ...]
    """The parameters that environments scale; none where they are listed one by one."""
    low: tuple[float, ...]
    """Initial states are uniform between ``low`` and ``high``."""
    high: tuple[float, ...]


def _damped_oscillator(y: Any, c: Any) -> list[Any]:
    return [y[1], -c[0] * y[0] - c[1] * y[1]]


def _competition(y: Any, c: Any) -> list[Any]:
    return [y[0] * (c[0] - y[0] - c[1] * y[1]), y[1] * (c[2] - y[0] - y[1])]


def _predator_prey(y: Any, c: Any) -> list[Any]:
    return [y[0] * (c[0] - c[1] * y[1]), -y[1] * (c[2] - c[3] * y[0])]


def _pendulum(y: Any, c: Any) -> list[Any]:
    return [y[1], -c[0] * np.sin(y[0])]


def _double_well(y: Any, c: Any) -> list[Any]:
    return [y[1], y[0] - y[0] ** 3 - c[0] * y[1]]


def _bead_on_hoop(y: Any, c: Any) -> list[Any]:
    return [y[1], (np.cos(y[0]) - c[0]) * np.sin(y[0])]


def _van_der_pol(y: Any, c: Any) -> list[Any]:
    return [y[1], -y[0] - c[0] * y[1] * (y[0] ** 2 - 1)]


def _sir(y: Any, c: Any) -> list[Any]:
    infected = c[0] * y[0] * y[1]
    return [-infected, infected - c[1] * y[1]]


def _brusselator(y: Any, c: Any) -> list[Any]:
    reaction = c[1] * y[0] ** 2 * y[1]
    return [1 - (c[0] + 1) * y[0] + reaction, c[0] * y[0] - reaction]


def _schnakenberg(y: Any, c: Any) -> list[Any]:
    reaction = y[0] ** 2 * y[1]
    return [c[0] - y[0] + reaction, c[1] - reaction]


def _glycolytic(y: Any, c: Any) -> list[Any]:
    """Seven species; the environments differ in k1 and K1."""
    k1, big_k1 = c
    rate = k1 * y[0] * y[5] / (1 + (y[5] / big_k1) ** 4)
    oxidised, exchanged = 6.0 * y[1] * (1.0 - y[4]), 13.0 * (y[3] - y[6])
    reduced, used = 16.0 * y[2] * (4.0 - y[5]), 12.0 * y[1] * y[4]
    converted = 100.0 * y[3] * y[4]
    return [
        2.5 - rate,
        2 * rate - oxidised - used,
        oxidised - reduced,
        reduced - converted - exchanged,
        oxidised - converted - used,
        -2 * rate + 2 * reduced - 1.28 * y[5],
        0.1 * exchanged - 1.8 * y[6],
    ]


def _selkov(y: Any, c: Any) -> list[Any]:
    reaction = 0.1 * y[1] + y[0] ** 2 * y[1]
    return [reaction - y[0], c[0] - reaction]


ODEBENCH = {
    "van_der_pol": Family(_van_der_pol, (0.43,), (-2.0, -2.0), (2.0, 2.0)),
    "predator_prey": Family(_predator_prey, (1.84, 1.45, 3.0, 1.62), (1.0, 0.5), (3.0, 2.0)),
    "damped_oscillator": Family(_damped_oscillator, (4.5, 0.43), (-1.0, -1.0), (1.0, 1.0)),
    "competition": Family(_competition, (3.0, 2.0, 2.0), (0.5, 0.5), (3.0, 3.0)),
    "pendulum": Family(_pendulum, (0.9,), (-2.0, -1.0), (2.0, 1.0)),
    "double_well": Family(_double_well, (0.18,), (-1.5, -1.0), (1.5, 1.0)),
    "bead_on_hoop": Family(_bead_on_hoop, (0.93,), (-2.0, -1.0), (2.0, 1.0)),
    "sir": Family(_sir, (0.4, 0.314), (4.0, 0.3), (8.0, 1.5)),
    "brusselator": Family(_brusselator, (3.03, 3.1), (0.5, 0.5), (2.0, 2.0)),
    "schnakenberg": Family(_schnakenberg, (0.24, 1.43), (0.2, 0.2), (2.0, 2.0)),
}
"""By name. Their order counts: smaller sets of families are the first of them."""

LOTKA_VOLTERRA = Family(
    lambda y, c: _predator_prey(y, [0.5, c[0], 0.5, c[1]]), (), (1.0, 1.0), (3.0, 3.0)
)
GLYCOLYTIC = Family(
    _glycolytic,
    (),
    (0.15, 0.19, 0.04, 0.10, 0.08, 0.14, 0.05),
    (1.60, 2.16, 0.20, 0.35, 0.30, 2.67, 0.10),
)
SELKOV = Family(_selkov, (), (0.0, 0.0), (3.0, 3.0))
