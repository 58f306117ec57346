"""Initial weights that depend on the seed and the parameter's name, never on the layout."""

import torch
from torch import Tensor, nn

from coterie.core.box import Box
from coterie.core.random import generator
from coterie.models.attention import Attention
from coterie.models.depths import Depths
from coterie.models.placement import box_of
from coterie.models.untied import UntiedFeedForward
from coterie.models.vocabulary import VocabularyEmbedding, VocabularyHead
from coterie.moe.experts import Experts
from coterie.moe.feed_forward import FeedForward
from coterie.moe.layer import MoELayer
from coterie.moe.routers.auxiliary import AuxiliaryRouter
from coterie.moe.routers.base import Router
from coterie.moe.routers.mlp import MLPRouter


@torch.no_grad()
def initialise(model: nn.Module, seed: int, residual_branches: int = 1, root: str = "") -> None:
    """Fill every parameter of ``model``, in place: of the whole tensor's values, those of the part
    that is here.

    Matrices: normal with standard deviation 1/√fan_in; those that write into the residual stream
    are divided by √``residual_branches`` (two for each layer), so that it keeps its scale with
    depth (GPT-2). Embedding, an output layer tied to it, and router (not an auxiliary or MLP one):
    0.02; a router's bias: 0. Norm gains: 1. Each expert is drawn by its global id. ``root``: the
    name of ``model`` in a larger one, whose values it is to have.
    """
    damping = residual_branches**-0.5
    for prefix, module in model.named_modules(prefix=root):
        match module:
            case Experts():
                _draw_experts(module, seed, prefix, damping)
            case FeedForward():
                _, hidden, width = box_of(module, "w_in_PFD").whole
                _draw(module, "w_in_PFD", width**-0.5, seed, prefix)
                _draw(module, "w_out_FD", hidden**-0.5 * damping, seed, prefix)
            case UntiedFeedForward():
                hidden, width = box_of(module, "w_out_MFD").whole[1:]
                _draw(module, "w_in_MPFD", width**-0.5, seed, prefix)
                _draw(module, "w_out_MFD", hidden**-0.5 * damping, seed, prefix)
            case Attention():
                width, heads_width = box_of(module, "out.weight").whole[-2:]
                _draw(module, "out.weight", heads_width**-0.5 * damping, seed, prefix)
                for name in ("q", "k", "v", "gate")[: 3 if module.gate is None else 4]:
                    _draw(module, f"{name}.weight", width**-0.5, seed, prefix)
            case MLPRouter():
                _draw(module, "weight", module.weight.shape[1] ** -0.5, seed, prefix)
                if module.bias is not None:
                    module.bias.zero_()
                if module.depth_R is not None:
                    module.depth_R.fill_(1.0)
                for name in ("down", "first", "second"):
                    fan_in = module.get_parameter(f"{name}.weight").shape[1]
                    _draw(module, f"{name}.weight", fan_in**-0.5, seed, prefix)
                    module.get_parameter(f"{name}.bias").zero_()
            case Router():
                for name, parameter in module.named_parameters(recurse=False):
                    if name == "bias":
                        parameter.zero_()
                    else:
                        _draw(module, name, 0.02, seed, prefix)
            case AuxiliaryRouter():
                for name in ("w_in", "w_out"):
                    _draw(module, name, box_of(module, name).whole[1] ** -0.5, seed, prefix)
            case Depths():
                _draw(module, "weight_D", 0.02, seed, prefix)
            case MoELayer():
                if module.shared_gate_D is not None:
                    module.shared_gate_D.zero_()
                if module.shared_mix is not None:  # both count the same at first
                    module.shared_mix.weight.zero_()
                    module.shared_mix.bias.zero_()
            case VocabularyEmbedding():
                _draw(module, "weight", 0.02, seed, prefix)
            case nn.RMSNorm():
                module.weight.fill_(1.0)
            case VocabularyHead() if not _is_tied(model):
                _draw(module, "weight", module.weight.shape[1] ** -0.5, seed, prefix)


def _is_tied(model: nn.Module) -> bool:
    embedding, head = getattr(model, "embedding", None), getattr(model, "head", None)
    return embedding is not None and head is not None and head.weight is embedding.weight


def _draw(module: nn.Module, parameter: str, std: float, seed: int, prefix: str) -> None:
    box = box_of(module, parameter)
    _fill(module.get_parameter(parameter), box, std, seed, f"{prefix}.{parameter}")


def _fill(part: Tensor, box: Box, std: float, seed: int, name: str) -> None:
    values = torch.randn(box.whole, generator=generator(seed, name), dtype=torch.float64)
    part.copy_(values[box.slices] * std)


def _draw_experts(experts: Experts, seed: int, prefix: str, damping: float) -> None:
    in_box, out_box = (box_of(experts, name) for name in ("w_in_EPFD", "w_out_EFD"))
    hidden, width = out_box.whole[1:]
    for local in range(experts.w_in_EPFD.shape[0]):
        name = f"{prefix}.{experts.first + local}"
        for weight, box, std in (
            ("w_in_EPFD", in_box, width**-0.5),
            ("w_out_EFD", out_box, hidden**-0.5 * damping),
        ):
            one = Box(box.whole[1:], box.offset[1:], box.shape[1:])
            _fill(experts.get_parameter(weight)[local], one, std, seed, f"{name}.{weight}")
