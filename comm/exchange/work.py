"""What a rank computes of the pieces that it receives, and how it takes their gradients back.

Either the local experts compute a piece's rows, or a further exchange takes its tokens on. Both
leave the gradients of the experts' weights for later, in parts: nobody waits for those.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from coterie.comm.exchange.all_to_all import ReceivedRows
from coterie.comm.exchange.base import Exchange, Hidden, Passes, SplitExperts
from coterie.comm.exchange.pieces import Job


class Work(ABC):
    """The pieces of one exchange, by number. ``slabs``: in which columns results are given."""

    in_order = False
    """Whether all ranks must compute their pieces in the same order."""

    def __init__(self, pieces: int, experts: SplitExperts, slabs: list[slice]) -> None:
        self.experts = experts
        self.slabs = slabs
        self.later: list[deque[Any]] = [deque() for _ in range(pieces)]
        """Of each piece, parts of the weights' gradients."""
        self.done = [False] * pieces
        """Whether all of these are there."""

    @abstractmethod
    def forward(
        self, number: int, x_PD: Tensor, weight_A: Tensor | None, passes: Passes, keep: bool
    ) -> Iterator[Tensor]:
        """Results of a piece, slab by slab, computed when asked for. ``keep``: what the backward
        pass needs, from the start."""

    @abstractmethod
    def backward(
        self,
        number: int,
        dy_PD: Tensor,
        weight_A: Tensor | None,
        dweight_A: Tensor | None,
        passes: Passes,
    ) -> Iterator[Tensor]:
        """Its gradients, slab by slab, computed when asked for; writes those of its rows' weights
        at once."""

    def end(self) -> None:
        """The backward pass is over; another may follow (zero-bubble schedules run two)."""
        for parts in self.later:
            parts.clear()
        self.done = [False] * len(self.done)

    @abstractmethod
    def kept(self) -> list[Tensor]:
        """Tensors that the backward pass needs; gives them up."""

    @abstractmethod
    def give_back(self, kept: list[Tensor]) -> None:
        """What :meth:`kept` returned."""


class LocalWork(Work):
    """The local experts compute the rows."""

    def __init__(self, jobs: list[Job], experts: SplitExperts, slabs: list[slice]) -> None:
        super().__init__(len(jobs), experts, slabs)
        self.jobs = jobs
        self._x: list[Tensor | None] = [None] * len(jobs)
        self._products: list[list[Tensor]] = [[] for _ in jobs]

    def forward(
        self, number: int, x_PD: Tensor, weight_A: Tensor | None, passes: Passes, keep: bool
    ) -> Iterator[Tensor]:
        job, parts = self.jobs[number], None
        if keep:
            self._x[number] = x_PD
            if self.experts.keeps:
                parts = list(passes.hidden(job.rows(x_PD), job.load))
                self._products[number] = [part.h_AH for part in parts]
        return self._results(job, x_PD, job.weights(weight_A), passes, parts)

    def _results(
        self,
        job: Job,
        x_PD: Tensor,
        weight_A: Tensor | None,
        passes: Passes,
        parts: list[Hidden] | None,
    ) -> Iterator[Tensor]:
        if parts is None:
            parts = list(passes.hidden(job.rows(x_PD), job.load))
        for columns in self.slabs:
            yield job.sums(_joined(passes.result, parts, columns, x_PD), weight_A)

    def kept(self) -> list[Tensor]:
        found = [x for x in self._x if x is not None]
        found += [product for products in self._products for product in products]
        self._x = [None] * len(self.jobs)
        self._counts = [len(products) for products in self._products]
        self._products = []
        return found

    def give_back(self, kept: list[Tensor]) -> None:
        left = iter(kept)
        self._x = [next(left) for _ in self.jobs]
        self._products = [[next(left) for _ in range(count)] for count in self._counts]

    def backward(
        self,
        number: int,
        dy_PD: Tensor,
        weight_A: Tensor | None,
        dweight_A: Tensor | None,
        passes: Passes,
    ) -> Iterator[Tensor]:
        job, x_PD = self.jobs[number], self._x[number]
        assert x_PD is not None, "a backward pass needs a forward pass that keeps"
        parts = list(
            passes.hidden_gradients(
                job.rows(dy_PD),
                job.rows(x_PD),
                job.load,
                self._products[number],
                job.weights(weight_A),
            )
        )
        self._x[number] = None
        self._products[number].clear()
        if dweight_A is not None and job.weighed_A is not None:
            own = [part.dweight_A for part in parts if part.dweight_A is not None]
            dweight_A[job.weighed_A] = torch.cat(own)
        self.later[number].extend(parts)
        self.done[number] = True
        return (
            job.sums(_joined(passes.row_gradient, parts, columns, dy_PD), None)
            for columns in self.slabs
        )


