"""Small datasets for the tests of data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coterie.data.shards import TokenDataset, open_dataset
from coterie.data.vocabulary import Vocabulary
from coterie.data.writer import write_dataset

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Writes a dataset of ``rows`` full rows, row n of bytes n % 256; returns its path."""

    def make(
        rows: int = 10, sequence: int = 7, name: str = "set", shard_rows: int = 4, first: int = 0
    ) -> Path:
        vocabulary = Vocabulary(levels=3, side=2)
        target = tmp_path / name
        tokens = shard_rows * (sequence + 1)
        with write_dataset(target, vocabulary, sequence, {}, shard_tokens=tokens) as writer:
            for split, count in (("train", rows), ("held_out", 3)):
                for n in range(first, first + count):
                    writer.add(split, vocabulary.join([np.full(sequence, n % 256)]))
        return target

    return make


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> TokenDataset:
    """Ten rows in three shards."""
    return open_dataset(make_dataset())
