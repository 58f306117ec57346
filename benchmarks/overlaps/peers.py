"""megatron-core's and DeepSpeed's MoE layers over the same ranks, on CPUs, with our weights.

All have the same experts (SwiGLU without biases), the same softmax top-k with weights that sum to
1, and drop nothing.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import Shape, megatron_module
from benchmarks.steps.megatron_cpu import import_megatron, on_cpu
from coterie.moe.layer import MoELayer


class Peer(ABC):
    """Another project's layer. ``experts``: (w_in, w_out) of each local one, (2F, D): gate, then
    up, and (D, F)."""

    def __init__(
        self, module: nn.Module, router: Tensor, experts: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self.module, self.router, self.experts = module, router, experts

    @torch.no_grad()
    def load(self, ours: MoELayer) -> None:
        """Take over our layer's weights."""
        self.router.copy_(ours.router.weight)
        own = ours.experts
        for (w_in, w_out), in_PFD, out_FD in zip(
            self.experts, own.w_in_EPFD, own.w_out_EFD, strict=True
        ):
            w_in.copy_(in_PFD.flatten(0, 1))
            w_out.copy_(out_FD.t())

    def around(self) -> AbstractContextManager[None]:
        """What its forward and backward pass run in."""
        return nullcontext()

    def prepare(self, x_TD: Tensor) -> None:
        self.module.zero_grad(set_to_none=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        with self.around():
            return self._output(x_TD)

    def backward(self, y_TD: Tensor, dy_TD: Tensor) -> None:
        with self.around():
            y_TD.backward(dy_TD)

    @abstractmethod
    def _output(self, x_TD: Tensor) -> Tensor:
        """The layer's result, (T, D)."""

    def gradients(self) -> list[Tensor]:
        """Of the router's and the experts' weights, in the shape that ours have."""
        d_in, d_out = zip(
            *((_gradient(w_in), _gradient(w_out).t()) for w_in, w_out in self.experts), strict=True
        )
        d_in_EPFD = torch.stack(d_in).unflatten(1, (2, -1))
        return [_gradient(self.router), d_in_EPFD, torch.stack(d_out)]

    @property
    def waited(self) -> float:
        return 0.0


def _gradient(weight: Tensor) -> Tensor:
    """An expert without a row has none."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


class MegatronLayer(Peer):
    """megatron-core's MoELayer: SequentialMLP and the all-to-all dispatcher.

    Raises:
        ImportError: megatron-core is not installed.
    """

    def __init__(self, shape: Shape, ranks: int) -> None:
        import_megatron()
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        with on_cpu():
            parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
            model_parallel_cuda_manual_seed(0)
            module = megatron_module(
                shape, expert_model_parallel_size=ranks, use_cpu_initialization=True
            )
        experts = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in module.experts.local_experts]
        super().__init__(module, module.router.weight, experts)

    def around(self) -> AbstractContextManager[None]:
        return on_cpu()

    def _output(self, x_TD: Tensor) -> Tensor:
        y_T1D, bias = self.module(x_TD[:, None])  # (sequence, batch, width)
        assert bias is None
        return y_T1D.squeeze(1)


class DeepSpeedLayer(Peer):
    """DeepSpeed's MoE, with SwiGLU experts given to it, and no token dropped.

    Its all-to-alls carry as many rows for each expert as the busiest one of any rank gets.

    Raises:
        ImportError: DeepSpeed is not installed.
    """

    def __init__(self, shape: Shape, ranks: int) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.moe.layer import MoE

        if not deepspeed.comm.is_initialized():
            # its all-reduce through shared memory, which hosts do not have in common
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        module = MoE(
            shape.D,
            _SwiGLU(shape.D, shape.F),
            shape.E,
            ep_size=ranks,
            k=shape.K,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        module.set_deepspeed_parallelism()
        inner = module.deepspeed_moe
        experts = [(e.inwards.weight, e.out.weight) for e in inner.experts.deepspeed_experts]
        super().__init__(module, inner.gate.wg.weight, experts)

    def _output(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.module(x_TD)[0]
        return y_TD


class _SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inwards = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inwards(x).chunk(2, -1)
        y: Tensor = self.out(F.silu(gate) * up)
        return y
