"""Weights of their own for each modality, against plain loops in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.models import Decoder, DecoderConfig
from coterie.models.decoder import Block, Recompute
from coterie.models.initialise import initialise
from coterie.models.placement import parameter_counts
from coterie.models.untied import Modalities
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import error, randn, randomise

B, S, WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, M, EPS = 2, 7, 8, 4, 2, 4, 6, 3, 1e-6
WHAT = ("ffn", "qkvo", "norm")
ALL = dict.fromkeys(WHAT, True)


def config(untie: dict[str, Any], **settings: Any) -> DecoderConfig:
    tree: dict[str, Any] = {
        "vocabulary": 11,
        "width": WIDTH,
        "layers": 1,
        "attention": {
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_width": HEAD,
            "qk_norm": True,
            "gate": "head",
        },
        "feed_forward": {"hidden": HIDDEN},
        "untie": {"modalities": M, **untie},
    }
    return DecoderConfig.model_validate(tree | settings)


def info_of(modality_BS: Tensor, padding_BS: Tensor | None = None) -> TokenInfo:
    padding_T = None if padding_BS is None else padding_BS.flatten()
    return TokenInfo(modality_T=modality_BS.flatten(), padding_T=padding_T)


def modality(seed: int = 0, kinds: int = M) -> Tensor:
    return torch.randint(kinds, (B, S), generator=torch.Generator().manual_seed(seed))


def block_of(untie: dict[str, Any], **settings: Any) -> Block:
    block = Block(0, config(untie, **settings)).double()
    randomise(block, seed=1)
    return block


def run(block: Block, x_BSD: Tensor, modality_BS: Tensor) -> Tensor:
    info = info_of(modality_BS)
    modalities = Modalities.of(info, x_BSD.shape[:2], M, Axis("tp"))
    return block(x_BSD, info, None, modalities)[0]


def by_loops(block: Block, untie: dict[str, Any], x_BSD: Tensor, modality_BS: Tensor) -> Tensor:
    """Token by token, each with the weights of its modality; one attention over all of them."""
    weights = dict(block.named_parameters())

    def weight(name: str, m: int, what: str) -> Tensor:
        if not untie.get(what):
            return weights[name.replace("MPFD", "PFD").replace("MFD", "FD")]
        return (
            weights[name.replace(".weight", f".{m}.weight")] if what == "norm" else weights[name][m]
        )

    def norm(name: str, x_D: Tensor, m: int) -> Tensor:
        return x_D / (x_D.square().mean() + EPS).sqrt() * weight(f"{name}.weight", m, "norm")

    def turned(x_d: Tensor, position: int) -> Tensor:
        half = HEAD // 2
        angle = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        first, second = x_d[:half], x_d[half:]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ]
        )

    rows = []
    for b in range(B):
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        for s in range(S):
            m, x_D = int(modality_BS[b, s]), x_BSD[b, s]
            n_D = norm("attention_norm", x_D, m)
            q, k, v, gate = (
                weight(f"attention.{name}.weight", m, "qkvo") @ n_D
                for name in ("q", "k", "v", "gate")
            )
            q_Hd, k_Hd, v_Hd = (y.view(-1, HEAD) for y in (q, k, v))
            keys.append([turned(norm("attention.k_norm", k_d, m), s) for k_d in k_Hd])
            values.append(list(v_Hd))
            heads = []
            for h in range(HEADS):
                q_d = turned(norm("attention.q_norm", q_Hd[h], m), s)
                group = h * KV_HEADS // HEADS
                score_S = torch.stack([q_d @ key[group] for key in keys]) / math.sqrt(HEAD)
                seen_d = sum(
                    p * value[group] for p, value in zip(score_S.softmax(0), values, strict=True)
                )
                heads.append(seen_d * gate[h].sigmoid())
            x_D = x_D + weight("attention.out.weight", m, "qkvo") @ torch.cat(heads)
            n_D = norm("feed_forward_norm", x_D, m)
            gate_F, up_F = weight("feed_forward.w_in_MPFD", m, "ffn") @ n_D
            a_F = torch.nn.functional.silu(gate_F) * up_F
            rows.append(x_D + a_F @ weight("feed_forward.w_out_MFD", m, "ffn"))
    return torch.stack(rows).view(B, S, WIDTH)


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=3)), ids=str)
def test_output_and_gradients_are_those_of_loops(chosen: tuple[bool, ...]) -> None:
    untie = dict(zip(WHAT, chosen, strict=True))
    block, x_BSD = block_of(untie), randn(B, S, WIDTH, seed=2).requires_grad_()
    modality_BS = modality()
    ours, right = run(block, x_BSD, modality_BS), by_loops(block, untie, x_BSD, modality_BS)
    assert error(ours, right) < 1e-12
    leaves = [x_BSD, *block.parameters()]
    mine = torch.autograd.grad(ours.square().sum(), leaves)
    true = torch.autograd.grad(right.square().sum(), leaves)
    for one, other in zip(mine, true, strict=True):
        assert error(one, other) < 1e-11


def test_gradients_by_finite_differences() -> None:
    block, x_BSD, modality_BS = block_of(ALL), randn(B, S, WIDTH, seed=2), modality()

    def loss() -> Tensor:
        return run(block, x_BSD, modality_BS).square().sum()

    for name, parameter in block.named_parameters():
        (gradient,) = torch.autograd.grad(loss(), parameter)
        direction, step = randn(*parameter.shape, seed=7), 1e-5
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.sub_(direction, alpha=2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        slope = float((above - below) / (2 * step))
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6), name


def test_a_modality_without_tokens_has_gradients_of_zero() -> None:
    block, x_BSD = block_of(ALL), randn(B, S, WIDTH, seed=2)
    run(block, x_BSD, modality(kinds=M - 1)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        if parameter.dim() > 1:
            assert not parameter.grad[M - 1].any() and bool(parameter.grad[M - 2].any()), name
        else:
            assert bool(parameter.grad.any()) == (f".{M - 1}." not in name), name


def test_modalities_meet_in_attention_alone() -> None:
    """Other weights of modality 2 change its own tokens, and later ones by attention."""
    modality_BS = torch.tensor([[0, 1, 2, 0, 1, 0, 1]] * B)
    x_BSD = randn(B, S, WIDTH, seed=2)
    with torch.no_grad():
        for what, from_there in (({"ffn": True}, False), (ALL, True)):
            block = block_of(what)
            before = run(block, x_BSD, modality_BS)
            for name, parameter in block.named_parameters():
                if parameter.dim() > 2 and parameter.shape[0] == M:
                    parameter[2] += 1
                elif ".2." in name:
                    parameter += 1
            changed_S = (run(block, x_BSD, modality_BS) != before).any(2).all(0)
            expected = [s == 2 or (from_there and s > 2) for s in range(S)]
            assert changed_S.tolist() == expected


def small(untie: dict[str, Any], **settings: Any) -> DecoderConfig:
    return config(untie, layers=2, **settings)


def decoder_of(settings: DecoderConfig, recompute: Recompute = "none") -> Decoder:
    model = Decoder(settings, recompute=recompute).double()
    initialise(model, 0)
    return model


def alike() -> tuple[Decoder, Decoder]:
    """A model, and the untied one whose modalities all have its weights."""
    tied, untied = decoder_of(small({})), decoder_of(small(ALL))
    shared = dict(tied.named_parameters())
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            for gains in ("attention_norm", "feed_forward_norm", "q_norm", "k_norm"):
                for m in range(M):
                    name = name.replace(f"{gains}.{m}.", f"{gains}.")
            parameter.copy_(shared[name.replace("MPFD", "PFD").replace("MFD", "FD")])
    return tied, untied


def test_equal_weights_are_the_model_that_is_not_untied() -> None:
    tokens_BS = torch.randint(11, (B, S), generator=torch.Generator().manual_seed(3))
    logits = [model(tokens_BS, info_of(modality())).x for model in alike()]
    assert error(*logits) < 1e-13


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute: Recompute) -> None:
    tokens_BS = torch.randint(11, (B, S), generator=torch.Generator().manual_seed(3))
    found = []
    for kept in ("none", recompute):
        model = decoder_of(small(ALL), kept)
        model(tokens_BS, info_of(modality())).x.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_modalities_start_different() -> None:
    attention = decoder_of(small(ALL)).blocks["0"].attention
    assert error(attention.q.weight[0], attention.q.weight[1]) > 0.1


def test_padding_needs_no_modality_and_others_do() -> None:
    model = decoder_of(small(ALL))
    tokens_BS, modality_BS = torch.zeros(B, S, dtype=torch.int64), modality()
    modality_BS[:, -1] = M
    with pytest.raises(ValueError, match=f"modality {M}, but weights are of {M} only"):
        model(tokens_BS, info_of(modality_BS))
    padding_BS = torch.zeros(B, S, dtype=torch.bool)
    padding_BS[:, -1] = True
    model(tokens_BS, info_of(modality_BS, padding_BS))
    with pytest.raises(ValueError, match="need the modality_T"):
        model(tokens_BS)


def test_a_token_passes_the_weights_of_one_modality() -> None:
    tied, untied = small({}), small(ALL)
    total, active = parameter_counts(untied)
    assert active == parameter_counts(tied)[1]
    assert total == sum(p.numel() for p in decoder_of(untied).parameters()) > 2 * active


def test_half_precision_is_as_close_as_when_not_untied() -> None:
    tokens_BS = torch.randint(11, (B, S), generator=torch.Generator().manual_seed(3))
    errors = []
    for model in alike():
        right = model(tokens_BS, info_of(modality())).x
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(error(model.float()(tokens_BS, info_of(modality())).x.double(), right))
    assert 0 < errors[1] < 2 * errors[0]


def test_untied_feed_forwards_need_dense_layers() -> None:
    moe = {"experts": {"count": 4, "hidden": 6}}
    with pytest.raises(ValueError, match=r"untie\.ffn is of dense layers"):
        config({"ffn": True}, moe=moe)
    config({"qkvo": True}, moe=moe)
