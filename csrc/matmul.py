"""Matrix products in float32 on the CPU, by oneDNN where that is the faster library.

PyTorch multiplies float32 matrices by MKL, which takes a 256-bit code path on AMD processors.
oneDNN, which PyTorch carries for other uses, took half the time on an EPYC with AVX-512: 400
against 198 GFLOP/s (benchmarks/layer.py); on one with AVX2 alone it took 5–10% longer. The choice
depends on the processor's kind, dtype and shape, never on a measurement: ranks and resumed runs
must round alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 64 * 128 * 384  # multiplications; below this a call costs more than it saves
_BLOCK = 32
_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def pad_rows(x_MK: Tensor) -> Tensor:
    """``x_MK``, where oneDNN multiplies it, with zero rows up to a multiple of 32.

    oneDNN compiles a kernel for each new shape, for as long as a product takes; the rows of an
    expert change with every step. Zero rows stay zero through products and activations.
    """
    return F.pad(x_MK, (0, 0, 0, -x_MK.shape[0] % _BLOCK)) if _by_onednn(x_MK) else x_MK


def mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``a @ b`` for two matrices, either of which may be a transposed view; without autograd."""
    rows, inner = a_MK.shape
    if rows * inner * b_KN.shape[1] < _SMALLEST or not _by_onednn(a_MK):
        return torch.mm(a_MK, b_KN)
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")


def mm_into(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor, add: bool = False) -> None:
    """Write ``a @ b`` to ``total_MN``, or add it; with no inner elements the product is zero."""
    if _by_onednn(a_MK) or total_MN.dtype != a_MK.dtype:
        product_MN = mm(a_MK, b_KN)
        total_MN.add_(product_MN) if add else total_MN.copy_(product_MN)
    elif add:
        total_MN.addmm_(a_MK, b_KN)
    else:
        torch.mm(a_MK, b_KN, out=total_MN)


def _by_onednn(x: Tensor) -> bool:
    return _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"
