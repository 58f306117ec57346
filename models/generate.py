"""Sampling continuations, the same for a prompt whatever it is batched with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.reduce import sum_over
from coterie.core.random import fold, fold_in, uniform
from coterie.moe.tokens import TokenInfo

CPU = torch.device("cpu")
Logits = Callable[[Tensor, TokenInfo], Tensor]
"""A model in evaluation: int64 ids (B, S) and what is known of them → logits (B, S, V)."""


@torch.no_grad()
def generate(
    logits: Logits,
    prompts: Sequence[Tensor],
    numbers: Sequence[int],
    *,
    stop: Sequence[int],
    length: int,
    temperature: float,
    top_k: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    modality: Callable[[Tensor], Tensor] | None = None,
    device: torch.device = CPU,
    group: ProcessGroup | None = None,
) -> list[Tensor]:
    """The continuation of each prompt (int64, one-dimensional): at most ``length`` new ids, ending
    with the first one in ``stop``.

    The draws of a prompt are keyed by (seed, its number in ``numbers``, position), so splitting
    prompts over processes changes nothing. ``temperature`` 0 takes the most likely id; ``top_k``
    keeps the k most likely; ids from ``vocabulary`` up, which no data used, are never drawn.
    ``modality``: that of token ids, where routers ask for it. With a model spread over ``group``
    all its ranks call; each may have prompts of its own, or none.

    Raises ValueError for a prompt without a token.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt must have at least one token")
    start_B = torch.tensor([len(p) for p in prompts], device=device, dtype=torch.int64)
    tokens_BS, info_length = _padded(prompts, length, device), max(map(len, prompts), default=1)
    length_B = start_B.clone()
    row_B = torch.arange(len(prompts), device=device)
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    keys_B = fold(torch.tensor(list(numbers), dtype=torch.int64, device=device), "sample", seed)
    stop_K = torch.tensor(list(stop), dtype=torch.int64, device=device)
    for new in range(length):
        if int(sum_over((~done_B).sum(), group)) == 0:
            break
        seen_BS = tokens_BS[:, : info_length + new]
        position_S = torch.arange(seen_BS.shape[1], device=device)
        info = TokenInfo(
            token_T=seen_BS.flatten(),
            modality_T=None if modality is None else modality(seen_BS).flatten(),
            padding_T=(position_S >= length_B[:, None]).flatten(),
            sequence_T=row_B.repeat_interleave(seen_BS.shape[1]),
        )
        logits_BSV = logits(seen_BS, info)[..., :vocabulary]
        last_BV = logits_BSV[row_B, length_B - 1]
        next_B = _draw(last_BV.double(), fold_in(keys_B, length_B), temperature, top_k)
        open_B = ~done_B
        tokens_BS[open_B, length_B[open_B]] = next_B[open_B]
        length_B += open_B
        done_B |= torch.isin(next_B, stop_K) & open_B
    return [
        row[begin:end]
        for row, begin, end in zip(tokens_BS, start_B.tolist(), length_B.tolist(), strict=True)
    ]


def _padded(prompts: Sequence[Tensor], length: int, device: torch.device) -> Tensor:
    longest = max(map(len, prompts), default=1)
    tokens_BS = torch.zeros(len(prompts), longest + length, dtype=torch.int64, device=device)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens_BS


def _draw(logits_BV: Tensor, keys_B: Tensor, temperature: float, top_k: int | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k is not None and top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    cumulative_BV = (logits_BV / temperature).softmax(-1).cumsum(-1)
    point_B1 = uniform(keys_B, 1, double=True) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(1)
