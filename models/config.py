"""The config of a decoder-only transformer, and what it says of each layer."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from coterie.core.config import Config
from coterie.csrc.fused_launch import WIDTH
from coterie.models.attention import AttentionConfig
from coterie.models.depths import MixtureOfDepthsConfig
from coterie.models.untied import UntieConfig
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.layer import MoEConfig


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
    expert_counts: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Number of experts of each mixture-of-experts layer, in order (PR-MoE, arXiv 2201.05596, has
    more in the last ones); null: `moe.experts.count` in all."""
    shared_depth: int = Field(default=1, ge=1)
    """So many consecutive blocks share attention and feed-forward (router, experts); each has norms
    of its own (WideNet, arXiv 2107.11817)."""
    untie: UntieConfig = UntieConfig()
    """What has weights of its own for each modality."""
    mixture_of_depths: MixtureOfDepthsConfig | None = None
    """Blocks that only some tokens of a sequence pass; null: all tokens pass all blocks."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """RMSNorm's epsilon, also in attention."""
    tie_embeddings: bool = False
    """Use the embedding's weights as the output layer's."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.attention.check(self.width)
        for layer in self.dense_layers:
            if not 0 <= layer < self.layers:
                raise ValueError(f"dense_layers has {layer}; layers are 0 to {self.layers - 1}")
        self._check_expert_counts()
        self._check_shared_depth()
        self._check_feed_forward()
        if self.moe is not None and self.moe.exchange.kind == "fused" and self.width % WIDTH:
            raise ValueError(
                f"width is {self.width}, but with moe.exchange.kind fused multiples of {WIDTH} are "
                "accepted"
            )
        if self.mixture_of_depths is not None:
            self.mixture_of_depths.check(self.layers, self.moe.router if self.moe else None)
        return self

    def _check_expert_counts(self) -> None:
        counts = self.expert_counts
        if counts is None:
            return
        if self.moe is None:
            raise ValueError("expert_counts needs experts, but moe is null")
        mixtures = [layer for layer in range(self.layers) if self.is_moe(layer)]
        if len(counts) != len(mixtures):
            raise ValueError(
                f"expert_counts names {len(counts)} layers, but {len(mixtures)} of the "
                f"{self.layers} layers are mixtures of experts"
            )
        for layer, count in zip(mixtures, counts, strict=True):
            self.moe.router.check(count)
            like = self.first_like(layer)
            if like in mixtures and counts[mixtures.index(like)] != count:
                raise ValueError(
                    f"expert_counts {list(counts)}: layers {like} and {layer} share their experts "
                    "(shared_depth), but not their number"
                )

    def _check_shared_depth(self) -> None:
        if self.layers % self.shared_depth:
            raise ValueError(
                f"layers {self.layers} must be a multiple of shared_depth {self.shared_depth}"
            )
        for layer in range(self.layers):
            if self.is_moe(layer) != self.is_moe(self.first_like(layer)):
                raise ValueError(
                    f"dense_layers {list(self.dense_layers)}: of {self.shared_depth} blocks that "
                    f"share their layers (shared_depth), {self.first_like(layer)} and {layer} "
                    "are not of the same kind"
                )

    def _check_feed_forward(self) -> None:
        if (self.moe is None or self.dense_layers) and self.feed_forward is None:
            raise ValueError("feed_forward is needed: this model has dense layers")
        if self.untie.ffn and all(self.is_moe(layer) for layer in range(self.layers)):
            raise ValueError(
                "untie.ffn is of dense layers, but all are mixtures of experts: for experts of one "
                "modality each set moe.router.kind to modality"
            )

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` is a mixture of experts."""
        return self.moe is not None and layer not in self.dense_layers

    def depths_of(self, layer: int) -> MixtureOfDepthsConfig | None:
        """How tokens are chosen that pass ``layer``; None: all do."""
        depths = self.mixture_of_depths
        return depths if depths is not None and depths.chooses(layer) else None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses beside the cross-entropy that the model returns in training."""
        router = self.moe.router.loss_names if self.moe else ()
        return (*router, *(self.mixture_of_depths.loss_names if self.mixture_of_depths else ()))

    def experts_of(self, layer: int) -> int:
        """Number of experts of ``layer``; 0: it is dense."""
        if self.moe is None or not self.is_moe(layer):
            return 0
        if self.expert_counts is None:
            return self.moe.experts.count
        return self.expert_counts[sum(self.is_moe(before) for before in range(layer))]

    def moe_of(self, layer: int) -> MoEConfig:
        """Of a mixture of experts, with the number of experts that ``layer`` has."""
        assert self.moe is not None and self.is_moe(layer)
        experts = self.moe.experts.model_copy(update={"count": self.experts_of(layer)})
        return self.moe.model_copy(update={"experts": experts})

    @property
    def carried(self) -> int:
        """Width of what routers tell the next layer's about each token; 0: nothing."""
        return self.moe.router.carried if self.moe else 0

    def first_like(self, layer: int) -> int:
        """The first of the blocks that share attention and feed-forward with ``layer``."""
        return layer - layer % self.shared_depth

    @property
    def auxiliary(self) -> bool:
        """Whether auxiliary routers are trained, and they alone."""
        depths = self.mixture_of_depths
        return (self.moe is not None and self.moe.router.foresees) or (
            depths is not None and depths.auxiliary
        )

    @property
    def foresees(self) -> bool:
        """Whether there are auxiliary routers."""
        depths = self.mixture_of_depths
        return self.auxiliary or (depths is not None and depths.foresees)

    @property
    def causal(self) -> bool:
        """Whether in evaluation a token's logits do not depend on the tokens after it."""
        depths = self.mixture_of_depths
        routing = self.moe is None or self.moe.router.causal
        return routing and (depths is None or depths.causal)