def _joined(
    function: Callable[[Any, slice], Tensor], parts: list[Any], columns: slice, like: Tensor
) -> Tensor:
    """Columns of all rows, of which each part has some."""
    rows = max((part.rows.stop for part in parts), default=0)
    y_AS = like.new_empty(rows, columns.stop - columns.start)
    for part in parts:
        y_AS[part.rows] = function(part, columns)
    return y_AS


class OnwardWork(Work):
    """A further exchange takes the tokens on; its ranks must all take the same piece at a time."""

    in_order = True

    def __init__(
        self,
        rows: list[tuple[ReceivedRows, Tensor]],
        exchange: Exchange,
        experts: SplitExperts,
        slabs: list[slice],
    ) -> None:
        super().__init__(len(rows), experts, slabs)
        self.rows = rows
        """Of each piece, and where the weights of its rows stand."""
        self.exchange = exchange
        self._graphs: list[tuple[GradientEdge, list[GradientEdge]] | None] = [None] * len(rows)
        self._kept: list[Tensor] = []
        """What the graphs keep. They hold places in it: the exchange around them keeps the tensors,
        so that a block which is computed again is so once, not for every piece."""

    def forward(
        self, number: int, x_PD: Tensor, weight_A: Tensor | None, passes: Passes, keep: bool
    ) -> Iterator[Tensor]:
        assert weight_A is not None, "tokens travel with their rows' weights"
        rows, weighed_A = self.rows[number]
        leaves = [x.detach().requires_grad_(keep) for x in (x_PD, weight_A[weighed_A])]
        experts = _WeightsLater(self.experts, passes, self.later[number])
        with torch.set_grad_enabled(keep), saved_tensors_hooks(self._pack, self._unpack):
            y_PD = self.exchange(leaves[0], rows._replace(weight_A=leaves[1]), experts)
        if keep:
            self._graphs[number] = (
                get_gradient_edge(y_PD), [get_gradient_edge(leaf) for leaf in leaves]
            )  # fmt: skip
        y_PD = y_PD.detach()
        return (y_PD[:, columns].contiguous() for columns in self.slabs)

    def end(self) -> None:
        super().end()
        self._kept = []

    def _pack(self, x: Tensor) -> int:
        self._kept.append(x.detach())
        return len(self._kept) - 1

    def _unpack(self, place: int) -> Tensor:
        return self._kept[place]

    def kept(self) -> list[Tensor]:
        kept, self._kept = self._kept, []
        return kept

    def give_back(self, kept: list[Tensor]) -> None:
        self._kept = kept

    def backward(
        self,
        number: int,
        dy_PD: Tensor,
        weight_A: Tensor | None,
        dweight_A: Tensor | None,
        passes: Passes,
    ) -> Iterator[Tensor]:
        graph = self._graphs[number]
        assert graph is not None and dweight_A is not None
        result, leaves = graph
        dx_PD, own_A = torch.autograd.grad([result], leaves, [dy_PD], retain_graph=True)
        dweight_A[self.rows[number][1]] = own_A
        self.done[number] = True
        return (dx_PD[:, columns].contiguous() for columns in self.slabs)


class _WeightsLater:
    """``experts`` whose backward pass leaves what the weights' gradients are made of."""

    def __init__(self, experts: SplitExperts, passes: Passes, later: deque[Any]) -> None:
        self.experts, self._passes, self.later = experts, passes, later

    @property
    def activation(self) -> str:
        return self.experts.activation

    @property
    def keeps(self) -> bool:
        return self.experts.keeps

    def weights(self) -> tuple[Tensor, ...]:
        return self.experts.weights()

    def passes(self, *weights: Tensor) -> Passes:
        return self.experts.passes(*weights)

    def __call__(self, x_AD: Tensor, load_E: Tensor) -> Tensor:
        load: list[int] = load_E.tolist()
        y_AD: Tensor = _Later.apply(x_AD, load, self._passes, self.keeps, self.later)
        return y_AD


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_AD: Tensor, load: list[int], passes: Passes, keeps: bool, later: deque[Any]
    ) -> Tensor:
        y_AD, products = passes.forward(x_AD, load, keeps)
        ctx.save_for_backward(x_AD, *products)
        ctx.load, ctx.passes, ctx.later = load, passes, later
        return y_AD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None, None, None]:
        x_AD, *products = ctx.saved_tensors
        dx_AD = torch.empty_like(x_AD)
        for part in ctx.passes.hidden_gradients(dy_AD, x_AD, ctx.load, products, None):
            dx_AD[part.rows] = ctx.passes.row_gradient(part, slice(None))
            ctx.later.append(part)
        return dx_AD, None, None, None, None
