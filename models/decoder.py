"""A decoder-only transformer whose feed-forward layers are dense or mixtures of experts."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from coterie.comm.exchange.base import Exchange
from coterie.core.config import Config
from coterie.core.random import fold
from coterie.models.attention import Attention, AttentionConfig
from coterie.moe.feed_forward import FeedForward, FeedForwardConfig
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.stats import RoutingStats
from coterie.moe.tokens import TokenInfo


class DecoderConfig(Config):
    """A decoder-only transformer."""

    vocabulary: int = Field(ge=2)
    """Number of token ids."""
    width: int = Field(ge=1)
    """Model width D."""
    layers: int = Field(ge=1)
    """Number of blocks L."""
    attention: AttentionConfig
    """The same in every block."""
    feed_forward: FeedForwardConfig | None = None
    """The dense layers' feed-forward; needed when there are dense layers."""
    moe: MoEConfig | None = None
    """The mixture-of-experts layers; null: all layers are dense."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers, from 0, that are dense although `moe` is given."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """RMSNorm's epsilon, also in attention."""
    tie_embeddings: bool = False
    """Use the embedding's weights as the output layer's."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        heads, head_width = self.attention.heads, self.attention.head_width
        if head_width is None:
            if self.width % heads:
                raise ValueError(
                    f"width {self.width} must be a multiple of attention.heads {heads}, "
                    "unless attention.head_width is given"
                )
            if self.width // heads % 2:
                raise ValueError(
                    f"width {self.width} / attention.heads {heads} = {self.width // heads} "
                    "must be even for rotary positions"
                )
        for layer in self.dense_layers:
            if not 0 <= layer < self.layers:
                raise ValueError(f"dense_layers has {layer}; layers are 0 to {self.layers - 1}")
        if (self.moe is None or self.dense_layers) and self.feed_forward is None:
            raise ValueError("feed_forward is needed: this model has dense layers")
        return self

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` is a mixture of experts."""
        return self.moe is not None and layer not in self.dense_layers


@dataclass(frozen=True)
class DecoderOutput:
    """The result for one micro-batch."""

    logits_BSV: Tensor
    losses: dict[str, Tensor]
    """Router losses by name, summed over layers: this rank's shares, coefficients applied."""
    stats: dict[int, RoutingStats]
    """By the number of each mixture-of-experts layer."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        layer: int,
        config: DecoderConfig,
        exchange: Exchange | None,
        balance_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.attention, config.norm_eps)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.moe: MoELayer | None = None
        self.feed_forward: FeedForward | None = None
        if config.is_moe(layer):
            assert config.moe is not None
            self.moe = MoELayer(config.width, config.moe, exchange, balance_group)
        else:
            assert config.feed_forward is not None
            self.feed_forward = FeedForward(config.width, config.feed_forward)

    def forward(
        self, x_BSD: Tensor, info: TokenInfo
    ) -> tuple[Tensor, dict[str, Tensor], RoutingStats | None]:
        document_BS = None if info.document_T is None else info.document_T.view(x_BSD.shape[:2])
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), document_BS)
        normed_BSD = self.feed_forward_norm(x_BSD)
        if self.feed_forward is not None:
            return x_BSD + self.feed_forward(normed_BSD), {}, None
        assert self.moe is not None
        if info.key_T is not None:
            info = replace(info, key_T=fold(info.key_T, self.layer))
        y_BSD, losses, stats = self.moe(normed_BSD, info)
        return x_BSD + y_BSD, losses, stats


class Decoder(nn.Module):
    """Token ids to logits.

    ``recompute``: blocks keep only their input and run again in the backward pass.
    """

    def __init__(
        self,
        config: DecoderConfig,
        exchange: Exchange | None = None,
        balance_group: ProcessGroup | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(
            Block(layer, config, exchange, balance_group) for layer in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BS: Tensor, info: TokenInfo | None = None) -> DecoderOutput:
        """``tokens_BS``: int64; ``info``: the facts of the B · S tokens, in the same order."""
        info = info or TokenInfo()
        x_BSD = self.embedding(tokens_BS)
        losses: dict[str, Tensor] = {}
        stats: dict[int, RoutingStats] = {}
        for block in cast(Iterable[Block], self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x_BSD, own, seen = checkpoint(block, x_BSD, info, use_reentrant=False)
            else:
                x_BSD, own, seen = block(x_BSD, info)
            for name, loss in own.items():
                losses[name] = losses.get(name, 0.0) + loss
            if seen is not None:
                stats[block.layer] = seen
        return DecoderOutput(self.head(self.norm(x_BSD)), losses, stats)
