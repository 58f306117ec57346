"""Linear systems of a few families, solved exactly, and small float64 models of them."""

import math

import torch
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.data.environments import Environments
from coterie.models.dynamics import DynamicsConfig, DynamicsModel

# a spiral inwards, plain decay, a saddle, the spiral the other way round
_FAMILIES = [
    [[-0.3, 2.0], [-2.0, -0.3]],
    [[-1.5, 0.0], [0.0, -1.5]],
    [[0.8, 0.0], [0.0, -0.8]],
    [[-0.3, -2.0], [2.0, -0.3]],
]


def linear(
    families: int = 2, each: int = 3, *, trajectories: int = 2, seed: int = 0, spread: float = 0.05
) -> Environments:
    """y' = A·y, where the environments of a family scale A by a factor of their own."""
    gen = torch.Generator().manual_seed(seed)
    t_T = torch.linspace(0, 1, 5, dtype=torch.float64)
    family_E = torch.arange(families).repeat(each)  # families alternate
    factor_E = 1 + spread * (2 * torch.rand(len(family_E), generator=gen, dtype=torch.float64) - 1)
    a_EDD = torch.tensor(_FAMILIES, dtype=torch.float64)[family_E] * factor_E[:, None, None]
    flow_ETDD = torch.matrix_exp(a_EDD[:, None] * t_T[:, None, None])
    angle_EN = 2 * math.pi * torch.rand(len(family_E), trajectories, generator=gen).double()
    y_END = torch.stack([angle_EN.cos(), angle_EN.sin()], -1)
    y_ENTD = torch.einsum("etij,enj->enti", flow_ETDD, y_END)
    return Environments(t_T, y_ENTD, family_E, tuple("abcd"[:families]))


def dynamics(
    experts: int = 2, context: int = 4, *, ep: Axis = Axis("ep"), seed: int = 0, **config: object
) -> DynamicsModel:
    """A model in float64; its K-means starts from contexts far apart."""
    settings = {
        "hidden": 6,
        "layers": 1,
        "method": "rk4",
        "router": {"kind": "kmeans", "start": "spread"},
        **config,
    }
    chosen = DynamicsConfig.model_validate({"experts": experts, "context": context, **settings})
    return DynamicsModel(2, chosen, ep, seed).double()


def purity(expert_E: Tensor, family_E: Tensor) -> float:
    """Fraction of environments whose expert is their family's, one expert for each family."""
    taken = {}
    for family in family_E.unique().tolist():
        taken[family] = int(expert_E[family_E == family].mode().values)
    if len(set(taken.values())) < len(taken):
        return 0.0
    right = [taken[int(f)] == int(e) for e, f in zip(expert_E, family_E, strict=True)]
    return sum(right) / len(right)
