"""Tokens to experts and back: what every exchange offers.

An exchange knows rows, counts and ranks; it knows nothing of routers.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

ExpertFunction = Callable[[Tensor, Tensor], Tensor]
"""(x_AD sorted by local expert, load_E of the local experts, int64) → y_AD."""


class Rows(Protocol):
    """The part of ``coterie.moe.assignment.Assignment`` that an exchange reads."""

    @property
    def token_A(self) -> Tensor:
        """int64: the token of each row."""

    @property
    def expert_A(self) -> Tensor:
        """int64, non-decreasing: the global expert of each row."""

    @property
    def weight_A(self) -> Tensor:
        """float: the combine weight of each row."""

    @property
    def load_E(self) -> Tensor:
        """int64: rows for each global expert."""


class Exchange(Protocol):
    """Sends each row to its expert, and sums the weighted results for each token."""

    @property
    def rank(self) -> int:
        """This rank's place among those that share the experts."""

    @property
    def ranks(self) -> int:
        """R: how many ranks share the experts; each holds E / R, in order."""

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: ExpertFunction) -> Tensor:
        """y_TD = Σ over the token's rows of weight · expert(x). Every rank of the group calls."""
