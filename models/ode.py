"""Explicit Runge–Kutta methods with fixed steps, on tensors: differentiable by autograd.

The steps are fixed so that a trajectory does not depend on those solved beside it: an adaptive step
that a whole batch agrees on would change with the layout, and with who is in the batch.
``benchmarks/ode.py`` measures both methods against torchdiffeq's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Method = Literal["rk4", "tsit5"]
Field = Callable[[float, Tensor], Tensor]
"""(time, y) → dy/dt, of the shape of y."""


@dataclass(frozen=True)
class Tableau:
    """Butcher's: stage i is at time c_i from Σ a_ij of the stages before; the step is Σ b_i."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    @property
    def c(self) -> tuple[float, ...]:
        """When each stage is, in steps."""
        return tuple(sum(row) for row in self.a)


TABLEAUS: dict[Method, Tableau] = {
    "rk4": Tableau(a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    # Tsitouras 2011, the fifth-order solution
    "tsit5": Tableau(
        a=(
            (),
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (
                5.86145544294642,
                -12.92096931784711,
                8.159367898576159,
                -0.071584973281401,
                -0.028269050394068383,
            ),
        ),
        b=(
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
}


def solve(field: Field, y: Tensor, t_T: Tensor, method: Method = "tsit5", steps: int = 1) -> Tensor:
    """y at the times ``t_T`` (the first is that of ``y``), stacked along a new last-but-one dim.

    ``steps``: equal steps from each time to the next.
    """
    tableau = TABLEAUS[method]
    states = [y]
    for start, end in pairwise(t_T.tolist()):
        h = (end - start) / steps
        for index in range(steps):
            y = _step(field, start + index * h, y, h, tableau)
        states.append(y)
    return torch.stack(states, -2)


def _step(field: Field, t: float, y: Tensor, h: float, tableau: Tableau) -> Tensor:
    stages: list[Tensor] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        stages.append(field(t + c * h, _advanced(y, h, row, stages)))
    return _advanced(y, h, tableau.b, stages)


def _advanced(y: Tensor, h: float, weights: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    """y + h · Σ weight · stage."""
    terms = [weight * stage for weight, stage in zip(weights, stages, strict=True) if weight]
    return y + h * sum(terms[1:], terms[0]) if terms else y
