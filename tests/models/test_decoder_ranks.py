"""A decoder with its experts on two ranks equals one process, recomputed or not."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import expert_parallel
from coterie.core.random import fold_in, key
from coterie.models.decoder import Decoder, Recompute
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.models.tiny_decoder import config, decoder, tokens
from tests.moe.tiny import error

S = 7
ROUTER = {"jitter": 0.3, "capacity_factor": 1.1, "balance_loss": 0.3, "z_loss": 0.2}
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
ROWS = {"three and one": [3, 1], "all and none": [4, 0]}


def _step(model: Decoder, rows: slice) -> dict[str, Tensor]:
    tokens_BS = tokens(4, S)[rows]
    key_BS = fold_in(torch.arange(4)[:, None] + key("sample"), torch.arange(S))[rows]
    padding_BS = (torch.arange(4)[:, None] + torch.arange(S) >= S + 1)[rows]
    info = TokenInfo(
        key_T=key_BS.flatten(),
        padding_T=padding_BS.flatten(),
        sequence_T=torch.arange(tokens_BS.shape[0]).repeat_interleave(S),
    )
    out = model.train()(tokens_BS, info)
    loss = (out.x**2).sum() + out.losses["balance"] + out.losses["z"]
    loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        result[name] = parameter.grad
    return result


def _on_rank(rank: int) -> dict[tuple[str, Recompute], dict[str, Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    results = {}
    for name, (first, second) in ROWS.items():
        rows = slice(0, first) if rank == 0 else slice(first, first + second)
        for recompute in RECOMPUTE:
            model = decoder(config(ROUTER), expert_parallel(group), recompute)
            results[name, recompute] = _step(model, rows)
    return results


@pytest.fixture(scope="module")
def spread() -> list[dict[tuple[str, Recompute], dict[str, Tensor]]]:
    return run_ranks(2, _on_rank)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradients_equal_one_process(
    name: str,
    recompute: Recompute,
    spread: list[dict[tuple[str, Recompute], dict[str, Tensor]]],
) -> None:
    truth = _step(decoder(config(ROUTER)), slice(0, 4))
    first, second = (results[name, recompute] for results in spread)
    for key_, true in truth.items():
        if ".experts." in key_:
            ours = torch.cat([first[key_], second[key_]])
        else:
            ours = first[key_] + second[key_]
        assert error(ours, true) < 1e-12, key_
