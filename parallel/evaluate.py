"""Loss on held-out data, whole and by modality; and how well auxiliary routers foresee choices.

A figure of routers that look at later tokens says so in its name: ``non_causal/loss``.
"""

from dataclasses import replace

import torch

from coterie.comm.reduce import sum_over
from coterie.comm.sequence import context_part
from coterie.data import IGNORE, MODALITIES, Batch, TokenDataset, each_row
from coterie.models.decoder import DecoderOutput
from coterie.models.vocabulary import cross_entropy
from coterie.parallel.forward import forward
from coterie.parallel.micro_batch import token_info
from coterie.parallel.model import ParallelModel
from coterie.parallel.precision import Precision

NON_CAUSAL = "non_causal/"
AUXILIARY = "auxiliary/"


def evaluate(
    model: ParallelModel,
    dataset: TokenDataset,
    precision: Precision,
    batch: int,
    sequences: int | None = None,
    k: int | None = None,
) -> dict[str, float]:
    """Nats per target token: ``loss``, ``loss/text``, ``loss/image`` (by the *target's* modality);
    with ``non_causal/`` before it where routers look at later tokens.

    With auxiliary routers, which choose causally, the losses of the choices that they foresee too
    (``non_causal/``), and over all pairs of token and expert, or block (``auxiliary/``):
    ``cross_entropy`` in nats, ``agreement``, the part that they foresee right, and ``always_no``,
    the part that the answer "not chosen" would.

    ``batch``: sequences at once over all ranks; ``sequences``: at most so many, None: all of them.
    ``k``: experts for each token, None: as many as the router is configured for.
    All ranks call and get the same. A modality without targets is left out.
    """
    was_training = model.training
    model.eval()
    metrics: dict[str, float] = {}
    if model.config.causal:
        metrics |= _Pass(model, dataset, precision, batch, sequences, k).losses("")
    if model.config.foresees or not model.config.causal:
        by_choice = _Pass(model, dataset, precision, batch, sequences, k, by_choice=True)
        metrics |= by_choice.losses(NON_CAUSAL)
        metrics |= by_choice.foresight() if model.config.foresees else {}
    model.train(was_training)
    return metrics


class _Pass:
    """The sums of one pass over the data, of all ranks."""

    @torch.no_grad()
    def __init__(
        self,
        model: ParallelModel,
        dataset: TokenDataset,
        precision: Precision,
        batch: int,
        sequences: int | None,
        k: int | None,
        by_choice: bool = False,
    ) -> None:
        ranks = model.ranks
        axes = ranks.axes
        self._losses = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=ranks.device)
        self._foresight = torch.zeros(4, dtype=torch.float64, device=ranks.device)
        for number, part in enumerate(each_row(dataset, batch, ranks.place.dp, ranks.layout.dp)):
            if sequences is not None and number * batch >= sequences:
                break
            part = _first(part, sequences).to(ranks.device)
            info = replace(token_info(part, axes, k=k), by_choice=by_choice)
            logits_BSV = forward(model, part.tokens_BS, info, precision, self._see)
            if logits_BSV is None:
                continue
            targets_BS = context_part(part.targets_BS, axes.cp)
            entropy_BS = cross_entropy(logits_BSV, targets_BS, model.config.vocabulary, axes.tp)
            if axes.tp.rank > 0:  # all ranks of tp have the same
                continue
            counted_BS = targets_BS != IGNORE
            modality_BS = dataset.vocabulary.modality(targets_BS)
            for modality in range(len(MODALITIES)):
                mask_BS = counted_BS & (modality_BS == modality)
                self._losses[0, modality] += (entropy_BS.double() * mask_BS).sum()
                self._losses[1, modality] += mask_BS.sum()
        self._losses = sum_over(self._losses, ranks.everyone)
        self._foresight = sum_over(self._foresight, ranks.everyone)

    def _see(self, output: DecoderOutput) -> None:
        for seen in output.foresight:
            self._foresight += seen

    def losses(self, prefix: str) -> dict[str, float]:
        total, count = self._losses.tolist()
        result = {f"{prefix}loss": sum(total) / max(1.0, sum(count))}
        for column, name in enumerate(MODALITIES):
            if count[column]:
                result[f"{prefix}loss/{name}"] = total[column] / count[column]
        return result

    def foresight(self) -> dict[str, float]:
        pairs, right, chosen, cross_entropy = self._foresight.tolist()
        shares = {
            "cross_entropy": cross_entropy,
            "agreement": right,
            "always_no": pairs - chosen,
        }
        return {f"{AUXILIARY}{name}": value / max(1.0, pairs) for name, value in shares.items()}


def _first(part: Batch, sequences: int | None) -> Batch:
    """``part``, whose rows from ``sequences`` on are nothing but padding."""
    if sequences is None:
        return part
    left_out_B1 = (part.index_B >= sequences)[:, None]
    return replace(
        part,
        targets_BS=part.targets_BS.masked_fill(left_out_B1, IGNORE),
        padding_BS=part.padding_BS | left_out_B1,
    )
