"""megatron-core's MoE layer on one GPU, with random weights of its own.

Its grouped path, GroupedMLP, is made for the package ``grouped_gemm``, which has to be compiled
against the installed torch. Where it is missing PyTorch's grouped product takes its place, and the
name says so. TransformerEngine, which its newest path needs, is not used.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import Case
from benchmarks.gpu.experts import grouped_mm
from benchmarks.peers import Shape, megatron_module, start_megatron


def makers(case: Case, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """How to make each layer that megatron-core has, by name.

    Raises ImportError where it is not installed.
    """
    from megatron.core.transformer.moe import grouped_gemm_util

    own = grouped_gemm_util.grouped_gemm_is_available()
    if not own:
        grouped_gemm_util.grouped_gemm = grouped_gemm_util  # what it asks is whether there is one
        grouped_gemm_util.ops = SimpleNamespace(gmm=_gmm)
    name = "megatron-core GroupedMLP" + ("" if own else " on PyTorch's grouped product")
    return {
        name: lambda: _layer(case, grouped=True, device=device),
        "megatron-core SequentialMLP": lambda: _layer(case, grouped=False, device=device),
    }


class _Megatron(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        # (sequence, batch, width); it returns (output, bias)
        return self.layer(x_TD[:, None])[0][:, 0]


def _layer(case: Case, grouped: bool, device: torch.device) -> nn.Module:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    start_megatron("nccl")
    shape = Shape(case.name, D=case.D, F=case.F, E=case.E, K=case.K, T=case.tokens)
    module = megatron_module(shape, grouped, params_dtype=torch.bfloat16, bf16=True)
    return _Megatron(module.to(device))


def _gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    offset_E = batch_sizes.to(a.device).cumsum(0).to(torch.int32)
    return grouped_mm(a, b.mT if trans_b else b, offs=offset_E)
