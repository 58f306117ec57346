"""megatron-core's MoE layer on one GPU, with random weights of its own.

Its grouped path, GroupedMLP, is made for the package ``grouped_gemm``, which has to be compiled
against the installed torch. Where it is missing PyTorch's grouped product takes its place, and the
name says so. TransformerEngine, which its newest path needs, is not used.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.cases import Case
from benchmarks.gpu.experts import grouped_mm


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
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_layer import MoELayer

    _start()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.D,
        num_attention_heads=1,
        ffn_hidden_size=case.F,
        moe_ffn_hidden_size=case.F,
        num_moe_experts=case.E,
        moe_router_topk=case.K,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        moe_use_legacy_grouped_gemm=grouped,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    spec = get_moe_module_spec(
        use_te=False,
        num_experts=case.E,
        moe_grouped_gemm=grouped,
        moe_use_legacy_grouped_gemm=grouped,
    )
    return _Megatron(MoELayer(config, spec.submodules, layer_number=1).to(device))


def _start() -> None:
    """One rank, and its random numbers."""
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def _gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    offset_E = batch_sizes.to(a.device).cumsum(0).to(torch.int32)
    return grouped_mm(a, b.mT if trans_b else b, offs=offset_E)
