"""Layers with weights of their own for each modality (mixture of transformers, arXiv 2411.04996).

Nothing is learned about where a token goes: its modality says. All modalities are computed at once,
in runs of rows sorted by modality; one without tokens has an empty run, so its parameters stay in
the graph, with gradients of zero.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coterie.comm.axis import Axis, Cut
from coterie.comm.sequence import gather, reduce_scatter
from coterie.core.config import Config
from coterie.csrc.inverse import Inverse, invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute
from coterie.moe.activations import ACTIVATIONS
from coterie.moe.assignment import count
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.grouped_ffn import grouped_ffn
from coterie.moe.tokens import TokenInfo


class UntieConfig(Config):
    """Weights of their own for each modality (mixture of transformers, arXiv 2411.04996). All
    modalities attend to each other; embedding, last norm and output layer are shared."""

    modalities: int = Field(default=2, ge=1)
    """Number of modalities (text 0, image 1)."""
    ffn: bool = False
    """Untie the feed-forward of dense layers. (Of a mixture's experts: `moe.router.kind:
    modality`.)"""
    qkvo: bool = False
    """Untie attention's projections: queries, keys, values, output, and gates."""
    norm: bool = False
    """Untie the norms of blocks, and those of queries and keys."""

    @property
    def any(self) -> bool:
        """Whether anything is untied."""
        return self.ffn or self.qkvo or self.norm


SHARED = UntieConfig()
"""All modalities have the same weights."""


@dataclass(frozen=True)
class Modalities:
    """The modality of each token of a micro-batch, made once for all blocks."""

    own_BS: Tensor
    """int64: of the tokens whose activations this rank holds between layers."""
    gathered_BS: Tensor
    """int64: of those that it computes in attention and dense layers, gathered over tp."""
    order_G: Tensor
    """int64: the gathered tokens, sorted by modality, then by place."""
    inverse: Inverse
    load_M: Tensor
    """int64: gathered tokens of each modality."""
    load: list[int]
    """The same on the host."""

    @staticmethod
    def of(info: TokenInfo, shape: torch.Size, modalities: int, tp: Axis) -> "Modalities":
        """Of the (B, S) tokens in ``info``. Raises ValueError where their modality is not known.

        Padding counts as modality 0. All ranks of ``tp`` call.
        """
        if info.modality_T is None:
            raise ValueError("untied weights need the modality_T of the tokens")
        own_T = info.modality_T
        if info.padding_T is not None:
            own_T = own_T.masked_fill(info.padding_T, 0)
        unknown_T = (own_T < 0) | (own_T >= modalities)
        if bool(unknown_T.any()):
            first = int(own_T[unknown_T][0])
            raise ValueError(f"a token has modality {first}, but weights are of {modalities} only")
        own_BS = own_T.view(shape)
        gathered_BS = gather(own_BS, 1, tp)
        order_G = gathered_BS.flatten().argsort(stable=True)
        load_M = count(gathered_BS.flatten(), modalities)
        return Modalities(
            own_BS, gathered_BS, order_G, invert(order_G, len(order_G)), load_M, load_M.tolist()
        )

    def sort(self, x_BSD: Tensor) -> Tensor:
        """Gathered tokens as rows sorted by modality: (B, S, D) → (G, D)."""
        return permute(x_BSD.flatten(0, 1), self.order_G, self.inverse)

    def restore(self, x_GD: Tensor) -> Tensor:
        """Rows sorted by modality back in their places: (G, D) → (B, S, D)."""
        x_TD = unpermute(x_GD, None, self.order_G, self.inverse)
        return x_TD.unflatten(0, self.gathered_BS.shape)


class UntiedLinear(nn.Module):
    """y = x · w[m]ᵀ for rows of modality m, without bias; ``weight``: M × outputs × inputs."""

    def __init__(self, inputs: int, outputs: int, modalities: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(modalities, outputs, inputs))

    def forward(self, x_GI: Tensor, modalities: Modalities) -> Tensor:
        """Rows sorted by modality: (G, inputs) → (G, outputs)."""
        # unbind, not an index for each: its gradient is one tensor of all modalities
        runs = zip(x_GI.split(modalities.load), self.weight.unbind(), strict=True)
        return torch.cat([F.linear(x, weight) for x, weight in runs])


class UntiedNorm(nn.ModuleList):
    """RMSNorm with gains for each modality. They are parameters of their own, as vectors that no
    optimizer takes for a matrix."""

    def __init__(self, width: int, eps: float, modalities: int) -> None:
        super().__init__(nn.RMSNorm(width, eps=eps) for _ in range(modalities))
        self.width, self.eps = width, eps

    def forward(self, x: Tensor, modality_BS: Tensor) -> Tensor:
        """``x``: (B, S, …, D)."""
        gain_MD = torch.stack([norm.get_parameter("weight") for norm in self])
        gain_BSD = F.embedding(modality_BS, gain_MD)
        between = (1,) * (x.dim() - 3)
        gain = gain_BSD.view(*modality_BS.shape, *between, self.width)
        normed = F.rms_norm(x.to(gain.dtype), (self.width,), eps=self.eps)
        return (normed * gain).to(x.dtype)


def block_norm(width: int, eps: float, untie: UntieConfig) -> nn.Module:
    """A norm of a block, untied or not; call it through :func:`normed`."""
    if untie.norm:
        return UntiedNorm(width, eps, untie.modalities)
    return nn.RMSNorm(width, eps=eps)


def normed(norm: nn.Module, x: Tensor, modality_BS: Tensor | None) -> Tensor:
    """``norm`` of ``x``, whose modality it is told if it is untied."""
    return norm(x, modality_BS) if isinstance(norm, UntiedNorm) else norm(x)


class UntiedFeedForward(nn.Module):
    """y = act(x · w_in[m]ᵀ) · w_out[m] for tokens of modality m: M
    :class:`coterie.moe.feed_forward.FeedForward`, each for its modality.

    ``w_in_MPFD``, ``w_out_MFD``; ``tp`` splits F. ``recompute``: keep only the rows.
    """

    def __init__(
        self,
        width: int,
        config: FeedForwardConfig,
        modalities: int,
        tp: Axis = Axis("tp"),
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if config.hidden % tp.size:
            raise ValueError(f"hidden {config.hidden} does not divide over {tp.size} ranks")
        self.activation, self.tp, self.recompute = config.activation, tp, recompute
        parts, hidden = ACTIVATIONS[config.activation].parts, config.hidden // tp.size
        self.w_in_MPFD = nn.Parameter(torch.empty(modalities, parts, hidden, width))
        self.w_out_MFD = nn.Parameter(torch.empty(modalities, hidden, width))
        self.cuts = {
            "w_in_MPFD": (Cut(2, tp, config.hidden),),
            "w_out_MFD": (Cut(1, tp, config.hidden),),
        }

    def forward(self, x_BSD: Tensor, modalities: Modalities) -> Tensor:
        """(B, S, D) → (B, S, D), S this rank's positions."""
        x_GD = modalities.sort(gather(x_BSD, 1, self.tp))
        w_in_MHD: Tensor = self.w_in_MPFD.flatten(1, 2)
        w_out_MFD: Tensor = self.w_out_MFD
        if torch.is_autocast_enabled(x_GD.device.type):
            half = torch.get_autocast_dtype(x_GD.device.type)
            x_GD, w_in_MHD, w_out_MFD = x_GD.to(half), w_in_MHD.to(half), w_out_MFD.to(half)
        y_GD = grouped_ffn(
            x_GD, w_in_MHD, w_out_MFD, modalities.load_M, self.activation, self.recompute
        )
        return reduce_scatter(modalities.restore(y_GD), 1, self.tp)


UNTIED = (UntiedLinear, UntiedNorm, UntiedFeedForward)
"""Modules of whose parameters each modality has an equal part."""
