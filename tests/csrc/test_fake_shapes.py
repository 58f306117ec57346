"""What torch.compile is told of the ops without a native CPU kernel: shapes and dtypes."""

from typing import Any

import pytest
import torch

from coterie.csrc import loader, twins

LOGITS_TE = torch.randn(5, 12, dtype=torch.float64)
GATE = (LOGITS_TE, None, 3, False, True, 1.0, 1, 1)
EXPERT_TK, WEIGHT_TK, SCORE_TE = twins.gate_reference(*GATE)
ARGUMENTS = {
    "gate": GATE,
    "gate_backward": (WEIGHT_TK, None, SCORE_TE, EXPERT_TK, False, True, 1.0),
    "sort_by_expert": (EXPERT_TK.flatten(), 12, None),
}


def meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("op", ARGUMENTS)
def test_shapes_are_those_of_the_twin(op: str) -> None:
    if not loader.status()[0].native:
        pytest.skip(f"the ops are not defined: {loader.status()[0].reason}")
    expected = loader.twin(op)(*ARGUMENTS[op])
    actual = getattr(torch.ops.coterie, op)(*map(meta, ARGUMENTS[op]))
    pairs = zip(actual, expected, strict=True) if op != "gate_backward" else [(actual, expected)]
    for ours, theirs in pairs:
        assert ours.is_meta and ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
