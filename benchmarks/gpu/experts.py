"""The experts of one rank, computed in several ways, on rows that are there: what nobody waits for.

Each way has the same six products. ``shell``: the fused kernels without their communication, in
tiles of so many columns.
``grouped``: PyTorch's grouped product. ``each``: cuBLAS, one product for each expert. Legend as in
csrc/fused.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.lone_rank import LoneRank, gradient_of_hidden
from coterie.csrc import fused
from coterie.csrc.fused_launch import TILE_COLUMNS, Manner
from coterie.csrc.fused_plan import TILE

PRODUCTS = ("in", "out", "d hidden", "d rows", "dw out", "dw in")
"""x·w_in, a·w_out; then their gradients: of activations, of rows, and of both weights."""


@dataclass
class Operands:
    """Tensors of one rank that all ways share."""

    rank: LoneRank
    w_in_EHD: Tensor
    w_out_EFD: Tensor
    h_PH: Tensor
    a_PF: Tensor

    @classmethod
    def random(cls, rank: LoneRank, weights: tuple[Tensor, Tensor] | None = None) -> "Operands":
        w_in, w_out = weights or rank.weights(rank.case.F)
        return cls(rank, w_in, w_out, rank.pool(w_in.shape[1]), rank.pool(w_out.shape[1]))

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w_in_EHD, self.w_out_EFD

    def flops(self, product: str) -> int:
        """Of the rows that there are; padding is not counted."""
        size = self.w_in_EHD[0].numel() if "in" in product or "rows" in product else 0
        return 2 * self.rank.rows * (size or self.w_out_EFD[0].numel())


class Way(ABC):
    """One way to compute the experts."""

    def __init__(self, operands: Operands) -> None:
        self.of = operands

    @abstractmethod
    def product(self, name: str) -> Callable[[], object]:
        """One of ``PRODUCTS``."""

    @abstractmethod
    def forward(self) -> object:
        """Both products and SwiGLU."""

    @abstractmethod
    def gradients(self) -> object:
        """Of rows and hidden activations."""

    def weight_gradients(self) -> object:
        """Of both weights."""
        return self.product("dw out")(), self.product("dw in")()

    def backward(self) -> object:
        """All gradients."""
        return self.gradients(), self.weight_gradients()


class Shell(Way):
    """The fused kernels; nothing is pulled, and nothing is put home: all blocks compute."""

    def __init__(self, operands: Operands, tile_columns: int) -> None:
        super().__init__(operands)
        self.manner = Manner(communication=0, slabs=1, tile_columns=tile_columns)

    def product(self, name: str) -> Callable[[], object]:
        of, rank, manner = self.of, self.of.rank, self.manner
        here, x = rank.here, rank.x_PD
        return {
            "in": lambda: fused.hidden(here, [x], [of.w_in_EHD], manner),
            "out": lambda: fused.combine(rank.silent, [of.a_PF], [of.w_out_EFD], manner),
            "d hidden": lambda: gradient_of_hidden(here, x, of.w_out_EFD, of.h_PH, manner),
            "d rows": lambda: self._gradient_of_rows(of.h_PH),
            "dw out": lambda: fused.weight_gradient(here, [of.a_PF], [x], manner),
            "dw in": lambda: fused.weight_gradient(here, [of.h_PH], [x], manner),
        }[name]

    def forward(self) -> object:
        of, rank = self.of, self.of.rank
        (made,) = fused.hidden(rank.here, [rank.x_PD], [of.w_in_EHD], self.manner)
        return fused.combine(rank.silent, [made.a_PF], [of.w_out_EFD], self.manner)

    def gradients(self) -> object:
        of, rank = self.of, self.of.rank
        x, manner = rank.x_PD, self.manner
        dh_PH, _ = gradient_of_hidden(rank.here, x, of.w_out_EFD, of.h_PH, manner)
        return self._gradient_of_rows(dh_PH)

    def _gradient_of_rows(self, dh_PH: Tensor) -> object:
        silent, w_in = self.of.rank.silent, [self.of.w_in_EHD]
        return fused.combine(silent, [dh_PH], w_in, self.manner, weighted=False)

    def backward(self) -> object:
        of, rank = self.of, self.of.rank
        x, w_in, manner = rank.x_PD, of.w_in_EHD, self.manner
        dh_PH, a_PF = gradient_of_hidden(rank.here, x, of.w_out_EFD, of.h_PH, manner)
        return fused.combine_backward(rank.silent, [dh_PH], [w_in], [x], [a_PF], [x], manner)


class Plain(Way):
    """PyTorch's products, and its own ops for SwiGLU."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        load, ends = operands.rank.load, [0]
        for rows in load:
            ends.append(ends[-1] + -(-rows // TILE) * TILE)
        self.spans = list(pairwise(ends))
        self.offset_E = torch.tensor(ends[1:], dtype=torch.int32, device=operands.rank.device)

    @abstractmethod
    def rows(self, left_PK: Tensor, weights_EKN: Tensor) -> Tensor:
        """left · weights of each row's expert, (P, N)."""

    @abstractmethod
    def across(self, left_PM: Tensor, right_PN: Tensor) -> Tensor:
        """leftᵀ · right over each expert's rows, (E, M, N)."""

    def product(self, name: str) -> Callable[[], object]:
        of, x = self.of, self.of.rank.x_PD
        return {
            "in": lambda: self.rows(x, of.w_in_EHD.mT),
            "out": lambda: self.rows(of.a_PF, of.w_out_EFD),
            "d hidden": lambda: self.rows(x, of.w_out_EFD.mT),
            "d rows": lambda: self.rows(of.h_PH, of.w_in_EHD),
            "dw out": lambda: self.across(of.a_PF, x),
            "dw in": lambda: self.across(of.h_PH, x),
        }[name]

    def forward(self) -> object:
        gate_PF, up_PF = self.rows(self.of.rank.x_PD, self.of.w_in_EHD.mT).chunk(2, 1)
        return self.rows(F.silu(gate_PF) * up_PF, self.of.w_out_EFD)

    def gradients(self) -> object:
        of = self.of
        da_PF = self.rows(of.rank.x_PD, of.w_out_EFD.mT)
        gate_PF, up_PF = of.h_PH.chunk(2, 1)
        dh_PH = torch.empty_like(of.h_PH)
        dgate_PF, dup_PF = dh_PH.chunk(2, 1)
        torch.mul(da_PF, F.silu(gate_PF), out=dup_PF)
        torch.ops.aten.silu_backward.grad_input(da_PF.mul_(up_PF), gate_PF, grad_input=dgate_PF)
        return self.rows(dh_PH, of.w_in_EHD)


class Grouped(Plain):
    """One grouped product for all experts."""

    def rows(self, left_PK: Tensor, weights_EKN: Tensor) -> Tensor:
        return grouped_mm(left_PK, weights_EKN, offs=self.offset_E)

    def across(self, left_PM: Tensor, right_PN: Tensor) -> Tensor:
        return grouped_mm(left_PM.mT, right_PN, offs=self.offset_E)


class Each(Plain):
    """A product for each expert that has rows."""

    def rows(self, left_PK: Tensor, weights_EKN: Tensor) -> Tensor:
        made = left_PK.new_empty(left_PK.shape[0], weights_EKN.shape[2])
        for (begin, end), w_KN in zip(self.spans, weights_EKN, strict=True):
            if end > begin:
                torch.mm(left_PK[begin:end], w_KN, out=made[begin:end])
        return made

    def across(self, left_PM: Tensor, right_PN: Tensor) -> Tensor:
        made = left_PM.new_empty(len(self.spans), left_PM.shape[1], right_PN.shape[1])
        for (begin, end), dw_MN in zip(self.spans, made, strict=True):
            torch.mm(left_PM[begin:end].mT, right_PN[begin:end], out=dw_MN)
        return made


grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
SHELLS = {f"shell {columns}": partial(Shell, tile_columns=columns) for columns in TILE_COLUMNS}
WAYS: dict[str, Callable[[Operands], Way]] = {**SHELLS, "grouped": Grouped, "each": Each}
