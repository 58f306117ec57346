"""What a run can be held to: hashes of its state that any layout computes alike.

Weights and optimizer state that are equal to the last bit have equal hashes however they are cut.
Sample ids and random keys are hashed as the ranks used them, not as they should have.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coterie.core.digest import digest_int64
from coterie.core.random import fold, fold_in, key
from coterie.data import Batch
from coterie.parallel.micro_batch import token_info
from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part
from coterie.parallel.run_state import model_parts, optimizer_parts

_ALL = 1 << 64


@dataclass(frozen=True)
class Certificate:
    """A step's hashes, 16 hexadecimal digits each."""

    step: int
    samples: str
    """Of the samples that the step trained on: (number in the run, row of the dataset)."""
    rng: str
    """Of the random keys of its tokens."""
    weights: str
    """Of all weights after the step."""
    optimizer: str
    """Of the optimizer's moments and step counts after it."""
    history: str
    """The layouts so far, with the step after which each took over: bits depend on them."""


def certificate(
    step: int,
    model: ParallelModel,
    optimizer: Optimizer,
    batches: list[Batch],
    seed: int,
    history: str,
) -> Certificate:
    """The certificate of ``step``, just taken on ``batches``. All ranks call and get the same."""
    ranks = model.ranks
    hashes = torch.stack(
        [
            _samples(batches, model),
            _keys(batches, model, seed),
            _parts(model_parts(model), ranks.device),
            _parts(optimizer_parts(model, optimizer), ranks.device),
        ]
    )
    if ranks.everyone is not None:
        dist.all_reduce(hashes, group=ranks.everyone)  # int64 sums wrap, as they are to
    samples, rng, weights, moments = (as_hex(value) for value in hashes.tolist())
    return Certificate(step, samples, rng, weights, moments, history)


def as_hex(hash_of: int) -> str:
    """16 hexadecimal digits."""
    return f"{hash_of % _ALL:016x}"


def hash_of_tensors(digests: Mapping[str, int]) -> str:
    """The hash of a set of tensors from their digests by name, as checkpoints list them."""
    return as_hex(sum(_factor(name) * value for name, value in digests.items()))


def _factor(name: str) -> int:
    """An odd number for each name: hashes of tensors add up, and none can stand for another."""
    return key("certificate", name) | 1


def _parts(parts: dict[str, Part], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, part in parts.items():
        if part.owner:
            total += digest_int64(part.tensor, part.box) * _factor(name)
    return total


def _samples(batches: list[Batch], model: ParallelModel) -> Tensor:
    """Counted by one rank of those that share the sequences."""
    total = torch.zeros((), dtype=torch.int64, device=model.ranks.device)
    if model.ranks.place.pp == 0 and model.ranks.axes.sequence.rank == 0:
        for batch in batches:
            total += fold_in(fold(batch.sample_B, "samples"), batch.index_B).sum()
    return total


def _keys(batches: list[Batch], model: ParallelModel, seed: int) -> Tensor:
    """Of each token on the rank that holds its activations."""
    total = torch.zeros((), dtype=torch.int64, device=model.ranks.device)
    if model.ranks.place.pp == 0:
        for batch in batches:
            info = token_info(batch, model.ranks.axes, seed)
            assert info.key_T is not None
            total += fold(info.key_T, "certificate").sum()
    return total
