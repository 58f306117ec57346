"""What the model is given: packed rows as inputs, targets and masks."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.data.vocabulary import Tokens, Vocabulary

IGNORE = -100
"""The target of a position that has none, as ``torch.nn.functional.cross_entropy`` expects."""


@dataclass(frozen=True)
class Batch:
    """B rows of S positions; all int64 but ``padding_BS``, which is bool."""

    tokens_BS: Tensor
    """Inputs."""

    targets_BS: Tensor
    """The next token of the same document, else ``IGNORE``."""

    modality_BS: Tensor
    """``TEXT`` or ``IMAGE``, of the inputs."""

    segment_BS: Tensor
    """Which document of the row, from 0; attention may be kept inside equal numbers. Padding is a
    segment of its own, after the last document's."""

    padding_BS: Tensor
    """True where the input is PAD: keep it from loss, routing and balance."""

    sample_B: Tensor
    """Number of the sample in the run (step · global batch + place), unique; -1 for a row that
    only fills a batch up."""

    index_B: Tensor
    """Row of the dataset; -1 for a row that only fills a batch up."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )


def collate(
    rows: Tokens,
    vocabulary: Vocabulary,
    sample: npt.NDArray[np.int64],
    index: npt.NDArray[np.int64],
) -> Batch:
    """The batch of packed rows (B × S+1).

    A target is the row's next token, except where the next token is padding, and after EOD: the
    first token of the next document has no context, and its neighbour in a row is an accident of
    packing. So a document's loss does not depend on what it is packed with (given attention
    inside segments).
    """
    row_BC = torch.from_numpy(rows.astype(np.int64))
    tokens_BS, next_BS = row_BC[:, :-1].contiguous(), row_BC[:, 1:]
    ends_BS = tokens_BS == vocabulary.eod
    return Batch(
        tokens_BS=tokens_BS,
        targets_BS=next_BS.masked_fill(ends_BS | (next_BS == vocabulary.pad), IGNORE),
        modality_BS=vocabulary.modality(tokens_BS),
        segment_BS=ends_BS.cumsum(1) - ends_BS.long(),
        padding_BS=tokens_BS == vocabulary.pad,
        sample_B=torch.from_numpy(sample),
        index_B=torch.from_numpy(index),
    )
