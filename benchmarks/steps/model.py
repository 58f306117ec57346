"""The model, the layouts and the data that every contestant of ``benchmarks/step.py`` is given."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """A decoder of mixture-of-experts blocks: RMSNorm, rotary positions, SwiGLU, softmax top-k with
    renormalised weights, untied embeddings, no biases, no dropout; fp32 throughout."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    experts: int = 8
    hidden: int = 512
    """Of each expert."""
    k: int = 2
    vocabulary: int = 1024
    sequence: int = 256
    global_batch: int = 8
    """Sequences in a step."""
    micro_batch: int = 2
    """Sequences of one data-parallel rank at once."""
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    balance_loss: float = 0.01
    """Coefficient of the Switch balance loss."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices alone."""
    clip: float = 1.0
    """Largest global gradient norm."""

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.global_batch * self.sequence

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        block = 4 * self.width**2 + self.experts * (3 * self.width * self.hidden + self.width)
        return self.layers * (block + 2 * self.width) + (2 * self.vocabulary + 1) * self.width

    @property
    def product_flops_per_token(self) -> int:
        """Multiplications and additions of the products with weights, forward and backward."""
        block = 4 * self.width**2 + self.k * 3 * self.width * self.hidden
        block += self.experts * self.width
        return 3 * 2 * (self.layers * block + self.vocabulary * self.width)


@dataclass(frozen=True)
class Split:
    """How the ranks of a case share the work; data parallelism is what is left of ``world``."""

    world: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def dp(self) -> int:
        """Parts of the global batch."""
        return self.world // (self.tp * self.pp)

    def micro_batches(self, model: Model) -> int:
        """Micro-batches of each data-parallel rank in a step."""
        return model.global_batch // self.dp // model.micro_batch


CASES = {
    "dp2-ep2": Split(world=2, ep=2),
    "dp4-ep2": Split(world=4, ep=2),
    "tp2-pp2": Split(world=4, tp=2, pp=2, etp=2),
    "tp2-pp2-ep2": Split(world=4, tp=2, pp=2, ep=2),
}
"""``tp2-pp2``: experts are split by width over the tp ranks; ``tp2-pp2-ep2``: they are shared out
among them. Both pipelines run 1F1B."""


class Contestant(Protocol):
    """A model with its optimizer, on one rank of several."""

    @property
    def parameters(self) -> int:
        """Weights of the whole model, over all ranks."""

    def step(self, tokens_BC: Tensor) -> float | None:
        """One whole optimizer step. Every rank is given the same global batch, B × (S + 1) int64.

        Returns the mean cross-entropy in nats where this rank knows it.
        """


def batch(model: Model, step: int) -> Tensor:
    """(B, S + 1) int64: walks of a fixed permutation of the vocabulary, one token in twenty drawn
    at random. It can be learnt, so a loss that does not fall shows a fault."""
    follow_V = torch.randperm(model.vocabulary, generator=torch.Generator().manual_seed(0))
    gen = torch.Generator().manual_seed(step)
    shape = (model.global_batch, model.sequence + 1)
    noise_BC = torch.randint(0, model.vocabulary, shape, generator=gen)
    noisy_BC = torch.rand(shape, generator=gen) < 0.05
    tokens_BC = noise_BC.clone()
    for place in range(1, shape[1]):
        followed_B = follow_V[tokens_BC[:, place - 1]]
        tokens_BC[:, place] = torch.where(noisy_BC[:, place], noise_BC[:, place], followed_B)
    return tokens_BC
