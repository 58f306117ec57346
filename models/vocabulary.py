"""Embedding, output layer and loss, with the vocabulary split over tensor-parallel ranks.

Megatron-LM, arXiv 1909.08053, §3: no rank ever holds the logits of the whole vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.comm.axis import Axis, Cut
from coterie.comm.sequence import gather, reduce_scatter

_IGNORE = -100  # the target of a position that has none: torch's default ignore_index


class VocabularyEmbedding(nn.Module):
    """Rows of token ids → activations: V × D, of which this rank holds its part of the ids."""

    def __init__(self, vocabulary: int, width: int, tp: Axis = Axis("tp")) -> None:
        super().__init__()
        self.tp = tp
        mine = tp.part(vocabulary)
        self.first = mine.start
        self.weight = nn.Parameter(torch.empty(len(mine), width))
        self.cuts = {"weight": (Cut(0, tp, vocabulary),)}

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """int64 (B, S) → (B, S / tp, D): of the same tokens, each rank keeps its positions."""
        if self.tp.size == 1:
            return F.embedding(tokens_BS, self.weight)
        local_BS = tokens_BS - self.first
        mine_BS = (local_BS >= 0) & (local_BS < self.weight.shape[0])
        x_BSD = F.embedding(local_BS * mine_BS, self.weight) * mine_BS[..., None]
        return reduce_scatter(x_BSD, 1, self.tp)


class VocabularyHead(nn.Module):
    """Activations → logits: V × D, of which this rank holds its part of the ids."""

    def __init__(self, width: int, vocabulary: int, tp: Axis = Axis("tp")) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(len(tp.part(vocabulary)), width))
        self.cuts = {"weight": (Cut(0, tp, vocabulary),)}

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S / tp, D) → (B, S, V / tp): of all positions, the logits of this rank's ids."""
        return F.linear(gather(x_BSD, 1, self.tp), self.weight)


def cross_entropy(
    logits_BSV: Tensor, targets_BS: Tensor, vocabulary: int, tp: Axis = Axis("tp")
) -> Tensor:
    """-log p(target) of each position, nats, (B, S), at least in float32; 0 where the target
    is -100 (none).

    ``logits_BSV``: of this rank's part of ``vocabulary``. All ranks of ``tp`` get the same result,
    and each the gradient of its own logits.
    """
    logits_BSV = logits_BSV if logits_BSV.element_size() >= 4 else logits_BSV.float()
    if tp.size == 1:
        return F.cross_entropy(
            logits_BSV.transpose(1, 2), targets_BS, ignore_index=_IGNORE, reduction="none"
        )
    return _VocabularyCrossEntropy.apply(logits_BSV, targets_BS, tp.part(vocabulary).start, tp)


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BSV: Tensor, targets_BS: Tensor, first: int, tp: Axis) -> Tensor:
        largest_BS = logits_BSV.amax(-1)
        dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=tp.group)
        shifted_BSV = logits_BSV - largest_BS[..., None]
        local_BS = targets_BS - first
        mine_BS = (local_BS >= 0) & (local_BS < logits_BSV.shape[-1])
        local_BS = local_BS * mine_BS
        chosen_BS = shifted_BSV.gather(-1, local_BS[..., None])[..., 0] * mine_BS
        exp_BSV = shifted_BSV.exp_()
        sums = torch.stack([exp_BSV.sum(-1), chosen_BS])
        dist.all_reduce(sums, group=tp.group)
        total_BS, chosen_BS = sums
        ctx.save_for_backward(exp_BSV, total_BS, local_BS, mine_BS, targets_BS != _IGNORE)
        return (total_BS.log() - chosen_BS).masked_fill(targets_BS == _IGNORE, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BS: Tensor) -> tuple[Tensor, None, None, None]:
        exp_BSV, total_BS, local_BS, mine_BS, counted_BS = ctx.saved_tensors
        grad_BSV = exp_BSV / total_BS[..., None]
        grad_BSV.scatter_add_(-1, local_BS[..., None], -mine_BS[..., None].to(grad_BSV.dtype))
        return grad_BSV * (dy_BS * counted_BS)[..., None], None, None, None
