"""Inputs, targets and masks of packed rows."""

import numpy as np
import torch

from coterie.data.batch import IGNORE, collate
from coterie.data.vocabulary import Vocabulary

V = Vocabulary(levels=3, side=2)


def test_targets_stay_inside_a_document_and_skip_padding() -> None:
    rows = np.array(
        [
            [65, V.boi, 256, 257, V.eod, 66, V.eod, V.pad, V.pad],
            [70, 71, 72, 73, 74, 75, 76, 77, 78],
        ],
        dtype=np.uint16,
    )
    batch = collate(rows, V, np.array([40, 41]), np.array([3, 5]))
    x = IGNORE
    assert batch.tokens_BS.tolist() == rows[:, :-1].tolist()
    assert batch.targets_BS.tolist() == [
        [V.boi, 256, 257, V.eod, x, V.eod, x, x],
        [71, 72, 73, 74, 75, 76, 77, 78],
    ]
    assert batch.modality_BS.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert batch.segment_BS.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2], [0] * 8]
    assert batch.padding_BS.tolist() == [[False] * 7 + [True], [False] * 8]
    assert batch.sample_B.tolist() == [40, 41]
    assert batch.index_B.tolist() == [3, 5]


def test_a_batch_moves_whole() -> None:
    rows = np.full((2, 5), 65, dtype=np.uint16)
    batch = collate(rows, V, np.arange(2), np.arange(2))
    moved = batch.to("meta")
    assert moved.tokens_BS.device.type == moved.index_B.device.type == "meta"
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == batch.segment_BS.dtype == torch.int64
