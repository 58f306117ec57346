"""A decoder-only transformer whose feed-forward layers are dense or mixtures of experts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coterie.comm.axis import Axes
from coterie.comm.sequence import all_context_positions, gather
from coterie.core.random import fold
from coterie.models.attention import Attention
from coterie.models.config import DecoderConfig
from coterie.models.depths import BlockOutput, Depths
from coterie.models.untied import Modalities, UntiedFeedForward, block_norm, normed
from coterie.models.vocabulary import VocabularyEmbedding, VocabularyHead
from coterie.moe.feed_forward import FeedForward
from coterie.moe.layer import MoELayer, MoEOutput
from coterie.moe.routers.auxiliary import train_auxiliary_alone
from coterie.moe.routers.base import Router
from coterie.moe.stats import LayerStats
from coterie.moe.tokens import TokenInfo

Recompute = Literal["none", "selective", "full"]


class DecoderOutput(NamedTuple):
    """The result for one micro-batch."""

    x: Tensor
    """Activations (B, S, D), beside them what routers carry on (B, S, D + R), or what the output
    layer makes of them: logits (B, S, V)."""
    losses: dict[str, Tensor]
    """Router losses by name, summed over layers: this rank's shares, coefficients applied."""
    stats: dict[int, LayerStats]
    """By the number of each mixture-of-experts layer."""
    foresight: tuple[Tensor, ...]
    """How well auxiliary routers foresaw each choice that they did not make
    (:func:`coterie.moe.routers.auxiliary.foresight`)."""


