"""Training a mixture of vector fields: proximal alternation, and updates of the gate in between.

MixER, arXiv 2502.05335. The contexts take some steps with the experts fixed, then the experts with
the contexts fixed; a proximal term holds both near where the round began. Adam stands in for the
paper's AdaBelief, which neither torch nor a maintained library has.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.comm.objects import from_rank_zero
from coterie.comm.reduce import sum_over
from coterie.comm.sequence import gather
from coterie.core.config import Config
from coterie.core.random import generator
from coterie.data.environments import Environments
from coterie.models.dynamics import DynamicsModel
from coterie.moe.routers.kmeans import GateUpdate, KMeansRouter
from coterie.parallel.environments import (
    ExpertGrid,
    assert_same,
    gather_rows,
    homes,
    hosts,
    move,
)


class MixerConfig(Config):
    """Proximal alternating training of contexts and experts."""

    rounds: int = Field(default=200, ge=1)
    """Rounds: each the steps of the contexts, then those of the experts."""
    context_steps: int = Field(default=12, ge=0)
    """Steps of the contexts in a round."""
    model_steps: int = Field(default=12, ge=0)
    """Steps of the experts in a round."""
    proximal: float = Field(default=10.0, ge=0)
    """λ: the loss of a step has λ/2 times the mean square of what has changed in the round."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate; the experts' is multiplied by 0.4 after a third and two thirds of the
    rounds."""
    batch: int = Field(default=5, ge=1)
    """Environments of a step: a random one and those with the nearest contexts (L1). The number of
    environments of a family is a good choice."""
    gate_every: int = Field(default=5, ge=1)
    """Steps from one update of a K-means gate, and migration of environments, to the next. A gate
    trained by gradient is asked after every step."""
    adaptation_start: Literal["zero", "centroid"] = "zero"
    """First context of an unseen environment: 0, where all share one expert and may stay with it;
    or that gate centroid from which its loss is lowest."""
    seed: int = 0
    """Of the batches."""


class PlacedEnvironments:
    """Environments, their contexts and experts, spread over the ranks of ``grid``.

    ``context_E`` (E × width), the experts and hosts are known to all ranks; this rank owns
    ``context_H``, the contexts at home here, and holds the trajectories of those it hosts.
    """

    def __init__(self, data: Environments, model: DynamicsModel, grid: ExpertGrid) -> None:
        dtype = next(model.experts.parameters()).dtype
        self.model, self.grid = model, grid
        self.t_T = data.t_T
        self.home_E = homes(len(data.y_ENTD), grid.world)
        self.host_E = self.home_E
        self.expert_E = torch.zeros_like(self.home_E)
        self._y_hosted = data.y_ENTD[self.home_E == grid.world.rank].to(dtype)
        owned = int((self.home_E == grid.world.rank).sum())
        self.context_H = nn.Parameter(torch.zeros(owned, model.config.context, dtype=dtype))
        self.share_contexts()
        self.reroute()

    def share_contexts(self) -> None:
        """Bring every rank's copy of the contexts up to date with their owners'."""
        self.context_E = gather_rows(self.context_H.detach(), self.home_E, self.grid.world)

    @torch.no_grad()
    def set_contexts(self, context_E: Tensor) -> None:
        """Give all environments these contexts; their experts stay until :meth:`reroute`."""
        self.context_H.copy_(context_E[self.home_E == self.grid.world.rank])
        self.share_contexts()

    def reroute(self) -> None:
        """Ask the gate for each environment's expert, and migrate those whose host changes."""
        self.expert_E = self.model.router.experts_of(self.context_E)
        self.migrate()

    def migrate(self) -> None:
        """Move the trajectories of environments to where their experts are."""
        before_E = self.host_E
        self.host_E = hosts(self.expert_E, self.model.config.experts, self.grid)
        self._y_hosted = move(self._y_hosted, before_E, self.host_E, self.grid.world)

    def trajectories(self) -> Tensor:
        """y_ENTD of all environments, on all ranks."""
        return gather_rows(self._y_hosted, self.host_E, self.grid.world)

    def hosted(self, batch_E: Tensor) -> Tensor:
        """int64: the environments of ``batch_E`` (bool) that this rank solves; maybe none."""
        return (batch_E & (self.host_E == self.grid.world.rank)).nonzero()[:, 0]

    def losses(self, chosen_A: Tensor, context_A: Tensor) -> Tensor:
        """The losses of hosted environments ``chosen_A``, given contexts."""
        place_E = (self.host_E == self.grid.world.rank).cumsum(0) - 1
        y_ANTD = self._y_hosted[place_E[chosen_A]]
        return self.model.losses(context_A, self.expert_E[chosen_A], y_ANTD, self.t_T)

    @torch.no_grad()
    def all_losses(self) -> Tensor:
        """loss_E: every environment's loss by its own expert, on all ranks."""
        chosen_A = self.hosted(torch.ones_like(self.home_E, dtype=torch.bool))
        loss_A = self.context_E.new_empty(0)
        if len(chosen_A):
            loss_A = self.losses(chosen_A, self.context_E[chosen_A])
        return gather_rows(loss_A, self.host_E, self.grid.world)

    def scores(self) -> Tensor:
        """loss_EM: every expert on every environment. Each rank scores the experts it holds on all
        environments (its replicas share them), and the columns are gathered."""
        y_ENTD, grid = self.trajectories(), self.grid
        share_A = torch.arange(len(y_ENTD))[grid.replicas.rank :: grid.replicas.size]
        loss_Em = self.context_E.new_zeros(len(y_ENTD), self.model.experts.local)
        if len(share_A):
            loss_Em[share_A] = self.model.scores(self.context_E[share_A], y_ENTD[share_A], self.t_T)
        return gather(sum_over(loss_Em, grid.replicas.group), 1, grid.ep)

    def context_gradients(self, batch_E: Tensor) -> tuple[Tensor, Tensor]:
        """(batch's mean loss, gradient by ``context_H``): gradients return to the owners."""
        chosen_A = self.hosted(batch_E)
        context_A = self.context_E[chosen_A].requires_grad_()
        loss = self.context_E.new_zeros(())
        gradient_A = torch.zeros_like(context_A)
        if len(chosen_A):
            loss = self.losses(chosen_A, context_A).sum() / batch_E.sum()
            (gradient_A,) = torch.autograd.grad(loss, context_A)
        nowhere_E = torch.full_like(self.home_E, -1)
        returned_A = move(
            gradient_A,
            torch.where(batch_E, self.host_E, nowhere_E),
            torch.where(batch_E, self.home_E, nowhere_E),
            self.grid.world,
        )
        gradient_H = torch.zeros_like(self.context_H)
        gradient_H[batch_E[self.home_E == self.grid.world.rank]] = returned_A
        return sum_over(loss, self.grid.world.group), gradient_H


