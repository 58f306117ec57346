"""Routing by what enters the block (SmallThinker): by loops, and what may change the choice."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from coterie.models.decoder import Block, Decoder
from coterie.moe.tokens import TokenInfo
from tests.models.tiny_decoder import config, decoder
from tests.moe.tiny import error, randn

B, S, WIDTH, K = 2, 5, 16, 2
MOE: dict[str, Any] = {
    "experts": {"count": 4, "hidden": 6, "activation": "reglu"},
    "router": {"k": K, "score": "sigmoid"},
    "route_before_attention": True,
}


def model(before: bool = True) -> Decoder:
    return decoder(config(moe={**MOE, "route_before_attention": before}))


def block_of(model: Decoder) -> Block:
    block = model.blocks["1"]
    assert isinstance(block, Block)
    return block


def by_loops(block: Block, x_BSD: Tensor) -> Tensor:
    """Top-k logits of the un-normed input, their sigmoids normalised, ReLU(gate) · up experts."""
    assert block.moe is not None
    y_BSD = x_BSD + block.attention(block.attention_norm(x_BSD))
    normed_BSD = block.feed_forward_norm(y_BSD)
    out_BSD = y_BSD.clone()
    experts = block.moe.experts
    for row in range(B):
        for place in range(S):
            logits = block.moe.router.weight @ x_BSD[row, place]
            chosen = logits.topk(K).indices.tolist()
            scores = logits[chosen].sigmoid()
            for score, expert in zip(scores / scores.sum(), chosen, strict=True):
                gate, up = experts.w_in_EPFD[expert] @ normed_BSD[row, place]
                result = (gate.relu() * up) @ experts.w_out_EFD[expert]
                out_BSD[row, place] = out_BSD[row, place] + score * result
    return out_BSD


def test_a_block_by_loops() -> None:
    block = block_of(model())
    x_BSD = randn(B, S, WIDTH, seed=1).requires_grad_()
    ours, _, stats, *_ = block(x_BSD, TokenInfo())
    right = by_loops(block, x_BSD)
    assert error(ours, right) < 1e-13
    leaves = [x_BSD, *block.parameters()]
    dy = randn(B, S, WIDTH, seed=2)
    mine = torch.autograd.grad(ours, leaves, dy)
    for gradient, true in zip(mine, torch.autograd.grad(right, leaves, dy), strict=True):
        assert error(gradient, true) < 1e-11
    assert stats is not None and int(stats.load_E.sum()) == B * S * K
    later, *_ = block_of(model(before=False))(x_BSD, TokenInfo())
    assert error(later, right) > 1e-3


def test_a_router_that_sees_nothing_of_it_is_refused() -> None:
    told = "route_before_attention must be false with router.kind hash, which does not look at"
    with pytest.raises(ValidationError, match=told):
        config(moe={**MOE, "router": {"kind": "hash"}})
    config(moe={**MOE, "router": {"kind": "hash"}, "route_before_attention": False})
    config(moe={**MOE, "router": {"kind": "random_fixed"}})


def test_attention_has_no_say() -> None:
    """Other attention weights, and other norms, send the same rows to the same experts."""
    x_BSD = randn(B, S, WIDTH, seed=1)
    for before in (True, False):
        block = block_of(model(before))
        assert block.moe is not None
        seen: list[Tensor] = []
        block.moe.router.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2][0].expert_A)
        )
        block(x_BSD, TokenInfo())
        with torch.no_grad():
            block.attention.v.weight.mul_(-20)
            block.feed_forward_norm.weight.copy_(randn(WIDTH, seed=3))
        block(x_BSD, TokenInfo())
        assert torch.equal(*seen) == before
