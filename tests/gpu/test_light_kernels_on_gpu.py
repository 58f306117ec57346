"""Kernels for rows and gates on a GPU: no more than twice the error of their PyTorch twins."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.csrc import loader, twins
from tests.csrc.compile_on_host import CSRC, standing_in
from tests.gpu.conftest import ON_HOST

TOKENS, WIDTH, EXPERTS, K = (37, 40, 8, 3) if ON_HOST else (4099, 1032, 64, 8)
ROWS = TOKENS * K
ON_GPU = loader._NATIVE["cuda"]
"""Ops that have a kernel for GPUs."""


def _tokens(device: torch.device) -> Tensor:
    return torch.arange(TOKENS, device=device).repeat_interleave(K)[
        torch.randperm(ROWS, device=device)
    ]


def _normal(dtype: torch.dtype, device: torch.device, *size: int) -> Tensor:
    return torch.randn(size, device=device).to(dtype)


def _permute(dtype: torch.dtype, device: torch.device) -> list[Any]:
    return [_normal(dtype, device, TOKENS, WIDTH), _tokens(device), torch.rand(ROWS, device=device)]


def _unpermute(dtype: torch.dtype, device: torch.device) -> list[Any]:
    x_AD = _normal(dtype, device, ROWS, WIDTH)
    row_A, offset_T1 = twins.invert_reference(_tokens(device), TOKENS)
    return [x_AD, torch.rand(ROWS, device=device), row_A, offset_T1]


def _unpermute_backward(dtype: torch.dtype, device: torch.device) -> list[Any]:
    dy_TD, x_AD = (_normal(dtype, device, rows, WIDTH) for rows in (TOKENS, ROWS))
    return [dy_TD, x_AD, torch.rand(ROWS, device=device), _tokens(device)]


def _invert(_: torch.dtype, device: torch.device) -> list[Any]:
    return [_tokens(device), TOKENS]


def _sort_by_expert(_: torch.dtype, device: torch.device) -> list[Any]:
    expert_A = torch.randint(EXPERTS, (ROWS,), device=device)
    return [expert_A, EXPERTS, torch.rand(ROWS, device=device) > 0.2]


def _gate(dtype: torch.dtype, device: torch.device) -> list[Any]:
    logits_TE = _normal(dtype, device, TOKENS, EXPERTS)
    return [logits_TE, None, K, False, True, 1.0, 1, 1]


def _gate_backward(dtype: torch.dtype, device: torch.device) -> list[Any]:
    score_TE = _normal(dtype, device, TOKENS, EXPERTS).float().softmax(1).to(dtype)
    dweight_TK = _normal(dtype, device, TOKENS, K)
    return [dweight_TK, None, score_TE, score_TE.topk(K).indices, False, True, 1.0]


INPUTS: dict[str, Callable[[torch.dtype, torch.device], list[Any]]] = {
    "permute": _permute,
    "unpermute": _unpermute,
    "unpermute_backward": _unpermute_backward,
    "invert": _invert,
    "sort_by_expert": _sort_by_expert,
    "gate": _gate,
    "gate_backward": _gate_backward,
}


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    """The kernels, not their twins, are what the loader gives."""
    files = [CSRC / f"{name}.cu" for name in ("rows", "gate", "sort")]
    with standing_in(*files) if ON_HOST else nullcontext():
        yield


def test_every_kernel_has_inputs_here() -> None:
    assert set(ON_GPU) <= set(INPUTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ON_GPU)
def test_beside_its_twin(op: str, dtype: torch.dtype, device: torch.device, kernels: None) -> None:
    assert loader.kernel(op, device.type) is not getattr(twins, f"{op}_reference")
    given = INPUTS[op](dtype, device)
    twin = getattr(twins, f"{op}_reference")
    native = _as_list(loader.kernel(op, device.type)(*given))
    plain = _as_list(twin(*given))
    truth = _as_list(twin(*map(_exact, given)))
    for own, theirs, true in zip(native, plain, truth, strict=True):
        assert own.dtype == theirs.dtype and own.shape == theirs.shape
        if not own.is_floating_point():
            assert torch.equal(own, theirs)
            continue
        scale = true.abs().max()
        error, allowed = ((x.double() - true).abs().max() / scale for x in (own, theirs))
        assert error <= 2 * allowed + 1e-6, (float(error), float(allowed))


def _exact(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _as_list(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)