class MixerTrainer:
    """Trains ``model`` on ``data``; every rank of ``grid`` calls every method."""

    def __init__(
        self,
        model: DynamicsModel,
        data: Environments,
        config: MixerConfig,
        grid: ExpertGrid = ExpertGrid(),
    ) -> None:
        self.model, self.config, self.grid = model, config, grid
        self.environments = PlacedEnvironments(data, model, grid)
        self.last_update = GateUpdate("no update yet")
        self.round_updates: list[GateUpdate] = []
        """Those of the gate in the round under way, or in the last one."""
        self.round = self.step = 0
        parameters = list(model.parameters())
        self._model_optimizer = torch.optim.Adam(parameters, config.lr)
        self._context_optimizer = torch.optim.Adam([self.environments.context_H], config.lr)
        routers = sum(p.numel() for p in model.router.parameters())
        experts = sum(p.numel() for p in model.experts.parameters())
        self._numel = experts * grid.ep.size + routers

    @property
    def _gate_every(self) -> int:
        return self.config.gate_every if isinstance(self.model.router, KMeansRouter) else 1

    def optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Adam:
        """The one that steps ``parameter``: the contexts' or the model's."""
        ours = parameter is self.environments.context_H
        return self._context_optimizer if ours else self._model_optimizer

    def train_round(self) -> float:
        """One round; returns the mean loss of its steps' batches."""
        config, losses = self.config, []
        self.round_updates = []
        context = self.environments.context_H.detach().clone()
        parameters = [p.detach().clone() for p in self.model.parameters()]
        third = 3 * self.round // config.rounds
        self._model_optimizer.param_groups[0]["lr"] = config.lr * 0.4 ** min(third, 2)
        for index in range(config.context_steps + config.model_steps):
            batch_E = self.batch()
            if index < config.context_steps:
                losses.append(self._context_step(batch_E, context))
            else:
                losses.append(self._model_step(batch_E, parameters))
            self.step += 1
            if self.step % self._gate_every == 0:
                self.update_gate()
        self.round += 1
        return float(torch.stack(losses).mean())

    def batch(self) -> Tensor:
        """bool: a random environment and those nearest to it, by the L1 distance of contexts."""
        context_E = self.environments.context_E
        draw = generator(self.config.seed, "environment", self.step)
        first = int(torch.randint(len(context_E), (), generator=draw))
        distance_E = (context_E - context_E[first]).abs().sum(1)
        distance_E[first] = -1.0  # among equal contexts, it stays
        # equal ones, as all are at first, in random order: that of the data may tell the families
        order_E = torch.randperm(len(context_E), generator=draw)
        near_A = order_E[distance_E[order_E].argsort(stable=True)[: self.config.batch]]
        return torch.zeros(len(context_E), dtype=torch.bool).index_fill_(0, near_A, True)

    def _context_step(self, batch_E: Tensor, before_H: Tensor) -> Tensor:
        environments = self.environments
        loss, gradient_H = environments.context_gradients(batch_E)
        change_H = environments.context_H.detach() - before_H
        scale = self.config.proximal / environments.context_E.numel()
        environments.context_H.grad = gradient_H + scale * change_H
        self._context_optimizer.step()
        environments.share_contexts()
        return loss

    def _model_step(self, batch_E: Tensor, before: list[Tensor]) -> Tensor:
        """Gradients of experts are summed over their replicas, those of a gate over all ranks."""
        environments, model = self.environments, self.model
        chosen_A = environments.hosted(batch_E)
        model.zero_grad()
        loss = environments.context_E.new_zeros(())
        if len(chosen_A):
            loss = environments.losses(chosen_A, environments.context_E[chosen_A]).sum()
            loss = loss / batch_E.sum()
            loss.backward()
        gates = set(model.router.parameters())
        for parameter, old in zip(model.parameters(), before, strict=True):
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(old)
            group = self.grid.world.group if parameter in gates else self.grid.replicas.group
            change = parameter.detach() - old
            parameter.grad = sum_over(gradient, group) + self.config.proximal / self._numel * change
        self._model_optimizer.step()
        return sum_over(loss, self.grid.world.group)

    def update_gate(self) -> None:
        """Refit a K-means gate, on rank 0, and migrate the environments whose expert changes."""
        environments, router = self.environments, self.model.router
        if isinstance(router, KMeansRouter):
            context_E, loss_EM, world = (
                environments.context_E,
                environments.scores(),
                self.grid.world,
            )
            assert_same(
                "the contexts and losses that the gate is fitted to", world, context_E, loss_EM
            )
            self.last_update, state = from_rank_zero(
                lambda: (router.update(context_E, loss_EM), router.state_dict()), world.group
            )
            router.load_state_dict(state)
            self.round_updates.append(self.last_update)
        assert_same("the gate's weights", self.grid.world, router.weight)
        environments.reroute()

    def adapt(self, data: Environments, steps: int) -> PlacedEnvironments:
        """Contexts for unseen environments, from 0; experts and gate stay as they are."""
        environments = PlacedEnvironments(data, self.model, self.grid)
        if self.config.adaptation_start == "centroid":
            self._start_at_centroids(environments)
        optimizer = torch.optim.Adam([environments.context_H], self.config.lr)
        everyone_E = torch.ones_like(environments.home_E, dtype=torch.bool)
        for step in range(steps):
            _, environments.context_H.grad = environments.context_gradients(everyone_E)
            optimizer.step()
            environments.share_contexts()
            if (step + 1) % self._gate_every == 0 or step + 1 == steps:
                environments.reroute()
        return environments

    def _start_at_centroids(self, environments: PlacedEnvironments) -> None:
        if not isinstance(self.model.router, KMeansRouter) or not self.model.router.fitted:
            raise ValueError("adaptation_start: centroid needs a K-means gate that has converged")
        centroid_MK, losses = self.model.router.centroid_MD, []
        for centroid_K in centroid_MK:
            environments.set_contexts(centroid_K.expand_as(environments.context_E))
            environments.reroute()
            losses.append(environments.all_losses())
        best_E = torch.stack(losses).nan_to_num(nan=math.inf).argmin(0)
        environments.set_contexts(centroid_MK[best_E])
        environments.reroute()

    def evaluate(self, data: Environments, context_E: Tensor | None = None) -> Tensor:
        """Relative error of each environment on other trajectories (by default of those trained
        on), with the contexts that it has."""
        environments = PlacedEnvironments(data, self.model, self.grid)
        environments.set_contexts(self.environments.context_E if context_E is None else context_E)
        environments.reroute()
        return environments.all_losses()
