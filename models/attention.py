"""Grouped-query causal attention with rotary positions."""

from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.core.config import Config


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


class Attention(nn.Module):
    """softmax(q·kᵀ/√d)·v over earlier positions; weights D × (heads · d), without biases.

    ``norm_eps``: RMSNorm's epsilon, for ``qk_norm``.
    """

    def __init__(self, width: int, config: AttentionConfig, norm_eps: float) -> None:
        super().__init__()
        self.head_width = config.head_width or width // config.heads
        kv_heads = config.kv_heads or config.heads
        self.theta = config.rope_theta
        self.within_documents = config.within_documents
        self.grouped = kv_heads != config.heads
        self.q = nn.Linear(width, config.heads * self.head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(config.heads * self.head_width, width, bias=False)
        norm = partial(nn.RMSNorm, self.head_width, eps=norm_eps)
        self.q_norm = norm() if config.qk_norm else nn.Identity()
        self.k_norm = norm() if config.qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, document_BS: Tensor | None = None) -> Tensor:
        """(B, S, D) → (B, S, D). ``document_BS``: int64, used with ``within_documents``."""
        heads = (-1, self.head_width)
        q_BHSd = self.q_norm(self.q(x_BSD).unflatten(-1, heads)).transpose(1, 2)
        k_BHSd = self.k_norm(self.k(x_BSD).unflatten(-1, heads)).transpose(1, 2)
        v_BHSd = self.v(x_BSD).unflatten(-1, heads).transpose(1, 2)
        q_BHSd, k_BHSd = rotate(q_BHSd, self.theta), rotate(k_BHSd, self.theta)
        mask_B1SS = None
        if self.within_documents and document_BS is not None:
            mask_B1SS = (document_BS[:, None, :, None] == document_BS[:, None, None, :]).tril()
        y_BHSd = F.scaled_dot_product_attention(
            q_BHSd,
            k_BHSd,
            v_BHSd,
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=self.grouped,
        )
        return self.out(y_BHSd.transpose(1, 2).flatten(2))


def rotate(x_BHSd: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), halves paired as in Llama.

    Angles are computed in float64: float32 is off by more the farther the position.
    """
    seq, width = x_BHSd.shape[-2:]
    cos_Sd, sin_Sd = _rotation(seq, width, theta, x_BHSd.device, x_BHSd.dtype)
    first, second = x_BHSd.chunk(2, -1)
    return x_BHSd * cos_Sd + torch.cat([-second, first], -1) * sin_Sd


def _rotation(
    seq: int, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    angle_Sd = torch.outer(torch.arange(seq, device=device, dtype=torch.float64), theta**-exponent)
    angle_Sd = torch.cat([angle_Sd, angle_Sd], -1)
    return angle_Sd.cos().to(dtype), angle_Sd.sin().to(dtype)
