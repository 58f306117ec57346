"""Who takes part: whole MoE layers that differ in how rows get to the experts and back."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.overlaps.alone import StayingRows, TravellingRows
from benchmarks.overlaps.cases import COMMUNICATION, COMPUTE, OVERLAPPED, PLAIN, TUNED, TWO_CHUNKS
from benchmarks.overlaps.peers import DeepSpeedLayer, MegatronLayer, Peer
from benchmarks.overlaps.two_chunks import TwoChunkExchange
from benchmarks.peers import Shape
from coterie.comm.axis import expert_parallel
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.config import ExchangeConfig
from coterie.comm.exchange.overlapped import OverlappedExchange
from coterie.models import initialise
from coterie.moe import MoEConfig, MoELayer
from coterie.moe.tokens import TokenInfo
from coterie.parallel.distributed import Ranks
from coterie.parallel.layout import Layout
from coterie.parallel.tuning import Layer, choose, measure


class Contender(Protocol):
    """A layer, or a part of its work, on one rank of several."""

    def prepare(self, x_TD: Tensor) -> None:
        """What is not timed; all ranks call."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD."""

    def backward(self, y_TD: Tensor, dy_TD: Tensor) -> None:
        """Gradients of the input and of all weights."""

    def gradients(self) -> list[Tensor] | None:
        """Of router, w_in_EPFD and w_out_EFD; None: it does not do a layer's whole work."""

    @property
    def waited(self) -> float:
        """Seconds that the main thread has waited for messages so far, where the exchange says."""


class Ours:
    """coterie's layer with ``exchange``; all of them share one layer's weights."""

    def __init__(self, layer: MoELayer, exchange: Exchange, whole: bool = True) -> None:
        self.layer, self.exchange, self.whole = layer, exchange, whole
        self._waited = 0.0
        for meter in exchange.meters:
            meter.on = True

    def prepare(self, x_TD: Tensor) -> None:
        self.layer.exchange = self.exchange
        self.layer.zero_grad(set_to_none=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD).y

    def backward(self, y_TD: Tensor, dy_TD: Tensor) -> None:
        y_TD.backward(dy_TD)

    def gradients(self) -> list[Tensor] | None:
        if not self.whole:
            return None
        experts = self.layer.experts
        weights = (self.layer.router.weight, experts.w_in_EPFD, experts.w_out_EFD)
        return [weight.grad for weight in weights if weight.grad is not None]

    @property
    def waited(self) -> float:
        self._waited += sum(meter.take().exposed for meter in self.exchange.meters)
        return self._waited


class Communication:
    """The all-to-alls of the same rows, there and back, and the same again for the gradients."""

    def __init__(self, layer: MoELayer, group: ProcessGroup, width: int) -> None:
        self.layer, self.rows = layer, TravellingRows(group, width)

    def prepare(self, x_TD: Tensor) -> None:
        with torch.no_grad():
            self.rows.prepare(self.layer.router(x_TD, TokenInfo()).assignment.load_E)

    def forward(self, x_TD: Tensor) -> Tensor:
        self.rows.travel()
        return x_TD

    def backward(self, y_TD: Tensor, dy_TD: Tensor) -> None:
        self.rows.travel()

    def gradients(self) -> None:
        return None

    @property
    def waited(self) -> float:
        return 0.0


def layer_config(shape: Shape) -> MoEConfig:
    """Of coterie's layer."""
    return MoEConfig.model_validate(
        {
            "experts": {"count": shape.E, "hidden": shape.F},
            "router": {"k": shape.K, "balance_loss": 0.0, "z_loss": 0.0},
        }
    )


def our_layer(shape: Shape, group: ProcessGroup) -> MoELayer:
    """coterie's layer, experts shared out over ``group``; router losses off, as the others have
    them."""
    layer = MoELayer(shape.D, layer_config(shape), expert_parallel(group))
    initialise(layer, seed=0)
    return layer


def alone(layer: MoELayer, shape: Shape, group: ProcessGroup) -> dict[str, Contender]:
    """The parts that a layer's time is held against."""
    return {
        COMPUTE: Ours(layer, StayingRows(group), whole=False),
        COMMUNICATION: Communication(layer, group, shape.D),
    }


def tuned(shape: Shape, group: ProcessGroup) -> ExchangeConfig:
    """What a run of this layer would choose for itself."""
    size = group.size()
    layout = Layout(ep=size, dp_replicate=size)
    ranks = Ranks(group.rank(), torch.device("cpu"), layout, {"expert": group}, control=group)
    moe = layer_config(shape).model_copy(update={"exchange": ExchangeConfig(kind="overlapped")})
    seconds = measure(Layer(moe, shape.D, shape.T, "fp32", recompute="none"), ranks)
    return choose(moe.exchange, seconds)


def contenders(
    shape: Shape, group: ProcessGroup, settings: Sequence[Sequence[int]], peers: bool
) -> tuple[dict[str, Contender], ExchangeConfig, dict[str, str]]:
    """Those that can be built here, what the tuned one has chosen, and why the others cannot.

    ``settings``: (pieces, slabs) of each OverlappedExchange. ``peers``: other projects' too.
    """
    layer = our_layer(shape, group)
    chosen = tuned(shape, group)
    exchanges: dict[str, Exchange] = {
        PLAIN: AllToAllExchange(group),
        TWO_CHUNKS: TwoChunkExchange(group),
        **{
            f"{OVERLAPPED} {pieces}x{slabs}": OverlappedExchange(group, pieces=pieces, slabs=slabs)
            for pieces, slabs in settings
        },
        TUNED: chosen.over(layer.axes),
    }
    made = alone(layer, shape, group)
    made |= {name: Ours(layer, exchange) for name, exchange in exchanges.items()}
    left_out = {}
    others: dict[str, Callable[[Shape, int], Peer]] = {
        "megatron-core": MegatronLayer,
        "DeepSpeed": DeepSpeedLayer,
    }
    for name, make in others.items() if peers else ():
        try:
            peer = make(shape, dist.get_world_size())
        except ImportError as error:
            left_out[name] = str(error)
        else:
            peer.load(layer)
            made[name] = peer
    return made, chosen, left_out
