"""Grouped-query causal attention with rotary positions."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.comm.axis import Axis, Cut
from coterie.comm.sequence import (
    all_context_positions,
    context_positions,
    gather,
    reduce_scatter,
)
from coterie.core.config import Config
from coterie.models.untied import SHARED, Modalities, UntieConfig, UntiedLinear, block_norm, normed


class AttentionConfig(Config):
    """Causal self-attention."""

    heads: int = Field(ge=1)
    """Query heads."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads, shared by groups of query heads; null: as many as `heads`."""
    head_width: int | None = Field(default=None, ge=2)
    """Width of a head; null: model width / heads."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position frequencies."""
    qk_norm: bool = False
    """RMS-normalise each head's query and key (Qwen3)."""
    gate: Literal["head", "element"] | None = None
    """Multiply the heads' results by sigmoid(x · W) before the output projection, with one gate for
    each head or for each element (arXiv 2505.06708); null: no gate."""
    within_documents: bool = False
    """Attend only inside a document of a packed sequence. Costs a B × S × S mask; without it a
    token also sees the documents packed before its own."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.head_width is not None and self.head_width % 2:
            raise ValueError(f"head_width {self.head_width} must be even for rotary positions")
        return self

    def check(self, width: int) -> None:
        """Raise ``ValueError`` when a model of ``width`` does not divide into such heads."""
        if self.head_width is not None:
            return
        if width % self.heads:
            raise ValueError(
                f"width {width} must be a multiple of attention.heads {self.heads}, "
                "unless attention.head_width is given"
            )
        if width // self.heads % 2:
            raise ValueError(
                f"width {width} / attention.heads {self.heads} = {width // self.heads} "
                "must be even for rotary positions"
            )

    def gate_width(self, head_width: int) -> int:
        """Gates of a token, over all heads of ``head_width``; 0: none."""
        return {None: 0, "head": self.heads, "element": self.heads * head_width}[self.gate]


class Attention(nn.Module):
    """softmax(q·kᵀ/√d)·v over earlier positions; weights D × (heads · d), without biases.

    ``tp`` splits the heads; between layers each of its ranks holds a part of the sequence.
    ``cp`` splits the sequence: each of its ranks computes the queries of its positions over the
    keys and values of all. ``norm_eps``: RMSNorm's epsilon, for ``qk_norm``. ``untie``: what has
    weights for each modality, M × each.
    """

    def __init__(
        self,
        width: int,
        config: AttentionConfig,
        norm_eps: float,
        tp: Axis = Axis("tp"),
        cp: Axis = Axis("cp"),
        untie: UntieConfig = SHARED,
    ) -> None:
        super().__init__()
        self.tp, self.cp = tp, cp
        self.untied = untie.qkvo
        linear: Callable[[int, int], nn.Linear | UntiedLinear] = (
            partial(UntiedLinear, modalities=untie.modalities)
            if untie.qkvo
            else partial(nn.Linear, bias=False)
        )
        self.head_width = config.head_width or width // config.heads
        kv_heads = config.kv_heads or config.heads
        for what, count in (("heads", config.heads), ("kv_heads", kv_heads)):
            if count % tp.size:
                raise ValueError(f"{what} {count} do not divide over {tp.size} ranks")
        self.theta = config.rope_theta
        self.within_documents = config.within_documents
        self.grouped = kv_heads != config.heads
        q_width, kv_width = config.heads * self.head_width, kv_heads * self.head_width
        self.q = linear(width, q_width // tp.size)
        self.k = linear(width, kv_width // tp.size)
        self.v = linear(width, kv_width // tp.size)
        self.out = linear(q_width // tp.size, width)
        first = int(self.untied)  # before it counts the modality
        self.cuts = {
            "q.weight": (Cut(first, tp, q_width),),
            "k.weight": (Cut(first, tp, kv_width),),
            "v.weight": (Cut(first, tp, kv_width),),
            "out.weight": (Cut(first + 1, tp, q_width),),
        }
        self.gate: nn.Linear | UntiedLinear | None = None
        if gates := config.gate_width(self.head_width):
            self.gate = linear(width, gates // tp.size)
            self.cuts["gate.weight"] = (Cut(first, tp, gates),)
        norm = partial(block_norm, self.head_width, norm_eps, untie)
        self.q_norm = norm() if config.qk_norm else nn.Identity()
        self.k_norm = norm() if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BSD: Tensor,
        document_BS: Tensor | None = None,
        modalities: Modalities | None = None,
        position_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) → (B, S, D), S this rank's positions. ``document_BS``: int64 over whole
        sequences, used with ``within_documents``. ``modalities``: used where weights are untied.
        ``position_BS``: int64, where the tokens (of all ranks of ``tp``) stand in their sequence,
        if some of it are left out."""
        x = x_BSD = gather(x_BSD, 1, self.tp)
        if self.untied:
            assert modalities is not None
            x = modalities.sort(x_BSD)  # once for all projections
        heads = (-1, self.head_width)
        q_BSHd, k_BSHd, v_BSHd = (
            _places(linear, x, modalities).unflatten(-1, heads)
            for linear in (self.q, self.k, self.v)
        )
        modality_BS = None if modalities is None else modalities.gathered_BS
        q_BHSd = normed(self.q_norm, q_BSHd, modality_BS).transpose(1, 2)
        k_BHSd = normed(self.k_norm, k_BSHd, modality_BS).transpose(1, 2)
        v_BHSd = v_BSHd.transpose(1, 2)
        cos, sin = rotation(q_BHSd, self.theta, self.cp, position_BS)
        q_BHSd, k_BHSd = rotate(q_BHSd, cos, sin), rotate(k_BHSd, cos, sin)
        if not self.within_documents:
            document_BS = None
        if self.cp.size == 1:
            y_BHSd = self._attend(q_BHSd, k_BHSd, v_BHSd, document_BS, 0)
        else:
            y_BHSd = self._attend_over_ranks(q_BHSd, k_BHSd, v_BHSd, document_BS)
        y_BSHd = y_BHSd.transpose(1, 2)
        if self.gate is not None:
            gate_BSG = _places(self.gate, x, modalities).sigmoid()
            y_BSHd = y_BSHd * gate_BSG.unflatten(-1, (y_BSHd.shape[2], -1))
        y = y_BSHd.flatten(2)
        if self.untied:
            assert modalities is not None
            y = modalities.sort(y)
        return reduce_scatter(_places(self.out, y, modalities), 1, self.tp)

    def _attend_over_ranks(
        self, q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, document_BS: Tensor | None
    ) -> Tensor:
        """Both pieces of this rank's queries, each over the keys of all ranks up to its end."""
        kv_BHSd = gather(torch.cat([k_BHSd, v_BHSd], 1), 2, self.cp)
        length = kv_BHSd.shape[2]
        order_S = all_context_positions(length, self.cp, kv_BHSd.device).argsort()
        k_BHSd, v_BHSd = kv_BHSd[:, :, order_S].chunk(2, 1)
        piece = length // (2 * self.cp.size)
        outputs = []
        for q_BHPd, number in zip(
            q_BHSd.split(piece, 2), (self.cp.rank, 2 * self.cp.size - 1 - self.cp.rank), strict=True
        ):
            first, end = number * piece, (number + 1) * piece
            seen_BS = None if document_BS is None else document_BS[:, :end]
            outputs.append(
                self._attend(q_BHPd, k_BHSd[:, :, :end], v_BHSd[:, :, :end], seen_BS, first)
            )
        return torch.cat(outputs, 2)

    def _attend(
        self,
        q_BHSd: Tensor,
        k_BHKd: Tensor,
        v_BHKd: Tensor,
        document_BK: Tensor | None,
        first: int,
    ) -> Tensor:
        """Queries at positions from ``first`` on, over keys from 0 on (K = first + S of them)."""
        mask = None
        queries = q_BHSd.shape[2]
        if document_BK is not None:
            document_BS = document_BK[:, first : first + queries]
            same_BSK = document_BS[:, :, None] == document_BK[:, None, :]
            mask = same_BSK.tril(first)[:, None]
        elif first:
            mask = q_BHSd.new_ones(queries, k_BHKd.shape[2], dtype=torch.bool).tril(first)
        return F.scaled_dot_product_attention(
            q_BHSd,
            k_BHKd,
            v_BHKd,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )


