"""From a data batch to the model's inputs, and from its logits to a loss."""

import torch.nn.functional as F
from torch import Tensor

from coterie.core.random import fold, fold_in
from coterie.data import IGNORE, Batch
from coterie.moe.tokens import TokenInfo


def token_info(batch: Batch, seed: int | None = None) -> TokenInfo:
    """The facts of the batch's B · S tokens. With ``seed`` (training) they carry random keys, from
    the sample's number in the run and the position: the same in every layout."""
    key_T = None
    if seed is not None:
        sample_BS = batch.sample_B[:, None].expand_as(batch.tokens_BS)
        position_BS = sample_BS.new_ones(sample_BS.shape).cumsum(1) - 1
        key_T = fold_in(fold(sample_BS, "routing", seed), position_BS).flatten()
    rows = batch.tokens_BS.shape[0]
    sequence_B = batch.sample_B.new_ones(rows).cumsum(0) - 1
    return TokenInfo(
        modality_T=batch.modality_BS.flatten(),
        padding_T=batch.padding_BS.flatten(),
        sequence_T=sequence_B[:, None].expand_as(batch.tokens_BS).flatten(),
        document_T=batch.segment_BS.flatten(),
        key_T=key_T,
    )


def cross_entropy_sum(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Σ of -log p(target), nats, over targets that are not ``IGNORE``; at least in float32."""
    return F.cross_entropy(
        _at_least_float32(logits_BSV).flatten(0, 1),
        targets_BS.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """-log p(target) of each position, nats, (B, S); 0 where the target is ``IGNORE``."""
    return F.cross_entropy(
        _at_least_float32(logits_BSV).transpose(1, 2),
        targets_BS,
        ignore_index=IGNORE,
        reduction="none",
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.element_size() >= 4 else x.float()
