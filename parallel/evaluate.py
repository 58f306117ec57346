"""Loss on held-out data, whole and by modality."""

import torch
from torch import Tensor

from coterie.comm.reduce import sum_over
from coterie.data import IGNORE, IMAGE, TEXT, TokenDataset, each_row
from coterie.models import Decoder
from coterie.parallel.distributed import Ranks
from coterie.parallel.micro_batch import cross_entropy, token_info
from coterie.parallel.precision import Precision, autocast

MODALITIES = {"text": TEXT, "image": IMAGE}


@torch.no_grad()
def evaluate(
    model: Decoder,
    dataset: TokenDataset,
    ranks: Ranks,
    precision: Precision,
    batch: int,
    sequences: int | None = None,
) -> dict[str, float]:
    """Nats per target token: ``loss``, ``loss/text``, ``loss/image`` (by the *target's* modality).

    ``batch``: sequences at once over all ranks; ``sequences``: at most so many, None: all of them.
    All ranks call and get the same. A modality without targets is left out.
    """
    was_training = model.training
    model.eval()
    vocabulary = dataset.vocabulary
    sums = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=ranks.device)
    for number, part in enumerate(each_row(dataset, batch, ranks.rank, ranks.world)):
        if sequences is not None and number * batch >= sequences:
            break
        part = part.to(ranks.device)
        with autocast(precision, ranks.device):
            output = model(part.tokens_BS, token_info(part))
        counted_BS = part.targets_BS != IGNORE
        if sequences is not None:
            counted_BS = counted_BS & (part.index_B < sequences)[:, None]
        modality_BS = vocabulary.modality(part.targets_BS)
        entropy_BS = cross_entropy(output.logits_BSV, part.targets_BS).double()
        for column, modality in enumerate(MODALITIES.values()):
            mask_BS = counted_BS & (modality_BS == modality)
            sums[0, column] += (entropy_BS * mask_BS).sum()
            sums[1, column] += mask_BS.sum()
    model.train(was_training)
    return _means(sum_over(sums, ranks.data_group))


def _means(sums: Tensor) -> dict[str, float]:
    total, count = sums.tolist()
    result = {"loss": sum(total) / max(1.0, sum(count))}
    for column, name in enumerate(MODALITIES):
        if count[column]:
            result[f"loss/{name}"] = total[column] / count[column]
    return result