def _places(linear: nn.Linear | UntiedLinear, x: Tensor, modalities: Modalities | None) -> Tensor:
    """The product with ``x``, (B, S, …); an untied layer has it as rows sorted by modality."""
    if isinstance(linear, nn.Linear):
        return linear(x)
    assert modalities is not None
    return modalities.restore(linear(x, modalities))


def rotate(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), halves paired as in Llama."""
    first, second = x_BHSd.chunk(2, -1)
    return x_BHSd * cos + torch.cat([-second, first], -1) * sin


def rotation(
    x_BHSd: Tensor, theta: float, cp: Axis = Axis("cp"), position_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines that :func:`rotate` takes for ``x_BHSd``, which holds the positions of
    context-parallel rank ``cp``, or ``position_BS``.

    Angles are computed in float64: float32 is off by more the farther the position.
    """
    length, width = x_BHSd.shape[-2:]
    if position_BS is not None:
        return _turns(position_BS[:, None], width, theta, x_BHSd.dtype)
    return _rotation(length * cp.size, cp.rank, cp.size, width, theta, x_BHSd.device, x_BHSd.dtype)


@lru_cache(maxsize=16)
def _rotation(
    length: int,
    rank: int,
    ranks: int,
    width: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    position_S = context_positions(length, Axis("cp", rank, ranks), device)
    return _turns(position_S, width, theta, dtype)


def _turns(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles, along a new last dimension."""
    exponent = torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / width
    angle = position.double()[..., None] * theta**-exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
