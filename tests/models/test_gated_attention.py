"""Gates on attention's result: Hugging Face's for elements, plain loops for heads."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from coterie.models.attention import Attention, AttentionConfig
from tests.moe.tiny import error, randn, randomise

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests.moe.hugging_face import InDouble, build  # noqa: E402

B, S, WIDTH, HEADS, KV_HEADS, HEAD = 2, 7, 12, 4, 2, 6


def attention(gate: Literal["head", "element"] | None) -> Attention:
    config = AttentionConfig(
        heads=HEADS, kv_heads=KV_HEADS, head_width=HEAD, qk_norm=True, gate=gate
    )
    module = Attention(WIDTH, config, norm_eps=1e-6).double()
    randomise(module, seed=3)
    return module


def test_element_gates_are_those_of_qwen3_next() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        partial_rotary_factor=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        rms_norm_eps=1e-6,
    )
    theirs = build(lambda c: qwen.Qwen3NextAttention(c, 0), config, seed=5)
    ours = attention("element")
    with torch.no_grad():
        query, gate = theirs.q_proj.weight.view(HEADS, 2, HEAD, WIDTH).unbind(1)
        ours.q.weight.copy_(query.flatten(0, 1))
        assert ours.gate is not None
        ours.gate.weight.copy_(gate.flatten(0, 1))
        for name in ("k", "v"):
            getattr(ours, name).weight.copy_(getattr(theirs, f"{name}_proj").weight)
        ours.out.weight.copy_(theirs.o_proj.weight)
        ours.q_norm.weight.copy_(1 + theirs.q_norm.weight)  # gains around zero there
        ours.k_norm.weight.copy_(1 + theirs.k_norm.weight)
    x_BSD = randn(B, S, WIDTH, seed=1)
    with InDouble():
        rotary = qwen.Qwen3NextRotaryEmbedding(config)
        position = rotary(x_BSD, torch.arange(S)[None])
        mask = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)
        right, _ = theirs(x_BSD, position, mask[None, None])
    assert error(ours(x_BSD), right) < 1e-10
    assert error(attention("element")(x_BSD), right) > 1e-3


@pytest.mark.parametrize("gate", ["head", "element"])
def test_gates_by_loops(gate: Literal["head", "element"]) -> None:
    ours = attention(gate)
    assert ours.gate is not None
    ungated = attention(None)
    ungated.load_state_dict({n: p for n, p in ours.state_dict().items() if "gate" not in n})
    x_BSD = randn(B, S, WIDTH, seed=1).requires_grad_()
    inside: list[Tensor] = []
    ungated.out.register_forward_pre_hook(lambda _, args: inside.append(args[0]))
    ungated(x_BSD)
    (y_BSE,) = inside
    gated_BSE = torch.empty_like(y_BSE)
    for row in range(B):
        for position in range(S):
            for element in range(HEADS * HEAD):
                which = element // HEAD if gate == "head" else element
                logit = x_BSD[row, position] @ ours.gate.weight[which]
                gated_BSE[row, position, element] = y_BSE[row, position, element] * logit.sigmoid()
    right = gated_BSE @ ours.out.weight.t()
    assert error(ours(x_BSD), right) < 1e-13
    leaves = [x_BSD, ours.gate.weight, ours.out.weight]
    mine = torch.autograd.grad(ours(x_BSD).square().sum(), leaves)
    for gradient, true in zip(mine, torch.autograd.grad(right.square().sum(), leaves), strict=True):
        assert error(gradient, true) < 1e-12
    assert error(ours(x_BSD), ungated(x_BSD)) > 1e-2
