"""The decoder: what may depend on what, and recompute that changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.random import fold_in, key
from coterie.models.decoder import Decoder, DecoderOutput, Recompute
from coterie.moe.layer import MoELayer
from coterie.moe.tokens import TokenInfo
from tests.models.tiny_decoder import VOCABULARY, config, decoder, tokens
from tests.moe.tiny import error

B, S = 3, 12
DENSE: dict[str, Any] = {"moe": None, "dense_layers": []}


def _changed(tokens_BS: Tensor, columns: slice) -> Tensor:
    other = tokens_BS.clone()
    other[:, columns] = (other[:, columns] + 1) % VOCABULARY
    return other


@pytest.mark.parametrize("t", [1, 5, S - 1])
def test_a_token_leaves_earlier_logits_bit_identical(t: int) -> None:
    model = decoder(config(**DENSE))
    tokens_BS = tokens(B, S)
    plain = model(tokens_BS).x
    other = model(_changed(tokens_BS, slice(t, t + 1))).x
    assert torch.equal(plain[:, :t], other[:, :t])
    assert plain[:, t:].ne(other[:, t:]).all()


@pytest.mark.parametrize("router", [{}, {"capacity_factor": 0.7}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("t", [1, 5, S - 1])
def test_a_token_leaves_earlier_logits_of_a_mixture_alone(t: int, router: dict[str, Any]) -> None:
    """Not to the bit: an expert's matrix product over other rows may round otherwise."""
    model = decoder(config(router)).train()
    tokens_BS = tokens(B, S)
    info = TokenInfo(sequence_T=torch.arange(B).repeat_interleave(S))
    plain = model(tokens_BS, info)
    other = model(_changed(tokens_BS, slice(t, t + 1)), info)
    assert error(other.x[:, :t], plain.x[:, :t]) < 1e-13
    assert error(other.x[:, t:], plain.x[:, t:]) > 1e-3
    if "capacity_factor" in router:
        assert any(int(stats.dropped_E.sum()) for stats in plain.stats.values())


def _documents() -> tuple[Tensor, TokenInfo]:
    document_BS = torch.tensor([0] * 4 + [1] * 5 + [2] * 3).expand(B, S)
    return document_BS, TokenInfo(document_T=document_BS.flatten())


def test_another_document_changes_nothing() -> None:
    attention = {"heads": 4, "kv_heads": 2, "within_documents": True}
    model = decoder(config(**DENSE, attention=attention))
    document_BS, info = _documents()
    tokens_BS = tokens(B, S)
    plain = model(tokens_BS, info).x
    other = model(_changed(tokens_BS, slice(4, 9)), info).x
    assert torch.equal(plain[document_BS != 1], other[document_BS != 1])
    assert plain[document_BS == 1].ne(other[document_BS == 1]).all()
    alone = model(tokens_BS[:, 4:9]).x  # rotary positions are relative
    assert error(plain[:, 4:9], alone) < 1e-12


def test_without_the_mask_later_documents_see_earlier_ones() -> None:
    model = decoder(config(**DENSE))
    _, info = _documents()
    tokens_BS = tokens(B, S)
    plain = model(tokens_BS, info).x
    other = model(_changed(tokens_BS, slice(4, 9)), info).x
    assert plain[:, 9:].ne(other[:, 9:]).all()


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model = decoder(config())
    tokens_BS = tokens(B, S)
    whole = model(tokens_BS).x
    for row in range(B):
        assert error(model(tokens_BS[row : row + 1]).x, whole[row : row + 1]) < 1e-13


def _mixtures(model: Decoder) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def _keyed() -> TokenInfo:
    position_T = torch.arange(B * S)
    return TokenInfo(
        key_T=fold_in(torch.full((B * S,), key("test")), position_T),
        padding_T=position_T % 5 == 4,
        sequence_T=position_T // S,
    )


def _step(
    recompute: Recompute, jitter: float = 0.4
) -> tuple[Tensor, DecoderOutput, dict[str, Tensor]]:
    settings = config({"jitter": jitter, "capacity_factor": 0.9, "balance_loss": 0.2})
    model = decoder(settings, recompute=recompute).train()
    out = model(tokens(B, S), _keyed())
    loss = out.x.square().mean() + sum(out.losses.values())
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return loss.detach(), out, gradients


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit_and_counts_once(recompute: Recompute) -> None:
    loss, out, gradients = _step("none")
    again, recomputed, regradients = _step(recompute)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(gradient, regradients[name]), name
    assert set(recomputed.stats) == set(out.stats) == {1, 2}
    for layer, stats in out.stats.items():
        assert torch.equal(recomputed.stats[layer].load_E, stats.load_E)
        assert torch.equal(recomputed.stats[layer].dropped_E, stats.dropped_E)
        assert torch.equal(recomputed.stats[layer].entropy, stats.entropy)
        real = int((~torch.arange(B * S).remainder(5).eq(4)).sum())
        assert int(recomputed.stats[layer].tokens) == real
        assert int((stats.load_E + stats.dropped_E).sum()) == 2 * real
    assert not torch.equal(loss, _step("none", jitter=0.0)[0])  # the noise is there


def test_full_recompute_runs_blocks_again() -> None:
    model = decoder(config(), recompute="full").train()
    calls: list[int] = []
    for number, block in model.blocks.items():
        block.attention.register_forward_pre_hook(lambda *_, at=int(number): calls.append(at))
    out = model(tokens(B, S))
    assert calls == [0, 1, 2]
    out.x.sum().backward()
    assert calls == [0, 1, 2, 2, 1, 0]
    calls.clear()
    with torch.no_grad():
        model(tokens(B, S))
    assert calls == [0, 1, 2]


def test_each_layer_draws_its_own_noise() -> None:
    model = decoder(config({"jitter": 0.4})).train()
    seen: list[Tensor] = []
    for layer in _mixtures(model):
        layer.router.register_forward_pre_hook(lambda _, args: seen.append(args[1].key_T))
    model(tokens(B, S), _keyed())
    assert len(seen) == 2
    assert seen[0].ne(seen[1]).all()


def test_losses_are_summed_over_layers() -> None:
    model = decoder(config({"balance_loss": 0.2})).train()
    seen: list[dict[str, Tensor]] = []
    for layer in _mixtures(model):
        layer.register_forward_hook(lambda *call: seen.append(call[2].losses))
    losses = model(tokens(B, S)).losses
    assert len(seen) == 2
    assert set(losses) == {"balance", "z"}
    for name, loss in losses.items():
        assert torch.equal(loss, seen[0][name] + seen[1][name])
    assert model.eval()(tokens(B, S)).losses == {}


def test_padding_is_not_routed_but_has_logits() -> None:
    model = decoder(config())
    info = _keyed()
    out = model(tokens(B, S), info)
    assert info.padding_T is not None
    for stats in out.stats.values():
        assert int(stats.load_E.sum()) == 2 * int((~info.padding_T).sum())
    assert out.x.isfinite().all()


def test_tied_embeddings_are_one_parameter() -> None:
    model = decoder(config(tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    untied = sum(p.numel() for p in decoder(config()).parameters())
    assert sum(p.numel() for p in model.parameters()) == untied - 16 * VOCABULARY
