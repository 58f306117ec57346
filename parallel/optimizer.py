"""AdamW and its learning-rate schedule."""

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.distributed.tensor import DTensor

from coterie.core.config import Config
from coterie.parallel.model import ParallelModel, local


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


class Optimizer:
    """Fused AdamW over what this rank holds of each parameter; the rate is set before each step.

    Shards are plain tensors to it, which share their memory with the model's.
    """

    def __init__(self, model: ParallelModel, config: OptimizerConfig) -> None:
        self._model = model
        self.parameters: dict[str, nn.Parameter] = {}
        """By global name; frozen ones, and a shard without elements, are left out."""
        for name, parameter in model.named():
            if not parameter.requires_grad:
                continue
            own = parameter
            if isinstance(parameter, DTensor):
                own = nn.Parameter(local(parameter.detach()))
            if own.numel():
                self.parameters[name] = own
        dims = {name: len(model.places[name].box.whole) for name in self.parameters}
        groups = [
            {"params": [p for n, p in self.parameters.items() if chosen(dims[n])], **settings}
            for chosen, settings in (
                (lambda d: d >= 2, {"weight_decay": config.weight_decay}),
                (lambda d: d < 2, {"weight_decay": 0.0}),
            )
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.adamw.param_groups[0]["lr"]

    @lr.setter
    def lr(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        """Update the parameters from the model's gradients."""
        for name, parameter in self._model.named():
            if name in self.parameters and parameter.grad is not None:
                self.parameters[name].grad = local(parameter.grad)
        self.adamw.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.adamw.zero_grad(set_to_none=True)
        self._model.zero_grad(set_to_none=True)
