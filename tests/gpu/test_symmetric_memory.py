"""Two processes on one GPU, which reach each other's windows through symmetric memory.

Kernels of both wait for each other while the GPU gives them turns, so this is slow. The exchange's
collectives are left out: on CUDA they need NCCL, which refuses two ranks on one GPU.
"""

import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu import device as gpu
from coterie.comm.exchange.fused import passes
from coterie.core.errors import UserError
from coterie.csrc.fused_launch import Manner
from tests.distributed import run_ranks
from tests.fused_layer import (
    Errors,
    Found,
    Fused,
    Layer,
    check_errors,
    errors,
    reference,
    summed,
)
from tests.gpu.conftest import ON_HOST

RANKS = 2
LAYER = Layer(R=RANKS, E=4, K=2, T=9 if ON_HOST else 150, D=64, F=128)
MANNER = Manner(communication=2, slabs=1, blocks=3 if ON_HOST else 16)


class Told(NamedTuple):
    """By one rank."""

    lacking: str
    """Why there is no symmetric memory here."""
    ours: Errors
    plain: Errors


def _rank(rank: int, on: str) -> Told:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = gpu.use(on)
    given = LAYER.inputs(device)  # all ranks draw alike
    group = dist.group.WORLD
    assert group is not None
    if on == "cuda":
        from coterie.comm.exchange.fused.windows import domain_of
    else:
        from tests.comm.test_fused_exchange import domain as domain_of
    domain = domain_of(group, LAYER.D)
    sent = Fused(given).sent
    own, most = sent[rank], max(one.token_V.numel() for one in sent)
    mine = slice(rank * LAYER.E // RANKS, (rank + 1) * LAYER.E // RANKS)
    w_in, w_out = [given.w_in_EHD[mine]], [given.w_out_EFD[mine]]
    try:
        here = [domain.here(own.plan, most)]
    except UserError as error:
        return Told(str(error), {}, {})
    x_VD, dy_VD = (x_RTD[rank][own.token_V] for x_RTD in (given.x_RTD, given.dy_RTD))
    (made,) = passes.forward(here, [x_VD], w_in, w_out, MANNER, keep=True)
    again = [domain.here(own.plan, most)]
    (grad,) = passes.backward(again, [dy_VD], [made.hidden], w_in, w_out, MANNER)

    found = {
        "y": summed(made.returned_VD, own.token_V, LAYER.T),
        "dx": summed(grad.dsent_VD, own.token_V, LAYER.T),
        "dweight": grad.dweight_N,
        "dw_in": grad.dw_in_EHD,
        "dw_out": grad.dw_out_EFD,
    }

    def part(whole: Found) -> Found:
        tokens = slice(rank * LAYER.T, (rank + 1) * LAYER.T)
        return {
            "y": whole["y"][tokens],
            "dx": whole["dx"][tokens],
            "dweight": whole["dweight"][own.received_N],
            "dw_in": whole["dw_in"][mine],
            "dw_out": whole["dw_out"][mine],
        }

    truth = part(reference(given, torch.float64))
    plain = part(reference(given, torch.bfloat16))
    return Told("", errors(found, truth), errors(plain, truth))


def test_two_processes_on_one_gpu(device: torch.device) -> None:
    for told in run_ranks(RANKS, _rank, device.type, timeout=120):
        if told.lacking:
            pytest.skip(told.lacking)
        check_errors(told.ours, told.plain)
