"""AdamW and its learning-rate schedule."""

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn

from coterie.core.config import Config


class OptimizerConfig(Config):
    """AdamW, with linear warm-up and cosine decay."""

    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Where the decay ends, after the last step: a fraction of the peak."""
    warmup: int = Field(default=50, ge=0)
    """Steps of linear warm-up from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, on matrices alone: not on norm gains."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null: gradients are not clipped."""

    @model_validator(mode="after")
    def _betas(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must be in [0, 1)")
        return self


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate for the update that follows ``step`` finished ones, of ``steps`` in all."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over ``model``; the learning rate is set before each step."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
