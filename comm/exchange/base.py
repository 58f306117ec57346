"""Tokens to experts and back: what every exchange offers.

An exchange knows rows, counts and ranks; it knows nothing of routers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from coterie.comm.exchange.fused.waits import Waits
from coterie.comm.exchange.meter import Meter


class ExpertFunction(Protocol):
    """The local experts, in one call; differentiable."""

    def __call__(self, x_AD: Tensor, load_E: Tensor, /) -> Tensor:
        """``x_AD`` sorted by local expert, ``load_E`` int64 rows for each → y_AD."""


class Sums(Protocol):
    """Gradients of weights, summed over pieces in the order in which they are added."""

    def add(self, piece: Any, /) -> None:
        """Add what a piece contributes."""

    def to(self, dtype: torch.dtype, /) -> Sequence[Tensor | None]:
        """The gradient of each weight; None: not needed."""


class Run(Protocol):
    """Some rows of one expert, in one of the passes."""

    @property
    def rows(self) -> slice:
        """Which rows."""


class Hidden(Run, Protocol):
    """Their hidden activations."""

    @property
    def h_AH(self) -> Tensor:
        """What :meth:`Passes.hidden_gradients` likes to be given."""


class HiddenGradient(Run, Protocol):
    """The gradient of these."""

    @property
    def dweight_A(self) -> Tensor | None:
        """Gradient of the rows' weights, where they have any."""


class Passes(Protocol):
    """Forward and backward pass of the local experts in parts, without autograd."""

    def forward(self, x_AD: Tensor, load: list[int], keep: bool, /) -> tuple[Tensor, list[Tensor]]:
        """(y_AD, with ``keep`` the ``h_AH`` of each run)."""

    def hidden(self, x_AD: Tensor, load: list[int], /) -> Iterator[Hidden]:
        """Of rows sorted by local expert, ``load`` for each."""

    def result(self, part: Any, columns: slice, /) -> Tensor:
        """Columns of y of its rows."""

    def hidden_gradients(
        self,
        dy_AD: Tensor,
        x_AD: Tensor,
        load: list[int],
        kept: list[Tensor],
        weight_A: Tensor | None,
        /,
    ) -> Iterator[HiddenGradient]:
        """Of the same runs. ``kept``: ``h_AH`` of each, or nothing."""

    def row_gradient(self, part: Any, columns: slice, /) -> Tensor:
        """Columns of dx of its rows."""

    def weight_sums(self, needs: Sequence[bool], dtype: torch.dtype, /) -> Sums:
        """Empty sums; each local expert is to have at least one part, which may be empty."""


class SplitExperts(ExpertFunction, Protocol):
    """The local experts, in one call or piece by piece."""

    @property
    def activation(self) -> str:
        """Of their hidden activations, by name."""

    @property
    def keeps(self) -> bool:
        """Whether first products are kept for the backward pass."""

    def weights(self) -> tuple[Tensor, ...]:
        """What they are differentiated by, in the dtype they compute with."""

    def passes(self, *weights: Tensor) -> Passes:
        """With what :meth:`weights` gave."""


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

    @property
    def meters(self) -> Sequence[Meter]:
        """What it takes is counted in, for each group of ranks that it exchanges between."""

    @property
    def waits(self) -> Sequence[Waits]:
        """What its launches note of ranks that come late, where it has such launches."""

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: SplitExperts) -> Tensor:
        """y_TD = Σ over the token's rows of weight · expert(x). Every rank of the group calls."""
