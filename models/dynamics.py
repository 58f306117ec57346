"""A mixture of neural vector fields, each for a family of dynamical systems (MixER, 2502.05335).

An environment has a context ξ. A gate picks one expert for the whole environment from ξ alone; ξ
then shifts that expert's weights, and a differentiable solver follows the field in time.

Here E counts environments, N trajectories of each, T times, D is the width of the state, M the
number of experts (m of them on this rank), K the width of the context that an expert sees.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.comm.axis import Axis
from coterie.core.config import Config
from coterie.core.random import generator
from coterie.models.ode import Method, solve
from coterie.moe.routers.gradient import GradientConfig, GradientRouter
from coterie.moe.routers.kmeans import KMeansConfig, KMeansRouter

GateConfig = Annotated[KMeansConfig | GradientConfig, Field(discriminator="kind")]
Weights = list[tuple[Tensor, Tensor]]
"""Of each layer: w_EIO and b_EO, an environment's own."""


class DynamicsConfig(Config):
    """A mixture of vector fields. One expert: the plain method that adapts by contexts."""

    experts: int = Field(ge=1)
    """Vector fields."""
    context: int = Field(ge=1)
    """Width of an environment's context."""
    split_contexts: bool = False
    """Each expert sees its own slice of the context, of width context / experts."""
    adaptation: Literal["geps", "coda"] = "geps"
    """How a context shifts the weights: W + A diag(ξ) B (GEPS), or every weight by a linear map of
    ξ (CoDA)."""
    hidden: int = Field(default=32, ge=1)
    """Width of the hidden layers."""
    layers: int = Field(default=2, ge=1)
    """Hidden layers."""
    method: Method = "tsit5"
    """Runge–Kutta method."""
    steps: int = Field(default=1, ge=1)
    """Its steps from each time to the next."""
    router: GateConfig = KMeansConfig()
    """How environments choose experts."""

    @model_validator(mode="after")
    def _contexts(self) -> Self:
        if self.split_contexts and self.context % self.experts:
            raise ValueError(
                f"split_contexts: context {self.context} does not divide by experts {self.experts}"
            )
        if isinstance(self.router, KMeansConfig):
            self.router.check(self.experts, self.context)
        return self

    @property
    def seen(self) -> int:
        """K: the width of the context that an expert sees."""
        return self.context // self.experts if self.split_contexts else self.context


class VectorFields(nn.Module):
    """The experts of this rank, with stacked weights; all M start identical."""

    def __init__(self, state: int, config: DynamicsConfig, ep: Axis, seed: int) -> None:
        super().__init__()
        if config.experts % ep.size:
            raise ValueError(f"{config.experts} experts do not divide over {ep.size} ranks")
        self.config = config
        self.local = config.experts // ep.size
        self.first = ep.rank * self.local
        sizes = [state, *[config.hidden] * config.layers, state]
        for index, (wide, out) in enumerate(pairwise(sizes)):
            self._add(f"w{index}", seed, wide**-0.5, wide, out)
            self._add(f"b{index}", seed, 0.0, out)
            if config.adaptation == "geps":
                self._add(f"into{index}", seed, wide**-0.5, wide, config.seen)
                self._add(f"from{index}", seed, config.seen**-0.5, config.seen, out)
            else:
                std = (wide * config.seen) ** -0.5
                self._add(f"w_shift{index}", seed, std, config.seen, wide, out)
                self._add(f"b_shift{index}", seed, std, config.seen, out)

    def _add(self, name: str, seed: int, std: float, *shape: int) -> None:
        draws = torch.randn(shape, generator=generator(seed, name), dtype=torch.float64) * std
        one = draws.to(torch.get_default_dtype())
        self.register_parameter(name, nn.Parameter(one.expand(self.local, *shape).clone()))

    def weights(self, context_ED: Tensor, expert_E: Tensor) -> Weights:
        """Each environment's own weights; ``expert_E`` are global ids of experts of this rank."""
        local_E = expert_E - self.first
        if bool(((local_E < 0) | (local_E >= self.local)).any()):
            raise ValueError("an environment was sent to a rank that does not hold its expert")
        x_EK = context_ED
        if self.config.split_contexts:
            x_EMK = context_ED.unflatten(1, (self.config.experts, -1))
            x_EK = x_EMK[torch.arange(len(expert_E), device=expert_E.device), expert_E]
        return [self._layer(index, x_EK, local_E) for index in range(self.config.layers + 1)]

    def _layer(self, index: int, x_EK: Tensor, local_E: Tensor) -> tuple[Tensor, Tensor]:
        def of(name: str) -> Tensor:
            return self.get_parameter(f"{name}{index}")[local_E]

        w_EIO, b_EO = of("w"), of("b")
        if self.config.adaptation == "geps":
            return torch.baddbmm(w_EIO, of("into") * x_EK[:, None], of("from")), b_EO
        w_shift_EIO = torch.einsum("ek,ekio->eio", x_EK, of("w_shift"))
        return w_EIO + w_shift_EIO, b_EO + torch.einsum("ek,eko->eo", x_EK, of("b_shift"))


