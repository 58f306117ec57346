"""The MoE layers of other projects, built for one process on a CPU, to run beside ours.

Each ``*_layer(shape)`` returns a module that maps (1, T, D) to (1, T, D), with shape's experts,
SwiGLU, softmax top-k; or raises ImportError where the project is not installed.
"""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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
        with _CudaMeansCpu():
            # sequence first; it returns (output, bias)
            return self.layer(x_1TD.transpose(0, 1))[0].transpose(0, 1)


def megatron_layer(shape: Shape) -> nn.Module:
    """megatron-core's MoELayer over SequentialMLP, with its all-to-all dispatcher on one rank."""
    with _CudaMeansCpu():
        _prepare_megatron()
        return _Megatron(megatron_module(shape, ranks=1))


def megatron_module(shape: Shape, ranks: int) -> Any:
    """megatron-core's own module, its experts spread over ``ranks`` processes.

    Its parallel state is there already, and the names of CUDA mean the CPU.
    """
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_layer import MoELayer

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
        expert_model_parallel_size=ranks,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_cpu_initialization=True,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=shape.E, moe_grouped_gemm=False)
    return MoELayer(config, spec.submodules, layer_number=1)


class _CudaMeansCpu(TorchFunctionMode):
    """megatron-core asks for CUDA devices by name; here each of them is the CPU."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _as_numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core turns counts into numpy only when they come from a CUDA tensor."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _NoStream:
    """Stands for a CUDA stream or event: on a CPU everything is in order already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


def _prepare_megatron() -> None:
    """One gloo rank, and what megatron-core 0.16.1 needs without CUDA and TransformerEngine."""
    compile_before = torch.compile
    # its fusions are torch.compile, taken at import; the plain functions are what runs elsewhere
    torch.compile = lambda function=None, **_: function if function else lambda f: f  # type: ignore[assignment]
    try:
        from megatron.core import jit, parallel_state

        jit.disable_jit_fuser()
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    finally:
        torch.compile = compile_before
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.Stream = torch.cuda.Event = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_: _NoStream()  # type: ignore[assignment,return-value]
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy_if_asked
    if not dist.is_initialized():
        store = dist.FileStore(tempfile.mktemp(), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
