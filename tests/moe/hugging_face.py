"""Hugging Face as an oracle: its arithmetic in float64, its weights under our names."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.moe.tiny import randomise


class InDouble(TorchFunctionMode):
    """Inside, what asks for float32 gets float64.

    Router probabilities, norms and rotary angles are computed in float32 there, whatever the
    model's dtype, which would hide errors below 1e-7.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_wider(value) for value in args)
        return func(*args, **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def build(make: Callable[[Any], nn.Module], config: Any, seed: int = 0) -> nn.Module:
    """``make(config)`` in float64 with random weights, plain loops over the experts."""
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    with InDouble():
        module = make(config).double()
    randomise(module, seed, std=0.3)
    return module


def block_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors (weights or gradients) of a sparse block, by the names of our ``MoELayer``."""
    ours = {
        "router.weight": tensors["gate.weight"],
        "experts.w_in_EPFD": tensors["experts.gate_up_proj"].unflatten(1, (2, -1)),
        "experts.w_out_EFD": tensors["experts.down_proj"].transpose(1, 2),
    }
    shared = _inside("shared_experts.", tensors)
    ours |= {f"shared.{name}": tensor for name, tensor in _dense_names(shared).items()}
    return ours


def model_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a causal language model, by the names of our ``Decoder``."""
    ours = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "head.weight": tensors["lm_head.weight"],
    }
    layers = {
        int(found[1]) for name in tensors if (found := re.match(r"model\.layers\.(\d+)", name))
    }
    for layer in layers:
        block = _inside(f"model.layers.{layer}.", tensors)
        attention = _inside("self_attn.", block)
        names = {
            "attention_norm.weight": block["input_layernorm.weight"],
            "feed_forward_norm.weight": block["post_attention_layernorm.weight"],
        }
        for name, tensor in attention.items():
            names["attention." + name.replace("_proj", "").replace("o.", "out.")] = tensor
        mlp = _inside("mlp.", block)
        if "gate.weight" in mlp:
            names |= {f"moe.{name}": tensor for name, tensor in block_names(mlp).items()}
        else:
            names |= {f"feed_forward.{name}": tensor for name, tensor in _dense_names(mlp).items()}
        ours |= {f"blocks.{layer}.{name}": tensor for name, tensor in names.items()}
    return ours


def _dense_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not tensors:
        return {}
    gate_up = torch.stack([tensors["gate_proj.weight"], tensors["up_proj.weight"]])
    return {"w_in_PFD": gate_up, "w_out_FD": tensors["down_proj.weight"].t()}


def _inside(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; one that was not reached counts as zero."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }
