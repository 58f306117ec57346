"""AdamW or Muon, and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coterie.parallel.config import OptimizerConfig
from coterie.parallel.model import ParallelModel, local
from coterie.parallel.muon import Muon, Settings, takes


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate for the update that follows ``step`` finished ones, of ``steps`` in all."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    left = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum",)


def moments_of(config: OptimizerConfig, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter whose whole has ``shape``; AdamW also counts its
    steps."""
    return MUON_MOMENTS if config.kind == "muon" and takes(name, shape) else ADAMW_MOMENTS


class Optimizer:
    """AdamW (fused), and Muon for matrices if so configured, over what this rank holds of each
    parameter; the rate is set before each step.

    Shards are plain tensors to it, which share their memory with the model's.
    """

    def __init__(self, model: ParallelModel, config: OptimizerConfig) -> None:
        self._model = model
        self._own = {
            name: _own(parameter) for name, parameter in model.named() if parameter.requires_grad
        }
        self.parameters = {name: own for name, own in self._own.items() if own.numel()}
        """By global name; frozen ones, and a shard without elements, are left out."""
        shapes = {name: model.places[name].box.whole for name in self._own}
        self.moment_names = {n: moments_of(config, n, shapes[n]) for n in self.parameters}
        self.muon: Muon | None = None
        if config.kind == "muon":
            self.muon = Muon(
                {name: own for name, own in self._own.items() if takes(name, shapes[name])},
                model.places,
                model.ranks.groups,
                config.lr,
                Settings(config.momentum, config.nesterov, config.muon_scale, config.weight_decay),
            )
        rest = [n for n, moments in self.moment_names.items() if moments == ADAMW_MOMENTS]
        groups = [
            {"params": [self.parameters[n] for n in rest if chosen(len(shapes[n]))], **settings}
            for chosen, settings in (
                (lambda d: d >= 2, {"weight_decay": config.weight_decay}),
                (lambda d: d < 2, {"weight_decay": 0.0}),
            )
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]] or groups[:1],
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
        if self.muon is not None:
            self.muon.lr = rate

    def step(self) -> None:
        """Update the parameters from the model's gradients."""
        for name, parameter in self._model.named():
            if parameter.grad is not None:
                self._own[name].grad = local(parameter.grad)
        if self.muon is not None:
            self.muon.step()
        self.adamw.step()

    def moments(self, name: str) -> dict[str, Tensor]:
        """What is kept of a parameter, made (zero) where there is nothing yet; with AdamW's
        ``step``."""
        names = self.moment_names[name]
        if names == MUON_MOMENTS:
            assert self.muon is not None
            return {"momentum": self.muon.momenta[name]}
        parameter = self.parameters[name]
        state = self.adamw.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in names:
                state[moment] = torch.zeros_like(parameter)
        return {key: state[key] for key in ("step", *names)}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for own in self._own.values():
            own.grad = None
        self._model.zero_grad(set_to_none=True)


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """The shard as a parameter that shares its memory; what is not sharded is itself."""
    if isinstance(parameter, DTensor):
        return nn.Parameter(local(parameter.detach()))
    return parameter