@dataclass(frozen=True)
class DecoderPart:
    """Which part of a decoder: consecutive blocks, and what stands before and after them."""

    blocks: range
    embedding: bool
    head: bool


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); of all tokens, or of some.

    ``like``: a block whose attention and feed-forward are this one's too.
    """

    def __init__(
        self,
        layer: int,
        config: DecoderConfig,
        axes: Axes = Axes(),
        recompute: Recompute = "none",
        like: "Block | None" = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.recompute = recompute
        self.route_before_attention = config.moe is not None and config.moe.route_before_attention
        hidden = recompute == "selective"
        width, eps, untie = config.width, config.norm_eps, config.untie
        self.attention_norm = block_norm(width, eps, untie)
        self.attention: Attention = (
            like.attention
            if like
            else Attention(width, config.attention, eps, axes.tp, axes.cp, untie)
        )
        self.feed_forward_norm = block_norm(width, eps, untie)
        self.moe: MoELayer | None = None
        self.feed_forward: FeedForward | UntiedFeedForward | None = None
        if like is not None:
            self.moe, self.feed_forward = like.moe, like.feed_forward
        elif config.is_moe(layer):
            self.moe = MoELayer(width, config.moe_of(layer), axes, recompute=hidden)
        else:
            ff = config.feed_forward
            assert ff is not None
            self.feed_forward = (
                UntiedFeedForward(width, ff, untie.modalities, axes.tp, hidden)
                if untie.ffn
                else FeedForward(width, ff, axes.tp, hidden)
            )
        depths = config.depths_of(layer)
        self.depths = Depths(width, depths, axes) if depths else None
        self.tp, self.modalities = axes.tp, untie.modalities

    def forward(
        self,
        x_BSD: Tensor,
        info: TokenInfo,
        document_BS: Tensor | None = None,
        modalities: Modalities | None = None,
        state_BSR: Tensor | None = None,
    ) -> BlockOutput:
        """``document_BS``: of whole sequences, where attention is kept inside documents.
        ``modalities``: of the tokens in ``info``, where weights are untied. ``state_BSR``: what the
        router before has computed."""
        told = (x_BSD, info, document_BS, modalities, state_BSR)
        if self.recompute == "full" and torch.is_grad_enabled():
            # inside the module: FSDP's hooks stand around it
            output: BlockOutput = checkpoint(self._run, *told, use_reentrant=False)
            return output
        return self._run(*told)

    def _run(
        self,
        x_BSD: Tensor,
        info: TokenInfo,
        document_BS: Tensor | None,
        modalities: Modalities | None,
        state_BSR: Tensor | None,
    ) -> BlockOutput:
        if self.depths is None:
            return self._layers(x_BSD, info, document_BS, modalities, state_BSR=state_BSR)

        def inside(
            x_BCD: Tensor, own: TokenInfo, document_BC: Tensor | None, position_BC: Tensor
        ) -> BlockOutput:
            passing = modalities
            if modalities is not None:
                passing = Modalities.of(own, x_BCD.shape[:2], self.modalities, self.tp)
            return self._layers(x_BCD, own, document_BC, passing, position_BC)

        chosen: BlockOutput = self.depths(x_BSD, info, document_BS, inside)
        return chosen

    def _layers(
        self,
        x_BSD: Tensor,
        info: TokenInfo,
        document_BS: Tensor | None,
        modalities: Modalities | None = None,
        position_BS: Tensor | None = None,
        state_BSR: Tensor | None = None,
    ) -> BlockOutput:
        entering_BSD = x_BSD if self.route_before_attention else None
        own_BS = None if modalities is None else modalities.own_BS
        normed_BSD = normed(self.attention_norm, x_BSD, own_BS)
        x_BSD = x_BSD + self.attention(normed_BSD, document_BS, modalities, position_BS)
        normed_BSD = normed(self.feed_forward_norm, x_BSD, own_BS)
        if isinstance(self.feed_forward, UntiedFeedForward):
            assert modalities is not None
            x_BSD = x_BSD + self.feed_forward(normed_BSD, modalities)
            return BlockOutput(x_BSD, {}, None, (), state_BSR)
        if self.feed_forward is not None:
            x_BSD = x_BSD + self.feed_forward(normed_BSD)
            return BlockOutput(x_BSD, {}, None, (), state_BSR)
        assert self.moe is not None
        if info.key_T is not None:
            info = replace(info, key_T=fold(info.key_T, self.layer))
        if state_BSR is not None:
            info = replace(info, router_state_TR=state_BSR.flatten(0, 1))
        moe: MoEOutput = self.moe(normed_BSD, info, entering_BSD)
        return BlockOutput(x_BSD + moe.y, moe.losses, moe.stats, moe.foresight, moe.router_state)


class Decoder(nn.Module):
    """Token ids to logits; or, with ``part``, one stage of that.

    ``axes``: the ranks it is spread over. With them the activations between blocks, and what
    ``info`` says, are of this rank's positions (:func:`coterie.comm.sequence.sequence_part`).
    """

    def __init__(
        self,
        config: DecoderConfig,
        axes: Axes = Axes(),
        part: DecoderPart | None = None,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        part = part or DecoderPart(range(config.layers), embedding=True, head=True)
        self.axes = axes
        self.within_documents = config.attention.within_documents
        self.untie = config.untie
        self.carried = config.carried
        self.embedding: VocabularyEmbedding | None = None
        if part.embedding:
            self.embedding = VocabularyEmbedding(config.vocabulary, config.width, axes.tp)
        if config.auxiliary:  # nothing that a backward pass needs is kept
            recompute = "none"
        # names carry the number in the whole model
        blocks: dict[str, Block] = {}
        for layer in part.blocks:
            first = config.first_like(layer)
            like = blocks[str(first)] if first < layer else None
            blocks[str(layer)] = Block(layer, config, axes, recompute, like)
        self.blocks = nn.ModuleDict(blocks)
        self.norm: nn.RMSNorm | None = None
        self.head: VocabularyHead | None = None
        if part.head:
            self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
            self.head = VocabularyHead(config.width, config.vocabulary, axes.tp)
        self.tied = config.tie_embeddings and part.embedding and part.head
        self.tie()
        if config.auxiliary:
            train_auxiliary_alone(self)

    def tie(self) -> None:
        """Give the output layer the embedding's weights, if it shares them."""
        if self.tied and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight

    def routers(self) -> Iterator[tuple[list[int], Router]]:
        """Each router, with the numbers of the layers that have it: the first one names it."""
        layers: dict[Router, list[int]] = {}
        for block in cast(Iterable[Block], self.blocks.values()):
            if block.moe is not None:
                layers.setdefault(block.moe.router, []).append(block.layer)
        for router, numbers in layers.items():
            yield numbers, router

    def forward(self, x: Tensor, info: TokenInfo | None = None) -> DecoderOutput:
        """``x``: int64 token ids (B, S), S the positions of this context-parallel rank; for a part
        without an embedding, what the part before gave. ``info``: of the B · S tokens whose
        activations this rank holds, in that order."""
        info = info or TokenInfo()
        if self.embedding is not None:
            x = self.embedding(x)
        state: Tensor | None = None
        if self.embedding is None and self.carried:
            x, state = x.split([x.shape[-1] - self.carried, self.carried], -1)
        document_BS = self._documents(info, x.shape[0])
        modalities: Modalities | None = None
        if self.untie.any:
            modalities = Modalities.of(info, x.shape[:2], self.untie.modalities, self.axes.tp)
        losses: dict[str, Tensor] = {}
        stats: dict[int, LayerStats] = {}
        foresight: tuple[Tensor, ...] = ()
        for block in cast(Iterable[Block], self.blocks.values()):
            out: BlockOutput = block(x, info, document_BS, modalities, state)
            x, state = out.x, out.router_state
            for name, loss in out.losses.items():
                losses[name] = losses.get(name, 0.0) + loss
            if out.stats is not None:
                stats[block.layer] = out.stats
            foresight += out.foresight
        if self.head is not None:
            assert self.norm is not None
            x = self.head(self.norm(x))
        elif self.carried:
            if state is None:
                state = x.new_zeros(*x.shape[:-1], self.carried)
            x = torch.cat([x, state], -1)
        return DecoderOutput(x, losses, stats, foresight)

    def _documents(self, info: TokenInfo, rows: int) -> Tensor | None:
        """int64 (B, S) of whole sequences, in the order of their positions."""
        if not self.within_documents or info.document_T is None:
            return None
        tp, cp = self.axes.tp, self.axes.cp
        document_BS = gather(gather(info.document_T.view(rows, -1), 1, tp), 1, cp)
        if cp.size == 1:
            return document_BS
        order_S = all_context_positions(document_BS.shape[1], cp, document_BS.device).argsort()
        return document_BS[:, order_S]
