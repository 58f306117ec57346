"""Embedding, output layer and loss over parts of the vocabulary equal the whole, in float64."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.comm.axis import Axis
from coterie.models.vocabulary import VocabularyEmbedding, VocabularyHead, cross_entropy
from tests.distributed import run_ranks
from tests.moe.tiny import error, randn

B, S, D = 2, 8, 5
SIZES = {"even": 12, "a shorter last part": 11, "a last part of one": 13}
LIMIT = 1e-13


def operands(vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, targets (some ignored), weights of V × D, and the gradient of each position's loss."""
    gen = torch.Generator().manual_seed(vocabulary)
    tokens_BS = torch.randint(0, vocabulary, (B, S), generator=gen)
    tokens_BS[0] = torch.linspace(0, vocabulary - 1, S).long()  # both ends, and all parts
    targets_BS = tokens_BS.roll(-1, 1)
    targets_BS[1, 3:5] = -100
    return tokens_BS, targets_BS, randn(vocabulary, D, seed=1), randn(B, S, seed=2)


def names(vocabulary: int, sharp: float) -> str:
    return f"{vocabulary} × {sharp}"


SHARP = (1.0, 300.0)
"""With the second, exp of the logits overflows unless the largest is taken off first."""


def on_rank(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    tp = Axis("tp", rank, world, dist.group.WORLD)
    results = {}
    for vocabulary in SIZES.values():
        for sharp in SHARP:
            results[names(vocabulary, sharp)] = step(vocabulary, sharp, tp)
    return results


def step(vocabulary: int, sharp: float, tp: Axis) -> dict[str, Tensor]:
    tokens_BS, targets_BS, weight_VD, dloss_BS = operands(vocabulary)
    mine = tp.part(vocabulary)
    embedding = VocabularyEmbedding(vocabulary, D, tp).double()
    head = VocabularyHead(D, vocabulary, tp).double()
    with torch.no_grad():
        embedding.weight.copy_(weight_VD[mine.start : mine.stop])
        head.weight.copy_(weight_VD[mine.start : mine.stop].flip(1) * sharp)
    x_BSD = embedding(tokens_BS)
    logits_BSV = head(x_BSD)
    loss_BS = cross_entropy(logits_BSV, targets_BS, vocabulary, tp)
    leaves = [embedding.weight, head.weight, logits_BSV]
    d_embedding, d_head, d_logits = torch.autograd.grad(loss_BS, leaves, dloss_BS)
    return {
        "x": x_BSD.detach(),
        "logits": logits_BSV.detach(),
        "loss": loss_BS.detach(),
        "d embedding": d_embedding,
        "d head": d_head,
        "d logits": d_logits,
    }


def plain(vocabulary: int, sharp: float) -> dict[str, Tensor]:
    """Torch's own functions, on one process."""
    tokens_BS, targets_BS, weight_VD, dloss_BS = operands(vocabulary)
    embedding = nn.Parameter(weight_VD.clone())
    head = nn.Parameter(weight_VD.flip(1) * sharp)
    x_BSD = embedding[tokens_BS]
    logits_BSV = x_BSD @ head.t()
    log_prob_BSV = logits_BSV.log_softmax(-1)
    loss_BS = F.nll_loss(log_prob_BSV.transpose(1, 2), targets_BS, reduction="none")
    grads = torch.autograd.grad(loss_BS, [embedding, head, logits_BSV], dloss_BS)
    found = {"x": x_BSD.detach(), "logits": logits_BSV.detach(), "loss": loss_BS.detach()}
    return found | dict(zip(("d embedding", "d head", "d logits"), grads, strict=True))


@cache
def spread(world: int) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(world, on_rank, world)


DIMS = {"x": 1, "logits": 2, "d logits": 2, "d embedding": 0, "d head": 0}


@pytest.mark.parametrize("sharp", SHARP)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("world", [2, 4])
def test_parts_of_the_vocabulary_equal_the_whole(world: int, size: str, sharp: float) -> None:
    vocabulary = SIZES[size]
    ranks = [results[names(vocabulary, sharp)] for results in spread(world)]
    truth = plain(vocabulary, sharp)
    for key, true in truth.items():
        if key == "loss":
            assert all(error(rank[key], true) < LIMIT for rank in ranks)
            assert not true[1, 3:5].any() and not ranks[0][key][1, 3:5].any()
        else:
            assert error(torch.cat([rank[key] for rank in ranks], DIMS[key]), true) < LIMIT, key
    widths = [rank["logits"].shape[2] for rank in ranks]
    assert sum(widths) == vocabulary
    assert (len(set(widths)) > 1) == (vocabulary % world > 0)


@pytest.mark.parametrize("sharp", SHARP)
def test_one_process_equals_torch(sharp: float) -> None:
    ours, truth = step(11, sharp, Axis("tp")), plain(11, sharp)
    for key, true in truth.items():
        assert error(ours[key], true) < LIMIT, key


def test_the_loss_is_computed_in_float32_at_least() -> None:
    logits_BSV = randn(1, 4, 6, seed=3).bfloat16()
    targets_BS = torch.tensor([[0, 1, 2, -100]])
    loss_BS = cross_entropy(logits_BSV, targets_BS, 6)
    assert loss_BS.dtype == torch.float32
    assert error(loss_BS.double(), cross_entropy(logits_BSV.double(), targets_BS, 6)) < 1e-6
