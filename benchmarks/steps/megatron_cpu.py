"""megatron-core 0.16.1 without CUDA and without TransformerEngine.

megatron-core asks for the accelerator by name: ``device="cuda"``, ``Tensor.cuda()``, streams,
``torch.cuda.current_device()``. Inside :func:`on_cpu` these names mean the CPU. Only the few torch
functions that it calls so are replaced, and only for that time: operators are dispatched as ever,
so the peer pays next to nothing, and what else runs in the process pays nothing at all.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange")


class _Nothing:
    """Stands for a CUDA stream or event: on a CPU everything is in order already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Nothing"]:
        return lambda *_, **__: self


def _nothing(*_: object, **__: object) -> None: ...


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return made


def _cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The optimizer accepts parameters whose type's name is that of a CUDA tensor."""
    answer = torch._C.TensorBase.type(tensor, *args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer


def _same(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


_CUDA: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "device_count": lambda: 1,
    "current_stream": lambda *_: _Nothing(),
    "default_stream": lambda *_: _Nothing(),
    "stream": lambda _: nullcontext(),
    "Stream": _Nothing,
    "Event": _Nothing,
    "synchronize": _nothing,
    "set_device": _nothing,
    "empty_cache": _nothing,
    "manual_seed": torch.manual_seed,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
}
_REPLACED: list[tuple[Any, str, Any]] = [
    *((torch, name, _on_cpu(getattr(torch, name))) for name in _FACTORIES),
    *((torch.cuda, name, stand_in) for name, stand_in in _CUDA.items()),
    (torch.cuda.nvtx, "range_push", _nothing),
    (torch.cuda.nvtx, "range_pop", _nothing),
    (torch.Tensor, "cuda", _same),
    (torch.Tensor, "type", _cuda_type),
]


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within it, CUDA's names mean the CPU."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACED]
    for owner, name, stand_in in _REPLACED:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


@functools.cache
def import_megatron() -> None:
    """Import what a training step uses. Raises ImportError when megatron-core is not installed."""
    # torch's optimizers import it when first made, and it wants to see the real torch.cuda
    import_module("torch._dynamo")
    compile_before = torch.compile
    # its fusions are torch.compile, taken at import; the plain functions are what runs elsewhere
    torch.compile = lambda function=None, **_: function if function else lambda f: f  # type: ignore[assignment]
    try:
        from megatron.core import jit

        jit.disable_jit_fuser()
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    finally:
        torch.compile = compile_before
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # a name that 0.16.1 leaves undefined without TransformerEngine, and then uses
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy_if_asked


def _as_numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core turns counts into numpy only when they come from a CUDA tensor."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
