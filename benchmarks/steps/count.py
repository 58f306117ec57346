"""Floating-point operations of a step, as torch counts them while it runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(step: Callable[[], object]) -> int:
    """Those of this rank's matrix products and attention, forward and backward.

    A product of DTensors counts as one of whole tensors, on each of the ranks that share it.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
    with counter:
        step()
    return counter.get_total_flops()


def _linear(a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows, inner = a_shape
    return 2 * rows * inner * b_shape[0]


def _attention(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q_shape
    return 2 * batch * heads * queries * k_shape[2] * (width + v_shape[3])


def _attention_backward(dy_shape: Any, q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q_shape
    return 2 * batch * heads * queries * k_shape[2] * 5 * width


def _grouped(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    if len(a_shape) == 2:  # rows in groups times (stacked weights, or rows in the same groups)
        return 2 * a_shape[0] * a_shape[1] * b_shape[-1]
    return 2 * a_shape[1] * a_shape[2] * b_shape[-1]


# both attentions are counted whole, as the counter does elsewhere, though half of it is masked
_UNKNOWN_TO_TORCH = {
    torch.ops.mkldnn._linear_pointwise: _linear,
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
