"""The same weights give the same numbers as Hugging Face's blocks and models, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.models.attention import AttentionConfig
from coterie.models.config import DecoderConfig
from coterie.models.decoder import Decoder
from coterie.moe.experts import ExpertsConfig
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.routers.top_k import TopKConfig
from tests.moe.tiny import error, randn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests.moe.hugging_face import (  # noqa: E402
    InDouble,
    block_names,
    build,
    gradients,
    model_names,
    weights,
)

LIMIT = 1e-10
WIDTH, HIDDEN = 12, 7


def _mixtral() -> tuple[nn.Module, MoEConfig]:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=6, num_experts_per_tok=2
    )
    ours = MoEConfig(experts=ExpertsConfig(count=6, hidden=HIDDEN), router=TopKConfig(k=2))
    return build(MixtralSparseMoeBlock, config), ours


def _qwen3(renormalise: bool) -> tuple[nn.Module, MoEConfig]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=renormalise,
    )
    ours = MoEConfig(
        experts=ExpertsConfig(count=16, hidden=HIDDEN),
        router=TopKConfig(k=4, renormalise=renormalise),
    )
    return build(Qwen3MoeSparseMoeBlock, config), ours


def _deepseek(k: int, renormalise: bool) -> tuple[nn.Module, MoEConfig]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=16,
        num_experts_per_tok=k,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        n_shared_experts=2,
        norm_topk_prob=renormalise,
    )
    router = TopKConfig(
        k=k, score="sigmoid", renormalise=renormalise, scale=2.5, groups=4, top_groups=2
    )
    ours = MoEConfig(
        experts=ExpertsConfig(count=16, hidden=HIDDEN),
        router=router,
        shared=FeedForwardConfig(hidden=2 * HIDDEN),
    )
    theirs = build(DeepseekV3MoE, config)
    assert not dict(theirs.named_buffers())["gate.e_score_correction_bias"].any()
    return theirs, ours


BLOCKS = {
    "mixtral": _mixtral,
    "qwen3_renormalised": lambda: _qwen3(True),
    "qwen3_not_renormalised": lambda: _qwen3(False),
    "deepseek_v3_k4": lambda: _deepseek(4, True),
    "deepseek_v3_k6": lambda: _deepseek(6, True),  # more experts than two of each open group
    "deepseek_v3_not_renormalised": lambda: _deepseek(3, False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_sparse_block_gives_the_same_output_and_gradients(name: str) -> None:
    theirs, config = BLOCKS[name]()
    layer = MoELayer(WIDTH, config).double()
    layer.load_state_dict(block_names(weights(theirs)))
    x, dy = randn(3, 11, WIDTH, seed=1), randn(3, 11, WIDTH, seed=2)

    their_x = x.clone().requires_grad_()
    with InDouble():
        their_y = theirs(their_x)
    their_y.backward(dy)
    our_x = x.clone().requires_grad_()
    our_y = layer(our_x).y
    our_y.backward(dy)

    assert error(our_y, their_y) <= LIMIT
    assert _gradient(our_x).abs().max() > 0
    assert error(_gradient(our_x), _gradient(their_x)) <= LIMIT
    _assert_same(gradients(layer), block_names(gradients(theirs)))


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.abs().max() > 0, f"{name} has no gradient to compare"
        assert error(ours[name], tensor) <= LIMIT, name


ROPE = {"rope_type": "default", "rope_theta": 5000.0}
COMMON: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "rms_norm_eps": 1e-3,  # large, so that a forgotten epsilon shows
    "rope_parameters": ROPE,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


def _decoder(attention: AttentionConfig, **rest: Any) -> DecoderConfig:
    return DecoderConfig(
        vocabulary=31, width=24, layers=2, norm_eps=1e-3, attention=attention, **rest
    )


def _whole_mixtral(kv_heads: int) -> tuple[nn.Module, DecoderConfig]:
    config = transformers.MixtralConfig(
        **COMMON,
        num_key_value_heads=kv_heads,
        intermediate_size=10,
        num_local_experts=5,
        num_experts_per_tok=2,
    )
    ours = _decoder(
        AttentionConfig(heads=6, kv_heads=kv_heads, rope_theta=5000.0),
        moe=MoEConfig(experts=ExpertsConfig(count=5, hidden=10), router=TopKConfig(k=2)),
    )
    return build(transformers.MixtralForCausalLM, config), ours


def _whole_llama() -> tuple[nn.Module, DecoderConfig]:
    config = transformers.LlamaConfig(**COMMON, num_key_value_heads=2, intermediate_size=10)
    ours = _decoder(
        AttentionConfig(heads=6, kv_heads=2, rope_theta=5000.0),
        feed_forward=FeedForwardConfig(hidden=10),
    )
    return build(transformers.LlamaForCausalLM, config), ours


def _whole_qwen3() -> tuple[nn.Module, DecoderConfig]:
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        num_key_value_heads=3,
        head_dim=8,  # not width / heads
        intermediate_size=9,
        moe_intermediate_size=10,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    )
    ours = _decoder(
        AttentionConfig(heads=6, kv_heads=3, head_width=8, rope_theta=5000.0, qk_norm=True),
        feed_forward=FeedForwardConfig(hidden=9),
        moe=MoEConfig(experts=ExpertsConfig(count=6, hidden=10), router=TopKConfig(k=3)),
        dense_layers=(0,),
    )
    return build(transformers.Qwen3MoeForCausalLM, config), ours


MODELS = {
    "mixtral": lambda: _whole_mixtral(6),
    "mixtral_grouped_query": lambda: _whole_mixtral(2),
    "llama_grouped_query": _whole_llama,
    "qwen3_moe_qk_norm": _whole_qwen3,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_gives_the_same_logits_and_gradients(name: str) -> None:
    theirs, config = MODELS[name]()
    model = Decoder(config).double()
    model.load_state_dict(model_names(weights(theirs)))
    tokens_BS = torch.randint(0, 31, (3, 17), generator=torch.Generator().manual_seed(3))
    dlogits = randn(3, 17, 31, seed=4)

    with InDouble():
        their_logits = theirs(input_ids=tokens_BS, use_cache=False).logits
    their_logits.backward(dlogits)
    our_logits = model(tokens_BS).x
    our_logits.backward(dlogits)

    assert error(our_logits, their_logits) <= LIMIT
    _assert_same(gradients(model), model_names(gradients(theirs)))