class DynamicsModel(nn.Module):
    """The gate, the same on all ranks, and this rank's experts.

    ``state``: D. ``ep``: the ranks that the experts are spread over.
    """

    def __init__(
        self, state: int, config: DynamicsConfig, ep: Axis = Axis("ep"), seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = VectorFields(state, config, ep, seed)
        self.router: KMeansRouter | GradientRouter
        if isinstance(config.router, KMeansConfig):
            self.router = KMeansRouter(config.context, config.experts, config.router, seed)
        else:
            self.router = GradientRouter(config.context, config.experts, seed)

    def forward(self, context_ED: Tensor, expert_E: Tensor, y_END: Tensor, t_T: Tensor) -> Tensor:
        """y_ENTD: the trajectories from the states ``y_END``, by experts ``expert_E``."""
        weights = self.experts.weights(context_ED, expert_E)
        gate_E = self.router.weights_of(context_ED, expert_E)

        def field(_: float, x_ENI: Tensor) -> Tensor:
            for index, (w_EIO, b_EO) in enumerate(weights):
                x_ENI = F.silu(x_ENI) if index else x_ENI
                x_ENI = torch.baddbmm(b_EO[:, None], x_ENI, w_EIO)
            return x_ENI if gate_E is None else x_ENI * gate_E[:, None, None]

        return solve(field, y_END, t_T, self.config.method, self.config.steps)

    def losses(self, context_ED: Tensor, expert_E: Tensor, y_ENTD: Tensor, t_T: Tensor) -> Tensor:
        """Each environment's :func:`relative_error` from the initial states of ``y_ENTD``."""
        ours_ENTD = self(context_ED, expert_E, y_ENTD[:, :, 0], t_T)
        return relative_error(ours_ENTD, y_ENTD)

    @torch.no_grad()
    def scores(self, context_ED: Tensor, y_ENTD: Tensor, t_T: Tensor) -> Tensor:
        """loss_Em: what each of this rank's experts would lose on each environment."""
        count, local = len(context_ED), self.experts.local
        expert_A = torch.arange(local, device=context_ED.device).repeat(count) + self.experts.first
        each_A = torch.arange(count, device=context_ED.device).repeat_interleave(local)
        losses_A = self.losses(context_ED[each_A], expert_A, y_ENTD[each_A], t_T)
        return losses_A.unflatten(0, (count, local))


def relative_error(ours_ENTD: Tensor, true_ENTD: Tensor) -> Tensor:
    """For each environment the squared error over the square of the truth (relative MSE)."""
    return (ours_ENTD - true_ENTD).square().sum((1, 2, 3)) / true_ENTD.square().sum((1, 2, 3))
