"""What a router is: from activations to an assignment; and what its config can do."""

from typing import NamedTuple

from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.core.config import Config
from coterie.moe.assignment import Assignment
from coterie.moe.stats import RoutingStats
from coterie.moe.tokens import TokenInfo


class Routing(NamedTuple):
    """A router's answer for one micro-batch."""

    assignment: Assignment
    losses: dict[str, Tensor]
    """Scalars to add to the training loss, each this rank's share, its coefficient applied."""
    stats: RoutingStats
    foresight: tuple[Tensor, ...] = ()
    """How well auxiliary routers foresaw the choice, where they did not make it
    (:func:`coterie.moe.routers.auxiliary.foresight`)."""


class Router(nn.Module):
    """Base class. Subclasses say, for T tokens of width D, which rows go to which expert.

    Parameters are initialised by name: those called ``bias`` to zero, others normal with standard
    deviation 0.02. One with ``requires_grad=False`` is frozen: it is placed, stored and hashed
    like any other, but has no gradient and no optimizer state.
    """

    def state(self, x_TD: Tensor, info: TokenInfo) -> Tensor | None:
        """What the router of the next layer is told (T, R), and this one's ``forward`` too, as
        ``info.router_state_TR``. None: nothing."""
        return None

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        """Route ``x_TD`` (float, T × D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def updates(self, load_E: Tensor) -> dict[str, Tensor]:
        """What to add to frozen parameters after a step, by name: whole tensors, on the CPU.

        ``load_E``: rows that each expert had in the step, of all micro-batches and ranks. It must
        not look at the parameters, of which a rank may hold a part.
        """
        return {}


class BaseRouterConfig(Config):
    """What every router's config can do, beside its settings and its ``kind``."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that the router returns in training."""
        return ()

    @property
    def causal(self) -> bool:
        """Whether in evaluation a token's experts do not depend on the tokens after it. If they do,
        the loss is not that of a model that can generate."""
        return True

    @property
    def foresees(self) -> bool:
        """Whether it has auxiliary routers, which are trained to foresee its choices."""
        return False

    @property
    def sees_activations(self) -> bool:
        """Whether what it does depends on the activations that it is given."""
        return True

    @property
    def carried(self) -> int:
        """Width R of what the next layer's router takes over for each token; 0: nothing."""
        return 0

    @property
    def rows_per_token(self) -> float:
        """Experts that a token goes to, on average."""
        raise NotImplementedError(f"{type(self).__name__} must define rows_per_token")

    @property
    def weight_sum(self) -> float | None:
        """What the combine weights of a token that is not dropped sum to; None: it varies."""
        return None

    def check(self, num_experts: int) -> None:
        """Raise ``ValueError`` when ``num_experts`` experts cannot be routed like this."""

    def check_k(self, k: int, num_experts: int) -> None:
        """Raise ``ValueError`` when the router cannot take ``k`` experts for each token, as
        ``TokenInfo.k`` asks."""
        raise ValueError("this router has no k: the number of experts of a token cannot be chosen")

    def k_at(self, step: int, steps: int) -> int | None:
        """``TokenInfo.k`` for the step that follows ``step`` finished ones, of ``steps`` in all."""
        return None

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        """The router of a layer of ``width`` spread over ``axes``; parameters uninitialised."""
        raise NotImplementedError(f"{type(self).__name__} must define build")


class TokenChoiceConfig(BaseRouterConfig):
    """Of routers by which each token has k of all experts."""

    def check_k(self, k: int, num_experts: int) -> None:
        if not 1 <= k <= num_experts:
            raise ValueError(f"k {k} must be from 1 to the number of experts, {num_experts}")
