"""Initial weights that depend on the seed and the parameter's name, never on the layout."""

import torch
from torch import Tensor, nn

from coterie.core.random import generator
from coterie.models.attention import Attention
from coterie.moe.experts import Experts
from coterie.moe.feed_forward import FeedForward
from coterie.moe.layer import MoELayer
from coterie.moe.routers.top_k import TopKRouter


@torch.no_grad()
def initialise(model: nn.Module, seed: int, residual_branches: int = 1) -> None:
    """Fill every parameter of ``model``, in place.

    Matrices: normal with standard deviation 1/√fan_in; those that write into the residual stream
    are divided by √``residual_branches`` (two for each layer), so that it keeps its scale with
    depth (GPT-2). Embedding, an output layer tied to it, and router: 0.02. Norm gains: 1. Each
    expert is drawn by its global id.
    """
    damping = residual_branches**-0.5
    for prefix, module in model.named_modules():
        match module:
            case Experts():
                _draw_experts(module, seed, prefix, damping)
            case FeedForward():
                hidden, width = module.w_out_FD.shape
                _draw(module.w_in_HD, width**-0.5, seed, f"{prefix}.w_in_HD")
                _draw(module.w_out_FD, hidden**-0.5 * damping, seed, f"{prefix}.w_out_FD")
            case Attention():
                out = module.out
                _draw(out.weight, _fan_in(out) * damping, seed, f"{prefix}.out.weight")
                for name in ("q", "k", "v"):
                    linear = getattr(module, name)
                    _draw(linear.weight, _fan_in(linear), seed, f"{prefix}.{name}.weight")
            case TopKRouter():
                _draw(module.weight, 0.02, seed, f"{prefix}.weight")
            case MoELayer():
                if module.shared_gate_D is not None:
                    module.shared_gate_D.zero_()
            case nn.Embedding():
                _draw(module.weight, 0.02, seed, f"{prefix}.weight")
            case nn.RMSNorm():
                module.weight.fill_(1.0)
            case nn.Linear() if prefix == "head" and not _is_tied(model):
                _draw(module.weight, _fan_in(module), seed, "head.weight")


def _is_tied(model: nn.Module) -> bool:
    return model.get_parameter("head.weight") is model.get_parameter("embedding.weight")


def _fan_in(linear: nn.Linear) -> float:
    return float(linear.in_features) ** -0.5


def _draw(parameter: Tensor, std: float, seed: int, name: str) -> None:
    values = torch.randn(parameter.shape, generator=generator(seed, name), dtype=torch.float64)
    parameter.copy_(values * std)


def _draw_experts(experts: Experts, seed: int, prefix: str, damping: float) -> None:
    for local in range(experts.w_in_EHD.shape[0]):
        name = f"{prefix}.{experts.first + local}"
        hidden, width = experts.w_out_EFD.shape[1:]
        _draw(experts.w_in_EHD[local], width**-0.5, seed, f"{name}.w_in_HD")
        _draw(experts.w_out_EFD[local], hidden**-0.5 * damping, seed, f"{name}.w_out_FD")
