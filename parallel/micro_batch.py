"""From a data batch to what this rank's part of the model is given."""

from torch import Tensor

from coterie.comm.axis import Axes
from coterie.comm.sequence import sequence_part
from coterie.core.random import fold, fold_in
from coterie.data import MODALITIES, Batch
from coterie.moe.tokens import TokenInfo


def token_info(
    batch: Batch, axes: Axes, seed: int | None = None, k: int | None = None
) -> TokenInfo:
    """The facts of the tokens whose activations this rank holds, of the batch's B · S.

    With ``seed`` (training) they carry random keys, from the sample's number in the run and the
    position: the same in every layout. ``k``: experts for each token, where the router is asked.
    """
    key_T = None
    position_BS = batch.sample_B.new_ones(batch.tokens_BS.shape).cumsum(1) - 1
    if seed is not None:
        sample_BS = batch.sample_B[:, None].expand_as(batch.tokens_BS)
        key_T = fold_in(fold(sample_BS, "routing", seed), position_BS).flatten()
    rows = batch.tokens_BS.shape[0]
    sequence_B = batch.sample_B.new_ones(rows).cumsum(0) - 1
    info = TokenInfo(
        token_T=batch.tokens_BS.flatten(),
        modality_T=batch.modality_BS.flatten(),
        modalities=len(MODALITIES),
        padding_T=batch.padding_BS.flatten(),
        sequence_T=sequence_B[:, None].expand_as(batch.tokens_BS).flatten(),
        position_T=position_BS.flatten(),
        document_T=batch.segment_BS.flatten(),
        key_T=key_T,
        k=k,
    )
    return local_info(info, rows, axes)


def by_row(x_T: Tensor, rows: int) -> Tensor:
    """(T,) as (rows, T / rows), also where there are none."""
    return x_T.view(rows, x_T.numel() // max(1, rows))


def local_info(info: TokenInfo, rows: int, axes: Axes) -> TokenInfo:
    """Of facts about ``rows`` whole sequences, those of the tokens that this rank holds."""

    def part(x_T: Tensor) -> Tensor:
        return sequence_part(by_row(x_T, rows), axes.cp, axes.tp).flatten()

    return info.map(part)
