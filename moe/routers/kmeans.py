"""Top-1 gating of whole environments, by K-means and least squares (MixER, arXiv 2502.05335).

The "tokens" are environments, each known by its context, never by its state. No gradient reaches
the gate: it is refitted from clusters of the contexts and from the experts' losses.

Here E counts environments, M experts (and clusters), D is the width of a context.
"""

import warnings
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coterie.core.config import Config
from coterie.core.random import generator
from coterie.moe.assignment import count, from_choices, kept
from coterie.moe.routers.base import Router, Routing
from coterie.moe.stats import RoutingStats
from coterie.moe.tokens import TokenInfo


class KMeansConfig(Config):
    """One expert for each cluster of environments."""

    kind: Literal["kmeans"] = "kmeans"
    """Which router."""
    iterations: int = Field(default=20, ge=1)
    """Most iterations of K-means in one update of the gate."""
    tolerance: float = Field(default=1e-4, ge=0)
    """K-means has converged when no coordinate of a centroid moves by more."""
    start: Literal["origin", "spread"] = "origin"
    """First centroids: uniform in ±0.001 (the paper's; suits contexts that are still near 0), or
    contexts far from each other (finds many clusters that lie far apart)."""
    noise: float = Field(default=1e-4, ge=0)
    """Standard deviation of what is added to the contexts before the least squares."""
    narrow_contexts: bool = False
    """Accept contexts narrower than experts - 1, where a linear gate may miss whole clusters."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that the router returns in training: none."""
        return ()

    def check(self, num_experts: int, width: int) -> None:
        """Raise ``ValueError`` when contexts of ``width`` are too narrow for a linear gate."""
        if width < num_experts - 1 and not self.narrow_contexts:
            raise ValueError(
                f"contexts of width {width} are too narrow for {num_experts} experts: least "
                f"squares on one-hot targets needs a width of at least {num_experts - 1} (or "
                "narrow_contexts: true, which only warns when environments are misrouted)"
            )


class GateUpdate(NamedTuple):
    """What an update of the gate did."""

    reason: str
    """Why the weights were left alone; empty when they were refitted."""
    expert_E: Tensor | None = None
    """int64: the expert that each environment's cluster was given."""
    accuracy: float = float("nan")
    """Fraction of environments that the refitted gate sends to that expert."""


class KMeansRouter(Router):
    """Logits [ξ, 1]·W; the one largest wins, and the output is not weighted.

    ``seed`` decides the first W, the first centroids and the noise; nothing else is random.
    """

    weight: Tensor
    centroid_MD: Tensor
    warm: Tensor
    attempts: Tensor

    def __init__(self, width: int, num_experts: int, config: KMeansConfig, seed: int = 0) -> None:
        super().__init__()
        config.check(num_experts, width)
        self.config, self.num_experts, self.seed = config, num_experts, seed
        bound = (width + 1) ** -0.5
        first = _uniform(bound, width + 1, num_experts, seed, "weight")
        # buffers: no gradient ever reaches them, but a checkpoint holds them
        self.register_buffer("weight", first.to(torch.get_default_dtype()))
        self.register_buffer("centroid_MD", self.weight.new_zeros(num_experts, width))
        self.register_buffer("warm", torch.tensor(False))
        self.register_buffer("attempts", torch.tensor(0))

    @property
    def fitted(self) -> bool:
        """Whether an update has ever succeeded: the centroids are those of the last that did."""
        return bool(self.warm) or bool(self.centroid_MD.any())

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        """Route contexts ``x_TD``. Of equal logits the first expert wins: never more than one."""
        expert_T1 = self.experts_of(x_TD)[:, None]
        keep_T1 = kept(expert_T1, info.padding_T)
        weight_T1 = torch.ones_like(expert_T1, dtype=x_TD.dtype)
        assignment = from_choices(expert_T1, weight_T1, self.num_experts, keep_T1)
        load_E = assignment.load_E
        stats = RoutingStats(load_E, torch.zeros_like(load_E), load_E.sum(), x_TD.new_zeros(()))
        return Routing(assignment, {}, stats)

    def weights_of(self, context_ED: Tensor, expert_E: Tensor) -> Tensor | None:
        """What the outputs of ``expert_E`` are multiplied by: nothing."""
        return None

    def experts_of(self, context_ED: Tensor) -> Tensor:
        """int64: the expert of each context. One context gives one answer, in every batch."""
        with torch.no_grad():
            weight = self.weight.to(torch.float64)
            logits_EM = context_ED.to(torch.float64) @ weight[:-1] + weight[-1]
            return logits_EM.argmax(-1)

    @torch.no_grad()
    def update(self, context_ED: Tensor, loss_EM: Tensor) -> GateUpdate:
        """Refit W to the clusters of ``context_ED``, given each expert's loss on each environment.

        An empty cluster, or centroids that still move after the last iteration, leave W and the
        centroids of the last success alone: a later call tries again from others than these.
        """
        context_ED = context_ED.detach().to(self.centroid_MD.dtype)
        clusters = kmeans(
            context_ED,
            self._first_centroids(context_ED),
            self.config.iterations,
            self.config.tolerance,
        )
        attempt = int(self.attempts)
        self.attempts += 1
        self.warm.fill_(not clusters.failure)
        if clusters.failure:
            return GateUpdate(clusters.failure)
        self.centroid_MD.copy_(clusters.centroid_MD)
        expert_E = experts_of_clusters(clusters.cluster_E, loss_EM)[clusters.cluster_E]

        noise = torch.randn(
            context_ED.shape, generator=generator(self.seed, "noise", attempt), dtype=torch.float64
        )
        noisy_ED = context_ED + self.config.noise * noise.to(context_ED)
        self.weight.copy_(least_squares(noisy_ED, expert_E, self.num_experts))
        accuracy = float((self.experts_of(context_ED) == expert_E).double().mean())
        if accuracy < 1 and context_ED.shape[1] < self.num_experts - 1:
            warnings.warn(
                f"the gate sends only {accuracy:.0%} of the environments to their cluster's expert:"
                f" contexts of width {context_ED.shape[1]} are too narrow for {self.num_experts}"
                f" experts (at least {self.num_experts - 1})",
                stacklevel=2,
            )
        return GateUpdate("", expert_E, accuracy)

    def _first_centroids(self, context_ED: Tensor) -> Tensor:
        if self.warm:
            return self.centroid_MD
        if self.config.start == "spread":
            return spread(context_ED, self.num_experts)
        shape = self.centroid_MD.shape
        return _uniform(1e-3, *shape, self.seed, "centroids", int(self.attempts)).to(context_ED)


