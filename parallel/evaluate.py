"""Loss on held-out data, whole and by modality."""

import torch
from torch import Tensor

from coterie.comm.reduce import sum_over
from coterie.comm.sequence import context_part
from coterie.data import IGNORE, MODALITIES, TokenDataset, each_row
from coterie.models.vocabulary import cross_entropy
from coterie.parallel.forward import forward
from coterie.parallel.micro_batch import token_info
from coterie.parallel.model import ParallelModel
from coterie.parallel.precision import Precision


@torch.no_grad()
def evaluate(
    model: ParallelModel,
    dataset: TokenDataset,
    precision: Precision,
    batch: int,
    sequences: int | None = None,
    k: int | None = None,
) -> dict[str, float]:
    """Nats per target token: ``loss``, ``loss/text``, ``loss/image`` (by the *target's* modality).

    ``batch``: sequences at once over all ranks; ``sequences``: at most so many, None: all of them.
    ``k``: experts for each token, None: as many as the router is configured for.
    All ranks call and get the same. A modality without targets is left out.
    """
    was_training = model.training
    model.eval()
    ranks = model.ranks
    axes = ranks.axes
    sums = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=ranks.device)
    for number, part in enumerate(each_row(dataset, batch, ranks.place.dp, ranks.layout.dp)):
        if sequences is not None and number * batch >= sequences:
            break
        part = part.to(ranks.device)
        logits_BSV = forward(model, part.tokens_BS, token_info(part, axes, k=k), precision)
        if logits_BSV is None:
            continue
        targets_BS = context_part(part.targets_BS, axes.cp)
        entropy_BS = cross_entropy(logits_BSV, targets_BS, model.config.vocabulary, axes.tp)
        if axes.tp.rank > 0:  # all ranks of tp have the same
            continue
        counted_BS = targets_BS != IGNORE
        if sequences is not None:
            counted_BS = counted_BS & (part.index_B < sequences)[:, None]
        modality_BS = dataset.vocabulary.modality(targets_BS)
        for modality in range(len(MODALITIES)):
            mask_BS = counted_BS & (modality_BS == modality)
            sums[0, modality] += (entropy_BS.double() * mask_BS).sum()
            sums[1, modality] += mask_BS.sum()
    model.train(was_training)
    return _means(sum_over(sums, ranks.everyone))


def _means(sums: Tensor) -> dict[str, float]:
    total, count = sums.tolist()
    result = {"loss": sum(total) / max(1.0, sum(count))}
    for column, name in enumerate(MODALITIES):
        if count[column]:
            result[f"loss/{name}"] = total[column] / count[column]
    return result
