"""The MoE layers of other projects, built for one process on a CPU, to run beside ours.

Each ``*_layer(shape)`` returns a module that maps (1, T, D) to (1, T, D), with shape's experts,
SwiGLU, softmax top-k; or raises ImportError where the project is not installed.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps.megatron_cpu import import_megatron, on_cpu


@dataclass(frozen=True)
class Shape:
    """A layer: T tokens of width D, E experts of hidden width F, K choices."""

    name: str
    D: int
    F: int
    E: int
    K: int
    T: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of the experts' products, forward and backward."""
        return 3 * 2 * 3 * self.T * self.K * self.D * self.F


def hugging_face_layer(shape: Shape, implementation: str) -> nn.Module:
    """transformers' MixtralSparseMoeBlock; ``implementation``: how it runs its experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.K,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


class _Megatron(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_1TD: Tensor) -> Tensor:
        with on_cpu():
            # sequence first; it returns (output, bias)
            return self.layer(x_1TD.transpose(0, 1))[0].transpose(0, 1)


def megatron_layer(shape: Shape) -> nn.Module:
    """megatron-core's MoELayer over SequentialMLP, with its all-to-all dispatcher on one rank."""
    import_megatron()
    with on_cpu():
        start_megatron("gloo")
        return _Megatron(megatron_module(shape, use_cpu_initialization=True))


def start_megatron(backend: str) -> None:
    """megatron-core's parallel state, of this process alone, and its random numbers."""
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def megatron_module(shape: Shape, grouped: bool = False, **settings: Any) -> Any:
    """megatron-core's own module; its parallel state is there already.

    ``grouped``: GroupedMLP, else SequentialMLP; ``settings``: more of its TransformerConfig.
    """
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_layer import MoELayer

    gemm = {"moe_grouped_gemm": grouped, "moe_use_legacy_grouped_gemm": grouped}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.D,
        num_attention_heads=1,
        ffn_hidden_size=shape.F,
        moe_ffn_hidden_size=shape.F,
        num_moe_experts=shape.E,
        moe_router_topk=shape.K,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        **gemm,
        **settings,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=shape.E, **gemm)
    return MoELayer(config, spec.submodules, layer_number=1)