class Clusters(NamedTuple):
    """Centroids (M × D), the cluster of each row, and why they are of no use (empty: they are)."""

    centroid_MD: Tensor
    cluster_E: Tensor
    failure: str


def kmeans(x_ED: Tensor, centroid_MD: Tensor, iterations: int, tolerance: float) -> Clusters:
    """K-means with the nearest centroid by L1 distance, and means as the new ones.

    Converging on the last permitted iteration counts.
    """
    clusters = centroid_MD.shape[0]
    for _ in range(iterations):
        # plain sums, not cdist: it may round otherwise in another layout
        cluster_E = (x_ED[:, None] - centroid_MD).abs().sum(-1).argmin(1)
        size_M = count(cluster_E, clusters)
        if not size_M.all():
            return Clusters(centroid_MD, cluster_E, "a cluster is empty")
        total_MD = torch.zeros_like(centroid_MD).index_add_(0, cluster_E, x_ED)
        before_MD, centroid_MD = centroid_MD, total_MD / size_M[:, None]
        if (centroid_MD - before_MD).abs().max() <= tolerance:
            return Clusters(centroid_MD, cluster_E, "")
    return Clusters(centroid_MD, cluster_E, f"K-means did not converge in {iterations} iterations")


def spread(x_ED: Tensor, clusters: int) -> Tensor:
    """The first row, then again and again the row farthest (L1) from those taken."""
    chosen = [0]
    distance_EE = (x_ED[:, None] - x_ED).abs().sum(-1)
    while len(chosen) < clusters:
        chosen.append(int(distance_EE[chosen].amin(0).argmax()))
    return x_ED[chosen].clone()


def experts_of_clusters(cluster_E: Tensor, loss_EM: Tensor) -> Tensor:
    """int64 expert of each cluster, each expert once: the least sum of median losses.

    The losses are compared in single precision: experts that start alike must tie in every layout,
    whatever the last bits of their losses.
    """
    medians = []
    for cluster in range(loss_EM.shape[1]):
        members_EM = loss_EM[cluster_E == cluster].to(torch.float64)
        medians.append(members_EM.quantile(0.5, dim=0))
    cost_MM = torch.stack(medians).float().cpu().nan_to_num(nan=1e30, posinf=1e30).clamp(max=1e30)
    _, expert_M = linear_sum_assignment(cost_MM.double().numpy())
    return torch.from_numpy(expert_M).to(cluster_E)


def routing_accuracy(expert_E: Tensor, family_E: Tensor) -> float:
    """Fraction of environments that are where their family belongs, when each family is given the
    expert (an expert one family at most) that suits all best."""
    families, experts = int(family_E.max()) + 1, int(expert_E.max()) + 1
    together = count(family_E * experts + expert_E, families * experts)
    together_FM = together.view(families, experts).cpu().numpy()
    rows, columns = linear_sum_assignment(together_FM, maximize=True)
    return float(together_FM[rows, columns].sum() / len(family_E))


def least_squares(x_ED: Tensor, expert_E: Tensor, num_experts: int) -> Tensor:
    """W (D + 1 × M) that brings [x, 1]·W nearest to the one-hot rows of ``expert_E``.

    By the pseudo-inverse: with fewer environments than D + 1 it is the smallest such W.
    """
    x1_ED = torch.cat([x_ED, torch.ones_like(x_ED[:, :1])], 1).double()
    target_EM = torch.nn.functional.one_hot(expert_E, num_experts).double()
    return (torch.linalg.pinv(x1_ED) @ target_EM).to(x_ED.dtype)


def _uniform(bound: float, rows: int, columns: int, *parts: int | str) -> Tensor:
    """float64 uniform in ±bound, keyed by ``parts``."""
    draws = torch.rand(rows, columns, generator=generator("kmeans", *parts), dtype=torch.float64)
    return bound * (2 * draws - 1)
