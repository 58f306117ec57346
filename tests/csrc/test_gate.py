"""Top-k gating: the twin against plain loops, the CUDA kernels on the host against the twin."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.csrc import gate, loader, twins
from tests.csrc.compile_on_host import (
    CSRC,
    check_under_sanitizers,
    load,
    mutated,
    standing_in,
    under_sanitizers,
)

SOURCE = CSRC / "gate.cu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops() -> Any:
    return load(SOURCE)


def scores_of(logits: list[float], sigmoid: bool) -> list[float]:
    if sigmoid:
        return [1 / (1 + math.exp(-x)) for x in logits]
    powers = [math.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def loop_gate(
    logits: list[float],
    bias: list[float],
    k: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[list[int], list[float], list[float]]:
    """One token in plain Python: experts, weights and scores."""
    score = scores_of(logits, sigmoid)
    rank = [s + b for s, b in zip(score, bias, strict=True)]
    width = len(rank) // groups
    of_group = [sum(sorted(rank[g * width : (g + 1) * width])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-of_group[g], g))[:top_groups]
    eligible = [e for e in range(len(rank)) if e // width in best]
    chosen = sorted(eligible, key=lambda e: (-rank[e], e))[:k]
    total = sum(score[e] for e in chosen) if renormalise else 1.0
    return chosen, [scale * score[e] / total for e in chosen], score


# experts, k, sigmoid, renormalise, scale, groups, top groups, bias
SETTINGS = [
    (8, 1, False, False, 1.0, 1, 1, False),
    (8, 2, False, True, 1.0, 1, 1, False),
    (33, 5, False, True, 1.5, 1, 1, True),
    (64, 8, True, True, 2.5, 8, 4, True),
    (256, 8, True, True, 2.5, 8, 4, True),
    (12, 6, True, False, 1.0, 3, 2, False),
    (16, 16, False, True, 1.0, 1, 1, False),
    (40, 40, False, True, 1.0, 4, 4, True),
    (1, 1, False, True, 1.0, 1, 1, False),
]
BY_SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def example(
    setting: tuple[Any, ...], tokens: int, dtype: torch.dtype, seed: int, ties: bool = False
) -> tuple[Any, ...]:
    """The arguments of the op: random logits, on request with many equals."""
    experts, *rest, biased = setting
    g = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(tokens, experts, generator=g, dtype=torch.float64)
    bias_E = torch.randn(experts, generator=g, dtype=torch.float64) if biased else None
    if ties:
        logits_TE = logits_TE.round()
        bias_E = None if bias_E is None else torch.zeros_like(bias_E)
    return logits_TE.to(dtype), None if bias_E is None else bias_E.to(dtype), *rest


@BY_SETTING
@pytest.mark.parametrize("ties", [False, True])
def test_the_twin_equals_loops(setting: tuple[Any, ...], ties: bool) -> None:
    logits_TE, bias_E, *rest = example(setting, 9, torch.float64, 1, ties)
    expert_TK, weight_TK, score_TE = twins.gate_reference(logits_TE, bias_E, *rest)
    bias = [0.0] * logits_TE.shape[1] if bias_E is None else bias_E.tolist()
    for t, logits in enumerate(logits_TE.tolist()):
        expert, weight, score = loop_gate(logits, bias, *rest)
        if not ties:  # sums over a group round differently in a loop
            assert expert_TK[t].tolist() == expert
        assert weight_TK[t].tolist() == pytest.approx(weight, rel=1e-12)
        assert score_TE[t].tolist() == pytest.approx(score, rel=1e-12)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    tolerance = 16 * torch.finfo(actual.dtype).eps
    size = expected.double().abs().max() if expected.numel() else 1
    assert ((actual.double() - expected.double()).abs() <= tolerance * size).all()


def check_kernels(ops: Any, arguments: tuple[Any, ...], seed: int) -> None:
    """Forward and backward on the host equal the twin's."""
    logits_TE, _, _, sigmoid, renormalise, scale, *_ = arguments
    expert_TK, weight_TK, score_TE = ops.gate(*arguments)
    expected = twins.gate_reference(*arguments)
    # scores that differ in the last bit may change places
    same_T = (expert_TK == expected[0]).all(1)
    assert same_T.double().mean() >= (1 if logits_TE.dtype == torch.float64 else 0.7)
    assert all(len(set(chosen)) == len(chosen) for chosen in expert_TK.tolist())
    close(score_TE, expected[2])
    close(weight_TK[same_T], expected[1][same_T])

    g = torch.Generator().manual_seed(seed)
    dweight_TK = torch.randn(weight_TK.shape, generator=g).to(logits_TE.dtype)
    dscore_TE = torch.randn(score_TE.shape, generator=g).to(logits_TE.dtype)
    for d in [(dweight_TK, dscore_TE), (dweight_TK, None), (None, dscore_TE), (None, None)]:
        told = (*d, score_TE, expert_TK, sigmoid, renormalise, scale)
        close(ops.gate_backward(*told), twins.gate_backward_reference(*told))


@BY_SETTING
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_the_twin(ops: Any, setting: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_kernels(ops, example(setting, 7, dtype, 2), 3)


@BY_SETTING
def test_of_equals_the_lower_id(ops: Any, setting: tuple[Any, ...]) -> None:
    arguments = example(setting, 7, torch.float32, 4, ties=True)
    # scores of equal logits are equal, whatever the rounding of others
    assert torch.equal(ops.gate(*arguments)[0], twins.gate_reference(*arguments)[0])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 6),
    experts=st.sampled_from([1, 2, 7, 31, 32, 33, 65, 130]),
    choices=st.floats(0, 1),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
