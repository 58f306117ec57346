"""Muon: momentum, made orthogonal matrix by matrix (Jordan et al. 2024; arXiv 2502.16982).

``torch.optim.Muon`` takes whole 2-D parameters and always iterates in bfloat16. Here a parameter is
a stack of matrices of which a rank may hold parts, so the iteration is our own; in float64 it is
what the library's is without its rounding. (On a CPU that emulates bfloat16 the library takes 10 to
40 times as long.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from coterie.comm.axis import Cut
from coterie.comm.parts import joined
from coterie.parallel.placement import Place

Scale = Literal["match_adamw", "original"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
_LEAST = 1e-7
"""Of the norm that a matrix is divided by."""


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter is Muon's: the last two dimensions of each are a matrix (a linear layer
    of the decoder, also a router as in Megatron-LM, or of each expert and its gate and up parts).

    The embedding and the output layer are AdamW's, whose rows are tokens' own and get gradients at
    very different rates, and so is what is not a matrix: gains, gates that are vectors.
    """
    return len(shape) >= 2 and name.split(".")[0] not in ("embedding", "head")


def orthogonalised(x_NAB: Tensor) -> Tensor:
    """(…, A, B) → each matrix with its singular values brought to 0.7 … 1.2, zeros left alone, by
    five quintic Newton–Schulz steps."""
    a, b, c = COEFFICIENTS
    whole = x_NAB.shape
    x_NAB = x_NAB.reshape(-1, *whole[-2:])
    tall = whole[-2] > whole[-1]
    if tall:
        x_NAB = x_NAB.mT
    x_NAB = x_NAB / x_NAB.flatten(1).norm(dim=1).clamp(min=_LEAST)[:, None, None]
    for _ in range(STEPS):
        gram_NAA = x_NAB @ x_NAB.mT
        gram_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, gram_NAA, x_NAB, beta=a)
    return (x_NAB.mT if tall else x_NAB).reshape(whole)


def rate(name: str, whole: tuple[int, ...], scale: Scale) -> float:
    """The factor on the learning rate. ``match_adamw``: 0.2 · √max(A, B), the size of AdamW's
    updates (arXiv 2502.16982, eq. 4); ``original``: √max(1, outputs / inputs)."""
    rows, columns = whole[-2:]
    if scale == "match_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    # w_out_FD and w_out_EFD are inputs × outputs, all others outputs × inputs
    outputs, inputs = (columns, rows) if ".w_out_" in name else (rows, columns)
    return max(1.0, outputs / inputs) ** 0.5


@dataclass(frozen=True)
class Settings:
    """Of the update."""

    momentum: float
    nesterov: bool
    scale: Scale
    weight_decay: float


class Muon:
    """Over what this rank holds of each parameter. A matrix that is split over ranks is gathered,
    made orthogonal by each of them, and each keeps its part ("duplicated").

    ``groups``: of the axes that split parameters, by name.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        places: Mapping[str, Place],
        groups: Mapping[str, ProcessGroup],
        lr: float,
        settings: Settings,
    ) -> None:
        self.parameters = parameters
        self.places = places
        self.groups = groups
        self.lr = lr
        self.settings = settings
        self.momenta = {name: torch.zeros_like(p) for name, p in parameters.items()}
        """A running mean of each gradient."""

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient. All ranks that share some call."""
        decay = 1 - self.lr * self.settings.weight_decay
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            update = self._update(name, parameter.grad)
            factor = rate(name, self.places[name].box.whole, self.settings.scale)
            parameter.mul_(decay).add_(update, alpha=-self.lr * factor)

    def _update(self, name: str, gradient: Tensor) -> Tensor:
        """This rank's part of the orthogonal matrices."""
        mean, beta = self.momenta[name], self.settings.momentum
        mean.lerp_(gradient, 1 - beta)
        update = gradient.lerp(mean, beta) if self.settings.nesterov else mean
        if update.is_cuda and update.dtype == torch.float32:
            update = update.bfloat16()  # as torch.optim.Muon does; a CPU would emulate it
        place = self.places[name]
        for cut in reversed(cuts_of_matrices(place)):
            update = joined(update, cut.dim, cut.length, self.groups[cut.axis.name])
        if not update.numel():
            return update.to(gradient.dtype)
        rows, columns = place.box.slices[-2:]
        return orthogonalised(update)[..., rows, columns].to(gradient.dtype)


def cuts_of_matrices(place: Place) -> list[Cut]:
    """Those of the parameter's cuts that go through matrices, not between them."""
    matrix = len(place.box.whole) - 2
    return [cut for cut in place.cuts if cut.dim >= matrix and cut.axis.size > 1]
