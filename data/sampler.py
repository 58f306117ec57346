"""Which rows each step trains on: a pure function of the seed and the step, never of the ranks."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from coterie.core.errors import UserError
from coterie.data.batch import Batch, collate
from coterie.data.order import Indices, shuffled
from coterie.data.shards import TokenDataset


class Sampler:
    """Endless shuffled batches of a dataset, resumable on any number of ranks.

    The rows form one stream: an epoch after another, each in an order of its own keyed by (seed,
    epoch). Step n takes the n-th ``global_batch`` of it. The whole state is which dataset, which
    seed, and how many global batches are consumed.
    """

    def __init__(self, dataset: TokenDataset, global_batch: int, seed: int) -> None:
        if global_batch < 1:
            raise UserError(f"the global batch is {global_batch} sequences; it must be at least 1")
        self.dataset = dataset
        self.global_batch = global_batch
        self.seed = seed
        self.consumed = 0
        """Global batches consumed; the trainer counts it up."""

    @property
    def epoch(self) -> float:
        """How many times the dataset was consumed."""
        return self.consumed * self.global_batch / len(self.dataset)

    def batch_indices(self, step: int) -> Indices:
        """The rows of global batch ``step`` (from 0): int64, ``global_batch`` of them."""
        start = step * self.global_batch
        return shuffled(len(self.dataset), start, self.global_batch, "rows", self.seed)

    def batch(
        self, step: int, micro: int = 0, accumulation: int = 1, rank: int = 0, world: int = 1
    ) -> Batch:
        """What data-parallel ``rank`` of ``world`` sees in micro-step ``micro`` of a step.

        Micro-step m covers the m-th of ``accumulation`` contiguous parts of the global batch
        whatever ``world`` is; the ranks split that part contiguously. Raises UserError when the
        global batch does not divide so.
        """
        parts = accumulation * world
        if self.global_batch % parts:
            raise UserError(
                f"a global batch of {self.global_batch} sequences cannot be split into "
                f"{accumulation} micro-steps × {world} data-parallel ranks; it must be a multiple "
                f"of {parts}"
            )
        size = self.global_batch // parts
        first = (micro * world + rank) * size
        index_B = self.batch_indices(step)[first : first + size]
        sample_B = np.arange(first, first + size) + step * self.global_batch
        return collate(self.dataset.rows(index_B), self.dataset.vocabulary, sample_B, index_B)

    def state_dict(self) -> dict[str, int | str]:
        """Everything needed to go on: plain values."""
        return {
            "fingerprint": self.dataset.fingerprint,
            "split": self.dataset.split,
            "rows": len(self.dataset),
            "global_batch": self.global_batch,
            "seed": self.seed,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` stopped; raises UserError when that was other data or batches."""
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise UserError(
                f"the sampler's state has the keys {', '.join(sorted(state))}; expected are "
                f"{', '.join(sorted(mine))}"
            )
        for key, advice in _ADVICE.items():
            if state[key] != mine[key]:
                raise UserError(
                    f"{self.dataset.path}: cannot resume: {_WHAT[key]} was {state[key]} and is now "
                    f"{mine[key]}; {advice}"
                )
        if not isinstance(state["consumed"], int) or state["consumed"] < 0:
            raise UserError(
                f"the sampler's state says {state['consumed']!r} batches were consumed; expected "
                "is a whole number from 0"
            )
        self.consumed = state["consumed"]


_WHAT = {
    "fingerprint": "the dataset's fingerprint",
    "split": "the split",
    "rows": "the number of rows",
    "global_batch": "the global batch",
    "seed": "the sampler's seed",
}
_NEW_RUN = "set it back, or start a new run"
_ADVICE = {
    "fingerprint": "the dataset was changed: restore it, or start a new run",
    "split": _NEW_RUN,
    "rows": _NEW_RUN,
    "global_batch": _NEW_RUN,
    "seed": _NEW_RUN,
}


def each_row(
    dataset: TokenDataset, global_batch: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Every row once, in order, for evaluation: ``global_batch // world`` rows a batch and rank.

    All ranks get equally many batches of equal size (their collectives meet): places past the end
    are rows of padding, with sample and index -1. Raises UserError when ``world`` does not divide
    ``global_batch``.
    """
    if global_batch < 1 or global_batch % world:
        raise UserError(
            f"an evaluation batch of {global_batch} sequences cannot be split over {world} ranks; "
            f"it must be a multiple of {world}"
        )
    size = global_batch // world
    for start in range(0, len(dataset), global_batch):
        index_B = np.arange(size) + start + rank * size
        real_B = index_B < len(dataset)
        rows = np.full((size, dataset.sequence + 1), dataset.vocabulary.pad, dtype=np.uint16)
        rows[real_B] = dataset.rows(index_B[real_B])
        number_B = np.where(real_B, index_B, -1)
        yield collate(rows, dataset.vocabulary, number_B, number_B)