def test_kernels_equal_the_twin_for_any_shape(
    ops: Any, tokens: int, experts: int, choices: float, flags: tuple[bool, ...], seed: int
) -> None:
    k = 1 + round(choices * (min(experts, 16) - 1))
    sigmoid, renormalise, biased = flags
    setting = (experts, k, sigmoid, renormalise, 1.7, 1, 1, biased)
    if tokens:
        check_kernels(ops, example(setting, tokens, torch.float64, seed), seed)
    else:
        nothing = ops.gate(*example(setting, 0, torch.float64, seed))
        assert [tuple(x.shape) for x in nothing] == [(0, k), (0, k), (0, experts)]


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -0.0, 0.0, -0.0, 0.0],
        [math.nan] * 5,
        [math.nan, 1, math.inf, 2, 3],
        [-math.inf, -math.inf, 0.5, -math.inf, 0.25],
        [1e30, -1e30, 1e30, 80, -80],
    ],
)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_odd_numbers_still_choose_different_experts(
    ops: Any, row: list[float], sigmoid: bool
) -> None:
    arguments = (torch.tensor([row]), None, 4, sigmoid, True, 1.0, 1, 1)
    expert_TK = ops.gate(*arguments)[0]
    assert torch.equal(expert_TK, twins.gate_reference(*arguments)[0])
    assert len(set(expert_TK[0].tolist())) == 4


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradients_by_finite_differences(on_host: bool, score: Any, renormalise: bool) -> None:
    logits_TE = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def both(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return gate(logits_TE, 2, score=score, renormalise=renormalise, scale=1.3)[1:]

    with standing_in(*[SOURCE] * on_host):
        assert torch.autograd.gradcheck(both, logits_TE)
        assert torch.autograd.gradcheck(lambda x_TE: both(x_TE)[0], logits_TE)
        assert torch.autograd.gradcheck(lambda x_TE: both(x_TE)[1], logits_TE)


@BY_SETTING
def test_gradients_are_those_of_autograd(setting: tuple[Any, ...]) -> None:
    """Of plain operations that differentiate themselves, for the same choices."""
    logits_TE, bias_E, k, sigmoid, renormalise, scale, groups, top = example(
        setting, 8, torch.float64, 5
    )
    logits_TE.requires_grad_()
    told = {"bias_E": bias_E, "groups": groups, "top_groups": top, "scale": scale}
    chosen = gate(
        logits_TE,
        k,
        score="sigmoid" if sigmoid else "softmax",
        renormalise=renormalise,
        **told,
    )
    score_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    weight_TK = score_TE.gather(1, chosen.expert_TK) * scale
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) / scale)
    close(chosen.weight_TK, weight_TK)
    dweight_TK, dscore_TE = torch.randn_like(weight_TK), torch.randn_like(score_TE)
    (actual,) = torch.autograd.grad(
        (chosen.weight_TK, chosen.score_TE), logits_TE, (dweight_TK, dscore_TE)
    )
    (expected,) = torch.autograd.grad((weight_TK, score_TE), logits_TE, (dweight_TK, dscore_TE))
    # with one choice renormalised the weights are constant
    size = dweight_TK.abs().max() + dscore_TE.abs().max()
    assert ((actual - expected).abs() <= 1e-13 * size).all()


def test_what_the_kernel_does_not_take_is_done_by_the_twin() -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the kernel was called")

    wide_TE, narrow_TE = torch.randn(3, 513), torch.randn(3, 70)
    with standing_in():
        loader._CHOSEN["gate", "cpu"] = refuse
        assert gate(wide_TE, 2).expert_TK.tolist() == wide_TE.topk(2).indices.tolist()
        assert gate(narrow_TE, 65).expert_TK.shape == (3, 65)
        assert gate(torch.randn(3, 70), 2, groups=35, top_groups=2).expert_TK.shape == (3, 2)
        with pytest.raises(AssertionError, match="was called"):
            gate(narrow_TE, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 7}, "k 7 must be from 1 to the 6 experts"),
        ({"k": 0}, "k 0 must be from 1"),
        ({"k": 4, "groups": 2}, "k 4 must be from 1 to the 3 experts"),
        ({"k": 1, "groups": 4}, "groups 4 must divide the 6 experts"),
        ({"k": 1, "groups": 2, "top_groups": 3}, "top_groups 3 be from 1 to groups"),
        ({"k": 1, "groups": 6}, "6 experts in 6 groups leave one for each"),
        ({"k": 1, "bias_E": torch.zeros(5)}, r"bias_E must hold 6 numbers of torch.float32"),
        ({"k": 1, "bias_E": torch.zeros(6).double()}, r"bias_E must hold 6 numbers"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(torch.randn(4, 6), **arguments)


def test_under_the_sanitizers() -> None:
    check_under_sanitizers(__file__)


GATE = """
import sys, torch
from pathlib import Path
from tests.csrc.compile_on_host import load
ops = load(Path(sys.argv[1]))
ops.gate(torch.randn(9, 40), None, 4, False, True, 1.0, 4, 2)
"""


def test_sanitizers_find_planted_shared_memory_overrun(tmp_path: Any) -> None:
    short = mutated(SOURCE, tmp_path, "2 * kWarps * experts * sizeof", "kWarps * experts * sizeof")
    wrong = under_sanitizers("-c", GATE, str(short))
    assert wrong.returncode != 0 and "heap-buffer-overflow" in wrong.stderr, wrong.stderr
